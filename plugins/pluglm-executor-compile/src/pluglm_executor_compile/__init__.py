"""The entry point of the compile executor; imports torch only when it builds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pluglm import hookimpl

if TYPE_CHECKING:
    from pluglm.contracts import Executor, ExecutorRequest


@hookimpl
def pluglm_build_executor(request: ExecutorRequest) -> Executor:
    """Get a model ready for torch.compile. Raises UnsupportedRequestError with every reason."""
    from pluglm_executor_compile.executor import build

    return build(request)
