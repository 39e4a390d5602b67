#!/usr/bin/env bash
# Lint, type check and test. Makes .venv where there is none.
set -euo pipefail

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    cat <<'HELP'
usage: bash scripts/test.sh [--full] [pytest arguments]

  (default)   ruff, mypy and the fast tests
  --full      ruff, mypy and every test

examples:
  bash scripts/test.sh tests/unit/test_world.py -x
  bash scripts/test.sh --full --durations=20
HELP
    exit 0
fi

source "$(dirname "$0")/common.sh"
cd "$ROOT"

tier=(-m "not full")
if [[ "${1:-}" == "--full" ]]; then
    tier=()
    shift
fi
ensure_venv cpu test

status=0
check() {
    say "$*"
    "$VENV/bin/python" -m "$@" || status=1
}
check ruff check --quiet .
check ruff format --check --quiet .
check mypy
check pytest "${tier[@]}" "$@"
exit "$status"
