# /// script
# dependencies = []
# ///
"""Open WebUI through its own API, in front of /v1 and of /api.

It is started beforehand, with WEBUI_AUTH=False, OPENAI_API_BASE_URL=http://127.0.0.1:8000/v1,
OPENAI_API_KEY=none and OLLAMA_BASE_URL=http://127.0.0.1:8000; RAG_EMBEDDING_ENGINE=openai keeps it from
fetching a model of its own. OPEN_WEBUI says where it is: http://127.0.0.1:8080.
"""

import json
import os
import sys
import urllib.request

from cases import HISTORY, MODEL, QUESTION, TOOL, check, check_call, main

ASK = [{"role": "user", "content": QUESTION}]
OPEN_WEBUI = os.environ.get("OPEN_WEBUI") or sys.exit("OPEN_WEBUI is not set: where an Open WebUI runs")


def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
    request = urllib.request.Request(OPEN_WEBUI + path, data, headers)
    with urllib.request.urlopen(request, timeout=100) as answer:
        return answer.read().decode()


TOKEN = "none"
TOKEN = json.loads(call("/api/v1/auths/signin", {"email": "", "password": ""}))["token"]


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
    body = {"model": MODEL, "messages": ASK, "max_tokens": 200, "tools": [TOOL], "tool_choice": "required"}
    answer = json.loads(call("/openai/chat/completions", body))  # Ollama's API has no tool_choice
    (made, *_) = answer["choices"][0]["message"]["tool_calls"]
    check_call(made["function"]["name"], made["function"]["arguments"])


def embeddings():
    answer = json.loads(call("/api/embeddings", {"model": MODEL, "input": ["a", "b"]}))
    check(len(answer["data"]) == 2, "not two vectors")


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
