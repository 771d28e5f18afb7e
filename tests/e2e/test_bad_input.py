"""A table of mistakes at the level of `load`, `explain`, `generate` and `save`: each is a typed error that says what, why
and what to do, comes quickly, and leaves every file as it was."""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pluglm
from pluglm import (
    CheckpointError,
    ConfigError,
    ContextLengthError,
    InputError,
    ModelError,
    ModelNotFoundError,
    Plan,
    PlanError,
    PluginNotFoundError,
    PluglmError,
    SaveError,
    UnsupportedRequestError,
)

CONTEXT, V = 192, 307
Act = Callable[[Path], object]
Row = tuple[Act, type[PluglmError], tuple[str, ...]]


# What is done to a sound folder


def config(*missing: str, **changed: Any) -> Act:
    def edit(model: Path) -> None:
        said = json.loads((model / "config.json").read_text())
        for key in missing:
            del said[key]
        (model / "config.json").write_text(json.dumps({**said, **changed}))

    return edit


def weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Act:
    def edit(model: Path) -> None:
        tensors = {name: tensor.clone() for name, tensor in load_file(model / "model.safetensors").items()}
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return edit


def file(name: str, text: str) -> Act:
    return lambda model: (model / name).write_text(text)


def generation(**said: Any) -> Act:
    return file("generation_config.json", json.dumps(said))


def without(*names: str) -> Act:
    return lambda model: [(model / name).unlink() for name in names]


def load(**arguments: Any) -> Act:
    return lambda model: pluglm.load(model, **arguments)


Q = "model.layers.1.self_attn.q_proj.weight"

