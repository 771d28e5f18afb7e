"""What was measured on this machine: a small file of times, which orders the candidates of `auto` within a tier.

`pluglm measure` writes it. A score counts for the version, device and dtype it was measured with; a provider without
one comes after those that have one, and without a file the order is by id. What it decides is said in the plan.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from pluglm.errors import PluginError, SaveError
from pluglm.provider import Provider
from pluglm.state import state_path


@dataclass(frozen=True, slots=True)
class Score:
    """One provider, measured.

    Attributes:
        provider: id. version: of its distribution. device: as `device_name` says it. dtype: torch name.
        token_ms: median time of a decoded token in milliseconds, with this provider and the other parts as planned.
        model: what was run. date: ISO 8601, UTC.
    """

    provider: str
    version: str
    device: str
    dtype: str
    token_ms: float
    model: str
    date: str


@dataclass(frozen=True)
class Scores:
    """All scores of one machine; the default is none."""

    entries: tuple[Score, ...] = ()

    def of(self, provider: Provider, *, device: str | None, dtype: str | None) -> Score | None:
        """The score of this version of a provider on a device and dtype, or None."""
        if device is None or not self.entries:
            return None
        wanted = (provider.id, provider.version, device_name(device), dtype)
        return next((s for s in self.entries if (s.provider, s.version, s.device, s.dtype) == wanted), None)

    def with_(self, measured: Iterable[Score]) -> Scores:
        """These scores and new ones; a new one replaces that of the same provider, device and dtype."""
        new = tuple(measured)
        replaced = {(s.provider, s.device, s.dtype) for s in new}
        return Scores(tuple(s for s in self.entries if (s.provider, s.device, s.dtype) not in replaced) + new)


def device_name(device: str) -> str:
    """A torch device string -> what its scores are filed under: "cpu", or the type and the name of the card."""
    kind, _, index = device.partition(":")
    if kind != "cuda":
        return kind
    import torch  # a load that computes on a card imports it anyway

    return f"cuda {torch.cuda.get_device_name(int(index or 0))}"


def scores_path() -> str:
    """scores.json beside the list of disabled plugins (`pluglm.state.state_path`)."""
    return os.path.join(os.path.dirname(state_path()), "scores.json")  # noqa: PTH118, PTH120 - as in `state`


def load_scores(path: str | Path | None = None) -> Scores:
    """Read the scores; an absent file holds none.

    Raises: PluginError if the file cannot be understood: an order that nobody can explain helps no one.
    """
    place = Path(path or scores_path())
    try:
        decoded = json.loads(place.read_text("utf-8"))
        if decoded["schema"] != 1:
            raise ValueError(f"it has schema {decoded['schema']!r}, not 1")
        entries = tuple(Score(**entry) for entry in decoded["scores"])
        if not all(0 < score.token_ms < float("inf") for score in entries):
            raise ValueError("a time is not a number above zero")
    except FileNotFoundError:
        return Scores()
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PluginError(
            f"the measured scores, {place}, cannot be read.",
            why=f"{type(error).__name__}: {error}",
            fix="Delete the file, or run `pluglm measure --forget`; `pluglm measure KIND` measures again.",
            path=place,
        ) from error
    return Scores(entries)


def save_scores(scores: Scores, path: str | Path | None = None) -> Path:
    """Write the scores, replacing the file in one step. Raises SaveError; the old file is then intact."""
    place = Path(path or scores_path())
    text = json.dumps({"schema": 1, "scores": [asdict(s) for s in scores.entries]}, indent=2) + "\n"
    temporary = place.with_name(f".{place.name}.{os.getpid()}")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(text, "utf-8")
        temporary.replace(place)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise SaveError(
            f"{place} was not written; the scores have not changed.",
            why=str(error),
            fix="Make its folder writable, or set PLUGLM_CONFIG_DIR to one that is.",
            path=place,
        ) from error
    return place


def forget_scores(path: str | Path | None = None) -> bool:
    """Delete the file. Returns whether there was one. Raises SaveError."""
    place = Path(path or scores_path())
    try:
        place.unlink()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SaveError(f"{place} was not deleted.", why=str(error), fix="Delete it yourself.", path=place) from error
    return True
