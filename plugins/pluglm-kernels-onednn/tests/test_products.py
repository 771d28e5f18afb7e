"""The products against float64: no sum saturates, a row has a scale of its own, and the number of rows chooses."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from pluglm_kernels_onednn import capability, int8, lossless
from pluglm_kernels_onednn.int8 import Int8Linear, rounded, rounded_rows
from pluglm_kernels_onednn.lossless import PackedLinear, WidenedLinear
from torch import Tensor

from pluglm import InputError


def layer(
    out: int = 40, columns: int = 96, *, few_rows: int | None = None, keep: bool = False
) -> tuple[Int8Linear, Any]:
    """A layer and its weight as it means it, float64."""
    torch.manual_seed(out)
    codes, scale = rounded(torch.randn(out, columns) * torch.logspace(-2, 0, out)[:, None])
    bias = torch.randn(out)
    made = Int8Linear(codes, scale, bias, keep_packed=keep, few_rows=few_rows)
    return made, (codes.double() * scale.double()[:, None], bias.double())


# Rounding


def test_a_weight_is_off_by_half_a_step_and_its_scale_is_the_same_in_both_products() -> None:
    weight = torch.randn(30, 64) * torch.logspace(-3, 2, 30)[:, None]
    weight[7] = 0
    codes, scale = rounded(weight)
    assert codes.dtype is torch.int8 and scale.dtype is torch.bfloat16
    assert int(codes.min()) >= -127
    assert torch.equal(codes[7], torch.zeros(64, dtype=torch.int8))
    step = scale.float()[:, None]
    assert bool(((codes * step - weight).abs() <= 0.5001 * step).all())
    largest = weight.abs().amax(1)
    used = torch.arange(30) != 7
    assert bool((step[used, 0] >= largest[used] / 127).all())
    assert bool((step[used, 0] <= 1.008 * largest[used] / 127).all())  # one step of bfloat16 above


@pytest.mark.parametrize("highest", [127, 255])
def test_each_row_of_the_input_has_a_scale_and_an_offset_of_its_own(highest: int) -> None:
    x = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 30.0, 1e4, 2.0])[:, None]
    x[1] = x[1].abs() + 1  # all positive: zero is met all the same
    x[4] = 0
    codes, scale, offset = rounded_rows(x, highest)
    assert codes.dtype is torch.uint8 and int(codes.max()) <= highest
    assert bool(((codes.float() - offset) * scale - x).abs().le(0.501 * scale + 1e-12).all())
    assert torch.equal(offset, offset.round()) and float(offset[1]) == 0
    alone = rounded_rows(x[2:3], highest)
    assert torch.equal(codes[2:3], alone[0]) and torch.equal(scale[2:3], alone[1])


# Saturation


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 64, 65])
@pytest.mark.parametrize("columns", [32, 96, 1024])
def test_the_worst_case_of_codes_does_not_saturate(rows: int, columns: int) -> None:
    """Every product of a pair at the limit, of one sign: 2 · 255 · 127 does not fit 16 bits, 2 · 127 · 127 does."""
    highest = capability.highest_code()
    weight = torch.tensor([127, -127], dtype=torch.int8).repeat(24)[:, None].repeat(1, columns)
    codes = torch.full((rows, columns), highest, dtype=torch.uint8)
    y = capability.multiply(codes, capability.prepack(weight), torch.ones(48))
    assert torch.equal(y.double(), codes.double() @ weight.double().T)


def test_codes_have_eight_bits_only_where_that_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    assert capability.is_exact(127)
    assert capability.highest_code() == (255 if torch.cpu._is_vnni_supported() and capability.is_exact(255) else 127)
    for vnni, exact, want in ((True, True, 255), (True, False, 127), (False, True, 127)):
        monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda vnni=vnni: vnni)
        monkeypatch.setattr(capability, "is_exact", lambda code, exact=exact: exact)
        assert capability.highest_code.__wrapped__() == want


def test_the_probe_finds_sums_that_saturate(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU without VNNI adds: pairs of products, each cut to 16 bits."""

    def saturating(codes: Tensor, packed: Tensor, scale: Tensor) -> Tensor:
        pairs = (codes.int()[:, None] * packed.int()[None]).unflatten(-1, (-1, 2)).sum(-1)
        return pairs.clamp(-(2**15), 2**15 - 1).sum(-1).float() * scale

    monkeypatch.setattr(capability, "prepack", lambda codes: codes)
    monkeypatch.setattr(capability, "multiply", saturating)
    assert capability.is_exact(127)
    assert not capability.is_exact(255)


def test_the_largest_inputs_come_out_right_through_the_layer() -> None:
    """A constant input is met exactly by its codes, so only float32 is between the result and the true sum."""
    weight = torch.ones(48, 64)
    weight[1::2] = -1
    made = Int8Linear(*rounded(weight), None, keep_packed=True, few_rows=0)
    for value in (1.0, -1.0, 1e4):
        y = made(torch.full((9, 64), value))
        meant = made.codes.double() * made.scale.double()[:, None]
        want = torch.full((9, 64), value, dtype=torch.float64) @ meant.T
        torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=0)


# The two products


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("keep", [False, True])
def test_the_number_of_rows_chooses_the_product(dtype: torch.dtype, keep: bool) -> None:
    made, (weight, bias) = layer(few_rows=3, keep=keep)
    x = torch.randn(7, 96).to(dtype)
    few, many = made(x[:3]), made(x[:4])
    assert torch.equal(few, (made.weight_only(x[:3]) + made.bias_).to(dtype))
    assert torch.equal(many, (made.integers(x[:4]) + made.bias_).to(dtype))
    assert not torch.equal(few, many[:3])
    want = x.double() @ weight.T + bias
    limit = float(want.abs().max())
    assert float((few - want[:3]).abs().max()) < 1e-2 * limit
    assert float((many - want[:4]).abs().max()) < 2e-2 * limit


