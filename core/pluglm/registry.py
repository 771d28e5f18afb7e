"""Which providers there are, and which one a name means. Clashes are errors; installation order never decides."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from difflib import get_close_matches

from pluglm.errors import PluginConflictError, PluginDisabledError, PluginNotFoundError
from pluglm.kinds import KINDS
from pluglm.provider import Problem, Provider, Reference, parse_reference


class Registry:
    """An immutable set of providers. Build one from discovery, or from a list: tests never discover.

    Args:
        providers: what is installed.
        problems: what discovery stepped over; shown when a name is not found, since that may be why.
        refusal: why the user has switched a provider off, or None if it may be used.
    """

    def __init__(
        self,
        providers: Iterable[Provider],
        *,
        problems: Iterable[Problem] = (),
        refusal: Callable[[Provider], str | None] = lambda _: None,
    ) -> None:
        self.providers = tuple(sorted(providers, key=lambda p: (p.kind, p.name, p.distribution)))
        self.problems = tuple(problems)
        self._refusal = refusal

    @classmethod
    def installed(cls) -> Registry:
        """What discovery finds in this environment, less what the user has disabled. Imports no plugin."""
        from pluglm.discovery import discover
        from pluglm.state import load_state

        found = discover()
        state = load_state()
        return cls(
            found.providers,
            problems=found.problems,
            refusal=lambda p: "disabled by `pluglm plugins disable`" if state.is_disabled(p) else None,
        )

    def of(self, kind: str) -> tuple[Provider, ...]:
        """All installed providers of a kind, switched off or not."""
        return tuple(p for p in self.providers if p.kind == kind)

    def refusal(self, provider: Provider) -> str | None:
        """Why the user's settings keep this provider from being used, or None."""
        return self._refusal(provider)

    def find(self, kind: str, text: str) -> tuple[Provider, str | None]:
        """The provider that a user's `text` means, and the variant after its colon.

        Raises: PluginNotFoundError, PluginConflictError, PluginDisabledError, or InputError for a malformed name.
        """
        reference = parse_reference(text)
        if reference.kind not in (None, kind):
            raise PluginNotFoundError(
                f"{text!r} names a provider of kind {reference.kind!r} where one of kind {kind!r} is needed.",
                fix=f"Name one of: {self.names(kind)}.",
                kind=kind,
                name=reference.name,
            )
        matches = [p for p in self.of(kind) if reference.matches(p)]
        if not matches:
            raise self._not_found(kind, reference)
        if len(matches) > 1:
            ids = [p.id for p in matches]
            raise PluginConflictError(
                f"{kind} {reference.name!r} is provided by {len(ids)} distributions: {', '.join(ids)}.",
                why="nothing overrides silently; the order of installation never decides.",
                fix=f"Name one in full, as {ids[0]!r}, or disable or uninstall the other.",
                candidates=tuple(ids),
            )
        (provider,) = matches
        if reason := self.refusal(provider):
            raise PluginDisabledError(
                f"{kind} {provider.name!r} ({provider.id}) is installed but switched off.",
                why=reason,
                fix=f"Run `pluglm plugins enable {provider.id}`, or choose another: {self.names(kind)}.",
                plugin=provider.id,
                by="user",
            )
        return provider, reference.variant

    def names(self, kind: str) -> str:
        """Names of a kind's providers as a message lists them."""
        return ", ".join(sorted({p.name for p in self.of(kind)})) or "none is installed"

    def _not_found(self, kind: str, reference: Reference) -> PluginNotFoundError:
        near = get_close_matches(reference.name, [p.name for p in self.of(kind)], 1)
        meant = f"Did you mean {near[0]!r}? " if near else ""
        group = KINDS[kind].group
        troubles = "".join(f"\n{p.subject}: {p.message}" for p in self.problems[:5])
        return PluginNotFoundError(
            f"no plugin provides {kind} {reference.name!r}.",
            why=f"installed {kind} providers: {self.names(kind)}."
            + (f"\nSet aside by discovery:{troubles}" if troubles else ""),
            fix=f"{meant}Install a package that declares {reference.name!r} in the entry-point group {group!r}, or "
            "choose an installed one; `pluglm plugins list` prints them.",
            kind=kind, name=reference.name,
        )  # fmt: skip