FILES: dict[str, Row] = {
    "folder is empty": (
        lambda m: [p.unlink() for p in m.iterdir()], ModelError, ("has no config.json", "Why:", "To do")),
    "weights are missing": (without("model.safetensors"), ModelError, ("safetensors", "To do")),
    "config without model_type": (
        config("model_type"), ConfigError, ("does not say what the model is", "model_type is None", "To do")),
    "model_type is a number": (config(model_type=7), ConfigError, ("model_type is 7", "To do")),
    "model_type has a typo": (
        config(model_type="lama"), PluginNotFoundError,
        ("no installed plugin reads model_type 'lama'", "installed architectures: ", "granite, llama", "pluglm.architectures")),
    "model_type names a repository": (
        config(model_type="evil/repo"), PluginNotFoundError, ("model_type 'evil/repo'", "nothing is fetched")),
    "model_type names another provider's id": (
        config(model_type="x:architecture/llama"), PluginNotFoundError, ("x:architecture/llama", "To do")),
    "model_type with a variant": (config(model_type="llama:big"), PluginNotFoundError, ("'llama:big'", "To do")),
    "unknown config key": (config(attn_logit_softcapping=30.0), ConfigError, ("attn_logit_softcapping", "Why:", "To do")),
    "unknown rope type": (
        config(rope_scaling={"rope_type": "wavy", "factor": 2.0}), ConfigError, ("wavy", "To do")),
    "unknown activation": (config(hidden_act="swoosh"), ConfigError, ("hidden_act", "swoosh", "silu")),
    "layers is negative": (config(num_hidden_layers=-2), ConfigError, ("num_hidden_layers", "-2")),
    "heads do not divide": (config(num_key_value_heads=4), ConfigError, ("4 key-value heads", "6 heads")),
    "a size as text": (config(hidden_size="24"), ConfigError, ("hidden_size", "'24'")),
    "dtype in config is none": (config(dtype="float8_e4m3fn"), ConfigError, ("float8_e4m3fn", "bfloat16")),
    "hidden_size does not fit": (
        config(hidden_size=26), CheckpointError, ("does not fit the model", "config.json makes", "26", "To do")),
    "vocab_size does not fit": (config(vocab_size=310), CheckpointError, ("does not fit the model", "310", "307")),
    "one layer too many in config": (
        config(num_hidden_layers=3), CheckpointError, ("lacks 9 of the tensors", "model.layers.2.", "every shard")),
    "one layer too few in config": (
        config(num_hidden_layers=1), CheckpointError, ("holds 9 tensors that this model has no place for", "model.layers.1.")),
    "a tensor is missing": (weights(lambda t: t.pop(Q)), CheckpointError, ("lacks 1 of the tensors", Q, "never filled in")),
    "a tensor too many": (
        weights(lambda t: t.update({Q.replace("weight", "lora_A"): torch.ones(2, 3)})), CheckpointError,
        ("holds 1 tensors that this model has no place for", "lora_A", "changes every result")),
    "a tensor of integers": (
        weights(lambda t: t.update({Q: t[Q].to(torch.int8)})), CheckpointError,
        (Q, "stored as I8", "quantization_config")),
    "a transposed tensor": (
        weights(lambda t: t.update({Q: t[Q].T.contiguous()})), CheckpointError, (Q, "[24, 60]", "[60, 24]")),
    "tied, and the head differs": (
        config(tie_word_embeddings=True), CheckpointError, ("lm_head.weight", "differs from", "tie_word_embeddings to false")),
    "untied, and there is no head": (
        weights(lambda t: t.pop("lm_head.weight")), CheckpointError, ("lacks 1 of the tensors", "lm_head.weight")),
    "float8 without its scales": (
        weights(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})), CheckpointError,
        (Q, "stored as F8_E4M3, which says nothing without its scales", "To do")),
    "packed by an unknown method": (
        config(quantization_config={"quant_method": "spq_r", "bits": 4}), PluginNotFoundError,
        ("packed by 'spq_r'", "would give noise", "pluglm-quantizer-spq-r")),
    "packed by a repository": (
        config(quantization_config={"quant_method": "org/quantizer"}), ConfigError,
        ("'org/quantizer'", "never names a place to fetch one from", "To do")),
    "packed by nobody": (config(quantization_config={"bits": 4}), ConfigError, ("quant_method None", "To do")),
    "quantization_config is a text": (config(quantization_config="int8"), ConfigError, ("quant_method", "To do")),
    "packed in the config only": (
        config(quantization_config={"quant_method": "torchao", "quant_type": "int8_weight_only", "packing": "pluglm"}),
        CheckpointError, ("packed", "torchao")),
    "packed by another layout": (
        config(quantization_config={"quant_method": "torchao", "quant_type": "int4"}), ConfigError,
        ("'int4'", "int8_weight_only", "To do")),
    "tokenizer is no JSON": (file("tokenizer.json", "{"), ConfigError, ("tokenizer.json", "To do")),
    "tokenizer is another JSON": (file("tokenizer.json", '{"a": 1}'), ConfigError, ("tokenizer.json", "To do")),
    "tokenizer is larger than the model": (
        lambda m: (config(vocab_size=280)(m), weights(lambda t: t.update(
            {n: t[n][:280].clone() for n in ("model.embed_tokens.weight", "lm_head.weight")}))(m)),
        ConfigError, ("its ids reach 289", "280 rows")),
    "end token that the tokenizer lacks": (
        file("tokenizer_config.json", '{"eos_token": "<end>"}'), ConfigError, ("<end>", "eos_token", "To do")),
    "generation_config: temperature is a text": (
        generation(do_sample=True, temperature="hot"), ConfigError, ("generation_config.json", "temperature='hot'", "To do")),
    "generation_config: negative length": (
        generation(max_new_tokens=-3), ConfigError, ("generation_config.json", "max_new_tokens=-3")),
    "generation_config: do_sample is a text": (
        generation(do_sample="no"), ConfigError, ("generation_config.json", "do_sample='no'")),
    "generation_config: a search without beams": (generation(length_penalty=0.8), PlanError, ("length_penalty", "decoding")),
    "generation_config: a key nobody knows": (generation(sparkle=3), PlanError, ("sparkle", "decoding")),
    "generation_config: a list": (file("generation_config.json", "[]"), ConfigError, ("generation_config.json",)),
    "generation_config: end token beyond the vocabulary": (
        generation(eos_token_id=9999), ConfigError, ("generation_config.json", "9999", "307")),
}  # fmt: skip


def typo(kind: str, text: str, meant: str) -> Row:
    fragments = (f"no plugin provides {kind} {text!r}", f"Did you mean {meant!r}?", "pluglm plugins list")
    return load(**{kind: text}), PluginNotFoundError, fragments


