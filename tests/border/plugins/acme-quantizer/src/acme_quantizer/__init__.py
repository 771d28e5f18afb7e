"""Quantizer `rows8`: int8, one scale a row. `CALLS` counts, for the tests."""

from collections import Counter

from pluglm import UnsupportedRequestError, hookimpl

CALLS = Counter()


@hookimpl
def pluglm_build_quantizer(request):
    from acme_quantizer.rows8 import Rows8

    reasons = [f"it has no option {name!r}" for name, _ in request.options]
    reasons += [f"it has no variant {request.variant!r}"] if request.variant else []
    if reasons:
        raise UnsupportedRequestError("quantizer rows8 cannot do this.", why="\n".join(reasons), reasons=tuple(reasons))
    return Rows8()
