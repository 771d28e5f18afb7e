"""T5 equals Transformers', in every way an input and a text can be fed; and a twin with one knob broken does not.

The model has an encoder, so it does not fit the tests of decoders beside this file; the tolerances are theirs.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any

import kit
import pytest
import torch
from pluglm_arch_t5.config import T5Config, read_config
from pluglm_arch_t5.t5 import T5
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pluglm.completions import Completion
from pluglm.contracts import AttentionRequest, EncoderInput, ForwardInput, ModelParts
from pluglm.errors import CheckpointError
from pluglm.lm import LanguageModel

TOLERANCE, CLEARLY = 1e-4, 1e-3
#: Tokens of the encoder and of the decoder, beyond every variant's largest distance but the default's 128.
SOURCE, LENGTH = 67, 90
#: Prompts of a batch, and new tokens.
RAGGED, STEPS = (29, 13, 40), 48
#: As in test_parity: two best logits that are closer would make a token a matter of rounding.
MARGIN = 1e-4

V, C, F, H, D = 131, 48, 84, 6, 10
SIZES: dict[str, Any] = {
    "vocab_size": V, "d_model": C, "d_ff": F, "d_kv": D, "num_heads": H, "layer_norm_epsilon": 1e-2,
    "decoder_start_token_id": 7, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """One checkpoint.

    Attributes:
        own_head: it has a head of its own. config: keys of the written config.json to change or (None) drop.
        seed: of its weights; another one where its texts repeat a few tokens.
    """

    settings: dict[str, Any]
    own_head: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0


VARIANTS = {
    # Version 1.0, as the first release was published: nothing is said of the head.
    "relu": Variant(
        {"num_layers": 3, "num_decoder_layers": 2, "relative_attention_num_buckets": 8,
         "relative_attention_max_distance": 20},
        config=dict.fromkeys(("tie_word_embeddings", "scale_decoder_outputs", "is_gated_act", "dense_act_fn")),
        seed=11,
    ),
    # Version 1.1 as Transformers 4 wrote it.
    "gated-gelu": Variant(
        {"num_layers": 2, "num_decoder_layers": 4, "feed_forward_proj": "gated-gelu",
         "relative_attention_num_buckets": 12, "relative_attention_max_distance": 31},
        own_head=True, config={"tie_word_embeddings": False, "scale_decoder_outputs": None},
    ),
    # The same spelled by Transformers 5, with default buckets and layers.
    "gated-silu": Variant(
        {"num_layers": 2, "feed_forward_proj": "gated-silu", "tie_word_embeddings": False}, own_head=True,
    ),
    "gelu": Variant({"num_layers": 2, "feed_forward_proj": "gelu", "relative_attention_max_distance": 40}, seed=8),
}  # fmt: skip
every_variant = pytest.mark.parametrize("name", VARIANTS)

Folder = Callable[[str], Path]
Loaded = Callable[..., LanguageModel]


def drawn(key: str, noise: Tensor) -> Tensor:
    """Random parameters at which every part matters: scores of a few units, biases of distances as large."""
    if noise.ndim == 1:  # norms
        return 1 + 0.3 * noise
    if "relative" in key:
        return 1.5 * noise
    if "shared" in key:  # small beside what the layers add: a tied head would repeat the last token for ever
        return 0.6 * noise
    gain = 1.0 if any(part in key for part in (".q.", ".k.", ".wi_")) else 2.0
    return gain * noise / noise.shape[-1] ** 0.5


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Variant name -> folder of its checkpoint."""
    from transformers import T5Config as ReferenceConfig
    from transformers import T5ForConditionalGeneration

    @cache
    def write(name: str) -> Path:
        folder, variant = tmp_path_factory.mktemp(f"t5-{name}"), VARIANTS[name]
        model = T5ForConditionalGeneration(ReferenceConfig(**SIZES, **variant.settings))
        draw = torch.Generator().manual_seed(variant.seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                parameter.copy_(drawn(key, torch.randn(parameter.shape, generator=draw)))
        model.save_pretrained(folder)
        if variant.own_head:  # the reference makes no such model, it only loads one
            tensors = load_file(folder / "model.safetensors")
            tensors["lm_head.weight"] = 0.3 * torch.randn(V, C, generator=draw)
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        config = {**json.loads((folder / "config.json").read_text()), **variant.config}
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in config.items() if v is not None or k in SIZES})
        )
        return folder

    return write


