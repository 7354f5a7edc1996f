#!/usr/bin/env bash
# Train every run of the comparison of balancing methods, and report.
#
#     bash bench/balancing/compare.sh DATA MODEL OUT [JOBS]
#
# DATA: folder of the data files; MODEL: folder of MiniLM; OUT: where runs and reports go; JOBS: runs
# at once (2).  Rerun to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=$1 model=$2 out=$3 jobs=${4:-2}
python=${PYTHON:-.venv/bin/python}

methods=$("$python" -c '
from engine.gradients.balancing import METHODS
print(",".join(method for method in METHODS if method != "fixed"))')
"$python" -m bench.balancing.data --data "$data" --out "$out/data"

# sweep RECIPE FOLDER OPTION ...: three seeds; what --tune names is chosen on the first.
sweep() {
    local recipe=$1 folder=$2 init=()
    shift 2
    if [ "$recipe" = three_tasks ]; then init=("init=$model"); fi
    "$python" -m engine.sweep "bench/balancing/$recipe.toml" --out "$out/$folder" \
        --seeds 3 --jobs "$jobs" --prune "$@" "data=$out/data" "${init[@]}"
}

# compare RECIPE RATES WEIGHTS TASK ...: methods, granularities, tuned weights, each task alone.
compare() {
    local recipe=$1 rates=lr=$2 weights=$3 alone=()
    shift 3
    sweep "$recipe" "$recipe" --tune "$rates" --grid "balance=$methods" --set
    sweep "$recipe" "$recipe" --tune "$rates" \
        --grid balance=pcgrad balance_granularity=layer,tensor --set
    # At the recipe's learning rate, which is the one that the sum chose.
    sweep "$recipe" "$recipe-weights" --tune "balancing.fixed=$weights" --set balance=fixed
    for task in "$@"; do
        sweep "$recipe" "$recipe-$task" --tune "$rates" \
            --set "train=[\"$task\"]" "best_of=$task"
        alone+=("$out/$recipe-$task")
    done
    "$python" -m engine.report --series "$out/$recipe" "$out/$recipe-weights" "${alone[@]}" \
        --compare-to balance=sum --tuned lr,balancing.fixed --out "$out/report-$recipe" --force
    # Gradients of 16 times as many examples have a quarter of the noise: do they conflict?
    sweep "$recipe" "$recipe-large" --seeds 1 --set batch_size=256 max_steps=60
    "$python" -m engine.report --series "$out/$recipe-large" --out "$out/report-$recipe-large" --force
}

# generated RECIPE RATES: a recipe on generated sentences, by the sum, PCGrad and equal shares.
generated() {
    "$python" -m engine.sweep "$1" --out "$out/$1" --seeds 5 --jobs "$jobs" --prune \
        --tune "lr=$2" --grid balance=sum,imtl_g,pcgrad --set threads=1
}

# fresh RECIPE FOLDER SEED SEEDS: once more, on seeds by which nothing was chosen, the sum, PCGrad, and
# what did well above: a method and the weights.
fresh() {
    local recipe=$1 folder=$2 options
    options=(--out "$out/$folder" --seeds "$4" --jobs "$jobs" --prune
        --set "seed=$3" threads=1 "data=$out/data" "init=$model")
    "$python" -m engine.sweep "$recipe" "${options[@]}" --grid balance=sum,imtl_g,pcgrad
    "$python" -m engine.sweep "$recipe" "${options[@]}" \
        --grid balance=fixed "balancing.fixed={sst=3,sts=0.3}"
    "$python" -m engine.report --series "$out/$folder" --compare-to balance=sum \
        --out "$out/report-$folder" --force
}

# Further seeds of a rate that is not chosen: is the sum's too high?
sweep three_tasks three_tasks --grid balance=sum,pcgrad lr=7.5e-5 --set
compare three_tasks 7.5e-5,1.5e-4,3e-4 \
    "{sts=0.3},{sts=0.1},{sst=3},{quora=3},{sst=3,sts=0.3},{quora=3,sts=0.3}" sst quora sts
compare five_tasks 5e-4,1e-3,2e-3 \
    "{sts=0.3},{sts=0.1},{quora=3},{cfimdb=3},{sst=3,polarity=3},{quora=3,sts=0.3}" \
    sst polarity quora sts cfimdb
fresh bench/balancing/three_tasks.toml three_tasks-fresh 3 8
fresh best best 100 5
generated demo 1e-3,2e-3,4e-3,8e-3
generated demo-kinds 1e-3,2e-3,4e-3,8e-3
"$python" -m engine.report --series "$out/demo" "$out/demo-kinds" \
    --compare-to balance=sum --tuned lr --out "$out/report-demo" --force
