"""Measures many variants on a sample for little more than the price of one prefill.

The context is computed once with the full cache. Every variant gets a fork of it and evicts that; from there
on all variants advance in the same steps: the question, the right answer (teacher-forced), the greedy answer.
Each gives the tokens that a server gives for the same request: eviction comes after the prompt's last token
has attended, so that under "visible" the answer's first token is read off the full cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from curkv.cache.eviction import evict, select
from curkv.cache.observations import Needs
from curkv.cache.parsing import settle
from curkv.cache.plan import EvictionPlan, resolve
from curkv.engine.engine import Engine
from curkv.evaluation.perplexity import agreement, token_nll
from curkv.evaluation.records import ProtocolName, Record
from curkv.evaluation.tasks import make_sample
from curkv.evaluation.tasks.base import Recipe, Sample, string_match_all
from curkv.evaluation.variants import FULL, Variant

Wanted = Mapping[ProtocolName, Sequence[Variant]]
"""The variants to measure under each protocol."""

_MAX_LOGIT_ROWS = 512
"""Rows of logits held at once; 100 MB with a vocabulary of 49,152."""


@dataclass(frozen=True)
class _Prompt:
    """A prompt in the cache and the logits of what follows it, float32 [1, vocab]."""

    slot: int
    tokens: list[int]
    logits: Tensor


@dataclass(frozen=True)
class _Branch:
    """A variant's fork of a prompt."""

    variant: Variant
    slot: int
    kept_ratio: float


@dataclass(frozen=True)
class _Answer:
    """What the right answer is and how it is told from a wrong one."""

    sample: Sample
    target: list[int]

    @property
    def new_tokens(self) -> int:
        """Room that it needs in the cache behind the question."""
        return max(len(self.target), self.sample.max_new_tokens)


