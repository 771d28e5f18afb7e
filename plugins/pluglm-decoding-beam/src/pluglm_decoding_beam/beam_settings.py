"""What only beam searches are told: how many beams and groups, when a search ends, what length is worth."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

from pluglm.contracts import GenerationConfig
from pluglm.errors import InputError

BEAM_FIELDS = frozenset({"num_beams", "length_penalty", "early_stopping"})
GROUP_FIELDS = frozenset({"num_beam_groups", "diversity_penalty"})
#: Where neither the call nor the model's files say how many.
DEFAULT_BEAMS = 4
#: Vijayakumar et al. 2018, section 5: 0.2 to 0.8 suits most tasks.
DEFAULT_DIVERSITY = 0.5
#: length ** 10 is a number for every length; nothing beyond means anything.
_STEEPEST = 10

EarlyStopping = bool | Literal["never"]


@dataclass(frozen=True)
class BeamSettings:
    """One call's beams.

    Attributes:
        width: beams of one search, that is of one group of one prompt. groups: searches of each prompt.
        length_penalty: a hypothesis' score is the sum of its scores / (new tokens) ** length_penalty.
        early_stopping: when a search that holds `width` ended hypotheses ends. True: at once. False: when its best
            beam could not enter if it ended now. "never": when it could not enter at the length that suits it best.
        diversity_penalty: taken off a token's score each time an earlier group has chosen it at this step.
    """

    width: int
    groups: int
    length_penalty: float
    early_stopping: EarlyStopping
    diversity_penalty: float

    @property
    def beams(self) -> int:
        """Rows of the batch that each prompt has."""
        return self.width * self.groups


def read_beam_settings(config: GenerationConfig, *, grouped: bool) -> BeamSettings:
    """Take the beam fields out of `config.extra`.

    Args:
        grouped: whether there are groups; one beam a group by default, as in section 5 of the paper.
    Raises: InputError for values that make no sense.
    """
    said = config.extra
    beams = _count(said, "num_beams", DEFAULT_BEAMS)
    copies = config.num_return_sequences or 1
    if copies > beams:
        raise InputError(
            f"num_return_sequences={copies} is more than num_beams={beams}.",
            why="a search ends with one hypothesis for each beam.",
            fix="Raise num_beams, or ask for fewer sequences.", argument="num_return_sequences",
        )  # fmt: skip
    penalty = _number(said, "length_penalty", 1.0)
    if abs(penalty) > _STEEPEST:
        raise _senseless("length_penalty", penalty, f"a number from {-_STEEPEST} to {_STEEPEST}")
    early = said.get("early_stopping", False)
    if not (isinstance(early, bool) or early == "never"):
        raise _senseless("early_stopping", early, 'True, False or "never"')
    if not grouped:
        return BeamSettings(beams, 1, penalty, early, 0.0)
    groups = _count(said, "num_beam_groups", beams)
    if beams % groups:
        raise InputError(
            f"num_beams={beams} cannot be shared out to num_beam_groups={groups}.", why="groups are equally large.",
            fix=f"Make num_beams a multiple of {groups}.", argument="num_beam_groups",
        )  # fmt: skip
    diversity = _number(said, "diversity_penalty", DEFAULT_DIVERSITY)
    if diversity <= 0:
        raise _senseless("diversity_penalty", diversity, "a number > 0; without it all groups are the same")
    return BeamSettings(beams // groups, groups, penalty, early, diversity)


def _count(said: Any, name: str, default: int) -> int:
    value = said.get(name, default)
    if type(value) is not int or value < 1:
        raise _senseless(name, value, "an integer >= 2")
    if value == 1:
        raise InputError(
            f"{name}=1 is no {'beam search' if name == 'num_beams' else 'diverse beam search'}.",
            why="one beam is greedy decoding." if name == "num_beams" else "one group is an ordinary beam search.",
            fix=f'Raise {name}, or leave it out and name decoding="{"greedy" if name == "num_beams" else "beam"}".',
            argument=name,
        )  # fmt: skip
    return value


def _number(said: Any, name: str, default: float) -> float:
    value = said.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _senseless(name, value, "a finite number")
    return float(value)


def _senseless(name: str, value: object, rule: str) -> InputError:
    return InputError(f"{name}={value!r} makes no sense: it must be {rule}.", argument=name)
