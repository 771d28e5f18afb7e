"""The decoder against itself: with and without a cache, padded and alone, packed and apart; and against its formula."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from pluglm_blocks import ops
from pluglm_blocks.rope import RotaryTable
from torch import nn

from pluglm.contracts import Branch, Embedding, FeedForward, Head, KVSlot, Layer, Norm, Part, Rope, SharedSlot


def same(found, wanted, tolerance=2e-5):
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def llama(toy, slot=0):
    """Attention with everything that is local to a layer switched on."""
    return toy.layer(
        slot, qk_norm=Norm("rms", toy.D, 1e-5), q_bias=True, v_bias=True, o_bias=True, spec={"sinks": True}
    )


@pytest.fixture
def module(toy):
    return toy.build(toy.program(llama(toy), toy.layer(1, window=3)))


def test_one_layer_is_its_formula(toy, ids):
    module = toy.build(toy.program(toy.layer(0)))
    p = dict(module.named_parameters())
    x = p["embed.weight"][ids]
    h = ops.rms_norm(x, p["layers.0.attn_norm_in.weight"], 1e-5, 0.0)
    q, k, v = (h @ p[f"layers.0.attn.{n}.weight"].T for n in "qkv")
    q, k, v = (t.view(toy.B, 11, -1, toy.D).transpose(1, 2) for t in (q, k, v))
    cos, sin = RotaryTable(Rope("default", 100.0, toy.D)).cos_sin(torch.arange(11)[None])
    q, k = ops.rope(q, cos, sin, False), ops.rope(k, cos, sin, False)
    o = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2).flatten(2)
    x = x + o @ p["layers.0.attn.o.weight"].T
    h = ops.rms_norm(x, p["layers.0.mlp_norm_in.weight"], 1e-5, 0.0)
    gate, up = (h @ p[f"layers.0.mlp.{n}.weight"].T for n in ("gate", "up"))
    x = x + (F.silu(gate) * up) @ p["layers.0.mlp.down.weight"].T
    same(toy.run(module, ids).logits, ops.rms_norm(x, p["norm.weight"], 1e-5, 0.0) @ p["head.weight"].T)


@pytest.mark.parametrize("splits", [(11,), (4, 7), (1,) * 11, (5, 1, 1, 4)])
def test_a_pass_with_a_cache_equals_one_without(toy, ids, module, splits):
    cache, logits = toy.ListCache(), []
    for piece in ids.split(splits, 1):
        logits.append(toy.run(module, piece, cache=cache).logits)
    same(torch.cat(logits, 1), toy.run(module, ids).logits)
    assert cache.length == 11


def test_a_pass_that_fails_is_not_committed(toy, ids, module):
    cache = toy.ListCache()
    toy.run(module, ids[:, :4], cache=cache)
    before = toy.run(module, ids[:, 4:], cache=copy.deepcopy(cache)).logits
    hook = module.norm.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        toy.run(module, ids[:, 4:], cache=cache)
    hook.remove()
    assert cache.length == 4
    same(toy.run(module, ids[:, 4:], cache=cache).logits, before)


@pytest.mark.parametrize("keep", [0, 1, 4, 99, torch.tensor([2, 9, 3])])
def test_only_kept_positions_get_logits(toy, ids, module, keep):
    everything = toy.run(module, ids)
    wanted = (
        everything.logits[:, keep] if isinstance(keep, torch.Tensor) else everything.logits[:, -keep if keep else 0 :]
    )
    same(toy.run(module, ids, logits_to_keep=keep).logits, wanted)
    assert everything.hidden_states is None


def test_hidden_states_are_one_more_than_layers_and_complete(toy, ids, module):
    found = toy.run(module, ids, logits_to_keep=1, output_hidden_states=True)
    assert [tuple(h.shape) for h in found.hidden_states] == [(toy.B, 11, toy.C)] * 3
    same(found.hidden_states[0], module.embed(ids))
    same(module.head(found.hidden_states[-1])[:, -1:], found.logits)
    same(found.logits, toy.run(module, ids, logits_to_keep=1).logits)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_a_padded_row_equals_the_row_alone(toy, ids, module, side):
    alone = toy.run(module, ids[1:, :7]).logits[0]
    left = {"left": 4, "right": 0, "both": 3}[side]
    batch = ids.clone()
    batch[1, left : left + 7] = ids[1, :7]
    positions = torch.arange(11).repeat(2, 1)
    positions[1] = -1
    positions[1, left : left + 7] = torch.arange(7)
    found = toy.run(module, batch, positions=positions).logits
    same(found[1, left : left + 7], alone)
    same(found[:1], toy.run(module, ids[:1]).logits)
    assert found.isfinite().all()


def test_packed_segments_equal_the_sequences_apart(toy, ids, module):
    packed = torch.cat((ids[0, :4], ids[1, :7]))[None]
    positions = torch.cat((torch.arange(4), torch.arange(7)))[None]
    segments = torch.tensor([[0] * 4 + [1] * 7])
    found = toy.run(module, packed, positions=positions, segments=segments).logits
    same(found[:, :4], toy.run(module, ids[:1, :4]).logits)
    same(found[:, 4:], toy.run(module, ids[1:, :7]).logits)
    cache = toy.ListCache()
    toy.run(module, packed[:, :6], positions=positions[:, :6], segments=segments[:, :6], cache=cache)
    rest = toy.run(module, packed[:, 6:], positions=positions[:, 6:], segments=segments[:, 6:], cache=cache).logits
    same(rest, found[:, 6:])


def test_embeds_from_the_embedding_equal_token_ids(toy, ids):
    scaled = Embedding(
        toy.V, toy.C, scale=2.5, learned_positions=70, position_offset=2, norm=Norm("layer", toy.C, 1e-5, bias=True)
    )
    module = toy.build(toy.program(embedding=scaled))
    found = toy.run(module, ids, output_hidden_states=True)
    same(toy.run(module, None, embeds=module.embed(ids).detach()).logits, found.logits)
    p = dict(module.named_parameters())
    x = p["embed.weight"][ids] * 2.5 + p["embed_positions.weight"][2:13]
    same(found.hidden_states[0], F.layer_norm(x, (toy.C,), p["embed_norm.weight"], p["embed_norm.bias"], 1e-5))


def test_the_scale_of_embeddings_is_rounded_to_the_dtype(toy):
    module = toy.build(toy.program(embedding=Embedding(toy.V, toy.C, scale=55.4256)), dtype="bfloat16")
    assert module.embed_scale == 55.5


def test_a_tied_head_is_the_embedding(toy, ids):
    module = toy.build(toy.program(head=Head(tied=True, bias=True, scale=0.5, softcap=3.0)))
    names = [name for name, _ in module.named_parameters()]
    assert "head.weight" not in names
    assert "head.bias" in names
    found = toy.run(module, ids, output_hidden_states=True)
    raw = 0.5 * (found.hidden_states[-1] @ module.embed.weight.T + module.head.bias)
    same(found.logits, 3.0 * torch.tanh(raw / 3.0))
    with torch.no_grad():
        copy.deepcopy(module).embed.weight.zero_()
    assert toy.run(module, ids).logits.any()


class OtherTable(nn.Module):
    """What a quantizer may put in a table's place: another one, under names of its own."""

    def __init__(self, rows):
        super().__init__()
        self.register_buffer("rows", rows)

    def forward(self, token_ids):
        return self.rows[token_ids]

    def project(self, x, bias=None):
        return F.linear(x, self.rows, bias)


