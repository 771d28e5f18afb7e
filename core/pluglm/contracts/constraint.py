"""Constraints: grammars that what is generated must follow, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from pluglm.errors import InputError

if TYPE_CHECKING:
    from torch import Tensor

#: What a grammar may be written as.
GRAMMAR_KINDS = ("choice", "json", "json_schema", "lark", "regex")


@dataclass(frozen=True)
class Grammar:
    """Which texts may be generated. The text of a row's new tokens, from the first to its end token, is one of them.

    Attributes:
        kind: "json_schema": JSON that follows a schema. "json": any JSON value. "regex": texts that a regular
            expression matches as a whole. "choice": one of several texts. "lark": a context-free grammar in the syntax
            of Lark, whose rule `start` is the text.
        text: the schema as JSON; "" for "json"; the expression; a JSON list of texts; the grammar.
    """

    kind: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.kind not in GRAMMAR_KINDS or not isinstance(self.text, str):
            raise InputError(
                f"Grammar({self.kind!r}, {self.text!r}) is none.",
                fix=f"Give a kind ({', '.join(GRAMMAR_KINDS)}) and a text.", argument="constraint",
            )  # fmt: skip


@dataclass(frozen=True)
class ConstraintRequest:
    """What the planner asks a constraint provider to build for one model.

    Attributes:
        vocab_size: V, the width of the scores.
        token_bytes: [V] what each token adds to the text; None: no text (control tokens, end tokens, unused ids), so a
            grammar never allows it.
        eos_token_ids: any of them ends a text; at least one.
        device: of the model; masks are made on the CPU.
        variant: what the user wrote after the colon. options: keyword options; unknown ones must be refused.
    """

    vocab_size: int
    token_bytes: Sequence[bytes | None]
    eos_token_ids: tuple[int, ...]
    device: str
    variant: str | None = None
    options: tuple[tuple[str, Any], ...] = ()


@runtime_checkable
class Matcher(Protocol):
    """One text under a grammar, as far as it is made. Belongs to one thread at a time.

    A token is allowed if the text with it is the beginning of a text of the grammar. What is allowed depends on the
    text so far alone, not on how it is cut into tokens. End tokens are allowed exactly when `accepting`; they are no
    part of the text and are not accepted.
    """

    @property
    def accepting(self) -> bool:
        """The text may end here."""
        ...

    @property
    def finished(self) -> bool:
        """The text must end here: it is complete, and nothing may follow but an end token."""
        ...

    def allow(self, masks: Tensor, row: int) -> None:
        """Write which tokens may come next, all of them.

        Args:
            masks: [R, W] int32 on the CPU, contiguous, W = ceil(V / 32). Row `row` is overwritten: bit t % 32 of word
                t // 32, counted from the lowest, is 1 where token t is allowed. Bits from V on are 0.
        Raises: GrammarError if the grammar turns out to be too complex here.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Take a token of the text. Raises GrammarError if that is not allowed, nothing changed."""
        ...

    def rollback(self, count: int) -> None:
        """Take back the last `count` tokens. Raises InputError if there are fewer; nothing has changed then."""
        ...

    def fork(self) -> Matcher:
        """A matcher of the same text that goes its own way."""
        ...


@runtime_checkable
class Constraint(Protocol):
    """Compiles grammars for one model."""

    name: str

    def compile(self, grammar: Grammar) -> Matcher:
        """A matcher of the empty text.

        Raises: GrammarError if the grammar is malformed, allows no text, or says what cannot be honoured (a keyword of
            a schema that would be ignored).
        """
        ...
