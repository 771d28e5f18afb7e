"""Cache `chunks`: a list of tensors, one for each pass. `CALLS` counts, for the tests."""

from collections import Counter

from pluglm import UnsupportedRequestError, hookimpl

CALLS = Counter()


@hookimpl
def pluglm_build_cache(request):
    from acme_cache.chunks import OPERATIONS, ChunksLayout

    reasons = [f"it makes no {slot.kind} slots" for slot in request.slots if slot.kind != "kv"]
    reasons += [f"it has no {name}" for name in request.operations if name not in OPERATIONS]
    reasons += [f"it has no option {name!r}" for name, _ in request.options]
    reasons += [f"it has no variant {request.variant!r}"] if request.variant else []
    if reasons:
        raise UnsupportedRequestError("cache chunks cannot do this.", why="\n".join(reasons), reasons=tuple(reasons))
    return ChunksLayout(request.slots)
