"""The forward contract of encoder-decoders over any executor, and the decoder that strategies are given."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pluglm.contracts import (
    CrossSlot,
    DenseView,
    EncoderInput,
    EncoderOutput,
    ForwardInput,
    ForwardOutput,
    KeyInfo,
    KVSlot,
    ModelDescription,
    WeightMap,
)
from pluglm.errors import ContextLengthError, InputError, PluginError
from pluglm.outputs import EncodedOutput, Seq2SeqOutput
from pluglm.seq2seq import ConditionedLM, Seq2SeqLM

# Pairwise different: batch, encoder's tokens, decoder's tokens, vocabulary, hidden, layers, contexts.
B, TE, T, V, C, L, S, SE = 2, 7, 5, 13, 6, 3, 20, 17
SOURCE = torch.arange(B * TE).view(B, TE) % V
IDS = torch.arange(B * T).view(B, T)
MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * TE])
PLACES = [[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 3, 4, 5, 6]]


class FakeCache:
    """Dense tokens, and what an encoder wrote; slot 1 is the cross slot."""

    dense, streams = True, False

    def __init__(self, batch_size: int, capacity: int | None = None) -> None:
        self.batch_size, self.capacity, self.length = batch_size, capacity, 0
        self.positions: Tensor | None = None

    def next_positions(self, count: int) -> Tensor:
        return torch.arange(self.length, self.length + count)[None]

    def cross(self, slot: int) -> tuple[DenseView, KeyInfo] | None:
        assert slot == 1
        if self.positions is None:
            return None
        empty = torch.zeros(self.batch_size, 1, self.positions.shape[1], 1)
        return DenseView(empty, empty), KeyInfo(self.positions, self.positions.shape[1], dense=False)


class FakeLayout:
    def new(self, *, batch_size: int, capacity: int | None = None) -> FakeCache:
        return FakeCache(batch_size, capacity)


class FakeModule(nn.Module):
    """Records what its encoder is given; states of a token are its id."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, C)
        self.head = nn.Linear(C, V, bias=False)
        self.encoded: list[EncoderInput] = []

    def encode(self, inputs: EncoderInput) -> EncoderOutput:
        self.encoded.append(inputs)
        if inputs.embeds is not None:
            states = inputs.embeds
        else:
            assert inputs.token_ids is not None
            states = inputs.token_ids[..., None].expand(-1, -1, C).float()
        return EncoderOutput(states, (states,) * 3 if inputs.output_hidden_states else None)


class FakeExecutor:
    """Records the decoder's passes, and keeps the encoder's positions as a module would."""

    name = "fake"

    def __init__(self) -> None:
        self.passes: list[ForwardInput] = []

    def run(self, inputs: ForwardInput) -> ForwardOutput:
        self.passes.append(inputs)
        tokens = inputs.token_ids if inputs.token_ids is not None else inputs.embeds
        assert tokens is not None
        rows, count = tokens.shape[:2]
        cache: Any = inputs.cache
        if cache is not None:
            if cache.positions is None:
                cache.positions = inputs.encoder_positions
            cache.length += count
        hidden = (torch.zeros(rows, count, C),) * (L + 1)
        return ForwardOutput(torch.zeros(rows, count, V), hidden if inputs.output_hidden_states else None)


def make(*, module: nn.Module | None = None, **said: Any) -> Seq2SeqLM:
    fields: dict[str, Any] = {"max_seq_len": S, "max_encoder_len": SE, "slots": (KVSlot(1, 1, 1), CrossSlot(1, 1, 1))}
    described = ModelDescription(
        model_type="fake", program=None, weights=WeightMap(()), vocab_size=V, hidden_size=C, num_layers=L,
        attention=(), is_encoder_decoder=True, **{**fields, **said},
    )  # fmt: skip
    return Seq2SeqLM(module or FakeModule(), FakeExecutor(), FakeLayout(), described, {})  # type: ignore[arg-type]


@pytest.fixture
def model() -> Seq2SeqLM:
    return make()


def passes(model: Seq2SeqLM) -> list[ForwardInput]:
    assert isinstance(model.executor, FakeExecutor)
    return model.executor.passes


def encoded(model: Seq2SeqLM) -> list[EncoderInput]:
    assert isinstance(model.module, FakeModule)
    return model.module.encoded


