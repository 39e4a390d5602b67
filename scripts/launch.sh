#!/usr/bin/env bash
# Start a job with torchrun, on one node or several.
set -euo pipefail

usage() {
    cat <<'HELP'
usage: bash scripts/launch.sh [options] MODULE [ARGUMENTS...]

  MODULE      megatron_rl.train (RL), megatron_rl.sft or megatron_rl.cache_videos
  ARGUMENTS   its recipe and key.path=value overrides; --check only tells whether it could run

  --nproc N              processes on this node (default: number of GPUs, or 1 without any)
  --nnodes M             number of nodes (default: 1); the next two are then required
  --node-rank R          rank of this node, from 0
  --master HOST:PORT     an address of node 0 that all nodes reach
  --grace SECONDS        time to save after SIGTERM, before the processes are killed (default: 45)

examples:
  bash scripts/launch.sh --nproc 2 megatron_rl.train scripts/recipes/quickstart.yaml train.num_steps=20
  bash scripts/launch.sh megatron_rl.train --help
  bash scripts/launch.sh --nproc 8 --nnodes 2 --node-rank 0 --master node0:29500 megatron_rl.train recipe.yaml
HELP
}

fail() {
    echo "launch.sh: $*; see bash scripts/launch.sh --help" >&2
    exit 2
}

nproc="" nnodes=1 node_rank="" master="" grace=45
while [[ $# -gt 0 && "$1" == -* ]]; do
    option="$1"
    if [[ "$option" == "-h" || "$option" == "--help" ]]; then
        usage
        exit 0
    fi
    [[ $# -ge 2 ]] || fail "$option needs a value"
    case "$option" in
        --nproc) nproc="$2" ;;
        --nnodes) nnodes="$2" ;;
        --node-rank) node_rank="$2" ;;
        --master) master="$2" ;;
        --grace) grace="$2" ;;
        *) fail "$option: no such option" ;;
    esac
    shift 2
done
[[ $# -ge 1 ]] || fail "no module given"
for number in "${nproc:-1}" "$nnodes" "$grace"; do
    [[ "$number" =~ ^[1-9][0-9]*$ ]] || fail "'$number' is not a positive number"
done

source "$(dirname "$0")/common.sh"
python="$(job_python)"

if [[ "${2:-}" == "--help" || "${2:-}" == "-h" ]]; then
    exec "$python" -m "$@"
fi
case "$1" in
    megatron_rl.train | megatron_rl.sft | megatron_rl.cache_videos) ;;
    megatron_rl.*) fail "$1 is not a job for several processes; train, sft and cache_videos are" ;;
esac
if [[ -z "$nproc" ]]; then
    nproc="$("$python" -c 'import torch; print(max(1, torch.cuda.device_count()))')"
fi
if [[ "$nnodes" == 1 ]]; then
    rendezvous=(--standalone)
else
    [[ "$node_rank" =~ ^[0-9]+$ && "$node_rank" -lt "$nnodes" ]] || fail "--node-rank must be 0 to $((nnodes - 1))"
    [[ "$master" =~ ^[^:]+:[0-9]+$ ]] || fail "--master must be HOST:PORT"
    rendezvous=(--nnodes "$nnodes" --node-rank "$node_rank" --master-addr "${master%:*}" --master-port "${master##*:}")
fi
# A mistake in the recipe or its data ends here, before any rank starts and without torchrun's report about its children.
[[ "$1" != megatron_rl.* ]] || WORLD_SIZE=$((nproc * nnodes)) "$python" -m "$@" --check >/dev/null
exec "$python" -m megatron_rl.runtime.launcher "${rendezvous[@]}" --nproc-per-node "$nproc" --shutdown-timeout "$grace" \
    --module "$@"
