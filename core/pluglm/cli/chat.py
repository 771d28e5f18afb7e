"""`pluglm chat`: talk with a model, turn by turn."""

from __future__ import annotations

import sys
from typing import Any

import click

from pluglm.cli.options import generation_options, load_model, model_options, settings_of
from pluglm.errors import ContextLengthError, InputError


@click.command("chat")
@model_options
@generation_options
@click.option("--system", help="A system message to begin with.")
def command(system: str | None, **arguments: Any) -> None:
    """Talk with a model through its chat template.

    An empty line or Ctrl-D ends, /reset forgets, Ctrl-C stops an answer.
    """
    lm = load_model(arguments)
    if lm.tokenizer is None or lm.tokenizer.chat_template is None:
        raise InputError(
            f"{lm.plan.model} cannot chat.", why="it has no chat template, so it was not made for turns.",
            fix="Use `pluglm generate` to continue a text, or a model with a chat template.", argument="model",
        )  # fmt: skip
    settings = settings_of(arguments)
    start = [{"role": "system", "content": system}] if system else []
    messages = list(start)
    while True:
        line = _read()
        if not line:
            return
        if line == "/reset":
            messages = list(start)
            continue
        messages.append({"role": "user", "content": line})
        pieces = []
        try:
            for piece in lm.stream(messages, **settings):
                pieces.append(piece)
                click.echo(piece, nl=False)
                sys.stdout.flush()
        except KeyboardInterrupt:
            click.echo(" [stopped]", nl=False)
        except ContextLengthError as e:
            messages.pop()
            click.echo(f"{e}\nUse /reset to start over.", err=True)
            continue
        except InputError as e:
            if e.data.get("argument") not in ("messages", "prompt"):
                raise  # about a setting, which would be as wrong in the next turn
            messages.pop()
            click.echo(str(e), err=True)
            continue
        click.echo()
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _read() -> str:
    """One line from the user, or "" at the end of the input."""
    if sys.stdin.isatty():
        click.echo("> ", nl=False)
        sys.stdout.flush()
    return sys.stdin.readline().strip()
