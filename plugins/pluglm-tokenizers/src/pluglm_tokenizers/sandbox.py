"""A jinja2 sandbox with bounds: what a template may reach, how long it may run and how large a string may get.

On top of `ImmutableSandboxedEnvironment` (nothing that starts with an underscore, nothing is changed): filters and
globals are a list; methods, filters and operators that can make a large value of a small one are checked before they
run; every turn of a loop and every call of a macro looks at the clock and at how much was written so far. Not bounded:
the memory of many values that are each below the limit, and the time inside one allowed filter call.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.filters import make_attrgetter
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_CHARACTERS = 4_000_000
_MAX_WRITTEN = 64_000_000  # characters, counted each time a macro's or a block's text is passed on
_MAX_BITS = 4096
_MAX_S = 1.0
_FILTERS = frozenset({
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "indent", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "replace", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum",
    "title", "tojson", "trim", "truncate", "unique", "upper", "urlencode", "wordcount",
})  # fmt: skip
_GLOBALS = frozenset({"range", "dict", "namespace", "joiner", "cycler"})
#: Methods of str that make a large value of a small one by a number, or by a format.
_WIDENING = frozenset({"center", "expandtabs", "format", "format_map", "ljust", "rjust", "translate", "zfill"})


class UnboundedError(Exception):
    """A template asked for more time or memory than it gets."""


class RefusedError(Exception):
    """A template asked for something that is not on the list."""


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant said; here its body stands as it is."""

    tags = {"generation"}  # noqa: RUF012 - as jinja2 declares it

    def parse(self, parser: Parser) -> nodes.Node:
        """The body, in a scope of its own."""
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Instrument(NodeTransformer):
    """Adds a look at the clock to loops, macros and calls of blocks, and a check of size to `~`."""

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> Any:
        """Children first."""
        self.generic_visit(node)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            written = sum(len(text.data) for text in node.find_all(nodes.TemplateData))
            written += sum(len(c.value) for c in node.find_all(nodes.Const) if isinstance(c.value, str))
            tick = _call("tick", [nodes.Const(written, lineno=node.lineno)], node.lineno)
            node.body.insert(0, nodes.ExprStmt(tick, lineno=node.lineno))
        if isinstance(node, nodes.Concat):
            return _call("tilde", node.nodes, node.lineno)
        return node


def _call(method: str, arguments: list[nodes.Expr], line: int) -> nodes.Call:
    target = nodes.EnvironmentAttribute(method, lineno=line)
    return nodes.Call(target, arguments, [], None, None, lineno=line)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment of chat templates. Safe to share between threads."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], cache_size=0,
            finalize=self._written,
        )  # fmt: skip
        self._budget = threading.local()
        self.filters = {name: function for name, function in self.filters.items() if name in _FILTERS}
        self.filters.update(tojson=self._tojson, replace=self._replace, indent=self._indent, join=self._join)
        self.globals = {name: value for name, value in self.globals.items() if name in _GLOBALS}

    def run(self, template: jinja2.Template, context: Mapping[str, Any], plain_json: Callable[[str], str]) -> str:
        """Render within the limits. Raises UnboundedError, RefusedError, or what the template raises."""
        self._budget.deadline, self._budget.plain_json = time.monotonic() + _MAX_S, plain_json
        self._budget.written = 0
        pieces, size = [], 0
        for piece in template.generate(dict(context)):
            self.tick(0)
            size += len(piece)
            _bounded(size)
            pieces.append(piece)
        return "".join(pieces)

    def tick(self, characters: int) -> str:
        """One turn of a loop, whose body holds this much text of its own."""
        self._budget.written += characters
        if self._budget.written > _MAX_WRITTEN:
            raise UnboundedError(f"it wrote more than {_MAX_WRITTEN:,} characters")
        if time.monotonic() > self._budget.deadline:
            raise UnboundedError(f"it ran for more than {_MAX_S:g} s")
        return ""

    def _written(self, value: Any) -> Any:
        """`{{ value }}`; jinja2 also calls this while it compiles."""
        if isinstance(value, str) and hasattr(self._budget, "written"):
            self.tick(len(value))
        return value

    def tilde(self, *parts: Any) -> str:
        """`a ~ b`."""
        texts = [str(part) for part in parts]
        _bounded(sum(map(len, texts)))
        return "".join(texts)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Instrument().visit(super()._parse(source, name, filename))
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Nothing private, and no method that widens a text."""
        if isinstance(obj, str) and attr in _WIDENING:
            return False
        return super().is_safe_attribute(obj, attr, value)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:
        """A call of a function or method; those that can multiply a text are checked first."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str) and name == "replace":
            return self._replace(owner, *args, **kwargs)
        if isinstance(owner, str) and name == "join" and args:
            return self._join(args[0], owner)
        return super().call(context, obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**`, `%` with their results' sizes known before."""
        sizes = [len(value) if isinstance(value, str | list | tuple) else None for value in (left, right)]
        if operator == "%" and sizes[0] is not None:
            raise RefusedError("formatting with % is not on the list")
        if operator == "+" and None not in sizes:
            _bounded(sum(size or 0 for size in sizes))
        if operator == "*":
            for size, count in ((sizes[0], right), (sizes[1], left)):
                if size is not None and isinstance(count, int):
                    _bounded(size * count)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() + right.bit_length() if operator == "*" else left.bit_length() * max(right, 1)
            if bits > _MAX_BITS:
                raise UnboundedError(f"a number of more than {_MAX_BITS} bits")
        return super().call_binop(context, operator, left, right)

    def _tojson(self, value: Any, *args: Any, **kwargs: Any) -> str:
        text: str = self._budget.plain_json(to_json(value, *args, **kwargs))
        return text

    def _join(self, value: Any, d: str = "", attribute: int | str | None = None) -> str:
        """As jinja2's `join`."""
        get = make_attrgetter(self, attribute) if attribute is not None else str
        parts, size = [], 0
        for item in value:
            parts.append(str(get(item)))
            size += len(parts[-1]) + len(d)
            _bounded(size)
        return str(d).join(parts)

    def _replace(self, text: Any, old: str, new: str, count: int | None = None) -> str:
        """As `str.replace`; the result's size is known before."""
        text, old, new = str(text), str(old), str(new)
        limit = -1 if count is None else int(count)
        found = text.count(old) if limit < 0 else min(limit, text.count(old))
        _bounded(len(text) + found * max(len(new) - len(old), 0))
        replaced: str = text.replace(old, new, limit)
        return replaced

    def _indent(self, text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        """As jinja2's `indent`."""
        one = width if isinstance(width, str) else " " * _bounded(width)
        _bounded(len(text) + (text.count("\n") + 1) * len(one))
        lines = text.split("\n")
        return "\n".join(one + line if (i or first) and (line or blank) else line for i, line in enumerate(lines))


def _bounded(characters: int) -> int:
    if characters > _MAX_CHARACTERS:
        raise UnboundedError(f"a text of more than {_MAX_CHARACTERS:,} characters")
    return characters


def to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON without HTML escapes, as templates of language models expect of `tojson`."""
    if indent is not None and not 0 <= indent <= 16:
        raise UnboundedError("tojson is asked for an indent outside 0 … 16")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
