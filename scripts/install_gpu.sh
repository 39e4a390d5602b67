#!/usr/bin/env bash
# Make .venv with the GPU stack: vLLM, Transformer Engine, flash-attn, DALI from PyPI, apex from NVIDIA's source.
# Needs a CUDA 13 toolkit (nvcc) and a compiler. Versions fit by their metadata; not run together on a GPU yet.
set -euo pipefail

APEX_REPO="${APEX_REPO:-https://github.com/NVIDIA/apex}"
APEX_COMMIT="${APEX_COMMIT:-10417aceddd7d5d05d7cbf7b0fc2daad1105f8b4}"

usage() {
    cat <<'HELP'
usage: bash scripts/install_gpu.sh [--check]

  --check     only check that the installed `apex` (if any) is NVIDIA's

environment:
  PYTHON        Python 3.11 or newer for .venv
  APEX_COMMIT   commit of github.com/NVIDIA/apex to build
  MAX_JOBS      compiler processes (flash-attn, Transformer Engine and apex are built here)
HELP
}

# The name `apex` on PyPI belongs to another project. NVIDIA's is recognised by its summary.
check_apex() {
    local summary
    summary="$("$1" -c 'from importlib.metadata import metadata, PackageNotFoundError
try:
    print(metadata("apex").get("Summary", "no summary"))
except PackageNotFoundError:
    print("absent")')"
    case "$summary" in
        absent | *NVIDIA*) ;;
        *) die "the installed package 'apex' ($summary) is not NVIDIA's apex but PyPI's project of the same name;" \
            "run: $1 -m pip uninstall apex, then this script again" ;;
    esac
}

build_apex() {
    local source="$VENV/src/apex"
    [ -d "$source/.git" ] || git clone --filter=blob:none "$APEX_REPO" "$source"
    git -C "$source" fetch --quiet origin "$APEX_COMMIT"
    git -C "$source" checkout --quiet --recurse-submodules "$APEX_COMMIT"
    APEX_CPP_EXT=1 APEX_CUDA_EXT=1 run_pip install --no-deps --no-build-isolation "$source"
}

case "${1:-}" in
    -h | --help)
        usage
        exit 0
        ;;
    "" | --check) ;;
    *)
        usage >&2
        exit 2
        ;;
esac

source "$(dirname "$0")/common.sh"
if [ "${1:-}" = --check ]; then
    check_apex "$(job_python)"
    exit 0
fi

[ ! -f "$VENV/.stamp-cpu" ] || die "$VENV holds the CPU stack; remove it or set VENV to another folder"
command -v nvcc >/dev/null || die "nvcc not found; install the CUDA 13 toolkit and put its bin folder on PATH"
[ -x "$VENV/bin/python" ] || "$(find_python)" -m venv "$VENV"
check_apex "$VENV/bin/python"

# torch first, and no build isolation: flash-attn and Transformer Engine compile against the torch they will run with.
say "installing torch and the build tools"
run_pip install torch==2.13.0 torchvision==0.28.0 "setuptools<81" wheel ninja packaging pybind11
say "installing the GPU stack; compiling takes long"
run_pip install --no-build-isolation -e "$ROOT[gpu,dev]"
say "building apex ($APEX_COMMIT)"
build_apex
check_apex "$VENV/bin/python"
"$VENV/bin/python" -c 'import torch, vllm, transformer_engine, flash_attn, apex, nvidia.dali; print(torch.cuda.get_device_name())'
touch "$VENV/.stamp-gpu"
sha256sum "$ROOT/setup.py" | cut -d" " -f1 >"$VENV/.stamp-project"
say "done: $VENV"
