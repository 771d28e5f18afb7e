"""The Plan: which provider does what, and why. Frozen, readable, JSON in and out, with a stable hash."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from pluglm.errors import PlanError

PLAN_SCHEMA = 1


@dataclass(frozen=True)
class Rejected:
    """A candidate that was not chosen. reasons: all of them."""

    provider: str
    version: str
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Choice:
    """One part of the plan.

    Attributes:
        kind: of the part. requested: what the user wrote, or "auto".
        provider: the chosen id; None: nothing plays this part, and `reason` says why.
        version: of its distribution.
        variant: after the colon. options: keyword options, sorted.
        reason: why this one.
        rejected: the others, in the order they were considered.
    """

    kind: str
    requested: str
    provider: str | None
    version: str | None
    reason: str
    variant: str | None = None
    options: tuple[tuple[str, Any], ...] = ()
    rejected: tuple[Rejected, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Everything that was decided before a weight was read.

    Attributes:
        model: as the user named it. fingerprint: of its files. model_type: from its config.
        device, dtype: where and in which dtype it runs; `notes` say why, if that was not asked for.
    """

    model: str
    fingerprint: str
    model_type: str
    device: str
    dtype: str
    choices: tuple[Choice, ...]
    notes: tuple[str, ...] = ()
    schema: int = PLAN_SCHEMA

    def __getitem__(self, kind: str) -> Choice:
        """The choice of one kind ("attention"), or of one kernel ("kernel:rope")."""
        for choice in self.choices:
            if choice.kind == kind:
                return choice
        raise PlanError(f"this plan has no part {kind!r}.", why=f"it has {', '.join(c.kind for c in self.choices)}.")

    @property
    def hash(self) -> str:
        """sha256 over what decides the result: providers, versions, variants, options, device, dtype, fingerprint.

        The model's location, reasons and rejected candidates do not count, so two machines that would do the same work
        have the same hash.
        """
        data = {
            "schema": self.schema, "fingerprint": self.fingerprint, "device": self.device, "dtype": self.dtype,
            "choices": [[c.kind, c.provider, c.version, c.variant, c.options] for c in self.choices],
        }  # fmt: skip
        text = json.dumps(data, sort_keys=True, separators=(",", ":"), default=repr)
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """Plain JSON, with the hash."""
        return {**asdict(self), "hash": self.hash}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Plan:
        """The inverse of `to_json`. Raises PlanError if the schema differs or the hash does not fit."""
        if data.get("schema") != PLAN_SCHEMA:
            raise PlanError(
                f"this plan has schema {data.get('schema')!r}; this pluglm reads {PLAN_SCHEMA}.",
                fix="Make the plan again with `pluglm explain MODEL --json`.",
            )
        try:
            choices = tuple(
                Choice(**{
                    **c,
                    "options": tuple((k, _tuples(v)) for k, v in c["options"]),
                    "rejected": tuple(
                            Rejected(r["provider"], r["version"], tuple(r["reasons"])) for r in c["rejected"]
                        ),
                })
                for c in data["choices"]
            )  # fmt: skip
            fields = {k: v for k, v in data.items() if k not in ("choices", "hash", "notes")}
            plan = cls(**fields, choices=choices, notes=tuple(data["notes"]))
        except (KeyError, TypeError) as e:
            raise PlanError("this JSON is not a plan.", why=f"{type(e).__name__}: {e}") from e
        if plan.hash != data.get("hash"):
            raise PlanError(
                "this plan was changed after it was made.",
                why=f"its content hashes to {plan.hash[:12]}…, it says {str(data.get('hash'))[:12]}….",
                fix="Make the plan again; edit the arguments of `load`, not the plan.",
            )
        return plan

    def __str__(self) -> str:
        lines = [f"{self.model} ({self.model_type}) on {self.device} in {self.dtype}, plan {self.hash[:12]}"]
        lines += [f"  note: {note}" for note in self.notes]
        for c in self.choices:
            chosen = f"{c.provider} {c.version}" if c.provider else "-"
            variant = f":{c.variant}" if c.variant else ""
            lines.append(f"  {c.kind}={c.requested} -> {chosen}{variant}")
            lines.append(f"      {c.reason}")
            lines += [f"      not {r.provider} {r.version}: {'; '.join(r.reasons)}" for r in c.rejected]
        return "\n".join(lines)


def _tuples(value: Any) -> Any:
    return tuple(_tuples(v) for v in value) if isinstance(value, list) else value
