#!/usr/bin/env bash
# The quality tables of docs/policies.md: every policy and improved settings, at four budgets, question visible and
# hidden, and continuations of novels.
#
#     benchmarks/quality.sh [DIRECTORY [SAMPLES]]
#
# Results are added to what DIRECTORY holds; a run that was stopped goes on.
set -euo pipefail
directory=${1:-quality} samples=${2:-12}
policies=(
    snapcur
    curdkv "curdkv preset=paper" adacurdkv "adacurdkv preset=paper"
    cur-exact "cur-exact combine=product times=curdkv allocation=adaptive"
    snapkv adasnapkv pyramidkv chunkkv "chunkkv reduction=max chunk=32"
    criticalkv "criticalkv allocation=adaptive"
    defensivekv "defensivekv allocation=adaptive" "defensivekv allocation=adaptive pool=15"
    h2o tova dapq expected-attention compactor adacompactor
    keydiff knorm streaming-llm lacache random
)
chosen=(--weights float32 --kv-dtype float16 --budget 75% --budget 50% --budget 25% --budget 12.5% --workers "$(nproc)")
for policy in "${policies[@]}"; do chosen+=(--policy "$policy"); done
mkdir -p "$directory"
export OMP_NUM_THREADS=1
curkv eval run "$directory/needle.jsonl" "${chosen[@]}" --task needle --samples "$samples"
curkv eval run "$directory/continuation.jsonl" "${chosen[@]}" --task continuation --corpus austen --samples "$samples"
curkv eval report "$directory"/*.jsonl -o "$directory/report"
