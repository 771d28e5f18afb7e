"""The conformance kit for constraints.

    class TestGuide(ConstraintContract):
        provider = pluglm_constraint_guide

It brings a vocabulary of single bytes, of pieces of JSON and words, and of pieces of characters, so that a text can be
cut in many ways, and walks through grammars by chance. Needs `pluglm[testing]`.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch

from pluglm.contracts import GRAMMAR_KINDS, Constraint, ConstraintRequest, Grammar, Matcher
from pluglm.errors import GrammarError, InputError, UnsupportedRequestError

_PIECES = (
    '{"', '":', '", "', "[]", "{}", "true", "false", "null", "yes", "ye", "no", "12", "00", "-1", "  ", "\n", ", ",
    "ab", "abc", "aa", "é", "日本", "🙂", "name", "size", '"name', '"}', "++",
)  # fmt: skip
#: Bytes, then pieces (some cut inside a character), then ids without a text: end tokens, a control token, unused rows.
TOKENS: tuple[bytes | None, ...] = (
    *(bytes([i]) for i in range(256)), *(piece.encode() for piece in _PIECES), "日".encode()[:2], "🙂".encode()[1:],
    None, None, None, None, None,
)  # fmt: skip
V, EOS = len(TOKENS), (len(TOKENS) - 5, len(TOKENS) - 3)
W = -(-V // 32)

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "size": {"type": "integer", "minimum": -3, "maximum": 120},
        "tags": {"type": "array", "items": {"enum": ["yes", "no", None]}, "maxItems": 3},
        "more": {"type": ["boolean", "null"]},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


def _follows_schema(text: str) -> bool:
    value = json.loads(text)
    return (
        isinstance(value, dict)
        and {"name", "size"} <= set(value) <= set(SCHEMA["properties"])
        and isinstance(value["name"], str)
        and len(value["name"]) <= 5
        and type(value["size"]) is int
        and -3 <= value["size"] <= 120
        and len(value.get("tags", [])) <= 3
        and all(tag in ("yes", "no", None) for tag in value.get("tags", []))
        and value.get("more") in (True, False, None)
    )


def _is_json(text: str) -> bool:
    json.loads(text)
    return True


def _is_sum(text: str) -> bool:
    return re.fullmatch(r"(\(?[0-9]{1,2}\)?)(\+\(?[0-9]{1,2}\)?)*", text) is not None


#: A grammar of each kind, which texts are its own, and a text that is none but begins like one.
CASES: dict[str, tuple[Grammar, Callable[[str], bool], str]] = {
    "json_schema": (Grammar("json_schema", json.dumps(SCHEMA)), _follows_schema, '{"name":1'),
    "json": (Grammar("json"), _is_json, "[1}"),
    "regex": (
        Grammar("regex", "(ab|é)+-?[0-9]{0,3}"), lambda text: bool(re.fullmatch("(ab|é)+-?[0-9]{0,3}", text)), "abb",
    ),
    "choice": (
        Grammar("choice", json.dumps(["yes", "ye", "no", "日本🙂", 'a "b"\n\\'])),
        lambda text: text in ("yes", "ye", "no", "日本🙂", 'a "b"\n\\'), "yet",
    ),
    "lark": (
        Grammar("lark", 'start: term ("+" term)*\nterm: NUMBER | "(" NUMBER ")"\nNUMBER: /[0-9]{1,2}/'), _is_sum,
        "12+(3+",
    ),
}  # fmt: skip
MALFORMED = (
    Grammar("json_schema", '{"type": "strin"}'), Grammar("json_schema", "{"), Grammar("json_schema", "3"),
    Grammar("regex", "(ab"), Grammar("lark", "start: nothing"), Grammar("lark", "begin: /a/"),
    Grammar("lark", "start: start"),
)  # fmt: skip


def dice(seed: int) -> random.Random:
    """What a walk goes by."""
    return random.Random(seed)  # noqa: S311 - nothing is to be kept secret


def mask_of(matcher: Matcher) -> frozenset[int]:
    """The tokens that are allowed."""
    masks = torch.full((3, W), 0x5A5A, dtype=torch.int32)
    matcher.allow(masks, 1)
    assert masks[0].eq(0x5A5A).all() and masks[2].eq(0x5A5A).all(), "only the row that was asked for is written"
    words = masks[1].tolist()
    return frozenset(i for i in range(32 * W) if words[i // 32] >> (i % 32) & 1)


def state_of(matcher: Matcher) -> tuple[frozenset[int], bool, bool]:
    """The tokens that are allowed, and whether the text may and must end."""
    return mask_of(matcher), matcher.accepting, matcher.finished


def accept_text(matcher: Matcher, text: str) -> None:
    """Accept a text byte by byte."""
    for byte in text.encode():
        matcher.accept(byte)


class ConstraintContract:
    """Subclass it in a test file, as `Test…`. A test may be weakened only by `xfail(reason=…)`.

    Attributes:
        provider: what the entry point names: an object or module with `pluglm_build_constraint`.
        kinds: the kinds of grammar that it knows. options: for the walks, such as one that keeps texts short.
        walks: random texts of each kind.
    """

    provider: ClassVar[Any]
    kinds: ClassVar[tuple[str, ...]] = GRAMMAR_KINDS
    options: ClassVar[tuple[tuple[str, Any], ...]] = ()
    walks: ClassVar[int] = 12

    @pytest.fixture
    def constraint(self) -> Constraint:
        """Built for the kit's vocabulary."""
        return self.build(options=self.options)

    def build(self, **more: Any) -> Constraint:
        """Built as the core builds it."""
        built: Constraint = self.provider.pluglm_build_constraint(
            request=ConstraintRequest(V, TOKENS, EOS, "cpu", **more)
        )
        return built

    def matcher(self, constraint: Constraint, kind: str) -> Matcher:
        """Of the kit's grammar of this kind."""
        if kind not in self.kinds:
            pytest.skip(f"it knows no {kind}")
        return constraint.compile(CASES[kind][0])

    def walk(self, matcher: Matcher, draw: random.Random, most: int = 400) -> list[int]:
        """Accept tokens by chance until the text ends, or `most` were made; what was accepted."""
        tokens: list[int] = []
        while len(tokens) < most:
            allowed = sorted(mask_of(matcher))
            ends = [token for token in allowed if token in EOS]
            assert ends == (list(EOS) if matcher.accepting else [])
            assert allowed, "there is always a way on, or an end"
            if ends and (len(allowed) == len(ends) or draw.random() < 0.3):
                break
            # What closes something comes first now and then, so that texts end.
            closing = [t for t in allowed if TOKENS[t] in (b'"', b"}", b"]", b")", b'"}')]
            token = draw.choice(closing if closing and draw.random() < 0.4 else [t for t in allowed if t not in EOS])
            matcher.accept(token)
            tokens.append(token)
        return tokens

    def test_it_follows_the_contract(self, constraint: Constraint) -> None:
        assert isinstance(constraint, Constraint)
        assert isinstance(constraint.name, str)
        for kind in self.kinds:
            assert isinstance(self.matcher(constraint, kind), Matcher)

    @pytest.mark.parametrize("kind", GRAMMAR_KINDS)
    def test_a_random_walk_ends_in_a_text_of_the_grammar(self, constraint: Constraint, kind: str) -> None:
        draw, ended = dice(5), 0
        for _ in range(self.walks):
            matcher = self.matcher(constraint, kind)
            text = b"".join(TOKENS[token] or b"" for token in self.walk(matcher, draw))
            if matcher.accepting:
                assert CASES[kind][1](text.decode()), text
                ended += 1
        assert ended >= self.walks // 2, "hardly any text came to an end"

    @pytest.mark.parametrize("kind", GRAMMAR_KINDS)
    def test_what_is_accepted_is_what_is_allowed(self, constraint: Constraint, kind: str) -> None:
        matcher, draw = self.matcher(constraint, kind), dice(7)
        for _ in range(6):
            allowed = mask_of(matcher)
            assert all(TOKENS[token] for token in allowed if token not in EOS)
            for token in range(V):
                if token in allowed and token not in EOS:
                    matcher.accept(token)
                    matcher.rollback(1)
                else:
                    with pytest.raises(GrammarError):
                        matcher.accept(token)
            assert mask_of(matcher) == allowed, "a refused token changes nothing"
            if not allowed - set(EOS):
                break
            matcher.accept(draw.choice(sorted(allowed - set(EOS))))

    @pytest.mark.parametrize("kind", GRAMMAR_KINDS)
    def test_a_text_that_is_none_of_the_grammars_is_stopped(self, constraint: Constraint, kind: str) -> None:
        matcher, text = self.matcher(constraint, kind), CASES[kind][2]
        accept_text(matcher, text[:-1])
        with pytest.raises(GrammarError, match=r"not allowed after \d+ tokens") as caught:
            accept_text(matcher, text[-1])
        assert caught.value.grammar == kind

    @pytest.mark.parametrize("kind", GRAMMAR_KINDS)
    def test_what_is_taken_back_leaves_no_trace(self, constraint: Constraint, kind: str) -> None:
        matcher, draw = self.matcher(constraint, kind), dice(11)
        masks = [state_of(matcher)]
        tokens = self.walk(matcher, draw, most=12)
        matcher.rollback(len(tokens))
        for token in tokens:
            matcher.accept(token)
            masks.append(state_of(matcher))
        at = len(tokens)
        for _ in range(8):
            back = draw.randint(0, at)
            matcher.rollback(back)
            at -= back
            assert state_of(matcher) == masks[at]
            for token in tokens[at:]:
                matcher.accept(token)
            at = len(tokens)
            assert state_of(matcher) == masks[at]
        with pytest.raises(InputError):
            matcher.rollback(at + 1)
        assert mask_of(matcher) == masks[at][0]

    @pytest.mark.parametrize("kind", GRAMMAR_KINDS)
    def test_a_fork_goes_its_own_way(self, constraint: Constraint, kind: str) -> None:
        matcher, draw = self.matcher(constraint, kind), dice(13)
        self.walk(matcher, draw, most=2)
        before = mask_of(matcher)
        fork = matcher.fork()
        assert mask_of(fork) == before
        gone = self.walk(fork, draw, most=9)
        assert mask_of(matcher) == before
        after = mask_of(fork)
        self.walk(matcher, draw, most=3)
        assert mask_of(fork) == after
        fork.rollback(len(gone))
        assert mask_of(fork) == before

    @pytest.mark.parametrize("kind", GRAMMAR_KINDS)
    def test_the_cut_into_tokens_makes_no_difference(self, constraint: Constraint, kind: str) -> None:
        matcher, draw = self.matcher(constraint, kind), dice(17)
        tokens = self.walk(matcher, draw, most=15)
        single = self.matcher(constraint, kind)
        for byte in b"".join(TOKENS[token] or b"" for token in tokens):
            single.accept(byte)
        assert state_of(single) == state_of(matcher)

    def test_a_finished_text_allows_the_end_tokens_alone(self, constraint: Constraint) -> None:
        matcher = self.matcher(constraint, "choice")
        assert state_of(matcher)[1:] == (False, False)
        accept_text(matcher, "ye")
        allowed, *ends = state_of(matcher)
        assert allowed > set(EOS)
        assert ends == [True, False]
        accept_text(matcher, "s")
        assert state_of(matcher) == (frozenset(EOS), True, True)
        matcher.rollback(1)
        assert state_of(matcher)[1:] == (True, False)

    @pytest.mark.parametrize("token", [*EOS, V - 1, V, -1])
    def test_what_is_no_text_is_never_accepted(self, constraint: Constraint, token: int) -> None:
        matcher = self.matcher(constraint, "choice")
        accept_text(matcher, "no")
        with pytest.raises(GrammarError):
            matcher.accept(token)
        assert mask_of(matcher) == set(EOS)

    @pytest.mark.parametrize("grammar", MALFORMED, ids=str)
    def test_a_malformed_grammar_is_refused_with_its_kind_and_why(
        self, constraint: Constraint, grammar: Grammar
    ) -> None:
        if grammar.kind not in self.kinds:
            pytest.skip(f"it knows no {grammar.kind}")
        with pytest.raises(GrammarError) as caught:
            constraint.compile(grammar)
        assert caught.value.grammar == grammar.kind
        assert caught.value.why and caught.value.fix

    def test_options_and_variants_that_are_not_known_are_refused(self) -> None:
        for more in ({"options": (("no_such_option", 1),)}, {"variant": "no-such-variant"}):
            with pytest.raises(UnsupportedRequestError, match=r"no.such") as caught:
                self.build(**more)
            assert caught.value.reasons
