"""Attention by torch's flex_attention: the mask is a function of positions, and blocks that nobody sees are skipped.

Compiled, it is one fused kernel. Uncompiled, torch computes all scores at once and repeats the keys of grouped heads;
so there the heads of a group become further query rows of their key head, which is the same product.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.attention.flex_attention as torch_flex
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from pluglm.contracts.dtypes import torch_dtype
from pluglm.errors import InputError, UnsupportedRequestError
from pluglm_attention_flex.mods import ScoreMod, fold_mask, fold_score, mask_mod, score_mod

if TYPE_CHECKING:
    from torch import Tensor

    from pluglm.contracts import AttentionRequest, AttentionSpec, KeyInfo, KVView

DEVICES = ("cpu", "cuda")
DTYPES = ("float32", "float64", "bfloat16", "float16")
VIEWS = ("dense", "paged", "quantized", "latent")


@dataclass(frozen=True, slots=True)
class FlexMask:
    """What `prepare` made of a spec and this pass's positions, for all layers with that spec.

    blocks: which blocks of queries and keys are computed, and the function that hides pairs inside them.
    scores: what a scaled score becomes; None: it stays. A layer's own bias is not in it.
    q_positions, k_positions: [b, T] and [b, S], for layers with a bias.
    """

    blocks: BlockMask
    scores: ScoreMod | None
    q_positions: Tensor
    k_positions: Tensor


class FlexAttention:
    """One call of flex_attention a layer."""

    name = "flex"
    views: tuple[str, ...] = VIEWS

    def __init__(self, request: AttentionRequest) -> None:
        options = dict(request.options)
        cuda = request.device.partition(":")[0] == "cuda"
        self._compiled = options.get("compile", cuda)
        reasons = _request_refusals(request)
        reasons += [reason for spec in request.specs for reason in self.refusals(spec)]
        if reasons:
            raise UnsupportedRequestError(
                'attention "flex" cannot honour this request.', why="\n".join(dict.fromkeys(reasons)),
                fix='Drop what it refuses, or choose attention="eager", which computes all of it.',
                reasons=tuple(dict.fromkeys(reasons)),
            )  # fmt: skip
        # fullgraph: what cannot be compiled raises, where torch would otherwise run it uncompiled without a word.
        # dynamic: a sequence that grows by a token a step keeps its kernel.
        self._flex = torch.compile(flex_attention, fullgraph=True, dynamic=True) if self._compiled else _uncompiled
        slopes_dtype = torch.float64 if torch_dtype(request.dtype) == torch.float64 else torch.float32
        every = {spec.alibi_slopes for spec in request.specs if spec.alibi_slopes is not None}
        self._slopes = {s: torch.tensor(s, dtype=slopes_dtype, device=request.device) for s in every}

    def refusals(self, spec: AttentionSpec) -> Sequence[str]:
        """Only a spec that contradicts itself is refused."""
        reasons = []
        if spec.num_kv_heads < 1 or spec.num_heads % spec.num_kv_heads:
            reasons.append(f"{spec.num_kv_heads} kv heads do not divide {spec.num_heads} heads")
        if spec.alibi_slopes is not None and len(spec.alibi_slopes) != spec.num_heads:
            reasons.append(f"{len(spec.alibi_slopes)} ALiBi slopes for {spec.num_heads} heads")
        return reasons

    def prepare(self, spec: AttentionSpec, q_positions: Tensor, keys: KeyInfo) -> FlexMask:
        """Find the blocks that some query sees, once a forward pass.

        Compiled, this looks at every pair once: B · T · S bytes for the moment. Uncompiled all pairs are one block,
        since torch skips none then.
        """
        T, S, G = q_positions.shape[1], keys.length, spec.num_heads // spec.num_kv_heads
        sees = mask_mod(spec.mask, q_positions, keys)
        scores = self._scores(spec, q_positions, keys.positions, None)
        if self._compiled:
            rows = max(x.shape[0] for x in (q_positions, keys.positions, *_rows_of(keys)))
            blocks = create_block_mask(sees, rows, None, T, S, device=q_positions.device)
        else:
            blocks = _one_block(fold_mask(sees, T), G * T, S, q_positions.device)
        return FlexMask(blocks, scores, q_positions, keys.positions)

    def attend(
        self, q: Tensor, view: KVView, spec: AttentionSpec, mask: FlexMask,
        *, sinks: Tensor | None = None, bias: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """softmax(softcap(scale · q kᵀ) + alibi + bias, sinks) v over the keys that are seen.

        Args and Returns: as `AttentionBackend.attend`.
        Raises: InputError if the spec has sinks or a bias and the tensor is not given; UnsupportedRequestError, with
            torch's error as its cause, if torch cannot compile the layer.
        """
        k, v = view.dense()
        B, H, T, D = q.shape
        K, G = spec.num_kv_heads, H // spec.num_kv_heads
        scores = mask.scores
        if spec.bias:
            scores = self._scores(spec, mask.q_positions, mask.k_positions, _given(bias, "bias"))
        if self._compiled:
            o, lse = self._call(q, k, v, scores, mask.blocks, spec, enable_gqa=G > 1)
        else:
            rows = q.reshape(B, K, G * T, D)
            o, lse = self._call(rows, k, v, scores and fold_score(scores, T, G), mask.blocks, spec)
            o, lse = o.reshape(B, H, T, spec.v_head_dim), None if lse is None else lse.reshape(B, H, T)
        if lse is None:
            return o
        # With a sink z the sum of exponentials is exp(lse) + exp(z): the weights shrink by 1 / (1 + exp(z - lse)),
        # which is a sigmoid and does not overflow. A query that sees nothing has lse = -inf, and zeros stay zeros.
        share = torch.sigmoid(lse - _given(sinks, "sinks").to(lse.dtype)[:, None])
        return (o * share[..., None]).to(q.dtype)

    def _scores(
        self, spec: AttentionSpec, q_positions: Tensor, k_positions: Tensor, bias: Tensor | None
    ) -> ScoreMod | None:
        slopes = None if spec.alibi_slopes is None else self._slopes[spec.alibi_slopes]
        return score_mod(spec, q_positions, k_positions, slopes, bias)

    def _call(
        self, q: Tensor, k: Tensor, v: Tensor, scores: ScoreMod | None, blocks: BlockMask, spec: AttentionSpec,
        *, enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """The output and, for sinks, the logarithm of the sum of exponentials, [B, heads, rows]."""
        wanted: dict[str, Any] = _LSE if spec.sinks else {}
        try:
            with warnings.catch_warnings():
                # What torch says while it compiles, or of running uncompiled, is documented here and was chosen.
                warnings.simplefilter("ignore")
                result = self._flex(
                    q, k, v, score_mod=scores, block_mask=blocks, scale=spec.scale, enable_gqa=enable_gqa, **wanted
                )
        except (TorchDynamoException, FailOnRecompileLimitHit) as e:
            reason = f"torch.compile failed: {str(e).strip().splitlines()[0] if str(e) else type(e).__name__}"
            raise UnsupportedRequestError(
                'attention "flex" could not be compiled for this layer.', why=f"{reason}\nThe layer is {spec}.",
                fix='Pass compile=False to run it uncompiled, or choose attention="sdpa" or "eager". If it says that a '
                "recompile limit was reached, raise torch._dynamo.config.recompile_limit.",
                reasons=(reason,),
            ) from e  # fmt: skip
        if not spec.sinks:
            return result, None
        o, aux = result
        return o, aux if isinstance(aux, torch.Tensor) else aux.lse


#: How to ask for the log-sum-exp: `return_lse` until torch 2.8, and a deprecated name for `return_aux` since.
_LSE: dict[str, Any] = (
    {"return_aux": torch_flex.AuxRequest(lse=True)} if hasattr(torch_flex, "AuxRequest") else {"return_lse": True}
)


def _uncompiled(q: Tensor, k: Tensor, v: Tensor, **arguments: Any) -> Any:
    """flex_attention in torch's own plain operations. Left alone it would trace itself anew for every shape."""
    with torch.compiler.set_stance("force_eager"):
        return flex_attention(q, k, v, **arguments)


