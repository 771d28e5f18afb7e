"""A kind's contract does not change without its version: what hooks, Protocols and dataclasses look like is recorded.

After a change on purpose: raise the kind's version in `pluglm.kinds` (minor for an addition that an older plugin need not
know of, major otherwise), adapt the plugins, and record it with

    python tests/contracts/test_api_versions.py
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

from pluglm import contracts, hookspecs
from pluglm.contracts import runtime
from pluglm.kinds import KINDS

RECORD = Path(__file__).with_name("api_versions.json")
c = contracts
#: Everything that crosses the border for one kind. What several kinds share counts for each of them.
BORDER: dict[str, tuple[Any, ...]] = {
    "architecture": (
        hookspecs.ArchitectureHooks, c.ModelModule, c.ModelDescription, c.ModelParts, c.ForwardInput, c.ForwardOutput,
        c.EncoderDecoderModule, c.EncoderInput, c.EncoderOutput,
        c.DecoderProgram, c.Embedding, c.Layer, c.Branch, c.Part, c.Attention, c.LatentAttention, c.StateSpace,
        c.FeedForward, c.Experts, c.Norm, c.Rope, c.Head, c.WeightMap, c.WeightRule, c.Transform, c.Split, c.Stack,
        c.SplitGroups, c.Transpose, c.Chain, c.TableReader,
    ),
    "attention": (hookspecs.AttentionHooks, c.AttentionBackend, c.AttentionRequest, c.AttentionSpec, c.MaskSpec,
                  c.KeyInfo, c.KVView, c.DenseView, c.PagedView, c.QuantizedView, c.LatentView),
    "cache": (hookspecs.CacheHooks, c.Cache, c.CacheLayout, c.CacheRequest, c.Step, c.KeyInfo, c.KVSlot, c.LatentSlot,
              c.StateSlot, c.CrossSlot, c.SharedSlot, c.DenseView, c.PagedView, c.QuantizedView, c.LatentView),
    "quantizer": (hookspecs.QuantizerHooks, c.Quantizer, c.QuantizerRequest, c.GroupedWeight, c.RowBlocks,
                  c.GroupedLinear, c.BlockedLinear, c.TableQuantizer, c.BlockedEmbedding),
    "decoding": (hookspecs.DecodingHooks, c.DecodingStrategy, c.DecodingRequest, c.GenerationConfig,
                 c.GenerationOutput, c.Streamer, c.TokenSelector, c.Placed),
    "kernel": (hookspecs.KernelHooks, c.KernelRequest, dict(runtime.KERNEL_OPS)),
    "executor": (hookspecs.ExecutorHooks, c.Executor, c.ExecutorRequest, c.ForwardInput, c.ForwardOutput,
                 c.DecodesAhead, c.DecodeRun, c.Decoded, c.Draw),
    "source": (hookspecs.SourceHooks, c.Source, c.SourceRequest),
    "format": (hookspecs.FormatHooks, c.Checkpoint),
    "tokenizer": (hookspecs.TokenizerHooks, c.Tokenizer, c.TokenizerRequest),
    "constraint": (hookspecs.ConstraintHooks, c.Constraint, c.ConstraintRequest, c.Grammar, c.Matcher),
    "command": (hookspecs.CommandHooks,),
    "hooks": (hookspecs.ObserverHooks,),
}  # fmt: skip


def shape(thing: Any) -> str:
    """What a plugin author can see of one class: fields with types and defaults, methods with signatures."""
    if isinstance(thing, dict):
        return json.dumps(thing, sort_keys=True)
    lines = [thing.__name__]
    if dataclasses.is_dataclass(thing):
        lines += [f"{f.name}: {f.type} = {_default(f)}" for f in dataclasses.fields(thing)]
    else:
        lines += [f"{name}: {kind}" for name, kind in sorted(thing.__annotations__.items())]
    for name, member in sorted(vars(thing).items()):
        if isinstance(member, property):
            assert member.fget is not None
            lines.append(f"property {name}{inspect.signature(member.fget)}")
        elif inspect.isfunction(member) and (not name.startswith("_") or name == "__call__"):
            lines.append(f"def {name}{inspect.signature(member)}")
    return "\n".join(lines)


def _default(f: dataclasses.Field[Any]) -> str:
    if f.default is not dataclasses.MISSING:
        return repr(f.default)
    return "-" if f.default_factory is dataclasses.MISSING else "factory"


def digest(kind: str) -> str:
    """Of everything at one kind's border."""
    return hashlib.sha256("\n\n".join(map(shape, BORDER[kind])).encode()).hexdigest()[:16]


def test_every_kind_that_can_be_built_has_its_border_recorded() -> None:
    assert set(BORDER) == {kind.name for kind in KINDS.values() if kind.hooks or kind.name == "hooks"}
    assert set(json.loads(RECORD.read_text("utf-8"))) == set(BORDER)


@pytest.mark.parametrize("kind", BORDER)
def test_a_contract_changes_together_with_its_version(kind: str) -> None:
    recorded = json.loads(RECORD.read_text("utf-8"))[kind]
    now = {"version": KINDS[kind].version, "digest": digest(kind)}
    if recorded["digest"] != now["digest"]:
        assert recorded["version"] != now["version"], (
            f"the {kind} contract changed, but not its version {now['version']}: raise it in pluglm.kinds"
        )
    assert recorded == now, f"record the new {kind} contract: python tests/contracts/test_api_versions.py"


def test_a_changed_argument_changes_the_digest() -> None:
    class Before:
        def attend(self, q: int, k: int) -> int: ...

    class After:
        def attend(self, q: int, k: int, v: int = 0) -> int: ...

    After.__name__ = Before.__name__
    assert shape(Before) != shape(After)


if __name__ == "__main__":
    found = {kind: {"version": KINDS[kind].version, "digest": digest(kind)} for kind in BORDER}
    RECORD.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
