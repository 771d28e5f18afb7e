"""What surrounds a compilation: a word on the terminal, where results are kept, and errors that say what to do."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

from pluglm.checkpoint.progress import open_bar, wanted
from pluglm.errors import UnsupportedRequestError

#: Where torch keeps compiled graphs from process to process.
VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
COMPILER_ERRORS = (TorchDynamoException, FailOnRecompileLimitHit)


@contextmanager
def compiling(label: str, cache_dir: str | None) -> Iterator[None]:
    """One compilation at a time: it sets an environment variable.

    Args:
        cache_dir: where compiled code is kept; None: where torch keeps it.
    """
    bar = open_bar(label, None, in_bytes=False)[0] if wanted() else None
    before = os.environ.get(VARIABLE)
    if cache_dir is not None:
        os.environ[VARIABLE] = cache_dir
    try:
        yield
    finally:
        if cache_dir is not None:
            os.environ.pop(VARIABLE, None)
            if before is not None:
                os.environ[VARIABLE] = before
        if bar is not None:
            bar.stop()


def failed(error: Exception, backend: str, rows: int, tokens: int) -> UnsupportedRequestError:
    """What to raise if torch cannot compile a pass."""
    reason = f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
    return UnsupportedRequestError(
        f"torch.compile with the backend {backend!r} failed on passes of {rows} × {tokens} tokens.", why=reason,
        fix='Choose executor="eager", or another backend: options={"executor": {"backend": "aot_eager"}}.',
        reasons=(reason,),
    )  # fmt: skip
