"""From a request to the reader of its quant_method."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from pluglm.contracts import QuantizerRequest
from pluglm.errors import UnsupportedRequestError
from pluglm_quantizer_published.awq_files import AwqReader
from pluglm_quantizer_published.compressed_files import CompressedReader
from pluglm_quantizer_published.fp8_files import Fp8Reader
from pluglm_quantizer_published.gptq_files import GptqReader
from pluglm_quantizer_published.mxfp4_files import Mxfp4Reader
from pluglm_quantizer_published.reader import Reader, cannot_pack

READERS: Mapping[str, type[Reader]] = {
    reader.name: reader for reader in (GptqReader, AwqReader, CompressedReader, Fp8Reader, Mxfp4Reader)
}
DTYPES = ("float32", "float64", "bfloat16", "float16")


def build(name: str, request: QuantizerRequest) -> Reader:
    """The reader of a checkpoint's quantization_config.

    Raises: UnsupportedRequestError for a variant, an option, a dtype, or a model that nobody has packed; ConfigError
    for a config that cannot be honoured, with the key.
    """
    reasons = [f"option {option!r} is unknown" for option, _ in request.options]
    if request.variant is not None:
        reasons.append(f"variant {request.variant!r} is unknown; the file says how it is packed")
    if request.dtype not in DTYPES:
        reasons.append(f"compute dtype {request.dtype} is unknown; there is {', '.join(DTYPES)}")
    if request.config is None:
        raise cannot_pack(name, *reasons)
    if reasons:
        raise UnsupportedRequestError(
            f"the {name} quantizer cannot honour this request.", why="; ".join(reasons),
            fix="Load the folder without naming a quantizer.", reasons=tuple(reasons),
        )  # fmt: skip
    return READERS[name](request.config, getattr(torch, request.dtype))