@pytest.fixture(scope="module")
def t5(t5_folder: Folder) -> Loaded:
    """(variant name, attention, cache) -> the model in pluglm."""

    @cache
    def load(name: str, attention: str = "eager", layout: str = "dynamic") -> LanguageModel:
        return kit.load(t5_folder(name), attention=attention, layout=layout)

    return load


@pytest.fixture(scope="module")
def reference(t5_folder: Folder) -> Callable[[str], Any]:
    """Variant name -> the model in Transformers, which keeps nothing between calls."""
    from transformers import T5ForConditionalGeneration

    @cache
    def load(name: str) -> Any:
        logging.getLogger("transformers.modeling_utils").setLevel(logging.ERROR)  # it says that the head is not tied
        model = T5ForConditionalGeneration.from_pretrained(
            t5_folder(name), attn_implementation="eager", dtype=torch.float32
        )
        separate = model.lm_head.weight.data_ptr() != model.shared.weight.data_ptr()
        assert separate == VARIANTS[name].own_head
        assert model.config.scale_decoder_outputs != VARIANTS[name].own_head
        return model.eval()

    return load


@pytest.fixture(scope="module")
def expected(reference: Callable[[str], Any]) -> Callable[[str, int], tuple[int, ...]]:
    """(variant, prompt length) -> the tokens Transformers chooses for that prompt alone, without a cache."""

    @cache
    def choose(name: str, length: int) -> tuple[int, ...]:
        model, source = reference(name), kit.prompt(length)[None]
        ids = torch.tensor([[SIZES["decoder_start_token_id"]]])
        with torch.no_grad():
            encoded = model.encoder(source)
            for _ in range(STEPS):
                logits = model(encoder_outputs=encoded, decoder_input_ids=ids).logits[0, -1]
                best = logits.topk(2).values
                assert best[0] - best[1] > MARGIN, "the reference's own choice is a matter of rounding"
                ids = torch.cat((ids, logits.argmax().view(1, 1)), dim=1)
        chosen = tuple(ids[0, 1:].tolist())
        assert len(set(chosen)) > 5, "a text of a few tokens shows little"
        return chosen

    return choose


def close(ours: Any, theirs: Any) -> None:
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= TOLERANCE


# Logits and hidden states


@every_variant
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_logits_and_hidden_states_equal_the_references(name: str, attention: str, t5: Loaded, reference: Any) -> None:
    source, ids = kit.prompt(SOURCE)[None], kit.prompt(LENGTH, seed=1)[None]
    with torch.no_grad():
        want = reference(name)(source, decoder_input_ids=ids, output_hidden_states=True)
        got = t5(name, attention).model(source, decoder_input_ids=ids, output_hidden_states=True)
    close(got.logits, want.logits)
    close(got.encoder_last_hidden_state, want.encoder_last_hidden_state)
    for mine, their in ((got.decoder_hidden_states, want.decoder_hidden_states),
                        (got.encoder_hidden_states, want.encoder_hidden_states)):  # fmt: skip
        assert len(mine) == len(their)
        for a, b in zip(mine, their, strict=True):
            close(a, b)
    assert len(got.decoder_hidden_states) == t5(name).model.description.num_layers + 1
    assert want.logits.abs().max() > 1, "logits about zero agree with everything"


