"""What is special: pages anywhere in the pool, stretches and threads, when torch computes, and what is refused."""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pluglm_attention_paged
import pytest
import torch
from pluglm_attention_paged import backend, native, online

from pluglm.contracts import AttentionRequest, AttentionSpec, DenseView, KeyInfo, MaskSpec, PagedView
from pluglm.errors import InputError, UnsupportedRequestError

FOLDER = Path(__file__).parents[1]
SPEC = AttentionSpec(num_heads=6, num_kv_heads=3, head_dim=40, v_head_dim=24, scale=0.2)
with_library = pytest.mark.skipif(native.library() is None, reason="this installation has no compiled library")
SPECS = {
    "plain": SPEC,
    "window": replace(SPEC, mask=MaskSpec(window=9)),
    "chunk": replace(SPEC, mask=MaskSpec(chunk=8)),
    "bidirectional": replace(SPEC, mask=MaskSpec(causal=False)),
    "softcap": replace(SPEC, softcap=2.0),
    "sinks": replace(SPEC, sinks=True),
    "alibi": replace(SPEC, alibi_slopes=tuple(2.0**-i for i in range(6))),
    "bias": replace(SPEC, bias=True),
    "one key head": replace(SPEC, num_kv_heads=1),
    "odd sizes": replace(SPEC, head_dim=7, v_head_dim=33),
}


def build(spec=SPEC, **request):
    asked = AttentionRequest(**{"specs": (spec,), "device": "cpu", "dtype": "float32", "views": ("paged",), **request})
    return pluglm_attention_paged.pluglm_build_attention(request=asked)