def _one_block(sees: Any, rows: int, S: int, device: torch.device) -> BlockMask:
    """A block mask whose only block holds all pairs."""
    number = torch.ones(1, 1, 1, dtype=torch.int32, device=device)
    index = torch.zeros(1, 1, 1, 1, dtype=torch.int32, device=device)
    return BlockMask.from_kv_blocks(number, index, BLOCK_SIZE=max(rows, S, 1), mask_mod=sees, seq_lengths=(rows, S))


def _rows_of(keys: KeyInfo) -> list[Tensor]:
    return [x for x in (keys.prefix_lengths, keys.segments, keys.q_segments) if x is not None]


def _request_refusals(request: AttentionRequest) -> list[str]:
    reasons = []
    device = request.device.partition(":")[0]
    if device not in DEVICES:
        reasons.append(f"device {request.device} is not one of {', '.join(DEVICES)}")
    if request.dtype not in DTYPES:
        reasons.append(f"dtype {request.dtype} is not one of {', '.join(DTYPES)}")
    if not set(VIEWS) & set(request.views):
        reasons.append(f"it reads {', '.join(VIEWS)} views, and the cache gives {', '.join(request.views) or 'none'}")
    if request.variant is not None:
        reasons.append(f"it has no variants, and {request.variant!r} was asked for")
    reasons += [f"it has no option {name!r}" for name, _ in request.options if name != "compile"]
    if device == "cpu" and dict(request.options).get("compile") is True:
        reasons.append(
            "compile=True on a CPU: torch 2.13's kernel there gave wrong numbers and NaN for heads of 8 channels, and "
            "was not valid C++ for lengths that grow"
        )
    if request.dtype == "float64" and dict(request.options).get("compile", device == "cuda") is True:
        reasons.append("float64 compiled: torch's kernels add up in float32; pass compile=False")
    reasons += [
        f"option compile is {value!r}, and it is True or False"
        for name, value in request.options
        if name == "compile" and not isinstance(value, bool)
    ]
    return reasons


def _given(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise InputError(
            f"attend was called without {name}.", why=f"the layer's spec says that it has {name}.",
            fix=f"Pass {name}= from the layer.", argument=name,
        )  # fmt: skip
    return tensor
