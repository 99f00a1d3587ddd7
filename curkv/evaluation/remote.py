"""Samples through the HTTP API of any OpenAI-compatible server: exact match only, question visible only."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from curkv.evaluation.evaluator import Wanted
from curkv.evaluation.records import Record
from curkv.evaluation.tasks import make_sample
from curkv.evaluation.tasks.base import Asked, Recipe, Sample
from curkv.evaluation.variants import Variant

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_TIMEOUT = 600.0


class ServerError(RuntimeError):
    """The server refused a request, or did not do what it was asked."""


@dataclass(frozen=True)
class RemoteEvaluator:
    """Asks a server.

    Attributes:
        url: Up to and without /v1.
        model: As the server names it.
        tokenizer: The model's, to make samples of a given length.
    """

    url: str
    model: str
    tokenizer: Tokenizer

    @property
    def source(self) -> str:
        """What records name as their source."""
        return f"{self.model} at {self.url}"

    def evaluate(self, recipe: Recipe, wanted: Wanted) -> list[Record]:
        """Measures variants on one sample.

        Args:
            recipe: What the sample is made from.
            wanted: Variants under the protocol "visible".

        Raises:
            ValueError: The task is measured otherwise.
            ServerError: The server refuses, or keeps everything where a policy was asked for.
        """
        if "visible" not in wanted:
            raise ValueError(f"task {recipe.task} cannot be measured with --url")
        sample = make_sample(recipe, lambda text: len(self.tokenizer.encode(text).ids))
        records = []
        for asked in sample.asked:
            for variant in wanted["visible"]:
                text, usage = self._answer(sample, asked, variant)
                records.append(
                    Record(
                        source=self.source,
                        task=recipe.task,
                        corpus=recipe.corpus,
                        length=recipe.length,
                        seed=recipe.seed,
                        protocol="visible",
                        policy=variant.policy,
                        budget=variant.budget,
                        prompt_tokens=usage["prompt_tokens"],
                        kept_ratio=usage["kv"]["kept_ratio"] if not variant.full else 1.0,
                        score=asked.score(text),
                        text=text,
                        depth=asked.depth,
                        question=asked.name,
                    )
                )
        return records

    def _answer(self, sample: Sample, asked: Asked, variant: Variant) -> tuple[str, dict[str, Any]]:
        text = sample.context + asked.question
        body: dict[str, Any] = {"model": self.model, "max_tokens": asked.max_new_tokens, "temperature": 0}
        if not variant.full:
            body["kv"] = variant.raw
        if sample.chat:
            reply = self._post(
                "/v1/chat/completions", body | {"messages": [{"role": "user", "content": text}]}
            )
            answer = reply["choices"][0]["message"]["content"]
        else:
            reply = self._post("/v1/completions", body | {"prompt": text})
            answer = reply["choices"][0]["text"]
        usage = reply["usage"]
        if not variant.full and "kv" not in usage:
            raise ServerError(f"{self.url} did not apply policy {variant.policy!r}: it is no curkv server")
        return answer, usage

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            self.url.rstrip("/") + path, json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT) as response:
                reply: dict[str, Any] = json.load(response)
        except urllib.error.HTTPError as error:
            raise ServerError(f"{self.url} answered {error.code}: {error.read().decode()[:500]}") from error
        except (urllib.error.URLError, TimeoutError) as error:
            raise ServerError(f"{self.url} cannot be reached: {error}") from error
        return reply
