"""A whole encoder-decoder, loaded from files: what is promised of decoders holds for it, with the prompt in the encoder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import pluglm
from pluglm.completions import Completion
from pluglm.errors import InputError, PlanError, UnsupportedRequestError

V, C, F, H, D = 307, 24, 40, 6, 10
START = 3
ROWS = [[60, 17, 201, 5, 99], [8], [40, 41, 42, 43, 44, 45, 46, 47, 48]]

WriteT5 = Callable[..., Path]


def config_of(**changed: Any) -> dict[str, Any]:
    said = {
        "model_type": "t5", "is_encoder_decoder": True, "vocab_size": V, "d_model": C, "d_ff": F, "d_kv": D,
        "num_heads": H, "num_layers": 2, "num_decoder_layers": 3, "relative_attention_num_buckets": 8,
        "relative_attention_max_distance": 20, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "decoder_start_token_id": START, "pad_token_id": 0, "eos_token_id": 1, **changed,
    }  # fmt: skip
    return {key: value for key, value in said.items() if value is not None}


def weights_of(seed: int = 8) -> dict[str, torch.Tensor]:
    """Random weights; control tokens and ids without a text never win."""
    draw = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int, gain: float = 2.0) -> torch.Tensor:
        return gain * torch.randn(rows, columns, generator=draw) / columns**0.5

    def norm() -> torch.Tensor:
        return 1 + 0.3 * torch.randn(C, generator=draw)

    def attention(name: str) -> dict[str, torch.Tensor]:
        sides = {"q": (H * D, C), "k": (H * D, C), "v": (H * D, C), "o": (C, H * D)}
        return {f"{name}.{side}.weight": matrix(*shape, 1.0 if side in "qk" else 2.0) for side, shape in sides.items()}

    weights = {"shared.weight": matrix(V, C, 2.0), "lm_head.weight": matrix(V, C, 5.0)}
    weights["lm_head.weight"][[*range(5), *range(290, V)]] = 0.0
    for stack, layers, place in (("encoder", 2, 1), ("decoder", 3, 2)):
        weights[f"{stack}.final_layer_norm.weight"] = norm()
        table = f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        weights[table] = torch.randn(8, H, generator=draw)
        for i in range(layers):
            block = f"{stack}.block.{i}.layer"
            weights |= attention(f"{block}.0.SelfAttention")
            if stack == "decoder":
                weights |= attention(f"{block}.1.EncDecAttention")
            weights |= {f"{block}.{n}.layer_norm.weight": norm() for n in range(place + 1)}
            ff = f"{block}.{place}.DenseReluDense"
            weights |= {f"{ff}.wi_{n}.weight": matrix(F, C, 1.0) for n in range(2)}
            weights[f"{ff}.wo.weight"] = matrix(C, F)
    return weights


@pytest.fixture(scope="module")
def write_t5(tokenizer_json: str) -> WriteT5:
    def write(folder: Path, generation: dict[str, Any] | None = None, **config: Any) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config_of(**config)))
        save_file(weights_of(), folder / "model.safetensors", {"format": "pt"})
        (folder / "tokenizer.json").write_text(tokenizer_json)
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(generation))
        return folder

    return write


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory, write_t5: WriteT5) -> Path:
    return write_t5(tmp_path_factory.mktemp("models") / "t5")


@pytest.fixture(scope="module")
def t5(t5_folder: Path) -> pluglm.LanguageModel:
    return pluglm.load(t5_folder)


def ids_of(done: Completion | list[Completion]) -> list[tuple[int, ...]]:
    return [c.token_ids for c in ([done] if isinstance(done, Completion) else done)]


def by_hand(lm: pluglm.LanguageModel, row: list[int], count: int, start: int = START) -> tuple[int, ...]:
    """Greedy tokens through the forward contract, one call a token."""
    ids, kept, new = torch.tensor([[start]]), None, []
    with torch.no_grad():
        for i in range(count):
            source = {"input_ids": torch.tensor([row])} if i == 0 else {}
            out = lm.model(**source, decoder_input_ids=ids, past_key_values=kept, use_cache=True)
            kept, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            new.append(int(ids))
    return tuple(new)


# What comes back


def test_a_prompt_goes_to_the_encoder_and_the_text_is_the_decoders(t5: pluglm.LanguageModel) -> None:
    done = t5.complete(ROWS[0], max_new_tokens=12)
    assert isinstance(done, Completion) and t5.tokenizer is not None
    assert done.token_ids == by_hand(t5, ROWS[0], 12)
    assert done.text == t5.tokenizer.decode(done.token_ids) == t5.generate(ROWS[0], max_new_tokens=12)
    assert (done.num_prompt_tokens, done.finish_reason) == (5, "length")
    assert len(set(done.token_ids)) > 3


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.1, "top_p": 0.9}], ids=["greedy", "sampling"])
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_a_ragged_batch_gives_each_row_what_it_gives_alone(
    t5: pluglm.LanguageModel, settings: dict[str, Any], use_cache: bool
) -> None:
    seeds = (11, 22, 33)
    more: dict[str, Any] = {"max_new_tokens": 20, **settings}
    together = t5.complete(ROWS, **more, use_cache=use_cache, **({"seed": seeds} if settings else {}))
    alone = [
        ids_of(t5.complete(row, **more, **({"seed": (seed,)} if settings else {})))[0]
        for row, seed in zip(ROWS, seeds, strict=True)
    ]
    assert ids_of(together) == alone
    assert len(set(alone)) == 3


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_several_sequences_of_each_prompt_keep_to_their_prompt(t5: pluglm.LanguageModel, use_cache: bool) -> None:
    """At a temperature near zero every copy is the greedy text of its own prompt."""
    done = t5.complete(
        ROWS, max_new_tokens=10, temperature=1e-4, num_return_sequences=2, seed=1, use_cache=use_cache
    )  # fmt: skip
    greedy = ids_of(t5.complete(ROWS, max_new_tokens=10))
    assert ids_of(done) == [ids for ids in greedy for _ in range(2)]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.2, "seed": 4}], ids=["greedy", "sampling"])
def test_the_pieces_of_a_stream_are_the_text_of_generate(t5: pluglm.LanguageModel, settings: dict[str, Any]) -> None:
    pieces = list(t5.stream("the cat", max_new_tokens=30, **settings))
    assert len(pieces) > 5
    assert "".join(pieces) == t5.generate("the cat", max_new_tokens=30, **settings)


def test_limits_count_the_decoders_tokens(t5: pluglm.LanguageModel) -> None:
    long = [(7 * i) % 280 + 5 for i in range(300)]
    free = ids_of(t5.complete(long, max_new_tokens=9))[0]
    assert len(free) == 9
    assert ids_of(t5.complete(long, max_length=10))[0] == free, "the start token is the decoder's prompt"
    free = ids_of(t5.complete(ROWS[0], max_new_tokens=9))[0]
    end = next(i for n, i in enumerate(free) if n >= 2 and i not in free[:n])
    ended = t5.complete(ROWS[0], max_new_tokens=9, eos_token_id=end)
    assert isinstance(ended, Completion)
    assert ended.token_ids == free[: free.index(end) + 1] and ended.finish_reason == "eos"


def test_a_repetition_penalty_is_about_the_decoders_tokens(t5: pluglm.LanguageModel) -> None:
    first = ids_of(t5.complete(ROWS[0], max_new_tokens=1))[0]
    again = ids_of(t5.complete([*ROWS[0]], max_new_tokens=1, repetition_penalty=50.0))[0]
    assert again == first
    texts = ids_of(t5.complete(ROWS[0], max_new_tokens=15, repetition_penalty=50.0))[0]
    assert len(set(texts)) == 15


def test_every_attention_and_cache_gives_the_same_tokens(t5_folder: Path, t5: pluglm.LanguageModel) -> None:
    expected = ids_of(t5.complete(ROWS, max_new_tokens=24))
    for attention in ("eager", "sdpa"):
        for cache in ("dynamic", "static"):
            other = pluglm.load(t5_folder, attention=attention, cache=cache)
            assert ids_of(other.complete(ROWS, max_new_tokens=24)) == expected


def test_packed_layers_and_saved_folders_work_as_everywhere(t5: pluglm.LanguageModel, tmp_path: Path) -> None:
    t5.save(tmp_path / "again")
    again = pluglm.load(tmp_path / "again")
    assert ids_of(again.complete(ROWS, max_new_tokens=12)) == ids_of(t5.complete(ROWS, max_new_tokens=12))
    attentions, feed_forwards = 2 + 3 + 3, 2 + 3
    assert again.quantize("torchao:int8") == 4 * attentions + 3 * feed_forwards, "all but the head"
    packed = ids_of(again.complete(ROWS, max_new_tokens=12))
    again.save(tmp_path / "packed")
    assert ids_of(pluglm.load(tmp_path / "packed").complete(ROWS, max_new_tokens=12)) == packed


# The start token


def test_the_start_token_is_the_calls_then_the_files(
    write_t5: WriteT5, tmp_path: Path, t5: pluglm.LanguageModel
) -> None:
    other = by_hand(t5, ROWS[0], 8, start=77)
    assert other != by_hand(t5, ROWS[0], 8)
    assert ids_of(t5.complete(ROWS[0], max_new_tokens=8, decoder_start_token_id=77))[0] == other
    by_file = pluglm.load(write_t5(tmp_path / "file", generation={"decoder_start_token_id": 77}))
    assert ids_of(by_file.complete(ROWS[0], max_new_tokens=8))[0] == other
    assert ids_of(by_file.complete(ROWS[0], max_new_tokens=8, decoder_start_token_id=START))[0] == by_hand(
        t5, ROWS[0], 8
    )


def test_without_a_start_token_a_call_must_name_one(write_t5: WriteT5, tmp_path: Path) -> None:
    lm = pluglm.load(write_t5(tmp_path / "silent", decoder_start_token_id=None))
    with pytest.raises(InputError) as caught:
        lm.generate(ROWS[0], max_new_tokens=3)
    assert caught.value.what == "nothing says which token this model's decoder begins with."
    assert caught.value.argument == "decoder_start_token_id" and "config.json" in caught.value.fix
    assert len(ids_of(lm.complete(ROWS[0], max_new_tokens=3, decoder_start_token_id=0))[0]) == 3


def test_a_decoder_alone_has_no_start_token_to_name(lm: pluglm.LanguageModel) -> None:
    with pytest.raises(PlanError, match="decoder_start_token_id"):
        lm.generate([7, 8], max_new_tokens=3, decoder_start_token_id=4)


# Caches


def test_a_cache_of_the_callers_is_used_once_and_again_after_a_reset(t5: pluglm.LanguageModel) -> None:
    cache = t5.new_cache()
    free = ids_of(t5.complete(ROWS[0], max_new_tokens=8))
    assert ids_of(t5.complete(ROWS[0], max_new_tokens=8, past_key_values=cache)) == free
    assert cache.length == 8
    with pytest.raises(InputError) as caught:
        t5.complete(ROWS[2], max_new_tokens=8, past_key_values=cache)
    assert caught.value.what.startswith("the given cache is in use: it holds 8 cells of a decoder")
    assert "nothing to continue" in caught.value.why and "reset()" in caught.value.fix
    assert caught.value.argument == "past_key_values"
    cache.crop(0)
    with pytest.raises(InputError, match="its encoder's input"):
        t5.complete(ROWS[2], max_new_tokens=8, past_key_values=cache)
    cache.reset()
    again = ids_of(t5.complete(ROWS[2], max_new_tokens=8, past_key_values=cache))
    assert again == ids_of(t5.complete(ROWS[2], max_new_tokens=8)) != free


def test_a_step_on_an_empty_cache_has_nothing_to_attend_to(t5: pluglm.LanguageModel) -> None:
    cache = t5.new_cache()
    with pytest.raises(InputError) as caught, torch.no_grad():
        t5.model.step(torch.tensor([[START]]), cache)
    assert caught.value.what.startswith("the decoder has nothing to attend to")
    assert cache.length == 0


def test_a_pass_that_fails_leaves_the_cache_as_it_was(
    t5: pluglm.LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = t5.new_cache()
    source, ids = torch.tensor(ROWS[:1]), torch.tensor([[START, 9]])
    last = t5.model.module.get_submodule("decoder.layers.2.mlp")
    with monkeypatch.context() as broken:
        broken.setattr(last, "forward", lambda x: 1 / 0)
        for model in (t5.model, t5.model.conditioned(source)):  # type: ignore[operator]
            named = {"input_ids": source, "decoder_input_ids": ids} if model is t5.model else {"input_ids": ids}
            with pytest.raises(ZeroDivisionError), torch.no_grad():
                model(**named, past_key_values=cache)
    assert cache.length == 0
    with torch.no_grad():
        again = t5.model(source, decoder_input_ids=ids, past_key_values=cache).logits
        assert torch.equal(again, t5.model(source, decoder_input_ids=ids, use_cache=True).logits)


# Refused


def test_half_precision_that_overflows_is_refused(t5_folder: Path) -> None:
    with pytest.raises(UnsupportedRequestError) as caught:
        pluglm.load(t5_folder, dtype="float16")
    assert caught.value.reasons == (
        "float16: T5 was trained in bfloat16, and its residual stream exceeds what float16 can hold",
    )
    assert 'dtype="bfloat16"' in caught.value.fix


def test_in_bfloat16_it_runs(t5_folder: Path) -> None:
    half = pluglm.load(t5_folder, dtype="bfloat16")
    assert half.model.dtype is torch.bfloat16
    done = half.complete(ROWS, max_new_tokens=6)
    assert ids_of(done) == ids_of(half.complete(ROWS, max_new_tokens=6, use_cache=False))
