"""The conformance kit for attention backends.

    import pluglm_attention_sdpa
    from pluglm.testing.attention import AttentionContract

    class TestSdpa(AttentionContract):
        provider = pluglm_attention_sdpa

What is tested follows from the provider's `pluglm.json`: a feature it lists must work, one it does not list must be
refused, in words, before anything is computed.
"""

from __future__ import annotations

import importlib
import importlib.resources
import json
from collections.abc import Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from pluglm.contracts import AttentionBackend, AttentionRequest, AttentionSpec
from pluglm.errors import PluglmError, UnsupportedRequestError
from pluglm.testing.attention_oracle import FEATURES, LAYOUTS, Case, Layout, case_of, expected, spec_of, stored

DTYPES = ("float32", "float64", "bfloat16", "float16")


class AttentionContract:
    """Subclass it under a name that starts with Test.

    Attributes:
        provider: the module or object with the hook `pluglm_build_attention`: what your entry point names.
        name: which attention provider of the package's `pluglm.json`; None: the only one.
        device: where the tensors of the tests lie.
        tolerances: (atol, rtol) by dtype; those not named here are the `numerics` of `pluglm.json`.
    """

    provider: ClassVar[Any]
    name: ClassVar[str | None] = None
    device: ClassVar[str] = "cpu"
    tolerances: ClassVar[Mapping[str, tuple[float, float]]] = {"float32": (1e-5, 1e-5), "float64": (1e-10, 1e-10)}

    # What a subclass may replace.

    def facts(self) -> Mapping[str, Any]:
        """The provider's entry in its package's `pluglm.json`."""
        module = self.provider.__name__ if isinstance(self.provider, ModuleType) else type(self.provider).__module__
        package = module.partition(".")[0]
        text = (importlib.resources.files(importlib.import_module(package)) / "pluglm.json").read_text("utf-8")
        found = [
            facts
            for facts in json.loads(text)["providers"]
            if facts["kind"] == "attention" and self.name in (None, facts["name"])
        ]
        assert len(found) == 1, f"{len(found)} attention providers in {package}/pluglm.json; set `name` to one of them."
        facts: dict[str, Any] = found[0]
        return facts

    def build(self, *specs: AttentionSpec, dtype: str = "float32", **request: Any) -> AttentionBackend:
        """The backend for these specs; the provider's hook is called as the core calls it."""
        wanted = AttentionRequest(specs=specs, device=self.device, dtype=dtype, **request)
        backend: AttentionBackend = self.provider.pluglm_build_attention(request=wanted)
        return backend

    # What the facts settle.

    def features(self) -> tuple[str, ...]:
        """The listed words that this kit knows."""
        return tuple(name for name in FEATURES if name in self.facts().get("features", ()))

    def dtypes(self) -> tuple[str, ...]:
        """The listed dtypes that this kit knows; all if none are listed."""
        listed = self.facts().get("requires", {}).get("dtypes", ())
        return tuple(name for name in DTYPES if name in listed or not listed)

    def spec(self, *features: str) -> AttentionSpec:
        """A spec with these features, and with grouped heads if the backend has them."""
        grouped = ("grouped-heads",) if "grouped-heads" in self.features() else ()
        return spec_of((*grouped, *features))

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """One test for each feature, dtype and layout that the facts allow."""
        listed, padding = self.features(), "padding" in self.features()
        values: dict[str, tuple[str, ...]] = {
            "feature": ("causal", *listed),
            "unlisted": tuple(name for name in FEATURES if name not in listed),
            "dtype": self.dtypes(),
            "layout": tuple(name for name, layout in LAYOUTS.items() if layout.dense or padding),
            "view": tuple(self.facts().get("views", ())),
        }
        for name in sorted(values.keys() & set(metafunc.fixturenames)):
            metafunc.parametrize(name, values[name])

    def check(self, output: Tensor, case: Case, dtype: str = "float32") -> None:
        """Raises AssertionError unless `output` is finite, of the right shape and dtype, and near the oracle's."""
        shape = (*case.q.shape[:3], case.v.shape[3])
        assert output.shape == shape, f"the output has shape {tuple(output.shape)}, not {shape}"
        assert output.dtype == case.q.dtype, f"the output is {output.dtype}, the queries are {case.q.dtype}"
        assert bool(output.isfinite().all()), "the output holds NaN or infinity"
        numerics = self.facts().get("numerics", {})
        atol, rtol = self.tolerances.get(dtype, (numerics.get("atol", 0.0), numerics.get("rtol", 0.0)))
        want, real = expected(case), (case.q_positions >= 0).cpu()[:, None, :, None]
        error = ((output.cpu().double() - want).abs() - rtol * want.abs()).masked_fill(~real, 0.0)
        worst = float(error.max())
        assert worst <= atol, f"{case.spec.features or 'plain'}: off by {worst:.3g} beyond rtol; atol is {atol:.3g}"

    # Arithmetic.

    def test_a_listed_feature_agrees_with_the_oracle(self, feature: str, layout: str, dtype: str) -> None:
        """Feature × arrangement of positions × dtype; sizes are pairwise different."""
        spec = self.spec(*({feature} & FEATURES.keys()))
        case = case_of(
            LAYOUTS[layout], spec, dtype=getattr(torch, dtype), device=self.device, segments=feature == "segments"
        )
        self.check(case.run(self.build(spec, dtype=dtype)), case, dtype)

    # No shrinking: a case has at most 6 × 11 positions and is read as it is; shrinking takes minutes on two cores.
    @settings(
        max_examples=100, phases=[Phase.generate], deadline=None, derandomize=True, database=None,
        suppress_health_check=[HealthCheck.differing_executors, HealthCheck.too_slow],
    )  # fmt: skip
    @given(data=st.data())
    def test_any_positions_and_any_mix_of_listed_features_agree_with_the_oracle(self, data: st.DataObject) -> None:
        """Holes, padding and order at random, several features at once."""
        usable = [name for name in self.features() if name != "padding"]
        wanted = data.draw(st.lists(st.sampled_from(usable), unique=True)) if usable else []
        sparse = "padding" in self.features() and data.draw(st.booleans())
        spec = spec_of(wanted)
        layout = data.draw(_layouts(sparse))
        case = case_of(
            layout, spec, device=self.device, segments="segments" in wanted, batch_size=data.draw(st.integers(2, 3))
            if len(layout.k) == 1 else len(layout.k), seed=data.draw(st.integers(0, 1000)),
        )  # fmt: skip
        self.check(case.run(self.build(spec)), case)

    def test_a_query_that_sees_nothing_gives_zeros(self, dtype: str) -> None:
        """Exactly zero: not NaN, and not the mean of the values."""
        if "padding" not in self.features():
            pytest.skip("without padding every query sees itself")
        spec = self.spec()
        for layout in ("nothing to see", "one token sees nothing"):
            case = case_of(LAYOUTS[layout], spec, dtype=getattr(torch, dtype), device=self.device)
            output = case.run(self.build(spec, dtype=dtype))
            assert bool((output[0] == 0).all()), f"{layout}: the blind row is not all zeros"

    def test_every_listed_view_gives_what_its_dense_form_gives(self, view: str) -> None:
        """Pages, packed blocks and latents hold the same tokens as plain tensors."""
        spec = self.spec()
        if view == "latent":
            spec = replace(spec, num_kv_heads=1, v_head_dim=4)
        name = "padding on the left" if "padding" in self.features() else "more tokens"
        case = case_of(LAYOUTS[name], spec, device=self.device)
        if view == "latent":  # its keys begin with its values
            case = replace(case, k=torch.cat((case.v, case.k[..., spec.v_head_dim :]), dim=-1))
        self.check(case.run(self.build(spec, views=(view,)), stored(case, view)), case)

    # Memory and state.

    def test_keys_and_values_are_not_expanded(self) -> None:
        """No tensor of B·H·S·D elements is made for B·K·S·D of keys. Sees torch's operations, not a kernel's inside."""
        if "grouped-heads" not in self.features():
            pytest.skip("this backend has no grouped heads")
        S = 64
        for q_positions in (range(S - 1, S), range(S - 5, S)):
            spec = self.spec()
            case = case_of(Layout((tuple(q_positions),), (tuple(range(S)),), dense=True), spec, device=self.device)
            backend = self.build(spec)
            mask = case.prepare(backend)
            with _NewStorages(case.q, case.k, case.v) as seen:
                case.attend(backend, mask)
            limit = 2 * spec.num_heads * S * spec.head_dim
            large = {op: count for op, count in seen.elements.items() if count >= limit}
            assert not large, f"T={len(q_positions)}: expanded keys have {limit} elements; made by {large}"

    def test_passes_that_overlap_do_not_mix(self) -> None:
        """Two prepared masks live side by side, each is good for several layers, and inputs stay as they were."""
        names = ("a ring", "padding on the left") if "padding" in self.features() else ("more tokens", "one token")
        spec = self.spec()
        backend = self.build(spec)
        first, second = (case_of(LAYOUTS[name], spec, device=self.device) for name in names)
        before = [x.clone() for x in (first.q, first.k, first.v)]
        masks = first.prepare(backend), second.prepare(backend)
        outputs = first.attend(backend, masks[0]), second.attend(backend, masks[1]), first.attend(backend, masks[0])
        self.check(outputs[0], first)
        self.check(outputs[1], second)
        assert torch.equal(outputs[0], outputs[2]), "a second layer with the same mask differs from the first"
        after = (first.q, first.k, first.v)
        assert all(torch.equal(x, y) for x, y in zip(before, after, strict=True)), "attend changed its inputs"

    # Refusals.

    def test_a_feature_that_is_not_listed_is_refused_with_a_reason(self, unlisted: str) -> None:
        """In `refusals` and while building; in `prepare` for what only the keys tell. Never computed without it."""
        if unlisted in ("padding", "segments"):
            spec = self.spec()
            layout = LAYOUTS["padding on the left" if unlisted == "padding" else "more tokens"]
            case = case_of(layout, spec, device=self.device, segments=unlisted == "segments")
            with pytest.raises(UnsupportedRequestError):
                case.prepare(self.build(spec))
            return
        spec = self.spec(unlisted)
        reasons: list[Any] = list(self.build(self.spec()).refusals(spec))
        assert reasons, "refusals is empty"
        assert all(isinstance(reason, str) and reason for reason in reasons), "a reason is a sentence"
        with pytest.raises(UnsupportedRequestError) as caught:
            self.build(self.spec(), spec)
        missing = [reason for reason in reasons if reason not in caught.value.reasons]
        assert not missing, f"the error leaves out {missing}"

    def test_a_spec_of_listed_features_is_not_refused(self, feature: str) -> None:
        """`refusals` is empty for what `pluglm.json` promises."""
        spec = self.spec(*({feature} & FEATURES.keys()))
        assert list(self.build(spec).refusals(spec)) == []

    def test_an_unknown_variant_option_view_or_dtype_is_refused(self) -> None:
        """Each is named in a reason, so that nothing the user wrote is dropped."""
        wrong: tuple[tuple[str, dict[str, Any]], ...] = (
            ("no-such-variant", {"variant": "no-such-variant"}),
            ("no_such_option", {"options": (("no_such_option", 1),)}),
            ("no-such-view", {"views": ("no-such-view",)}),
            ("int8", {"dtype": "int8"}),
        )
        for word, request in wrong:
            with pytest.raises(UnsupportedRequestError) as caught:
                self.build(self.spec(), **request)
            assert any(word in reason for reason in caught.value.reasons), f"no reason names {word}"

    def test_a_layer_that_forgets_its_sinks_or_bias_is_told(self) -> None:
        """A missing tensor is an error, not arithmetic without it."""
        for feature in {"sinks", "bias"} & set(self.features()):
            spec = self.spec(feature)
            case = replace(case_of(LAYOUTS["more tokens"], spec, device=self.device), sinks=None, bias=None)
            with pytest.raises(PluglmError, match=feature):
                case.run(self.build(spec))

    def test_the_object_says_what_the_manifest_says(self) -> None:
        """Name and views are the listed ones, features and views are known words, and the Protocol is complete."""
        backend, facts = self.build(self.spec()), self.facts()
        assert isinstance(backend, AttentionBackend)
        assert backend.name == facts["name"]
        assert tuple(backend.views) == tuple(facts["views"])
        unknown = set(facts.get("features", ())) - FEATURES.keys()
        assert not unknown, f"pluglm.json lists {sorted(unknown)}; known are {sorted(FEATURES)}"


@st.composite
def _layouts(draw: st.DrawFn, sparse: bool) -> Layout:
    T = draw(st.integers(1, 6))
    S = T + draw(st.integers(0, 5))
    if not sparse:
        return Layout((tuple(range(S - T, S)),), (tuple(range(S)),), dense=True)
    hidden = st.lists(st.booleans(), min_size=S, max_size=S)
    orders = [draw(st.permutations(range(S))) for _ in range(draw(st.integers(2, 3)))]
    k = tuple(tuple(-1 if gone else p for p, gone in zip(order, draw(hidden), strict=True)) for order in orders)
    q = tuple(tuple(draw(st.lists(st.integers(-1, S + 1), min_size=T, max_size=T))) for _ in k)
    return Layout(q, k)


class _NewStorages(TorchDispatchMode):  # type: ignore[no-untyped-call]    # torch leaves it untyped
    """Records how many elements each operation's new storages have; views of the inputs do not count."""

    def __init__(self, *inputs: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]    # the same
        self.elements: dict[str, int] = {}
        self._known = {x.untyped_storage().data_ptr() for x in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else (result,):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._known:
                count = x.untyped_storage().nbytes() // x.element_size()
                self.elements[str(func)] = max(count, self.elements.get(str(func), 0))
        return result
