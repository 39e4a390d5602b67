#!/usr/bin/env bash
# Lint, type check and test. Makes .venv where there is none.
set -euo pipefail

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    cat <<'HELP'
usage: bash scripts/test.sh [--quick | --full] [pytest arguments]

  --quick     ruff, mypy and the unit tests: a few minutes, before each commit
  (default)   the same and the tests with several ranks: what CI runs
  --full      every test, benchmarks in small among them

examples:
  bash scripts/test.sh --quick
  bash scripts/test.sh tests/unit/test_world.py -x
  bash scripts/test.sh --full --durations=20
HELP
    exit 0
fi

source "$(dirname "$0")/common.sh"
export HF_HUB_OFFLINE=1 # no test downloads anything
cd "$ROOT"

tier=(-m "not full")
case "${1:-}" in
    --quick)
        tier=(-m "not full" tests/unit)
        shift
        ;;
    --full)
        tier=()
        shift
        ;;
esac
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
