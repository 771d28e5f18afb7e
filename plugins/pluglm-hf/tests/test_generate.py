"""What has no counterpart in the reference, or none that could be compared: draws, strategies, settings, streams."""

from __future__ import annotations

import asyncio
import json
import threading
from pathlib import Path
from typing import Any

import pluglm_hf as hf
import pytest
import torch

from pluglm.contracts import DecodingRequest
from pluglm.errors import ConfigError, InputError, ModelNotFoundError, PluginNotFoundError, UnsupportedRequestError

IDS = torch.tensor([[0, 5, 70, 71, 9]])


# Draws


def test_torchs_seed_repeats_a_draw_and_so_do_a_generator_and_a_seed(llama: Any) -> None:
    def drawn(**said: Any) -> Any:
        return llama.generate(IDS, do_sample=True, max_new_tokens=8, num_return_sequences=3, **said).tolist()

    torch.manual_seed(4)
    first, second = drawn(), drawn()
    hf.set_seed(4)
    assert drawn() == first != second
    generator = torch.Generator().manual_seed(4)
    with_generator = drawn(generator=generator)
    assert drawn(generator=torch.Generator().manual_seed(4)) == with_generator != drawn(generator=generator)
    assert drawn(seed=9) == drawn(seed=9) != drawn(seed=10)
    with pytest.raises(InputError, match="both say how to draw"):
        drawn(seed=9, generator=generator)


def test_fifty_tokens_stay_unless_top_k_is_said(llama: Any) -> None:
    seen = llama.generate(IDS, do_sample=True, seed=1, max_new_tokens=1, num_return_sequences=400, temperature=9.0)[
        :, -1
    ]
    assert len(set(seen.tolist())) <= 50
    seen = llama.generate(
        IDS, do_sample=True, seed=1, max_new_tokens=1, num_return_sequences=400, temperature=9.0, top_k=None
    )[:, -1]
    assert len(set(seen.tolist())) > 80


# Strategies


@pytest.mark.parametrize(
    ("said", "decoding"),
    [
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 0.7}, "diverse-beam"),
        ({"num_beams": 4, "do_sample": True, "seed": 3}, "beam-sampling"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive-search"), ({"dola_layers": "low"}, "dola"),
        ({"num_beams": 3, "force_words_ids": [[44, 45]]}, "constrained-beam"), ({"assistant_early_exit": 1}, "early-exit"),
    ],
)  # fmt: skip
def test_fields_choose_the_strategy_that_means_them(llama: Any, said: dict[str, Any], decoding: str) -> None:
    lm = llama.language_model
    try:
        strategy = lm.strategy(decoding)
    except PluginNotFoundError:
        pytest.skip(f"{decoding} is not installed")
    made = llama.generate(IDS, max_new_tokens=6, **said)
    settings = {k: v for k, v in said.items() if k != "do_sample"}
    if said.get("do_sample"):
        settings.update(temperature=1.0, top_k=50)
    own = lm.complete(IDS[0].tolist(), max_new_tokens=6, decoding=strategy.name, **settings)
    assert made[0, 5:].tolist() == list(own.token_ids)


def test_a_strategy_of_pluglm_can_be_named(llama: Any) -> None:
    assert llama.generate(IDS, decoding="prompt-lookup", max_new_tokens=6).tolist() == llama.generate(
        IDS, max_new_tokens=6
    ).tolist()  # fmt: skip


def test_assistants_and_look_ups_serve_several_rows(llama: Any, tokenizer: Any, folders: dict[str, str]) -> None:
    draft = hf.AutoModelForCausalLM.from_pretrained(folders["draft"])
    inputs = tokenizer(["a b a b a b", "hello"], padding=True, return_tensors="pt")
    plain = llama.generate(**inputs, max_new_tokens=8).tolist()
    assert llama.generate(**inputs, max_new_tokens=8, assistant_model=draft, num_assistant_tokens=3).tolist() == plain
    assert (
        llama.generate(**inputs, max_new_tokens=8, prompt_lookup_num_tokens=2, max_matching_ngram_size=3).tolist()
        == plain
    )


# Settings


