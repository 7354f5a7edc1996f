#!/usr/bin/env bash
# On a GPU machine without network: GPU tests and benchmarks, the most valuable evidence first.
#
#   bash bench/accept_gpu.sh FOLDER OUTDIR PART...
#
# FOLDER is what bench/gather_gpu.sh gathered; OUTDIR gets a log and a record for each part, and
# after each part OUTDIR.tar.gz holds all so far.  Parts run in the order given.  Three names stand
# for several parts each, of which what counts most fits into one run of eight minutes:
#
#   run1   probe tests step surgery attention training
#   run2   kernel_tests tiles linear linear_tiles layer_norm step_compiled ncu memcheck racecheck
#   run3   step_modernbert long_text rotary gated_activation
#
# A part that fails is named at the end, and the others still run; what does not fit into
# SUPERBERT_SECONDS (470) is named too.  SUPERBERT_STEP and SUPERBERT_ATTENTION choose contestants (a
# pattern of their names).  The Python of such a machine has torch with CUDA, triton, transformers and
# pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
usage="usage: bash bench/accept_gpu.sh FOLDER OUTDIR PART..."
folder=$(realpath "${1:?$usage}") out=${2:?$usage}
: "${3:?$usage}"
shift 2
run1=(probe tests step surgery attention training)
run2=(kernel_tests tiles linear linear_tiles layer_norm step_compiled ncu memcheck racecheck)
run3=(step_modernbert long_text rotary gated_activation)
parts=()
for name in "$@"; do
    case $name in
    run1) parts+=("${run1[@]}") ;;
    run2) parts+=("${run2[@]}") ;;
    run3) parts+=("${run3[@]}") ;;
    *) parts+=("$name") ;;
    esac
done
for name in "${parts[@]}"; do
    if [[ " ${run1[*]} ${run2[*]} ${run3[*]} " != *" $name "* ]]; then
        echo "$name: no such part" >&2
        exit 2
    fi
done
mkdir -p "$out"
if compgen -G "$out/*.log" >/dev/null || compgen -G "$out/*.json" >/dev/null; then
    echo "$out: holds logs or records already; give another folder" >&2
    exit 2
fi
deadline=$((SECONDS + ${SUPERBERT_SECONDS:-470}))
failed=()
work=${SUPERBERT_WORK:-/tmp/superbert}
mkdir -p "$work"
python3 -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$work/site" "$folder"/wheels/*.whl || exit 2
cp "$folder/libsuperbert.so" kernels/
PYTHONPATH=$work/site${PYTHONPATH:+:$PYTHONPATH}
SUPERBERT_COMMIT=$(cat "$folder/commit")
export PYTHONPATH SUPERBERT_COMMIT PYTHONUNBUFFERED=1 SUPERBERT_DATA="$folder/data" COLUMNS=160
# Figures of torch's fallbacks would look like ours.
python3 -c 'import kernels; exit(kernels.implementation("gram", "cuda") != "cuda")' || {
    echo "kernels/libsuperbert.so: has no CUDA code, or cannot be loaded; gather again" >&2
    exit 2
}

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

# Of the engine and of the update first: what a run trains with.
tests=(tests/engine/training/test_step_gpu.py tests/kernels/test_surgery_cuda.py
    tests/kernels/test_balanced_gradients.py tests/engine/optim/test_loss_scale.py
    tests/engine/runtime/test_gpu_meter.py tests/engine/data/test_collate.py)
kernel_tests=(tests/kernels/test_triton.py tests/kernels/test_cuda_graphs.py)
# Small launches of each kind of kernel, since tools that watch every access are slow.
watched='agree_with_the_cpu or test_adamw_skips or test_gram_by_segment or test_combine_rounding'
# Warnings of other versions' libraries are no failures here.
pytest=(python3 -m pytest -q -m gpu -o filterwarnings=default -p no:cacheprovider)
usual='^this engine, bf16, (pcgrad|pcgrad, one stream|sum)$|^transformers, bf16(, (packed|recorded|compiled layers))*, sum$'
compiled='^this engine, bf16, pcgrad$|bf16.*compile'
base=(--device cuda --data "$folder/data" --init "$folder/model")

step() {  # step NAME MOST_SECONDS ENCODER PATTERN
    part "$1" "$2" python3 -m bench.step "${base[@]}" --encoder "$3" --rounds 10 \
        --warmup-seconds 60 --json "$out/$1.json" --only "$4"
}

