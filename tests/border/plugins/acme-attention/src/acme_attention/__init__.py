"""Attention `groups`: one einsum for each key-value head. `CALLS` counts, for the tests."""

from collections import Counter

from pluglm import UnsupportedRequestError, hookimpl

CALLS = Counter()


@hookimpl
def pluglm_build_attention(request):
    from acme_attention.groups import GroupsAttention, refusals

    reasons = [reason for spec in request.specs for reason in refusals(spec)]
    reasons += [f"it has no option {name!r}" for name, _ in request.options]
    reasons += [f"it has no variant {request.variant!r}"] if request.variant else []
    if reasons:
        raise UnsupportedRequestError(
            "attention groups cannot do this.", why="\n".join(reasons), reasons=tuple(reasons)
        )
    return GroupsAttention()
