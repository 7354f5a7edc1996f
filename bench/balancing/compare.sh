#!/usr/bin/env bash
# Train every run of the comparison of balancing methods, and report.
#
#     bash bench/balancing/compare.sh DATA MODEL OUT [JOBS]
#
# DATA: folder of the data files; MODEL: folder of MiniLM; OUT: where runs and report go; JOBS: runs
# at once (2).  Some 290 runs; rerun to resume.
set -euo pipefail
cd "$(dirname "$0")/../.."
data=$1 model=$2 out=$3 jobs=${4:-2}
python=${PYTHON:-.venv/bin/python}

methods=$("$python" -c 'from engine.gradients.balancing import METHODS; print(",".join(m for m in METHODS if m != "fixed"))')
"$python" -m bench.balancing.data --data "$data" --out "$out/data"

# sweep RECIPE FOLDER OPTION ... : three seeds, the learning rate chosen on the first
sweep() {
    local recipe=$1 folder=$2 init=() rates=5e-4,1e-3,2e-3
    shift 2
    if [ "$recipe" = three_tasks ]; then
        init=("init=$model") rates=5e-5,1.5e-4,4.5e-4
    fi
    "$python" -m engine.sweep "bench/balancing/$recipe.toml" --out "$out/$folder" \
        --seeds 3 --jobs "$jobs" --prune --tune "lr=$rates" "$@" "data=$out/data" "${init[@]}"
}

for recipe in three_tasks five_tasks; do
    sweep "$recipe" "$recipe" --grid "balance=$methods" --set
    sweep "$recipe" "$recipe" --grid balance=pcgrad balance_granularity=layer,tensor --set
done
for task in sst quora sts; do
    sweep three_tasks "three_tasks-$task" --set "train=[\"$task\"]" "best_of=$task"
done
for task in sst polarity quora sts cfimdb; do
    sweep five_tasks "five_tasks-$task" --set "train=[\"$task\"]" "best_of=$task"
done
