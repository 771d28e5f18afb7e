"""Many models, caches, threads and processes at random, for as many seconds as PLUGLM_STRESS_SECONDS says (3).

Run it for minutes, and with the library compiled for the address sanitizer, after any change of native code: the README
says how.
"""

from __future__ import annotations

import gc
import os
import random
import threading
import time
from typing import Any

import pytest
import torch
from native_models import Nearest, Pair, llama, make, with_library
from pluglm_executor_cpu import native

from pluglm.contracts import (
    Attention,
    AttentionSpec,
    Branch,
    DecoderProgram,
    DecodeRun,
    Draw,
    Embedding,
    Experts,
    FeedForward,
    Head,
    KVSlot,
    Layer,
    MaskSpec,
    Norm,
    Part,
    Rope,
)

SECONDS = float(os.environ.get("PLUGLM_STRESS_SECONDS", "3"))
SEED = int(os.environ.get("PLUGLM_STRESS_SEED", "0"))


def program(draw: random.Random) -> DecoderProgram:
    """Sizes that fill blocks and registers, and sizes that do not."""
    size = draw.choice([8, 24, 32, 64, 96, 160])
    kv_heads = draw.choice([1, 2, 3])
    heads, head_dim, v_head_dim = kv_heads * draw.choice([1, 2, 4]), 2 * draw.randint(2, 20), draw.randint(3, 40)
    norm = Norm(draw.choice(["rms", "layer"]), size, 1e-5)  # type: ignore[arg-type]
    layers, slots = [], []
    for slot in range(draw.randint(1, 4)):
        window = draw.choice([None, None, 5, 17])
        spec = AttentionSpec(heads, kv_heads, head_dim, v_head_dim, 0.3, MaskSpec(window=window))
        bias = draw.random() < 0.3
        attention = Attention(spec, slot, rope=Rope("default", 100.0, head_dim), q_bias=bias, o_bias=bias)
        dense = FeedForward(size, draw.choice([7, 32, 50, 96]), "silu", gated=draw.random() < 0.7, bias=bias)
        mlp: FeedForward | Experts = dense
        if draw.random() < 0.3:  # all are chosen: a choice that is close may turn with the last bit
            count, shared = draw.randint(1, 6), draw.random() < 0.5
            mlp = Experts(dense, count, count, shared=dense if shared else None, shared_gate=shared)
        layers.append(
            Layer((Branch((Part("attn", attention, norm_in=norm),)), Branch((Part("mlp", mlp, norm_in=norm),))))
        )
        slots.append(KVSlot(kv_heads, head_dim, v_head_dim, window=window))
    return llama(
        *layers, slots=tuple(slots), embedding=Embedding(draw.choice([37, 53]), size), final_norm=norm,
        head=Head(tied=draw.random() < 0.5, bias=draw.random() < 0.5), max_seq_len=2000,
    )  # fmt: skip


def model(draw: random.Random) -> Pair:
    """A random model, plain or packed in some of its layers."""
    library = native.library()
    assert library is not None
    quantizer, options = None, {"threads": draw.randint(1, 4), "isa": draw.choice(library.isas)}
    if draw.random() < 0.7:
        bits = {name: draw.choice([0, 4, 8]) for name in ("attn.q", "attn", "gate", "mlp", "head")}
        quantizer = Nearest(bits, offsets=draw.random() < 0.5, blocked=draw.random() < 0.8)
    return make(
        program(draw), layout=draw.choice(["dynamic", "static", "hybrid"]), quantizer=quantizer,
        dtype=draw.choice(["float32", "float32", "bfloat16"]), **options,
    )  # fmt: skip


def change(draw: random.Random, caches: list[Any]) -> None:
    """The same to both caches of a pair: rows come, go, change places, go back; or a fork takes their place."""
    rows = caches[0].batch_size
    what = draw.choice(["reorder", "select", "rollback", "fork", "reset", "nothing", "nothing", "nothing"])
    index = torch.tensor([draw.randrange(rows) for _ in range(draw.randint(1, 4))])
    back = torch.tensor([draw.randint(0, min(3, caches[0].length)) for _ in range(rows)])
    for i, cache in enumerate(caches):
        if what == "reorder":
            cache.reorder(index[:1].expand(rows))
        elif what == "select":
            cache.select(index)
        elif what == "rollback":
            cache.rollback(back)
        elif what == "reset":
            cache.reset()
        elif what == "fork":
            caches[i] = cache.fork()
    if draw.random() < 0.1:
        gc.collect()


