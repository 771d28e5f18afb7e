"""`pluglm vendor`: looks a recipe or a kernel through and, on consent, makes it a plugin. Imports nothing of either."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    import click


@hookimpl
def pluglm_build_command() -> click.Command:
    """The command."""
    from pluglm_vendor.command import command

    return command
