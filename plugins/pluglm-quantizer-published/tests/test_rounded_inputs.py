"""A model whose inputs are rounded is computed with rounded inputs: by the formats' definitions, written out here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pluglm_quantizer_published.layer import RoundingLinear
from pluglm_quantizer_published.rounding import Rounding
from published_cases import FP8, ROUNDING
from published_models import load, logits, write
from safetensors.torch import load_file
from torch import Tensor

from pluglm.contracts import GroupedLinear

LAYER, PLACE = "layers.0.mlp.down", "model.layers.0.mlp.down_proj"


def float8(value: Tensor) -> Tensor:
    return value.clamp(-448, 448).to(torch.float8_e4m3fn).to(value.dtype)


def by_definition(name: str, x: Tensor, stored: dict[str, Tensor]) -> Tensor:
    """x: [tokens, in] rounded as the case says. In float32: the largest value of a token lies half way, at 127.5."""
    rows = []
    for token in x:
        if name == "int8 by row, int8 tokens":
            scale = token.abs().max() / 127.5
            rows.append((token / scale).round().clamp(-128, 127) * scale)
        elif name == "int8 by row, int8 tokens with zero points":
            low, high = min(token.min().item(), 0.0), max(token.max().item(), 0.0)
            scale = (high - low) / 255
            zero = round(-128 - low / scale)
            rows.append(((token / scale + zero).clamp(-128, 127).round() - zero) * scale)
        elif name == "int8 by row, a stored scale and zero point":
            scale, zero = stored["input_scale"], stored["input_zero_point"]
            rows.append(((token / scale + zero).round().clamp(-128, 127) - zero) * scale)
        elif "a stored" in name:
            scale = stored.get("input_scale", stored.get("activation_scale"))  # type: ignore[union-attr]
            rows.append(float8(token / scale) * scale)
        else:
            size = 32 if "32" in name or "powers" in name else 40 if "ragged" in name else len(token)
            parts = []
            for part in token.split(size):
                scale = part.abs().max() / 448
                if "powers" in name:
                    scale = 2.0 ** torch.ceil(torch.log2(scale))
                parts.append(float8(part / scale) * scale)
            rows.append(torch.cat(parts))
    return torch.stack(rows)


@pytest.mark.parametrize("name", [*ROUNDING, *FP8])
def test_a_layer_multiplies_the_rounded_input(name: str, tmp_path: Path) -> None:
    packed, plain = write(tmp_path, *{**ROUNDING, **FP8}[name])
    lm = load(packed)
    layer = lm.model.module.get_submodule(LAYER)
    assert type(layer) is RoundingLinear
    assert not isinstance(layer, GroupedLinear), "an executor would leave the rounding out"
    weight = load_file(plain / "model.safetensors")[f"{PLACE}.weight"]
    assert torch.equal(layer.scaled().dense(torch.float32), weight)
    x = torch.randn(2, 3, 96) * torch.tensor([0.5, 2.0, 30.0])[:, None]
    want = by_definition(name, x.flatten(0, 1), layer.stored()).double().view(2, 3, 96) @ weight.double().T
    torch.testing.assert_close(layer(x).double(), want, rtol=1e-4, atol=1e-4)
    unrounded = x.double() @ weight.double().T
    assert not torch.allclose(want, unrounded, rtol=1e-4, atol=1e-4), "the rounding shows"
    assert logits(lm).isfinite().all()


@pytest.mark.parametrize("name", ["int8 by row, int8 tokens", "fp8, ragged blocks"])
def test_a_token_is_rounded_without_regard_to_the_others(name: str, tmp_path: Path) -> None:
    packed, _ = write(tmp_path, *{**ROUNDING, **FP8}[name])
    layer = load(packed).model.module.get_submodule(LAYER)
    x = torch.randn(4, 96)
    x[0] *= 100
    torch.testing.assert_close(layer(x)[1:], layer(x[1:]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_output_has_the_dtype_of_the_input(dtype: torch.dtype, tmp_path: Path) -> None:
    packed, _ = write(tmp_path, *FP8["fp8, ragged blocks"])
    layer = load(packed).model.module.get_submodule(LAYER)
    x = torch.randn(3, 96).to(dtype)
    y = layer(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y.double(), layer(x.double()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    "rounding", [Rounding(8), Rounding(8, symmetric=False), Rounding(None), Rounding(None, group_size=5, powers=True)]
)
def test_zeros_stay_zeros(rounding: Rounding) -> None:
    assert torch.equal(rounding(torch.zeros(2, 12)), torch.zeros(2, 12))


def test_a_layer_of_its_own_dtype_is_saved_as_it_was(tmp_path: Path) -> None:
    """`weight` of the file is the packed tensor itself: float8 goes in and comes out."""
    packed, _ = write(tmp_path, *FP8["fp8, powers of two"])
    lm: Any = load(packed)
    lm.save(tmp_path / "again")
    before, after = (load_file(folder / "model.safetensors") for folder in (packed, tmp_path / "again"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert torch.equal(after[key].view(torch.uint8), tensor.view(torch.uint8)), key
    assert torch.equal(logits(load(tmp_path / "again")), logits(lm))
