"""What is generated under a grammar is one of its texts, by every strategy, alone and in ragged batches."""

from __future__ import annotations

import io
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pluglm
from pluglm import GenerationError, GrammarError, InputError, PlanError, PluginNotFoundError, UnsupportedRequestError
from pluglm.cli.main import main
from pluglm.completions import Completion
from pluglm.contracts import Grammar

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6, "pattern": "^[a-z é]*$"},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "kind": {"enum": ["cat", "hat", None]},
    },
    "required": ["name", "size", "kind"],
    "additionalProperties": False,
}
COMPACT = {"constraint": "llguidance", "options": {"constraint": {"whitespace": "none"}}}
ROWS = [[60, 17, 201, 5, 99, 60, 17], [8], [40, 41, 42, 40, 41, 42, 40, 41], [7, 7]]
GRAMMARS: list[Any] = [
    {"json_schema": SCHEMA}, {"choice": ["a cat", "a cat sat", "no cat"]}, None,
    {"lark": 'start: WORD ("+" WORD){0,3} "."\nWORD: /[a-z]{1,4}/'},
]  # fmt: skip
STRATEGIES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "uncached": {"use_cache": False},
    "sampling": {"temperature": 1.3, "top_p": 0.95},
    "beam": {"decoding": "beam", "num_beams": 3},
    "prompt-lookup": {"decoding": "prompt-lookup"},
    "dola": {"decoding": "dola"},
}


@pytest.fixture(scope="module")
def compact(folder: Path) -> pluglm.LanguageModel:
    """The usual model, held to JSON without spaces, which it would go on with."""
    return pluglm.load(folder, **COMPACT)


def many(done: Completion | list[Completion]) -> list[Completion]:
    return [done] if isinstance(done, Completion) else done


def same(a: Completion | list[Completion], b: Completion | list[Completion]) -> bool:
    """All but scores, whose last digits depend on the batch."""
    return [(c.text, c.token_ids, c.finish_reason) for c in many(a)] == [
        (c.text, c.token_ids, c.finish_reason) for c in many(b)
    ]


def follows(grammar: Any, text: str) -> bool:
    """Whether a text is one of a grammar's."""
    kind, content = next(iter(grammar.items()))
    if kind == "choice":
        return text in content
    if kind == "lark":
        return re.fullmatch(r"[a-z]{1,4}(\+[a-z]{1,4}){0,3}\.", text) is not None
    value = json.loads(text)
    assert json.dumps(value, separators=(",", ":"), ensure_ascii=False) == text
    return (
        set(value) == {"name", "size", "kind"}
        and re.fullmatch("[a-z é]{0,6}", value["name"]) is not None
        and type(value["size"]) is int
        and 0 <= value["size"] <= 99
        and value["kind"] in ("cat", "hat", None)
    )


# Every strategy


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_row_of_a_ragged_batch_follows_its_own_grammar_and_is_as_it_is_alone(
    compact: pluglm.LanguageModel, strategy: str
) -> None:
    said, seeds = STRATEGIES[strategy], [3, 4, 5, 6]
    seeded: Callable[[list[int]], dict[str, Any]] = lambda s: {"seed": s} if "temperature" in said else {}  # noqa: E731
    together = many(compact.complete(ROWS, constraint=GRAMMARS, max_new_tokens=60, **said, **seeded(seeds)))
    for row, grammar, seed, done in zip(ROWS, GRAMMARS, seeds, together, strict=True):
        alone = compact.complete(row, constraint=grammar, max_new_tokens=60, **said, **seeded([seed]))
        assert same(alone, done)
        if grammar is not None:
            assert done.finish_reason == "eos"
            assert follows(grammar, done.text), done.text
    plain = compact.complete(ROWS[2], max_new_tokens=60, **said, **seeded([5]))
    assert same(together[2], plain), "a row without a grammar is left alone"


