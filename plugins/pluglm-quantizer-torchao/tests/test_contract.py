"""Every type of torchao that runs on a CPU keeps the contract of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pluglm_quantizer_torchao
from pluglm_quantizer_torchao.forms import VARIANTS, Form, default_form

from pluglm.testing.quantizer import QuantizerContract


class TypeContract(QuantizerContract):
    """The kit with the dtypes and the tolerance of one type."""

    provider = pluglm_quantizer_torchao
    sizes = ((96, 128),)

    def form(self) -> Form:
        return default_form(self.variant or "int8", self.device)

    def facts(self) -> Mapping[str, Any]:
        facts, form = super().facts(), self.form()
        numerics = {"kind": "tolerance", "rtol": form.rtol, "atol": 0.0}
        return {**facts, "numerics": numerics, "requires": {**facts["requires"], "dtypes": list(form.dtypes)}}


class TestInt8(TypeContract):
    sizes = ((96, 128), (7, 192))


class TestInt8Dynamic(TypeContract):
    variant = "int8-dynamic"


class TestInt4(TypeContract):
    variant = "int4"


class TestIntx(TypeContract):
    variant = "intx"


class TestIntxDynamic(TypeContract):
    variant = "intx-dynamic"


class TestFloat8(TypeContract):
    variant = "float8"


class TestNvfp4Weights(TypeContract):
    variant = "nvfp4-weights"


def test_the_manifest_states_the_widest_tolerance_and_every_dtype() -> None:
    facts = QuantizerContract.facts(TestInt8())
    forms = [form for forms in VARIANTS.values() for form in forms]
    assert facts["numerics"]["rtol"] == max(form.rtol for form in forms)
    assert {*facts["requires"]["dtypes"]} == {dtype for form in forms for dtype in form.dtypes}
    assert facts["features"] == list(VARIANTS)
