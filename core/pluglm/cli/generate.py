"""`pluglm generate`: complete a prompt."""

from __future__ import annotations

import json
import sys
import time
from itertools import chain
from typing import Any

import click

from pluglm.cli.options import (
    constraint_of,
    generation_options,
    grammar_options,
    load_model,
    model_options,
    settings_of,
)


@click.command("generate")
@click.argument("prompt", required=False)
@model_options
@generation_options
@grammar_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, token ids, timing and plan.")
@click.option("--no-stream", is_flag=True, help="Print the text when it is complete.")
def command(prompt: str | None, as_json: bool, no_stream: bool, **arguments: Any) -> None:
    """Complete PROMPT (standard input if left out, or "-") and stream the new text.

    Without -m the model is the one that an installed source offers as its default.
    """
    if prompt is None or prompt == "-":
        prompt = sys.stdin.read()
    constraint = constraint_of(arguments)
    started = time.perf_counter()
    lm = load_model(arguments)
    loaded = time.perf_counter()
    settings = settings_of(arguments)
    if constraint is not None:
        settings["constraint"] = constraint
    if as_json:
        done = lm.complete(prompt, **settings)
        completions = done if isinstance(done, list) else [done]
        click.echo(json.dumps({
            "prompt": prompt,
            "completions": [
                {"text": c.text, "token_ids": c.token_ids, "num_prompt_tokens": c.num_prompt_tokens,
                 "finish_reason": c.finish_reason}
                for c in completions
            ],
            "load_s": round(loaded - started, 4), "generate_s": round(time.perf_counter() - loaded, 4),
            "plan": lm.plan.to_json(),
        }))  # fmt: skip
        return
    # The prompt is printed once the call has been checked, so that an error does not follow half a line.
    if no_stream or lm.tokenizer is None or settings.get("num_return_sequences", 1) != 1:
        done = lm.complete(prompt, **settings)
        click.echo(prompt, nl=False)
        for c in done if isinstance(done, list) else [done]:
            click.echo(c.text)
        return
    pieces = lm.stream(prompt, **settings)
    first = next(pieces, "")  # a strategy checks what it is told when it begins
    click.echo(prompt, nl=False)
    for piece in chain((first,), pieces):
        click.echo(piece, nl=False)
        sys.stdout.flush()
    click.echo()