@pytest.mark.parametrize("said", [{}, {"temperature": 1.2, "seed": 7}], ids=["greedy", "sampled"])
def test_guessed_tokens_are_those_of_plain_decoding(compact: pluglm.LanguageModel, said: dict[str, Any]) -> None:
    words = {"lark": 'start: (WORD " "){12} WORD\nWORD: "cat" | "sat" | "hat"'}
    prompt = "cat sat hat cat cat sat hat sat cat hat hat cat sat "
    assert compact.tokenizer is not None
    for prompts, grammars in ((prompt, words), (ROWS, [{"json_schema": SCHEMA}, words, words, GRAMMARS[3]])):
        more: dict[str, Any] = {"constraint": grammars, "max_new_tokens": 60, **said}
        plain = compact.complete(prompts, **more)
        assert compact.complete(prompts, decoding="prompt-lookup", **more) == plain
        assisted = compact.complete(prompts, decoding="assisted", assistant_model=compact, **more)
        if not said:  # an assistant that draws has draws of its own
            assert assisted == plain
        assert [c.finish_reason for c in many(assisted)] == ["eos"] * len(many(plain))


def test_greedy_takes_the_best_of_the_tokens_that_fit(compact: pluglm.LanguageModel) -> None:
    """Against a loop by hand over the texts of a choice, token by token."""
    texts = ["read a book of cats", "read a mat", "reading", "sat 🙂", "sat"]
    assert compact.tokenizer is not None
    stand_for, eos = compact.tokenizer.token_bytes(), 1
    for row in ROWS:
        said, ids = b"", list(row)
        while True:
            with torch.no_grad():
                scores = compact.model(torch.tensor([ids])).logits[0, -1]
            fits = {
                i for i, part in enumerate(stand_for)
                if part and any(text.encode().startswith(said + part) for text in texts)
            }  # fmt: skip
            fits |= {eos} if said.decode(errors="replace") in texts else set()
            token = max(fits, key=lambda i: float(scores[i]))
            ids.append(token)
            if token == eos:
                break
            said += stand_for[token] or b""
        done = many(compact.complete(row, constraint={"choice": texts}, max_new_tokens=40))[0]
        assert list(done.token_ids) == ids[len(row) :]
        assert done.text == said.decode()