def run_ahead(draw: random.Random, pair: Pair, caches: list[Any], tolerance: float) -> None:
    """Tokens that the executor chooses in one call. The torch module is fed them, and greedy ones are its best."""
    vocab, rows, told = pair.request.description.vocab_size, caches[0].batch_size, None
    first = torch.tensor([[draw.randrange(vocab)] for _ in range(rows)])
    if draw.random() < 0.6:
        filters = {"top_k": draw.choice([0, 3]), "top_p": draw.choice([1.0, 0.9]), "min_p": draw.choice([0.0, 0.05])}
        seeds = tuple(draw.getrandbits(63) for _ in range(rows))
        told = Draw(seeds, draw.randrange(9), draw.choice([1.0, 0.7]), **filters)
    ends = tuple(draw.randrange(vocab) for _ in range(draw.randint(0, 3)))
    with torch.no_grad():
        done = pair.executor.decode(DecodeRun(first, caches[0], draw.randint(1, 30), ends, draw=told))
    fed = torch.cat((first, done.token_ids), dim=1)
    scores = pair.feed("torch", caches[1], fed[:, : fed.shape[1] - (done.logits is None)].tolist()).float()
    assert caches[0].length == caches[1].length
    if told is None:
        chosen = scores.gather(2, done.token_ids[:, :, None])[:, :, 0]
        assert float((scores.amax(-1) - chosen).max() / scores.abs().max()) < tolerance


def converse(draw: random.Random, pair: Pair, passes: int) -> None:
    """Passes of 1 to 16 tokens, and runs, with changes of the cache in between; what comes out is the torch module's."""
    vocab, rows = pair.request.description.vocab_size, draw.randint(1, 5)
    caches = [pair.cache(rows, 1500) for _ in range(2)]
    exact = pair.request.dtype == "float32"
    for _ in range(passes):
        rows = caches[0].batch_size
        count = draw.randint(1, 40) if draw.random() < 0.1 else draw.randint(1, max(1, 16 // rows))
        if draw.random() < 0.03 and caches[0].length < 600:
            count = 300  # from here on attention is cut into ranges
        ids = [[draw.randrange(vocab) for _ in range(count)] for _ in range(rows)]
        got, want = (pair.feed(w, c, ids).float() for w, c in zip(("cpu", "torch"), caches, strict=True))
        apart = float((got - want).abs().max() / want.abs().max())
        assert apart < (1e-4 if exact else 0.08), apart
        if draw.random() < 0.2:
            run_ahead(draw, pair, caches, 1e-4 if exact else 0.08)
        change(draw, caches)


@with_library
def test_models_come_and_go_and_their_caches_grow() -> None:
    end, seed = time.monotonic() + SECONDS / 2, SEED
    kept: list[Pair] = []  # some live on, with threads that sleep
    while time.monotonic() < end:
        draw = random.Random(seed)
        pair = model(draw)
        try:
            converse(draw, pair, draw.randint(1, 40))
        except BaseException as error:
            error.add_note(f"PLUGLM_STRESS_SEED={seed}")
            raise
        kept = [*kept, pair][-draw.randint(1, 5) :]
        seed += 1
    assert seed > SEED


@with_library
def test_threads_of_python_share_executors_while_others_are_made_and_dropped() -> None:
    end, wrong = time.monotonic() + SECONDS / 3, []
    shared = [model(random.Random(SEED + i)) for i in range(3)]

    def work(seed: int) -> None:
        draw = random.Random(seed)
        try:
            while time.monotonic() < end:
                converse(draw, draw.choice(shared) if draw.random() < 0.8 else model(draw), 8)
        except BaseException as error:  # noqa: BLE001 - raised again where the test sees it
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(SEED + i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if wrong:
        raise wrong[0]


@with_library
@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
def test_children_go_on_with_the_models_of_their_parent() -> None:
    """Forked while another thread decodes, and so perhaps holds the executor's lock."""
    end, draw = time.monotonic() + SECONDS / 6, random.Random(SEED)
    pair, stop = model(draw), threading.Event()

    def decode() -> None:
        while not stop.is_set():
            converse(random.Random(SEED), pair, 3)

    busy = threading.Thread(target=decode)
    busy.start()
    try:
        while True:
            child = os.fork()
            if not child:
                failed = 1
                try:
                    converse(random.Random(SEED + 1), pair, 5)
                    failed = 0
                finally:
                    os._exit(failed)
            assert os.waitpid(child, 0)[1] == 0
            if time.monotonic() > end:
                break
    finally:
        stop.set()
        busy.join()