@pytest.mark.parametrize("bias", [False, True])
def test_a_table_that_is_taken_is_looked_up_and_multiplied_by(toy, ids, bias):
    """All that a table goes through: scale, bias, soft cap, a shorter decoder, token vectors as input."""
    program = toy.program(
        embedding=Embedding(toy.V, toy.C, scale=2.5), head=Head(tied=True, bias=bias, scale=0.5, softcap=3.0)
    )
    module, rows = toy.build(program), torch.randn(toy.V, toy.C)
    before = toy.run(module, ids).logits
    module.embed = OtherTable(rows)
    module.head.take_table(module.embed)
    assert module.head.table is module.embed
    plain = toy.build(program)
    plain.load_state_dict({"embed.weight": rows, **{k: v for k, v in module.state_dict().items() if k != "embed.rows"}})
    found = toy.run(module, ids, output_hidden_states=True)
    same(found.logits, toy.run(plain, ids).logits)
    assert not torch.allclose(found.logits, before, atol=0.1)
    same(toy.run(module, None, embeds=module.embed(ids)).logits, found.logits)
    one, other = module.first_layers(1), plain.first_layers(1)
    same(toy.run(one, ids).logits, toy.run(other, ids).logits)
    same(module.logits_of(found.hidden_states[0]), plain.logits_of(found.hidden_states[0]))
    twin = copy.deepcopy(module)
    assert twin.head.table is twin.embed
    assert twin.embed is not module.embed


def parts_of(toy, **changes):
    feed_forward = FeedForward(toy.C, toy.F, "gelu", gated=False, bias=True)
    return Part("attn", toy.attention(), norm_in=toy.norm()), Part("mlp", feed_forward, **changes)


