#!/usr/bin/env bash
# Check and measure internvit on a CUDA card, within five minutes and without a network.
#
#     benchmarks/card.sh [RESULTS] [PHOTOS]
#
# RESULTS is the folder for all output (default: ./card-results); PHOTOS is a folder of pictures (default: those in
# examples/images). PYTHON names the interpreter of an environment with internvit and its test requirements. Every step
# has a time limit, and a step that fails does not keep the others from running; then the script ends with 1.
set -euo pipefail

results=${1:-./card-results}
python=${PYTHON:-python}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
photos=$(cd "${2:-$root/examples/images}" && pwd)

if ! card=$("$python" -c 'import torch; print(torch.cuda.get_device_name(0))' 2>/dev/null); then
    echo "card.sh: PyTorch sees no CUDA device; check nvidia-smi, CUDA_VISIBLE_DEVICES and the build of PyTorch" >&2
    exit 1
fi

mkdir -p "$results"
results=$(cd "$results" && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
cd "$root"
export PYTHONPATH="$root/src${PYTHONPATH:+:$PYTHONPATH}"
failed=0

# step NAME SECONDS COMMAND...: run a command under a time limit, with its output in RESULTS/NAME.txt.
step() {
    local name=$1 limit=$2 begin=$SECONDS code=0
    shift 2
    { echo "\$ $*"; timeout --kill-after=5 "$limit" "$@"; } >"$results/$name.txt" 2>&1 || code=$?
    local outcome=ok
    if ((code == 124 || code == 137)); then
        outcome="ended at its limit of $limit s"
    elif ((code != 0)); then
        outcome="failed with $code"
    fi
    if ((code != 0)); then
        failed=1
    fi
    printf '%-10s %4d s  %s\n' "$name" $((SECONDS - begin)) "$outcome" | tee -a "$results/summary.txt"
}

printf '%s\n' "$card" >"$results/summary.txt"
step weights 25 "$python" -c 'import sys
from pathlib import Path
sys.path.insert(0, "benchmarks")
from host_path import make_checkpoint
make_checkpoint(Path(sys.argv[1]), blocks=24, dtype="bfloat16")' "$scratch/300m"
step versions 20 "$python" -m internvit_cli doctor --model "$scratch/300m"
step tests 75 "$python" -m pytest -q -m cuda tests/test_kernels.py tests/test_encoder.py
step start_up 35 "$python" benchmarks/start_up.py "$photos" --model "$scratch/300m" --rounds 3 --images 3 -- --device cuda
step encoder 60 "$python" benchmarks/encoder.py --device cuda --shape 300m --dtype bfloat16 fp8 --batch 32 --repeats 3
step host_path 30 "$python" benchmarks/host_path.py "$photos" --copies 40 --rates 0
step pipeline 55 "$python" benchmarks/pipeline.py "$photos" --device cuda --model "$scratch/300m" --repeat 40 --rounds 1

cat "$results/versions.txt"
echo "all output: $results"
exit "$failed"
