"""Every installed quantizer under a whole model: packed while loading, afterwards, saved and read back; plans and skips."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import pluglm
from pluglm import CheckpointError, ConfigError, PlanError, UnsupportedRequestError
from pluglm.registry import Registry

#: Sizes that groups of 32 divide, but for `down`, whose 80 columns they do not.
V, C, F, L, H, K, D = 211, 64, 80, 2, 4, 2, 16
PROMPT = [3, 41, 7, 5]
PACKED = L * 6 + 1  # all but `down`, and the head


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights whose next-token distribution has a clear winner. No tokenizer: tests speak in ids."""
    draw, path = torch.Generator().manual_seed(7), tmp_path_factory.mktemp("models") / "grouped"
    path.mkdir()

    def matrix(rows: int, columns: int, gain: float = 2.0) -> torch.Tensor:
        return gain * torch.randn(rows, columns, generator=draw) / columns**0.5

    weights = {"model.embed_tokens.weight": matrix(V, C, 8.0), "lm_head.weight": matrix(V, C, 6.0)}
    weights["model.norm.weight"] = torch.ones(C)
    for i in range(L):
        layer = f"model.layers.{i}."
        for name, rows, columns in (
            ("self_attn.q_proj", H * D, C), ("self_attn.k_proj", K * D, C), ("self_attn.v_proj", K * D, C),
            ("self_attn.o_proj", C, H * D), ("mlp.gate_proj", F, C), ("mlp.up_proj", F, C), ("mlp.down_proj", C, F),
        ):  # fmt: skip
            weights[f"{layer}{name}.weight"] = matrix(rows, columns)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            rows = len(weights[f"{layer}self_attn.{name}.weight"])
            weights[f"{layer}self_attn.{name}.bias"] = 0.1 * torch.randn(rows, generator=draw)
        weights[layer + "input_layernorm.weight"] = weights[layer + "post_attention_layernorm.weight"] = torch.ones(C)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": V, "hidden_size": C,
        "intermediate_size": F, "num_hidden_layers": L, "num_attention_heads": H, "num_key_value_heads": K,
        "head_dim": D, "hidden_act": "silu", "max_position_embeddings": 96, "rms_norm_eps": 1e-5, "rope_theta": 500.0,
        "tie_word_embeddings": False, "attention_bias": True, "bos_token_id": 0, "eos_token_id": 1, "dtype": "float32",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: tensor.contiguous().clone() for name, tensor in weights.items()}, path / "model.safetensors")
    return path


@pytest.fixture(scope="module")
def plain(folder: Path) -> pluglm.LanguageModel:
    """The model as it is. Tests only read it."""
    return pluglm.load(folder)


def tokens(lm: pluglm.LanguageModel) -> Any:
    return lm.generate(PROMPT, max_new_tokens=8, do_sample=False)


def logits(lm: pluglm.LanguageModel) -> torch.Tensor:
    with torch.no_grad():
        return lm.model(torch.tensor([PROMPT])).logits[0]


def kinds(lm: pluglm.LanguageModel, *names: str) -> list[Any]:
    """Bits of the named layers; None for a plain one."""
    return [getattr(lm.model.module.get_submodule(name), "bits", None) for name in names]


def quantizers() -> Iterator[Any]:
    """Every variant of `native`, and the default of everything else that packs. A reader of files packs nothing.

    Those whose libraries take seconds to import are `slow`; their own tests hold them to the kit.
    """
    for provider in Registry.installed().of("quantizer"):
        variants = tuple((provider.facts or {}).get("features") or ())
        if provider.name == "native":
            yield from (pytest.param(f"native:{variant}", id=variant) for variant in variants)
        elif variants != ("reads",):
            marks = () if provider.name == "torchao" else pytest.mark.slow
            yield pytest.param(provider.name, id=provider.name, marks=marks)


@pytest.mark.parametrize("quantizer", tuple(quantizers()))
def test_packed_while_loading_afterwards_and_from_a_file_gives_the_same_tokens(
    quantizer: str, folder: Path, plain: pluglm.LanguageModel, tmp_path: Path
) -> None:
    try:
        reading = pluglm.load(folder, quantizer=quantizer)
    except UnsupportedRequestError as error:
        if quantizer.startswith("native"):
            raise
        pytest.skip(f"{quantizer} packs nothing here: {error.why}")
    late = pluglm.load(folder)
    assert late.quantize(quantizer) > 0
    assert tokens(late) == tokens(reading)
    assert late.plan.hash == reading.plan.hash != plain.plan.hash
    assert not torch.equal(logits(reading), logits(plain))
    reading.save(tmp_path / "packed")
    packed = pluglm.load(tmp_path / "packed")
    assert packed.plan["quantizer"].provider == reading.plan["quantizer"].provider
    assert tokens(packed) == tokens(reading)
    assert torch.equal(logits(packed), logits(reading))
    with pytest.raises(PlanError, match="packed already"):
        packed.quantize(quantizer)


