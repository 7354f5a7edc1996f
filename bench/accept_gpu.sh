#!/usr/bin/env bash
# On a GPU machine: build, run the GPU tests and every benchmark, leave JSON in OUTDIR.
#
#   bash bench/accept_gpu.sh OUTDIR
#
# Uses the Python on PATH and what it has installed (torch with CUDA, triton, pytest, cmake, ninja,
# tokenizers, pydantic, tomli_w, rich).  A part that fails is named at the end; the others still run.
# SUPERBERT_DATA and SUPERBERT_MODEL may name the data files' folder and a BERT's.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/accept_gpu.sh OUTDIR}
mkdir -p "$out"
failed=()

part() {  # part NAME SECONDS COMMAND...
    local name=$1 limit=$2
    shift 2
    echo "== $name"
    timeout "$limit" "$@" 2>&1 | tee "$out/$name.log"
    if [ "${PIPESTATUS[0]}" -ne 0 ]; then failed+=("$name"); fi
}

inputs=()
[ -n "${SUPERBERT_DATA:-}" ] && inputs+=(--data "$SUPERBERT_DATA")
[ -n "${SUPERBERT_MODEL:-}" ] && inputs+=(--init "$SUPERBERT_MODEL")

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv \
    | tee "$out/device.csv"
part build 150 python setup.py --quiet build_ext --inplace
part tests 120 python -m pytest -q -m gpu
for name in surgery attention layer_norm; do
    [ -f "bench/$name.py" ] || continue
    part "bench-$name" 60 python -m "bench.$name" --device cuda --json "$out/$name.json"
done
part bench-step 90 python -m bench.step --device cuda --rounds 20 "${inputs[@]}" \
    --json "$out/step.json"

if [ "${#failed[@]}" -gt 0 ]; then
    echo "failed: ${failed[*]}"
    exit 1
fi
echo "all parts passed"
