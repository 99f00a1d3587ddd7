#!/usr/bin/env bash
# What is left of what the full cache answers, in docs/quality.md: five questions about each of many texts of six
# kinds, question visible and hidden, at three budgets. Seeds are those for reports. The recommended policies are
# measured on all samples, others on the first two of each kind.
#
#     benchmarks/questions.sh [DIRECTORY [SAMPLES [SEED]]]
#
# Results are added to what DIRECTORY holds, two samples of each kind at a time; a run that was stopped goes on.
set -euo pipefail
directory=${1:-questions} samples=${2:-20} first=${3:-10000}
export OMP_NUM_THREADS=1
common=(--task questions --weights int8 --kv-dtype float16 --length 1000 --budget 50% --budget 25% --budget 12.5%)
for kind in licences documentation log records code chat; do common+=(--corpus "$kind"); done
measure() { # PROTOCOL SEED POLICY...
    local protocol=$1 seed=$2 chosen=()
    shift 2
    for policy in "$@"; do chosen+=(--policy "$policy"); done
    curkv eval run "$directory/$protocol.jsonl" "${common[@]}" "${chosen[@]}" --protocol "$protocol" \
        --seed "$seed" --samples 2
}
mkdir -p "$directory"
for ((seed = first; seed < first + samples; seed += 2)); do
    measure visible "$seed" snapcur "snapcur draft=0"
    measure hidden "$seed" kvzip
    if ((seed == first)); then # enough to tell that they lose
        measure visible "$seed" layer-defensivekv adacompactor lava chunkkv snapkv curdkv
        measure hidden "$seed" adacompactor capkv snapcur curdkv
    fi
    curkv eval report "$directory"/*.jsonl -o "$directory/report"
done