ARGUMENTS: dict[str, Row] = {
    "folder that is not there": (
        lambda m: pluglm.load(m / "nothing"), ModelNotFoundError, ("no model folder", "no such folder exists", "To do")),
    "path of a file": (
        lambda m: pluglm.load(m / "config.json"), ModelNotFoundError, ("no model folder", "it is a file")),
    "no name": (lambda m: pluglm.load(""), InputError, ("not a model", "To do")),
    "a name with spaces": (lambda m: pluglm.load("my model/two"), InputError, ("neither a folder nor", "Check the spelling")),
    "a model that is not cached": (
        lambda m: pluglm.load("org/none", offline=True), ModelNotFoundError, ("org/none", "To do")),
    "architecture typo": typo("architecture", "lama", "llama"),
    "attention typo": typo("attention", "spda", "sdpa"),
    "cache typo": typo("cache", "dinamic", "dynamic"),
    "decoding typo": typo("decoding", "gredy", "greedy"),
    "executor typo": typo("executor", "egaer", "eager"),
    "tokenizer typo": typo("tokenizer", "tokeniser", "tokenizers"),
    "quantizer typo": typo("quantizer", "torcha", "torchao"),
    "a part of another kind": (
        load(attention="pluglm-caches:cache/static"), PluginNotFoundError, ("kind 'cache'", "'attention' is needed", "sdpa")),
    "a part of another distribution": (
        load(attention="pluglm-attention-eager:attention/sdpa"), PluginNotFoundError, ("sdpa", "To do")),
    "a kind that is none": (load(attention="atention/sdpa"), InputError, ("kind 'atention'", "'attention' is near")),
    "a name that cannot be one": (load(cache="a b"), InputError, ("'a b' does not name a plugin", "To do")),
    "an empty part": (load(cache=""), InputError, ("cache=''", "To do")),
    "a part that is no text": (load(cache=3), InputError, ("cache=3", "To do")),
    "a part that was left None": (load(attention=None, quantizer=7), InputError, ("quantizer=7", "To do")),
    "attention variant": (load(attention="sdpa:flash"), UnsupportedRequestError, ("flash", "sdpa", "To do")),
    "cache variant": (load(cache="static:int4"), UnsupportedRequestError, ("no variants", "'int4'", "To do")),
    "quantizer variant": (load(quantizer="torchao:int3"), UnsupportedRequestError, ("'int3' is unknown", "int8", "To do")),
    "decoding variant": (load(decoding="greedy:wide"), UnsupportedRequestError, ("'wide' is not known", "To do")),
    "executor variant": (load(executor="eager:fast"), UnsupportedRequestError, ("fast", "eager")),
    "tokenizer variant": (load(tokenizer="tokenizers:fast"), UnsupportedRequestError, ("fast", "To do")),
    "architecture variant": (load(architecture="llama:big"), UnsupportedRequestError, ("big", "To do")),
    "cache option": (
        load(cache="dynamic", options={"cache": {"size": 3}}), UnsupportedRequestError, ("no option 'size'", "To do")),
    "attention option": (
        load(attention="sdpa", options={"attention": {"kernel": 1}}), UnsupportedRequestError, ("kernel", "sdpa")),
    "tokenizer option": (
        load(tokenizer="tokenizers", options={"tokenizer": {"fast": True}}), UnsupportedRequestError, ("fast", "To do")),
    "options with auto": (
        load(options={"cache": {"size": 3}}), InputError, ("options for the cache need a named one", "auto", "cache=")),
    "explain: options with auto": (
        lambda m: pluglm.explain(m, options={"cache": {"size": 3}}), InputError, ("options for the cache need a named one",)),
    "options of no kind": (load(options={"cash": {"size": 3}}), InputError, ("'cash'", "parts are", "cache")),
    "options that are no mapping": (load(options={"cache": 3}), InputError, ("does not name a part", "To do")),
    "options are a list": (load(options=["cache"]), InputError, ("options", "To do")),
    "options of an absent quantizer": (
        load(options={"quantizer": {"bits": 4}}), InputError, ("none is chosen", "quantizer=")),
    "skip without a quantizer": (load(quantizer_skip=("*",)), InputError, ("quantizer_skip", "none is named")),
    "skip that leaves nothing": (load(quantizer="torchao", quantizer_skip=("*",)), PlanError, ("took none", "skip")),
    "packing in a dtype without a product": (
        load(quantizer="torchao", dtype="float16"), PlanError, ("float16", "float32", "To do")),
    "device that is none": (load(device="gpu"), InputError, ("device='gpu' is not a device", "cuda:1")),
    "device of an untested type": (load(device="meta"), InputError, ("device='meta'", "To do")),
    "device that is no text": (load(device=0), InputError, ("device=0", "To do")),
    "device that is not there": (load(device="cuda:99"), InputError, ("cuda:99", "is not there", 'device="cpu"')),
    "dtype that is none": (load(dtype="int8"), InputError, ("dtype='int8'", "bfloat16")),
    "dtype with a typo": (load(dtype="bfloat"), InputError, ("dtype='bfloat'", "bfloat16")),
    "explain: an unknown argument": (
        lambda m: pluglm.explain(m, atention="sdpa"), InputError, ("no argument 'atention'", "attention")),
    "explain: typo": (
        lambda m: pluglm.explain(m, cache="dinamic"), PluginNotFoundError, ("no plugin provides cache", "Did you mean 'dynamic'")),
    "plan that was edited": (
        lambda m: Plan.from_json({**pluglm.explain(m).to_json(), "dtype": "bfloat16"}), PlanError,
        ("changed after it was made", "Make the plan again")),
    "plan of another schema": (
        lambda m: Plan.from_json({**pluglm.explain(m).to_json(), "schema": 2}), PlanError, ("schema 2", "To do")),
    "plan that is none": (lambda m: Plan.from_json({"schema": 1}), PlanError, ("not a plan", "choices")),
    "plan as a mapping": (lambda m: pluglm.load(m, plan=pluglm.explain(m).to_json()), InputError, ("plan", "from_json")),  # type: ignore[arg-type]
    "plan beside a dtype": (
        lambda m: pluglm.load(m, plan=pluglm.explain(m), dtype="bfloat16"), InputError, ("a plan already", "dtype")),
}  # fmt: skip


