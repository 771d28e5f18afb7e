"""A module's weights and the config that describes them, written as a checkpoint that `load` reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pluglm.checkpoint import write_safetensors
from pluglm.contracts.quantizer import Quantizer
from pluglm.weights import export_weights

if TYPE_CHECKING:
    from torch import nn

    from pluglm.build import LoadContext


def write_model(folder: Path, module: nn.Module, context: LoadContext, quantizer: Quantizer | None) -> None:
    """Weights as they are now, and `config.json`, into a new folder.

    Args:
        quantizer: what packed layers of the module; None: all are plain.
    Raises: SaveError.
    """
    given = context.checkpoint.config
    config = {k: v for k, v in given.items() if k not in ("torch_dtype", "quantization_config")}
    config["dtype"] = context.dtype
    if quantizer is not None:
        config["quantization_config"] = quantizer.config()
    write_safetensors(folder, export_weights(module, context.description.weights, quantizer), {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
