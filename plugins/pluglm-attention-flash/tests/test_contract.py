"""Every variant keeps the contract of its kind: here with kernels that run on a CPU, on a GPU with the real ones."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar

import fake_kernels
import pluglm_attention_flash
import pytest
import torch
from pluglm_attention_flash.flash import build
from pluglm_attention_flash.kernels import FINDERS, HALF, Kernel, flash_attn_2, flash_attn_3, torch_flash

from pluglm.contracts import AttentionRequest, DenseView
from pluglm.errors import UnsupportedRequestError
from pluglm.testing.attention import AttentionContract
from pluglm.testing.attention_oracle import LAYOUTS, case_of, expected, spec_of

#: The imitations compute in float64 whatever they are given; each dtype here is tried where it says something new.
KERNELS = {
    "3": flash_attn_3(fake_kernels.flash_attn_interface(), ("float32",)),
    "2": flash_attn_2(fake_kernels.flash_attn(), ("float32",)),
    "torch": torch_flash(("float32", "bfloat16")),
}


class Listed(AttentionContract):
    """Reads `pluglm.json`; it is no test class."""

    provider = pluglm_attention_flash


def given(kernels):
    """Finders of these kernels, on any device."""
    return {name: lambda device, found=kernel: found for name, kernel in kernels.items()}


class VariantContract(AttentionContract):
    """The kit for one variant; `pluglm.json` lists what some variant can, so the kernel's own list takes its place."""

    variant: ClassVar[str]

    def kernel(self) -> Kernel:
        return KERNELS[self.variant]

    def facts(self):
        facts, kernel = Listed().facts(), self.kernel()
        return {**facts, "features": kernel.features, "requires": {**facts["requires"], "dtypes": kernel.dtypes}}

    def build(self, *specs, **request):
        return super().build(*specs, **{"variant": self.variant, **request})


class OnCpu(VariantContract):
    provider = SimpleNamespace(pluglm_build_attention=lambda request: build(request, given(KERNELS)))


class TestFlash3(OnCpu):
    variant = "3"


class TestFlash2(OnCpu):
    variant = "2"

    @pytest.mark.xfail(
        reason="ALiBi beside holes is refused in prepare: the kernel counts cells, not positions",
        raises=UnsupportedRequestError,
    )
    def test_any_positions_and_any_mix_of_listed_features_agree_with_the_oracle(self):
        super().test_any_positions_and_any_mix_of_listed_features_agree_with_the_oracle()


class TestFlashTorch(OnCpu):
    """The real function: torch has a flash kernel for CPUs, too."""

    variant = "torch"


@pytest.mark.parametrize("early", [False, True])
def test_both_forms_of_what_flash_3_returns_are_read(early):
    kernel = flash_attn_3(fake_kernels.flash_attn_interface(early=early), ("float32",))
    for name in ("more tokens", "holes"):
        case = case_of(LAYOUTS[name], spec_of(["window", "sinks"]))
        request = AttentionRequest((case.spec,), "cpu", "float32")
        o = case.run(build(request, {"3": lambda device: kernel}))
        real = (case.q_positions >= 0)[:, None, :, None]
        assert torch.allclose(o.double().where(real, 0.0), expected(case).where(real, 0.0), atol=1e-5)


class InHalf:
    """A backend that computes in float16 what the kit gives it in float32."""

    def __init__(self, backend):
        self.backend, self.name, self.views = backend, backend.name, backend.views
        self.refusals, self.prepare = backend.refusals, backend.prepare

    def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
        k, v = (x.half() for x in view.dense())
        sinks = None if sinks is None else sinks.half()
        return self.backend.attend(q.half(), DenseView(k, v), spec, mask, sinks=sinks, bias=bias).to(q.dtype)


class HalfContract(VariantContract):
    """The kit for kernels without float32: its tests in float32 run in float16, within the tolerance of that."""

    tolerances: ClassVar = {}

    def build(self, *specs, dtype="float32", **request):
        if dtype != "float32":
            return super().build(*specs, dtype=dtype, **request)
        return InHalf(super().build(*specs, dtype="float16", **request))


class TestFlash3InHalf(HalfContract):
    """Tries the detour itself, before it is needed on a GPU."""

    variant = "3"
    only_half = flash_attn_3(fake_kernels.flash_attn_interface(), ("float16",))
    provider = SimpleNamespace(
        pluglm_build_attention=lambda request: build(request, given({"3": TestFlash3InHalf.only_half}))
    )

    def kernel(self):
        return self.only_half


def real(variant: str) -> Kernel | str:
    return FINDERS[variant]("cuda")


@pytest.mark.gpu
class OnCuda(HalfContract):
    provider = pluglm_attention_flash
    device = "cuda"

    def kernel(self):
        found = real(self.variant)
        return KERNELS[self.variant] if isinstance(found, str) else found


@pytest.mark.skipif(isinstance(real("3"), str), reason=f"flash:3: {real('3')}")
class TestFlash3OnCuda(OnCuda):
    variant = "3"


@pytest.mark.skipif(isinstance(real("2"), str), reason=f"flash:2: {real('2')}")
class TestFlash2OnCuda(OnCuda):
    variant = "2"

    @pytest.mark.xfail(
        reason="ALiBi beside holes is refused in prepare: the kernel counts cells, not positions",
        raises=UnsupportedRequestError,
    )
    def test_any_positions_and_any_mix_of_listed_features_agree_with_the_oracle(self):
        super().test_any_positions_and_any_mix_of_listed_features_agree_with_the_oracle()


@pytest.mark.skipif(isinstance(real("torch"), str), reason=f"flash:torch: {real('torch')}")
class TestFlashTorchOnCuda(OnCuda):
    variant = "torch"


def test_the_manifest_lists_what_some_variant_can():
    listed = Listed().facts()
    assert set(listed["features"]) == {name for kernel in KERNELS.values() for name in kernel.features}
    assert tuple(listed["requires"]["dtypes"]) == HALF
    assert torch.finfo(torch.float16).eps < listed["numerics"]["atol"]
