# Sourced by the other scripts: environment of every job, and `ensure_venv`, which makes or reuses .venv.

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${VENV:-$ROOT/.venv}"
PYTORCH_CPU_INDEX="https://download.pytorch.org/whl/cpu"

export PYTHONSAFEPATH=1 # `data` is a common name: never import it from the current folder
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
export TOKENIZERS_PARALLELISM=false
export TORCH_CPP_LOG_LEVEL="${TORCH_CPP_LOG_LEVEL:-ERROR}"
export CUDA_DEVICE_MAX_CONNECTIONS=1 # Megatron-core's sequence parallelism overlaps only then
export VLLM_ENABLE_V1_MULTIPROCESSING=0 # the engine lives in the trainer's process
export VLLM_LOGGING_LEVEL="${VLLM_LOGGING_LEVEL:-ERROR}"
export VLLM_NO_USAGE_STATS=1

say() { printf '[%s] %s\n' "$(basename "$0" .sh)" "$*" >&2; }

die() {
    say "error: $*"
    exit 1
}

# The python that jobs run under: ours when it exists, else the one of the active environment.
job_python() {
    if [ -x "$VENV/bin/python" ]; then echo "$VENV/bin/python"; else command -v python3; fi
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-} python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    die "no Python 3.11 or newer found; install one, or name it: PYTHON=/path/to/python3.11 bash $0"
}

# pip, quietly: its output goes to a file that is shown only when it fails.
run_pip() {
    local log="$VENV/install.log"
    if ! "$VENV/bin/python" -m pip --disable-pip-version-check "$@" >>"$log" 2>&1; then
        grep -v '^WARNING: Location' "$log" | tail -n 40 >&2
        die "pip $1 failed; everything it said is in $log"
    fi
}

# PyPI's torch is the CUDA build. Take PyTorch's own CPU index only where the configured sources lack the pinned build.
install_torch() {
    local pin
    pin="$(grep '^torch==' "$ROOT/requirements/cpu.lock")"
    if ! "$VENV/bin/python" -m pip install --dry-run --quiet --no-deps "$pin" >/dev/null 2>&1; then
        say "taking $pin from $PYTORCH_CPU_INDEX"
        run_pip install --no-deps --extra-index-url "$PYTORCH_CPU_INDEX" "$pin" \
            "$(grep '^torchvision==' "$ROOT/requirements/cpu.lock")"
    fi
}

# ensure_venv LOCK...: install requirements/LOCK.lock into .venv unless the stamp there says that it has been done.
# A .venv made by install_gpu.sh is stamped "gpu" and keeps its own stack.
ensure_venv() {
    local lock stamp start=$SECONDS
    [ -x "$VENV/bin/python" ] || "$(find_python)" -m venv "$VENV"
    if [ ! -f "$VENV/.stamp-gpu" ]; then
        for lock in "$@"; do install_lock "$lock"; done
    fi
    stamp="$(sha256sum "$ROOT/setup.py" | cut -d' ' -f1)"
    if [ "$(cat "$VENV/.stamp-project" 2>/dev/null)" != "$stamp" ]; then
        run_pip install --no-deps --no-build-isolation -e "$ROOT"
        echo "$stamp" >"$VENV/.stamp-project"
    fi
    [ $((SECONDS - start)) -lt 5 ] || say "environment ready in $((SECONDS - start)) s"
}

install_lock() {
    local file="$ROOT/requirements/$1.lock" stamp
    stamp="$(sha256sum "$file" | cut -d' ' -f1)"
    [ "$(cat "$VENV/.stamp-$1" 2>/dev/null)" != "$stamp" ] || return 0
    say "installing $(grep -c == "$file") pinned packages ($1.lock) into $VENV; the first time takes minutes"
    if [ "$1" = cpu ]; then install_torch; fi
    run_pip install --no-deps -r "$file"
    echo "$stamp" >"$VENV/.stamp-$1"
}
