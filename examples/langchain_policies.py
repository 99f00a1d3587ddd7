"""Eviction through LangChain: the controls travel in `extra_body`, the report comes back in the metadata.

make serve                                   # in another terminal
.venv/bin/pip install langchain-openai
.venv/bin/python examples/langchain_policies.py [http://127.0.0.1:8000]
"""

from __future__ import annotations

import sys

from langchain_openai import ChatOpenAI

QUESTION = "The code of the vault is 4711. " + "Rivers carry rain to the sea. " * 60 + "What is the code?"


def main() -> None:
    """Asks the same with two caches."""
    url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
    for kv in ({"policy": "full"}, {"policy": "snapkv", "budget": "25%"}):
        model = ChatOpenAI(
            base_url=f"{url}/v1",
            api_key="none",
            model="smollm2-135m-instruct",
            temperature=0,
            max_tokens=24,
            extra_body={"kv": kv},
        )
        answer = model.invoke(QUESTION)
        print(f"{kv}: {answer.content!r}")
        print(f"  {answer.response_metadata['token_usage']['kv']}")
        print(f"  streamed: {''.join(str(chunk.content) for chunk in model.stream(QUESTION))!r}")


if __name__ == "__main__":
    main()
