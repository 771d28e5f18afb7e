"""Checkpoints with random weights, and the folder where they and their GGUF files are kept between runs."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers.shapes import GGUF_BYTES, SHAPES, matrix_elements, weight_shapes

#: Changes with what is written for a shape, so that no older file is taken for it.
RECIPE = "1"


class CannotMakeError(Exception):
    """A file that a contender needs cannot be made here; the text is the reason that the table gives."""


@dataclass(frozen=True)
class Model:
    """One model to measure.

    Attributes:
        name: as on the command line. config: its config.json. folder: safetensors, for pluglm and Transformers.
        store: where its GGUF files are kept. trained: its weights are not random.
    """

    name: str
    config: Mapping[str, Any]
    folder: Path
    store: Path
    trained: bool = False


def find_model(name: str, cache: Path) -> Model:
    """The model of a name, made if it is not there yet. Raises: CannotMakeError."""
    if name == "pystdlib":
        from pluglm_model_pystdlib import __file__ as package

        folder = Path(package).parent / "checkpoint"
        digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()[:12]
        config = json.loads((folder / "config.json").read_text("utf-8"))
        return Model(name, config, folder, cache / f"{name}-{digest}", trained=True)
    config = SHAPES[name]
    digest = hashlib.sha256((RECIPE + json.dumps(config, sort_keys=True)).encode()).hexdigest()[:12]
    store = cache / f"{name}-{digest}"
    folder = store / "checkpoint"
    if not folder.is_dir():
        need_room(store, 2 * matrix_elements(config))
        part = store / "checkpoint.part"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        write_random(config, part)
        part.rename(folder)
    return Model(name, config, folder, store)


def write_random(config: Mapping[str, Any], folder: Path) -> None:
    """Seeded weights in bfloat16. Matrices are N(0, 1 / columns), which keeps the scale of what goes through them.

    So logits have a standard deviation of about 1 and depend on the whole prompt: neither flat nor ruled by one token.
    """
    import torch
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in weight_shapes(config).items():
        noise = torch.randn(shape, generator=draw)
        weights[name] = (1 + 0.1 * noise if len(shape) == 1 else noise.mul_(shape[-1] ** -0.5)).to(torch.bfloat16)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")


def find_gguf(model: Model, kind: str, python: Path) -> Path:
    """The model's weights as a GGUF file of one type, written by another Python that has the package gguf.

    Raises: CannotMakeError.
    """
    path = model.store / f"{kind}.gguf"
    if path.is_file():
        return path
    need_room(model.store, int(matrix_elements(model.config) * GGUF_BYTES[kind]))
    part = path.with_suffix(".part")
    writer = Path(__file__).with_name("write_gguf.py")
    done = subprocess.run(
        [str(python), str(writer), str(model.folder), str(part), kind], capture_output=True, text=True, check=False
    )
    if done.returncode:
        part.unlink(missing_ok=True)
        raise CannotMakeError(f"no {kind}.gguf: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    part.rename(path)
    return path


def need_room(folder: Path, count: int) -> None:
    """Raises CannotMakeError if `count` bytes and a little more have no room on the folder's disk."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < count * 1.1 + 64e6:
        raise CannotMakeError(f"{count / 1e9:.1f} GB are wanted in {folder}, {free / 1e9:.1f} GB are free")
