"""The tables between the reference's words and pluglm's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pluglm_hf as hf
import pytest
import torch
from pluglm_hf.devices import device_of, dtype_of
from pluglm_hf.fields import DEFAULTS
from pluglm_hf.layouts import read_implementation
from pluglm_hf.loading import attention_of
from pluglm_hf.quantization import Quantization, read_quantization
from pluglm_hf.settings import merged, strategy_of

from pluglm.errors import InputError, PluglmError, UnsupportedRequestError


@pytest.mark.parametrize(
    ("said", "device"),
    [
        (None, "cpu"), ("auto", "auto"), ("balanced", "auto"), ("cuda", "cuda"), ("cuda:1", "cuda:1"), (0, "cuda:0"), (-1, "cpu"),
        (torch.device("cuda", 2), "cuda:2"), ({"": 0}, "cuda:0"), ({"model": "cpu", "lm_head": torch.device("cpu")}, "cpu"),
    ],
)  # fmt: skip
def test_device_maps(said: Any, device: str) -> None:
    assert device_of(said) == device


@pytest.mark.parametrize(
    ("new", "old", "dtype"),
    [
        (None, None, "auto"), ("auto", None, "auto"), (torch.bfloat16, None, "bfloat16"), (None, torch.half, "float16"),
        (None, "float32", "float32"), ("float", torch.float32, "float32"),
    ],
)  # fmt: skip
def test_dtypes(new: Any, old: Any, dtype: str) -> None:
    assert dtype_of(new, old) == dtype


@pytest.mark.parametrize(
    ("said", "attention"),
    [
        ((None,), "auto"), (("eager",), "eager"), (("sdpa",), "sdpa"), (("flash_attention_2",), "flash:2"),
        (("flash_attention_3",), "flash:3"), (("flex_attention",), "flex"), ((None, True), "flash:2"),
        (("flash_attention_2", True), "flash:2"), (({"": "sdpa"},), "sdpa"), (("paged",), "paged"),
    ],
)  # fmt: skip
def test_attention_implementations(said: tuple[Any, ...], attention: str) -> None:
    assert attention_of(*said) == attention


@pytest.mark.parametrize(
    ("config", "old", "wanted"),
    [
        (None, {}, None),
        (None, {"in_4bit": True}, Quantization("bitsandbytes:fp4", {"compute_dtype": "float32"}, ("head",))),
        (None, {"in_8bit": True}, Quantization("bitsandbytes:int8", {"threshold": 6.0}, ("head",))),
        (
            hf.BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                bnb_4bit_compute_dtype=torch.bfloat16,
            ), {},
            Quantization("bitsandbytes:nf4", {"compute_dtype": "bfloat16", "double_quant": True}, ("head",)),
        ),
        (hf.HqqConfig(nbits=3, group_size=32), {}, Quantization("hqq:int3", {"group_size": 32, "axis": 1}, ("head",))),
        (hf.TorchAoConfig("int8_weight_only"), {}, Quantization("torchao:int8", {}, ())),
        (hf.TorchAoConfig("int4_weight_only", group_size=64), {}, Quantization("torchao:int4", {"group_size": 64}, ())),
        ({"quant_method": "hqq", "nbits": 8, "skip_modules": None}, {},
         Quantization("hqq:int8", {"group_size": 64, "axis": 1}, ())),
    ],
)  # fmt: skip
def test_quantization_settings(config: Any, old: dict[str, bool], wanted: Quantization | None) -> None:
    assert read_quantization(config, **old) == wanted


def test_config_objects_of_torchao_mean_variants_with_options() -> None:
    torchao = pytest.importorskip("torchao.quantization")
    granularity = pytest.importorskip("torchao.quantization.granularity")
    said: list[tuple[Any, str, dict[str, Any]]] = [
        (torchao.Int8WeightOnlyConfig(), "int8", {"group_size": "row"}),
        (torchao.Int8DynamicActivationInt8WeightConfig(set_inductor_config=False), "int8-dynamic",
         {"group_size": "row", "inputs": "symmetric", "reduce_range": False}),
        (torchao.Int4WeightOnlyConfig(group_size=32, int4_choose_qparams_algorithm="hqq"), "int4",
         {"group_size": 32, "algorithm": "hqq"}),
        (torchao.Float8WeightOnlyConfig(weight_dtype=torch.float8_e5m2), "float8",
         {"group_size": "row", "format": "e5m2"}),
        (torchao.Float8DynamicActivationFloat8WeightConfig(granularity=granularity.PerRow()),
         "float8-dynamic", {"group_size": "row"}),
        (torchao.IntxWeightOnlyConfig(weight_dtype=torch.int3, granularity=granularity.PerGroup(64)), "intx",
         {"bits": 3, "group_size": 64, "mapping": "symmetric", "algorithm": "affine"}),
    ]  # fmt: skip
    for config, variant, options in said:
        wanted = Quantization(f"torchao:{variant}", options, ())
        assert read_quantization(hf.TorchAoConfig(config)) == wanted
    for config, message in (
        (torchao.IntxWeightOnlyConfig(scale_dtype=torch.float16), "scale_dtype.*\n.*torchao's default"),
        (torchao.Int4WeightOnlyConfig(group_size={}), "no word for it"),
        (torchao.FqnToConfig({}), "these types are known"),
    ):
        with pytest.raises(UnsupportedRequestError, match=message):
            hf.TorchAoConfig(config).quantization()
    with pytest.raises(InputError, match="a config object holds all of them"):
        hf.TorchAoConfig(torchao.Int8WeightOnlyConfig(), group_size=32).quantization()


def test_modules_to_skip_are_known_by_name() -> None:
    with pytest.raises(UnsupportedRequestError, match="model.layers.0.*\n.*lm_head.*\n.*quantizer_skip"):
        hf.HqqConfig(skip_modules=["model.layers.0"]).quantization()
    with pytest.raises(InputError, match="BitsAndBytesConfig has no argument 'load_in_4bits'.*\n.*\n.*'load_in_4bit'"):
        hf.BitsAndBytesConfig(load_in_4bits=True)
    assert repr(hf.HqqConfig(nbits=3)) == "HqqConfig(nbits=3)" and hf.HqqConfig().to_dict()["quant_method"] == "hqq"


@pytest.mark.parametrize(
    ("name", "config", "layout"),
    [
        ("dynamic", None, ("dynamic", {})), ("sliding_window", None, ("hybrid", {})), ("static", {"max_cache_len": 9}, ("static", {})),
        ("quantized", None, ("quantized", {"bits": 4, "group_size": 64, "residual": 128})),
        ("quantized", {"backend": "HQQ", "nbits": 2}, ("quantized:hqq", {"bits": 2, "group_size": 64, "residual": 128})),
        ("sink", {"window": 9}, ("sink", {"window": 9})),
    ],
)  # fmt: skip
def test_cache_implementations(name: str, config: Any, layout: tuple[str, dict[str, Any]]) -> None:
    assert read_implementation(name, config) == layout


@pytest.mark.parametrize(
    ("said", "strategy"),
    [
        ({}, "greedy"), ({"do_sample": True}, "sampling"), ({"num_beams": 2}, "beam"), ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive-search"),
        ({"num_beams": 2, "do_sample": True}, "beam-sampling"), ({"num_beams": 4, "num_beam_groups": 2}, "diverse-beam"),
        ({"dola_layers": "high"}, "dola"), ({"force_words_ids": [[3]], "num_beams": 2}, "constrained-beam"),
        ({"assistant_early_exit": 3}, "early-exit"), ({"prompt_lookup_num_tokens": 3}, "prompt-lookup"),
    ],
)  # fmt: skip
def test_fields_and_the_strategies_they_mean(said: dict[str, Any], strategy: str) -> None:
    call = merged(hf.GenerationConfig(), None, said)
    assert strategy_of(call, assisted=False) == strategy
    assert strategy_of(call, assisted=True) == "assisted"


def test_every_field_of_the_reference_is_known(transformers: Any) -> None:
    theirs = set(transformers.GenerationConfig().to_dict())
    assert theirs - {"transformers_version", "_from_model_config", "continuous_batching_config"} == set(DEFAULTS) - {
        "seed"
    }
    for name, value in transformers.GenerationConfig._get_default_generation_params().items():
        assert DEFAULTS[name] == value, name


def test_a_file_of_an_older_version_does_not_choose_the_cache() -> None:
    own = hf.GenerationConfig(cache_implementation="hybrid")
    assert merged(own, None, {})["cache_implementation"] is None
    assert merged(own, None, {"cache_implementation": "hybrid"})["cache_implementation"] == "hybrid"


def test_a_models_file_with_a_foreign_setting_is_refused_when_it_is_loaded(
    folders: dict[str, str], tmp_path: Path
) -> None:
    for file in Path(folders["llama"]).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "generation_config.json").write_text('{"chat_format": "raw"}')
    with pytest.raises(PluglmError, match="chat_format"):
        hf.AutoModelForCausalLM.from_pretrained(tmp_path)