def test_a_call_wins_over_its_configuration_which_wins_over_the_models(folders: dict[str, str]) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folders["llama"], pad_token_id=3)
    assert model.generation_config.pad_token_id == 3 and model.generation_config.eos_token_id == 1
    model.generation_config.max_new_tokens = 2
    assert model.generate(IDS).shape[1] == 7
    config = hf.GenerationConfig(max_new_tokens=3)
    assert model.generate(IDS, generation_config=config).shape[1] == 8
    assert model.generate(IDS, generation_config=config, max_new_tokens=4).shape[1] == 9
    assert model.generate(IDS, max_length=6).shape[1] == 6


def test_nothing_said_means_twenty_tokens_or_what_the_context_holds(llama: Any) -> None:
    assert llama.generate(IDS).shape[1] == 25
    assert llama.generate(torch.full((1, 250), 5)).shape[1] == 256


def test_a_configuration_and_its_file(tmp_path: Path) -> None:
    config = hf.GenerationConfig(max_new_tokens=5, eos_token_id=[1, 2], stop_strings=["a"], do_sample=True)
    config.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    assert hf.GenerationConfig.from_pretrained(tmp_path) == config
    changed = hf.GenerationConfig.from_pretrained(tmp_path, max_new_tokens=6)
    assert changed.max_new_tokens == 6 and changed != config
    assert json.loads(config.to_json_string()) == config.to_diff_dict()
    assert config.update(temperature=0.5, model_input=3) == {"model_input": 3} and config.temperature == 0.5
    config.update(defaults_only=True, temperature=0.9, top_p=0.8)
    assert (config.temperature, config.top_p) == (0.5, 0.8)
    made, unused = hf.GenerationConfig.from_dict({"top_k": 3}, return_unused_kwargs=True, top_p=0.5, other=1)
    assert (made.top_k, made.top_p, unused) == (3, 0.5, {"other": 1})
    assert hf.GenerationConfig.from_model_config({"eos_token_id": 7, "hidden_size": 3}).eos_token_id == 7
    assert '"top_k": 3' in repr(made) and made.to_dict()["top_p"] == 0.5


def test_a_setting_that_nothing_reads_is_refused_wherever_it_is_said(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no argument 'max_new_token'.*\n.*\n.*'max_new_tokens'"):
        hf.GenerationConfig(max_new_token=5)
    with pytest.raises(InputError, match="no argument 'tempreature'"):
        hf.GenerationConfig().tempreature = 0.5
    with pytest.raises(InputError, match="no argument 'n_sigma'"):
        hf.GenerationConfig.from_dict({}, n_sigma=1.0)
    with pytest.raises(InputError, match="compile_config is a dict"):
        hf.GenerationConfig(compile_config={})
    with pytest.raises(UnsupportedRequestError, match="continuous_batching_config=1 .*\n.*an engine's work"):
        hf.GenerationConfig(continuous_batching_config=1)
    with pytest.raises(UnsupportedRequestError, match="allow_custom_entries=True cannot be honoured"):
        hf.GenerationConfig().update(allow_custom_entries=True)
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ModelNotFoundError, match="generation_config.json.*does not exist.*\n.*\n.*from_model_config"):
        hf.GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"n_sigma": 1.0}')
    with pytest.raises(ConfigError, match="holds 'n_sigma', which is no generation field"):
        hf.GenerationConfig.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("[]")
    with pytest.raises(ConfigError, match="is not a JSON object"):
        hf.GenerationConfig.from_pretrained(tmp_path)


# Streams


class Noted(hf.BaseStreamer):
    def __init__(self) -> None:
        self.told: list[Any] = []

    def put(self, value: Any) -> None:
        self.told.append(value.tolist())

    def end(self) -> None:
        self.told.append("end")


def test_a_streamer_of_ones_own_is_told_the_prompt_each_token_and_the_end_once(llama: Any) -> None:
    noted = Noted()
    made = llama.generate(IDS, streamer=noted, max_new_tokens=4)
    assert noted.told == [IDS.tolist(), *[[token] for token in made[0, 5:].tolist()], "end"]


def test_half_characters_are_never_streamed(tokenizer: Any) -> None:
    streamer = hf.TextIteratorStreamer(tokenizer, skip_prompt=True)
    ids = tokenizer.encode("é🙂日", add_special_tokens=False)
    streamer.put(torch.tensor([[0]]))
    for token in ids:
        streamer.put(torch.tensor([token]))
    streamer.end()
    pieces = list(streamer)
    assert "".join(pieces) == "é🙂日" and not any("\ufffd" in piece for piece in pieces) and len(ids) > 3


