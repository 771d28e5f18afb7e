"""What cannot be honoured is refused by a typed error that says what would, before anything is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pluglm_hf as hf
import pytest
import torch

from pluglm.errors import InputError, PluglmError, UnsupportedRequestError

IDS = torch.tensor([[0, 5, 70]])

LOADING: list[tuple[dict[str, Any], str]] = [
    ({"trust_remote_code": True}, "no code is taken from a model's files.*\n.*pluglm vendor"),
    ({"device_map": {"a": "cpu", "b": "cuda:0"}}, "cpu, cuda:0; a model here is on one device"),
    ({"device_map": {"": "disk"}}, "device_map='disk' .*\n.*mapped from their files"),
    ({"device_map": "nowhere"}, "device_map='nowhere' names no device"),
    ({"max_memory": {0: "1GB"}}, "on one device"),
    ({"dtype": torch.float32, "torch_dtype": "bfloat16"}, "contradict each other"),
    ({"dtype": torch.int8}, "no floating-point dtype"),
    ({"dtype": {"text": "float32"}}, "a model here has one dtype"),
    ({"torch_dtypes": "auto"}, "no argument 'torch_dtypes'.*\n.*\n.*Did you mean 'torch_dtype'"),
    ({"attn_implementation": "kernels-community/flash"}, "not fetched from the Hub"),
    ({"attn_implementation": {"vision": "sdpa"}}, "no parts by that name"),
    ({"attn_implementation": "eager", "use_flash_attention_2": True}, "contradicts attn_implementation='eager'"),
    ({"attn_implementation": "sdpaa"}, "no installed plugin|no plugin|sdpaa"),
    ({"subfolder": "weights"}, "a model is a folder"),
    ({"force_download": True}, "kept by their digest"),
    ({"token": False}, "uses the token that is stored"),
    ({"revision": "v1"}, "is a folder, so revision='v1' means nothing"),
    ({"use_safetensors": False}, "mapped from safetensors"),
    ({"gguf_file": "a.gguf"}, "another format"),
    ({"ignore_mismatched_sizes": True}, "wrong shape is an error"),
    ({"load_in_8bit": True, "quantization_config": hf.HqqConfig()}, "beside quantization_config"),
    ({"quantization_config": hf.BitsAndBytesConfig()}, "name no width"),
    ({"quantization_config": hf.HqqConfig(nbits=5)}, "1, 2, 3, 4 or 8"),
    ({"quantization_config": hf.HqqConfig(view_as_float=True)}, "training library"),
    ({"quantization_config": hf.TorchAoConfig("autoquant")}, "of texts, int8_weight_only, int4_weight_only"),
    (
        {"quantization_config": hf.TorchAoConfig("int8_weight_only", group_size=64)},
        "int8_weight_only has no such setting",
    ),
    ({"quantization_config": hf.TorchAoConfig(8)}, "quant_type=8.* names no type"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quant_method 'gptq'"),
    ({"quantization_config": 4}, "quantization_config is a int"),
    ({"config": {"hidden_size": 7}}, "config.hidden_size=7 .*\n.*config.json says 24"),
    ({"generation_config": {"max_length": 3}}, "generation_config is a dict"),
]


@pytest.mark.parametrize(("arguments", "message"), LOADING, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_loading_refuses_what_it_cannot_honour(
    folders: dict[str, str], arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(PluglmError, match=message) as error:
        hf.AutoModelForCausalLM.from_pretrained(folders["llama"], **arguments)
    assert "To do:" in str(error.value)


CALLS: list[tuple[dict[str, Any], str]] = [
    ({"max_new_token": 3}, "no argument 'max_new_token'.*\n.*silence.*\n.*Did you mean 'max_new_tokens'"),
    ({"temperature": 0.5}, "temperature=0.5 .*\n.*only while tokens are drawn.*\n.*do_sample=True"),
    ({"length_penalty": 2.0}, "only by a search.*\n.*num_beams"),
    ({"output_scores": True}, "only sequences are returned.*\n.*return_dict_in_generate=True"),
    ({"output_attentions": True}, "do not keep their weights"),
    ({"num_return_sequences": 2}, "one sequence of a prompt.*\n.*do_sample=True or num_beams"),
    ({"cache_config": {"nbits": 4}}, "about a cache that is named"),
    ({"cache_implementation": "paged"}, 'pluglm.load\\(…, cache="paged"\\)'),
    ({"cache_implementation": "offloaded_static"}, "no fixed addresses"),
    ({"cache_implementation": "magic"}, "magic"),
    ({"cache_implementation": "quantized", "cache_config": {"bits": 4}}, "no argument 'bits'.*\n.*\n.*'nbits'"),
    ({"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}, "integers"),
    ({"cache_implementation": "quantized", "cache_config": {"axis_key": 1}}, "by channel, values by token"),
    ({"cache_implementation": "static", "past_key_values": hf.DynamicCache()}, "both name a cache"),
    ({"past_key_values": ((IDS, IDS),)}, "DynamicCache.from_legacy_cache"),
    ({"past_key_values": "cache"}, "past_key_values is a str, not a cache"),
    ({"compile_config": hf.CompileConfig()}, "planned when it is loaded"),
    ({"synced_gpus": True}, "in one process"),
    ({"trust_remote_code": True}, "pluglm vendor"),
    ({"assistant_model": "gpt2"}, "assistant_model is a str"),
    ({"assistant_tokenizer": "x"}, "tokenizer of its own folder"),
    ({"speculation_type": "dflash"}, "heads of the model"),
    ({"use_mtp": True}, "heads of the model"),
    ({"token_healing": True}, "lm.generate\\(text, token_healing=True\\)"),
    ({"low_memory": True}, "one by one"),
    ({"max_length": 2}, "max_length=2 leaves no room"),
    ({"max_new_tokens": 999}, "more than the model's context of 256"),
    ({"do_sample": "yes"}, "do_sample='yes' makes no sense"),
    ({"max_new_tokens": "3"}, "max_new_tokens='3' makes no sense: it must be an integer"),
    ({"num_beams": "3"}, "num_beams='3' makes no sense"),
    ({"pad_token_id": "x"}, "pad_token_id='x' makes no sense"),
    ({"use_cache": "no"}, "use_cache='no' makes no sense"),
    ({"max_time": "1"}, "max_time='1' makes no sense"),
    ({"input_ids": IDS[0]}, "input_ids has shape \\(3,\\); it must be \\[B, S\\].\n.*input_ids\\[None\\]"),
    ({"custom_generate": lambda model, input_ids: input_ids}, "takes no attention_mask.*\n.*\n.*model_kwargs"),
    ({"do_sample": True, "temperature": 0.0}, "temperature=0.0 makes no sense"),
    ({"inputs_embeds": torch.zeros(1, 2, 24), "input_ids": None}, "ids of what they continue"),
    ({"encoder_outputs": (IDS,)}, "of encoder-decoders"),
    ({"token_type_ids": IDS}, "no model here reads them"),
    ({"attention_mask": [1, 1, 1]}, "attention_mask is a list"),
    ({"stopping_criteria": [lambda ids, scores: None]}, "criterion returned a NoneType.*\n.*one flag a row"),
    (
        {"stopping_criteria": [lambda ids, scores: torch.zeros(5)]},
        "criterion returned a tensor of shape .5,.*\n.*one flag a row",
    ),
    ({"logits_processor": [3]}, "must be a list of callables"),
    ({"streamer": object()}, "no method put"),
    ({"custom_generate": "org/method"}, "pluglm vendor hub:org/method"),
    ({"generation_config": {"max_new_tokens": 2}}, "generation_config is a dict"),
    ({"generator": 7, "do_sample": True}, "generator is a int"),
    ({"stop_strings": [""]}, "a stop string is empty"),
]


@pytest.mark.parametrize(("arguments", "message"), CALLS, ids=lambda v: "-".join(v) if isinstance(v, dict) else "")
def test_generate_refuses_what_it_cannot_honour(llama: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(PluglmError, match=message):
        llama.generate(**{"input_ids": IDS, **arguments})


METHODS: list[tuple[Callable[[Any], Any], str]] = [
    (lambda m: m.to(torch.float16), "to=torch.float16 .*\n.*read as torch.float32.*\n.*from_pretrained"),
    (lambda m: m.half(), "read as torch.float32"),
    (lambda m: m.train(), "for inference"),
    (lambda m: m.resize_token_embeddings(400), "trained with 336 tokens.*\n.*tokenizer.pad_token"),
    (lambda m: m.set_attn_implementation("eager"), "from_pretrained"),
    (lambda m: m.push_to_hub("me/model"), "writes to no other machine"),
    (lambda m: m.generate_batch([[1]]), "an engine's work"),
    (lambda m: m.save_pretrained("x", safe_serialization=False), "folder of safetensors"),
    (lambda m: m(IDS, labels=IDS[:, :2]), "labels have shape \\(1, 2\\)"),
    (lambda m: m(IDS, output_attentions=True), "do not keep their weights"),
    (lambda m: m(IDS, maks=IDS), "maks"),
    (lambda m: hf.AutoModelForCausalLM.from_pretrained(3), "3 names no model.*\n.*Hub"),  # type: ignore[arg-type]
    (lambda m: m.generate([[0, 5]]), "input_ids is a list, not a tensor"),
    (lambda m: m.generate(IDS, input_ids=IDS), "both hold the prompt"),
]


@pytest.mark.parametrize(("method", "message"), METHODS)
def test_a_model_refuses_what_it_cannot_do(llama: Any, method: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(PluglmError, match=message):
        method(llama)


def test_an_embedding_of_the_same_size_is_no_resize(llama: Any) -> None:
    assert llama.resize_token_embeddings(336) is llama.get_input_embeddings()
    assert llama.train(False) is llama.float() is llama.cpu()


TOKENIZING: list[tuple[Callable[[Any], Any], str]] = [
    (lambda t: t.decode("x"), "token_ids is a str, not ids.*\n.*list of ids"),
    (lambda t: t.decode(None), "token_ids is a NoneType, not ids"),
    (lambda t: t.batch_decode(3), "sequences is a int, not rows of ids.*\n.*list of rows"),
    (lambda t: hf.DynamicCache(3), "ddp_cache_data is a int.*\n.*\n.*config=…"),
    (lambda t: t(["a", "b c d e"], return_tensors="pt"), "different lengths are no tensor.*\n.*\n.*padding=True"),
    (lambda t: t("a", return_tensors="np"), 'Pass "pt" or None'),
    (lambda t: t("a", truncation=True, max_length=-1), "max_length=-1 makes no sense"),
    (lambda t: t("a", padding="wide"), "padding='wide' makes no sense"),
    (lambda t: t("a", truncation="both"), "truncation='both' makes no sense"),
    (lambda t: t("a", max_length=4), "max_length=4 is read only with truncation"),
    (lambda t: t("a", padding_side="top"), "padding_side='top' makes no sense"),
    (lambda t: t([["a", "b"]]), "text is a list"),
    (lambda t: t("a", return_token_type_ids=True), "no model here reads them"),
    (lambda t: t.add_special_tokens({"pad_token": "[PAD]"}), "no token of this tokenizer.*\n.*new row"),
    (lambda t: t.add_special_tokens({"cls_token": "<|eos|>"}), "no other role"),
    (lambda t: t.add_tokens(["new"]), "new row of the model's embedding"),
    (lambda t: t.decode([5], clean_up_tokenization_spaces=True), "no longer be what was encoded"),
    (lambda t: t.apply_chat_template([{"role": "user", "content": "a"}], chat_template="x"), "chat_template.jinja"),
    (lambda t: t.apply_chat_template([{"role": "user", "content": "a"}], continue_final_message=True), "as a whole"),
    (lambda t: t.apply_chat_template([{"role": "user", "content": "<|eos|>"}], tokenize=False), "other tokens"),
    (lambda t: t.sepp_token, "no 'sepp_token'"),
]


@pytest.mark.parametrize(("method", "message"), TOKENIZING)
def test_a_tokenizer_refuses_what_it_cannot_do(tokenizer: Any, method: Callable[[Any], Any], message: str) -> None:
    with pytest.raises((PluglmError, AttributeError), match=message):
        method(tokenizer)


@pytest.mark.parametrize(
    ("door", "message"),
    [
        (lambda f: hf.AutoTokenizer.from_pretrained(f["llama"], use_fast=False), "the fast library"),
        (lambda f: hf.AutoTokenizer.from_pretrained(f["llama"], trust_remote_code=True), "pluglm vendor"),
        (lambda f: hf.AutoTokenizer.from_pretrained(f["llama"], paddingside="left"), "Did you mean 'padding_side'"),
        (lambda f: hf.AutoConfig.from_pretrained(f["llama"], dtype="auto"), "no argument 'dtype'"),
        (
            lambda f: hf.AutoModelForCausalLM.from_pretrained(f["t5"]),
            "t5 is an encoder-decoder.*\n.*AutoModelForSeq2SeqLM",
        ),
        (
            lambda f: hf.AutoModelForSeq2SeqLM.from_pretrained(f["llama"]),
            "decoder-only model.*\n.*AutoModelForCausalLM",
        ),
        (lambda f: hf.AutoModelForCausalLM.from_pretrained(f["llama"], "x"), "one positional argument"),
        (lambda f: hf.AutoModelForCausalLM(), "has no instances.*\n.*from_pretrained"),
        (lambda f: hf.AutoModelForCausalLM.from_config({}), "random weights"),
        (lambda f: hf.AutoModelForCausalLM.from_pretrained("org/name", cache_dir="x"), "HF_HUB_CACHE"),
        (lambda f: hf.pipeline("fill-mask", model=f["llama"]), "runs language models"),
        (lambda f: hf.pipeline("text-generation"), "no model was named"),
    ],
)
def test_a_door_refuses_what_is_not_behind_it(
    folders: dict[str, str], door: Callable[[dict[str, str]], Any], message: str
) -> None:
    with pytest.raises(PluglmError, match=message):
        door(folders)


def test_pipelines_refuse_what_they_cannot_answer(llama: Any, tokenizer: Any) -> None:
    generator = hf.pipeline("text-generation", model=llama, tokenizer=tokenizer)
    with pytest.raises(UnsupportedRequestError, match="return_tensors=True .*\n.*text for text"):
        generator("a", return_tensors=True)
    with pytest.raises(UnsupportedRequestError, match="ends with an answer"):
        generator([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])
    with pytest.raises(InputError, match="a prompt cannot be made of int"):
        generator(3)


def test_a_folder_without_a_pad_token_says_how_to_get_one(folders: dict[str, str]) -> None:
    tokenizer = hf.AutoTokenizer.from_pretrained(folders["llama"])
    tokenizer.pad_token = None
    with pytest.raises(InputError, match="no token to pad with.*\n.*\n.*tokenizer.pad_token = tokenizer.eos_token"):
        tokenizer(["a", "b c"], padding=True)


def test_an_unknown_name_of_the_package_is_refused_with_those_that_exist() -> None:
    with pytest.raises(AttributeError, match="no attribute 'AutoModel'; public names: .*AutoModelForCausalLM"):
        _ = hf.AutoModel