def test_native_packs_what_groups_divide_and_keeps_the_head_at_eight_bits(folder: Path) -> None:
    lm = pluglm.load(folder)
    assert lm.quantize("native:int4") == PACKED
    assert kinds(lm, "layers.0.attn.q", "layers.1.mlp.up", "layers.1.mlp.down", "head") == [4, 4, None, 8]


def test_more_bits_are_nearer_to_the_plain_model_and_searching_is_nearer_than_not(
    folder: Path, plain: pluglm.LanguageModel
) -> None:
    exact = logits(plain)

    def off(quantizer: str, **options: Any) -> float:
        lm = pluglm.load(folder, quantizer=quantizer, options={"quantizer": options})
        return float((logits(lm) - exact).square().mean())

    assert off("native:int8") < 0.02 * off("native:int4") < off("native:int4")
    assert off("native:int4-offset") < off("native:int4", rounding="nearest")


def test_a_plan_and_a_skip_list_are_kept_by_the_file(folder: Path, tmp_path: Path) -> None:
    options = {"modules": {"*.attn.[qk]": "int8", "layers.1.*": "none"}, "head": "same", "rounding": "nearest"}
    lm = pluglm.load(folder, quantizer="native:int4", quantizer_skip=("*.up",), options={"quantizer": options})
    names = ("layers.0.attn.q", "layers.1.attn.k", "layers.0.attn.v", "layers.1.attn.v", "layers.0.mlp.up", "head")
    assert kinds(lm, *names) == [8, 8, 4, None, None, 4]
    late = pluglm.load(folder)
    assert late.quantize("native:int4", skip=("*.up",), options=options) == 8
    assert torch.equal(logits(late), logits(lm))
    assert lm.plan.hash == late.plan.hash
    replayed = pluglm.load(folder, plan=pluglm.Plan.from_json(json.loads(json.dumps(lm.plan.to_json()))))
    assert torch.equal(logits(replayed), logits(lm))
    lm.save(tmp_path / "packed")
    said = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    assert (said["modules"], said["head"], said["rounding"]) == (options["modules"], "int4", "nearest")
    assert list(said["modules"]) == list(options["modules"])  # the first that fits decides
    assert said["biased"] == ["layers.0.attn.k", "layers.0.attn.o", "layers.0.attn.q", "layers.0.attn.v",
                              "layers.1.attn.k", "layers.1.attn.q"]  # fmt: skip
    again = pluglm.load(tmp_path / "packed")
    assert kinds(again, *names) == kinds(lm, *names)
    assert torch.equal(logits(again), logits(lm))
    again.save(tmp_path / "twice")
    assert torch.equal(logits(pluglm.load(tmp_path / "twice")), logits(lm))


def test_options_that_are_not_honoured_are_refused_before_a_weight_is_read(folder: Path) -> None:
    with pytest.raises(UnsupportedRequestError, match=r"rounding='best' is unknown; there is search, nearest"):
        pluglm.load(folder, quantizer="native", options={"quantizer": {"rounding": "best"}})


