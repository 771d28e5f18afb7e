"""Chat templates: the reference's ids, control tokens only from the template, and templates that misbehave."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluglm_tokenizers
import pytest
from pluglm_tokenizers.tokenizer import JsonTokenizer

from pluglm.contracts import TokenizerRequest
from pluglm.errors import ConfigError, InputError

BASE = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
Make = Callable[..., Path]
HI = [{"role": "user", "content": "hello world"}]
TEMPLATES = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}",
    "{{ bos_token }}{%- for m in messages %}\n  {% if m['role'] == 'user' %}[{{ m['content'] | trim }}]{% else %}\n{{ m.content + eos_token }}\n{% endif %}{% endfor %}",
    "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}{{ m | tojson }}{% endfor %}",
    "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}{{ ns.n }}",
    "{% macro say(m) %}<|im_start|>{{ m.content | upper | replace('A', 'aa') }}{% endmacro %}{% for m in messages %}{{ say(m) ~ '|' ~ loop.index0 }}{% endfor %}{{ messages | map(attribute='role') | join(', ') }}",
    "{{ '%s' }}{% for m in messages[1:] %}{{ m.content.split(' ')[-1].strip() }}{{ ' ' * 3 }}{% endfor %}{% if add_generation_prompt %}<|im_start|>{% endif %}",
)
CHAT = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": 'a < b and c > d, naïve 日本語 "quotes"'},
    {"role": "assistant", "content": "1 + 1\n= 2"},
]


def build(folder: Path) -> JsonTokenizer:
    tokenizer = pluglm_tokenizers.pluglm_build_tokenizer(request=TokenizerRequest(folder, 10_000))
    assert isinstance(tokenizer, JsonTokenizer)
    return tokenizer


def text(tokenizer: JsonTokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_chat_has_the_ids_of_the_reference_library(make: Make, template: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make(config={**BASE, "tokenizer_class": "PreTrainedTokenizerFast"}, template=template)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    for prompt in (True, False):
        expected = theirs.apply_chat_template(CHAT, add_generation_prompt=prompt, return_dict=False)
        assert build(folder).apply_chat_template(CHAT, add_generation_prompt=prompt) == expected


@pytest.mark.parametrize("text", ("hello world", "a <|im_end|> b", "", "naïve 🙂"))
@pytest.mark.parametrize(
    "flags", ({}, {"add_bos_token": True}, {"add_bos_token": False}, {"add_eos_token": True}), ids=str
)
def test_a_text_has_the_ids_of_the_reference_library(make: Make, text: str, flags: dict[str, bool]) -> None:
    transformers = pytest.importorskip("transformers")
    folder = make(config={**BASE, **flags, "tokenizer_class": "PreTrainedTokenizerFast"})
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert build(folder).encode(text, parse_special=True) == theirs(text)["input_ids"]


def test_a_template_that_builds_control_tokens_of_roles_gets_them(make: Make) -> None:
    tokenizer = build(
        make(config=BASE, template="{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}{% endfor %}")
    )
    ids = tokenizer.apply_chat_template([{"role": "im_start", "content": "<|im_end|>"}])
    assert ids[0] in tokenizer.special_ids
    assert not tokenizer.special_ids & set(ids[1:])
    assert text(tokenizer, ids) == "<|im_start|><|im_end|>"


@pytest.mark.parametrize(
    "content", ("|im_end|>", "  |im_end|>", "x <|im_end|> y <|im_start|>", "<|im_en<|im_end|>d|>", "<|im_start")
)
def test_content_and_template_do_not_add_up_to_a_control_token(make: Make, content: str) -> None:
    tokenizer = build(make(config=BASE, template="{% for m in messages %}<{{ m.content | trim }}|>{% endfor %}"))
    ids = tokenizer.apply_chat_template([{"role": "user", "content": content}])
    assert not tokenizer.special_ids & set(ids)
    assert text(tokenizer, ids) == f"<{content.strip()}|>"


def test_control_tokens_in_tools_and_variables_are_ordinary_text_too(make: Make) -> None:
    template = "{{ tools | tojson }}{{ documents | tojson(ensure_ascii=true) }}{{ note }}"
    tokenizer = build(make(config=BASE, template=template))
    ids = tokenizer.apply_chat_template(
        HI, tools=[{"name": "<|eos|>"}], documents=[{"text": "<|eos|>é"}], note="<|eos|>", add_generation_prompt=False
    )
    assert not tokenizer.special_ids & set(ids)
    assert text(tokenizer, ids) == '[{"name": "<|eos|>"}][{"text": "<|eos|>\\u00e9"}]<|eos|>'


def test_marks_are_characters_that_nobody_used(make: Make) -> None:
    tokenizer = build(make(config=BASE, template="{{ messages[0].content }}"))
    content = "\U000f0000<|eos|>\U000f0001"
    assert text(tokenizer, tokenizer.apply_chat_template([{"role": "user", "content": content}])) == content


def test_the_tool_template_is_used_for_calls_with_tools(make: Make) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "tools"}]
    tokenizer = build(make(config={**BASE, "chat_template": named}))
    assert tokenizer.chat_template == "plain"
    assert text(tokenizer, tokenizer.apply_chat_template(HI)) == "plain"
    assert text(tokenizer, tokenizer.apply_chat_template(HI, tools=[{}])) == "tools"


def test_the_file_goes_before_the_configs_template(make: Make) -> None:
    assert build(make(config={**BASE, "chat_template": "config"}, template="file")).chat_template == "file"


def test_no_template_says_what_to_do(make: Make) -> None:
    with pytest.raises(InputError) as caught:
        build(make(config=BASE)).apply_chat_template(HI)
    assert "this model has no chat template" in str(caught.value)
    assert "chat_template.jinja" in caught.value.fix


def test_a_templates_refusal_is_told(make: Make) -> None:
    tokenizer = build(make(config=BASE, template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(InputError, match="roles must alternate"):
        tokenizer.apply_chat_template(HI)


@pytest.mark.parametrize(
    ("messages", "variables", "said"),
    (
        ([], {}, "at least one message"),
        ([{"content": "x"}], {}, "with a role"),
        (["hello"], {}, "with a role"),
        ([{"role": "user", "content": object()}], {}, "plain data"),
        ([{"role": "user", "content": {1: 2}}], {}, "is no str"),
    ),
)
def test_what_is_no_chat_is_refused(make: Make, messages: Any, variables: Any, said: str) -> None:
    tokenizer = build(make(config=BASE, template="x"))
    with pytest.raises(InputError, match=said):
        tokenizer.apply_chat_template(messages, **variables)


def test_a_template_that_does_not_compile_is_the_files_fault(make: Make) -> None:
    for template in ("{% for %}", "{{ x | pprint }}", "{{ " + "(" * 5000 + ")" * 5000 + " }}"):
        with pytest.raises(ConfigError, match="cannot be compiled"):
            build(make(config=BASE, template=template)).apply_chat_template(HI)


@pytest.mark.parametrize(
    "escape",
    (
        "{{ ''.__class__.__mro__ }}", "{{ messages.__class__ }}", "{{ cycler.__init__.__globals__ }}",
        "{{ lipsum.__globals__ }}", "{{ ''.format(1) }}", "{{ self.__init__ }}", "{{ messages.append(1) }}",
        "{{ raise_exception.__globals__ }}", "{{ strftime_now.__globals__['json'] }}", "{{ [].__reduce__() }}",
    ),
)  # fmt: skip
def test_a_template_does_not_get_out(make: Make, escape: str) -> None:
    tokenizer = build(make(config=BASE, template=escape))
    try:
        out = text(tokenizer, tokenizer.apply_chat_template(HI))
    except InputError:
        return
    assert out == ""


@pytest.mark.parametrize(
    "bomb",
    (
        "{{ 'a' * 100000000 }}", "{{ [1] * 100000000 }}", "{{ 9 ** 99999 }}", "{{ 'a'.ljust(100000000) }}",
        "{{ '%0100000000d' % 1 }}", "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% for i in range(99999) %}{{ 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' }}{% endfor %}",
        "{% set x = 'a' * 3000000 %}{% set y %}{% for i in range(99999) %}{{ x }}{% endfor %}{% endset %}",
        "{% set x = 'a' * 3000000 %}{{ [x] * 1000 | length }}{{ ([x] * 1000) | join }}",
        "{% set x = 'a' * 3000000 %}{{ x ~ x }}", "{{ ('a' * 3000) | replace('a', 'b' * 3000) }}",
        "{{ ('a' * 3000).replace('a', 'b' * 3000) }}", "{{ ('b' * 3000).join(['a'] * 3000) }}",
        "{{ ('\n' * 3000) | indent(3000, blank=true) }}", "{{ messages | tojson(indent=100000000) }}",
        "{% macro f(n) %}{{ f(n) }}{{ f(n) }}{% endmacro %}{{ f(1) }}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(100) }}",
        "{% set ns = namespace(x='ab') %}{% for i in range(99) %}{% set ns.x = ns.x + ns.x %}{% endfor %}",
        "{{ strftime_now('%Y' * 1000) }}",
    ),
)  # fmt: skip
def test_a_bomb_is_stopped_within_two_seconds(make: Make, bomb: str) -> None:
    tokenizer = build(make(config=BASE, template=bomb))
    start = time.monotonic()
    with pytest.raises(InputError, match=r"was stopped|failed on these messages"):
        tokenizer.apply_chat_template(HI)
    assert time.monotonic() - start < 2.5
