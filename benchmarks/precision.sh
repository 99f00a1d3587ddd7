#!/usr/bin/env bash
# What int8 weights and an int8 cache cost beside float32 ones: policies at a quarter of the cache, on a sample.
#
#     benchmarks/precision.sh [DIRECTORY [SAMPLES]]
#
# The report's last section has the three beside each other. A run that was stopped goes on.
set -euo pipefail
directory=${1:-precision} samples=${2:-6}
chosen=(--budget 25% --samples "$samples" --workers "$(nproc)")
for policy in snapcur adacompactor curdkv adacurdkv snapkv h2o streaming-llm; do
    chosen+=(--policy "$policy")
done
mkdir -p "$directory"
export OMP_NUM_THREADS=1
for types in "float32 float32" "int8 float32" "int8 int8"; do
    read -r weights kv_dtype <<<"$types"
    run=(curkv eval run "$directory/results.jsonl" "${chosen[@]}" --weights "$weights" --kv-dtype "$kv_dtype")
    "${run[@]}" --task needle
    "${run[@]}" --task continuation --corpus austen
done
curkv eval report "$directory/results.jsonl" -o "$directory/report"
