"""The batched measurement gives what a server would, whatever else is measured beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from curkv.cache.page_manager import Kept, PageManager
from curkv.engine.engine import Engine
from curkv.engine.types import Request, SamplingParams
from curkv.evaluation import evaluator as evaluator_module
from curkv.evaluation.evaluator import Evaluator
from curkv.evaluation.perplexity import dense_logits
from curkv.evaluation.records import Record
from curkv.evaluation.tasks.base import Asked, CountTokens, Recipe, Sample
from curkv.evaluation.tasks.series import Series
from curkv.evaluation.variants import FULL, Variant, cross, parse_variant

from .conftest import MakeEngine

CONTEXT = "".join(chr(97 + i * i % 23 + i % 3) for i in range(300))
ASKED = Asked("and now, what?", ("never said",), " never said", max_new_tokens=12)
SAMPLE = Sample(Recipe("needle", 320, 0, "documentation"), CONTEXT, (ASKED,))
VARIANTS = cross(["curdkv", "adacurdkv", "streaming-llm", "random seed=3"], ["50%", "25%"])


@pytest.fixture(autouse=True)
def sample(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, SAMPLE)


def use(monkeypatch: pytest.MonkeyPatch, sample: Sample) -> None:
    def make_sample(recipe: Recipe, count_tokens: CountTokens) -> Sample:
        return sample

    monkeypatch.setattr(evaluator_module, "make_sample", make_sample)


def asking(*asked: Asked) -> Sample:
    return replace(SAMPLE, asked=asked)


def measured(engine: Engine, **wanted: list[Variant]) -> dict[tuple[str, str, str], Record]:
    records = Evaluator(engine, "test").evaluate(SAMPLE.recipe, wanted)  # type: ignore[arg-type]
    engine.check_integrity()
    assert engine.kv.used_pages == 0
    return {(record.protocol, record.policy, record.budget): record for record in records}


def served(engine: Engine, variant: Variant) -> str:
    prompt = engine.info.tokenizer.encode(CONTEXT + ASKED.question).ids
    sampling = SamplingParams(max_tokens=ASKED.max_new_tokens, temperature=0)
    request = Request("r", prompt, sampling, variant.options)
    engine.add(engine.plan(request))
    text = ""
    while engine.has_work:
        text += "".join(output.text for output in engine.step())
    return text


class KeptSets:
    """Notes what is kept at every eviction."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[Tensor, Tensor]] = []
        evict = PageManager.evict_together

        def noting(kv: PageManager, chosen: Sequence[Kept]) -> list[int]:
            self.seen += [(one.indices.clone(), torch.from_numpy(one.counts)) for one in chosen]
            return evict(kv, chosen)

        monkeypatch.setattr(PageManager, "evict_together", noting)


@pytest.mark.parametrize("variant", VARIANTS, ids=lambda variant: f"{variant.policy} {variant.budget}")
def test_a_visible_sample_keeps_and_says_what_the_server_does(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch, variant: Variant
) -> None:
    kept = KeptSets(monkeypatch)
    expected = served(make_engine(), variant)
    record = measured(make_engine(), visible=[variant])["visible", variant.policy, variant.budget]
    assert record.text == expected and record.score == 0
    assert len(kept.seen) == (0 if variant.full else 2)
    for ours, theirs in zip(kept.seen[1:], kept.seen, strict=False):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_variants_do_not_disturb_each_other(make_engine: MakeEngine) -> None:
    together = measured(make_engine(), visible=VARIANTS, hidden=VARIANTS)
    assert len(together) == 2 * len(VARIANTS)
    for (protocol, *_), record in together.items():
        alone = next(v for v in VARIANTS if (v.policy, v.budget) == (record.policy, record.budget))
        again = measured(make_engine(), **{protocol: [alone]})[protocol, record.policy, record.budget]
        assert again.text == record.text
        assert again.nll == pytest.approx(record.nll, rel=1e-4)


def test_a_small_pool_measures_the_same_in_more_steps(make_engine: MakeEngine) -> None:
    roomy = measured(make_engine(), hidden=VARIANTS)
    tight = measured(make_engine(num_pages=200, max_sequences=5), hidden=VARIANTS)
    assert {key: record.text for key, record in tight.items()} == {k: r.text for k, r in roomy.items()}


def test_hidden_compresses_the_context_before_the_question_is_there(make_engine: MakeEngine) -> None:
    variants = [FULL, parse_variant("curdkv", "100%"), parse_variant("curdkv", "20%")]
    records = measured(make_engine(), hidden=variants, visible=[FULL])
    full = records["hidden", "full", ""]
    assert full.prompt_tokens == len(CONTEXT)
    assert full.nll == pytest.approx(records["visible", "full", ""].nll, rel=1e-4)
    assert records["hidden", "curdkv", "100%"].nll == pytest.approx(full.nll, rel=1e-4)
    assert records["hidden", "curdkv", "20%"].kept_ratio == 0.2
    assert records["hidden", "curdkv", "20%"].nll != pytest.approx(full.nll, rel=1e-3)


