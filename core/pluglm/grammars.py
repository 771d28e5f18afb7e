"""What users pass as `constraint`, as grammars: one a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from pluglm.contracts.constraint import Grammar
from pluglm.errors import GrammarError, InputError


def read_grammars(constraint: Any, count: int, *, single: bool) -> tuple[Grammar | None, ...]:
    """The grammar of each of `count` prompts; None where anything goes.

    Args:
        constraint: {"json_schema": schema}, {"json": True}, {"regex": expression}, {"choice": [texts]},
            {"lark": grammar}, or a Grammar, for all prompts; or a list of these and None, one a prompt.
        single: the user passed one prompt and not a list.
    Raises: InputError for another form, GrammarError for one whose content makes no sense.
    """
    if not isinstance(constraint, list | tuple):
        return (_grammar(constraint),) * count
    if single or len(constraint) != count:
        raise InputError(
            f"constraint is a list of {len(constraint)}, and {'one prompt was' if single else f'{count} prompts were'} "
            "passed.",
            why="a list has one grammar (or None) for each prompt of a list.",
            fix="Pass as many, or one grammar for all.", argument="constraint",
        )  # fmt: skip
    return tuple(None if one is None else _grammar(one) for one in constraint)


def _grammar(constraint: Any) -> Grammar:
    if isinstance(constraint, Grammar):
        return constraint
    if isinstance(constraint, Mapping) and len(constraint) == 1:
        ((kind, content),) = constraint.items()
        if kind in _READERS:
            return Grammar(kind, _READERS[kind](content))
    raise InputError(
        f"constraint={constraint!r} is no grammar.",
        fix='Write {"json_schema": {…}}, {"json": True}, {"regex": "…"}, {"choice": ["…", "…"]} or {"lark": "…"}; for '
        "several prompts one for all, or a list.",
        argument="constraint",
    )  # fmt: skip


def _schema(content: Any) -> str:
    if isinstance(content, str):
        try:
            content = json.loads(content)
        except ValueError as e:
            raise _senseless("json_schema", f"it is no JSON: {e}") from e
    if not isinstance(content, Mapping | bool):
        raise _senseless("json_schema", f"a schema is an object, true or false, and this is {content!r}")
    try:
        return json.dumps(content, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as e:
        raise _senseless("json_schema", f"it cannot be written as JSON: {e}") from e


def _json(content: Any) -> str:
    if content is not True:
        raise _senseless("json", f'the only form is {{"json": True}}, and this is {content!r}')
    return ""


def _choice(content: Any) -> str:
    if not isinstance(content, list | tuple) or not content or not all(isinstance(text, str) for text in content):
        raise _senseless("choice", f"it must be a list of at least one text, and this is {content!r}")
    return json.dumps(list(content), ensure_ascii=False)


def _text(kind: str) -> Callable[[Any], str]:
    def read(content: Any) -> str:
        if not isinstance(content, str):
            raise _senseless(kind, f"it must be a text, and this is {content!r}")
        return content

    return read


def _senseless(kind: str, why: str) -> GrammarError:
    return GrammarError(
        f"the {kind} of the constraint makes no sense.", why=why, fix="Correct it.", argument="constraint", grammar=kind
    )


_READERS: Mapping[str, Callable[[Any], str]] = {
    "json_schema": _schema, "json": _json, "choice": _choice, "regex": _text("regex"), "lark": _text("lark"),
}  # fmt: skip
