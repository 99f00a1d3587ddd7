"""Measures many variants on a sample for little more than the price of one prefill.

The context is computed once with the full cache. Every variant gets a fork of it and evicts that; from there
on all variants advance in the same steps: the question, the right answer (teacher-forced), the greedy answer.
Each gives the tokens that a server gives for the same request: eviction comes after the prompt's last token
has attended, so that under "visible" the answer's first token is read off the full cache.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from curkv.cache.eviction import Eviction, evict, select
from curkv.cache.footprint import held_pages
from curkv.cache.observations import Needs
from curkv.cache.parsing import settle
from curkv.cache.plan import EvictionPlan, resolve
from curkv.engine.draft import look_ahead
from curkv.engine.engine import Engine
from curkv.engine.repetition import Repetition
from curkv.engine.types import KVReport, Request, SamplingParams
from curkv.evaluation.perplexity import agreement, token_nll
from curkv.evaluation.records import ProtocolName, Record
from curkv.evaluation.tasks import make_sample
from curkv.evaluation.tasks.base import Asked, Recipe, Sample
from curkv.evaluation.variants import FULL, Variant
from curkv.models.chat_template import ChatTemplate

Wanted = Mapping[ProtocolName, Sequence[Variant]]
"""The variants to measure under each protocol."""

_MARK = "\ue000"
"""A private-use character that stands at the context's end while a conversation is written out."""

_SLACK = 8
"""Tokens that an answer may have beyond those that the full cache needs to give the right one."""

_MAX_LOGIT_ROWS = 512
"""Rows of logits held at once; 100 MB with a vocabulary of 49,152."""


@dataclass
class _Prompt:
    """A prompt in the cache, its frame's tokens, and what follows it.

    Attributes:
        slot: The sequence.
        tokens: Its tokens.
        frame: How many of them a chat template wrote before anything was said.
        logits: Of what follows it, float32 [1, vocab].
        repetition: What repeating it tells, once a policy has asked.
        drafts: What drafts of so many tokens look at, as far as policies have asked.
    """

    slot: int
    tokens: list[int]
    frame: int
    logits: Tensor
    repetition: Tensor | None = None
    drafts: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class _Branch:
    """A variant's fork of a prompt."""

    variant: Variant
    slot: int
    kept_ratio: float


@dataclass(frozen=True)
class _Question:
    """A question in tokens, and its right answer as far as it is known."""

    asked: Asked
    tokens: list[int]
    target: list[int]
    said: str = ""

    @property
    def limit(self) -> int:
        """Most tokens of another answer: what the full cache says first need not be waited for for long."""
        limit = self.asked.max_new_tokens
        return limit if self.asked.target is not None else min(limit, len(self.target) + _SLACK)

    @property
    def new_tokens(self) -> int:
        """Room that it and its answer need in the cache behind the context."""
        return len(self.tokens) + max(len(self.target), self.asked.max_new_tokens)


@dataclass(frozen=True)
class _Judged:
    """What a variant made of a question: mean NLL of the right answer, score and text of its own."""

    nll: float | None
    score: float | None
    text: str | None


