"""The same files and tensors in the libraries that define the formats, where these can read them on a CPU."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import published_cases as cases
import pytest
import torch
from pluglm_quantizer_published.fp8_files import BlockForm
from published_models import IDS, load, logits, write

WITH_TRANSFORMERS = [
    "compressed-tensors, 4 bits",
    "compressed-tensors, 8 bits, by row",
    "compressed-tensors, int8 by row, zero points",
    *cases.ROUNDING,
]


@pytest.mark.parametrize("name", WITH_TRANSFORMERS)
def test_logits_are_those_of_transformers_with_compressed_tensors(name: str, transformers: Any, tmp_path: Path) -> None:
    """Weights multiplied out, inputs rounded by the library's own observers. Float32 on both sides."""
    pytest.importorskip("compressed_tensors")
    packed, _ = write(tmp_path, *cases.ALL[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = transformers.AutoModelForCausalLM.from_pretrained(packed, dtype=torch.float32)
        with torch.no_grad():
            want = reference(torch.tensor(IDS)).logits[0]
    torch.testing.assert_close(logits(load(packed)), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_packed_weight_with_zero_points_is_what_compressed_tensors_unpacks(bits: int) -> None:
    """By its compressor: Transformers 5.23 expects these zero points in another shape than the library writes."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
    from pluglm_quantizer_published.compressed_forms import PackedForm, Spread

    tensors, dense = cases.compressed(bits, 32, symmetric=False)[1](96, 64, 3)
    args = QuantizationArgs(num_bits=bits, symmetric=False, strategy="group", group_size=32)
    scheme = QuantizationScheme(targets=["Linear"], weights=args)
    wide = {**tensors, "weight_scale": tensors["weight_scale"].double()}
    want = BaseCompressor.get_value_from_registry("pack-quantized").decompress(wide, scheme)["weight"]
    form = PackedForm(spread=Spread("group", columns=32), bits=bits, symmetric=False)
    assert torch.equal(form.scaled(tensors, 64, regular=True).dense(torch.float64), want)
    assert torch.equal(want, dense)


def test_an_awq_weight_is_what_compressed_tensors_makes_of_it() -> None:
    """Its converter turns the tensors into pack-quantized ones, which are read here too."""
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.entrypoints.convert.converters.autoawq import AutoAWQConverter
    from pluglm_quantizer_published.awq_files import GemmForm
    from pluglm_quantizer_published.compressed_forms import PackedForm, Spread

    config, pack = cases.CASES["awq, gemm"]
    tensors, dense = pack(96, 64, 3)
    converter = AutoAWQConverter.from_autoawq_config(config)
    converted = converter.process({f"a.b.{short}": tensor for short, tensor in tensors.items()})
    short = {name.removeprefix("a.b."): tensor for name, tensor in converted.items()}
    form = PackedForm(spread=Spread("group", columns=32), bits=4, symmetric=False)
    form.check("a.b", short, (64, 96))
    theirs = form.scaled(short, 64, regular=True).dense(torch.float64)
    assert torch.equal(GemmForm(group_size=32).scaled(tensors, 64, regular=True).dense(torch.float64), theirs)
    assert torch.equal(theirs, dense)


@pytest.mark.parametrize("name", ["fp8, powers of two", "fp8, powers of two as bytes", "fp8, one scale, tokens"])
def test_an_fp8_weight_is_what_transformers_makes_of_it(name: str, transformers: Any) -> None:
    from transformers.integrations.finegrained_fp8 import Fp8Dequantize

    config, pack = cases.FP8[name]
    tensors, _ = pack(96, 64, 3)
    want = Fp8Dequantize(None)._dequantize_one(tensors["weight"], tensors["weight_scale_inv"], torch.float32)
    block = config["weight_block_size"]
    form = BlockForm(block=block and (block[0], block[1]))
    assert torch.equal(form.scaled(tensors, 64, regular=False).dense(torch.float32), want)
