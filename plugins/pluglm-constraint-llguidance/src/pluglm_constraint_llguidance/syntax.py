"""Every kind of grammar as llguidance's variant of Lark."""

from __future__ import annotations

import json
import re
from typing import Any

from llguidance import LLMatcher

from pluglm.contracts import Grammar
from pluglm.errors import GrammarError

#: Whitespace between the parts of JSON. A small model may go on with it for ever, so there is an end to it.
WHITESPACE: dict[str, dict[str, Any]] = {
    "flexible": {"whitespace_pattern": r"[ \t\r\n]{1,64}"},
    "none": {"whitespace_flexible": False},
}
#: Masks hold every token that may come next. By default llguidance would allow only the one that its tokenizer would
#: choose, where the text is forced; then a mask would depend on how the text so far was cut into tokens. It stands at
#: the end, so that messages name the line that the user wrote.
_FOOTER = '\n%llguidance {"no_forcing": true}\n'
#: What a Lark grammar may not say: options of the library are the plugin's to set; of the attributes of a rule, a
#: temperature would be passed over here, and a number of tokens is no property of a text.
_NOT_TEXT = re.compile(r"^\s*%llguidance\b|^\s*[\w!?]+\s*\[[^\]]*\b(temperature|max_tokens)\s*=", re.MULTILINE)


def as_lark(grammar: Grammar, whitespace: str) -> str:
    """The grammar in the library's syntax. Raises GrammarError for what is no JSON, and for what is not about text."""
    if grammar.kind in ("json", "json_schema"):
        schema = _read(grammar) if grammar.kind == "json_schema" else {}
        if isinstance(schema, dict):
            schema = {**schema, "x-guidance": {**WHITESPACE[whitespace], **schema.get("x-guidance", {})}}
        return f"start: %json {json.dumps(schema)}{_FOOTER}"
    if grammar.kind == "choice":
        return "start: " + " | ".join(map(json.dumps, _read(grammar))) + _FOOTER
    if grammar.kind == "regex":
        (made,) = json.loads(LLMatcher.grammar_from_regex(grammar.text))["grammars"]
        return str(made["lark_grammar"]) + _FOOTER
    if found := _NOT_TEXT.search(grammar.text):
        raise malformed(grammar, f"{found[0].strip()!r} is no rule about the text")
    return grammar.text + _FOOTER


def _read(grammar: Grammar) -> Any:
    try:
        return json.loads(grammar.text)
    except ValueError as e:
        raise malformed(grammar, f"it is no JSON: {e}") from e


def malformed(grammar: Grammar, why: str) -> GrammarError:
    """The error for a grammar that is not followed. why: in the library's words."""
    why = why.replace("<non-verbose/>", "")
    if grammar.kind != "lark":  # an excerpt would show what was made of the grammar, not what the user wrote
        why = re.sub(r"^ +\d+ \|[\s\S]*", "", why.removeprefix("at 1(8): "), flags=re.MULTILINE)
    return GrammarError(
        f"this {grammar.kind} cannot be followed.", why=why.strip(),
        fix="Correct it, or leave out what it names; a rule that is not enforced would be a wrong answer in silence.",
        argument="constraint", grammar=grammar.kind,
    )  # fmt: skip
