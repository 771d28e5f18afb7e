"""Programs that cannot be built are refused at build, with every reason and its place."""

from dataclasses import replace

import pytest
import torch
from pluglm_blocks import OPS, OpKind

from pluglm.contracts import (
    Branch,
    Embedding,
    FeedForward,
    KVSlot,
    Layer,
    Norm,
    Part,
    Rope,
    SharedSlot,
    StateSlot,
)
from pluglm.errors import UnsupportedRequestError


def only(part):
    return Layer((Branch((part,)),))


def feed_forward(toy, **changes):
    return replace(FeedForward(toy.C, toy.F, "silu"), **changes)


def slot(toy, **changes):
    return replace(KVSlot(toy.K, toy.D, toy.D), **changes)


CASES = {
    f"layers.0.mlp: op 'nothing' is not one of {', '.join(OPS)}":
        lambda t: t.program(only(Part("mlp", feed_forward(t, op="nothing"))), slots=()),
    "layers.0.mlp: activation 'gelo' is not one of silu, gelu, gelu_tanh, relu, relu2, quick_gelu":
        lambda t: t.program(only(Part("mlp", feed_forward(t, activation="gelo"))), slots=()),
    "layers.0.mlp: its hidden_size is 21, the model's 20":
        lambda t: t.program(only(Part("mlp", feed_forward(t, hidden_size=21))), slots=()),
    "layers.0.mlp: a plain feed-forward has no gate to scale by 2.0":
        lambda t: t.program(only(Part("mlp", feed_forward(t, gated=False, gate_scale=2.0))), slots=()),
    "layers.0.mlp: a norm of size 9 cannot take vectors of size 20":
        lambda t: t.program(only(Part("mlp", feed_forward(t), norm_in=t.norm(size=9))), slots=()),
    "layers.0.mlp: an rms norm has no bias":
        lambda t: t.program(only(Part("mlp", feed_forward(t), norm_out=t.norm(bias=True))), slots=()),
    "layers.0.mlp: share_norm_in is for a later part of a branch, without a norm_in of its own":
        lambda t: t.program(only(Part("mlp", feed_forward(t), share_norm_in=True)), slots=()),
    "norm: norm kind 'batch' is neither 'rms' nor 'layer'": lambda t: t.program(final_norm=t.norm(kind="batch")),
    "norm: a norm without a weight has nothing to add the offset 1.0 to":
        lambda t: t.program(final_norm=t.norm(weight=False, offset=1.0)),
    "embedding: 64 learned positions are too few for 64 tokens with an offset of 2":
        lambda t: t.program(embedding=Embedding(t.V, t.C, learned_positions=64, position_offset=2)),
    "layers.0: two parts give parameters the place 'mlp'":
        lambda t: t.program(Layer((Branch((Part("mlp", feed_forward(t)),) * 2),)), slots=()),
    "layers.0: 'forward' cannot be the name of a part":
        lambda t: t.program(only(Part("forward", feed_forward(t))), slots=()),
    "layers.0: a branch without parts (or a layer without branches) adds nothing": lambda t: t.program(Layer((Branch(()),)), slots=()),
    "layers.0.attn: slot 5 is not one of the program's 1": lambda t: t.program(t.layer(5)),
    "layers.1.attn: slot 0 is written by an earlier layer already": lambda t: t.program(t.layer(0), t.layer(0)),
    "layers.0.attn: slot 0 shares slot 1, which no earlier layer writes":
        lambda t: t.program(t.layer(0), t.layer(1), slots=(SharedSlot(1), slot(t))),
    "slot 0: shares slot 0, which holds nothing": lambda t: t.program(t.layer(0), slots=(SharedSlot(0),)),
    "layers.0.attn: slot 0 is a state slot; attention needs keys and values":
        lambda t: t.program(t.layer(0), slots=(StateSlot(()),)),
    "layers.0.attn: slot 0 holds (heads, key size, value size) (3, 8, 5), the layer needs (3, 8, 8)":
        lambda t: t.program(t.layer(0), slots=(slot(t, v_head_dim=5),)),
    "layers.0.attn: slot 0 may drop keys beyond a window of 4, the mask reads all":
        lambda t: t.program(t.layer(0), slots=(slot(t, window=4),)),
    "layers.0.attn: slot 0 may drop keys beyond a window of 4, the mask reads 6":
        lambda t: t.program(t.layer(0, window=6), slots=(slot(t, window=4),)),
    "layers.0.attn: slot 0 may drop keys of earlier chunks of 4, the mask's chunk is None":
        lambda t: t.program(t.layer(0), slots=(slot(t, chunk=4),)),
    "layers.0.attn: cross-attention needs an encoder; a decoder program has none": lambda t: t.program(t.layer(0, cross=True)),
    "layers.0.attn: 2 ALiBi slopes for 6 heads": lambda t: t.program(t.layer(0, spec={"alibi_slopes": (0.5, 0.25)})),
    "layers.0.attn: relative_buckets and spec.bias go together": lambda t: t.program(t.layer(0, spec={"bias": True})),
    "layers.0.attn: rope dim 10 exceeds head_dim 8": lambda t: t.program(t.layer(0, rope=Rope("default", 1e4, 10))),
    "layers.0.attn: rope 'linear' needs the parameters ['factor']": lambda t: t.program(t.layer(0, rope=Rope("linear", 1e4, 8))),
    "layers.0.attn: qk_norm over 'all' has size 8, the queries need 48":
        lambda t: t.program(t.layer(0, qk_norm=Norm("rms", 8, 1e-5), qk_norm_over="all")),
    "layers.0.attn: qkv_clip with qk_norm: families differ in which comes first":
        lambda t: t.program(t.layer(0, qk_norm=Norm("rms", 8, 1e-5), qkv_clip=8.0)),
    "attention backend plain: no chunks here":
        lambda t: t.program(t.layer(0, spec={"mask": replace(t.attention().spec.mask, chunk=4)})),
    "the program has version 9, these blocks build version 1": lambda t: t.program(version=9),
}  # fmt: skip