@every_variant
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_of_either_stack_changes_no_row(
    name: str, attention: str, side: str, t5: Loaded, reference: Any
) -> None:
    sources = [kit.prompt(length) for length in (67, 41, 5)]
    texts = [kit.prompt(length, seed=1) for length in (33, 57, 12)]
    source, source_mask = kit.padded(sources, side)
    ids, mask = kit.padded(texts, side)
    with torch.no_grad():
        got = t5(name, attention).model(source, source_mask, ids, mask).logits
        for i in range(3):
            alone = reference(name)(sources[i][None], decoder_input_ids=texts[i][None]).logits[0]
            close(got[i][mask[i] == 1], alone)


@every_variant
def test_a_text_in_pieces_equals_the_whole_and_projects_the_encoders_keys_once(
    name: str, t5: Loaded, reference: Any
) -> None:
    source, ids = kit.prompt(SOURCE)[None], kit.prompt(LENGTH, seed=1)[None]
    model, kept, pieces = t5(name).model, None, []
    with torch.no_grad(), counted(model.module) as projections:
        encoded = model.encode(source)
        for i, piece in enumerate(ids.split((37, 1, 30, 22), dim=1)):
            more = {"encoder_outputs": encoded} if i < 3 else {}  # may be repeated, and need not be
            output = model(decoder_input_ids=piece, past_key_values=kept, use_cache=True, **more)
            kept = output.past_key_values
            pieces.append(output.logits)
        want = reference(name)(source, decoder_input_ids=ids).logits
    close(torch.cat(pieces, dim=1), want)
    assert kept is not None and kept.length == LENGTH
    assert projections == [1] * model.description.num_layers


@contextmanager
def counted(module: nn.Module) -> Iterator[list[int]]:
    """How often each decoder layer has projected the encoder's states to keys."""
    layers = module.get_submodule("decoder.layers")
    counts = [0] * len(list(layers.children()))

    def count(i: int) -> Any:
        def hook(*_: Any) -> None:
            counts[i] += 1

        return hook

    hooks = [
        layer.get_submodule("cross.k").register_forward_hook(count(i)) for i, layer in enumerate(layers.children())
    ]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


# Tokens


def tokens(lm: LanguageModel, lengths: tuple[int, ...], **settings: Any) -> list[tuple[int, ...]]:
    """The new tokens of each prompt of one batch."""
    done = lm.complete([kit.prompt(length).tolist() for length in lengths], max_new_tokens=STEPS, **settings)
    assert not isinstance(done, Completion)
    return [completion.token_ids for completion in done]


@every_variant
@pytest.mark.parametrize(
    ("attention", "layout"), [("eager", "dynamic"), ("eager", "static"), ("sdpa", "dynamic"), ("sdpa", "static")]
)
@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
def test_greedy_tokens_are_the_references_alone_and_in_a_ragged_batch(
    name: str, attention: str, layout: str, use_cache: bool, t5: Loaded, expected: Any
) -> None:
    if not use_cache and layout == "static":
        pytest.skip("without a cache its layout is of no matter")
    lm = t5(name, attention, layout)
    assert tokens(lm, RAGGED[:1], use_cache=use_cache) == [expected(name, RAGGED[0])]
    assert tokens(lm, RAGGED, use_cache=use_cache) == [expected(name, length) for length in RAGGED]


@every_variant
def test_greedy_tokens_are_those_of_the_references_own_generate(name: str, t5: Loaded, reference: Any) -> None:
    source, mask = kit.padded([kit.prompt(length) for length in RAGGED], "right")
    config = reference(name).config
    # The reference's cache has a place for each layer of the encoder: too few for a deeper decoder.
    fits = config.num_decoder_layers <= config.num_layers
    theirs = reference(name).generate(
        source, attention_mask=mask, max_new_tokens=STEPS, do_sample=False, pad_token_id=0, use_cache=fits
    )  # fmt: skip
    assert tokens(t5(name), RAGGED) == [tuple(row) for row in theirs[:, 1:].tolist()]


@every_variant
def test_a_generation_projects_the_encoders_keys_once(name: str, t5: Loaded) -> None:
    lm = t5(name)
    with counted(lm.model.module) as projections:
        tokens(lm, RAGGED)
    assert projections == [1] * lm.model.description.num_layers
    with counted(lm.model.module) as projections:
        tokens(lm, RAGGED, use_cache=False)
    assert projections == [STEPS] * lm.model.description.num_layers, "the count has no teeth"


