"""Chat templates of model directories."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from curkv.models.chat_template import load_chat_template
from tests.server.scripted import word_tokenizer


def saved(directory: Path, template: str | None) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), chat_template=template, eos_token="w9"
    )
    tokenizer.save_pretrained(directory)
    return directory


def test_special_tokens_and_variables_reach_the_template(tmp_path: Path) -> None:
    template = load_chat_template(saved(tmp_path, "{{ messages[0].content }} {{ eos_token }} {{ mood }}"))
    assert template is not None
    assert template.render([{"role": "user", "content": "w1"}], {"mood": "w2"}) == "w1 w9 w2"


def test_a_base_model_has_none(tmp_path: Path) -> None:
    assert load_chat_template(saved(tmp_path, None)) is None


@pytest.mark.parametrize("template", ["{{ raise_exception('no') }}", "{{ 1 / 0 }}", "{{ messages[0].x.y }}"])
def test_what_a_template_refuses_is_a_value_error(tmp_path: Path, template: str) -> None:
    loaded = load_chat_template(saved(tmp_path, template))
    assert loaded is not None
    with pytest.raises(ValueError, match="refuses"):
        loaded.render([{"role": "user", "content": "w1"}], {})


def test_arguments_of_the_renderer_are_no_variables(tmp_path: Path) -> None:
    loaded = load_chat_template(saved(tmp_path, "{{ messages[0].content }}"))
    assert loaded is not None
    with pytest.raises(ValueError, match="tokenize"):
        loaded.render([{"role": "user", "content": "w1"}], {"tokenize": True})