def test_an_answer_that_greedy_decoding_gives_is_right(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = measured(make_engine(), visible=[FULL])["visible", "full", ""].text
    assert text is not None
    for target in (text, "something else"):
        use(monkeypatch, asking(replace(ASKED, answers=(text[2:5],), target=target)))
        record = measured(make_engine(), visible=[FULL])["visible", "full", ""]
        assert record.score == 1 and record.text is not None and text.startswith(record.text)


def test_only_what_the_full_cache_answers_is_asked_of_others(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = measured(make_engine(), visible=[FULL])["visible", "full", ""].text
    assert text is not None
    known = replace(ASKED, answers=(text[2:5],), target=None, name="known")
    use(monkeypatch, asking(known, replace(known, answers=("never said",), name="unknown")))
    variants = [FULL, parse_variant("curdkv", "100%")]
    records = Evaluator(make_engine(), "test").evaluate(
        SAMPLE.recipe, {"visible": variants, "hidden": variants}
    )
    found = {(r.protocol, r.question, r.policy): r.score for r in records}
    assert found == {
        (protocol, question, policy): float(question == "known")
        for protocol in ("visible", "hidden")
        for question, policy in (("known", "full"), ("known", "curdkv"), ("unknown", "full"))
    }


def test_long_answers_are_those_of_the_engine_and_held_against_the_full_cache(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second of three items is wrong for all, so that one counts; nothing else is asked if none is."""
    engine, limit = make_engine(), 80
    said = measured(engine, visible=[FULL])["visible", "full", ""].text
    assert said is not None
    series = Series("", (said[:2], "never said", said[2:4]), said, limit)
    variants = cross(["streaming-llm decode_interval=8"], ["96tok"])
    use(monkeypatch, replace(SAMPLE, asked=(series,), context=CONTEXT + ASKED.question))
    records = measured(engine, decoding=variants)
    full, evicted = records["decoding", "full", ""], records["decoding", variants[1].policy, "96tok"]
    assert full.score == pytest.approx(1 / 3) and full.kept_ratio == 1
    assert full.text is not None and full.text.startswith(said) and evicted.text != full.text
    assert 0.2 < evicted.kept_ratio < 0.3
    assert evicted.score == float(evicted.text is not None and evicted.text.startswith(said[:2]))
    use(monkeypatch, replace(SAMPLE, asked=(replace(series, answers=("never said",)),)))
    assert list(measured(engine, decoding=variants)) == [("decoding", "full", "")]


def test_questions_about_one_context_do_not_disturb_each_other(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = replace(ASKED, question="and what else is there to say?", name="other")
    alone = {}
    for asked in (ASKED, other):
        use(monkeypatch, asking(asked))
        alone[asked.name] = measured(make_engine(), visible=VARIANTS, hidden=VARIANTS)
    use(monkeypatch, asking(ASKED, other))
    engine = make_engine()
    for record in Evaluator(engine, "test").evaluate(
        SAMPLE.recipe, {"visible": VARIANTS, "hidden": VARIANTS}
    ):
        expected = alone[record.question][record.protocol, record.policy, record.budget]
        assert record.text == expected.text and record.nll == pytest.approx(expected.nll, rel=1e-4)
    assert engine.kv.used_pages == 0


def test_a_continuation_is_held_against_the_full_cache(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = CONTEXT[::-1][:40]
    use(monkeypatch, asking(Asked("", (), following, max_new_tokens=40)))
    engine = make_engine()
    records = measured(engine, continuation=[parse_variant("streaming-llm", "10%")])
    full, policy = records["continuation", "full", ""], records["continuation", "streaming-llm", "10%"]
    assert (full.kl, full.top1) == (pytest.approx(0, abs=1e-6), 1)
    assert policy.kl is not None and policy.kl > 0.01 and policy.score is None
    ids = torch.tensor(engine.info.tokenizer.encode(CONTEXT + following).ids)
    logits = dense_logits(engine.runner.model)(ids)[len(CONTEXT) - 1 : -1]
    nll = torch.nn.functional.cross_entropy(logits, ids[len(CONTEXT) :]).item()
    assert full.nll == pytest.approx(nll, rel=1e-4)


def test_a_model_without_a_chat_template_answers_a_text(
    make_engine: MakeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, replace(SAMPLE, chat=True))
    of_chat = measured(make_engine(), visible=VARIANTS[:2])
    use(monkeypatch, asking(replace(ASKED, question=f"{ASKED.question}\nAnswer:")))
    assert of_chat == measured(make_engine(), visible=VARIANTS[:2])
