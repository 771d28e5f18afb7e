"""`auto` is a planner: facts, candidates, reasons, choices that fit together; what is named is honoured or refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from pluglm import IncompatiblePluginError, PlanError, PluginDisabledError, PluginNotFoundError, hookimpl
from pluglm.contracts import AttentionSpec, KVSlot, MaskSpec, ModelDescription, StateSlot, WeightMap
from pluglm.kinds import KINDS
from pluglm.manager import Manager
from pluglm.planner import Demand, Planner, Wanted
from pluglm.provider import Provider
from pluglm.testing.isolation import fake_provider, isolated_manager

SPEC = AttentionSpec(6, 3, 8, 8, 8**-0.5, MaskSpec(window=5))


SLOT = KVSlot(3, 8, 8, window=5)


def description(specs: Sequence[AttentionSpec] = (SPEC,), slots: Any = (SLOT,)) -> ModelDescription:
    return ModelDescription("tiny", None, WeightMap(()), 11, 48, 1, 64, tuple(specs), tuple(slots))


def attention(name: str, views: Sequence[str] = ("dense",), features: Sequence[str] = ("grouped-heads", "window"),
              **facts: Any) -> Provider:  # fmt: skip
    return fake_provider("attention", name, object(), facts={"views": views, "features": features, **facts})


def cache(
    name: str, views: Sequence[str] = ("dense",), slots: Sequence[str] = ("kv", "window"), **facts: Any
) -> Provider:
    return fake_provider("cache", name, object(), facts={"views": views, "slots": slots, **facts})


def pair(manager: Manager, *, attention: str = "auto", cache: str = "auto", operations: Sequence[str] = (),
         model: ModelDescription | None = None, device: str = "cpu") -> Any:  # fmt: skip
    return Planner(manager).attention_and_cache(
        model or description(), Wanted(attention), Wanted(cache), device=device, dtype="float32", operations=operations
    )


def test_auto_takes_the_best_tier_and_lists_the_others_as_next_in_line() -> None:
    manager = isolated_manager(
        attention("eager", tier="reference"), attention("sdpa"), attention("fast", tier="tuned"), cache("dynamic")
    )
    choice, _ = pair(manager)
    assert choice.provider == "acme-test:attention/fast"
    assert choice.reason == "tier tuned; reads dense"
    assert [(r.provider.rpartition("/")[2], r.reasons) for r in choice.rejected] == [
        ("sdpa", ("next in line",)), ("eager", ("next in line",)),
    ]  # fmt: skip


def test_every_failing_predicate_of_a_candidate_is_kept() -> None:
    narrow = attention(
        "narrow", features=("grouped-heads",), requires={"devices": ["cuda"], "head_dim": {"values": [64]}}
    )
    choice, _ = pair(isolated_manager(narrow, attention("sdpa"), cache("dynamic")))
    (rejected,) = choice.rejected
    text = "; ".join(rejected.reasons)
    assert "cuda" in text
    assert "window" in text
    assert "head_dim" in text or "head size" in text
    assert len(rejected.reasons) == 3


def test_a_provider_without_facts_is_never_chosen_by_auto_and_works_when_named() -> None:
    bare = fake_provider("attention", "bare", object())
    manager = isolated_manager(bare, attention("sdpa"), cache("dynamic"))
    assert pair(manager)[0].provider == "acme-test:attention/sdpa"
    assert pair(manager, attention="bare")[0].provider == "acme-test:attention/bare"
    assert pair(manager)[0].rejected[0].reasons == ("has no pluglm.json; works when named",)


def test_parts_must_share_a_view_and_a_worse_pair_that_fits_beats_a_better_one_that_does_not() -> None:
    manager = isolated_manager(
        attention("paged", views=("paged",), tier="tuned"),
        attention("sdpa"),
        cache("dynamic"),
        cache("blocks", views=("paged",)),
    )
    assert [c.provider.rpartition("/")[2] for c in pair(manager)] == ["paged", "blocks"]
    chosen, layout = pair(manager, cache="dynamic")
    assert (chosen.provider, layout.provider) == ("acme-test:attention/sdpa", "acme-test:cache/dynamic")
    assert chosen.rejected[0].reasons == ("reads paged; acme-test:cache/dynamic gives dense",)


def test_an_impossible_pair_of_named_parts_is_refused_with_the_pairs_that_work() -> None:
    manager = isolated_manager(
        attention("paged", views=("paged",)), attention("sdpa"), cache("dynamic"), cache("blocks", views=("paged",))
    )
    with pytest.raises(PlanError) as caught:
        pair(manager, attention="sdpa", cache="blocks")
    message = str(caught.value)
    assert "attention='sdpa' and cache='blocks' do not fit together" in message
    assert "acme-test:attention/sdpa reads dense; acme-test:cache/blocks gives paged" in message
    assert "attention='paged' with cache='blocks'" in message
    assert "attention='sdpa' with cache='dynamic'" in message


def test_a_named_part_that_cannot_is_refused_with_every_reason_and_what_could() -> None:
    manager = isolated_manager(attention("plain", features=("grouped-heads",)), attention("sdpa"), cache("dynamic"))
    with pytest.raises(PlanError) as caught:
        pair(manager, attention="plain")
    assert "attention='plain' (acme-test:attention/plain 1.0) cannot do what this model needs" in str(caught.value)
    assert "window" in str(caught.value)
    assert "attention='sdpa'" in str(caught.value)
    assert caught.value.plugin == "acme-test:attention/plain"


def test_a_layout_must_make_every_kind_of_slot_and_offer_every_operation_the_strategy_needs() -> None:
    hybrid = description(slots=(KVSlot(3, 8, 8), StateSlot((("conv", (4, 3), None),))))
    manager = isolated_manager(
        attention("sdpa"), cache("dynamic", operations=["crop"]), cache("hybrid", slots=["kv", "state"])
    )
    assert pair(manager, model=hybrid)[1].provider == "acme-test:cache/hybrid"
    with pytest.raises(PlanError, match="state"):
        pair(manager, model=hybrid, operations=["crop"])


def test_nothing_able_lists_each_candidate_with_its_reasons() -> None:
    manager = isolated_manager(attention("gpu", requires={"devices": ["cuda"]}), cache("dynamic"))
    with pytest.raises(PlanError) as caught:
        pair(manager)
    assert "none of the installed attention plugins can do what this model needs" in str(caught.value)
    assert "acme-test:attention/gpu 1.0: needs device cuda" in str(caught.value)


def test_nothing_installed_says_what_to_install() -> None:
    with pytest.raises(PluginNotFoundError, match=r"no attention plugin is installed") as caught:
        pair(isolated_manager(cache("dynamic")))
    assert 'pip install "pluglm[standard]"' in str(caught.value)


def test_a_mismatch_of_api_versions_is_refused_with_both_versions() -> None:
    old = attention("old", api=">=0.1,<0.9")
    with pytest.raises(IncompatiblePluginError) as caught:
        pair(isolated_manager(old, cache("dynamic")), attention="old")
    assert "another version of the attention API" in str(caught.value)
    assert (caught.value.needs, caught.value.have) == (">=0.1,<0.9", KINDS["attention"].version)
    choice, _ = pair(isolated_manager(old, attention("sdpa"), cache("dynamic")))
    assert "API" in choice.rejected[0].reasons[0]


def test_an_invalid_manifest_disqualifies_its_provider_only() -> None:
    broken = attention("broken", tier="golden")
    choice, _ = pair(isolated_manager(broken, attention("sdpa"), cache("dynamic")))
    assert choice.provider == "acme-test:attention/sdpa"
    assert "pluglm.json is not valid" in choice.rejected[0].reasons[0]


def test_a_switched_off_provider_is_passed_over_and_refused_when_named() -> None:
    off = attention("off", tier="tuned")
    manager = isolated_manager(
        off, attention("sdpa"), cache("dynamic"), refusal=lambda p: "disabled by you" if p.name == "off" else None
    )
    choice, _ = pair(manager)
    assert choice.rejected[0].reasons == ("disabled by you",)
    with pytest.raises(PluginDisabledError):
        pair(manager, attention="off")


def test_an_observer_orders_candidates_and_the_plan_says_so() -> None:
    class Ranking:
        @hookimpl
        def pluglm_rank(self, kind: str, candidates: Sequence[Provider]) -> Sequence[str] | None:
            return [p.id for p in reversed(candidates)] if kind == "attention" else None

    manager = isolated_manager(
        attention("a"), attention("b"), cache("dynamic"), fake_provider("hooks", "order", Ranking())
    )
    assert pair(manager)[0].provider == "acme-test:attention/b"
    assert pair(manager)[0].reason.startswith("first in the order an observer gave")


def test_a_failed_provider_is_excluded_with_its_failure_as_the_reason() -> None:
    manager = isolated_manager(attention("a", tier="tuned"), attention("b"), cache("dynamic"))
    planner = Planner(manager, {"acme-test:attention/a": "quarantined at build: OSError: libx.so"})
    choice, _ = planner.attention_and_cache(
        description(), Wanted(), Wanted(), device="cpu", dtype="float32", operations=()
    )
    assert choice is not None
    assert choice.provider == "acme-test:attention/b"
    assert choice.rejected[0].reasons == ("quarantined at build: OSError: libx.so",)


def decoding(name: str, *fields: str) -> Provider:
    return fake_provider("decoding", name, object(), facts={"features": fields})


STRATEGIES = (
    decoding("beam", "length_penalty", "max_new_tokens", "num_beams"), decoding("greedy", "max_new_tokens"),
    decoding("sampling", "max_new_tokens", "temperature"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "name"),
    [((), "greedy"), (("max_new_tokens",), "greedy"), (("temperature",), "sampling"), (("num_beams",), "beam")],
)
def test_decoding_follows_the_fields_of_the_call(fields: tuple[str, ...], name: str) -> None:
    choice = Planner(isolated_manager(*STRATEGIES)).decoding(Wanted(), fields, device="cpu")
    assert choice.provider == f"acme-test:decoding/{name}"


def test_a_strategy_that_means_something_else_is_used_only_when_named() -> None:
    planner = Planner(isolated_manager(*STRATEGIES))
    with pytest.raises(PlanError, match="Name one: decoding='beam'"):
        planner.decoding(Wanted(), ("length_penalty",), device="cpu")
    assert planner.decoding(Wanted("beam"), ("length_penalty",), device="cpu").provider == "acme-test:decoding/beam"


def test_tuned_kernels_are_chosen_for_their_ops_and_others_run_the_reference() -> None:
    kernel = fake_provider("kernel", "fast", object(), facts={"features": ["rope"], "tier": "tuned"})
    (choice,) = Planner(isolated_manager(kernel)).kernels(device="cpu", dtype="float32")
    assert (choice.kind, choice.provider) == ("kernel:rope", "acme-test:kernel/fast")


def test_planning_is_the_same_whatever_the_order_of_installation() -> None:
    providers = [attention("a"), attention("b", tier="tuned"), cache("c"), cache("d")]
    plans: list[tuple[Any, ...]] = [pair(isolated_manager(*order)) for order in (providers, providers[::-1])]
    facts: list[Mapping[str, Any]] = [{c.kind: (c.provider, c.rejected) for c in plan} for plan in plans]
    assert facts[0] == facts[1]


def test_a_demand_for_several_head_sizes_names_each_that_is_refused() -> None:
    narrow = attention("narrow", requires={"head_dim": {"max": 16}})
    reasons = Planner(isolated_manager(narrow)).reasons(narrow, Demand("cpu", "float32", head_dims=(8, 32)))
    assert len(reasons) == 1
    assert "32" in reasons[0]


def test_a_provider_whose_packages_are_missing_is_passed_over_with_the_requirement() -> None:
    needy = attention("needy", tier="tuned", requires={"packages": ["acme-not-there>=2"]})
    choice, _ = pair(isolated_manager(needy, attention("sdpa"), cache("dynamic")))
    assert choice.provider == "acme-test:attention/sdpa"
    assert "acme-not-there>=2" in choice.rejected[0].reasons[0]
