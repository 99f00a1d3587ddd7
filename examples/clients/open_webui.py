# /// script
# dependencies = []
# ///
"""Open WebUI through its own API, in front of /v1 and of /api.

OPEN_WEBUI names its executable: `pip install open-webui` takes some gigabytes and is left to who runs this.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.request

PORT = int(os.environ.get("OPEN_WEBUI_PORT", "8399"))
HERE = f"http://127.0.0.1:{PORT}"
START_SECONDS = 300

if "OPEN_WEBUI" not in os.environ:
    sys.exit("OPEN_WEBUI is not set: the path of an executable `open-webui`")

from cases import BASE, HISTORY, MODEL, QUESTION, TOOL, URL, check, check_call, main  # noqa: E402

TOKEN = ""
ASK = [{"role": "user", "content": QUESTION}]


def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    with urllib.request.urlopen(urllib.request.Request(HERE + path, data, headers), timeout=100) as answer:
        return answer.read().decode()


def start(folder):
    environment = {
        **os.environ,
        "DATA_DIR": folder,
        "WEBUI_SECRET_KEY": "none",
        "WEBUI_AUTH": "False",
        "OPENAI_API_BASE_URL": BASE,
        "OPENAI_API_KEY": "none",
        "OLLAMA_BASE_URL": URL,
        "RAG_EMBEDDING_ENGINE": "openai",
        "RAG_OPENAI_API_BASE_URL": BASE,
        "HF_HUB_OFFLINE": "1",
        "OFFLINE_MODE": "True",
    }
    serve = [os.environ["OPEN_WEBUI"], "serve", "--host", "127.0.0.1", "--port", str(PORT)]
    with open(os.path.join(folder, "log"), "w") as log:
        server = subprocess.Popen(serve, env=environment, stdout=log, stderr=log, cwd=folder)
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and server.poll() is None:
        try:
            call("/health")
            return server
        except OSError:
            time.sleep(1)
    server.kill()
    with open(os.path.join(folder, "log")) as log:
        sys.exit(f"Open WebUI does not start: {log.read()[-2000:]}")


def create(**options):
    body = {"model": MODEL, "messages": ASK, "max_tokens": 60, "temperature": 0, **options}
    return call("/api/chat/completions", body)


def message(**options):
    return json.loads(create(stream=False, **options))["choices"][0]["message"]


def chat():
    check(MODEL in [model["id"] for model in json.loads(call("/api/models"))["data"]], "not among the models")
    check(message()["content"], "no text")
    body = {"model": MODEL, "messages": ASK, "stream": False, "options": {"num_predict": 20}}
    check(json.loads(call("/ollama/api/chat", body))["message"]["content"], "no text from /ollama/api/chat")


def stream():
    check(create(stream=True).count("data: ") > 2, "no chunks")


def tools_required():
    (made, *_) = message(tools=[TOOL], tool_choice="required")["tool_calls"]
    check_call(made["function"]["name"], made["function"]["arguments"])


def embeddings():
    answer = json.loads(call("/api/embeddings", {"model": MODEL, "input": ["a", "b"]}))
    check(len(answer["data"]) == 2, "not two vectors")


with tempfile.TemporaryDirectory() as folder:
    server = start(folder)
    try:
        TOKEN = json.loads(call("/api/v1/auths/signin", {"email": "", "password": ""}))["token"]
        main(
            f"Open WebUI {json.loads(call('/api/version'))['version']}",
            None,
            {
                "chat": chat,
                "stream": stream,
                "tools required": tools_required,
                "tool history": lambda: check(message(messages=HISTORY, tools=[TOOL]), "no answer"),
                "embeddings": embeddings,
            },
        )
    finally:
        server.terminate()
        server.wait()
