"""What is special to flash: pieces without padding, when it packs, and everything it refuses, with the reason."""

from __future__ import annotations

import json
from dataclasses import replace
from importlib.resources import files
from types import SimpleNamespace

import fake_kernels
import pluglm_attention_flash
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pluglm_attention_flash import kernels
from pluglm_attention_flash.flash import build
from pluglm_attention_flash.kernels import FINDERS, flash_attn_2, flash_attn_3, torch_flash
from pluglm_attention_flash.ragged import cut
from torch.utils._python_dispatch import TorchDispatchMode

from pluglm.contracts import AttentionRequest, KeyInfo, MaskSpec
from pluglm.errors import UnsupportedRequestError
from pluglm.static_filter import static_refusals
from pluglm.testing.attention_oracle import LAYOUTS, PLAIN, Layout, case_of, expected, spec_of

FLASH_2 = flash_attn_2(fake_kernels.flash_attn(), ("float32", "float16"))


def backend(spec, kernel=FLASH_2, **request):
    wanted = AttentionRequest(specs=(spec,), device="cpu", **{"dtype": "float32", **request})
    return build(wanted, {kernel.variant: lambda device: kernel})


def refusals(spec=PLAIN, finders=None, **request):
    with pytest.raises(UnsupportedRequestError, match="sdpa") as caught:
        build(AttentionRequest(**{"specs": (spec,), "device": "cpu", "dtype": "float32", **request}), finders)
    return caught.value.reasons


def pieces(q, k, mask=PLAIN.mask, **segments):
    keys = KeyInfo(torch.tensor(k), len(k[0]), dense=False, **{n: torch.tensor(x) for n, x in segments.items()})
    return cut(mask, torch.tensor(q), keys)


def calls_of(case, kernel=FLASH_2):
    fake_kernels.CALLS.clear()
    case.run(backend(case.spec, kernel))
    return fake_kernels.CALLS


# Pieces.


def test_padding_on_either_side_is_left_out():
    left = pieces([[-1, 0, 1], [0, 1, 2]], [[-1, 0, 1], [0, 1, 2]])
    right = pieces([[0, 1, -1], [0, 1, 2]], [[0, 1, -1], [0, 1, 2]])
    for found in (left, right):
        assert found.lengths == ((2, 2), (3, 3))
        assert found.q_starts.tolist() == found.k_starts.tolist() == [0, 2, 5]
        assert found.q_starts.dtype == torch.int32
    assert (left.k_cells.tolist(), right.k_cells.tolist()) == ([1, 2, 0, 1, 2], [0, 1, 0, 1, 2])


def test_a_ring_is_packed_in_the_order_of_its_positions():
    found = pieces([[4, 5]], [[4, 5, 2, 3]], MaskSpec(window=4))
    assert (found.lengths, found.k_cells.tolist()) == (((2, 4),), [2, 3, 0, 1])


def test_segments_and_chunks_are_pieces_of_their_own():
    ids = [[0, 0, 1, 1, 1]]
    packed = pieces([[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]], segments=ids, q_segments=ids)
    chunks = pieces([[0, 1, 2, 3, 4]], [[0, 1, 2, 3, 4]], MaskSpec(chunk=2))
    assert packed.lengths == ((2, 2), (3, 3))
    assert chunks.lengths == ((2, 2), (2, 2), (1, 1))
    assert chunks.k_cells.tolist() == [0, 1, 2, 3, 4]  # no key twice


def test_one_new_token_is_one_piece_a_row_whatever_the_mask():
    found = pieces([[9], [3]], [[9, 5, 6, 7], [-1, 3, 1, 2]], MaskSpec(window=3, chunk=6))
    assert found.lengths == ((1, 2), (1, 3))
    assert found.k_cells.tolist() == [3, 0, 2, 3, 1]


def test_a_query_that_sees_nothing_is_in_no_piece():
    found = pieces([[0, 1], [0, 1]], [[-1, -1], [0, 1]])
    assert found.lengths == ((2, 2),)
    assert found.q_rows.tolist() == [1, 1]
    assert pieces([[0]], [[-1]]).lengths == ()


