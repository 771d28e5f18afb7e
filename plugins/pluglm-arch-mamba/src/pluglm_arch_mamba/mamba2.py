"""Mamba 2's config -> `DecoderProgram`, and its weight map.

Semantics were checked against the modelling code of Transformers 5.23.0 and by the parity tests.
"""

from __future__ import annotations

from dataclasses import replace

from pluglm_blocks.reading import ACTIVATIONS, UNREAD, Config, Family, positive, read_time_step_limit, refuse

from pluglm.contracts import (
    Branch,
    DecoderProgram,
    Embedding,
    Head,
    Layer,
    Norm,
    Part,
    StateSpace,
    WeightMap,
    WeightRule,
    rules,
)

_INITIAL = "used to draw new weights only"
#: Keys of published files that change nothing here, with the reason.
IGNORED_KEYS = {
    **dict.fromkeys(("time_step_min", "time_step_max", "time_step_floor", "time_step_rank"), _INITIAL),
    **dict.fromkeys(("time_step_init_scheme", "time_step_scale", "rescale_prenorm_residual"), _INITIAL),
    "norm_before_gate": "the reference gates first whatever it says; files that say true were trained so",
}


def mamba2(reader: Config) -> DecoderProgram:
    """Mamba 2 (Dao & Gu 2024): x + mixer(norm(x)), layer after layer; the order of tokens is in the recurrence."""
    for key, reason in {**UNREAD, **IGNORED_KEYS}.items():
        reader.ignore(key, reason)
    reader.expect("rms_norm", True, "the mixer's output is normalised.")
    hidden_size, eps = positive(reader, "hidden_size"), float(reader.take("layer_norm_epsilon", float, 1e-5))
    if eps < 0:
        why = "Expected a number that is not negative."
        refuse("layer_norm_epsilon", f'The config has "layer_norm_epsilon": {eps}.', why)
    op = _mixer(reader, hidden_size, eps)
    norm = Norm("rms", hidden_size, eps)
    num_layers = positive(reader, "num_hidden_layers")
    layers = [Layer((Branch((Part("ssm", replace(op, slot=i), norm_in=norm),)),)) for i in range(num_layers)]
    return DecoderProgram(
        embedding=Embedding(positive(reader, "vocab_size"), hidden_size),
        layers=tuple(layers),
        final_norm=norm,
        head=Head(tied=bool(reader.take("tie_word_embeddings", bool, False))),
        slots=(op.state_slot,) * num_layers,
        max_seq_len=None,
        float32_residual=bool(reader.take("residual_in_fp32", bool, True)),
    )


def _mixer(reader: Config, hidden_size: int, eps: float) -> StateSpace:
    """The mixer that all layers have, in slot 0."""
    inner_size = positive(reader, "expand", 2) * hidden_size
    reader.expect("intermediate_size", inner_size, "the mixer's size is expand * hidden_size.")
    num_heads, head_dim = positive(reader, "num_heads"), positive(reader, "head_dim")
    if num_heads * head_dim != inner_size:
        what = f"The config has {num_heads} heads of {head_dim} dimensions for a mixer of size {inner_size}."
        refuse("num_heads", what, "num_heads * head_dim must be expand * hidden_size.")
    num_groups = positive(reader, "n_groups", 8)
    if num_heads % num_groups:
        why = "Each group must serve the same number of heads."
        refuse("n_groups", f"The config has {num_groups} groups for {num_heads} heads.", why)
    dt_min, dt_max = read_time_step_limit(reader)
    bias = bool(reader.take("use_bias", bool, False))
    return StateSpace(
        slot=0,
        inner_size=inner_size,
        num_heads=num_heads,
        head_dim=head_dim,
        num_groups=num_groups,
        state_size=positive(reader, "state_size"),
        conv_kernel=positive(reader, "conv_kernel", 4),
        chunk_size=positive(reader, "chunk_size", 256),
        norm=Norm("rms", inner_size, eps, cast_late=True),
        norm_groups=num_groups,
        activation=ACTIVATIONS[reader.choice("hidden_act", ACTIVATIONS, "silu")],
        conv_bias=bool(reader.take("use_conv_bias", bool, True)),
        in_bias=bias,
        out_bias=bias,
        dt_min=dt_min,
        dt_max=dt_max,
    )


LAYER = {
    "backbone.layers.{}.norm.weight": "layers.{}.ssm_norm_in.weight",
    "backbone.layers.{}.mixer.in_proj.weight": "layers.{}.ssm.in_proj.weight",
    "backbone.layers.{}.mixer.conv1d.weight": "layers.{}.ssm.conv.weight",
    "backbone.layers.{}.mixer.dt_bias": "layers.{}.ssm.dt_bias",
    "backbone.layers.{}.mixer.A_log": "layers.{}.ssm.A_log",
    "backbone.layers.{}.mixer.D": "layers.{}.ssm.D",
    "backbone.layers.{}.mixer.norm.weight": "layers.{}.ssm.norm.weight",
    "backbone.layers.{}.mixer.out_proj.weight": "layers.{}.ssm.out_proj.weight",
}
CONV_BIAS = {"backbone.layers.{}.mixer.conv1d.bias": "layers.{}.ssm.conv.bias"}
BIASES = {
    "backbone.layers.{}.mixer.in_proj.bias": "layers.{}.ssm.in_proj.bias",
    "backbone.layers.{}.mixer.out_proj.bias": "layers.{}.ssm.out_proj.bias",
}
ENDS = {"backbone.embeddings.weight": "embed.weight", "backbone.norm_f.weight": "norm.weight"}
#: Files of a decoder saved without its head leave the first one out.
PREFIXES = ("backbone.", "")


def weight_map(program: DecoderProgram) -> WeightMap:
    """The map of one model. All layers have the same parameters, so the first one tells."""
    op = program.layers[0].branches[0].parts[0].op
    assert isinstance(op, StateSpace), "there is no other part"
    table = {**ENDS, **LAYER, **(CONV_BIAS if op.conv_bias else {}), **(BIASES if op.in_bias else {})}
    head = WeightRule(("lm_head.weight",), ("head.weight",))
    if program.head.tied:  # some files repeat the embedding under the head's name
        head = replace(head, optional=True, tied_to="embed.weight")
    return WeightMap((*rules(table, layers=range(len(program.layers))), head), prefixes=PREFIXES)


FAMILIES: dict[str, Family] = {"mamba2": Family(mamba2, weight_map, bos=0, eos=2, pad=1)}