def test_thresholds_are_those_of_the_readme() -> None:
    assert layer()[0].few_rows == int8.FEW_ROWS == 48
    assert layer(keep=True)[0].few_rows == int8.FEW_ROWS_KEPT == 8


def test_the_second_copy_is_held_only_if_asked_for() -> None:
    plain, _ = layer(few_rows=0)
    plain(torch.randn(4, 96))
    assert plain._packed is None
    assert layer(keep=True)[0]._packed is not None


def test_a_row_of_the_integer_product_does_not_depend_on_its_neighbours() -> None:
    made, _ = layer(few_rows=0)
    x = torch.randn(60, 96) * torch.logspace(-3, 3, 60)[:, None]
    whole = made(x)
    for i in (0, 31, 59):
        torch.testing.assert_close(made(x[i : i + 1]), whole[i : i + 1], rtol=1e-6, atol=0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("few_rows", [0, 99])
def test_what_is_not_finite_stays_so_and_in_its_row(value: float, few_rows: int) -> None:
    made, _ = layer(few_rows=few_rows)
    x = torch.randn(3, 96)
    x[1, 5] = value
    y = made(x)
    assert not bool(y[1].isfinite().any()) and bool(y[::2].isfinite().all())


@pytest.mark.parametrize("few_rows", [0, 99])
def test_no_rows_and_strided_inputs_are_taken(few_rows: int) -> None:
    made, _ = layer(few_rows=few_rows)
    assert made(torch.empty(2, 0, 96)).shape == (2, 0, 40)
    x = torch.randn(96, 2, 5).permute(1, 2, 0)
    assert torch.equal(made(x), made(x.contiguous()))
    assert torch.equal(made(x[:, -1:]), made(x[:, -1:].contiguous()))


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda made: pickle.loads(pickle.dumps(made))], ids=["copy", "pickle"])
def test_a_layer_can_be_copied_and_pickled(twin: Any) -> None:
    made, _ = layer(few_rows=0, keep=True)
    packed = PackedLinear(torch.randn(12, 20), torch.randn(12))
    for module, columns in ((made, 96), (packed, 20)):
        x = torch.randn(5, columns)
        again = twin(module)
        assert torch.equal(again(x), module(x))
        assert torch.equal(again(x), module(x))  # packed anew by the first call


def test_the_weight_can_be_taken_over_by_other_code() -> None:
    made, (weight, bias) = layer()
    grouped = made.grouped()
    assert (grouped.bits, grouped.group_size, grouped.offset) == (8, 96, None)
    assert torch.equal(grouped.dense().double(), weight)
    assert made.grouped_bias() is not None and torch.equal(made.grouped_bias().double(), bias)


def test_a_gradient_is_refused_and_not_lost() -> None:
    for made in (layer()[0], PackedLinear(torch.randn(40, 96), None)):
        with pytest.raises(InputError, match="has no gradient") as caught:
            made(torch.randn(2, 96, requires_grad=True))
        assert "torch.no_grad()" in str(caught.value) and caught.value.argument == "x"
        with torch.no_grad():
            made(torch.randn(2, 96, requires_grad=True))


# Weights as they are


@pytest.mark.parametrize("rows", [1, lossless.MANY_ROWS - 1, lossless.MANY_ROWS, 33])
@pytest.mark.parametrize("out", [7, lossless.BLOCK + 3])
def test_widened_products_are_those_of_bfloat16(rows: int, out: int) -> None:
    torch.manual_seed(rows)
    weight, bias, x = torch.randn(out, 50).bfloat16(), torch.randn(out).bfloat16(), torch.randn(rows, 50).bfloat16()
    made = WidenedLinear(weight, bias)
    want = x.double() @ weight.double().T + bias.double()
    y = made(x[None])
    assert y.dtype is torch.bfloat16 and y.shape == (1, rows, out)
    torch.testing.assert_close(y[0].double(), want, rtol=2**-7, atol=2e-2)
    if rows >= lossless.MANY_ROWS:  # one rounding, at the end
        torch.testing.assert_close(y[0].double(), want, rtol=2**-8, atol=1e-5)
    assert torch.equal(made.dense(), weight)


def test_widened_layers_have_a_gradient() -> None:
    x = torch.randn(9, 50).bfloat16().requires_grad_()
    WidenedLinear(torch.randn(7, 50).bfloat16(), None)(x).sum().backward()
    assert x.grad is not None


def _dtypes() -> list[torch.dtype]:
    return [torch.float32, *([torch.bfloat16] if capability.multiplies_bfloat16() else [])]


@pytest.mark.parametrize("dtype", _dtypes())
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_packed_products_are_those_of_the_plain_weight_and_it_comes_back(dtype: torch.dtype, rows: int) -> None:
    """In float32 too, which no variant uses: the same code where this CPU does not multiply bfloat16."""
    weight, bias = torch.randn(41, 50).to(dtype), torch.randn(41).to(dtype)
    made = PackedLinear(weight, bias)
    assert torch.equal(made.dense(), weight)
    x: Tensor = torch.randn(2, rows, 50).to(dtype)
    tight = 1e-5 if dtype is torch.float32 else 2**-7
    want = x.double() @ weight.double().T + bias.double()
    torch.testing.assert_close(made(x).double(), want, rtol=tight, atol=10 * tight)