def test_one_row_of_pieces_stands_for_every_row_of_a_batch():
    one, all_three = pieces([[0, 1]], [[-1, 0, 1]]), pieces([[0, 1]] * 3, [[-1, 0, 1]] * 3)
    spread = one.for_batch(3)
    assert spread.lengths == all_three.lengths
    for name in ("q_rows", "q_cells", "k_rows", "k_cells", "q_starts", "k_starts"):
        assert torch.equal(getattr(spread, name), getattr(all_three, name)), name


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=3))
def test_packing_and_unpacking_gives_back_what_was_packed(shown):
    positions = (torch.tensor(shown).cumsum(1) - 1).masked_fill(~torch.tensor(shown), -1)
    found = pieces(positions.tolist(), positions.tolist())
    x = torch.arange(positions.numel()).view_as(positions)
    back = torch.full_like(x, -1)
    back[found.q_rows, found.q_cells] = x[found.q_rows, found.q_cells]
    assert torch.equal(back, x.masked_fill(positions < 0, -1))
    assert torch.equal(found.k_rows, found.q_rows)
    assert torch.equal(found.k_cells, found.q_cells)
    assert sum(a for a, _ in found.lengths) == int((positions >= 0).sum())


# Which form runs.


def test_a_batch_without_padding_is_one_call_and_nothing_is_packed():
    for name in ("a first prompt", "more tokens", "one token"):
        assert calls_of(case_of(LAYOUTS[name], spec_of(["window", "grouped-heads"]))) == ["batched"]


def test_a_chunk_ahead_of_one_new_token_is_cut_off_without_packing():
    case = case_of(LAYOUTS["one token after many"], spec_of(["chunk"]))
    assert case.prepare(backend(case.spec)) == 88
    assert calls_of(case) == ["batched"]


def test_a_batch_with_padding_is_packed():
    assert calls_of(case_of(LAYOUTS["padding on the left"], PLAIN)) == ["ragged"]


def test_a_batch_in_which_nobody_sees_anything_calls_no_kernel():
    case = case_of(Layout(((0, 1), (0, 1)), ((-1, -1), (-1, -1))), PLAIN)
    assert calls_of(case) == []
    assert not case.run(backend(PLAIN)).any()


def test_a_window_of_one_is_the_query_itself():
    """The kernels' window is inclusive and counts the keys before: 0."""
    case = case_of(LAYOUTS["a first prompt"], replace(PLAIN, mask=MaskSpec(window=1)))
    assert torch.allclose(case.run(backend(case.spec)), case.v)


def test_torch_runs_its_flash_kernel_and_nothing_else():
    seen = set()

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.add(func._overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    for name in ("more tokens", "many tokens", "padding on the left"):
        case = case_of(LAYOUTS[name], spec_of(["grouped-heads"]))
        built = backend(case.spec, torch_flash(("float32",)))
        mask = case.prepare(built)
        with Operations():
            case.attend(built, mask)
    assert {name for name in seen if "attention" in name} == {"_scaled_dot_product_flash_attention_for_cpu"}


# Refusals.


def test_on_a_cpu_every_variant_says_so():
    assert refusals(finders=FINDERS, dtype="bfloat16") == tuple(
        f"flash:{name}: needs a CUDA device, have cpu" for name in ("3", "2", "torch")
    )
    assert refusals(finders=FINDERS, variant="2", dtype="bfloat16") == ("needs a CUDA device, have cpu",)


def test_the_planner_passes_it_over_from_its_facts():
    facts = json.loads((files("pluglm_attention_flash") / "pluglm.json").read_text("utf-8"))["providers"][0]
    rest = {"torch_version": "2.13.0", "api_version": "1.0"}
    assert static_refusals(facts, device="cuda:0", dtype="bfloat16", head_dim=128, **rest) == ()
    found = static_refusals(facts, device="cpu", dtype="float32", head_dim=260, features=["prefix"], **rest)
    assert found == (
        "needs device cuda, have cpu", "needs dtype bfloat16 or float16, have float32",
        "needs head_dim up to 256, have 260", "needs head_dim in multiples of 8, have 260", "lacks the feature prefix",
    )  # fmt: skip


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(kernels, "lacks", lambda device, major, *, only=False: None)
    monkeypatch.setitem(__import__("sys").modules, "flash_attn", None)
    monkeypatch.setitem(__import__("sys").modules, "flash_attn_interface", None)
    for variant, package in (("2", "flash_attn"), ("3", "flash_attn_interface")):
        (reason,) = refusals(finders=FINDERS, variant=variant, dtype="bfloat16")
        assert reason.startswith(f"the package {package} cannot be imported: ")


def test_a_gpu_that_is_too_old_or_too_new_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert kernels.find_2("cuda:0") == "needs compute capability 8.x or later, cuda:0 has 7.5"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 0))
    assert kernels.find_3("cuda:0") == "needs compute capability 9.x, cuda:0 has 10.0"


