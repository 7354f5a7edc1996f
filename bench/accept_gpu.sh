#!/usr/bin/env bash
# On a GPU machine: build, GPU tests, every benchmark, compute-sanitizer; logs and JSON in OUTDIR.
#
#   bash bench/accept_gpu.sh OUTDIR
#
# Uses the Python on PATH and what it has installed (torch with CUDA, triton, pytest, cmake, ninja,
# tokenizers, pydantic, tomli_w, rich).  A part that fails is named at the end, and the others still
# run; what does not fit into SUPERBERT_SECONDS (530) is named too.
# SUPERBERT_DATA and SUPERBERT_MODEL may name the data files' folder and a BERT's.
set -uo pipefail
cd "$(dirname "$0")/.."
out=${1:?usage: bash bench/accept_gpu.sh OUTDIR}
mkdir -p "$out"
if compgen -G "$out/*.log" >/dev/null || compgen -G "$out/*.json" >/dev/null; then
    echo "$out: holds logs or records already; give another folder" >&2
    exit 2
fi
deadline=$((SECONDS + ${SUPERBERT_SECONDS:-530}))
failed=()

part() {  # part NAME MOST_SECONDS COMMAND...
    local name=$1 limit=$2 left=$((deadline - SECONDS))
    shift 2
    if [ "$left" -lt 10 ]; then
        failed+=("$name (no time left)")
        return
    fi
    echo "== $name"
    timeout "$((limit < left ? limit : left))" "$@" 2>&1 | tee "$out/$name.log"
    local status=${PIPESTATUS[0]}
    if [ "$status" -ne 0 ]; then failed+=("$name (status $status)"); fi
}

inputs=()
[ -n "${SUPERBERT_DATA:-}" ] && inputs+=(--data "$SUPERBERT_DATA")
[ -n "${SUPERBERT_MODEL:-}" ] && inputs+=(--init "$SUPERBERT_MODEL")

nvidia-smi --query-gpu=name,driver_version,clocks.sm,clocks.mem,power.limit --format=csv \
    | tee "$out/device.csv"
part build 150 python setup.py --quiet build_ext --inplace
part tests 120 python -m pytest -q -m gpu
part bench-surgery 60 python -m bench.surgery --device cuda --json "$out/surgery.json"
part bench-attention 60 python -m bench.attention --device cuda --json "$out/attention.json"
part bench-layer_norm 45 python -m bench.layer_norm --device cuda --json "$out/layer_norm.json"
part bench-step 90 python -m bench.step --device cuda --rounds 20 "${inputs[@]}" \
    --json "$out/step.json"
# One process under a sanitizer sees every kernel on small shapes; PyTorch's caching would hide
# accesses past a tensor's end.
export PYTORCH_NO_CUDA_MEMORY_CACHING=1
for tool in memcheck racecheck; do
    part "sanitizer-$tool" 60 compute-sanitizer --tool "$tool" --error-exitcode 1 \
        python -m pytest -q -m gpu tests/kernels -k "not graph and not many and not compile"
done

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all parts passed"