def refusal(model: Seq2SeqLM, *args: Any, kind: type[InputError] = InputError, **arguments: Any) -> InputError:
    """The error of a call that must run neither stack."""
    before = len(passes(model)), len(encoded(model))
    with pytest.raises(kind) as caught:
        model(*args, **arguments)
    assert (len(passes(model)), len(encoded(model))) == before
    return caught.value


# What goes to which stack


def test_the_encoder_gets_the_input_and_the_decoder_its_states_and_positions(model: Seq2SeqLM) -> None:
    model(SOURCE, decoder_input_ids=IDS)
    (first,), (second,) = encoded(model), passes(model)
    assert first.token_ids is SOURCE and first.dense and first.positions.tolist() == [list(range(TE))]
    assert second.token_ids is IDS and second.dense and second.positions.tolist() == [list(range(T))]
    assert second.encoder_states is not None and second.encoder_positions is not None
    assert torch.equal(second.encoder_states[..., 0], SOURCE.float())
    assert second.encoder_positions.tolist() == [list(range(TE))] * B


def test_each_stack_has_a_mask_of_its_own(model: Seq2SeqLM) -> None:
    mask = torch.tensor([[1, 1, 1, 0, 0], [1] * T])
    model(SOURCE, MASK, IDS, mask)
    assert encoded(model)[0].positions.tolist() == PLACES and not encoded(model)[0].dense
    assert passes(model)[0].encoder_positions.tolist() == PLACES  # type: ignore[union-attr]
    assert passes(model)[0].positions.tolist() == [[0, 1, 2, -1, -1], [0, 1, 2, 3, 4]]


def test_embeddings_take_the_place_of_ids_in_either_stack(model: Seq2SeqLM) -> None:
    source, text = torch.randn(B, TE, C), torch.randn(B, T, C)
    model(inputs_embeds=source, decoder_inputs_embeds=text)
    assert encoded(model)[0].embeds is source and encoded(model)[0].token_ids is None
    assert passes(model)[0].embeds is text and passes(model)[0].token_ids is None


def test_what_encode_returned_is_not_computed_again(model: Seq2SeqLM) -> None:
    outputs = model.encode(SOURCE, MASK, output_hidden_states=True)
    assert isinstance(outputs, EncodedOutput) and len(outputs.hidden_states or ()) == 3
    states = outputs.last_hidden_state
    for form in (outputs, (states,), [states, None], model.get_encoder()(SOURCE)):
        before = len(encoded(model))
        model(encoder_outputs=form, attention_mask=MASK, decoder_input_ids=IDS)
        assert len(encoded(model)) == before
        assert torch.equal(passes(model)[-1].encoder_states, states)  # type: ignore[arg-type]
        assert passes(model)[-1].encoder_positions.tolist() == PLACES  # type: ignore[union-attr]


def test_later_calls_on_a_cache_bring_no_input_or_the_same_outputs(model: Seq2SeqLM) -> None:
    first = model(SOURCE, MASK, IDS, use_cache=True)
    cache = first.past_key_values
    assert (cache.batch_size, cache.capacity, cache.length) == (B, S, T)
    for again in ({}, {"attention_mask": MASK}, {"encoder_outputs": (first.encoder_last_hidden_state,)}):
        output = model(decoder_input_ids=IDS[:, :1], past_key_values=cache, **again)
        assert passes(model)[-1].encoder_states is None
        assert (output.encoder_last_hidden_state is None) == ("encoder_outputs" not in again)
    assert len(encoded(model)) == 1
    assert passes(model)[-1].positions.tolist() == [[T + 2]]
    model.step(IDS[:, :1], cache)
    assert passes(model)[-1].encoder_states is None and cache.length == T + 4


def test_the_output_names_both_stacks_and_skips_what_is_not_there(model: Seq2SeqLM) -> None:
    output = model(SOURCE, decoder_input_ids=IDS, output_hidden_states=True, use_cache=True)
    assert isinstance(output, Seq2SeqOutput)
    assert list(output) == [
        "logits", "past_key_values", "decoder_hidden_states", "encoder_last_hidden_state", "encoder_hidden_states",
    ]  # fmt: skip
    assert len(output.decoder_hidden_states or ()) == L + 1 and len(output.encoder_hidden_states or ()) == 3
    plain = model(SOURCE, decoder_input_ids=IDS, return_dict=False)
    assert isinstance(plain, tuple) and [t.shape for t in plain] == [(B, T, V), (B, TE, C)]
    kept = model(decoder_input_ids=IDS[:, :1], past_key_values=output.past_key_values, use_cache=False)
    assert list(kept) == ["logits"] and "encoder_last_hidden_state" not in kept
    with pytest.raises(KeyError, match="past_key_values"):
        kept["past_key_values"]


