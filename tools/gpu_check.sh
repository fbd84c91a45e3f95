#!/usr/bin/env bash
# All that is to be done on a machine with a GPU, in under ten minutes:
#
#     tools/gpu_check.sh [FOLDER FOR RESULTS]        default: gpu_results
#
# Tests, compute-sanitizer where it is installed, benchmarks. Needs what cumla needs (cupy-cuda12x
# or cupy-cuda13x, NumPy, ml_dtypes, click, threadpoolctl) and downloads nothing; without pytest the
# benchmark's own check takes the place of the tests. PYTHON says which Python, python3 by default.
# Exits with 0 if all is well, 1 if something failed, 2 if there is no GPU to check.
set -uo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
results=${1:-gpu_results}
python=${PYTHON:-python3}
mkdir -p "$results" || exit 2
results=$(cd "$results" && pwd)
cd "$root" || exit 2
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
export PYTHONUNBUFFERED=1
# A JAX that is imported by a test must not take most of the memory for itself.
export XLA_PYTHON_CLIENT_PREALLOCATE=false

failed=()

# step NAME SECONDS COMMAND...: run it with a time limit, keep its output, remember a failure.
step() {
    local name=$1 limit=$2
    shift 2
    echo
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$results/$name.log"
    local status=${PIPESTATUS[0]}
    if ((status == 124)); then
        echo "$name: stopped after $limit s"
    fi
    if ((status != 0)); then
        failed+=("$name ($status)")
    fi
}

reason=$("$python" - <<'END' 2>&1
from cumla.backends import BackendUnavailable, load_backend
try:
    load_backend("cupy")
except BackendUnavailable as error:
    print(error)
END
)
if [[ -n $reason ]]; then
    echo "nothing to check: $reason" >&2
    exit 2
fi

{
    date -u
    echo "commit $(git describe --always --dirty --abbrev=12 2>/dev/null || echo unknown)"
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.max.sm,power.limit \
        --format=csv 2>/dev/null || echo "nvidia-smi is not there"
    "$python" -m cumla info
} 2>&1 | tee "$results/machine.log"

if "$python" -c 'import pytest' 2>/dev/null; then
    step tests 270 "$python" -m pytest -m gpu -rs --durations=5 -p no:cacheprovider
else
    echo "pytest is not installed: the benchmark's check alone"
    step tests 120 "$python" tools/gpu_bench.py --check-only
fi

if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
        # --error-exitcode: else its own findings would not show in the status.
        step "$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 9 \
            "$python" tools/gpu_bench.py --check-only --quick --no-pool
    done
else
    echo "compute-sanitizer is not installed: left out"
fi

step bench 180 "$python" tools/gpu_bench.py --seconds 130 --out "$results"

echo
if ((${#failed[@]})); then
    echo "FAILED: ${failed[*]}; see $results"
    exit 1
fi
echo "all is well; see $results"
