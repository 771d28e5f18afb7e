"""Whole models: packed while loading or afterwards, saved, loaded packed; and files that Transformers wrote."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pluglm
from pluglm import CheckpointError, ConfigError, PlanError, UnsupportedRequestError
from pluglm.contracts import GroupedLinear

# Pairwise different: hidden, queries, keys, feed-forward; vocabulary. Groups of 32 everywhere.
C, Q, K, F, V, LAYERS = 64, 128, 32, 96, 48, 1
IDS = torch.tensor([[1, 7, 3, 22, 39, 5, 5, 0, 14]])
CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": C, "intermediate_size": F,
    "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": K, "vocab_size": V,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "attention_bias": True, "mlp_bias": False, "tie_word_embeddings": False, "torch_dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
NAMES = {"self_attn.k_proj": "attn.k", "mlp.up_proj": "mlp.up"}
#: Variant and options of what runs on a CPU.
RUNS: list[tuple[str, dict[str, Any]]] = [
    ("int8", {}), ("int8-dynamic", {}), ("int4", {"group_size": 32}), ("intx", {"bits": 6}), ("intx-dynamic", {}),
    ("float8", {}), ("nvfp4-weights", {}),
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with biases in its attention. Tests only read it."""
    torch.manual_seed(1)
    sizes = {"self_attn.q_proj": (Q, C), "self_attn.k_proj": (K, C), "self_attn.v_proj": (K, C),
             "self_attn.o_proj": (C, Q), "mlp.gate_proj": (F, C), "mlp.up_proj": (F, C), "mlp.down_proj": (C, F)}  # fmt: skip
    tensors = {"model.embed_tokens.weight": torch.randn(V, C), "lm_head.weight": torch.randn(V, C) * 0.2}
    tensors["model.norm.weight"] = torch.rand(C) + 0.5
    for i in range(LAYERS):
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{i}.{norm}.weight"] = torch.rand(C) + 0.5
        for name, (rows, columns) in sizes.items():
            tensors[f"model.layers.{i}.{name}.weight"] = torch.randn(rows, columns) * columns**-0.5
            if "attn" in name:
                tensors[f"model.layers.{i}.{name}.bias"] = torch.randn(rows) * 0.3
    path = tmp_path_factory.mktemp("models") / "plain"
    path.mkdir()
    (path / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def load(path: Path, **parts: Any) -> Any:
    given = {"dtype": "float32", "device": "cpu", "attention": "eager", "cache": "dynamic", "decoding": "greedy",
             "executor": "executor/eager"}  # fmt: skip
    return pluglm.load(path, **{**given, **parts})


def logits(lm: Any) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = lm.model(IDS).logits
    return found


@pytest.mark.parametrize(("variant", "options"), RUNS, ids=lambda v: v if isinstance(v, str) else "")
def test_a_model_packed_while_loading_or_after_is_saved_and_loaded_packed(
    variant: str, options: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    parts: dict[str, Any] = {"quantizer": f"torchao:{variant}"}
    plain, reading = load(folder), load(folder, **parts, **({"options": {"quantizer": options}} if options else {}))
    want, got = logits(plain), logits(reading)
    assert plain.quantize(f"torchao:{variant}", options=options) == 7 * LAYERS
    assert torch.equal(logits(plain), got)
    assert 0 < float((got - want).abs().max()) < 0.5 * float(want.abs().max())
    reading.save(tmp_path / "packed")
    held = load_file(tmp_path / "packed" / "model.safetensors")
    assert "lm_head.weight" in held and "model.layers.0.self_attn.q_proj.weight" not in held
    packed = load(tmp_path / "packed")
    assert torch.equal(logits(packed), got)
    packed.save(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == held.keys()
    assert torch.equal(logits(load(tmp_path / "again")), got)


def test_the_head_is_packed_on_demand_and_loaded_again(folder: Path, tmp_path: Path) -> None:
    lm = load(folder, quantizer="torchao:int8", options={"quantizer": {"head": True}})
    assert isinstance(lm.model.module.get_submodule("head"), GroupedLinear)
    lm.save(tmp_path / "packed")
    assert "lm_head._weight_qdata" in load_file(tmp_path / "packed" / "model.safetensors")
    assert torch.equal(logits(load(tmp_path / "packed")), logits(lm))
    assert load(folder).quantize("torchao", options={"head": True}) == 7 * LAYERS + 1


def test_an_option_is_refused_when_a_model_is_loaded_with_it(folder: Path) -> None:
    with pytest.raises(UnsupportedRequestError, match="option 'bits' is unknown to int8; there are group_size"):
        load(folder, quantizer="torchao:int8", options={"quantizer": {"bits": 4}})
    with pytest.raises(PlanError, match="took none of the linear layers"):
        load(folder, quantizer="torchao:int4", options={"quantizer": {"group_size": 128}}, quantizer_skip=("*.o",))


# Files that Transformers wrote


def _torchao_config(kind: str) -> Any:
    """The settings of torchao by short names, made late."""
    import torchao.quantization as ao
    from torchao.quantization.granularity import PerGroup, PerTensor

    return {
        "int8": lambda: ao.Int8WeightOnlyConfig(),
        "int8, both": lambda: ao.Int8DynamicActivationInt8WeightConfig(),
        "intx": lambda: ao.IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32)),
        "float8": lambda: ao.Float8WeightOnlyConfig(granularity=PerTensor()),
    }[kind]()


@pytest.fixture(scope="module")
def theirs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Any]]:
    """Packs and saves the model in Transformers: the folder and the model there."""
    transformers = pytest.importorskip("transformers")

    def made(kind: str) -> tuple[Path, Any]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            settings = transformers.TorchAoConfig(_torchao_config(kind))
            model = transformers.AutoModelForCausalLM.from_pretrained(
                folder, quantization_config=settings, dtype=torch.float32
            )
            path = tmp_path_factory.mktemp("theirs")
            model.save_pretrained(path)
            return path, model

    return made