def test_logits_to_keep_is_the_decoders(model: Seq2SeqLM) -> None:
    model(SOURCE, decoder_input_ids=IDS, logits_to_keep=2)
    assert passes(model)[0].logits_to_keep == 2


# What is refused


def test_exactly_one_input_of_each_stack_is_given(model: Seq2SeqLM) -> None:
    states = (torch.zeros(B, TE, C),)
    for wrong in ({}, {"input_ids": SOURCE, "encoder_outputs": states},
                  {"input_ids": SOURCE, "inputs_embeds": states[0]}):  # fmt: skip
        error = refusal(model, decoder_input_ids=IDS, **wrong)
        assert error.what == "give exactly one of input_ids, inputs_embeds and encoder_outputs."
        assert error.why == "the decoder attends to one encoded input, and no cache holds it yet."
        assert error.argument == "input_ids"
    error = refusal(model, SOURCE)
    assert error.what == "give exactly one of decoder_input_ids and decoder_inputs_embeds."
    assert error.argument == "decoder_input_ids"


def test_an_input_beside_a_cache_that_holds_one_is_refused(model: Seq2SeqLM) -> None:
    cache = model(SOURCE, MASK, IDS, use_cache=True).past_key_values
    more = {"decoder_input_ids": IDS[:, :1], "past_key_values": cache}
    for name, value in (("input_ids", SOURCE), ("inputs_embeds", torch.zeros(B, TE, C))):
        error = refusal(model, **{name: value}, **more)
        assert error.what == f"the cache holds the encoder's keys already; {name} would be read by nobody."
        assert error.why == "the encoder's output is projected once a sequence."
        assert "reset()" in error.fix and error.argument == name
    for mask in (torch.ones(B, TE), MASK[:, 1:]):
        error = refusal(model, attention_mask=mask, **more)
        assert error.what == (
            f"attention_mask, of shape {tuple(mask.shape)}, is not the one under which the cache's {(B, TE)} encoder "
            "tokens were fed."
        )
        assert "leave it out" in error.fix and error.argument == "attention_mask"
    error = refusal(model, encoder_outputs=(torch.zeros(B, TE + 1, C),), **more)
    assert error.what == f"encoder_outputs holds {(B, TE + 1)} states, the cache the keys of {(B, TE)}."
    assert error.argument == "encoder_outputs"


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (torch.zeros(B, TE, C), "a Tensor."),
        ((), "a tuple."),
        ({"states": 1}, "a dict."),
        ((torch.zeros(B, TE, C + 1),), f"a tuple whose states have shape {(B, TE, C + 1)}."),
    ],
)
def test_encoder_outputs_of_another_form_are_refused(model: Seq2SeqLM, outputs: Any, said: str) -> None:
    error = refusal(model, encoder_outputs=outputs, decoder_input_ids=IDS)
    assert error.what == f"encoder_outputs is {said}"
    assert error.why == f"it must have a last_hidden_state [B, Te, {C}], or be a tuple that begins with one."
    assert error.fix == "Pass what model.encode(…) returned." and error.argument == "encoder_outputs"


def test_the_two_stacks_have_the_same_rows(model: Seq2SeqLM) -> None:
    error = refusal(model, SOURCE, decoder_input_ids=IDS[:1])
    assert error.what == f"the encoder's input has {B} rows, the decoder's has 1."
    assert error.fix == "Pass one row of the encoder's input for each of the decoder's."
    assert error.argument == "decoder_input_ids"


def test_refusals_name_the_decoders_arguments(model: Seq2SeqLM) -> None:
    error = refusal(model, SOURCE, decoder_input_ids=torch.tensor([[V], [0]]))
    assert error.what == f"decoder_input_ids holds {V}, which is outside the vocabulary of {V}."
    assert "decoder_attention_mask" in error.fix and error.argument == "decoder_input_ids"
    error = refusal(model, SOURCE, decoder_input_ids=IDS[:, :0])
    assert error.what == f"the decoder's input has shape {(B, 0)}: there is no token to run."
    error = refusal(model, SOURCE, decoder_inputs_embeds=torch.zeros(B, T, C + 1))
    assert error.what == f"decoder_inputs_embeds has shape {(B, T, C + 1)}; it must be [B, T, {C}]."
    error = refusal(model, SOURCE, decoder_input_ids=IDS, decoder_attention_mask=torch.ones(B, T + 1))
    assert error.what == f"decoder_attention_mask has shape {(B, T + 1)}; it must be [{B}, {T}]."
    assert error.argument == "decoder_attention_mask"
    error = refusal(model, SOURCE, torch.ones(B, TE + 1), decoder_input_ids=IDS)
    assert error.what == f"attention_mask has shape {(B, TE + 1)}; it must be [{B}, {TE}]."


