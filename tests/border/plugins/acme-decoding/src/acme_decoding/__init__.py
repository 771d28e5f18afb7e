"""Decoding `banned`: greedy, and one token is never chosen. `CALLS` counts, for the tests."""

from collections import Counter

from pluglm import UnsupportedRequestError, hookimpl

CALLS = Counter()


@hookimpl
def pluglm_build_decoding(request):
    from acme_decoding.banned import Banned

    options = dict(request.options)
    token = options.pop("token", None)
    reasons = [f"it has no option {name!r}" for name in options]
    reasons += [f"it has no variant {request.variant!r}"] if request.variant else []
    if reasons:
        raise UnsupportedRequestError("decoding banned cannot do this.", why="\n".join(reasons), reasons=tuple(reasons))
    return Banned(token)
