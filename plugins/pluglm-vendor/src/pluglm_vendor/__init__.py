"""`pluglm vendor`: looks a Hub recipe through and, on consent, makes it a plugin. Imports nothing of a recipe, ever."""

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
