"""The kit has teeth: backends that are wrong in one known way each fail it, and fail where they are wrong."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pluglm_attention_eager
import pytest
import torch
from pluglm_attention_eager.eager import EagerAttention

from pluglm.contracts import DenseView
from pluglm.testing.attention import AttentionContract
from pluglm.testing.attention_oracle import LAYOUTS


def with_mask(spec, **changes):
    return replace(spec, mask=replace(spec.mask, **changes))


class DropsPadding(EagerAttention):
    def prepare(self, spec, q_positions, keys):
        return super().prepare(spec, q_positions, replace(keys, positions=keys.positions.clamp(min=0)))


class TakesCellsForPositions(EagerAttention):
    def prepare(self, spec, q_positions, keys):
        cells = torch.arange(keys.length).expand_as(keys.positions)
        return super().prepare(spec, q_positions, replace(keys, positions=cells.where(keys.positions >= 0, -1)))


class AlignsToTheFirstKey(EagerAttention):
    def prepare(self, spec, q_positions, keys):
        return super().prepare(spec, torch.arange(q_positions.shape[1])[None], keys)


class WindowOffByOne(EagerAttention):
    def prepare(self, spec, q_positions, keys):
        window = None if spec.mask.window is None else spec.mask.window + 1
        return super().prepare(with_mask(spec, window=window), q_positions, keys)


class ChunkAsWindow(EagerAttention):
    def prepare(self, spec, q_positions, keys):
        return super().prepare(with_mask(spec, window=spec.mask.chunk, chunk=None), q_positions, keys)


class ForgetsThePrefix(EagerAttention):
    def prepare(self, spec, q_positions, keys):
        return super().prepare(with_mask(spec, prefix=False), q_positions, keys)


class MixesSegments(EagerAttention):
    def prepare(self, spec, q_positions, keys):
        return super().prepare(spec, q_positions, replace(keys, segments=None, q_segments=None))


class AlwaysCausal(EagerAttention):
    def prepare(self, spec, q_positions, keys):
        return super().prepare(with_mask(spec, causal=True), q_positions, keys)


class IgnoresTheSoftcap(EagerAttention):
    def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
        return super().attend(q, view, replace(spec, softcap=None), mask, sinks=sinks, bias=bias)


class IgnoresSinks(EagerAttention):
    def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
        return super().attend(q, view, replace(spec, sinks=False), mask, sinks=sinks, bias=bias)


class IgnoresTheBias(EagerAttention):
    def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
        return super().attend(q, view, replace(spec, bias=False), mask, sinks=sinks, bias=bias)


class IgnoresAlibi(EagerAttention):
    def prepare(self, spec, q_positions, keys):
        return super().prepare(spec, q_positions, keys)._replace(alibi=None)


class InterleavesGroups(EagerAttention):
    def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
        K = spec.num_kv_heads
        order = torch.arange(spec.num_heads).view(-1, K).T.flatten()  # head h reads key head h % K
        return super().attend(q[:, order], view, spec, mask, sinks=sinks, bias=bias)[:, order.argsort()]


BROKEN = [
    (DropsPadding, "padding"), (TakesCellsForPositions, "causal"), (AlignsToTheFirstKey, "causal"),
    (WindowOffByOne, "window"), (ChunkAsWindow, "chunk"), (ForgetsThePrefix, "prefix"), (MixesSegments, "segments"),
    (AlwaysCausal, "bidirectional"), (IgnoresTheSoftcap, "softcap"), (IgnoresSinks, "sinks"),
    (IgnoresTheBias, "bias"), (IgnoresAlibi, "alibi"), (InterleavesGroups, "grouped-heads"),
]  # fmt: skip


def contract(backend: type, **facts: Any) -> AttentionContract:
    """The kit, pointed at a backend that claims what the reference claims, `facts` excepted."""

    class Contract(AttentionContract):
        provider = SimpleNamespace(pluglm_build_attention=backend)

        def facts(self):
            intact = type("Intact", (AttentionContract,), {"provider": pluglm_attention_eager})()
            return {**intact.facts(), **facts}

    return Contract()


def failing_features(kit: AttentionContract, *features: str) -> set[str]:
    """Those of the features of which some layout fails in float32."""
    failed = set()
    for feature in features:
        for layout in LAYOUTS:
            try:
                kit.test_a_listed_feature_agrees_with_the_oracle(feature, layout, "float32")
            except AssertionError:
                failed.add(feature)
    return failed


def test_the_intact_backend_fails_nothing():
    kit = contract(EagerAttention)
    assert failing_features(kit, "causal", *kit.features()) == set()


@pytest.mark.parametrize(("backend", "feature"), BROKEN, ids=lambda value: getattr(value, "__name__", None))
def test_a_backend_that_is_wrong_in_one_way_fails_where_it_is_wrong(backend, feature):
    kit = contract(backend)
    assert failing_features(kit, feature) == {feature}
    with pytest.raises(AssertionError):
        kit.test_any_positions_and_any_mix_of_listed_features_agree_with_the_oracle()


def test_nan_and_the_mean_of_values_are_no_answer_for_a_blind_query():
    class Leaks(EagerAttention):
        fill = float("nan")

        def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
            o = super().attend(q, view, spec, mask, sinks=sinks, bias=bias)
            blind = ~mask.visible.any(dim=-1)[:, 0, :, :, None]
            return o.masked_fill(blind, self.fill)

    class Means(Leaks):
        fill = 0.25

    for backend in (Leaks, Means):
        with pytest.raises(AssertionError, match="blind"):
            contract(backend).test_a_query_that_sees_nothing_gives_zeros("float32")


def test_a_backend_that_repeats_keys_for_every_head_is_found_out():
    class Expands(EagerAttention):
        def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
            groups = spec.num_heads // spec.num_kv_heads
            k, v = (x.repeat_interleave(groups, dim=1) for x in view.dense())
            spec = replace(spec, num_kv_heads=spec.num_heads)
            return super().attend(q, DenseView(k, v), spec, mask, sinks=sinks, bias=bias)

    with pytest.raises(AssertionError, match="expanded"):
        contract(Expands).test_keys_and_values_are_not_expanded()


def test_a_backend_that_keeps_the_mask_in_itself_is_found_out():
    class Remembers(EagerAttention):
        def prepare(self, spec, q_positions, keys):
            self.mask = super().prepare(spec, q_positions, keys)

        def attend(self, q, view, spec, mask, *, sinks=None, bias=None):
            return super().attend(q, view, spec, self.mask, sinks=sinks, bias=bias)

    with pytest.raises(AssertionError):
        contract(Remembers).test_passes_that_overlap_do_not_mix()


def test_a_backend_that_computes_what_it_does_not_list_is_found_out():
    kit = contract(EagerAttention, features=["grouped-heads"])
    for feature in ("softcap", "padding", "segments", "window"):
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            kit.test_a_feature_that_is_not_listed_is_refused_with_a_reason(feature)


def test_a_backend_that_drops_what_the_user_wrote_is_found_out():
    class Deaf(EagerAttention):
        def __init__(self, request):
            super().__init__(replace(request, variant=None, options=()))

    with pytest.raises(pytest.fail.Exception):
        contract(Deaf).test_an_unknown_variant_option_view_or_dtype_is_refused()


def test_a_manifest_with_an_unknown_word_is_found_out():
    with pytest.raises(AssertionError, match="sliding"):
        contract(EagerAttention, features=["sliding"]).test_the_object_says_what_the_manifest_says()