@pytest.fixture(scope="module")
def written(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("models") / "packed"
    pluglm.load(folder, quantizer="native:int4").save(path)
    return path


@pytest.fixture
def packed(written: Path, tmp_path: Path) -> Path:
    """A packed folder that a test may damage."""
    return Path(shutil.copytree(written, tmp_path / "packed"))


def test_the_file_is_smaller_by_what_the_bits_say(packed: Path, folder: Path) -> None:
    names = {name for name in load_file(packed / "model.safetensors") if name.endswith("q_proj.codes")}
    assert len(names) == L
    plain, small = (path / "model.safetensors" for path in (folder, packed))
    taken = L * (2 * C * C + 2 * K * D * C + 2 * F * C) + V * C
    expected = (4 * taken - (taken - V * C) * 4.5 / 8 - V * C * 8.5 / 8) / 1.03  # the head's rows fill no block
    assert plain.stat().st_size - small.stat().st_size > expected


@pytest.mark.parametrize(
    ("short", "change", "says"),
    [
        ("codes", lambda t: t[:-1], "does not fit: codes is torch.uint8"),
        ("scale", lambda t: t.float(), "does not fit: scale is torch.float32"),
        (
            "shape",
            lambda t: t + torch.tensor([1, 0], dtype=t.dtype),
            "shape is (65, 64), and config.json says (64, 64)",
        ),
        ("scale", None, "lacks packed tensors of layers.0.attn.q"),
    ],
)
def test_a_damaged_file_is_refused_with_a_fix(packed: Path, short: str, change: Any, says: str) -> None:
    name = f"model.layers.0.self_attn.q_proj.{short}"
    held = load_file(packed / "model.safetensors")
    tensor = held.pop(name)
    if change is not None:
        held[name] = change(tensor).contiguous()
    save_file(held, packed / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        pluglm.load(packed)
    assert says in str(caught.value)
    assert caught.value.fix.startswith("Save the model again")


def test_a_file_that_a_later_version_packed_is_refused(packed: Path) -> None:
    config = json.loads((packed / "config.json").read_text())
    config["quantization_config"]["version"] = 2
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"packed in version 2 of the native form") as caught:
        pluglm.load(packed)
    assert caught.value.fix.startswith("Install a newer pluglm-quantizer-native")


# A head that is the embedding.


@pytest.fixture(scope="module")
def tied(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same model without a head of its own."""
    path = Path(shutil.copytree(folder, tmp_path_factory.mktemp("models") / "tied"))
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    held = load_file(path / "model.safetensors")
    save_file({name: t for name, t in held.items() if name != "lm_head.weight"}, path / "model.safetensors")
    return path


@pytest.mark.parametrize(("quantizer", "bits"), [("native:int4", 8), ("native:int8-offset", 8)])
def test_the_table_of_a_tied_head_is_packed_saved_and_loaded(
    quantizer: str, bits: int, tied: Path, tmp_path: Path
) -> None:
    """Under its own name in the file; the head multiplies by it."""
    lm, late = pluglm.load(tied, quantizer=quantizer), pluglm.load(tied)
    assert late.quantize(quantizer) == PACKED
    assert kinds(lm, "embed") == kinds(late, "embed") == [bits]
    assert late.fingerprint() == lm.fingerprint()
    lm.save(tmp_path / "packed")
    names = {name for name in load_file(tmp_path / "packed" / "model.safetensors") if "embed_tokens" in name}
    assert names >= {f"model.embed_tokens.{short}" for short in ("codes", "scale", "shape")}
    assert "model.embed_tokens.weight" not in names
    again = pluglm.load(tmp_path / "packed")
    for other in (late, again):
        assert torch.equal(logits(other), logits(lm))
        assert tokens(other) == tokens(lm)
        assert other.model.module.head.table is other.model.get_input_embeddings()
    ids = torch.tensor([PROMPT])
    with torch.no_grad():
        by_vectors = again.model(inputs_embeds=again.model.get_input_embeddings()(ids)).logits[0]
    assert torch.equal(by_vectors, logits(lm))
    assert again.model.dtype == torch.float32


@pytest.mark.parametrize(("skip", "options"), [
    (("embed",), {}), (("head",), {}), ((), {"head": "none"}), ((), {"modules": {"embed": "none"}}),
])  # fmt: skip
def test_a_tied_table_may_stay_plain(
    skip: tuple[str, ...], options: dict[str, Any], tied: Path, tmp_path: Path
) -> None:
    lm = pluglm.load(tied, quantizer="native:int4", quantizer_skip=skip, options={"quantizer": options})
    assert kinds(lm, "embed", "layers.0.attn.q") == [None, 4]
    lm.save(tmp_path / "packed")
    again = pluglm.load(tmp_path / "packed")
    assert kinds(again, "embed") == [None]
    assert torch.equal(logits(again), logits(lm))


def test_a_packed_table_runs_natively(tied: Path) -> None:
    native = pytest.importorskip("pluglm_executor_cpu.native")
    if native.library() is None:
        pytest.skip("pluglm-executor-cpu has no compiled library here")
    lm = pluglm.load(tied, quantizer="native:int4", executor="cpu", options={"executor": {"threads": 1}})
    assert tokens(lm) == tokens(pluglm.load(tied, quantizer="native:int4"))
    assert lm.model.executor.native_passes > 0
    assert lm.model.executor.torch_passes == 0


def test_an_executor_with_a_layout_of_its_own_runs_what_was_packed_afterwards(folder: Path) -> None:
    late = pluglm.load(folder, executor="cpu")
    before = late.model.executor
    assert late.quantize("native:int4") == PACKED
    assert late.model.executor is not before
    wanted = logits(pluglm.load(folder, quantizer="native:int4"))
    assert torch.allclose(logits(late), wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_an_executor_that_cannot_run_packed_layers_says_so_at_every_call(folder: Path) -> None:
    late = pluglm.load(folder, executor="compile")
    for act in (lambda: late.quantize("native:int4"), lambda: late.complete(PROMPT, max_new_tokens=2)):
        with pytest.raises(
            PlanError, match=r"packed now, and its executor .*compile.* cannot run it(.|\n)*Load it again"
        ):
            act()
