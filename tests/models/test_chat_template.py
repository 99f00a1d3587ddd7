"""Chat templates of model directories."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from curkv.models.chat_template import ChatTemplate, load_chat_template, load_eos_token
from curkv.models.info import ModelInfo
from tests.server.scripted import word_tokenizer


def saved(directory: Path, template: str | None) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=word_tokenizer(), chat_template=template, eos_token="w9"
    )
    tokenizer.save_pretrained(directory)
    return directory


def test_special_tokens_and_variables_reach_the_template(tmp_path: Path) -> None:
    template = load_chat_template(saved(tmp_path, "{{ messages[0].content }} {{ eos_token }} {{ mood }}"))
    assert load_eos_token(tmp_path) == "w9"
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


TEMPLATES = {
    "JSON is not escaped": "{{ {'a': '<é>'} | tojson }}{{ [1, 2] | tojson(indent=1) }}",
    "trimmed": "{% for i in [1, 2] %}\n {{ i }}\n{% if i == 1 %}{% continue %}{% endif %}{% endfor %}",
    "what is generated": "{% generation %}{{ messages[1].content }}{% endgeneration %}{{ eos_token }}",
    "nothing to call": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}",
    "time": "{{ strftime_now('%Y') }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
def test_templates_render_as_in_transformers(tmp_path: Path, template: str) -> None:
    messages = [{"role": "user", "content": "w1"}, {"role": "assistant", "content": "w2"}]
    loaded = load_chat_template(saved(tmp_path, template))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert loaded is not None
    assert loaded.render(messages, {}) == expected


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    loaded = load_chat_template(saved(tmp_path, "{{ messages.append(1) }}"))
    assert loaded is not None
    with pytest.raises(ValueError, match="refuses"):
        loaded.render([{"role": "user", "content": "w1"}], {})


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "{{ eos_token }}"}]
    config = {"chat_template": named, "eos_token": {"content": "w9", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = load_chat_template(tmp_path)
    assert loaded is not None
    assert loaded.render([], {}) == "w9"


def test_end_tokens_are_the_configuration_s_and_the_tokenizer_s() -> None:
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "<end>": 3}, unk_token="a"))
    assert ModelInfo(tokenizer, eos_token="<end>").end_ids([1, 2], vocab_size=4) == [1, 2, 3]
    assert ModelInfo(tokenizer, eos_token="<other>").end_ids([1, 400], vocab_size=4) == [1]
    assert ModelInfo(tokenizer).end_ids([], vocab_size=4) == []


PARTS = """{% for m in messages %}{{ m.role }}:
{%- for part in m.content %}[{{ part.text }}]{% endfor %}{% endfor %}"""


def test_content_comes_in_parts_where_a_template_reads_nothing_else() -> None:
    messages = [{"role": "user", "content": "hello"}]
    assert ChatTemplate(PARTS, {}).render(messages, {}) == "user:[hello]"
    assert ChatTemplate("{{ messages[0].content }}", {}).render(messages, {}) == "hello"


def test_documents_are_for_templates_that_know_them() -> None:
    messages, documents = [{"role": "user", "content": "hello"}], [{"text": "a"}]
    knowing = ChatTemplate("{{ documents[0].text }}", {})
    assert knowing.render(messages, {}, documents=documents) == "a"
    with pytest.raises(ValueError, match="documents"):
        ChatTemplate("{{ messages[0].content }}", {}).render(messages, {}, documents=documents)


SYSTEM = """{% if messages[0].role != 'system' %}<s>You are an assistant.</s>{% endif %}
{%- for tool in tools or [] %}{{ tool }}{% endfor %}
{%- for m in messages %}<{{ m.role }}>{{ m.content | trim }}{% endfor %}"""


@pytest.mark.parametrize(
    ("messages", "frame"),
    [
        ([("user", "Hello")], "<s>You are an assistant.</s><user>"),
        ([("user", "Hello"), ("assistant", "You"), ("user", "Hello")], "<s>You are an assistant.</s><user>"),
        ([("system", "Be brief."), ("user", "Hello")], "<system>"),
    ],
)
def test_a_frame_is_what_a_template_writes_before_anything_is_said(
    messages: list[tuple[str, str]], frame: str
) -> None:
    template, roles = ChatTemplate(SYSTEM, {}), [role for role, _ in messages]
    said = [{"role": role, "content": content} for role, content in messages]
    text = template.render(said, {})
    assert text[: template.frame(text, roles, {})] == frame
    tools = [{"name": "f"}]
    with_tools = template.render(said, {}, tools)
    assert str(tools[0]) not in with_tools[: template.frame(with_tools, roles, {})]


def test_a_template_that_refuses_to_write_nothing_has_no_frame() -> None:
    picky = ChatTemplate("{{ 'hello' if messages[0].content == 'x' else raise_exception('no') }}", {})
    assert picky.frame(picky.render([{"role": "user", "content": "x"}], {}), ["user"], {}) == 0
