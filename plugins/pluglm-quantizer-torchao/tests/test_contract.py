"""The torchao quantizer keeps the contract of its kind."""

import pluglm_quantizer_torchao

from pluglm.testing.quantizer import QuantizerContract


class TestTorchao(QuantizerContract):
    provider = pluglm_quantizer_torchao


class TestTorchaoInt8(QuantizerContract):
    provider = pluglm_quantizer_torchao
    variant = "int8"
