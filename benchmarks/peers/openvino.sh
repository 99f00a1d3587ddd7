#!/usr/bin/env bash
# OpenVINO GenAI with int8 weights and a u8 KV cache.
#
#     openvino.sh install             two environments: one exports the model, the other serves it
#     openvino.sh serve PORT [...]    options of openvino_server.py
#     openvino.sh version
set -euo pipefail
here=$(dirname "$(readlink -f "$0")") home=${CURKV_PEERS:-$HOME/.cache/curkv/peers}/openvino
case $1 in
install)
    python3 -m venv "$home/export"
    "$home/export/bin/pip" install torch==2.13.0
    "$home/export/bin/pip" install torch==2.13.0 nncf==3.4.0 openvino==2026.4.1 openvino-tokenizers==2026.4.1.0 \
        'transformers<5.3' requests setuptools 'huggingface-hub<1.22'
    # without dependencies: they name torchvision, which this model does not need and which wants another torch
    "$home/export/bin/pip" install --no-deps optimum-intel==2.2.0 optimum==2.3.0
    python "$here/checkpoint.py" smollm2-135m-instruct "$home/model"
    "$home/export/bin/optimum-cli" export openvino --model "$home/model" \
        --task text-generation-with-past --weight-format int8 "$home/int8"
    python3 -m venv "$home/serve"
    "$home/serve/bin/pip" install openvino-genai==2026.4.1.0
    ;;
serve) exec "$home/serve/bin/python" "$here/openvino_server.py" "$home/int8" --port "$2" "${@:3}" ;;
version) "$home/serve/bin/pip" list 2>/dev/null | grep openvino-genai ;;
esac
