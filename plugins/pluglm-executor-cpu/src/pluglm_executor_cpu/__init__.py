"""The entry point of the native executor; imports torch only when it builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Executor, ExecutorRequest


@hookimpl
def pluglm_build_executor(request: ExecutorRequest) -> Executor:
    """Pack the weights and bind the operations. Raises UnsupportedRequestError with every reason."""
    from pluglm_executor_cpu.executor import build

    return build(request)