def test_a_streamer_of_text_carries_one_row(llama: Any, tokenizer: Any) -> None:
    streamer = hf.TextIteratorStreamer(tokenizer, timeout=5)
    with pytest.raises(InputError, match="carries one row, this call has 2.*\n.*\n.*stream_batch"):
        llama.generate(IDS.repeat(2, 1), streamer=streamer, max_new_tokens=3)


def test_a_failing_call_ends_its_stream(llama: Any, tokenizer: Any) -> None:
    for wrong in ({"prefill_chunk_size": 0}, {"max_new_token": 3}):
        streamer = hf.TextIteratorStreamer(tokenizer, timeout=5)
        with pytest.raises(InputError, match=next(iter(wrong))):
            llama.generate(IDS, streamer=streamer, **wrong)
        assert "".join(streamer) in ("", tokenizer.decode(IDS[0]))


def test_an_asynchronous_stream(llama: Any, tokenizer: Any) -> None:
    async def read() -> str:
        streamer = hf.AsyncTextIteratorStreamer(tokenizer, skip_prompt=True, timeout=30)
        settings = {"input_ids": IDS, "streamer": streamer, "max_new_tokens": 6}
        thread = threading.Thread(target=llama.generate, kwargs=settings)
        thread.start()
        pieces = [piece async for piece in streamer]
        thread.join()
        return "".join(pieces)

    made = llama.generate(IDS, max_new_tokens=6)
    assert asyncio.run(read()) == tokenizer.decode(made[0, 5:])


# The rest of a model


def test_a_model_is_saved_and_read_back(llama: Any, tokenizer: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "tokens")
    again = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.generate(IDS, max_new_tokens=5).tolist() == llama.generate(IDS, max_new_tokens=5).tolist()
    own = hf.AutoTokenizer.from_pretrained(tmp_path / "tokens", pad_token="<|eos|>", padding_side="right")
    assert (own.pad_token_id, own.padding_side) == (1, "right")
    own.save_pretrained(tmp_path / "other")
    assert hf.AutoTokenizer.from_pretrained(tmp_path / "other").pad_token == "<|eos|>"


def test_a_configuration_is_read_without_weights(folders: dict[str, str], llama: Any, tmp_path: Path) -> None:
    config = hf.AutoConfig.from_pretrained(folders["llama"])
    assert (config.num_key_value_heads, config.vocab_size, config.is_encoder_decoder) == (3, 336, False)
    assert config.get_text_config() is config and "vocab_size" in config and config.get("none", 4) == 4
    again = hf.AutoModelForCausalLM.from_pretrained(folders["llama"], config=config)
    assert again.config.hidden_size == llama.config.hidden_size == 24
    with pytest.raises(AttributeError, match="config.json has no 'n_embd'; it has"):
        _ = config.n_embd
    config.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["head_dim"] == 8


def test_packed_weights(folders: dict[str, str]) -> None:
    pytest.importorskip("torchao")
    model = hf.AutoModelForCausalLM.from_pretrained(
        folders["llama"], quantization_config=hf.TorchAoConfig("int8_weight_only")
    )
    assert model.language_model.plan["quantizer"].variant == "int8"
    assert model.generate(IDS, max_new_tokens=3).shape == (1, 8)