@every_variant
def test_rows_of_a_cache_take_their_inputs_with_them(name: str, t5: Loaded, expected: Any) -> None:
    """As beams do: rows are copied, exchanged and dropped in the middle of a text."""
    model = t5(name).model
    source, mask = kit.padded([kit.prompt(length) for length in RAGGED], "left")
    decoder = model.conditioned(source, mask)  # type: ignore[operator]
    kept = decoder.new_cache(batch_size=3, capacity=STEPS)
    new = torch.full((3, 1), SIZES["decoder_start_token_id"])
    texts: list[list[int]] = [[], [], []]
    rows = [0, 1, 2]  # the prompt of each row
    with torch.no_grad():
        for step in range(STEPS):
            new = decoder.step(new, kept)[:, -1:].argmax(-1)
            for text, token in zip(texts, new[:, 0].tolist(), strict=True):
                text.append(token)
            for at, operation, index in (
                (5, "reorder", [2, 0, 1]), (9, "repeat", [0, 0, 1, 1, 2, 2]), (15, "fork", list(range(6))),
                (20, "select", [5, 1, 2, 2]),
            ):  # fmt: skip
                if step == at:
                    if operation == "fork":
                        kept = kept.fork()
                    else:
                        getattr(kept, operation)(2 if operation == "repeat" else torch.tensor(index))
                    new, rows = new[index], [rows[i] for i in index]
                    texts = [list(texts[i]) for i in index]
    assert len(rows) == 4
    assert [tuple(text) for text in texts] == [expected(name, RAGGED[row]) for row in rows]


# Twins


def build(t5: T5Config, lm: LanguageModel, weights: dict[str, Tensor]) -> T5:
    """The module of a config on given weights."""
    from pluglm_attention_eager import pluglm_build_attention

    specs = (t5.encoder_attention, t5.decoder_attention, t5.cross_attention)
    backend = pluglm_build_attention(request=AttentionRequest(specs, "cpu", "float32"))
    module = T5(t5, ModelParts(lm.model.description, backend, {}, "cpu", "float32"))
    module.load_state_dict({name: weights[name] for name, _ in module.named_parameters()})
    return module.eval()


@torch.no_grad()
def run(module: nn.Module) -> Tensor:
    """Logits of one pass without a cache."""
    source, ids = kit.prompt(SOURCE)[None], kit.prompt(LENGTH, seed=1)[None]
    places, cells = torch.arange(SOURCE)[None], torch.arange(LENGTH)[None]
    states = module.encode(EncoderInput(source, places, dense=True)).states  # type: ignore[operator]
    inputs = ForwardInput(ids, cells, None, dense=True, encoder_states=states, encoder_positions=places)
    found: Tensor = module.forward(inputs).logits
    return found


def sound(lm: LanguageModel) -> tuple[T5Config, dict[str, Tensor], Tensor]:
    return read_config(lm.model.config)[0], dict(lm.model.module.state_dict()), run(lm.model.module)


def attentions(module: T5, part: str) -> list[Any]:
    """All attention modules of one kind: encoder, decoder or cross."""
    stack = module.encoder if part == "encoder" else module.decoder
    return [getattr(layer, "cross" if part == "cross" else "attn") for layer in stack.layers]


Break = Callable[[T5], Any]


def scaled(part: str) -> Break:
    def change(module: T5) -> None:
        for attention in attentions(module, part):
            attention.spec = replace(attention.spec, scale=D**-0.5)

    return change


def unshared(part: str) -> Break:
    """The bias of distances stays in the first layer alone."""

    def change(module: T5) -> None:
        for attention in attentions(module, part)[1:]:
            attention.spec = replace(attention.spec, bias=False)

    return change


