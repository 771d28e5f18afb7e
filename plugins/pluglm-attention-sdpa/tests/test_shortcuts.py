"""What sdpa leaves out of the mask, and that leaving it out is right (the contract compares the numbers)."""

from __future__ import annotations

import pluglm_attention_sdpa
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from pluglm.contracts import AttentionRequest, AttentionSpec, DenseView, KeyInfo, MaskSpec
from pluglm.errors import UnsupportedRequestError

PLAIN = AttentionSpec(num_heads=6, num_kv_heads=6, head_dim=8, v_head_dim=8, scale=0.4)
GROUPED = AttentionSpec(num_heads=6, num_kv_heads=3, head_dim=8, v_head_dim=8, scale=0.4)


def build(*specs, device="cpu", dtype="float32"):
    request = AttentionRequest(specs=specs, device=device, dtype=dtype)
    return pluglm_attention_sdpa.pluglm_build_attention(request=request)


def prepared(spec, T, S, *, dense=True):
    positions = torch.arange(S)[None]
    return build(spec).prepare(spec, positions[:, S - T :], KeyInfo(positions, S, dense))


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_a_plain_decode_step_has_no_mask():
    assert prepared(PLAIN, T=1, S=90) is None


def test_a_plain_decode_step_is_one_operation_a_layer_and_views():
    for spec in (PLAIN, GROUPED):
        mask = prepared(spec, T=1, S=90)
        q, k = torch.randn(2, spec.num_heads, 1, 8), torch.randn(2, spec.num_kv_heads, 90, 8)
        backend, view = build(spec), DenseView(k, k)
        with Operations() as seen:
            backend.attend(q, view, spec, mask)
        assert set(seen.names) <= {"view", "_scaled_dot_product_flash_attention_for_cpu"}


def test_a_first_prompt_is_masked_by_the_kernel_itself():
    mask = prepared(GROUPED, T=5, S=5)
    assert mask.causal
    assert mask.additive is None


def test_a_window_that_reaches_every_key_needs_no_mask_and_a_shorter_one_does():
    def windowed(size):
        return AttentionSpec(6, 6, 8, 8, 0.4, MaskSpec(window=size))

    assert prepared(windowed(5), T=5, S=5).causal
    assert prepared(windowed(4), T=5, S=5).additive is not None
    assert prepared(windowed(90), T=1, S=90) is None


def test_a_decode_step_under_a_window_or_chunk_cuts_the_keys_and_needs_no_mask():
    window = prepared(AttentionSpec(6, 6, 8, 8, 0.4, MaskSpec(window=20)), T=1, S=90)
    chunk = prepared(AttentionSpec(6, 6, 8, 8, 0.4, MaskSpec(chunk=32)), T=1, S=90)
    assert (window.start, window.additive) == (70, None)
    assert (chunk.start, chunk.additive) == (64, None)


def test_blind_queries_are_looked_for_only_where_there_can_be_some():
    assert prepared(PLAIN, T=5, S=7).blind is None
    assert prepared(PLAIN, T=5, S=7, dense=False).blind is not None


def test_off_the_cpu_grouped_heads_with_a_mask_become_query_rows():
    positions = torch.arange(80)[None]
    backend = build(GROUPED, device="cuda", dtype="bfloat16")
    mask = backend.prepare(GROUPED, positions[:, 40:], KeyInfo(positions, 80, dense=True))
    assert mask.rows == 80
    assert mask.additive.shape == (1, 1, 80, 80)


def test_a_refusal_names_every_reason_and_what_to_choose():
    specs = AttentionSpec(6, 6, 8, 8, 0.4, softcap=50.0), AttentionSpec(6, 6, 8, 8, 0.4, sinks=True)
    with pytest.raises(UnsupportedRequestError, match='attention="eager"') as caught:
        build(*specs)
    assert [reason.partition(":")[0] for reason in caught.value.reasons] == ["softcap 50.0", "sinks"]


def test_a_bias_that_a_device_would_round_is_refused():
    with pytest.raises(UnsupportedRequestError, match="round"):
        build(AttentionSpec(6, 6, 8, 8, 0.4, bias=True), device="cuda", dtype="bfloat16")