@pytest.mark.parametrize(
    ("kind", "variant"),
    [("int8", "int8"), ("int8, both", "int8-dynamic"), ("intx", "intx"), ("float8", "float8")],
)
def test_a_file_that_transformers_wrote_computes_what_it_computes_there(
    kind: str, variant: str, theirs: Callable[[str], tuple[Path, Any]], folder: Path, tmp_path: Path
) -> None:
    path, model = theirs(kind)
    lm, x = load(path), torch.randn(5, C)
    with torch.no_grad():
        want = model(IDS).logits
        for name in ("self_attn.k_proj", "mlp.up_proj"):  # bit by bit
            ours = lm.model.module.get_submodule("layers.0." + NAMES[name])
            assert torch.equal(ours(x), model.get_submodule(f"model.layers.0.{name}")(x))
    # Where inputs are rounded, the last bit of one may turn a code, which moves the logits by a step.
    torch.testing.assert_close(logits(lm), want, rtol=1e-4, atol=0.1 if "both" in kind else 1e-4)
    assert float((logits(load(folder)) - want).abs().max()) > 1e-2, "the plain weights would give something else"
    assert lm._quantizer._settings.variant == variant
    lm.save(tmp_path / "ours")
    theirs_said, ours = (json.loads((p / "config.json").read_text()) for p in (path, tmp_path / "ours"))
    said = theirs_said["quantization_config"]["quant_type"]["default"]
    assert ours["quantization_config"]["quant_type"]["default"]["_type"] == said["_type"]
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == load_file(path / "model.safetensors").keys()
    assert torch.equal(logits(load(tmp_path / "ours")), logits(lm))


# Configs that cannot be read


def _entry(kind: str, **data: Any) -> dict[str, Any]:
    return {"default": {"_type": kind, "_version": 2, "_data": data}}


@pytest.mark.parametrize(
    ("more", "found"),
    [
        ({"quant_type": "int4_weight_only"}, ("as 'int4_weight_only'", "texts such as int8_weight_only", "pickled")),
        ({"quant_type": {"default": {}}}, ("as {'default': {}}",)),
        ({}, ("as '?'",)),
        ({"quant_type": _entry("AWQConfig")}, ("as 'AWQConfig'", "these are read: ", "Int8WeightOnlyConfig")),
        ({"quant_type": _entry("quantize_", model=1)}, ("as 'quantize_'",)),
        ({"quant_type": _entry("FqnToConfig", fqn_to_config={})}, ("as 'FqnToConfig'",)),
        ({"quant_type": _entry("Int8WeightOnlyConfig", group_size=16)}, ("group_size=16, which is not read here",)),
        ({"quant_type": _entry("Int8WeightOnlyConfig", colour=1)}, ("colour=1, which torchao 0.18 does not know",)),
        ({"quant_type": {"default": {"_type": "Int8WeightOnlyConfig", "_version": 1, "_data": {}}}},
         ("it is version 1 of that config, version 2 is read here",)),
        ({"quant_type": _entry("Int8WeightOnlyConfig"), "include_input_output_embeddings": True},
         ("packed embeddings are not read here",)),
        ({"quant_type": _entry("Int8WeightOnlyConfig"), "colour": 1}, ("colour=1, which is not known here",)),
        ({"quant_type": "int4_weight_only", "packing": "pluglm"}, ("only ever used with int8_weight_only",)),
    ],
)  # fmt: skip
def test_a_config_of_another_kind_is_refused(more: dict[str, Any], found: tuple[str, ...]) -> None:
    import pluglm_quantizer_torchao

    from pluglm.contracts import QuantizerRequest

    request = QuantizerRequest("cpu", "float32", config={"quant_method": "torchao", **more})
    with pytest.raises(ConfigError) as caught:
        pluglm_quantizer_torchao.pluglm_build_quantizer(request=request)
    for text in found:
        assert text in str(caught.value)
    assert "pack them with quantizer='torchao:int8'" in str(caught.value.fix)
    assert caught.value.key == "quantization_config"


def test_a_packed_file_of_a_type_that_does_not_run_here_is_refused(folder: Path, tmp_path: Path) -> None:
    from pluglm_quantizer_torchao.forms import VARIANTS
    from pluglm_quantizer_torchao.published import written
    from pluglm_quantizer_torchao.settings import Settings

    form = VARIANTS["float8-dynamic"][0]
    options = {name: option.values[0] for name, option in form.options.items()}
    said = written(Settings("float8-dynamic", form, options, "cuda", "bfloat16"))
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "quantization_config": said}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UnsupportedRequestError, match="float8-dynamic with packing='plain' runs on cuda, not on cpu"):
        load(tmp_path, dtype="bfloat16")


def test_files_that_this_package_wrote_before_are_read(folder: Path, tmp_path: Path) -> None:
    lm = load(folder, quantizer="torchao:int8")
    lm.save(tmp_path)
    tensors = {k.replace("._weight_", "."): v for k, v in load_file(tmp_path / "model.safetensors").items()}
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "torchao", "quant_type": "int8_weight_only", "packing": "pluglm",
                                     "dtype": "float32", "biased": ["layers.0.attn.q"]}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(logits(load(tmp_path)), logits(lm))


def test_a_file_that_lacks_a_packed_tensor_is_refused(folder: Path, tmp_path: Path) -> None:
    load(folder, quantizer="torchao:int8").save(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.0.mlp.up_proj._weight_scale"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks packed tensors.*up_proj\._weight_scale"):
        load(tmp_path)