def numbers(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scattered(spec, lengths, *, page=4, dtype=torch.float32, pages=200):
    """Rows of several lengths in pages all over a pool; the rows share their first two pages. Padding is on the left."""
    K, N = spec.num_kv_heads, -(-max(lengths) // page)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int()
    table = order[: len(lengths) * N].view(len(lengths), N).clone()
    table[:, :2] = table[0, :2].clone()
    k, v = numbers(pages, page, K, spec.head_dim), numbers(pages, page, K, spec.v_head_dim, seed=2)
    S = max(lengths)
    view = PagedView(k.to(dtype), v.to(dtype), table, torch.full((len(lengths),), S, dtype=torch.int32), S)
    positions = torch.stack([torch.arange(S) - (S - length) for length in lengths]).clamp(min=-1)
    return view, KeyInfo(positions, S, dense=len(set(lengths)) == 1)


def run(made, spec, view, keys, T):
    q = numbers(view.block_table.shape[0], T, spec.num_heads, spec.head_dim, seed=3).transpose(1, 2)
    sinks = numbers(spec.num_heads, seed=4) if spec.sinks else None
    bias = numbers(1, spec.num_heads, T, view.length, seed=5) if spec.bias else None
    mask = made.prepare(spec, keys.positions[:, -T:], keys)
    return made.attend(q.to(view.k_pages.dtype), view, spec, mask, sinks=sinks, bias=bias)


def exact(spec, view, keys, T):
    """In float64, from gathered tensors, by the torch variant."""
    doubled = replace(view, k_pages=view.k_pages.double(), v_pages=view.v_pages.double())
    dense = DenseView(*doubled.dense())
    q = numbers(view.block_table.shape[0], T, spec.num_heads, spec.head_dim, seed=3).transpose(1, 2)
    made = build(spec, variant="torch", dtype="float64", views=("dense",))
    return made.attend(
        q.to(view.k_pages.dtype).double(), dense, spec, made.prepare(spec, keys.positions[:, -T:], keys),
        sinks=numbers(spec.num_heads, seed=4).double() if spec.sinks else None,
        bias=numbers(1, spec.num_heads, T, view.length, seed=5).double() if spec.bias else None,
    )  # fmt: skip


@pytest.mark.parametrize("variant", ["torch", pytest.param("native", marks=with_library)])
@pytest.mark.parametrize("T", [1, 3, 16, 17])
@pytest.mark.parametrize("name", SPECS)
def test_ragged_rows_that_share_pages_give_what_gathered_tensors_give(variant, T, name):
    spec = SPECS[name]
    for lengths in ((90, 41, 17), (90, 90, 90)):
        view, keys = scattered(spec, lengths)
        got, want = run(build(spec, variant=variant), spec, view, keys, T), exact(spec, view, keys, T)
        torch.testing.assert_close(got.double(), want, atol=2e-6, rtol=2e-5)


@with_library
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_both_variants_agree_with_holes_and_a_row_that_sees_nothing(dtype):
    view, keys = scattered(SPEC, (70, 70), dtype=getattr(torch, dtype))
    positions = keys.positions.clone()
    positions[0, 10:30] = -1
    positions[1] = -1
    keys = replace(keys, positions=positions, dense=False)
    q = numbers(2, 6, 2, 40).to(view.k_pages.dtype)
    at = torch.tensor([[68, 69], [5, 6]])
    one, two = (build(variant=variant, dtype=dtype) for variant in ("torch", "native"))
    outputs = [made.attend(q, view, SPEC, made.prepare(SPEC, at, keys)) for made in (one, two)]
    assert not outputs[1][1].any()
    tolerance = 2e-6 if dtype == "float32" else 0.008
    torch.testing.assert_close(outputs[0], outputs[1], atol=tolerance, rtol=tolerance)


@with_library
@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("name", ["one key head", "sinks", "window"])
def test_stretches_and_threads_join_to_the_same(threads, name, monkeypatch):
    spec = replace(SPECS[name], num_heads=8, num_kv_heads=1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    view, keys = scattered(spec, (3001,), page=16)
    torch.testing.assert_close(
        run(build(spec, variant="native"), spec, view, keys, 2).double(),
        exact(spec, view, keys, 2),
        atol=2e-6,
        rtol=2e-5,
    )


@with_library
def test_scores_of_any_size_stay_finite():
    view, keys = scattered(SPEC, (50,))
    for factor in (1e4, 1e-4):
        big = replace(view, k_pages=view.k_pages * factor)
        torch.testing.assert_close(
            run(build(variant="native"), SPEC, big, keys, 1).double(), exact(SPEC, big, keys, 1), atol=1e-4, rtol=1e-4
        )


@with_library
def test_the_library_reads_pages_where_they_lie(monkeypatch):
    """Nothing is gathered: a decode step makes no tensor as large as one row's history."""
    from torch.utils._python_dispatch import TorchDispatchMode

    made = []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made.extend(x.numel() for x in [result] if isinstance(x, torch.Tensor) and not x._is_view())
            return result

    view, keys = scattered(SPEC, (600,))
    backend_ = build(variant="native")
    q = numbers(1, 6, 1, 40)
    mask = backend_.prepare(SPEC, keys.positions[:, -1:], keys)
    with Sizes():
        backend_.attend(q, view, SPEC, mask)
    assert max(made) <= q.numel()


# Which way is taken


def ways(monkeypatch):
    taken = []
    for owner, name in ((native.Library, "native"), (online, "torch")):
        right = owner.attend

        def noted(*args, _right=right, _name=name, **how):
            taken.append(_name)
            return _right(*args, **how)

        monkeypatch.setattr(owner, "attend", noted)
    return taken


@with_library
def test_decode_steps_take_the_library_and_prompts_and_gradients_torch(monkeypatch):
    taken = ways(monkeypatch)
    view, keys = scattered(SPEC, (40, 40))
    for variant in (None, "native"):
        made = build(variant=variant)
        assert made.uses_library
        for T in (1, 16, 17):
            run(made, SPEC, view, keys, T)
    assert taken == ["native", "native", "torch"] * 2
    taken.clear()
    learned = replace(view, v_pages=view.v_pages.clone().requires_grad_())
    run(build(), SPEC, learned, keys, 1).sum().backward()
    assert learned.v_pages.grad.any()
    with torch.no_grad():
        run(build(), SPEC, learned, keys, 1)
    run(build(variant="torch"), SPEC, view, keys, 1)
    run(
        build(dtype="float64"),
        SPEC,
        replace(view, k_pages=view.k_pages.double(), v_pages=view.v_pages.double()),
        keys,
        1,
    )
    assert taken == ["torch", "native", "torch", "torch"]


def test_gradients_in_torch_are_those_of_plain_attention():
    q, k, v = (numbers(1, 3, 5, 8, seed=i).double().requires_grad_() for i in range(3))
    spec = AttentionSpec(3, 3, 8, 8, 0.3)
    made = build(spec, dtype="float64", views=("dense",))
    positions = torch.arange(5)[None]
    o = made.attend(q, DenseView(k, v), spec, made.prepare(spec, positions, KeyInfo(positions, 5, dense=True)))
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    weight = numbers(*o.shape, seed=9).double()
    for got, want in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v)) for x in (o, plain)), strict=True):
        torch.testing.assert_close(got, want)


def test_a_window_reads_only_the_blocks_it_reaches(monkeypatch):
    read = []
    right = online.blocks
    monkeypatch.setattr(online, "blocks", lambda *a: (read.append(block[0]) or block for block in right(*a)))
    spec = replace(SPEC, mask=MaskSpec(window=20))
    view, keys = scattered(spec, (2000,), page=16)
    got = run(build(spec, variant="torch"), spec, view, keys, 1)
    assert read == [1968]
    torch.testing.assert_close(got.double(), exact(spec, view, keys, 1), atol=2e-6, rtol=2e-5)