def test_several_sequences_of_each_prompt_follow_its_grammar(compact: pluglm.LanguageModel) -> None:
    grammars = [GRAMMARS[3], GRAMMARS[1]]
    for said in ({"temperature": 1.5, "seed": 3}, {"decoding": "beam", "num_beams": 4}):
        done = many(compact.complete(ROWS[:2], constraint=grammars, num_return_sequences=3, max_new_tokens=40, **said))
        assert len(done) == 6
        for i, completion in enumerate(done):
            assert follows(grammars[i // 3], completion.text), completion.text


def test_equal_prompts_may_have_different_grammars(compact: pluglm.LanguageModel) -> None:
    done = compact.generate([ROWS[1]] * 2, constraint=[{"choice": ["a cat"]}, {"regex": "[0-9]{3}"}], max_new_tokens=20)
    assert done[0] == "a cat"
    assert re.fullmatch("[0-9]{3}", done[1])


@pytest.mark.parametrize("said", [{}, {"decoding": "prompt-lookup"}], ids=["greedy", "prompt-lookup"])
def test_a_stream_gives_the_same_text(compact: pluglm.LanguageModel, said: dict[str, Any]) -> None:
    more = {"constraint": GRAMMARS[0], "max_new_tokens": 60, **said}
    assert "".join(compact.stream(ROWS[0], **more)) == compact.generate(ROWS[0], **more)


def test_a_cache_that_goes_on_begins_a_new_text_of_the_grammar(compact: pluglm.LanguageModel) -> None:
    cache = compact.new_cache(capacity=150)
    first = many(compact.complete(ROWS[0], constraint=GRAMMARS[1], past_key_values=cache, max_new_tokens=30))[0]
    ids = [*ROWS[0], *first.token_ids, 44, 45]
    again = compact.complete(ids, constraint=GRAMMARS[3], past_key_values=cache, max_new_tokens=30)
    assert again == compact.complete(ids, constraint=GRAMMARS[3], max_new_tokens=30)
    assert follows(GRAMMARS[1], first.text) and follows(GRAMMARS[3], many(again)[0].text)


def test_the_callers_own_processors_run_before_the_grammar(compact: pluglm.LanguageModel) -> None:
    seen: list[torch.Tensor] = []

    def only_even(_: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        seen.append(torch.isfinite(scores).all())
        scores[:, 2:][:, 1::2] = -torch.inf
        return scores

    done = many(compact.complete(ROWS[0], constraint={"regex": "[a-z]{5}"}, logits_processor=[only_even]))[0]
    assert re.fullmatch("[a-z]{5}", done.text)
    assert all(token % 2 == 0 for token in done.token_ids[:-1])
    assert all(bool(whole) for whole in seen)


@pytest.mark.parametrize(
    ("constraint", "texts"),
    [
        ({"json_schema": '{"enum": [12, 13]}'}, ["12", "13"]), (Grammar("regex", "é{3}"), ["ééé"]),
        ({"choice": ["x\n", 'y"\\', "/日本//"]}, ["x\n", 'y"\\', "/日本//"]), ({"choice": [""]}, [""]),
        ({"regex": r"a/b\n\\"}, ["a/b\n\\"]), ({"json_schema": {"const": "//"}}, ['"//"']),
    ],
    ids=str,
)  # fmt: skip
def test_every_form_of_a_grammar_is_read(compact: pluglm.LanguageModel, constraint: Any, texts: list[str]) -> None:
    done = many(compact.complete(ROWS[1], constraint=constraint, max_new_tokens=70))[0]
    assert done.text in texts
    assert done.finish_reason == "eos"


def test_json_is_json(compact: pluglm.LanguageModel) -> None:
    value = {"a //": 'b "c" \n 日本', "é": [1, None]}
    done = compact.generate(ROWS[1], constraint={"json_schema": {"const": value}}, max_new_tokens=90)
    assert isinstance(done, str) and json.loads(done) == value
    for anything in ({"json": True}, {"json_schema": True}, {"json_schema": {}}):
        more = {"constraint": anything, "temperature": 3.0, "seed": 2, "max_new_tokens": 50}
        made = many(compact.complete(ROWS[1], **more))[0]
        assert made.finish_reason == "length" or json.loads(made.text) is not Ellipsis


def test_end_tokens_are_those_of_the_call(compact: pluglm.LanguageModel) -> None:
    done = many(compact.complete(ROWS[1], constraint={"regex": "b+"}, eos_token_id=[3, 99], max_new_tokens=60))[0]
    assert done.finish_reason == "length" or done.token_ids[-1] in (3, 99)
    assert 99 not in done.token_ids[:-1]
    done = many(compact.complete(ROWS[1], constraint={"choice": ["bb"]}, eos_token_id=99, max_new_tokens=9))[0]
    assert (done.token_ids[-1], done.finish_reason) == (99, "eos")
    refused(GrammarError, compact, "no text at all that this vocabulary", constraint={"regex": "b+"}, eos_token_id=70)


def write_t5(folder: Path, V: int = 307, C: int = 24, F: int = 40, H: int = 3, D: int = 8) -> None:
    """A tiny T5 of random weights, one layer a stack."""
    config = {
        "model_type": "t5", "is_encoder_decoder": True, "vocab_size": V, "d_model": C, "d_ff": F, "d_kv": D,
        "num_heads": H, "num_layers": 1, "num_decoder_layers": 1, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20, "feed_forward_proj": "relu", "tie_word_embeddings": False,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {"shared": (V, C), "lm_head": (V, C)}
    for stack, parts in (("encoder", ("SelfAttention",)), ("decoder", ("SelfAttention", "EncDecAttention"))):
        block = f"{stack}.block.0.layer"
        shapes[f"{block}.0.SelfAttention.relative_attention_bias"] = (8, H)
        for i, part in enumerate(parts):
            shapes |= {f"{block}.{i}.{part}.{side}": (H * D, C) for side in "qkv"}
            shapes |= {f"{block}.{i}.{part}.o": (C, H * D), f"{block}.{i}.layer_norm": (C,)}
        last = f"{block}.{len(parts)}"
        shapes |= {f"{last}.DenseReluDense.wi": (F, C), f"{last}.DenseReluDense.wo": (C, F)}
        shapes |= {f"{last}.layer_norm": (C,), f"{stack}.final_layer_norm": (C,)}
    draw = torch.Generator().manual_seed(4)
    weights = {f"{name}.weight": torch.randn(shape, generator=draw) for name, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def test_an_encoder_decoder_is_held_to_a_grammar_a_row(tmp_path: Path, tokenizer_json: str) -> None:
    write_t5(tmp_path)
    (tmp_path / "tokenizer.json").write_text(tokenizer_json)
    lm = pluglm.load(tmp_path, **COMPACT)
    prompts, grammars = ROWS[:3], [GRAMMARS[0], GRAMMARS[1], GRAMMARS[3]]
    for said in ({}, {"decoding": "beam", "num_beams": 2}):
        done = many(lm.complete(prompts, constraint=grammars, max_new_tokens=60, **said))
        for row, grammar, completion in zip(prompts, grammars, done, strict=True):
            assert follows(grammar, completion.text)
            assert same(lm.complete(row, constraint=grammar, max_new_tokens=60, **said), completion)


# Who does it


def test_the_constraint_is_built_when_a_call_brings_a_grammar_and_then_kept(folder: Path) -> None:
    lm = pluglm.load(folder)
    assert all(choice.kind != "constraint" for choice in lm.plan.choices)
    constraints = lm._calls.constraints
    lm.generate(ROWS[1], max_new_tokens=2)
    lm.generate(ROWS[:2], constraint=[None, None], max_new_tokens=2)
    assert not constraints._built
    for _ in range(2):
        lm.generate(ROWS[1], constraint={"choice": ["a", "b"]}, max_new_tokens=5)
    assert len(constraints._built) == len(constraints._compiled) == 1
    lm.generate(ROWS[1], constraint={"choice": ["a", "b"]}, eos_token_id=5, max_new_tokens=5)
    assert len(constraints._built) == 2


def test_a_named_constraint_stands_in_the_plan_and_is_replayed(folder: Path, compact: pluglm.LanguageModel) -> None:
    choice = compact.plan["constraint"]
    assert choice.provider == "pluglm-constraint-llguidance:constraint/llguidance"
    assert choice.options == (("whitespace", "none"),)
    assert pluglm.explain(folder, **COMPACT).hash == compact.plan.hash
    again = pluglm.load(folder, plan=compact.plan)
    more = {"constraint": GRAMMARS[0], "max_new_tokens": 60}
    assert again.generate(ROWS[0], **more) == compact.generate(ROWS[0], **more)
    with pytest.raises(PluginNotFoundError, match="Did you mean 'llguidance'"):
        pluglm.load(folder, constraint="llgiudance")


# What is refused


def refused(error: type[Exception], lm: pluglm.LanguageModel, *said: str, prompt: Any = ROWS[1], **call: Any) -> None:
    with pytest.raises(error) as caught:
        lm.generate(prompt, **{"max_new_tokens": 8, **call})
    for fragment in said:
        assert fragment in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("constraint", "error", "said"),
    [
        ("[a-z]+", InputError, ("constraint='[a-z]+' is no grammar", '{"regex": "…"}')),
        ({"regexp": "a"}, InputError, ("is no grammar",)),
        ({"regex": "a", "json": True}, InputError, ("is no grammar",)),
        ({}, InputError, ("is no grammar",)),
        ({"json": False}, GrammarError, ("the json of the constraint makes no sense", '{"json": True}')),
        ({"choice": []}, GrammarError, ("at least one text",)),
        ({"choice": "yes"}, GrammarError, ("at least one text",)),
        ({"regex": 3}, GrammarError, ("must be a text",)),
        ({"json_schema": "{"}, GrammarError, ("it is no JSON",)),
        ({"json_schema": 3}, GrammarError, ("a schema is an object",)),
        ({"json_schema": {"const": {1, 2}}}, GrammarError, ("cannot be written as JSON",)),
        ({"json_schema": {"not": {}}}, GrammarError, ("this json_schema cannot be followed", '"not"', "in silence")),
        ({"json_schema": False}, GrammarError, ("Unsatisfiable",)),
        ({"regex": "(a"}, GrammarError, ("this regex cannot be followed", "unclosed group")),
        ({"regex": r"(a)\1"}, GrammarError, ("backreferences",)),
        ({"lark": "start: b\nb: a"}, GrammarError, ('at 2(4): unknown name: "a"', "2 | b: a")),
        ({"lark": "start: start"}, GrammarError, ("allows no text",)),
        ({"lark": '%llguidance {"no_forcing": false}\nstart: "a"'}, GrammarError, ("%llguidance",)),
        ({"lark": 'start: x\nx[max_tokens=3]: /a*/'}, GrammarError, ("max_tokens=", "no rule about the text")),
        ([{"json": True}], InputError, ("a list of 1, and one prompt was passed",)),
    ],
    ids=str,
)  # fmt: skip
def test_a_grammar_that_makes_no_sense_is_refused_before_anything_runs(
    compact: pluglm.LanguageModel, constraint: Any, error: type[Exception], said: Sequence[str]
) -> None:
    refused(error, compact, *said, constraint=constraint)


def test_a_call_that_cannot_be_held_to_a_grammar_is_refused(compact: pluglm.LanguageModel) -> None:
    one = {"choice": ["a", "b"]}
    refused(InputError, compact, "a list of 1, and 2 prompts", prompt=ROWS[:2], constraint=[one])
    refused(InputError, compact, "needs an end token", constraint=one, eos_token_id=[])
    refused(InputError, compact, "token_healing and constraint", prompt=[7, 8], constraint=one, token_healing=True)
    with pytest.raises(InputError, match=r"Grammar\('ebnf', 'x'\) is none"):
        Grammar("ebnf", "x")
    refused(GenerationError, compact, "every token is forbidden for row 0", constraint=one, min_new_tokens=5)


def test_a_model_without_a_tokenizer_cannot_be_held_to_a_grammar(
    write_model: Callable[..., Path], tmp_path: Path
) -> None:
    lm = pluglm.load(write_model(tmp_path, tokenizer=False))
    refused(InputError, lm, "without a tokenizer", "tokenizer.json", constraint={"json": True})


def test_a_tokenizer_that_does_not_say_its_bytes_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = pluglm.load(folder)
    assert lm.tokenizer is not None
    monkeypatch.delattr(type(lm.tokenizer), "token_bytes")
    refused(UnsupportedRequestError, lm, "JsonTokenizer does not say", "API 1.1", constraint={"json": True})


def test_unknown_options_of_the_constraint_are_refused(folder: Path) -> None:
    lm = pluglm.load(folder, constraint="llguidance:fast", options={"constraint": {"whitespace": "much"}})
    refused(UnsupportedRequestError, lm, "variant 'fast'", "'whitespace' is 'much'", constraint={"json": True})


def test_without_a_provider_the_kind_is_named(folder: Path) -> None:
    from pluglm.manager import Manager
    from pluglm.registry import Registry
    from pluglm.testing.isolation import isolated_manager

    others = [p for p in Registry.installed().providers if p.kind != "constraint"]
    manager: Manager = isolated_manager(*others)
    lm = pluglm.load(folder, manager=manager)
    refused(PluginNotFoundError, lm, "no constraint plugin is installed", constraint={"json": True})
    with pytest.raises((PlanError, PluginNotFoundError)):
        pluglm.load(folder, manager=manager, constraint="llguidance")


# The command line


def test_the_command_line_takes_a_schema_an_expression_and_a_grammar(
    folder: Path, compact: pluglm.LanguageModel, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    schema, grammar = tmp_path / "schema.json", tmp_path / "words.lark"
    schema.write_text(json.dumps(SCHEMA))
    grammar.write_text(GRAMMARS[3]["lark"])
    named = ("generate", "-m", str(folder), "-n", "60", "--constraint", "llguidance", "--option",
             "constraint.whitespace=none")  # fmt: skip

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main([*named, *arguments, "the cat"])
        printed = capsys.readouterr()
        assert isinstance(end.value.code, int)
        return end.value.code, printed.out, printed.err

    def said(constraint: Any) -> tuple[int, str, str]:
        return 0, f"the cat{compact.generate('the cat', constraint=constraint, max_new_tokens=60)}\n", ""

    assert run("--json-schema", str(schema)) == run("--json-schema", json.dumps(SCHEMA)) == said(GRAMMARS[0])
    assert run("--regex", "[0-9]{4}") == said({"regex": "[0-9]{4}"})
    assert run("--grammar", str(grammar), "--no-stream") == said(GRAMMARS[3])
    code, out, err = run("--regex", "a", "--grammar", str(grammar))
    assert (code, out) == (2, "") and "give one of --json-schema" in err
    code, out, err = run("--json-schema", "nothing.json")
    assert (code, out) == (2, "") and "nothing.json" in err
    code, out, err = run("--regex", "(")
    assert (code, out) == (1, "") and "GrammarError" in err and "unclosed group" in err