class Evaluator:
    """Runs samples over an engine's model and cache, which must be idle.

    Args:
        engine: Whose model, cache and kernels are used.
        source: What records name as their source.
    """

    def __init__(self, engine: Engine, source: str) -> None:
        self.source = source
        self._engine = engine
        self._runner, self._kv = engine.runner, engine.kv
        self._info, self._template = engine.info, engine.info.chat_template
        self._tokenizer, self._eos_ids = engine.info.tokenizer, engine.eos_ids
        self._max_step_tokens = engine.scheduler.max_step_tokens

    def count_tokens(self, text: str) -> int:
        """Counts a text's tokens."""
        return len(self._encode(text))

    def evaluate(self, recipe: Recipe, wanted: Wanted) -> list[Record]:
        """Measures variants on one sample.

        Args:
            recipe: What the sample is made from.
            wanted: Variants by protocol; a task's own one, else "visible" and "hidden".

        Returns:
            A record per variant and protocol; for a continuation also that of the full cache.

        Raises:
            OptionError: A variant does not fit the prompt.
            ValueError: A variant evicts while the prompt is computed, which variants share here.
            OutOfPages: The pool does not hold the prompt and one variant.
        """
        sample = make_sample(recipe, self.count_tokens)
        context, frame, questions = self._tokens(sample)
        if series := wanted.get("decoding"):
            return list(self._decoded(context, sample.recipe, questions[0], series))
        observed = _observed(variant for variants in wanted.values() for variant in variants)
        prompt, records = self._prefill(context, frame, observed), list[Record]()
        try:
            if continuations := wanted.get("continuation"):
                return list(self._continue(prompt, sample.recipe, questions[0], continuations))
            answered = []
            for question in questions:
                asked = self._asked(prompt, question)
                try:
                    own = question if question.target else self._own_answer(asked, question)
                    if own.target:
                        answered.append(own)
                        records += self._visible(asked, sample.recipe, own, wanted.get("visible", ()))
                    else:
                        records += self._unanswered(asked, sample.recipe, own, wanted)
                finally:
                    self._kv.free(asked.slot)
            if answered:
                records += self._hidden(prompt, sample.recipe, answered, wanted.get("hidden", ()))
        finally:
            self._kv.free(prompt.slot)
        return records

    def _tokens(self, sample: Sample) -> tuple[list[int], int, list[_Question]]:
        """A sample's context, how many tokens of it a chat template wrote, and the questions."""
        before, frame, questions = sample.context, 0, []
        for asked in sample.asked:
            after = asked.question
            if sample.chat and self._template is not None:
                before, after, frame = self._conversation(self._template, sample.context, asked.question)
            elif sample.chat:  # a base model goes on with a text
                after = f"{asked.question}\nAnswer:"
            target = self._encode(asked.target or "")[: asked.max_new_tokens]
            questions.append(_Question(asked, self._encode(after), target))
        return self._encode(before), frame, questions

    def _conversation(self, template: ChatTemplate, context: str, question: str) -> tuple[str, str, int]:
        """A user's message as the model reads it, up to the end of the context and behind it; its frame."""
        message = {"role": "user", "content": f"{context}{_MARK}{question}"}
        before, _, after = template.render([message], {}).partition(_MARK)
        frame = template.frame(before, ["user"], {})
        return before, after, self.count_tokens(before[:frame])

    def _visible(
        self, asked: _Prompt, recipe: Recipe, question: _Question, variants: Sequence[Variant]
    ) -> Iterator[Record]:
        """Evicts context and question together, as for an ordinary request."""
        for branches in self._branches(asked, variants, question.new_tokens):
            slots = [branch.slot for branch in branches]
            logits = asked.logits.expand(len(slots), -1)
            judged = self._judge(slots, logits, question, len(asked.tokens))
            yield from self._records(asked, branches, recipe, question, "visible", judged)

    def _hidden(
        self, prompt: _Prompt, recipe: Recipe, questions: Sequence[_Question], variants: Sequence[Variant]
    ) -> Iterator[Record]:
        """Evicts the context once and asks every question of that."""
        room = max(question.new_tokens for question in questions)
        for branches in self._branches(prompt, variants, room, hidden=True):
            for question in questions:
                slots = [self._kv.fork(branch.slot) for branch in branches]
                start = len(prompt.tokens) + len(question.tokens)
                logits = self._forward(slots, [question.tokens] * len(slots), len(prompt.tokens))
                judged = self._judge(slots, logits, question, start)
                yield from self._records(prompt, branches, recipe, question, "hidden", judged)
                for slot in slots:
                    self._kv.free(slot)

    def _judge(self, slots: list[int], logits: Tensor, question: _Question, start: int) -> list[_Judged]:
        """Lets slots answer whose next token's logits are known; it is at position `start`."""
        nlls, right = self._force_answer(slots, logits, question.target, start)
        wrong = [i for i, ok in enumerate(right) if not ok]
        texts = dict.fromkeys(range(len(slots)), self._text(question.target))
        asked = replace(question.asked, max_new_tokens=question.limit)
        decoded = self._decode([slots[i] for i in wrong], logits[wrong], asked, start)
        texts |= zip(wrong, map(self._text, decoded), strict=True)
        score = {i: question.asked.score(text) for i, text in texts.items()}
        return [_Judged(nll, score[i], texts[i]) for i, nll in enumerate(nlls)]

    def _own_answer(self, asked: _Prompt, question: _Question) -> _Question:
        """The question with what the full cache answers as its target, if that is right."""
        fork = self._kv.fork(asked.slot)
        [tokens] = self._decode([fork], asked.logits, question.asked, len(asked.tokens))
        self._kv.free(fork)
        right = question.asked.score(self._text(tokens)) == 1
        return replace(question, target=tokens if right else [], said=self._text(tokens))

    def _unanswered(
        self, asked: _Prompt, recipe: Recipe, question: _Question, wanted: Wanted
    ) -> Iterator[Record]:
        """Notes what the full cache fails at, which nothing else is asked."""
        whole = [_Branch(FULL, asked.slot, 1.0)]
        for protocol, variants in wanted.items():
            if FULL in variants:
                missed = [_Judged(None, 0.0, question.said)]
                yield from self._records(asked, whole, recipe, question, protocol, missed)

    def _continue(
        self, prompt: _Prompt, recipe: Recipe, text: _Question, variants: Sequence[Variant]
    ) -> Iterator[Record]:
        """Holds every variant's predictions of the text that follows against the full cache's."""
        variants = [FULL, *(variant for variant in variants if not variant.full)]
        targets, reference = torch.tensor(text.target), None
        for branches in self._branches(prompt, variants, text.new_tokens):
            slots = [branch.slot for branch in branches]
            first = prompt.logits.expand(len(slots), -1)
            forced = self._force(slots, first, text.target, len(prompt.tokens))
            for branch, logits in zip(branches, forced, strict=True):
                reference = logits if reference is None else reference
                result = agreement(reference, logits, targets)
                nll = _Judged(result.nll.mean().item(), None, None)
                [record] = self._records(prompt, [branch], recipe, text, "continuation", [nll])
                yield replace(record, kl=result.kl.mean().item(), top1=result.top1.float().mean().item())

    def _decoded(
        self, context: list[int], recipe: Recipe, series: _Question, variants: Sequence[Variant]
    ) -> Iterator[Record]:
        """Has the engine give long answers; of the items that the full cache has, others are asked."""
        sampling = SamplingParams(series.asked.max_new_tokens, temperature=0.0, ignore_eos=True)
        variants = [FULL, *(variant for variant in variants if not variant.full)]
        texts, reports = dict.fromkeys(map(str, range(len(variants))), ""), dict[str, KVReport]()
        for id, variant in zip(texts, variants, strict=True):
            self._engine.add(self._engine.plan(Request(id, context, sampling, variant.decoding)))
        while self._engine.has_work:
            for output in self._engine.step():
                texts[output.request_id] += output.text
                if output.kv is not None:
                    reports[output.request_id] = output.kv
        asked, prompt = series.asked, _Prompt(-1, context, 0, torch.empty(0))
        total = len(context) + asked.max_new_tokens - 1
        for id, variant in zip(texts, variants, strict=True):
            kept = 1 - reports[id].evicted_tokens / total
            score = asked.score(texts[id])
            branch, judged = _Branch(variant, -1, kept), _Judged(None, score, texts[id])
            yield from self._records(prompt, [branch], recipe, series, "decoding", [judged])
            if not score and variant.full:
                return
            if variant.full:
                asked = replace(asked, answers=asked.answers[: round(score * len(asked.answers))])

    def _records(
        self,
        prompt: _Prompt,
        branches: Sequence[_Branch],
        recipe: Recipe,
        question: _Question,
        protocol: ProtocolName,
        judged: Sequence[_Judged],
    ) -> Iterator[Record]:
        for branch, found in zip(branches, judged, strict=True):
            yield Record(
                source=self.source,
                task=recipe.task,
                corpus=recipe.corpus,
                length=recipe.length,
                seed=recipe.seed,
                protocol=protocol,
                policy=branch.variant.policy,
                budget=branch.variant.budget,
                prompt_tokens=len(prompt.tokens),
                kept_ratio=branch.kept_ratio,
                nll=found.nll,
                score=found.score,
                text=found.text,
                depth=question.asked.depth,
                question=question.asked.name,
            )

    def _prefill(self, tokens: list[int], frame: int, observed: Needs) -> _Prompt:
        slot = self._kv.add_sequence(observed)
        return _Prompt(slot, tokens, frame, self._feed(slot, tokens, 0))

    def _asked(self, prompt: _Prompt, question: _Question) -> _Prompt:
        """A fork of a prompt that goes on with a question."""
        slot = self._kv.fork(prompt.slot)
        logits = self._feed(slot, question.tokens, len(prompt.tokens))
        return _Prompt(slot, prompt.tokens + question.tokens, prompt.frame, logits)

    def _feed(self, slot: int, tokens: list[int], start: int) -> Tensor:
        """Computes tokens in chunks, as the engine does; logits of the last one, [1, vocab]."""
        for offset in range(0, len(tokens), self._max_step_tokens):
            chunk = tokens[offset : offset + self._max_step_tokens]
            logits = self._forward([slot], [chunk], start + offset)
        return logits

    def _branches(
        self, prompt: _Prompt, variants: Sequence[Variant], new_tokens: int, hidden: bool = False
    ) -> Iterator[list[_Branch]]:
        """Forks a prompt and evicts each fork, as many variants at a time as the pool holds."""
        plans = [self._plan(prompt, variant, hidden) for variant in variants]
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

    def _plan(self, prompt: _Prompt, variant: Variant, hidden: bool) -> EvictionPlan:
        """What becomes of a prompt, or of a context that something hidden follows."""
        options, tokens = variant.options, prompt.tokens
        if hidden and not variant.full:
            options, tokens = replace(options, context_tokens=len(tokens)), [*tokens, 0]
        return resolve(options, tokens, self._kv.layout, frame_tokens=prompt.frame)

    def _affordable(self, plans: Sequence[EvictionPlan], new_tokens: int) -> int:
        """Counts the first plans that fit the pool together, each with two forks: for question and answer."""
        layout, free = self._kv.layout, self._kv.free_pages
        for count, plan in enumerate(plans):
            fork = layout.sequence_pages(new_tokens) + layout.num_tables  # shares all but last pages
            free -= held_pages(layout, plan, new_tokens) + 2 * fork
            if free < 0 or count == self._kv.free_slots // 3:
                return max(1, count)
        return len(plans)

    def _branch(self, prompt: _Prompt, variant: Variant, plan: EvictionPlan) -> _Branch:
        slot = self._kv.fork(prompt.slot, observe=False)
        if plan.evicts_prompt:
            view = self._runner.attention.view(prompt.slot)
            if plan.needs.repetition:
                view = replace(view, repetition=self._repeated(prompt))
            if plan.draft_tokens:
                view = replace(view, draft=self._drafted(prompt, plan.draft_tokens))
            evict(self._kv, [Eviction(slot, view, plan, *select(view, plan, self._kv.kernels))])
        kept = self._kv.held_tokens(slot)
        return _Branch(variant, slot, kept / len(prompt.tokens))

    def _repeated(self, prompt: _Prompt) -> Tensor:
        """What is paid to a prompt's tokens while it is repeated, for all variants once."""
        if prompt.repetition is None:
            repetition = Repetition(prompt.tokens, self._info)
            fork = self._kv.fork(prompt.slot, observe=False)
            while not repetition.done:
                repetition.advance(self._runner, fork)
            self._kv.free(fork)
            prompt.repetition = repetition.scores
        return prompt.repetition

    def _drafted(self, prompt: _Prompt, count: int) -> Tensor:
        """What a draft of so many tokens pays to a prompt's tokens, for all variants once."""
        if count not in prompt.drafts:
            fork = self._kv.fork(prompt.slot, observe=False)
            first = prompt.logits.argmax(-1)
            prompt.drafts[count] = look_ahead(self._runner, fork, first, len(prompt.tokens), count)
            self._kv.free(fork)
        return prompt.drafts[count]

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

    def _decode(self, slots: list[int], logits: Tensor, asked: Asked, start: int) -> list[list[int]]:
        """Greedy answers of all slots in the same steps; each ends when it contains all that is asked for."""
        answers = [[token] for token in logits.argmax(dim=-1).tolist()]
        running = list(range(len(slots)))
        while running := [i for i in running if not self._ended(answers[i], asked)]:
            position = start + len(answers[running[0]]) - 1
            last = [answers[i][-1:] for i in running]
            logits = self._forward([slots[i] for i in running], last, position)
            for i, token in zip(running, logits.argmax(dim=-1).tolist(), strict=True):
                answers[i].append(token)
        return answers

    def _ended(self, tokens: list[int], asked: Asked) -> bool:
        if len(tokens) >= asked.max_new_tokens or tokens[-1] in self._eos_ids:
            return True
        return asked.score(self._text(tokens)) == 1

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
        needs |= settle(variant.options).needs
    return needs
