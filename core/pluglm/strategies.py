"""The decoding strategies of one loaded model: each is built when a call first needs it, then kept."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pluglm.build import LoadContext, PartFailedError, build_strategy
from pluglm.errors import InputError
from pluglm.planner import Planner, Wanted, wish

if TYPE_CHECKING:
    from pluglm.contracts.decoding import DecodingStrategy
    from pluglm.contracts.text import Tokenizer
    from pluglm.manager import Manager
    from pluglm.plan import Choice

#: The provider that runs a function of the shape that the Hub's `custom_generate` has.
RECIPE = "recipe"


class Strategies:
    """What chooses tokens, by call.

    Args:
        wanted: what the user said of the strategy when loading. planned: the plan's choice, and what was built for it.
        excluded: providers that failed while loading, with why.
    """

    def __init__(
        self, manager: Manager, context: LoadContext, tokenizer: Tokenizer | None, wanted: Wanted,
        planned: tuple[Choice, DecodingStrategy], excluded: Mapping[str, str],
    ) -> None:  # fmt: skip
        self._manager, self._context, self._tokenizer = manager, context, tokenizer
        self._wanted, self._excluded = wanted, dict(excluded)
        self._planned = planned
        self._built: dict[tuple[str | None, str | None], DecodingStrategy] = {}

    def built(self) -> tuple[DecodingStrategy, ...]:
        """Those that calls have used or may use without building: the plan's first."""
        return (self._planned[1], *self._built.values())

    def wanted(self, decoding: object = None, custom_generate: object = None) -> Wanted:
        """What a call asks for.

        Args:
            decoding: a provider's name or id, or None: as said when loading. custom_generate: a function with the
                signature of the Hub's, the name of a vendored method, or the folder that one was vendored from.
        Raises: InputError for both at once and for what is none of these; PluginNotFoundError for a folder that was not
            vendored.
        """
        if custom_generate is None:
            return wish("decoding", decoding) if decoding is not None else self._wanted
        if decoding is not None:
            raise InputError(
                f"custom_generate and decoding={decoding!r} both name what chooses the tokens.",
                fix="Leave one of them out.", argument="custom_generate",
            )  # fmt: skip
        if callable(custom_generate):
            return Wanted(RECIPE, (("function", custom_generate),))
        if isinstance(custom_generate, str | os.PathLike) and Path(custom_generate).is_dir():
            from pluglm.vendored import vendored_name

            return Wanted(vendored_name(Path(custom_generate)))
        if isinstance(custom_generate, str) and "/" in custom_generate:
            raise InputError(
                f"custom_generate={custom_generate!r} is neither a folder nor the name of a vendored method.",
                why="code from the Hub runs only after it was looked at, pinned to a commit and installed.",
                fix=f"Run `pluglm vendor hub:{custom_generate}@<commit>`, install the wheel, pass the method's name.",
                argument="custom_generate",
            )  # fmt: skip
        return wish("custom_generate", custom_generate)

    def of(self, wanted: Wanted, fields: Sequence[str]) -> DecodingStrategy:
        """The strategy of a call that sets these fields; one that `auto` chose and that fails gives way to the next."""
        planner = Planner(self._manager, self._excluded)
        while True:
            choice = planner.decoding(wanted, fields, device=self._context.device)
            key = (choice.provider, choice.variant)
            own = bool(wanted.options) and wanted != self._wanted  # a call's own options: its strategy is not kept
            planned, strategy = self._planned
            if key == (planned.provider, planned.variant) and not own:
                return strategy
            if key in self._built and not own:
                return self._built[key]
            try:
                strategy = build_strategy(self._manager, choice, self._context, self._tokenizer)
            except PartFailedError as e:
                planner.excluded[e.provider] = e.reason
                continue
            if not own:
                self._built[key] = strategy
            return strategy
