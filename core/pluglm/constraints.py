"""The constraints of one loaded model: built when a call first brings a grammar, and kept with what they compiled."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from pluglm.build import LoadContext, PartFailedError, build
from pluglm.constrained import ConstraintProcessor
from pluglm.contracts.constraint import Constraint, ConstraintRequest, Grammar, Matcher
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm.planner import Demand, Planner, Wanted

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts.text import Tokenizer
    from pluglm.manager import Manager

#: Compiled grammars that are kept; the one that was used longest ago goes first.
KEPT = 64


class Constraints:
    """What holds a model's texts to grammars, by call.

    Args:
        wanted: what the user said of the constraint when loading. excluded: providers that failed while loading.
    """

    def __init__(
        self, manager: Manager, context: LoadContext, tokenizer: Tokenizer | None, wanted: Wanted,
        excluded: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._manager, self._context, self._tokenizer = manager, context, tokenizer
        self._wanted, self._excluded = wanted, dict(excluded)
        self._built: dict[tuple[str | None, tuple[int, ...]], Constraint] = {}
        self._compiled: OrderedDict[tuple[int, Grammar], Matcher] = OrderedDict()

    def processor(
        self, grammars: Sequence[Grammar | None], prompts: Tensor, eos_token_ids: Sequence[int]
    ) -> ConstraintProcessor:
        """What holds one call to its grammars.

        Args:
            grammars: one a prompt, one of them at least. prompts: [B, S] as the strategy gets them.
            eos_token_ids: of the call.
        Raises: InputError without a tokenizer or an end token, UnsupportedRequestError for a tokenizer that cannot say
            what its tokens are, GrammarError for a grammar, PlanError and PluginError if no provider can do it.
        """
        eos = tuple(sorted(set(eos_token_ids)))
        if not eos:
            raise InputError(
                "a constraint needs an end token, and this call has none.",
                why="a text that is complete ends with one; without it there would be no token left to choose.",
                fix="Pass eos_token_id=….", argument="eos_token_id",
            )  # fmt: skip
        kinds = tuple(sorted({grammar.kind for grammar in grammars if grammar is not None}))
        constraint = self._constraint(kinds, eos)
        roots = [None if grammar is None else self._root(constraint, grammar) for grammar in grammars]
        return ConstraintProcessor(roots, prompts, eos)

    def _root(self, constraint: Constraint, grammar: Grammar) -> Matcher:
        key = (id(constraint), grammar)
        if key not in self._compiled:
            self._compiled[key] = constraint.compile(grammar)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
        self._compiled.move_to_end(key)
        return self._compiled[key]

    def _constraint(self, kinds: Sequence[str], eos: tuple[int, ...]) -> Constraint:
        """What knows these kinds of grammar; a provider that `auto` chose and that fails gives way to the next."""
        planner = Planner(self._manager, self._excluded)
        while True:
            demand = Demand(self._context.device, features=tuple(kinds))
            choice = planner.single("constraint", self._wanted, demand, f"knows {', '.join(kinds)}")
            key = (choice.provider, eos)
            if key in self._built:
                return self._built[key]
            request = ConstraintRequest(
                self._context.description.vocab_size, self._token_bytes(eos), eos, self._context.device,
                choice.variant, choice.options,
            )  # fmt: skip
            try:
                self._built[key] = build(self._manager, choice, "pluglm_build_constraint", request=request)
            except PartFailedError as e:
                planner.excluded[e.provider] = e.reason

    def _token_bytes(self, eos: Sequence[int]) -> list[bytes | None]:
        """[V] what each token adds to a text; None for end tokens, and for rows of the embedding without a token."""
        if self._tokenizer is None:
            raise InputError(
                "this model came without a tokenizer, so a grammar means nothing to it.",
                why="a grammar is about text, and nothing says what the token ids stand for.",
                fix="Put tokenizer.json into the folder, or leave constraint out.", argument="constraint",
            )  # fmt: skip
        if not callable(getattr(self._tokenizer, "token_bytes", None)):  # written for tokenizer API 1.0
            reason = f"{type(self._tokenizer).__name__} does not say which bytes its tokens stand for"
            raise UnsupportedRequestError(
                "this model's tokenizer cannot be held to a grammar.", why=f"{reason} (tokenizer API 1.1).",
                fix="Install a newer version of its plugin, or choose another tokenizer.", reasons=(reason,),
            )  # fmt: skip
        said = self._tokenizer.token_bytes()
        known = [None if i in eos or not part else part for i, part in enumerate(said)]
        return known + [None] * (self._context.description.vocab_size - len(known))
