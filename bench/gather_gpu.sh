#!/usr/bin/env bash
# On a machine with network and nvcc: gather what a GPU machine without network needs.
#
#   bash bench/gather_gpu.sh FOLDER DATA [MODEL]
#
# FOLDER gets the library (built for sm_90; SUPERBERT_CUDA_ARCHITECTURES for others), wheels for
# Python 3.12 of what such a machine's image lacks, the data files that the recipes read, and
# MODEL's vocabulary, or all of it with its weights in fp16; below 64 MiB.  Then, there:
#
#   bash bench/accept_gpu.sh FOLDER OUTDIR PART...
set -euo pipefail
cd "$(dirname "$0")/.."
usage="usage: bash bench/gather_gpu.sh FOLDER DATA [MODEL]"
folder=${1:?$usage} data=${2:?$usage} model=${3:-}
python=${PYTHON:-python3}
mkdir -p "$folder/wheels" "$folder/data"

torch=$("$python" -c 'import os, torch; print(os.path.dirname(torch.__file__))')
cmake -S . -B "$folder-build" -GNinja -DSUPERBERT_TORCH_DIR="$torch" -DSUPERBERT_CUDA=ON \
    -DSUPERBERT_CUDA_ARCHITECTURES="${SUPERBERT_CUDA_ARCHITECTURES:-90-real}" >"$folder/build.log"
cmake --build "$folder-build" --parallel >>"$folder/build.log"
cp "$folder-build/libsuperbert.so" "$folder/"
strip --strip-unneeded "$folder/libsuperbert.so"

platforms=()
for version in manylinux_2_28 manylinux_2_17 manylinux2014; do
    platforms+=(--platform "${version}_x86_64")
done
"$python" -m pip download --quiet --no-deps --only-binary=:all: --python-version 3.12 \
    --implementation cp "${platforms[@]}" --dest "$folder/wheels" \
    pydantic==2.14.3 pydantic_core==2.50.4 annotated-types==0.8.0 typing-inspection==0.4.5 \
    tomli_w==1.2.0 torchjd==0.18.0 liger-kernel==0.8.5 filelock==4.3.1 hypothesis==6.170.15 \
    sortedcontainers==2.4.0 pytest-xdist==3.8.0 execnet==2.1.2

for name in ids-sst ids-cfimdb quora sts; do
    cp "$data/$name"-{train,dev}.csv "$folder/data/"
done
if [ -n "$model" ]; then
    mkdir -p "$folder/model"
    cp "$model/config.json" "$model/vocab.txt" "$folder/model/"
    "$python" - "$model" "$folder/model" <<'END'
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

source, target = map(Path, sys.argv[1:])
weights = load_file(source / "model.safetensors")
weights = {name: x.half() if x.is_floating_point() else x for name, x in weights.items()}
save_file(weights, target / "model.safetensors", metadata={"format": "pt"})
END
fi
git rev-parse HEAD >"$folder/commit"
du -sh "$folder"
if [ "$(du -sb "$folder" | cut -f1)" -gt $((64 << 20)) ]; then
    echo "$folder: larger than 64 MiB; leave the model out" >&2
    exit 1
fi
