"""Tiny random checkpoints, written by Transformers, in which every knob of a model type is turned to an odd value.

Sizes differ from each other, biases and norms are random, rotary positions are stretched and windows are shorter than
the sequences, so that a part which is left out, swapped or computed otherwise cannot hide. Each family's variants stand
in a module of `families/`, as `VARIANTS`, together with the knobs that only it has, as `KNOBS` and `NOT_BROKEN`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

#: Lengths before stretching are far below the 90 or so positions that the tests run.
BEFORE = 24
LINEAR = {"rope_type": "linear", "rope_theta": 200.0, "factor": 2.5}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 150.0, "factor": 5.0}
#: With these, the ramp between kept and interpolated pairs starts and ends inside a head of 8 or 10 dimensions.
YARN = {
    "rope_type": "yarn", "rope_theta": 20.0, "factor": 5.0, "original_max_position_embeddings": BEFORE,
    "beta_fast": 1.2, "beta_slow": 0.4,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 400.0, "factor": 5.0, "original_max_position_embeddings": BEFORE,
    "low_freq_factor": 1.0, "high_freq_factor": 4.0,
}  # fmt: skip
PROPORTIONAL = {"rope_type": "proportional", "rope_theta": 250.0, "factor": 2.0, "partial_rotary_factor": 0.6}


def longrope(pairs: int) -> dict[str, Any]:
    """Short and long factors for heads of 2 × pairs dimensions."""
    return {
        "rope_type": "longrope", "rope_theta": 350.0, "original_max_position_embeddings": BEFORE, "factor": 5.0,
        "short_factor": [1.0 + 0.2 * i for i in range(pairs)], "long_factor": [1.5 + 0.7 * i for i in range(pairs)],
    }  # fmt: skip


#: Every checkpoint's vocabulary; no special tokens, so that no text ends early.
VOCAB_SIZE = 131
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
#: In the names that most families give them.
SIZES = {
    "vocab_size": VOCAB_SIZE, "hidden_size": 48, "intermediate_size": 84, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "rms_norm_eps": 1e-4, **NO_TOKENS,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One checkpoint.

    Attributes:
        settings: of the config, all of them.
        v4: the config is rewritten as Transformers 4 spelled rotary positions.
        seed: of its prompts; another one where the reference's own choice of a token is a matter of rounding.
        scale: of the random matrices, or a function (name, noise) -> parameter for those that need care; it may return
            None to leave one to the rule. It is asked for buffers that checkpoints hold, too; None leaves one as it is.
        skip: names of parity tests that cannot hold, each with the reason; a test checks that the names exist.
        spell: rewrites the saved config as older files of the family spelled it, where `v4` does not suit.
        save: arguments of `save_pretrained`, for the other of two layouts.
        cached_reference: False: the reference computes something else with its cache, so it is asked without.
    """

    model_type: str
    settings: dict[str, Any] = field(default_factory=dict)
    v4: bool = False
    seed: int = 0
    scale: Callable[[str, Tensor], Tensor | None] | None = None
    skip: dict[str, str] = field(default_factory=dict)
    spell: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    save: dict[str, Any] = field(default_factory=dict)
    cached_reference: bool = True


def rotary(
    model_type: str,
    rope: dict[str, Any],
    settings: dict[str, Any] | None = None,
    *,
    tied: bool = False,
    v4: bool = False,
    max_positions: int = 120,
) -> Variant:
    """A variant of a Llama-like family: `SIZES`, rotary positions and what differs."""
    return Variant(
        model_type,
        {
            **SIZES, **(settings or {}), "rope_parameters": dict(rope), "max_position_embeddings": max_positions,
            "tie_word_embeddings": tied,
        },
        v4,
    )  # fmt: skip


def _families() -> list[ModuleType]:
    found = []
    for path in sorted((Path(__file__).parent / "families").glob("*.py")):
        name = f"parity_family_{path.stem}"
        spec = importlib.util.spec_from_file_location(name, path)
        assert spec is not None and spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found.append(module)
    return found


sys.modules.setdefault("checkpoints", sys.modules[__name__])
FAMILIES = _families()
VARIANTS: dict[str, Variant] = {name: variant for family in FAMILIES for name, variant in family.VARIANTS.items()}


def write_checkpoint(name: str, folder: Path) -> Path:
    """Write variant `name` to `folder`; the same weights each time."""
    from transformers import AutoConfig, AutoModelForCausalLM

    variant = VARIANTS[name]
    config = AutoConfig.for_model(variant.model_type, **variant.settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    draw = torch.Generator().manual_seed(sum(map(ord, name)))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=draw)
            own = variant.scale(key, noise) if variant.scale is not None else None
            parameter.copy_(_drawn(key, noise) if own is None else own)
        saved = model.state_dict().keys()
        for key, buffer in model.named_buffers():
            noise = torch.randn(buffer.shape, generator=draw)
            own = variant.scale(key, noise) if key in saved and variant.scale is not None else None
            if own is not None:
                buffer.copy_(own)
    model.save_pretrained(folder, **variant.save)
    if variant.v4:
        _spell_as_v4(folder / "config.json")
    if variant.spell is not None:
        path = folder / "config.json"
        path.write_text(json.dumps(variant.spell(json.loads(path.read_text())), indent=2))
    return folder


def _drawn(key: str, noise: Tensor) -> Tensor:
    """The rule for parameters of any family: biases small, norms about one, matrices that keep the scale of vectors."""
    if key.endswith(".bias"):
        return 0.4 * noise
    if noise.ndim == 1:  # norms, by whatever name
        return 1 + 0.3 * noise
    if "embed" in key or ".wte" in key or ".wpe" in key:
        return 0.5 * noise
    return 1.3 * noise / noise.shape[-1] ** 0.5


def _spell_as_v4(path: Path) -> None:
    """`rope_parameters` -> `rope_theta` and `rope_scaling` with its older key `type`."""
    config = json.loads(path.read_text())
    inner = config.pop("rope_parameters")
    config["rope_theta"] = inner.pop("rope_theta")
    config["rope_scaling"] = {"type": inner.pop("rope_type"), **inner}
    path.write_text(json.dumps(config, indent=2))