# Refusals


@with_library
@pytest.mark.parametrize(
    ("request_", "says"),
    [({"device": "cuda"}, "runs on the CPU, not on cuda"), ({"dtype": "float16"}, "float32 and bfloat16, not float16")],
)
def test_native_is_refused_where_the_library_cannot_compute(request_, says):
    with pytest.raises(UnsupportedRequestError, match=says):
        build(variant="native", **request_)
    assert not build(**request_).uses_library


def test_without_a_library_native_is_refused_with_what_to_do_and_plain_takes_torch(monkeypatch):
    monkeypatch.setattr(native, "library", functools.cache(lambda: None))
    with pytest.raises(UnsupportedRequestError) as caught:
        build(variant="native")
    (reason,) = caught.value.reasons
    for word in ("no compiled library", "g++", "PLUGLM_NATIVE=1", '"paged:torch"'):
        assert word in reason
    made = build()
    assert not made.uses_library
    view, keys = scattered(SPEC, (20,))
    torch.testing.assert_close(
        run(made, SPEC, view, keys, 1).double(), exact(SPEC, view, keys, 1), atol=2e-6, rtol=2e-5
    )


def test_an_unknown_variant_is_told_which_there_are():
    with pytest.raises(UnsupportedRequestError, match="its variants are torch, native, and 'cuda'"):
        build(variant="cuda")


@with_library
def test_a_page_that_is_not_there_is_named_before_anything_is_read():
    view, keys = scattered(SPEC, (40,))
    for page in (200, -1):
        table = view.block_table.clone()
        table[0, 5] = page
        with pytest.raises(InputError, match=r"names pages from .* of 200"):
            run(build(variant="native"), SPEC, replace(view, block_table=table), keys, 1)


@with_library
@pytest.mark.parametrize("wrong", ["heads", "dtype", "short", "rows"])
def test_tensors_that_do_not_fit_are_refused_before_anything_is_read(wrong):
    view, keys = scattered(SPEC, (40, 40))
    changed = {
        "heads": lambda: replace(view, v_pages=view.v_pages[:, :, :2]),
        "dtype": lambda: replace(view, k_pages=view.k_pages.double()),
        "short": lambda: replace(view, block_table=view.block_table[:, :3]),
        "rows": lambda: replace(view, block_table=view.block_table[:1]),
    }[wrong]()
    made = build(variant="native")
    mask = made.prepare(SPEC, keys.positions[:, -1:], keys)
    with pytest.raises(InputError, match="do not fit together"):
        made.attend(numbers(2, 6, 1, 40), changed, SPEC, mask)


# The build


def hook():
    sys.path.insert(0, str(FOLDER))
    try:
        import hatch_build
    finally:
        sys.path.remove(str(FOLDER))
    return hatch_build


@pytest.mark.skipif(not (FOLDER / "hatch_build.py").exists(), reason="the build script is not part of the wheel")
def test_without_a_compiler_the_build_says_so_and_leaves_nothing(tmp_path, monkeypatch):
    pytest.importorskip("hatchling")
    source = tmp_path / "native.cpp"
    source.write_text("int f() { return 1; }\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler was found" in hook().compiled(source, tmp_path / "libpaged.so")
    monkeypatch.setenv("CXX", "no-such-compiler -x")
    assert "no-such-compiler" in hook().compiled(source, tmp_path / "libpaged.so")
    assert [path.name for path in tmp_path.iterdir()] == ["native.cpp"]


@pytest.mark.skipif(not (FOLDER / "hatch_build.py").exists(), reason="the build script is not part of the wheel")
@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_a_source_that_does_not_compile_is_reported_with_what_the_compiler_said(tmp_path):
    pytest.importorskip("hatchling")
    source = tmp_path / "native.cpp"
    source.write_text("int f() { return nonsense; }\n")
    assert "nonsense" in hook().compiled(source, tmp_path / "libpaged.so")
    assert [path.name for path in tmp_path.iterdir()] == ["native.cpp"]


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_the_source_compiles_without_warnings_also_without_versions_for_each_machine(tmp_path):
    source = Path(backend.__file__).with_name("native.cpp")
    command = ["c++", "-std=c++17", "-fPIC", "-fopenmp-simd", "-Wall", "-Wextra", "-Werror", "-DPLUGLM_PLAIN", "-O1"]
    done = subprocess.run(
        [*command, "-c", "-o", str(tmp_path / "o"), str(source)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
