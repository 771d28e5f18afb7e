"""A `DecoderProgram` becomes a torch module: every reason against it first, then the parts, by the name of their op."""

from __future__ import annotations

from pluglm.contracts import DecoderProgram, ModelParts
from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import UnsupportedRequestError
from pluglm_blocks import attention, experts, feed_forward, latent, state_space
from pluglm_blocks.checks import program_refusals
from pluglm_blocks.context import BuildContext, OpKind
from pluglm_blocks.decoder import Decoder
from pluglm_blocks.pass_state import PassPlan

#: Ops by the `op` field of their dataclass.
OPS: dict[str, OpKind] = {
    "attention": OpKind(attention.refusals, attention.SelfAttention),
    "experts": OpKind(experts.refusals, experts.build_experts),
    "feed_forward": OpKind(feed_forward.refusals, feed_forward.build_feed_forward),
    "latent_attention": OpKind(latent.refusals, latent.LatentSelfAttention),
    "state_space": OpKind(state_space.refusals, state_space.Mamba2Mixer),
}


def build_decoder(program: DecoderProgram, parts: ModelParts) -> Decoder:
    """Build the module that a program means, on torch's current default device (the core's: "meta").

    Args:
        program: parameter names follow from it; they are listed in `pluglm.contracts.program`.
        parts: the attention backend, the kernels, and the dtype of the parameters.
    Raises: UnsupportedRequestError with every reason, each with its place, if the program cannot be built.
    """
    plan = PassPlan(program.slots, parts.attention)
    context = BuildContext(program, parts, plan, torch_dtype(parts.dtype), OPS)
    reasons = program_refusals(context)
    if reasons:
        raise UnsupportedRequestError(
            f"this decoder program cannot be built ({len(reasons)} reason{'s' if len(reasons) > 1 else ''}).",
            why="\n".join(reasons),
            fix="Correct the program in the architecture plugin that made it, or choose other parts.",
            reasons=tuple(reasons),
        )
    return Decoder(context)