@pytest.mark.parametrize("reason", CASES)
def test_a_program_that_cannot_be_built_is_refused(toy, reason):
    with pytest.raises(UnsupportedRequestError) as caught:
        toy.build(CASES[reason](toy))
    assert caught.value.reasons == (reason,)
    assert str(caught.value) == (
        "this decoder program cannot be built (1 reason).\n"
        f"  Why: {reason}\n"
        "  To do: Correct the program in the architecture plugin that made it, or choose other parts."
    )


def test_heads_that_key_value_heads_do_not_divide_are_refused(toy):
    with pytest.raises(UnsupportedRequestError) as caught:
        toy.build(toy.program(toy.layer(0, spec={"num_heads": 7})))
    assert caught.value.reasons == ("layers.0.attn: 3 key-value heads do not divide 7 heads",)


def test_attention_without_a_backend_is_refused(toy):
    with pytest.raises(UnsupportedRequestError, match=r"layers\.0\.attn: no attention backend was given"):
        toy.build(toy.program(toy.layer(0)), attention=False)


def test_every_reason_is_told_at_once(toy):
    made = toy.program(toy.layer(0, cross=True), toy.layer(7), final_norm=toy.norm(size=9))
    with pytest.raises(UnsupportedRequestError) as caught:
        toy.build(made)
    assert len(caught.value.reasons) == 3
    assert "(3 reasons)" in str(caught.value)


def test_a_further_op_is_added_by_registering_it(toy, ids, monkeypatch):
    class Zero(torch.nn.Module):
        def forward(self, x, state):
            return torch.zeros_like(x)

    monkeypatch.setitem(OPS, "nothing", OpKind(lambda op, context: [], lambda op, context: Zero()))
    made = toy.program(only(Part("mlp", feed_forward(toy, op="nothing"))), slots=(), final_norm=None)
    module = toy.build(made, attention=False)
    found = toy.run(module, ids).logits
    torch.testing.assert_close(found, module.head(module.embed(ids)))
