"""config.json -> `ModelDescription` for families that a program can say, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from pluglm.contracts import DecoderProgram, ModelDescription, WeightMap
from pluglm.errors import ConfigError
from pluglm_blocks.reading.config import Config, token_ids


@dataclass(frozen=True)
class Family:
    """One model type.

    Attributes:
        program: reads the whole config but for the token ids. weights: the weight map that a program needs.
        bos, eos, pad: ids where the file does not have the key (the reference's defaults).
    """

    program: Callable[[Config], DecoderProgram]
    weights: Callable[[DecoderProgram], WeightMap]
    bos: int | None = None
    eos: int | None = None
    pad: int | None = None


def describe(config: Mapping[str, Any], families: Mapping[str, Family], *, package: str) -> ModelDescription:
    """Describe one model.

    Args:
        families: by model_type. package: the distribution that asks, for messages.
    Raises: ConfigError if its type is not one of `families`, or if a key is missing, wrong, or read by nobody.
    """
    model_type = config.get("model_type")
    family = families.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        found = "no model_type" if model_type is None else f"the model_type {model_type!r}"
        raise ConfigError(
            f"The config has {found}.",
            why=f"{package} reads {', '.join(families)}.",
            fix="Use a plugin for that architecture (`pluglm plugins`), or add the missing key to the file.",
            key="model_type",
            path=None,
        )
    reader = Config(config)
    program = family.program(reader)
    vocab_size = program.embedding.vocab_size
    bos = token_ids(reader, "bos_token_id", family.bos, vocab_size)
    eos = token_ids(reader, "eos_token_id", family.eos, vocab_size)
    pad = token_ids(reader, "pad_token_id", family.pad, vocab_size)
    report = reader.finish()
    return ModelDescription(
        model_type=str(model_type),
        program=program,
        weights=family.weights(program),
        vocab_size=vocab_size,
        hidden_size=program.embedding.hidden_size,
        num_layers=len(program.layers),
        max_seq_len=program.max_seq_len,
        attention=program.attention_specs(),
        slots=program.slots,
        used=report.used,
        ignored=report.ignored,
        eos_token_ids=eos,
        bos_token_id=bos[0] if bos else None,
        pad_token_id=pad[0] if pad else None,
    )
