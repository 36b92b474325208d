#!/usr/bin/env bash
# All that a GPU is wanted for, in at most nine minutes: build, the gpu tests, every benchmark, the grid of launch
# parameters. A step that fails or runs out of its time does not stop the next; the status is 1 if any did.
# Without a GPU, and with --smoke, the same steps run small: Triton in its interpreter, kernels compiled ahead of time.
#   PYTHON  the interpreter that has torch (default .venv/bin/python, or python3)      OUT  a folder to copy the rows to
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
smoke=
if [ "${1:-}" = --smoke ] || ! "$PYTHON" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
    smoke=--smoke
fi
failed=0
step() { # step SECONDS COMMAND...
    local limit=$1 begin=$SECONDS
    shift
    echo "== $*"
    timeout --kill-after=5 "$limit" "$@" || { echo "== failed with status $?: $*"; failed=1; }
    echo "== $((SECONDS - begin)) s"
}
build() { # build ON|AUTO
    step 150 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps -C cmake.define.FUSERL_CUDA="$1" --editable .
}
pytest=("$PYTHON" -m pytest -q -p no:cacheprovider)
if [ -n "$smoke" ]; then
    "$PYTHON" -c 'import fuserl._C' 2> /dev/null || build AUTO
    step 120 "${pytest[@]}" -m gpu
    step 120 "${pytest[@]}" tests/kernels/test_ahead_of_time.py tests/kernels/test_nvcc.py
    step 120 "$PYTHON" -m fuserl.engine.cli bench --smoke
    step 120 env TRITON_INTERPRET=1 "$PYTHON" benchmarks/launch_grid.py --smoke
    exit $failed
fi
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
build ON
step 120 "${pytest[@]}" -m gpu
step 40 "$PYTHON" -m fuserl.engine.cli bench generation --save # CUDA graphs on and off
step 120 "$PYTHON" -m fuserl.engine.cli bench "not generation" --save
step 100 "$PYTHON" benchmarks/launch_grid.py
if [ -n "${OUT:-}" ]; then
    cp benchmarks/results/*.jsonl "$OUT"
    for rows in benchmarks/results/launches/*.jsonl; do cp "$rows" "$OUT/launches-$(basename "$rows")"; done
fi
exit $failed
