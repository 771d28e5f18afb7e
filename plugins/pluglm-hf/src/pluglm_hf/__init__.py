"""Names that code written for transformers imports, over pluglm: change the import line and run it.

    from pluglm_hf import AutoModelForCausalLM, AutoTokenizer

Importing this package imports neither torch nor any plugin; a name is resolved when it is first used.
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

_ROOMS: dict[str, tuple[str, ...]] = {
    "auto": ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoTokenizer"),
    "batch_encoding": ("BatchEncoding",),
    "caches": ("DynamicCache", "QuantizedCache", "StaticCache"),
    "configs": ("CompileConfig", "GenerationConfig"),
    "criteria": (
        "EosTokenCriteria", "MaxLengthCriteria", "MaxTimeCriteria", "StopStringCriteria", "StoppingCriteria",
        "StoppingCriteriaList",
    ),
    "encoder_decoder_cache": ("EncoderDecoderCache",),
    "model": ("PreTrainedModel",),
    "model_config": ("PretrainedConfig",),
    "pipelines": ("TextGenerationPipeline", "pipeline"),
    "processors": (
        "ExponentialDecayLengthPenalty", "ForcedBOSTokenLogitsProcessor", "ForcedEOSTokenLogitsProcessor",
        "InfNanRemoveLogitsProcessor", "LogitNormalization", "LogitsProcessor", "LogitsProcessorList",
        "MinLengthLogitsProcessor", "MinNewTokensLengthLogitsProcessor", "NoBadWordsLogitsProcessor",
        "NoRepeatNGramLogitsProcessor", "PrefixConstrainedLogitsProcessor", "RepetitionPenaltyLogitsProcessor",
        "SequenceBiasLogitsProcessor", "SuppressTokensAtBeginLogitsProcessor", "SuppressTokensLogitsProcessor",
    ),
    "quantization": ("BitsAndBytesConfig", "HqqConfig", "TorchAoConfig"),
    "seeding": ("set_seed",),
    "streamers": ("AsyncTextIteratorStreamer", "BaseStreamer", "TextIteratorStreamer", "TextStreamer"),
    "tokenizer": ("PreTrainedTokenizer",),
    "warpers": (
        "EpsilonLogitsWarper", "EtaLogitsWarper", "MinPLogitsWarper", "TemperatureLogitsWarper", "TopHLogitsWarper",
        "TopKLogitsWarper", "TopPLogitsWarper", "TypicalLogitsWarper",
    ),
}  # fmt: skip
_HOMES = {name: f"pluglm_hf.{room}" for room, names in _ROOMS.items() for name in names}

#: Names of a distribution that is not required.
_OPTIONAL = {
    "SynthIDTextWatermarkDetector": "pluglm_watermark.synthid",
    "SynthIDTextWatermarkingConfig": "pluglm_watermark.synthid",
    "WatermarkDetector": "pluglm_watermark.green",
    "WatermarkingConfig": "pluglm_watermark.green",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name) or _OPTIONAL.get(name)
    if home is None:
        raise AttributeError(f"module 'pluglm_hf' has no attribute {name!r}; public names: {', '.join(__all__)}")
    if name in _OPTIONAL and importlib.util.find_spec("pluglm_watermark") is None:
        raise AttributeError(f"{name} is in another distribution: pip install pluglm-watermark")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