def listing(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def refused(act: Callable[[], object], error: type[PluglmError], fragments: tuple[str, ...]) -> PluglmError:
    """The error of `act`, with all that it must say."""
    with pytest.raises(error) as caught:
        act()
    text = str(caught.value)
    for fragment in fragments:
        assert fragment in text
    assert len(text) > 40 and text[0] != " " and "Traceback" not in text
    return caught.value


@pytest.fixture
def model(folder: Path, tmp_path: Path) -> Path:
    """A copy of the usual model, alone in its folder."""
    return Path(shutil.copytree(folder, tmp_path / "place" / "model"))


@pytest.mark.parametrize(("spoil", "error", "fragments"), FILES.values(), ids=FILES)
def test_a_folder_that_is_wrong_is_refused(
    model: Path, spoil: Act, error: type[PluglmError], fragments: tuple[str, ...]
) -> None:
    spoil(model)
    before = listing(model.parent)
    refused(lambda: pluglm.load(model), error, fragments)
    assert listing(model.parent) == before


@pytest.mark.parametrize(("act", "error", "fragments"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_argument_that_is_wrong_is_refused(
    model: Path, act: Act, error: type[PluglmError], fragments: tuple[str, ...]
) -> None:
    before = listing(model.parent)
    refused(lambda: act(model), error, fragments)
    assert listing(model.parent) == before


def test_a_gpu_that_is_not_there_is_refused(model: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    refused(lambda: pluglm.load(model, device="cuda"), InputError, ("'cuda' is not there", "sees 0", 'device="cpu"'))


# Calls

Say = Callable[[pluglm.LanguageModel], object]


def generate(prompt: Any = (60, 17), **settings: Any) -> Say:
    return lambda lm: lm.generate(prompt, **settings)


def run(**arguments: Any) -> Say:
    return lambda lm: lm.model(**{"input_ids": torch.tensor([[5, 6, 7]]), **arguments})


CALLS: dict[str, tuple[Say, type[PluglmError], tuple[str, ...]]] = {
    "no prompts": (generate([]), InputError, ("the list is empty", "at least one prompt")),
    "prompt None": (generate(None), InputError, ("NoneType", "Pass a text")),
    "prompt is a number": (generate(7), InputError, ("int", "Pass a text")),
    "prompt is bytes": (generate(b"text"), InputError, ("bytes", "Pass a text")),
    "prompt is one message": (generate({"role": "user", "content": "Hi"}), InputError, ("dict", "list of messages")),
    "prompt of fractions": (generate([1.0, 2.5]), InputError, ("Pass a text", "token ids")),
    "prompt of fractions as a tensor": (generate(torch.tensor([1.5, 2.0])), InputError, ("Pass a text", "token ids")),
    "prompt of truth values": (generate([True, False]), InputError, ("Pass a text", "token ids")),
    "prompt of None and text": (generate(["a", None]), InputError, ("NoneType", "Pass a text")),
    "a scalar tensor": (generate(torch.tensor(5)), InputError, ("int", "Pass a text")),
    "id beyond the vocabulary": (generate([5, V]), InputError, ("token id 307", "vocabulary of 307", "another model")),
    "negative id": (generate([-1]), InputError, ("token id -1", "outside the vocabulary")),
    "text with half a character": (generate("a\ud800"), InputError, ("text", "To do")),
    "message without a role": (generate([{"content": "Hi"}]), InputError, ("message 0 lacks a role", "'role': 'user'")),
    "message without content": (
        generate([{"role": "user", "content": "a"}, {"role": "user"}]), InputError, ("message 1 lacks", "content")),
    "prompt as long as the context": (
        generate([5] * CONTEXT), ContextLengthError, ("192 tokens", "context holds 192", "Shorten the prompt")),
    "prompt and answer are too long": (
        generate([5] * 100, max_new_tokens=93), ContextLengthError, ("100 prompt tokens and 93", "at most 92")),
    "a great many new tokens": (generate(max_new_tokens=10**9), ContextLengthError, ("1000000000", "at most 190")),
    "max_new_tokens -1": (generate(max_new_tokens=-1), InputError, ("max_new_tokens=-1", "an integer >= 0")),
    "max_new_tokens 'a'": (generate(max_new_tokens="a"), InputError, ("max_new_tokens='a'", "an integer")),
    "max_new_tokens 2.5": (generate(max_new_tokens=2.5), InputError, ("max_new_tokens=2.5", "an integer")),
    "max_new_tokens True": (generate(max_new_tokens=True), InputError, ("max_new_tokens=True", "an integer")),
    "min above max": (generate(max_new_tokens=2, min_new_tokens=3), InputError, ("min_new_tokens=3", "max_new_tokens=2")),
    "max_length below the prompt": (generate(max_length=2), ContextLengthError, ("max_length=2", "max_new_tokens")),
    "temperature 0": (generate(temperature=0), InputError, ("temperature=0", "a number > 0")),
    "temperature -1": (generate(temperature=-1.0), InputError, ("temperature=-1.0", "a number > 0")),
    "temperature nan": (generate(temperature=float("nan")), InputError, ("temperature=nan", "a number > 0")),
    "temperature 'warm'": (generate(temperature="warm"), InputError, ("temperature='warm'", "a number")),
    "top_p 2": (generate(top_p=2), InputError, ("top_p=2", "from 0 to 1")),
    "top_p 0": (generate(top_p=0), InputError, ("top_p=0", "not 0")),
    "min_p -0.1": (generate(min_p=-0.1), InputError, ("min_p=-0.1", "from 0 to 1")),
    "top_k -5": (generate(top_k=-5), InputError, ("top_k=-5", "an integer >= 0")),
    "seed -1": (generate(temperature=1.0, seed=-1), InputError, ("seed=-1", "an integer")),
    "seeds for other rows": (generate([[5], [6]], temperature=1.0, seed=(1, 2, 3)), InputError, ("3 seeds for 2 rows", "Pass one")),
    "greedy and a temperature": (
        generate(do_sample=False, temperature=0.7), InputError, ("do_sample=False contradicts", "Leave out temperature")),
    "do_sample 'yes'": (generate(do_sample="yes"), InputError, ("do_sample='yes'", "True or False")),
    "several greedy sequences": (
        generate(num_return_sequences=2), PlanError, ("num_return_sequences=2", "sampling")),
    "no sequences": (generate(num_return_sequences=0), InputError, ("num_return_sequences=0", ">= 1")),
    "setting with a typo": (generate(max_new_token=3), PlanError, ("max_new_token", "max_new_tokens")),
    "setting of a search without beams": (generate(length_penalty=0.8), PlanError, ("length_penalty", "decoding")),
    "greedy by name with a temperature": (
        generate(decoding="greedy", temperature=0.7), PlanError, ("temperature", "greedy", "To do")),
    "decoding typo": (generate(decoding="gredy"), PluginNotFoundError, ("'gredy'", "Did you mean 'greedy'?")),
    "decoding is no text": (generate(decoding=3), InputError, ("decoding=3", "To do")),
    "settings as a mapping": (generate(generation_config={"top_k": 3}), InputError, ("generation_config is a dict", "pluglm.GenerationConfig")),
    "stop string is empty": (generate(stop_strings=[""]), InputError, ("stop string is empty", "Leave it out")),
    "stop string is a number": (generate(stop_strings=[3]), InputError, ("stop_strings=(3,)", "a text or several")),
    "end token beyond the vocabulary": (generate(eos_token_id=999), InputError, ("eos_token_id", "vocabulary of 307")),
    "pad token beyond the vocabulary": (
        generate([[5], [6, 7]], pad_token_id=999), InputError, ("pad_token_id=999", "vocabulary of 307")),
    "pad token is a text": (generate(pad_token_id="x"), InputError, ("pad_token_id='x'", "id of a token")),
    "pad token is True": (generate([[5], [6, 7]], pad_token_id=True), InputError, ("pad_token_id=True", "id of a token")),
    "bos token is a text": (generate(bos_token_id="x"), InputError, ("bos_token_id='x'", "id of a token")),
    "use_cache 'no'": (generate(use_cache="no"), InputError, ("use_cache='no'", "True or False")),
    "progress 3": (generate(progress=3), InputError, ("progress=3", "True or False")),
    "processor returns nothing": (
        generate(logits_processor=[lambda ids, s: None]), InputError, ("returned a NoneType", "(1, 307)", "To do")),
    "processor cuts the vocabulary": (
        generate(logits_processor=[lambda ids, s: s[:, :3]]), InputError, ("shape (1, 3)", "(1, 307)", "To do")),
    "placed processor returns nothing": (
        generate(logits_processor=[pluglm.contracts.Placed(lambda ids, s: None, before="top_k")]), InputError,
        ("a logits processor returned a NoneType", "To do")),
    "criterion returns one flag": (
        generate(stopping_criteria=[lambda ids, s: True]), InputError, ("returned a bool", "one flag a row", "torch.full")),
    "criterion of other rows": (
        generate(stopping_criteria=[lambda ids, s: torch.zeros(5)]), InputError, ("shape (5,)", "[1] bool")),
    "criterion of a search": (
        generate(num_beams=2, stopping_criteria=[lambda ids, s: None]), InputError, ("returned a NoneType", "torch.full")),
    "prefix function returns a number": (
        generate(prefix_allowed_tokens_fn=lambda row, ids: 5), InputError, ("returned 5", "0 to 306", "Return []")),
    "prefix function counts from the end": (
        generate(prefix_allowed_tokens_fn=lambda row, ids: [5, -1]), InputError, ("returned [5, -1]", "0 to 306")),
    "callable without a place for what was prepared": (
        generate(custom_generate=lambda model, input_ids: input_ids), PluglmError,
        ("takes no attention_mask", "**model_kwargs")),
    "callable without a prompt": (
        generate(custom_generate=lambda model, **rest: model), PluglmError, ("takes no input_ids", "To do")),
    "callable that needs more": (
        generate(custom_generate=lambda model, input_ids, own, **rest: input_ids), PluglmError,
        ("needs own, and it was not passed", "Pass own=")),
    "processor is none": (generate(logits_processor=3), InputError, ("logits_processor", "To do")),
    "stream of a batch": (lambda lm: lm.stream(["a", "b"]), InputError, ("one completion", "2 prompts", "stream_batch")),
    "stream of several samples": (
        lambda lm: lm.stream("a", temperature=1.0, num_return_sequences=2), InputError, ("one completion", "num_return_sequences", "To do")),
    "cache of another batch": (
        lambda lm: lm.generate([[5], [6]], past_key_values=lm.new_cache(batch_size=3)), InputError,
        ("3 rows", "prompt has 2", "select")),
    "cache that is none": (generate(past_key_values=[1, 2]), InputError, ("past_key_values", "new_cache")),
    "cache that holds the prompt already": (lambda lm: used_up(lm), InputError, ("no new token is left", "crop")),
    "cache given and switched off": (
        lambda lm: lm.generate([5], past_key_values=lm.new_cache(), use_cache=False), InputError,
        ("past_key_values", "use_cache=False", "Leave one of them out")),
    "quantize with a typo": (lambda lm: lm.quantize("torcha"), PluginNotFoundError, ("'torcha'", "Did you mean 'torchao'?")),
    "quantize auto": (lambda lm: lm.quantize(""), InputError, ("quantizer=''", "To do")),
    "model: unknown argument": (run(use_cach=True), InputError, ("no argument 'use_cach'", "Did you mean 'use_cache'?")),
    "model: nothing": (lambda lm: lm.model(), InputError, ("input_ids", "inputs_embeds")),
    "model: one dimension": (run(input_ids=torch.tensor([5, 6])), InputError, ("shape (2,)", "[B, T]", "input_ids[None]")),
    "model: fractions": (run(input_ids=torch.ones(1, 3)), InputError, ("float32", "integers [B, T]")),
    "model: a list": (run(input_ids=[[5, 6]]), InputError, ("input_ids", "tensor")),
    "model: ids beyond the vocabulary": (run(input_ids=torch.tensor([[V]])), InputError, ("307", "vocabulary")),
    "model: no tokens": (run(input_ids=torch.zeros(1, 0, dtype=torch.long)), InputError, ("shape (1, 0)", "no token to run")),
    "model: mask of another width": (run(attention_mask=torch.ones(1, 4)), InputError, ("attention_mask", "[1, 3]")),
    "model: keeps fewer than no logits": (run(logits_to_keep=-1), InputError, ("logits_to_keep=-1", "an integer >= 0")),
    "model: mask is a number": (run(attention_mask=3), InputError, ("attention_mask is a int", "torch.tensor")),
    "model: positions are a list": (run(position_ids=[0, 1, 2]), InputError, ("position_ids is a list", "torch.tensor")),
    "model: too long": (
        run(input_ids=torch.ones(1, CONTEXT + 1, dtype=torch.long)), ContextLengthError, ("193 tokens", "context of 192")),
}  # fmt: skip


def used_up(lm: pluglm.LanguageModel) -> object:
    cache = lm.new_cache()
    lm.complete([5, 6, 7], past_key_values=cache, max_new_tokens=2)
    return lm.complete([5, 6, 7], past_key_values=cache, max_new_tokens=2)


@pytest.mark.parametrize(("act", "error", "fragments"), CALLS.values(), ids=CALLS)
def test_a_call_that_is_wrong_is_refused_and_the_model_goes_on(
    lm: pluglm.LanguageModel, act: Say, error: type[PluglmError], fragments: tuple[str, ...]
) -> None:
    refused(lambda: act(lm), error, fragments)
    assert len(lm.complete([60, 17, 201], max_new_tokens=2).token_ids) == 2  # type: ignore[union-attr]


# Models without a tokenizer or a template


@pytest.fixture(scope="module")
def mute(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> pluglm.LanguageModel:
    """A model of token ids only, with a static cache."""
    return pluglm.load(write_model(tmp_path_factory.mktemp("mute") / "ids", tokenizer=False), cache="static")


MUTE: dict[str, tuple[Say, type[PluglmError], tuple[str, ...]]] = {
    "text": (generate("hello"), InputError, ("without a tokenizer", "Pass token ids", "tokenizer.json")),
    "messages": (generate([{"role": "user", "content": "Hi"}]), InputError, ("without a tokenizer", "tokenizer.json")),
    "stream": (lambda lm: lm.stream([5]), InputError, ("no text to stream", "complete()")),
    "stop strings": (generate([5], stop_strings=["a"]), InputError, ("no tokenizer", "eos_token_id")),
    "static cache without a capacity": (lambda lm: lm.new_cache(), InputError, ("must be told its capacity", "dynamic")),
    "static cache that is too small": (
        lambda lm: lm.generate([5, 6, 7], past_key_values=lm.new_cache(capacity=5), max_new_tokens=9), ContextLengthError,
        ("5", "To do")),
}  # fmt: skip


@pytest.mark.parametrize(("act", "error", "fragments"), MUTE.values(), ids=MUTE)
def test_a_model_without_a_tokenizer_says_what_it_lacks(
    mute: pluglm.LanguageModel, act: Say, error: type[PluglmError], fragments: tuple[str, ...]
) -> None:
    refused(lambda: act(mute), error, fragments)


def test_a_model_without_a_template_refuses_a_chat(tmp_path: Path, write_model: Callable[..., Path]) -> None:
    lm = pluglm.load(write_model(tmp_path / "base", template=False))
    refused(lambda: lm.generate([{"role": "user", "content": "Hi"}]), InputError, ("no chat template", "text instead"))
    assert lm.generate("Hi", max_new_tokens=2)


def test_naming_a_tokenizer_for_a_folder_without_one_is_refused(
    tmp_path: Path, write_model: Callable[..., Path]
) -> None:
    path = write_model(tmp_path / "ids", tokenizer=False)
    refused(lambda: pluglm.load(path, tokenizer="tokenizers"), PlanError, ("has no tokenizer.json", "To do"))


# Saving


def test_a_folder_with_other_things_in_it_is_not_replaced(lm: pluglm.LanguageModel, tmp_path: Path) -> None:
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.txt").write_text("once")
    before = listing(tmp_path)
    refused(lambda: lm.save(tmp_path / "thesis"), SaveError, ("is not replaced", "chapter.txt", "another folder"))
    (tmp_path / "thesis" / "config.json").write_text("{}")
    refused(lambda: lm.save(tmp_path / "thesis"), SaveError, ("is not replaced", "chapter.txt"))
    refused(lambda: lm.save(tmp_path / "thesis" / "chapter.txt"), SaveError, ("is not replaced", "it is a file"))
    assert listing(tmp_path) == {**before, "thesis/config.json": b"{}"}


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "over a model"])
def test_a_full_disk_leaves_what_was_there(
    lm: pluglm.LanguageModel, model: Path, there: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    import safetensors.torch

    before = listing(model.parent)
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    target = model if there else model.parent / "new"
    refused(lambda: lm.save(target), SaveError, ("Saving to", "is intact", "Free some space"))
    assert listing(model.parent) == before and sorted(p.name for p in model.parent.iterdir()) == ["model"]


def test_a_disk_that_fills_up_with_the_last_file_leaves_nothing(
    lm: pluglm.LanguageModel, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text = Path.write_text

    def full(self: Path, *arguments: Any, **more: Any) -> int:
        if self.name == "config.json":
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_text(self, *arguments, **more)

    before = listing(model.parent)
    monkeypatch.setattr(Path, "write_text", full)
    refused(lambda: lm.save(model), SaveError, ("is intact", "Free some space"))
    assert listing(model.parent) == before


def test_every_error_of_a_call_carries_its_argument(lm: pluglm.LanguageModel) -> None:
    cases: Mapping[str, Say] = {
        "temperature": generate(temperature=0), "prompt": generate([]), "top_p": generate(top_p=2),
        "past_key_values": CALLS["cache of another batch"][0],
    }  # fmt: skip
    for argument, act in cases.items():
        with pytest.raises(InputError) as caught:
            act(lm)
        assert caught.value.argument == argument