def biased_cross(module: T5) -> None:
    """Cross-attention adds the decoder's bias for the distance to the encoder's tokens."""
    places = module.decoder.bias(torch.arange(LENGTH)[None], torch.arange(SOURCE)[None])
    for attention in attentions(module, "cross"):
        attention.spec = replace(attention.spec, bias=True)
        attend = attention.forward

        def with_bias(x: Tensor, view: Any, mask: Any, bias: Any = None, *, attend: Any = attend) -> Any:
            return attend(x, view, mask, places)

        attention.forward = with_bias


def onesided(stack: str) -> Break:
    def change(module: T5) -> None:
        bias: Any = module.get_submodule(f"{stack}.bias")
        bias.bidirectional = not bias.bidirectional

    return change


def unnormed(stack: str) -> Break:
    def change(module: T5) -> None:
        module.get_submodule(stack).norm = nn.Identity()

    return change


#: What is changed in a built module.
MODULE_KNOBS: dict[str, Break] = {
    **{f"scores of {part} attention are divided by sqrt(D)": scaled(part) for part in ("encoder", "decoder", "cross")},
    **{f"only the first {part} layer has the bias": unshared(part) for part in ("encoder", "decoder")},
    **{f"buckets of the {stack} have the other directions": onesided(stack) for stack in ("encoder", "decoder")},
    **{f"no final norm in the {stack}": unnormed(stack) for stack in ("encoder", "decoder")},
    "cross-attention has a bias": biased_cross,
}
#: What is changed in the config: (change, or None where it changes nothing of the variant).
CONFIG_KNOBS: dict[str, Callable[[T5Config], T5Config | None]] = {
    "fewer buckets": lambda t5: replace(t5, num_buckets=t5.num_buckets - 4),
    "another largest distance": lambda t5: replace(t5, max_distance=t5.max_distance + 15),
    "another epsilon": lambda t5: replace(t5, norm_eps=1e-6),
    "another activation": lambda t5: replace(t5, activation="relu2" if t5.activation == "relu" else "relu"),
    "the other gelu": lambda t5: (
        replace(t5, activation={"gelu": "gelu_tanh", "gelu_tanh": "gelu"}[t5.activation])  # type: ignore[arg-type]
        if "gelu" in t5.activation else None
    ),
    "the head's input scaled the other way": lambda t5: replace(t5, scaled=not t5.scaled),
    "the other head": lambda t5: None if t5.tied else replace(t5, tied=True),
    "one encoder layer less": lambda t5: replace(t5, num_encoder_layers=t5.num_encoder_layers - 1),
    "heads of another size": lambda t5: replace(t5, num_heads=D, head_dim=H),
}  # fmt: skip
#: Differences between the two gelus are small by nature; they still exceed what parity tolerates.
SMALL = {"the other gelu": 2 * TOLERANCE}


@every_variant
def test_an_unbroken_twin_is_the_model_itself(name: str, t5: Loaded) -> None:
    config, weights, logits = sound(t5(name))
    assert torch.equal(run(build(config, t5(name), weights)), logits)


@every_variant
@pytest.mark.parametrize("knob", MODULE_KNOBS)
def test_a_twin_with_one_part_broken_gives_other_logits(name: str, knob: str, t5: Loaded) -> None:
    config, weights, logits = sound(t5(name))
    twin = build(config, t5(name), weights)
    MODULE_KNOBS[knob](twin)
    assert (run(twin) - logits).abs().max() > CLEARLY


@pytest.mark.parametrize("knob", CONFIG_KNOBS)
def test_a_twin_with_one_number_broken_gives_other_logits(knob: str, t5: Loaded) -> None:
    found = {}
    for name in VARIANTS:
        config, weights, logits = sound(t5(name))
        broken = CONFIG_KNOBS[knob](config)
        if broken is not None:
            for table in ("encoder.bias.table", "decoder.bias.table"):
                rows = weights[table][: broken.num_buckets]
                if broken.num_heads != H:  # other heads take what comes
                    rows = torch.cat((rows, rows), dim=1)[:, : broken.num_heads]
                weights[table] = rows
            found[name] = float((run(build(broken, t5(name), weights)) - logits).abs().max())
    assert found, "no checkpoint has this knob"
    assert {name: d for name, d in found.items() if not d > SMALL.get(knob, CLEARLY)} == {}


