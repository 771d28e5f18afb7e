"""Rotary positions in a config -> `Rope`, or one for each layer type: two spellings, seven methods, nothing guessed.

Transformers 4 writes `rope_theta` beside `rope_scaling`, 5 writes both into `rope_parameters`. Which numbers a method
has, and what stands in for those a file leaves out, follows `modeling_rope_utils` of Transformers 5.23.0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pluglm.checkpoint.config_reader import REQUIRED, ConfigReader, Type
from pluglm.contracts.program import Rope
from pluglm_blocks.reading.config import refuse

_LENGTH = {"original_max_position_embeddings": (int, None)}

#: Method -> its numbers: key -> (type, default); None: may be left out.
METHODS: dict[str, dict[str, tuple[Type, Any]]] = {
    "default": {},
    "linear": {"factor": (float, REQUIRED)},
    "dynamic": {"factor": (float, REQUIRED)},
    "yarn": {
        "factor": (float, None), "attention_factor": (float, None), "beta_fast": (float, None),
        "beta_slow": (float, None), "mscale": (float, None), "mscale_all_dim": (float, None),
        "truncate": (bool, None), **_LENGTH,
    },
    "longrope": {
        "factor": (float, None), "attention_factor": (float, None), "short_factor": (list, REQUIRED),
        "long_factor": (list, REQUIRED), **_LENGTH,
    },
    "llama3": {
        "factor": (float, REQUIRED), "low_freq_factor": (float, REQUIRED), "high_freq_factor": (float, REQUIRED),
        **_LENGTH,
    },
    "proportional": {"factor": (float, None), "partial_rotary_factor": (float, None)},
}  # fmt: skip

Number = float | int | bool | tuple[float, ...]


#: Names in the files -> methods.
EVERY: dict[str, str] = {name: name for name in METHODS}


@dataclass(frozen=True)
class _Around:
    """What stands beside the objects that describe a rotation, and is said inside them in other files."""

    theta_key: str
    theta: float | None
    part: float | None = None
    length: int | None = None


@dataclass(frozen=True)
class _Said:
    """One rotation in the file's words. part: of each head, the rest is not rotated; None: nothing is said."""

    kind: str
    theta: float
    numbers: dict[str, Number]
    part: float | None


def read_rope(
    reader: ConfigReader,
    *,
    head_dim: int,
    max_positions: int,
    theta: float = 10_000.0,
    partial: float | None = None,
    interleaved: bool = False,
    length: int | None = None,
    methods: Mapping[str, str] = EVERY,
) -> Rope:
    """Read the rotary positions of one model.

    Args:
        head_dim: of a head, or of that part of it which is rotated. max_positions: `max_position_embeddings`.
        theta: base where the file has none.
        partial: the family may rotate the first dimensions of a head only; which part, where the file does not say.
            None: it rotates whole heads, and a file that says otherwise is refused.
        interleaved: as in `Rope`.
        length: `original_max_position_embeddings` where the file has none beside the rotation's own numbers (Phi-3).
        methods: names that the family's files may use -> the method that is meant ("su": "longrope").
    Raises: ConfigError for an unknown method, a number it lacks or does not have, or two spellings that disagree.
    """
    around = _Around(
        "rope_theta",
        reader.take("rope_theta", float, None),
        reader.take("partial_rotary_factor", float, None),
        reader.take("original_max_position_embeddings", int, length),
    )
    inners = {key: reader.sub(key) for key in ("rope_parameters", "rope_scaling")}
    said = _said(inners, around, theta, methods)
    return _rope(said, head_dim, max_positions, partial=partial, interleaved=interleaved)


def read_ropes(
    reader: ConfigReader, *, head_dim: int, max_positions: int, bases: Mapping[str, tuple[str, float]], scaled: str
) -> dict[str, Rope]:
    """Read rotary positions that differ by layer type (Gemma 3): whole heads, by layer type.

    Transformers 5 writes `rope_parameters` with one object a layer type; 4 writes one base a layer type, and one
    `rope_scaling`.

    Args:
        head_dim, max_positions: as in `read_rope`.
        bases: layer type -> (the older key of its base, its base where the file has none).
        scaled: the layer type that `rope_scaling` is about.
    Raises: ConfigError as `read_rope`.
    """
    by_type = reader.sub("rope_parameters")
    ropes = {}
    for layer_type, (key, theta) in bases.items():
        around = _Around(key, reader.take(key, float, None))
        inners = {} if by_type is None else {f"rope_parameters.{layer_type}": by_type.sub(layer_type)}
        if layer_type == scaled:
            inners["rope_scaling"] = reader.sub("rope_scaling")
        ropes[layer_type] = _rope(_said(inners, around, theta, EVERY), head_dim, max_positions)
    return ropes


def stretched(rope: Rope) -> int:
    """Positions that the model is made for once its rotary positions are stretched: factor × the length before."""
    numbers: dict[str, Any] = dict(rope.parameters)
    assert rope.max_seq_len is not None, "read_rope always says it"
    before = numbers.get("original_max_position_embeddings", rope.max_seq_len)
    return max(rope.max_seq_len, int(before * numbers.get("factor", 1.0)))