class Evaluator:
    """Runs samples over an engine's model and cache, which must be idle.

    Args:
        engine: Whose model, cache and kernels are used.
        source: What records name as their source.
    """

    def __init__(self, engine: Engine, source: str) -> None:
        self.source = source
        self._runner, self._kv = engine.runner, engine.kv
        self._tokenizer, self._eos_ids = engine.info.tokenizer, engine.eos_ids
        self._max_step_tokens = engine.scheduler.max_step_tokens

    def count_tokens(self, text: str) -> int:
        """Counts a text's tokens."""
        return len(self._encode(text))

    def evaluate(self, recipe: Recipe, wanted: Wanted) -> list[Record]:
        """Measures variants on one sample.

        Args:
            recipe: What the sample is made from.
            wanted: Variants by protocol; "continuation" for a task without a question, else the others.

        Returns:
            A record per variant and protocol; for a continuation also that of the full cache.

        Raises:
            OptionError: A variant does not fit the prompt.
            ValueError: A variant evicts while the prompt is computed, which variants share here.
            OutOfPages: The pool does not hold the prompt and one variant.
        """
        sample = make_sample(recipe, self.count_tokens)
        observed = _observed(variant for variants in wanted.values() for variant in variants)
        question, target = self._encode(sample.question), self._encode(sample.target)[: sample.max_new_tokens]
        answer = _Answer(sample, target)
        records: list[Record] = []
        prompt = self._prefill(self._encode(sample.context), observed)
        try:
            if hidden := wanted.get("hidden"):
                records += self._answer(prompt, question, answer, "hidden", hidden)
            if visible := wanted.get("visible"):
                prompt = self._extended(prompt, question)
                records += self._answer(prompt, [], answer, "visible", visible)
            if continuations := wanted.get("continuation"):
                records += self._continue(prompt, answer, continuations)
        finally:
            self._kv.free(prompt.slot)
        return records

    def _answer(
        self,
        prompt: _Prompt,
        question: list[int],
        answer: _Answer,
        protocol: ProtocolName,
        variants: Sequence[Variant],
    ) -> Iterator[Record]:
        start = len(prompt.tokens) + len(question)
        for branches in self._branches(prompt, variants, len(question) + answer.new_tokens):
            slots = [branch.slot for branch in branches]
            logits = prompt.logits.expand(len(slots), -1)
            if question:
                logits = self._forward(slots, [question] * len(slots), len(prompt.tokens))
            nlls, right = self._force_answer(slots, logits, answer.target, start)
            wrong = [i for i, ok in enumerate(right) if not ok]
            texts = dict.fromkeys(range(len(slots)), answer.sample.target)
            decoded = self._decode([slots[i] for i in wrong], logits[wrong], answer.sample, start)
            texts |= zip(wrong, decoded, strict=True)
            for i, branch in enumerate(branches):
                record = self._record(prompt, branch, answer.sample, protocol, nlls[i])
                score = string_match_all(texts[i], answer.sample.answers)
                yield replace(record, score=score, text=texts[i])

    def _continue(self, prompt: _Prompt, answer: _Answer, variants: Sequence[Variant]) -> Iterator[Record]:
        """Holds every variant's predictions of the text that follows against the full cache's."""
        variants = [FULL, *(variant for variant in variants if not variant.full)]
        targets, reference = torch.tensor(answer.target), None
        for branches in self._branches(prompt, variants, answer.new_tokens):
            slots = [branch.slot for branch in branches]
            first = prompt.logits.expand(len(slots), -1)
            forced = self._force(slots, first, answer.target, len(prompt.tokens))
            for branch, logits in zip(branches, forced, strict=True):
                reference = logits if reference is None else reference
                result = agreement(reference, logits, targets)
                nll = result.nll.mean().item()
                record = self._record(prompt, branch, answer.sample, "continuation", nll)
                yield replace(record, kl=result.kl.mean().item(), top1=result.top1.float().mean().item())

    def _record(
        self, prompt: _Prompt, branch: _Branch, sample: Sample, protocol: ProtocolName, nll: float
    ) -> Record:
        return Record(
            source=self.source,
            task=sample.recipe.task,
            corpus=sample.recipe.corpus,
            length=sample.recipe.length,
            seed=sample.recipe.seed,
            protocol=protocol,
            policy=branch.variant.policy,
            budget=branch.variant.budget,
            prompt_tokens=len(prompt.tokens),
            kept_ratio=branch.kept_ratio,
            nll=nll,
            depth=sample.depth,
        )

    def _prefill(self, tokens: list[int], observed: Needs) -> _Prompt:
        slot = self._kv.add_sequence(observed)
        return _Prompt(slot, tokens, self._feed(slot, tokens, 0))

    def _extended(self, prompt: _Prompt, tokens: list[int]) -> _Prompt:
        logits = self._feed(prompt.slot, tokens, len(prompt.tokens))
        return _Prompt(prompt.slot, prompt.tokens + tokens, logits)

    def _feed(self, slot: int, tokens: list[int], start: int) -> Tensor:
        """Computes tokens in chunks, as the engine does; logits of the last one, [1, vocab]."""
        for offset in range(0, len(tokens), self._max_step_tokens):
            chunk = tokens[offset : offset + self._max_step_tokens]
            logits = self._forward([slot], [chunk], start + offset)
        return logits

    def _branches(
        self, prompt: _Prompt, variants: Sequence[Variant], new_tokens: int
    ) -> Iterator[list[_Branch]]:
        """Forks a prompt and evicts each fork, as many variants at a time as the pool holds."""
        layout = self._kv.layout
        plans = [resolve(variant.options, prompt.tokens, layout) for variant in variants]
        while plans:
            count = self._affordable(plans, new_tokens)
            pairs = zip(variants[:count], plans[:count], strict=True)
            branches = [self._branch(prompt, *pair) for pair in pairs]
            try:
                yield branches
            finally:
                for branch in branches:
                    self._kv.free(branch.slot)
            variants, plans = variants[count:], plans[count:]

    def _affordable(self, plans: Sequence[EvictionPlan], new_tokens: int) -> int:
        """Counts the first plans that fit the pool together, each with a second fork for the right answer."""
        layout, free = self._kv.layout, self._kv.free_pages
        for count, plan in enumerate(plans):
            second = layout.sequence_pages(new_tokens) + layout.num_heads  # shares all but last pages
            free -= self._kv.held_pages(plan, new_tokens) + second
            if free < 0 or count == self._kv.free_slots // 2:
                return max(1, count)
        return len(plans)

    def _branch(self, prompt: _Prompt, variant: Variant, plan: EvictionPlan) -> _Branch:
        slot = self._kv.fork(prompt.slot, observe=False)
        if plan.evicts_prompt:
            view = self._runner.attention.view(prompt.slot)
            evict(self._kv, slot, view, plan, *select(view, plan, self._kv.kernels))
        kept = self._kv.held_tokens(slot)
        return _Branch(variant, slot, kept / len(prompt.tokens))

    def _force_answer(
        self, slots: list[int], logits: Tensor, target: list[int], start: int
    ) -> tuple[list[float], list[bool]]:
        """Mean NLL of the right answer for each slot, and whether greedy decoding gives exactly that."""
        targets = torch.tensor(target)
        nlls, right = [], []
        for predicted in self._force(slots, logits, target, start):
            nlls.append(token_nll(predicted, targets).mean().item())
            right.append(bool((predicted.argmax(dim=-1) == targets).all()))
        return nlls, right

    def _force(self, slots: list[int], logits: Tensor, target: list[int], start: int) -> Iterator[Tensor]:
        """Feeds the same tokens to forks of all slots.

        Args:
            slots: Sequences, which stay as they are.
            logits: [B, vocab], what they predict already.
            target: The n tokens.
            start: Logical position of the first.

        Yields:
            float32 [n, vocab] for each slot, the predictions of the n tokens.
        """
        if len(target) == 1:
            yield from logits[:, None]
            return
        fed = target[:-1]
        size = max(1, _MAX_LOGIT_ROWS // len(fed))
        for offset in range(0, len(slots), size):
            forks = [self._kv.fork(slot) for slot in slots[offset : offset + size]]
            later = self._forward(forks, [fed] * len(forks), start, all_rows=True)
            for fork in forks:
                self._kv.free(fork)
            for i, rows in enumerate(later.view(len(forks), len(fed), -1), offset):
                yield torch.cat([logits[i : i + 1], rows])

    def _decode(self, slots: list[int], logits: Tensor, sample: Sample, start: int) -> list[str]:
        """Greedy answers of all slots in the same steps; each ends when it contains all that is asked for."""
        answers = [[token] for token in logits.argmax(dim=-1).tolist()]
        running = list(range(len(slots)))
        while running := [i for i in running if not self._ended(answers[i], sample)]:
            position = start + len(answers[running[0]]) - 1
            last = [answers[i][-1:] for i in running]
            logits = self._forward([slots[i] for i in running], last, position)
            for i, token in zip(running, logits.argmax(dim=-1).tolist(), strict=True):
                answers[i].append(token)
        return [self._text(tokens) for tokens in answers]

    def _ended(self, tokens: list[int], sample: Sample) -> bool:
        if len(tokens) >= sample.max_new_tokens or tokens[-1] in self._eos_ids:
            return True
        return string_match_all(self._text(tokens), sample.answers) == 1

    def _forward(
        self, slots: list[int], tokens: Sequence[list[int]], start: int, all_rows: bool = False
    ) -> Tensor:
        """Runs new tokens, as many for every slot, from the same logical position on.

        Returns:
            float32 logits of each slot's last token [B, vocab], or of all tokens [B * n, vocab].
        """
        wanted = [len(new) if all_rows else 1 for new in tokens]
        return self._runner.run(slots, tokens, [start] * len(slots), wanted).clone()

    def _encode(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def _text(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode([token for token in tokens if token not in self._eos_ids])
        return text


def _observed(variants: Iterable[Variant]) -> Needs:
    """What the variants' policies need to know of the queries, together."""
    needs = Needs()
    for variant in variants:
        if variant.options.prefill != "exact":
            raise ValueError(f"{variant.policy!r}: measure prefill={variant.options.prefill} with --url")
        needs |= settle(variant.options).policy.needs
    return needs
