"""`T5Config` -> `ModelDescription`, and checkpoint names <-> parameter names. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pluglm.contracts import CrossSlot, KVSlot, ModelDescription, WeightMap, WeightRule, rules
from pluglm.errors import ConfigError
from pluglm_arch_t5.config import T5Config, read_config

ATTENTION = {
    "{stack}.block.{}.layer.0.SelfAttention.q.weight": "{stack}.layers.{}.attn.q.weight",
    "{stack}.block.{}.layer.0.SelfAttention.k.weight": "{stack}.layers.{}.attn.k.weight",
    "{stack}.block.{}.layer.0.SelfAttention.v.weight": "{stack}.layers.{}.attn.v.weight",
    "{stack}.block.{}.layer.0.SelfAttention.o.weight": "{stack}.layers.{}.attn.o.weight",
    "{stack}.block.{}.layer.0.layer_norm.weight": "{stack}.layers.{}.attn_norm.weight",
}
CROSS = {
    "{stack}.block.{}.layer.1.EncDecAttention.q.weight": "{stack}.layers.{}.cross.q.weight",
    "{stack}.block.{}.layer.1.EncDecAttention.k.weight": "{stack}.layers.{}.cross.k.weight",
    "{stack}.block.{}.layer.1.EncDecAttention.v.weight": "{stack}.layers.{}.cross.v.weight",
    "{stack}.block.{}.layer.1.EncDecAttention.o.weight": "{stack}.layers.{}.cross.o.weight",
    "{stack}.block.{}.layer.1.layer_norm.weight": "{stack}.layers.{}.cross_norm.weight",
}
#: `{ff}` is the place of the feed-forward in a block: 1 in the encoder, 2 in the decoder.
PLAIN = {"{stack}.block.{}.layer.{ff}.DenseReluDense.wi.weight": "{stack}.layers.{}.mlp.up.weight"}
GATED = {
    "{stack}.block.{}.layer.{ff}.DenseReluDense.wi_0.weight": "{stack}.layers.{}.mlp.gate.weight",
    "{stack}.block.{}.layer.{ff}.DenseReluDense.wi_1.weight": "{stack}.layers.{}.mlp.up.weight",
}
FEED_FORWARD = {
    "{stack}.block.{}.layer.{ff}.DenseReluDense.wo.weight": "{stack}.layers.{}.mlp.down.weight",
    "{stack}.block.{}.layer.{ff}.layer_norm.weight": "{stack}.layers.{}.mlp_norm.weight",
}
#: The table of the first block serves all.
STACK = {
    "{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight": "{stack}.bias.table",
    "{stack}.final_layer_norm.weight": "{stack}.norm.weight",
}
EMBEDDING = {"shared.weight": "embed.weight"}
HEAD = WeightRule(("lm_head.weight",), ("head.weight",))
#: Older files repeat the embedding under the name of each stack's.
REPEATED = [
    WeightRule((f"{stack}.embed_tokens.weight",), (f"{stack}.embed.weight",), optional=True, tied_to="embed.weight")
    for stack in ("encoder", "decoder")
]
IGNORED = {
    "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight": "cross-attention adds no bias; files "
    "from the first release hold a table that was never used",
}


def describe(config: Mapping[str, Any]) -> ModelDescription:
    """Describe one model.

    Raises: ConfigError if it is of another model type, or if a key is missing, wrong, or read by nobody.
    """
    if config.get("model_type") != "t5":
        raise ConfigError(
            f"The config has the model_type {config.get('model_type')!r}.", why="pluglm-arch-t5 reads t5.",
            fix="Use a plugin for that architecture (`pluglm plugins`), or correct the file.",
            key="model_type", path=None,
        )  # fmt: skip
    t5, reader = read_config(config)
    report = reader.finish()
    H, D, L = t5.num_heads, t5.head_dim, t5.num_decoder_layers
    return ModelDescription(
        model_type="t5", program=None, weights=weight_map(t5), vocab_size=t5.vocab_size, hidden_size=t5.hidden_size,
        num_layers=L, max_seq_len=None,
        attention=(t5.encoder_attention, t5.decoder_attention, t5.cross_attention),
        # Slot i is of decoder layer i's self-attention, slot L + i of its cross-attention.
        slots=(KVSlot(H, D, D),) * L + (CrossSlot(H, D, D),) * L,
        used=report.used, ignored=report.ignored, eos_token_ids=t5.eos,
        pad_token_id=t5.pad[0] if t5.pad else None, is_encoder_decoder=True,
        decoder_start_token_id=t5.start[0] if t5.start else None,
    )  # fmt: skip


def weight_map(t5: T5Config) -> WeightMap:
    """The map of one model."""
    found = rules(EMBEDDING)
    feed_forward = (GATED if t5.gated else PLAIN) | FEED_FORWARD
    for stack, place, parts, count in (
        ("encoder", "1", ATTENTION, t5.num_encoder_layers), ("decoder", "2", ATTENTION | CROSS, t5.num_decoder_layers),
    ):  # fmt: skip
        table = {
            source.replace("{stack}", stack).replace("{ff}", place): target.replace("{stack}", stack)
            for source, target in (parts | feed_forward | STACK).items()
        }
        found += rules(table, layers=range(count))
    head = WeightRule(HEAD.sources, HEAD.targets, optional=True, tied_to="embed.weight") if t5.tied else HEAD
    return WeightMap((*found, *REPEATED, head), IGNORED)
