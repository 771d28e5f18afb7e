"""Each op against its formula in float64."""

import math

import pytest
import torch
from pluglm_blocks import ops
from pluglm_blocks.norm import build_norm
from pluglm_blocks.relative import relative_buckets

from pluglm.contracts import KERNEL_OPS, Norm
from pluglm.contracts.program import Activation

x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1)) * 3
w = torch.linspace(0.5, 1.5, 12)
b = torch.linspace(-1, 1, 12)


def close(found, wanted, tolerance=1e-6):
    torch.testing.assert_close(found.double(), wanted.double(), rtol=tolerance, atol=tolerance)


def test_every_kernel_op_has_a_reference_of_that_name():
    assert all(callable(getattr(ops, name)) for name in KERNEL_OPS)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("op", [ops.rms_norm, ops.rms_norm_cast_late])
def test_rms_norm_is_its_formula(op, offset):
    d = x.double()
    normed = d / (d.pow(2).mean(-1, keepdim=True) + 1e-3).sqrt()
    close(op(x, w, 1e-3, offset), normed * (w.double() + offset))
    close(op(x, None, 1e-3, 0.0), normed)


def test_rms_norm_rounds_before_the_weight_and_cast_late_after_it():
    half = x.bfloat16()
    normed = half.float() / (half.float().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    early, late = ops.rms_norm(half, w.bfloat16(), 1e-5, 0.0), ops.rms_norm_cast_late(half, w.bfloat16(), 1e-5, 0.0)
    assert early.dtype == late.dtype == torch.bfloat16
    assert torch.equal(early, normed.bfloat16() * w.bfloat16())
    assert torch.equal(late, (normed * w.bfloat16().float()).bfloat16())
    assert not torch.equal(early, late)


def test_layer_norm_is_its_formula():
    d = x.double()
    normed = (d - d.mean(-1, keepdim=True)) / (d.var(-1, unbiased=False, keepdim=True) + 1e-3).sqrt()
    close(ops.layer_norm(x, w, b, 1e-3), normed * w + b)
    close(ops.layer_norm(x, None, None, 1e-3), normed)
    assert ops.layer_norm(x.half(), w.half(), b.half(), 1e-3).dtype == torch.float16


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dim", [6, 12])
def test_rope_turns_each_pair_like_a_complex_number(interleaved, dim):
    heads = torch.randn(2, 3, 5, 12, generator=torch.Generator().manual_seed(2))
    angles = torch.randn(2, 5, dim // 2, generator=torch.Generator().manual_seed(3))
    found = ops.rope(heads, angles.cos(), angles.sin(), interleaved)
    turning = heads[..., :dim].double()
    pairs = turning.unflatten(-1, (-1, 2)) if interleaved else turning.unflatten(-1, (2, -1)).transpose(-1, -2)
    turned = torch.view_as_complex(pairs.contiguous()) * torch.exp(1j * angles.double())[:, None]
    turned = torch.view_as_real(turned)
    turned = turned.flatten(-2) if interleaved else turned.transpose(-1, -2).flatten(-2)
    close(found, torch.cat((turned, heads[..., dim:].double()), -1))


def test_rope_takes_float32_products_of_a_bfloat16_head():
    heads, angles = torch.randn(1, 2, 3, 8).bfloat16(), torch.randn(1, 3, 4)
    found = ops.rope(heads, angles.cos(), angles.sin(), False)
    assert torch.equal(found, ops.rope(heads.float(), angles.cos(), angles.sin(), False).bfloat16())


FORMULAS = {
    "silu": lambda d: d / (1 + (-d).exp()),
    "gelu": lambda d: d * 0.5 * (1 + torch.erf(d / math.sqrt(2))),
    "gelu_tanh": lambda d: 0.5 * d * (1 + torch.tanh(math.sqrt(2 / math.pi) * (d + 0.044715 * d**3))),
    "relu": lambda d: d * (d > 0),
    "relu2": lambda d: (d * (d > 0)) ** 2,
    "quick_gelu": lambda d: d / (1 + (-1.702 * d).exp()),
}


@pytest.mark.parametrize("name", Activation.__args__)
def test_activations_are_their_formulas(name):
    close(ops.ACTIVATIONS[name](x), FORMULAS[name](x.double()))
    close(ops.gated_act(x, w, name), FORMULAS[name](x.double()) * w)


def test_a_kernel_stands_in_for_rms_norm_but_never_for_one_that_casts_late():
    def kernel(x, weight, eps, offset):
        return torch.zeros_like(x)

    plain = build_norm(Norm("rms", 12, 1e-5), {"rms_norm": kernel}, torch.float32)
    late = build_norm(Norm("rms", 12, 1e-5, cast_late=True), {"rms_norm": kernel}, torch.float32)
    assert not plain(x).any()
    close(late(x), ops.rms_norm(x, None, 1e-5, 0.0))


def test_a_layer_norm_adds_its_offset_to_the_weight():
    module = build_norm(Norm("layer", 12, 1e-5, bias=True, offset=1.0), {}, torch.float32)
    assert not module.weight.any()  # a fresh norm scales by one
    close(module(x), ops.layer_norm(x, None, None, 1e-5))


@pytest.mark.parametrize("bidirectional", [False, True])
def test_relative_buckets_are_those_of_t5(bidirectional):
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    q, k = torch.arange(190, 203)[None], torch.arange(0, 400, 3)[None]
    wanted = t5.T5Attention._relative_position_bucket(k[:, None, :] - q[:, :, None], bidirectional, 32, 128)
    assert torch.equal(relative_buckets(q, k, 32, 128, bidirectional), wanted)