profile() {  # the profiler's figures of a few kernels, as CSV
    command -v ncu >/dev/null || PATH=$PATH:/usr/local/cuda/bin
    if ! command -v ncu >/dev/null; then
        echo "ncu: not installed"
        return 1
    fi
    local csv=$out/ncu.csv
    ncu --version
    ncu --profile-from-start off --target-processes all --csv --page details \
        --section SpeedOfLight --section Occupancy --section MemoryWorkloadAnalysis \
        --section LaunchStats --log-file "$csv" \
        python3 -m bench.kernels_once gram combine attention --runs 1
    local status=$?
    cut -c1-200 "$csv" | tail -n 40
    if grep -q -e ERR_NVGPUCTRPERM -e "No kernels were profiled" "$csv"; then
        echo "ncu: measured nothing; it may lack the permission to read the GPU's counters"
        return 1
    fi
    return "$status"
}
export -f profile
export out

for name in "${parts[@]}"; do
    case $name in
    probe)
        part probe 60 python3 - <<'PROBE'
import shutil
import subprocess

import torch

import kernels

print(torch.__version__, torch.cuda.get_device_name(), torch.cuda.get_device_properties(0))
if shutil.which("nvidia-smi"):
    print(subprocess.run(["nvidia-smi"], capture_output=True, text=True).stdout)
operators = ("gram", "combine", "attention", "layer_norm")
print({name: kernels.implementation(name, "cuda") for name in operators})
x = torch.randn(3, 1_000_003, device="cuda")
error = (kernels.gram(x).double() - x.double() @ x.double().T).abs().max().item()
print("gram is off by", error)
assert error < 1
PROBE
        ;;
    tests) part tests 120 "${pytest[@]}" -n 8 --dist load --durations 15 "${tests[@]}" ;;
    kernel_tests)
        part kernel_tests 150 "${pytest[@]}" -n 8 --dist load --durations 15 "${kernel_tests[@]}"
        ;;
    step)
        step step 150 bert-base "${SUPERBERT_STEP:-$usual}"
        ;;
    step_compiled) step step_compiled 150 bert-base "${SUPERBERT_STEP:-$compiled}" ;;
    step_modernbert) step step_modernbert 150 modernbert-base "${SUPERBERT_STEP:-$usual}" ;;
    rotary | gated_activation)
        part "$name" 40 python3 -m "bench.$name" --device cuda --json "$out/$name.json"
        ;;
    long_text)
        part long_text 90 python3 -m bench.long_text "${base[@]}" --encoder modernbert-base \
            --json "$out/long_text.json"
        ;;
    tiles)  # ends with the lines to paste
        SUPERBERT_LINES=${SUPERBERT_LINES:-24} \
            part tiles 60 python3 -m bench.attention_tiles --json "$out/attention_tiles.json"
        ;;
    linear) part linear 40 python3 -m bench.linear --device cuda --json "$out/linear.json" ;;
    linear_tiles)
        part linear_tiles 60 python3 -m bench.linear_tiles --json "$out/linear_tiles.json"
        ;;
    training)
        part training 90 python3 -m engine.train cgs --data "$folder/data" \
            --init "$folder/model" --out "$work/run-$$" --max-steps 300
        cp "$work/run-$$/metrics.jsonl" "$out/training.jsonl" 2>/dev/null
        ;;
    surgery) part surgery 60 python3 -m bench.surgery --device cuda --json "$out/surgery.json" ;;
    attention)
        part attention 90 python3 -m bench.attention --device cuda --dtype bf16 \
            --only "${SUPERBERT_ATTENTION:-varlen|planned before|tiles alone}" --json "$out/attention.json"
        ;;
    layer_norm)
        part layer_norm 90 python3 -m bench.layer_norm --device cuda --json "$out/layer_norm.json"
        ;;
    ncu) part ncu 90 bash -c profile ;;
    memcheck | racecheck)
        # PyTorch's caching would hide accesses past a tensor's end.
        part "$name" 60 env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$name" \
            --error-exitcode 1 "${pytest[@]}" -x tests/kernels/test_triton.py \
            tests/kernels/test_surgery_cuda.py -k "$watched"
        ;;
    esac
done

if [ "${#failed[@]}" -gt 0 ]; then
    printf 'failed: %s\n' "${failed[@]}"
    exit 1
fi
echo "all parts passed"
