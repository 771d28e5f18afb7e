"""The bitsandbytes quantizer keeps the contract of its kind, in each of its variants."""

import pluglm_quantizer_bitsandbytes

from pluglm.testing.quantizer import QuantizerContract


class TestBitsAndBytes(QuantizerContract):
    provider = pluglm_quantizer_bitsandbytes


class TestBitsAndBytesNF4(QuantizerContract):
    provider = pluglm_quantizer_bitsandbytes
    variant = "nf4"


class TestBitsAndBytesFP4(QuantizerContract):
    provider = pluglm_quantizer_bitsandbytes
    variant = "fp4"


class TestBitsAndBytesInt8(QuantizerContract):
    provider = pluglm_quantizer_bitsandbytes
    variant = "int8"