def test_parallel_parts_read_the_same_input(toy, ids):
    attn, mlp = parts_of(toy, share_norm_in=True)
    shared = toy.build(toy.program(Layer((Branch((attn, mlp)),))))
    found = toy.run(shared, ids, output_hidden_states=True).hidden_states
    p = dict(shared.named_parameters())
    assert "layers.0.mlp_norm_in.weight" not in p
    h = shared.layers[0].attn_norm_in(found[0])
    mlp_out = F.gelu(F.linear(h, p["layers.0.mlp.up.weight"], p["layers.0.mlp.up.bias"]))
    mlp_out = F.linear(mlp_out, p["layers.0.mlp.down.weight"], p["layers.0.mlp.down.bias"])
    alone = toy.build(toy.program(Layer((Branch((attn,)),)), final_norm=None))
    alone.load_state_dict({k: v for k, v in shared.state_dict().items() if ".mlp" not in k and k != "norm.weight"})
    attn_out = toy.run(alone, ids, output_hidden_states=True).hidden_states[1] - found[0]
    same(found[1], shared.norm(found[0] + attn_out + mlp_out))


def test_scales_and_a_norm_after_the_op_are_applied_in_order(toy, ids):
    op = FeedForward(toy.C, toy.F, "silu", gate_scale=1.5, down_scale=0.7)
    part = Part("mlp", op, norm_out=toy.norm(), scale_in=0.3, scale_out=1.9)
    module = toy.build(toy.program(Layer((Branch((part,), scale=0.22),)), slots=(), final_norm=None), attention=False)
    x = module.embed(ids)
    mlp = module.layers[0].mlp
    h = F.silu(mlp.gate(0.3 * x) * 1.5) * mlp.up(0.3 * x)
    wanted = x + 0.22 * 1.9 * module.layers[0].mlp_norm_out(mlp.down(h) * 0.7)
    same(toy.run(module, ids, output_hidden_states=True).hidden_states[1], wanted)


@pytest.mark.parametrize(
    "changes",
    [
        {"qk_norm_over": "all", "qk_norm": Norm("rms", 48, 1e-5)},
        {"qkv_clip": 0.2},
        {"query_temperature": (0.9, 2.0)},
        {"relative_buckets": (8, 6), "spec": {"bias": True}},
        {"rope": Rope("default", 100.0, 4)},
        {"rope": Rope("default", 100.0, 8, interleaved=True)},
        {"rope": None},
        {"spec": {"v_head_dim": 5}},
        {"spec": {"scale": 1.0}},
        {"spec": {"sinks": True}},
    ],
    ids=str,
)
def test_each_knob_of_attention_changes_the_result_and_works_with_a_cache(toy, ids, changes):
    value_dim = changes.get("spec", {}).get("v_head_dim", toy.D)
    slots = (KVSlot(toy.K, toy.D, value_dim),)
    module = toy.build(toy.program(toy.layer(0, **changes), slots=slots))
    plain = toy.build(toy.program(toy.layer(0)))
    weights = {
        n: v
        for n, v in module.state_dict().items()
        if n in plain.state_dict() and v.shape == plain.state_dict()[n].shape
    }
    plain.load_state_dict(weights, strict=False)
    found, cache = toy.run(module, ids).logits, toy.ListCache()
    pieces = [toy.run(module, piece, cache=cache).logits for piece in ids.split((6, 1, 4), 1)]
    same(torch.cat(pieces, 1), found)
    assert (found - toy.run(plain, ids).logits).abs().max() > 1e-3


def test_norms_over_all_heads_have_the_size_of_their_projection(toy):
    module = toy.build(toy.program(toy.layer(0, qk_norm=Norm("rms", 48, 1e-5), qk_norm_over="all")))
    assert module.layers[0].attn.q_norm.weight.shape == (toy.H * toy.D,)
    assert module.layers[0].attn.k_norm.weight.shape == (toy.K * toy.D,)


