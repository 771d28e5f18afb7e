"""What is measured: prompts, and what follows them."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Task:
    """One kind of work.

    Attributes:
        name: on the command line. prompt: tokens of each row. tokens: passes that follow it and are timed; 0: the
            prompt itself is timed. rows: of the batch. cache_type: of keys and values; None: as the computing dtype,
            and llama.cpp's own default, f16.
    """

    name: str
    prompt: int
    tokens: int
    rows: int = 1
    cache_type: str | None = None

    @property
    def cells(self) -> int:
        """That a row holds at the end."""
        return self.prompt + max(self.tokens, CHECKED)


#: Tokens fed one by one after the prompt while the contenders are verified.
CHECKED = 16
TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task("decode", prompt=16, tokens=64),
        Task("batch", prompt=16, tokens=32, rows=8),
        Task("prefill", prompt=512, tokens=0),
        Task("long", prompt=4096, tokens=32, cache_type="bf16"),
    )
}


def fitted(task: Task, tokens: int | None, config: Mapping[str, Any]) -> Task | str:
    """The task with another number of tokens, or why a model is too short for it."""
    if tokens is not None and task.tokens:
        task = replace(task, tokens=tokens)
    reach = config["max_position_embeddings"]
    if task.cells > reach:
        return f"{task.cells} tokens do not fit into its context of {reach}"
    return task


def draw(task: Task, vocab_size: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts [B][T], and the tokens [CHECKED][B] that all contenders are fed after them. Seeded."""
    source = random.Random(0)
    tokens = range(3, vocab_size)
    rows = [source.choices(tokens, k=task.prompt) for _ in range(task.rows)]
    return rows, [source.choices(tokens, k=task.rows) for _ in range(CHECKED)]
