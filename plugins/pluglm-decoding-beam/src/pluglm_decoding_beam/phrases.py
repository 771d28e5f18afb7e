"""Phrases that a completion must hold: as users write them, checked, as tuples of alternatives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations
from typing import Any

from pluglm.contracts import GenerationConfig
from pluglm.errors import InputError

PHRASE_FIELDS = frozenset({"force_words_ids", "constraints"})
#: One phrase: its tokens in a row.
Phrase = tuple[int, ...]
#: What one constraint asks for: any one of these phrases.
Alternatives = tuple[Phrase, ...]


@dataclass(frozen=True)
class PhrasalConstraint:
    """The completion holds these tokens, in a row.

    Attributes:
        token_ids: at least one; lists become tuples.
    """

    token_ids: Sequence[int]

    def __post_init__(self) -> None:
        object.__setattr__(self, "token_ids", _phrase(self.token_ids, "constraints"))

    @property
    def alternatives(self) -> Alternatives:
        """One."""
        return (tuple(self.token_ids),)


@dataclass(frozen=True)
class DisjunctiveConstraint:
    """The completion holds one of these phrases, or more.

    Attributes:
        nested_token_ids: phrases, none of which begins another: the longer one could never make a difference.
    """

    nested_token_ids: Sequence[Sequence[int]]

    def __post_init__(self) -> None:
        object.__setattr__(self, "nested_token_ids", _alternatives(self.nested_token_ids, "constraints"))

    @property
    def alternatives(self) -> Alternatives:
        """All."""
        return tuple(tuple(phrase) for phrase in self.nested_token_ids)


def read_phrases(config: GenerationConfig, *, vocab_size: int, eos: Sequence[int]) -> tuple[Alternatives, ...]:
    """What `force_words_ids` and `constraints` ask for together; () if neither is said.

    Args:
        eos: end tokens; a phrase cannot hold one, since nothing follows it.
    Raises: InputError for what is no phrase, for ids that cannot occur, and for a constraint that is there twice.
    """
    found: list[Alternatives] = []
    for name in ("force_words_ids", "constraints"):
        said = config.extra.get(name)
        if said is None:
            continue
        if not isinstance(said, list | tuple) or not said:
            raise _senseless(name, said, "a list with one entry at least")
        found += [_read(name, entry) for entry in said]
        for phrase in (phrase for alternatives in found for phrase in alternatives):
            for token in phrase:
                if token >= vocab_size or token in eos:
                    why = "an end token" if token in eos else f"outside the vocabulary of {vocab_size}"
                    raise InputError(
                        f"{name} holds the phrase {list(phrase)}, and token {token} is {why}.",
                        fix="Pass ids of this model's tokenizer, without special tokens.", argument=name,
                    )  # fmt: skip
        for i, alternatives in enumerate(found):
            if set(alternatives) in map(set, found[:i]):
                raise InputError(
                    f"{name} asks for {_shown(alternatives)} twice.",
                    why="a completion holds a phrase or does not; how often is not counted.",
                    fix="Leave one out, or ask for the phrase with what stands between its occurrences.",
                    argument=name,
                )
    return tuple(found)


def _read(name: str, entry: Any) -> Alternatives:
    if name == "constraints":
        if isinstance(entry, PhrasalConstraint | DisjunctiveConstraint):
            return entry.alternatives
        raise _senseless(name, entry, "a list of PhrasalConstraint and DisjunctiveConstraint")
    if isinstance(entry, list | tuple) and entry and isinstance(entry[0], list | tuple):
        return _alternatives(entry, name)
    return (_phrase(entry, name),)


def _phrase(value: Any, name: str) -> Phrase:
    if not isinstance(value, list | tuple) or not value or any(type(i) is not int or i < 0 for i in value):
        raise _senseless(name, value, "token ids, one at least, none below 0, for each phrase")
    return tuple(value)


def _alternatives(value: Any, name: str) -> Alternatives:
    if not isinstance(value, list | tuple) or not value:
        raise _senseless(name, value, "a list of phrases for each choice")
    found = tuple(_phrase(phrase, name) for phrase in value)
    for one, other in permutations(found, 2):
        if other[: len(one)] == one:
            raise InputError(
                f"{name} offers {list(one)} and {list(other)} for one constraint.",
                why="the first begins the second, so it is there whenever the second is.",
                fix="Leave the longer one out, or make two constraints of them.", argument=name,
            )  # fmt: skip
    return found


def _shown(alternatives: Alternatives) -> str:
    return " or ".join(str(list(phrase)) for phrase in alternatives)


def _senseless(name: str, value: object, rule: str) -> InputError:
    return InputError(f"{name}={value!r} makes no sense: it must be {rule}.", argument=name)