def test_query_temperature_is_llama_4s(toy, ids):
    module = toy.build(toy.program(toy.layer(0, query_temperature=(0.1, 4.0))))
    state = module._plan.begin(_inputs(ids), torch.arange(11)[None])
    wanted = [0.1 * torch.log1p(torch.tensor((i + 1) // 4)).item() + 1 for i in range(11)]
    same(state.temperatures[0][0, 0, :, 0], torch.tensor(wanted))


def _inputs(ids):
    from pluglm.contracts import ForwardInput

    return ForwardInput(ids, torch.arange(11)[None], None, dense=True)


def test_a_shared_slot_reads_what_an_earlier_layer_wrote(toy, ids):
    slots = (KVSlot(toy.K, toy.D, toy.D), SharedSlot(0))
    module = toy.build(toy.program(toy.layer(0), toy.layer(1), slots=slots))
    assert not any(name.startswith(("layers.1.attn.k", "layers.1.attn.v")) for name, _ in module.named_parameters())
    cache = toy.ListCache()
    pieces = [toy.run(module, piece, cache=cache).logits for piece in ids.split((6, 1, 4), 1)]
    same(torch.cat(pieces, 1), toy.run(module, ids).logits)
    assert set(cache.past) == {0}


def test_masks_keys_and_rotations_are_prepared_once_for_equal_layers(toy, ids, monkeypatch):
    layers = [toy.layer(i, window=3 if i % 2 else None) for i in range(6)]
    slots = tuple(KVSlot(toy.K, toy.D, toy.D, window=3 if i % 2 else None) for i in range(6))
    backend, cache, turned = toy.PlainAttention(), toy.ListCache(), []
    module = toy.build(toy.program(*layers, slots=slots), backend=backend)
    original = RotaryTable.cos_sin
    monkeypatch.setattr(RotaryTable, "cos_sin", lambda self, p: turned.append(p) or original(self, p))
    toy.run(module, ids, cache=cache)
    assert len(backend.prepared) == 2
    assert cache.steps[0].asked == [0, 1]
    assert len(turned) == 1
    assert len(backend.extras) == 6


def test_dense_segments_and_prefixes_reach_the_backend(toy, ids):
    backend = toy.PlainAttention()
    module = toy.build(toy.program(toy.layer(0)), backend=backend)
    prefix, segments = torch.tensor([2, 3]), torch.zeros(2, 11, dtype=torch.long)
    toy.run(module, ids, prefix_lengths=prefix, segments=segments)
    keys = backend.prepared[0][1]
    assert keys.dense
    assert keys.length == 11
    assert keys.prefix_lengths is prefix
    assert keys.segments is keys.q_segments is segments


def test_kernels_are_called_in_place_of_the_references(toy, ids):
    called = []

    def recorded(name, reference):
        return lambda *args: (called.append(name), reference(*args))[1]

    names = ("rms_norm", "layer_norm", "rope", "gated_act")
    kernels = {name: recorded(name, getattr(ops, name)) for name in names}
    made = toy.program(final_norm=Norm("layer", toy.C, 1e-5))
    same(toy.run(toy.build(made, kernels=kernels), ids).logits, toy.run(toy.build(made), ids).logits)
    assert set(called) == set(names)


def test_a_part_replaced_by_assignment_is_used(toy, ids, module):
    class Nothing(torch.nn.Module):
        def forward(self, x, state):
            return torch.zeros_like(x)

    before = toy.run(module, ids).logits
    module.layers[1].mlp = Nothing()
    assert not torch.equal(toy.run(module, ids).logits, before)
    module.set_submodule("layers.0.mlp.down", torch.nn.Linear(toy.F, toy.C))
    assert not torch.equal(toy.run(module, ids).logits, before)


def test_a_module_built_on_the_meta_device_works_once_it_is_filled(toy, ids, module):
    made = toy.program(llama(toy), toy.layer(1, window=3))
    with torch.device("meta"):
        empty = toy.build(made)
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert not list(empty.buffers())
    empty.load_state_dict(module.state_dict(), assign=True)
    same(toy.run(empty, ids).logits, toy.run(module, ids).logits)


def test_parameter_names_are_those_of_the_program(toy):
    made = toy.program(llama(toy), embedding=Embedding(toy.V, toy.C, learned_positions=64, norm=toy.norm()))
    assert [name for name, _ in toy.build(made).named_parameters()] == [
        "embed.weight", "embed_positions.weight", "embed_norm.weight",
        "layers.0.attn_norm_in.weight", "layers.0.attn.sinks", "layers.0.attn.q.weight", "layers.0.attn.q.bias",
        "layers.0.attn.k.weight", "layers.0.attn.v.weight", "layers.0.attn.v.bias", "layers.0.attn.o.weight",
        "layers.0.attn.o.bias", "layers.0.attn.q_norm.weight", "layers.0.attn.k_norm.weight",
        "layers.0.mlp_norm_in.weight", "layers.0.mlp.gate.weight", "layers.0.mlp.up.weight", "layers.0.mlp.down.weight",
        "norm.weight", "head.weight",
    ]  # fmt: skip


def test_gradients_reach_every_parameter(toy, ids, module):
    from pluglm.contracts import ForwardInput

    module(ForwardInput(ids, torch.arange(11)[None], None)).logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_logits_have_the_models_dtype(toy, ids):
    module = toy.build(replace(toy.program(), head=Head(tied=True, scale=0.5, softcap=30.0)), dtype="bfloat16")
    found = toy.run(module, ids, output_hidden_states=True)
    assert {found.logits.dtype, *(h.dtype for h in found.hidden_states)} == {torch.bfloat16}
