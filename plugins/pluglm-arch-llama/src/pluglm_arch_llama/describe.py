"""config.json -> `ModelDescription`, without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pluglm.contracts import ModelDescription
from pluglm.errors import ConfigError
from pluglm_arch_llama.config import Config, token_ids
from pluglm_arch_llama.families import FAMILIES
from pluglm_arch_llama.weights import weight_map


def describe(config: Mapping[str, Any]) -> ModelDescription:
    """Describe one model.

    Raises: ConfigError if its type is not one of `FAMILIES`, or if a key is missing, wrong, or read by nobody.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        found = "no model_type" if model_type is None else f"the model_type {model_type!r}"
        raise ConfigError(
            f"The config has {found}.",
            why=f"pluglm-arch-llama reads {', '.join(FAMILIES)}.",
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
        weights=weight_map(program),
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
