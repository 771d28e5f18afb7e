"""The strategies by name."""

from __future__ import annotations

from pluglm_decoding_blocks.failures import refused

from pluglm.contracts import DecodingRequest
from pluglm_decoding_contrastive.call import ContrastiveStrategy
from pluglm_decoding_contrastive.layer_contrast import DoLa
from pluglm_decoding_contrastive.search import ContrastiveSearch

_STRATEGIES: dict[str, type[ContrastiveStrategy]] = {strategy.name: strategy for strategy in (ContrastiveSearch, DoLa)}


def build(name: str, request: DecodingRequest) -> ContrastiveStrategy:
    """The strategy of this name. Raises UnsupportedRequestError for a variant or option: there are none."""
    reasons = [f"option {option!r} is not known" for option, _ in request.options]
    if request.variant is not None:
        reasons.insert(0, f"variant {request.variant!r} is not known")
    if reasons:
        raise refused(name, reasons, f'Write decoding="{name}"; settings are arguments of the call.')
    return _STRATEGIES[name](request)
