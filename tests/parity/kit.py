"""Runs one checkpoint here and in Transformers, and a program with one knob broken on the same weights.

Nothing is discovered: the plugins come from this repository's folders, so that what else is installed cannot matter.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from checkpoints import FAMILIES
from torch import Tensor, nn

import pluglm
from pluglm.contracts import AttentionRequest, DecoderProgram, ForwardInput, ModelParts
from pluglm.kinds import GROUPS
from pluglm.lm import LanguageModel
from pluglm.manager import Manager
from pluglm.provider import Provider
from pluglm.registry import Registry

ROOT = Path(__file__).resolve().parents[2]
#: Kinds that a load here needs.
KINDS = ("architecture", "attention", "cache", "decoding", "executor")


def providers() -> list[Provider]:
    """The first-party plugins of this repository, as their pyproject.toml and pluglm.json announce them."""
    found = []
    for folder in sorted(path.parent for path in (ROOT / "plugins").glob("*/pyproject.toml")):
        project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
        manifest = folder / "src" / folder.name.replace("-", "_") / "pluglm.json"
        groups = {group: e for group, e in project.get("entry-points", {}).items() if GROUPS[group] in KINDS}
        if not groups:
            continue
        facts = {(f["kind"], f["name"]): f for f in json.loads(manifest.read_text())["providers"]}
        for group, entries in groups.items():
            kind = GROUPS[group]
            for name, target in entries.items():
                known = facts.get((kind, name))
                where = str(folder / "pyproject.toml")
                found.append(
                    Provider(kind, name, project["name"], project["version"], target, where, known, str(manifest))
                )
    return found


@cache
def manager() -> Manager:
    """These plugins and no others."""
    return Manager(Registry(providers()))


def load(folder: Path, *, attention: str = "eager", layout: str = "dynamic") -> LanguageModel:
    """The checkpoint in float32 on the CPU, through `pluglm.load`."""
    return pluglm.load(
        folder, dtype="float32", device="cpu", attention=attention, cache=layout, decoding="greedy",
        executor="executor/eager", manager=manager(),
    )  # fmt: skip


#: What a backend does not compute, by its own README; the planner must refuse it for a model that needs it.
LACKING = {"eager": frozenset[str](), "sdpa": frozenset({"softcap", "sinks"})}


def lacking(lm: LanguageModel, attention: str) -> list[str]:
    """Features that a model's layers need and a backend lacks, sorted."""
    needed = {feature for spec in lm.model.description.attention for feature in spec.features}
    return sorted(needed & LACKING[attention])


#: Model type -> what makes its reference callable like the others, from the families that need one.
ADAPTERS: dict[str, Callable[[Any], Any]] = {
    kind: adapter for family in FAMILIES for kind, adapter in getattr(family, "ADAPTERS", {}).items()
}


def reference(folder: Path) -> Any:
    """The checkpoint in Transformers. A new object each time: its dynamic rotary positions remember earlier calls."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()
    return ADAPTERS[model.config.model_type](model) if model.config.model_type in ADAPTERS else model


def prompt(length: int, seed: int = 0) -> Tensor:
    """Random token ids [T] of the checkpoints' vocabulary."""
    return torch.randint(0, 131, (length,), generator=torch.Generator().manual_seed(1000 * seed + length))


@torch.no_grad()
def greedy(model: Callable[..., Any], start: Tensor, count: int, *, use_cache: bool) -> tuple[list[int], Tensor]:
    """`count` tokens after a prompt [T], and the logits [count, V] that chose them. Takes either side's model."""
    token_ids, kept, chosen, rows = start[None], None, [], []
    for _ in range(count):
        if use_cache:
            fed = token_ids if kept is None else token_ids[:, -1:]
            output = model(fed, past_key_values=kept, use_cache=True)
            kept = output.past_key_values
        else:
            output = model(token_ids, use_cache=False)
        rows.append(output.logits[0, -1])
        chosen.append(int(rows[-1].argmax()))
        token_ids = torch.cat((token_ids, torch.tensor([[chosen[-1]]])), dim=1)
    return chosen, torch.stack(rows)


@torch.no_grad()
def greedy_ragged(
    lm: LanguageModel, starts: Sequence[Tensor], count: int, *, side: str, use_cache: bool
) -> list[list[int]]:
    """`count` tokens after each of several prompts of different lengths, as one padded batch."""
    rows = [start.tolist() for start in starts]
    token_ids, mask = padded([torch.tensor(row) for row in rows], side)
    kept = None
    if use_cache and lm.model.description.max_seq_len is None:  # then nothing else tells a static cache its capacity
        kept = lm.model.new_cache(batch_size=len(rows), capacity=token_ids.shape[1] + count)
    for _ in range(count):
        output = lm.model(token_ids, attention_mask=mask, past_key_values=kept, use_cache=use_cache)
        real = mask[:, -token_ids.shape[1] :]
        last = (real * torch.arange(1, real.shape[1] + 1)).argmax(dim=1)  # [B], the last real cell of this call
        new = output.logits[torch.arange(len(rows)), last].argmax(dim=-1)
        for row, token in zip(rows, new.tolist(), strict=True):
            row.append(token)
        if use_cache:
            kept, token_ids = output.past_key_values, new[:, None]
            mask = torch.cat((mask, torch.ones_like(token_ids)), dim=1)
        else:
            token_ids, mask = padded([torch.tensor(row) for row in rows], side)
    return [row[-count:] for row in rows]


def padded(rows: Sequence[Tensor], side: str, pad: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths as one batch: (token ids [B, T], attention mask [B, T])."""
    longest = max(len(row) for row in rows)
    token_ids, mask = torch.full((len(rows), longest), pad), torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(None, len(row))
        token_ids[i, place] = row
        mask[i, place] = 1
    return token_ids, mask


def build(program: DecoderProgram, lm: LanguageModel) -> nn.Module:
    """The module of a program, with empty weights."""
    from pluglm_attention_eager import pluglm_build_attention
    from pluglm_blocks import build_decoder

    specs = program.attention_specs()
    backend = pluglm_build_attention(request=AttentionRequest(specs, "cpu", "float32"))
    description = replace(lm.model.description, program=program, attention=specs, slots=program.slots)
    module: Any = build_decoder(program, ModelParts(description, backend, {}, "cpu", "float32"))
    return module.eval()


@torch.no_grad()
def run(module: nn.Module, token_ids: Tensor) -> Tensor:
    """[B, T, V] of one pass without a cache."""
    positions = torch.arange(token_ids.shape[1])[None]
    found: Tensor = module(ForwardInput(token_ids, positions, None, dense=True)).logits
    return found