def test_pipelines_of_both_kinds(folders: dict[str, str]) -> None:
    named = hf.pipeline("text-generation", model=folders["llama"], max_new_tokens=3, do_sample=False)
    assert named("hello")[0]["generated_text"].startswith("hello")
    assert len(named(["hello", "a", "b"], batch_size=2)) == 3
    seq2seq = hf.pipeline("text2text-generation", model=folders["t5"], max_new_tokens=3)
    assert list(seq2seq("hello")[0]) == ["generated_text"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_model_moves_to_a_card(folders: dict[str, str]) -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(folders["llama"])
    on_cpu = model.generate(IDS, max_new_tokens=8)
    assert model.to("cuda") is model and model.device.type == "cuda"
    assert model.generate(IDS, max_new_tokens=8).cpu().tolist() == on_cpu.tolist()


# Methods of the Hub, and what a call takes besides


def test_a_vendored_method_by_name_returns_what_it_returns(llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from pluglm_hf.recipes.loading import load_recipe
    from pluglm_hf.recipes.strategy import recipe_strategy

    code = b"""
import torch
def generate(model, input_ids, generation_config=None, left=1, **kwargs):
    logits = model(input_ids).logits[:, -1]
    return {"best": logits.argmax(-1).tolist(), "left": left, "new": generation_config.max_new_tokens}
"""
    recipe = load_recipe({"custom_generate/generate.py": code}, "best")
    request = DecodingRequest(336, "cpu", None)
    strategies = llama.language_model._strategies
    monkeypatch.setattr(strategies, "of", lambda wanted, fields: recipe_strategy(recipe, request))
    expected = llama.core(IDS).logits[:, -1].argmax(-1).tolist()
    for prompt in ({"input_ids": IDS}, {"inputs": IDS}, {"inputs": hf.BatchEncoding({"input_ids": IDS})}):
        made = llama.generate(**prompt, custom_generate="best", left=3, max_new_tokens=7)
        assert made == {"best": expected, "left": 3, "new": 7}
    with pytest.raises(UnsupportedRequestError, match="looked at when it was installed"):
        llama.generate(IDS, custom_generate="best", trust_remote_code=True)


def test_a_strategy_of_pluglm_is_a_custom_method_too(llama: Any, t5: Any) -> None:
    plain = llama.generate(IDS, max_new_tokens=5)
    assert llama.generate(IDS, custom_generate="prompt-lookup", max_new_tokens=5).tolist() == plain.tolist()
    with pytest.raises(UnsupportedRequestError, match="decoder-only models"):
        t5.generate(IDS, custom_generate=lambda model, input_ids: input_ids)


def test_what_a_tokenizer_returned_is_a_prompt_unpacked_or_not(llama: Any, tokenizer: Any) -> None:
    inputs = tokenizer(["hello", "a b c"], padding=True, return_tensors="pt")
    assert llama.generate(inputs, max_new_tokens=4).tolist() == llama.generate(**inputs, max_new_tokens=4).tolist()
    assert llama.generate(max_new_tokens=2).shape == (1, 3)  # no prompt: BOS


def test_time_and_criteria_that_speak_for_all_rows_end_a_call(llama: Any) -> None:
    both = IDS.repeat(2, 1)
    assert llama.generate(both, max_time=1e-9, max_new_tokens=9).shape == (2, 6)
    criteria = [lambda ids, scores: ids.shape[1] >= 8]
    assert llama.generate(both, stopping_criteria=criteria, max_new_tokens=9).shape == (2, 8)


def test_padding_is_hidden_where_nobody_says_so(llama: Any) -> None:
    padded = torch.cat((torch.full((1, 3), 2), IDS), dim=1)
    assert (
        llama.generate(padded, max_new_tokens=5)[:, 8:].tolist()
        == llama.generate(IDS, max_new_tokens=5)[:, 5:].tolist()
    )


def test_stop_strings_of_a_folder_without_a_tokenizer_need_one(
    folders: dict[str, str], tokenizer: Any, tmp_path: Path
) -> None:
    for name in ("config.json", "generation_config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((Path(folders["llama"]) / name).read_bytes())
    model = hf.AutoModelForCausalLM.from_pretrained(tmp_path)
    long = model.generate(IDS, max_new_tokens=30)[0, 5:].tolist()
    stop = next(text for i, text in enumerate(map(tokenizer.decode, long)) if i > 2 and text.isascii() and text.strip())
    with pytest.raises(InputError, match="stop_strings need a tokenizer.*\n.*\n.*Pass tokenizer=…"):
        model.generate(IDS, stop_strings=stop)
    made = model.generate(IDS, stop_strings=stop, tokenizer=tokenizer, max_new_tokens=30)[0, 5:].tolist()
    assert made == long[: len(made)] and stop in tokenizer.decode(made) and stop not in tokenizer.decode(made[:-1])


def test_an_encoder_decoder_refuses_what_only_decoders_have(t5: Any) -> None:
    with pytest.raises(UnsupportedRequestError, match="counts positions itself"):
        t5.generate(IDS, position_ids=torch.arange(5)[None])
    with pytest.raises(InputError, match="encoder_repetition_penalty needs the encoder's input"):
        t5.generate(encoder_outputs=t5.get_encoder()(IDS), encoder_repetition_penalty=1.3)
    with pytest.raises(InputError, match="there is no prompt"):
        t5.generate()