def test_a_gpu_that_is_not_there_is_named():
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert kernels.find_torch("cuda") == f"torch {torch.__version__} sees no CUDA device"


def test_an_old_flash_attn_is_refused():
    old = SimpleNamespace(flash_attn_varlen_func=lambda q, k, v: q, __version__="2.0.4")
    assert flash_attn_2(old) == "flash_attn 2.0.4 is older than 2.6"
    plain = SimpleNamespace(flash_attn_func=lambda q, k, v: q, flash_attn_varlen_func=lambda q, k, v: q)
    assert flash_attn_3(plain) == "flash_attn_interface is a build without window_size and softcap"


def test_sinks_need_a_build_of_flash_3_that_takes_them():
    with_sinks = fake_kernels.flash_attn_interface()
    without = SimpleNamespace(
        flash_attn_func=lambda q, k, v, softmax_scale, causal, window_size, softcap: q,
        flash_attn_varlen_func=lambda q, k, v, softmax_scale, causal, window_size, softcap: q,
    )
    assert "sinks" in flash_attn_3(with_sinks).features
    found = flash_attn_3(without)
    assert refusals(spec_of(["sinks"]), {"3": lambda device: found}, dtype="bfloat16") == (
        "flash:3: sinks: flash:3 has no such thing",
    )


def test_what_no_kernel_can_is_refused_while_planning_with_the_reason():
    find = {"2": lambda device: FLASH_2}
    wrong = {
        spec_of(["prefix"]): "prefix: the kernels hide later keys from all queries of a row or from none",
        spec_of(["bias"]): "bias: the kernels add no tensor to the scores",
        spec_of(["value-head-dim"]): "value-head-dim: the kernels take values of the keys' size",
        spec_of(["sinks"]): "sinks: flash:2 has no such thing",
        replace(PLAIN, head_dim=264, v_head_dim=264): "head_dim 264: the kernels take multiples of 8 up to 256",
        replace(PLAIN, head_dim=12, v_head_dim=12): "head_dim 12: the kernels take multiples of 8 up to 256",
        replace(PLAIN, num_kv_heads=4): "4 kv heads do not divide 6 heads",
        replace(PLAIN, alibi_slopes=(1.0,)): "1 ALiBi slopes for 6 heads",
        spec_of(["alibi", "bidirectional"]): "alibi on later keys: the kernels lower their scores where the spec raises them",
    }  # fmt: skip
    for spec, reason in wrong.items():
        assert reason in refusals(spec, find, variant="2")


def test_a_dtype_that_the_kernel_lacks_is_refused():
    kernel = flash_attn_2(fake_kernels.flash_attn())
    assert refusals(finders={"2": lambda device: kernel}, variant="2") == (
        "dtype float32 is not one of bfloat16, float16",
    )


def test_plain_flash_takes_the_best_that_honours_the_model():
    three, two = flash_attn_3(fake_kernels.flash_attn_interface()), flash_attn_2(fake_kernels.flash_attn())
    finders = {"3": lambda device: three, "2": lambda device: two}
    request = AttentionRequest((PLAIN,), "cpu", "bfloat16")
    assert build(request, finders).refusals(spec_of(["alibi"]))[0] == "alibi: flash:3 has no such thing"
    alibi = build(replace(request, specs=(spec_of(["alibi"]),)), finders)
    assert alibi.refusals(spec_of(["sinks"])) == ["sinks: flash:2 has no such thing"]


def test_a_kernel_of_the_hub_is_no_variant():
    for variant in ("hub", "4"):
        with pytest.raises(UnsupportedRequestError, match=f"no variant '{variant}'; it has 3, 2, torch"):
            pluglm_attention_flash.pluglm_build_attention(
                request=AttentionRequest((PLAIN,), "cuda", "bfloat16", variant=variant)
            )


def test_alibi_over_padding_is_computed_and_beside_holes_refused():
    spec = spec_of(["alibi"])
    case = case_of(LAYOUTS["padding on the left"], spec)
    assert torch.allclose(case.run(backend(spec)).double(), expected(case), atol=1e-5)
    evicted = case_of(Layout(((7,),), ((0, 1, 5, 6, 7),)), spec)
    with pytest.raises(UnsupportedRequestError, match="the keys of a row skip a position"):
        evicted.prepare(backend(spec))


def test_a_window_over_repeated_positions_is_refused():
    spec = spec_of(["window"])
    tree = case_of(Layout(((4,),), ((2, 3, 3, 3, 4),)), spec)
    with pytest.raises(UnsupportedRequestError, match="a row holds a position twice"):
        tree.prepare(backend(spec))
