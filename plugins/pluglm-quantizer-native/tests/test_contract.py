"""The native quantizer keeps the contract of its kind, in every variant."""

from __future__ import annotations

import pluglm_quantizer_native

from pluglm.testing.quantizer import QuantizerContract


class NativeContract(QuantizerContract):
    provider = pluglm_quantizer_native
    sizes = ((96, 64), (27, 160))  # 27 rows do not fill their blocks


class TestDefault(NativeContract):
    pass


class TestInt8Offset(NativeContract):
    variant = "int8-offset"
    sizes = ((96, 64),)


class TestInt4(NativeContract):
    variant = "int4"


class TestInt4Offset(NativeContract):
    variant = "int4-offset"
    sizes = ((96, 64),)
