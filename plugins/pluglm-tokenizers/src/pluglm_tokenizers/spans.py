"""Keeps control tokens out of what users wrote: their strings are cut before the template sees them.

Every occurrence of a control token's text in a user's string gets a mark after its first character. The template works
on strings that are otherwise as they were; the rendered text is then split at the marks and tokenized piece by piece,
so the occurrence never stands in one piece. A string whose end could become a control token together with the text
that the template puts beside it gets a mark there that counts only if it does.

Limits: a template that cuts strings apart and joins them with text of its own could build a control token out of parts
that were none (no published template is known to); a template sees a marked string one character longer; and a
tokenizer that puts a space mark before every text (SentencePiece) may put one where a string was cut.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pluglm.errors import InputError

_PRIVATE = range(0xF0000, 0xFFFFE)
_WORD = re.compile(r"[A-Za-z0-9_-]{1,64}")


class ControlTexts:
    """The texts of all control tokens, and what of them may stand at the ends of a string. Made once a tokenizer."""

    def __init__(self, special: Sequence[str]) -> None:
        self.whole = tuple(text for text in special if len(text) > 1)
        self.single = frozenset(text for text in special if len(text) == 1)
        self._longest = max(map(len, self.whole), default=0)
        self._heads = frozenset(text[:n] for text in self.whole for n in range(1, len(text)))
        self._tails = frozenset(text[n:] for text in self.whole for n in range(1, len(text)))

    def occurrences(self, text: str) -> list[int]:
        """Where a control token's text begins in `text`, overlapping ones included, in order."""
        found = set()
        for special in self.whole:
            start = text.find(special)
            while start >= 0:
                found.add(start)
                start = text.find(special, start + 1)
        return sorted(found)

    def could_end(self, text: str) -> bool:
        """Is an end of `text` the beginning of a control token?"""
        return any(text[-n:] in self._heads for n in range(1, min(self._longest, len(text) + 1)))

    def could_begin(self, text: str) -> bool:
        """Is the beginning of `text` the end of a control token, or all of it a middle?"""
        if any(text[:n] in self._tails for n in range(1, min(self._longest, len(text) + 1))):
            return True
        return len(text) < self._longest and any(text in special[1:] for special in self.whole)


class Escaper:
    """Marks of one chat.

    Args:
        control: of the tokenizer. given: everything whose strings must not hold the marks already.
    """

    def __init__(self, control: ControlTexts, given: Any) -> None:
        self._control = control
        self._cut, self._edge = _unused(given)

    def escaped(self, value: Any) -> Any:
        """Plain data with every string in it marked.

        Raises: InputError for what is no plain data, and for a control token of one character, which cannot be cut.
        """
        if isinstance(value, str):
            return self._marked(value)
        if isinstance(value, Mapping):
            return {self._key(key): self._value(key, item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.escaped(item) for item in value]
        if value is None or isinstance(value, bool | int | float):
            return value
        raise InputError(
            f"a chat template takes plain data, not {type(value).__name__}.",
            why="objects with methods do not belong into a template of a model's author.",
            fix="Pass str, numbers, lists and dicts (a tool as its JSON schema).", argument="messages",
        )  # fmt: skip

    def repaired(self, text: str) -> str:
        """JSON text in which the marks are themselves again, if it was written with ASCII escapes."""
        for mark in (self._cut, self._edge):
            text = text.replace(json.dumps(mark)[1:-1], mark)
        return text

    def pieces(self, rendered: str) -> Iterator[str]:
        """The rendered text, to be tokenized piece by piece."""
        text = self._without_idle_edges(rendered)
        yield from (piece for piece in text.split(self._cut) if piece)

    def _key(self, key: Any) -> str:
        if not isinstance(key, str):
            raise InputError(f"the key {key!r} is no str.", fix="Pass dicts with str keys.", argument="messages")
        return key if _WORD.fullmatch(key) else self._marked(key)

    def _value(self, key: str, item: Any) -> Any:
        """Roles and types are words that templates compare, and some build a token of ("<|" + role + "|>")."""
        word = key in ("role", "type") and isinstance(item, str) and _WORD.fullmatch(item)
        return item if word else self.escaped(item)

    def _marked(self, text: str) -> str:
        control = self._control
        if found := control.single & set(text):
            raise InputError(
                f"a message holds {min(found)!r}, which is a control token of one character.",
                why="it cannot be told from the token.", fix="Take it out of the message.", argument="messages",
            )  # fmt: skip
        for start in reversed(control.occurrences(text)):
            text = text[: start + 1] + self._cut + text[start + 1 :]
        head, tail = len(text) - len(text.lstrip()), len(text.rstrip())
        if tail and control.could_end(text[:tail]):
            text = text[:tail] + self._edge + text[tail:]
        if tail and control.could_begin(text[head:tail]):
            text = text[:head] + self._edge + text[head:]
        return text

    def _without_idle_edges(self, rendered: str) -> str:
        """Edge marks inside what would be a control token become cuts, all others go."""
        if self._edge not in rendered:
            return rendered
        parts = rendered.split(self._edge)
        text, joints = "".join(parts), set()
        at = 0
        for part in parts[:-1]:
            at += len(part)
            joints.add(at)
        cuts = set()
        for start in self._control.occurrences(text):
            longest = max(len(special) for special in self._control.whole if text.startswith(special, start))
            cuts |= joints & set(range(start + 1, start + longest))
        bounds = [0, *sorted(cuts), len(text)]
        return self._cut.join(text[a:b] for a, b in itertools.pairwise(bounds))


def _unused(given: Any) -> tuple[str, str]:
    """Two private-use characters that occur in no string of `given`."""
    used = set().union(*(set(text) for text in _strings(given)), "")
    free = (chr(code) for code in _PRIVATE if chr(code) not in used)
    return next(free), next(free)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _strings(key)
            yield from _strings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _strings(item)