def test_every_number_of_a_config_is_broken_by_some_twin(t5: Loaded) -> None:
    read = {name: sound(t5(name))[0] for name in VARIANTS}
    broken = {
        field
        for knob in CONFIG_KNOBS.values() for config in read.values() if (twin := knob(config)) is not None
        for field in vars(config) if getattr(config, field) != getattr(twin, field)
    }  # fmt: skip
    # Other shapes cannot be loaded at all; ids are no part of the module.
    unbreakable = {
        "vocab_size", "hidden_size", "intermediate_size", "num_decoder_layers", "gated", "start", "eos", "pad",
    }  # fmt: skip
    assert broken | unbreakable == set(vars(read["relu"]))


@every_variant
@pytest.mark.parametrize(
    ("one", "other"),
    [
        (".attn.k.", ".attn.v."), (".cross.k.", ".cross.v."), (".cross.q.", ".attn.q."), ("attn_norm", "mlp_norm"),
        ("cross_norm", "mlp_norm"), (".mlp.gate.", ".mlp.up."), ("encoder.bias", "decoder.bias"),
        ("encoder.norm", "decoder.norm"), ("head", "embed"),
    ],
)  # fmt: skip
def test_a_twin_with_two_weights_exchanged_gives_other_logits(name: str, one: str, other: str, t5: Loaded) -> None:
    config, weights, logits = sound(t5(name))

    def exchanged(key: str) -> str:
        return key.replace(one, other) if one in key else key.replace(other, one)

    swapped = {key: weights.get(exchanged(key), tensor) for key, tensor in weights.items()}
    if not any(one in key for key in weights):
        pytest.skip("this checkpoint has no such weight")
    assert (run(build(config, t5(name), swapped)) - logits).abs().max() > CLEARLY


# Files


def copy(source: Path, target: Path, change: Callable[[dict[str, Tensor]], Any], **config: Any) -> Path:
    """A copy of a checkpoint whose tensors `change` has gone over, with other keys in its config."""
    shutil.copytree(source, target, dirs_exist_ok=True)
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    said = json.loads((source / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**said, **config}))
    return target


def test_what_older_files_repeat_or_hold_for_nothing_changes_nothing(
    t5_folder: Folder, t5: Loaded, tmp_path: Path
) -> None:
    def older(tensors: dict[str, Tensor]) -> None:
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors["shared.weight"].clone()
        tensors["decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"] = torch.ones(8, H)

    again = kit.load(copy(t5_folder("relu"), tmp_path, older, n_positions=512, output_past=True))
    assert torch.equal(run(again.model.module), run(t5("relu").model.module))


@pytest.mark.parametrize("name", ["lm_head.weight", "decoder.embed_tokens.weight"])
def test_a_repeated_table_that_differs_is_refused(name: str, t5_folder: Folder, tmp_path: Path) -> None:
    def other(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors["shared.weight"] + 1

    with pytest.raises(CheckpointError, match=name):
        kit.load(copy(t5_folder("relu"), tmp_path, other))


@pytest.mark.parametrize("name", ["gated-gelu", "gated-silu"])
def test_a_head_of_its_own_that_is_missing_is_refused(name: str, t5_folder: Folder, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"lm_head.weight"):
        kit.load(copy(t5_folder(name), tmp_path, lambda tensors: tensors.pop("lm_head.weight")))


@every_variant
def test_what_is_saved_is_loaded_bit_by_bit_and_by_the_reference(
    name: str, t5: Loaded, t5_folder: Folder, tmp_path: Path
) -> None:
    t5(name).save(tmp_path / "saved")
    one, other = (load_file(folder / "model.safetensors") for folder in (t5_folder(name), tmp_path / "saved"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(run(kit.load(tmp_path / "saved").model.module), run(t5(name).model.module))
