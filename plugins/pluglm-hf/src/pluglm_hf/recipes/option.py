"""The option of the provider `recipe`: the function that is to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pluglm.contracts import DecodingRequest
from pluglm.errors import UnsupportedRequestError


def read_function(request: DecodingRequest) -> Callable[..., Any]:
    """The function. Raises UnsupportedRequestError if there is none, or something else was said, too."""
    options = dict(request.options)
    function = options.pop("function", None)
    reasons = [f"it has no option {name!r}" for name in options]
    if request.variant is not None:
        reasons.append(f"it has no variant {request.variant!r}")
    if not callable(function):
        reasons.append("it was given no function" if function is None else f"function is a {type(function).__name__}")
    if reasons:
        raise UnsupportedRequestError(
            'decoding "recipe" cannot honour the request.', why="\n".join(reasons),
            fix="Pass the function to the call: lm.generate(prompt, custom_generate=function).", reasons=tuple(reasons),
        )  # fmt: skip
    found: Callable[..., Any] = function
    return found
