#!/usr/bin/env bash
# From a fresh clone to a model that has learned to look: see the usage below.
set -euo pipefail

if [[ "${1:-}" == "-h" || "${1:-}" == "--help" ]]; then
    cat <<'HELP'
usage: bash scripts/quickstart.sh [key.path=value ...]

Makes .venv, a tiny Qwen2.5-VL checkpoint and 640 short mp4 files, teaches it the form of an answer (SFT on random
letters), then to answer from the pixels (GRPO), and prints what it learned. About 10 minutes on 2 CPU cores.

The overrides go to the GRPO run. A finished run in the same folder is set aside; an interrupted one goes on.

examples:
  bash scripts/quickstart.sh
  bash scripts/quickstart.sh run_dir=runs/pipeline parallel.tensor=1 parallel.pipeline=2
  NPROC=1 bash scripts/quickstart.sh parallel.tensor=1 rollout.tensor=1

environment: NPROC  number of processes (default: 2)
HELP
    exit 0
fi

source "$(dirname "$0")/common.sh"
cd "$ROOT"
nproc="${NPROC:-2}"

run_dir=runs/quickstart
for override in "$@"; do
    [[ "$override" == *=* ]] || die "'$override' is not key.path=value; see bash scripts/quickstart.sh --help"
    [[ "$override" != run_dir=* ]] || run_dir="${override#run_dir=}"
    [[ "$run_dir" != "~/"* ]] || run_dir="$HOME/${run_dir:2}" # as the jobs read it
done

ensure_venv cpu
python="$VENV/bin/python"

if [[ ! -f runs/tiny/config.json ]]; then
    say "making the checkpoint"
    "$python" scripts/make_tiny_checkpoint.py runs/tiny
fi
if [[ ! -f runs/videos/warmup.jsonl ]]; then
    say "making the videos"
    "$python" scripts/make_videos.py runs/videos
fi

if [[ -f "$run_dir/summary.json" ]]; then
    aside="$run_dir.$(date -r "$run_dir/summary.json" +%Y%m%d-%H%M%S)"
    say "$run_dir is finished; setting it aside as $aside"
    mv "$run_dir" "$aside"
fi

say "warm start: the form of an answer, from random letters"
bash scripts/launch.sh --nproc "$nproc" megatron_rl.sft scripts/recipes/quickstart_sft.yaml \
    "parallel.tensor=$nproc"
say "GRPO: from the pixels to the answer"
bash scripts/launch.sh --nproc "$nproc" megatron_rl.train scripts/recipes/quickstart.yaml \
    model.weights_from=runs/quickstart_sft/checkpoints "$@"

say "done in $((SECONDS / 60)) min $((SECONDS % 60)) s"
"$python" scripts/show_summary.py "$run_dir"