def test_each_stack_has_a_context_of_its_own(model: Seq2SeqLM) -> None:
    error = refusal(model, torch.zeros(B, SE + 1, dtype=torch.long), decoder_input_ids=IDS, kind=ContextLengthError)
    assert error.what == f"{SE + 1} tokens are more than this encoder's context of {SE}."
    assert error.fix == f"Shorten the input to {SE} tokens."
    assert (error.tokens, error.limit) == (SE + 1, SE)
    long = torch.zeros(B, S + 1, dtype=torch.long)
    error = refusal(model, SOURCE, decoder_input_ids=long, kind=ContextLengthError)
    assert error.what == f"{S + 1} tokens are more than this model's context of {S}."
    make(max_encoder_len=None)(torch.zeros(B, 999, dtype=torch.long), decoder_input_ids=IDS)


def test_an_unknown_argument_is_refused_with_the_nearest_known_one(model: Seq2SeqLM) -> None:
    error = refusal(model, SOURCE, decoder_inputs_ids=IDS)
    assert error.what == "the model takes no argument 'decoder_inputs_ids'."
    assert error.fix.startswith(
        "Did you mean 'decoder_input_ids'? It takes input_ids, attention_mask, decoder_input_ids"
    )


def test_a_module_without_an_encoder_is_its_plugins_mistake() -> None:
    with pytest.raises(PluginError) as caught:
        make(module=nn.Linear(2, 2))
    assert caught.value.what == "the module of this fake model has no `encode`."
    assert "EncoderDecoderModule" in caught.value.why and "authors" in caught.value.fix


# The decoder that strategies are given


def test_a_conditioned_decoder_is_a_causal_model_whose_caches_get_the_encoders_keys_once(model: Seq2SeqLM) -> None:
    decoder = model.conditioned(SOURCE, MASK)
    assert isinstance(decoder, ConditionedLM)
    cache: Any = decoder.new_cache(batch_size=B, capacity=9)
    decoder(IDS, past_key_values=cache, use_cache=True)
    assert passes(model)[-1].encoder_positions.tolist() == PLACES  # type: ignore[union-attr]
    decoder.step(IDS[:, :1], cache)
    decoder(IDS[:, :1], past_key_values=cache)
    assert [p.encoder_states is None for p in passes(model)] == [False, True, True]
    assert len(encoded(model)) == 1 and cache.length == T + 2


def test_a_conditioned_decoder_without_a_cache_attends_every_time(model: Seq2SeqLM) -> None:
    decoder = model.conditioned(SOURCE)
    for count in (1, 2, 3):
        decoder(IDS[:, :count], use_cache=False)
    assert all(p.encoder_states is not None for p in passes(model))
    assert len(encoded(model)) == 1


def test_several_rows_of_an_input_lie_side_by_side(model: Seq2SeqLM) -> None:
    decoder = model.conditioned(SOURCE, MASK)
    decoder(IDS.repeat_interleave(3, 0))
    given = passes(model)[-1]
    assert given.encoder_positions.tolist() == [PLACES[0]] * 3 + [PLACES[1]] * 3  # type: ignore[union-attr]
    assert given.encoder_states[:, 0, 0].tolist() == [0, 0, 0, 7, 7, 7]  # type: ignore[index]
    with pytest.raises(InputError) as caught:
        decoder(IDS.repeat(2, 1)[:3])
    assert caught.value.what == "3 rows cannot be shared among 2 encoded inputs."
    assert caught.value.fix == "Run as many rows of each input."


def test_a_model_without_cross_slots_is_given_the_states_in_every_pass() -> None:
    model = make(slots=(KVSlot(1, 1, 1),))
    decoder = model.conditioned(SOURCE)
    cache = decoder.new_cache(batch_size=B)
    decoder.step(IDS, cache)
    decoder.step(IDS[:, :1], cache)
    assert all(p.encoder_states is not None for p in passes(model))
