#!/usr/bin/env bash
# On a GPU machine without network: GPU tests and benchmarks, the most valuable evidence first.
#
#   bash bench/accept_gpu.sh FOLDER OUTDIR PART...
#
# FOLDER is what bench/gather_gpu.sh gathered; OUTDIR gets a log and a record for each part, and
# after each part OUTDIR.tar.gz holds all so far.  Parts run in the order given: probe tests step
# training surgery attention tiles layer_norm memcheck racecheck.  A part that fails is named at
# the end, and the others still run; what does not fit into SUPERBERT_SECONDS (540) is named too.
# SUPERBERT_STEP and SUPERBERT_ATTENTION choose contestants (a pattern of their names).  The Python of
# such a machine has torch with CUDA, triton, transformers and pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
usage="usage: bash bench/accept_gpu.sh FOLDER OUTDIR PART..."
folder=$(realpath "${1:?$usage}") out=${2:?$usage}
: "${3:?$usage}"
shift 2
mkdir -p "$out"
if compgen -G "$out/*.log" >/dev/null || compgen -G "$out/*.json" >/dev/null; then
    echo "$out: holds logs or records already; give another folder" >&2
    exit 2
fi
deadline=$((SECONDS + ${SUPERBERT_SECONDS:-540}))
failed=()
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target /tmp/superbert-site "$folder"/wheels/*.whl || exit 2
cp "$folder/libsuperbert.so" kernels/
PYTHONPATH=/tmp/superbert-site${PYTHONPATH:+:$PYTHONPATH}
SUPERBERT_COMMIT=$(cat "$folder/commit")
export PYTHONPATH SUPERBERT_COMMIT PYTHONUNBUFFERED=1 SUPERBERT_DATA="$folder/data" COLUMNS=160

part() {  # part NAME MOST_SECONDS COMMAND...
    local name=$1 limit=$2 left=$((deadline - SECONDS)) start=$SECONDS
    shift 2
    if [ "$left" -lt 10 ]; then
        failed+=("$name (no time left)")
        return
    fi
    echo "== $name"
    timeout -k 5 "$((limit < left ? limit : left))" "$@" >"$out/$name.log" 2>&1
    local status=$?
    tail -n "${SUPERBERT_LINES:-15}" "$out/$name.log"
    echo "== $name: status $status after $((SECONDS - start)) s"
    if [ "$status" -ne 0 ]; then failed+=("$name (status $status)"); fi
    tar -czf "$out.tar.gz" -C "$(dirname "$out")" "$(basename "$out")"
}

gpu_tests=(tests/kernels/test_triton.py tests/kernels/test_surgery_cuda.py
    tests/kernels/test_cuda_graphs.py tests/kernels/test_balanced_gradients.py
    tests/engine/training/test_step_gpu.py tests/engine/optim/test_loss_scale.py
    tests/engine/runtime/test_gpu_meter.py tests/engine/data/test_collate.py)
# Warnings of other versions' libraries are no failures here.
pytest=(python3 -m pytest -q -m gpu -o filterwarnings=default -p no:cacheprovider)
base=(--device cuda --data "$folder/data" --init /tmp/superbert-base)

for name in "$@"; do
    case $name in
    probe)
        part probe 60 python3 - <<'END'
import subprocess

import torch

import kernels

print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))
print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
operators = ("gram", "combine", "attention", "layer_norm")
found = {name: kernels.implementation(name, "cuda") for name in operators}
print(found)
assert found["gram"] == "cuda", "the library was built without CUDA"
x = torch.randn(3, 1_000_003, device="cuda")
error = (kernels.gram(x).double() - x.double() @ x.double().T).abs().max().item()
print("gram is off by", error)
assert error < 1
END
        ;;
    tests) part tests 240 "${pytest[@]}" -n 8 --dist load --durations 15 "${gpu_tests[@]}" ;;
    step)
        if [ ! -d /tmp/superbert-base ]; then
            python3 -m bench.random_bert /tmp/superbert-base --vocabulary "$folder/model/vocab.txt"
        fi
        part step "${SUPERBERT_STEP_SECONDS:-300}" python3 -m bench.step "${base[@]}" \
            --rounds 10 --json "$out/step.json" --only "${SUPERBERT_STEP:-bf16}"
        ;;
    tiles) part tiles 120 python3 -m bench.attention_tiles --json "$out/attention_tiles.json" ;;
    training)
        part training 120 python3 -m engine.train cgs --data "$folder/data" \
            --init "$folder/model" --out /tmp/superbert-run --max-steps 300
        ;;
    surgery) part surgery 60 python3 -m bench.surgery --device cuda --json "$out/surgery.json" ;;
    attention)
        part attention 120 python3 -m bench.attention --device cuda --dtype bf16 \
            --only "${SUPERBERT_ATTENTION:-varlen}" --json "$out/attention.json"
        ;;
    layer_norm)
        part layer_norm 60 python3 -m bench.layer_norm --device cuda --json "$out/layer_norm.json"
        ;;
    memcheck | racecheck)
        # PyTorch's caching would hide accesses past a tensor's end.
        part "$name" 120 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$name" \
            --error-exitcode 1 "${pytest[@]}" -x tests/kernels/test_triton.py \
            tests/kernels/test_surgery_cuda.py -k "not graph and not many and not compile"
        ;;
    *)
        echo "$name: no such part" >&2
        exit 2
        ;;
    esac
done

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all parts passed"
