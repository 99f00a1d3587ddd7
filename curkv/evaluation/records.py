"""Results: one JSON line per sample and variant, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import IO, Literal

ProtocolName = Literal["visible", "hidden", "continuation", "decoding"]
SampleKey = tuple[str, str, int, int]
Key = tuple[str, SampleKey, str, str, str, str]


@dataclass(frozen=True)
class Record:
    """What one variant made of one sample.

    Attributes:
        source: Model, its weights' type and the KV dtype, or the server that was asked.
        task: Name of the task.
        corpus: Text that tasks over real text are made from.
        length: Tokens asked for.
        seed: Of the sample.
        protocol: "visible": the policy saw context and question, as in an ordinary request; "hidden": the
            context alone, the question came afterwards; "continuation": a text without a question;
            "decoding": it saw its own long answer too, and the budget is the decode budget.
        policy: Policy and options.
        budget: "" for the full cache.
        prompt_tokens: Tokens that the policy saw.
        kept_ratio: Share of them that it kept, mean over layers and heads.
        nll: Mean -ln p per token of the right answer or of the text that follows.
        score: Share of the answer's strings that greedy decoding gave.
        text: What greedy decoding gave, up to where all strings were found.
        kl: Mean KL(full cache || variant) per token of the text that follows, in nats.
        top1: Share of these tokens for which both find the same token likeliest.
        depth: Where in the context the answer lies, 0 to 1.
        question: Which of a sample's questions it is, "" if there is only one.
    """

    source: str
    task: str
    corpus: str
    length: int
    seed: int
    protocol: ProtocolName
    policy: str
    budget: str
    prompt_tokens: int
    kept_ratio: float
    nll: float | None = None
    score: float | None = None
    text: str | None = None
    kl: float | None = None
    top1: float | None = None
    depth: float | None = None
    question: str = ""

    @property
    def sample(self) -> SampleKey:
        """What makes its sample one of a kind."""
        return self.task, self.corpus, self.length, self.seed

    @property
    def key(self) -> Key:
        """What makes a record one of a kind."""
        return self.source, self.sample, self.question, self.protocol, self.policy, self.budget


def read_records(path: Path) -> list[Record]:
    """Reads complete lines; of records with the same key the last one counts.

    Raises:
        ValueError: A line is no record.
    """
    names = {field.name for field in fields(Record)}
    records: dict[Key, Record] = {}
    for number, line in enumerate(_complete(path).decode().splitlines(), 1):
        try:
            raw = json.loads(line)
            record = Record(**{name: value for name, value in raw.items() if name in names})
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path}, line {number}: no record of an evaluation ({error})") from error
        records[record.key] = record
    return list(records.values())


class Journal:
    """A file that records are appended to."""

    def __init__(self, file: IO[str]) -> None:
        self._file = file

    @classmethod
    @contextmanager
    def open(cls, path: Path) -> Iterator[Journal]:
        """Opens a file for appending, without the partial line that a killed run may have left."""
        if path.exists():
            path.write_bytes(_complete(path))
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8") as file:
            yield cls(file)

    def append(self, records: Iterable[Record]) -> None:
        """Writes records so that they survive the process."""
        for record in records:
            self._file.write(json.dumps(asdict(record)) + "\n")
        self._file.flush()


def _complete(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: content.rfind(b"\n") + 1]
