"""Executor `eager`: a forward pass is a call of the module."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import UnsupportedRequestError, hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Executor, ExecutorRequest


@hookimpl
def pluglm_build_executor(request: ExecutorRequest) -> Executor:
    """Any module on any device; there is nothing to vary."""
    if request.variant is not None or request.options:
        asked = [f"variant {request.variant!r}"] if request.variant else []
        asked += [f"option {name!r}" for name, _ in request.options]
        raise UnsupportedRequestError(
            f"the eager executor knows no {' and no '.join(asked)}.",
            why="it calls the module as it is.",
            fix='Write executor="eager".',
            reasons=tuple(asked),
        )
    from pluglm_executor_eager.eager import EagerExecutor

    return EagerExecutor(request.module)