def _said(
    inners: Mapping[str, ConfigReader | None], around: _Around, theta: float, methods: Mapping[str, str]
) -> _Said:
    """What the objects say, each with what stands around it; all of them the same. theta: where none says it."""
    found: dict[str, _Said] = {}
    for key, inner in inners.items():
        if inner is None:
            continue
        kind = _kind(inner, key, methods)
        inside = inner.take("rope_theta", float, None)
        base = _agreed(f"{key}.rope_theta", inside, around.theta_key, around.theta)
        found[key] = _Said(kind, theta if base is None else base, *_numbers(inner, key, kind, around))
    said = list(found.values()) or [_Said("default", theta if around.theta is None else around.theta, {}, around.part)]
    if said[0] != said[-1]:
        refuse("rope_scaling", f"The config has {' and '.join(found)}, and they differ.", "Expected one.")
    if said[0].theta <= 0:
        what = f"The config has a {around.theta_key} of {said[0].theta}."
        refuse(around.theta_key, what, "Expected a number above zero.")
    return said[0]


def _rope(
    said: _Said, head_dim: int, max_positions: int, *, partial: float | None = None, interleaved: bool = False
) -> Rope:
    numbers = dict(said.numbers)
    dim = head_dim if said.kind == "proportional" else _rotated(said.part, head_dim, partial)
    _complete(said.kind, numbers, dim, max_positions)
    return Rope(said.kind, float(said.theta), dim, interleaved, tuple(sorted(numbers.items())), max_positions)


def _kind(inner: ConfigReader, key: str, methods: Mapping[str, str]) -> str:
    names = [inner.choice(name, methods, None) for name in ("rope_type", "type")]
    kind, older = (None if name is None else methods[name] for name in names)
    return _agreed(f"{key}.rope_type", kind, f"{key}.type", older) or "default"


def _agreed(key: str, value: Any, other_key: str, other: Any) -> Any:
    """Whichever of two spellings is there; both only if they say the same."""
    if value is not None and other is not None and value != other:
        refuse(key, f"The config has {key} = {value!r} and {other_key} = {other!r}.", "They mean one thing.")
    return other if value is None else value


def _rotated(part: float | None, head_dim: int, default: float | None) -> int:
    """How many dimensions of a head are rotated."""
    if default is None:
        if part not in (None, 1.0):
            why = "This architecture rotates whole heads (1.0)."
            refuse("partial_rotary_factor", f"The config rotates {part} of each head.", why)
        return head_dim
    part = default if part is None else part
    dim = int(head_dim * part)
    if not 0 < dim <= head_dim or dim % 2:
        why = f"That is {dim} of {head_dim} dimensions; pairs of them are turned."
        refuse("partial_rotary_factor", f"The config rotates {part} of each head.", why)
    return dim


def _numbers(inner: ConfigReader, key: str, kind: str, around: _Around) -> tuple[dict[str, Number], float | None]:
    """The method's numbers, and which part of a head is rotated (of `proportional` it is a number of the method)."""
    numbers: dict[str, Any] = {name: inner.take(name, *wanted) for name, wanted in METHODS[kind].items()}
    inside = inner.take("partial_rotary_factor", float, None)
    part = _agreed(f"{key}.partial_rotary_factor", inside, "partial_rotary_factor", around.part)
    if kind == "proportional":
        numbers["partial_rotary_factor"], part = part, None
    if "original_max_position_embeddings" in METHODS[kind]:
        name = "original_max_position_embeddings"
        numbers[name] = _agreed(f"{key}.{name}", numbers[name], name, around.length)
    return {name: tuple(v) if isinstance(v, list) else v for name, v in numbers.items() if v is not None}, part


def _complete(kind: str, numbers: dict[str, Number], head_dim: int, max_positions: int) -> None:
    """Write in what the method derives from the lengths, and check what it could not compute with."""
    if "original_max_position_embeddings" in METHODS[kind]:
        length = numbers.setdefault("original_max_position_embeddings", max_positions)
        assert isinstance(length, int)
        if length <= 0:
            why = "Expected a whole number above zero."
            refuse("original_max_position_embeddings", f"The model's length before stretching is {length}.", why)
        if kind in ("yarn", "longrope"):
            numbers.setdefault("factor", max_positions / length)
    for name in ("short_factor", "long_factor"):
        if name in numbers:
            numbers[name] = _factors(name, numbers[name], head_dim // 2)
    for name in ("factor", "attention_factor", "beta_fast", "beta_slow", "low_freq_factor", "high_freq_factor"):
        value = numbers.get(name, 1.0)
        assert isinstance(value, float | int)
        if value <= 0:
            refuse(name, f"The rotary positions have a {name} of {value}.", "Expected a number above zero.")
    if kind == "llama3" and not numbers["high_freq_factor"] > numbers["low_freq_factor"]:  # type: ignore[operator]
        refuse("high_freq_factor", "The config's high_freq_factor is not above its low_freq_factor.", "It must be.")


def _factors(name: str, values: Any, pairs: int) -> tuple[float, ...]:
    """One factor for each pair of a head's dimensions."""
    fit = len(values) == pairs and all(type(value) in (int, float) and value > 0 for value in values)
    if not fit:
        why = f"Expected {pairs} numbers above zero, one for each pair of a head's dimensions."
        refuse(name, f"The config's {name} has {len(values)} entries that cannot all be used.", why)
    return tuple(float(value) for value in values)
