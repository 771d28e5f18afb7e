"""The cells of the matrix: which attention, cache and type of layer work together here, and why the others do not."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

# Test folders are no packages (importlib mode), so modules beside this file and those of the parity tests are found so.
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "parity")]

from kit import providers  # noqa: E402
from programs import PROGRAMS, VOCAB, ProgramArchitecture, write_model  # noqa: E402

import pluglm  # noqa: E402
from pluglm.errors import PlanError, PluglmError, UnsupportedRequestError  # noqa: E402
from pluglm.lm import LanguageModel  # noqa: E402
from pluglm.manager import Manager  # noqa: E402
from pluglm.registry import Registry  # noqa: E402
from pluglm.testing.isolation import fake_provider  # noqa: E402

#: Lengths of the prompts of a batch, and tokens after them: together longer than windows, chunks and pages.
PROMPTS, NEW = (17, 6), 12
STRATEGIES = {"greedy": {}, "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 20, "seed": 5}}


@dataclass(frozen=True)
class Cell:
    """One combination. refused: the reason, if the parts refuse it; empty: it loads."""

    attention: str
    layout: str
    layers: str
    refused: str = ""


@cache
def manager() -> Manager:
    """The plugins of this repository, and the one that loads programs."""
    program = fake_provider("architecture", "program", ProgramArchitecture(), facts={})
    return Manager(Registry([*providers(), program]))


def names(kind: str) -> list[str]:
    """Short names of all providers of a kind, sorted."""
    return sorted(provider.name for provider in manager().registry.of(kind))


@cache
def folder(layers: str) -> Path:
    """The checkpoint of one type of layer."""
    return write_model(layers, Path(tempfile.mkdtemp(prefix="pluglm-matrix-")))


def load(attention: str, layout: str, layers: str) -> LanguageModel:
    """The model with these two parts. Raises PlanError or UnsupportedRequestError if they refuse."""
    parts = {} if attention == "none" else {"attention": attention}
    return pluglm.load(
        folder(layers), dtype="float32", device="cpu", cache=layout, executor="executor/eager", manager=manager(),
        **parts,
    )  # fmt: skip


def has_attention(layers: str) -> bool:
    """Whether an attention backend takes part at all."""
    return bool(PROGRAMS[layers].attention_specs())


@cache
def attempt(attention: str, layout: str, layers: str) -> tuple[Cell, LanguageModel | None]:
    """Try one combination, once."""
    try:
        return Cell(attention, layout, layers), load(attention, layout, layers)
    except (PlanError, UnsupportedRequestError) as error:
        return Cell(attention, layout, layers, _reason(error)), None


def cells() -> Iterator[Cell]:
    """Every combination of what this repository has."""
    for layers in PROGRAMS:
        for attention in names("attention") if has_attention(layers) else ["none"]:
            for layout in names("cache"):
                yield attempt(attention, layout, layers)[0]


def prompts() -> list[list[int]]:
    """Two prompts of different lengths."""
    draw = torch.Generator().manual_seed(0)
    return [torch.randint(VOCAB, (length,), generator=draw).tolist() for length in PROMPTS]


def tokens(lm: LanguageModel, rows: list[list[int]], strategy: str, **settings: Any) -> list[list[int]]:
    """New tokens of each row of one call."""
    done = lm.complete(rows, max_new_tokens=NEW, **STRATEGIES[strategy], **settings)
    return [list(completion.token_ids) for completion in (done if isinstance(done, list) else [done])]


def _reason(error: PluglmError) -> str:
    return "; ".join(line.strip() for line in (error.why or error.what).splitlines())
