"""The root group: the core's own commands, and those that installed plugins add (kind `command`)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pluglm.cli.lazy import LazyGroup

if TYPE_CHECKING:
    from pluglm.provider import Provider


class RootGroup(LazyGroup):
    """Commands by name. A plugin's is imported when it is run; it cannot take the name of one of the core's."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The core's, then the plugins', sorted."""
        own = super().list_commands(ctx)
        return [*own, *sorted(set(self._providers()) - set(own))]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the command, or None if there is no such name."""
        if (own := super().get_command(ctx, cmd_name)) is not None:
            return own
        if cmd_name not in self._providers():
            return None
        from pluglm.manager import Manager
        from pluglm.registry import Registry

        manager = Manager(Registry.installed())
        provider, _ = manager.registry.find("command", cmd_name)  # refuses a name that two distributions claim
        command = manager.call(provider, "pluglm_build_command")
        if not isinstance(command, click.Command):
            manager.reject(provider, TypeError(f"pluglm_build_command returned {type(command).__name__}"))
        found: click.Command = command
        return found

    def one_line(self, name: str) -> str:
        """One line for --help; a plugin's comes from its `pluglm.json`, so listing imports nothing."""
        if name in self.lazy or name in self.commands:
            return super().one_line(name)
        provider = self._providers()[name]
        summary = str((provider.facts or {}).get("summary", ""))
        return f"{summary} ({provider.distribution})".strip()

    def _providers(self) -> dict[str, Provider]:
        from pluglm.discovery import discover

        return {p.name: p for p in discover().providers if p.kind == "command"}
