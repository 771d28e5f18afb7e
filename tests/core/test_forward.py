"""The forward contract over any executor: what it passes on, what it counts itself, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pluglm.contracts import ForwardInput, ForwardOutput, ModelDescription, WeightMap
from pluglm.errors import ContextLengthError, InputError
from pluglm.forward import CausalLM, CausalOutput

# Pairwise different: batch, tokens, vocabulary, hidden, layers, context.
B, T, V, C, L, S = 2, 5, 13, 6, 3, 20


class FakeCache:
    """Keeps positions alone, as the contract of caches tells them."""

    def __init__(self, batch_size: int = B, capacity: int | None = None, *, streams: bool = False) -> None:
        self.batch_size, self.capacity, self.streams = batch_size, capacity, streams
        self.rows: list[list[int]] = [[] for _ in range(batch_size)]

    @property
    def length(self) -> int:
        return len(self.rows[0])

    @property
    def dense(self) -> bool:
        return all(row == list(range(len(row))) for row in self.rows)

    def next_positions(self, count: int) -> Tensor:
        starts = [max(row, default=-1) + 1 for row in self.rows]
        rows = [list(range(start, start + count)) for start in starts]
        return torch.tensor(rows[:1] if self.dense else rows)

    def grow(self, positions: Tensor) -> None:
        for row, more in zip(self.rows, positions.expand(self.batch_size, -1).tolist(), strict=True):
            row += more


class FakeLayout:
    def __init__(self) -> None:
        self.made: list[FakeCache] = []

    def new(self, *, batch_size: int, capacity: int | None = None) -> FakeCache:
        self.made.append(FakeCache(batch_size, capacity))
        return self.made[-1]


class FakeExecutor:
    """Records every pass; logits of a token are its id."""

    name = "fake"

    def __init__(self) -> None:
        self.passes: list[ForwardInput] = []

    def run(self, inputs: ForwardInput) -> ForwardOutput:
        self.passes.append(inputs)
        if inputs.cache is not None:
            inputs.cache.grow(inputs.positions)  # type: ignore[attr-defined]
        tokens = inputs.token_ids if inputs.token_ids is not None else inputs.embeds
        assert tokens is not None
        hidden = tuple(torch.full((*tokens.shape[:2], C), float(i)) for i in range(L + 1))
        logits = torch.zeros(*tokens.shape[:2], V)
        return ForwardOutput(logits, hidden if inputs.output_hidden_states else None)

    @property
    def last(self) -> ForwardInput:
        return self.passes[-1]


class FakeModule(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.counts = nn.Parameter(torch.zeros(2, dtype=torch.int8), requires_grad=False)
        self.embed = nn.Embedding(V, C, dtype=torch.float64)
        self.head = nn.Linear(C, V, bias=False)


def make(*, max_seq_len: int | None = S, layout: Any = True) -> CausalLM:
    described = ModelDescription(
        model_type="fake", program=None, weights=WeightMap(()), vocab_size=V, hidden_size=C, num_layers=L,
        max_seq_len=max_seq_len, attention=(), slots=(),
    )  # fmt: skip
    made = FakeLayout() if layout else None
    return CausalLM(FakeModule(), FakeExecutor(), made, described, {"model_type": "fake"})  # type: ignore[arg-type]


@pytest.fixture
def model() -> CausalLM:
    return make()


IDS = torch.arange(B * T).view(B, T)


def last(model: CausalLM) -> ForwardInput:
    assert isinstance(model.executor, FakeExecutor)
    return model.executor.last


def refusal(model: CausalLM, *args: Any, kind: type[InputError] = InputError, **arguments: Any) -> InputError:
    """The error of a call that must run nothing."""
    assert isinstance(model.executor, FakeExecutor)
    before = len(model.executor.passes)
    with pytest.raises(kind) as caught:
        model(*args, **arguments)
    assert len(model.executor.passes) == before
    return caught.value


# Positions


def test_tokens_without_mask_or_cache_are_counted_from_zero(model: CausalLM) -> None:
    model(IDS)
    assert last(model).positions.tolist() == [[0, 1, 2, 3, 4]]
    assert last(model).dense
    assert last(model).cache is None
    assert last(model).token_ids is IDS


def test_tokens_follow_what_the_cache_holds(model: CausalLM) -> None:
    cache = FakeCache()
    model(IDS, past_key_values=cache)
    model(IDS[:, :2], past_key_values=cache)
    assert last(model).positions.tolist() == [[5, 6]]
    assert last(model).dense
    assert cache.length == 7


def test_padding_on_the_left_is_marked_and_not_counted(model: CausalLM) -> None:
    cache = FakeCache()
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    model(IDS, mask, past_key_values=cache)
    assert last(model).positions.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert not last(model).dense
    model(IDS[:, :1], torch.cat((mask, torch.ones(B, 1)), 1), past_key_values=cache)
    assert last(model).positions.tolist() == [[3], [5]]
    model(IDS[:, :1], past_key_values=cache)
    assert last(model).positions.tolist() == [[4], [6]], "without a mask the tokens follow each row's last one"
    assert not last(model).dense


def test_padding_on_the_right_is_marked_and_later_tokens_close_up(model: CausalLM) -> None:
    cache = FakeCache()
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    model(IDS, mask.bool(), past_key_values=cache)
    assert last(model).positions.tolist() == [[0, 1, 2, -1, -1], [0, 1, 2, 3, 4]]
    more = torch.tensor([[0, 1], [1, 1]])
    model(IDS[:, :2], torch.cat((mask, more), 1), past_key_values=cache)
    assert last(model).positions.tolist() == [[-1, 3], [5, 6]]


def test_a_mask_of_ones_equals_no_mask(model: CausalLM) -> None:
    cache = FakeCache()
    model(IDS, torch.ones(B, T), past_key_values=cache)
    assert (last(model).positions.tolist(), last(model).dense) == ([[0, 1, 2, 3, 4]], True)
    model(IDS[:, :1], torch.ones(B, T + 1), past_key_values=cache)
    assert (last(model).positions.tolist(), last(model).dense) == ([[5]], True)


def test_given_positions_are_passed_on_and_are_not_taken_for_dense(model: CausalLM) -> None:
    given = torch.tensor([[3, 4, 5, 6, 7]])
    model(IDS, position_ids=given)
    assert last(model).positions.tolist() == given.tolist()
    assert not last(model).dense


def test_given_positions_are_padding_where_the_mask_says_so_whatever_stands_there(model: CausalLM) -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    model(IDS, mask, mask.cumsum(1) - 1)
    assert last(model).positions.tolist() == [[-1, -1, 0, 1, 2], [0, 1, 2, 3, 4]]
    model(IDS, mask, torch.tensor([[9, 8, 7, 6, 5]]))
    assert last(model).positions.tolist() == [[-1, -1, 7, 6, 5], [9, 8, 7, 6, 5]]


def test_given_positions_beside_a_cache_use_the_masks_last_columns(model: CausalLM) -> None:
    cache = FakeCache()
    model(IDS, past_key_values=cache)
    mask = torch.tensor([[1] * T + [0, 1], [1] * T + [1, 1]])
    model(IDS[:, :2], mask, torch.tensor([[9, 9], [5, 6]]), past_key_values=cache)
    assert last(model).positions.tolist() == [[-1, 9], [5, 6]]


# What is passed on and handed back


def test_embeddings_take_the_place_of_ids(model: CausalLM) -> None:
    embeds = torch.randn(B, T, C)
    model(inputs_embeds=embeds)
    assert last(model).embeds is embeds
    assert last(model).token_ids is None


def test_logits_to_keep_is_passed_on(model: CausalLM) -> None:
    model(IDS)
    assert last(model).logits_to_keep == 0
    index = torch.tensor([1, 3])
    for keep in (2, index):
        model(IDS, logits_to_keep=keep)
        assert last(model).logits_to_keep is keep


def test_hidden_states_come_if_asked_for(model: CausalLM) -> None:
    assert model(IDS).hidden_states is None
    assert len(model(IDS, output_hidden_states=True).hidden_states) == L + 1


def test_a_cache_is_made_kept_and_handed_back_as_use_cache_says(model: CausalLM) -> None:
    assert isinstance(model.layout, FakeLayout)
    for use_cache in (None, False):
        assert model(IDS, use_cache=use_cache).past_key_values is None
        assert last(model).cache is None
    made = model(IDS, use_cache=True).past_key_values
    assert model.layout.made == [made]
    assert (made.length, made.batch_size, made.capacity) == (T, B, S)
    for use_cache, kept in ((None, made), (True, made), (False, None)):
        assert model(IDS[:, :1], past_key_values=made, use_cache=use_cache).past_key_values is kept
        assert last(model).cache is made
    assert made.length == T + 3


def test_a_model_that_keeps_nothing_refuses_to_make_a_cache() -> None:
    error = refusal(make(layout=None), IDS, use_cache=True)
    assert error.what == "this model has nothing to cache."
    assert error.fix == "Pass use_cache=False."
    assert error.argument == "use_cache"


def test_the_output_is_read_by_attribute_key_index_and_slice_and_skips_what_is_not_there(model: CausalLM) -> None:
    output = model(IDS, output_hidden_states=True)
    assert isinstance(output, CausalOutput)
    assert output["logits"] is output.logits is output[0]
    assert output["hidden_states"] is output.hidden_states is output[1] is output[-1]
    assert output.past_key_values is None
    assert output[:2] == output.to_tuple() == (output.logits, output.hidden_states)
    assert list(output) == list(output.keys()) == ["logits", "hidden_states"]
    assert "past_key_values" not in output
    assert len(output) == 2
    for absent in ("past_key_values", "loss"):
        with pytest.raises(KeyError, match=absent):
            output[absent]
        assert output.get(absent) is None
    with pytest.raises(IndexError):
        output[2]


def test_return_dict_false_gives_a_tuple_of_what_is_there(model: CausalLM) -> None:
    output = model(IDS, use_cache=True, return_dict=False)
    assert isinstance(output, tuple)
    assert len(output) == 2
    assert output[0].shape == (B, T, V)
    assert isinstance(output[1], FakeCache)
    for said in (None, True):
        assert isinstance(model(IDS, return_dict=said), CausalOutput)


# The decode loop's call


def test_a_step_follows_the_cache(model: CausalLM) -> None:
    cache = FakeCache()
    logits = model.step(IDS, cache)
    assert logits.shape == (B, T, V)
    assert last(model).positions.tolist() == [[0, 1, 2, 3, 4]]
    assert last(model).dense
    assert last(model).logits_to_keep == 1
    cache.rows[0][3:] = [-1, -1]
    model.step(IDS[:, :2], cache, logits_to_keep=2)
    assert last(model).positions.tolist() == [[3, 4], [5, 6]]
    assert not last(model).dense
    assert last(model).logits_to_keep == 2
    assert last(model).cache is cache


def test_a_step_with_positions_takes_them_and_is_not_taken_for_dense(model: CausalLM) -> None:
    positions = torch.tensor([[-1], [7]])
    model.step(IDS[:, :1], FakeCache(), positions=positions)
    assert last(model).positions is positions
    assert not last(model).dense


# About the model


def test_device_and_dtype_are_those_of_the_floating_parameters(model: CausalLM) -> None:
    assert model.dtype is torch.float64
    assert model.device == torch.device("cpu")
    assert model.get_input_embeddings() is model.module.embed
    assert model.get_output_embeddings() is model.module.head


def test_no_parameter_has_a_second_name_and_a_replaced_one_is_let_go(model: CausalLM) -> None:
    assert [name for name, _ in model.named_parameters()] == [
        "module.counts",
        "module.embed.weight",
        "module.head.weight",
    ]
    assert len(model.state_dict()) == 3


def test_a_model_without_parameters_is_on_the_cpu_in_float32() -> None:
    model = make()
    model.module = nn.Module()
    assert (model.device, model.dtype) == (torch.device("cpu"), torch.float32)


# What is refused


def test_an_unknown_argument_is_refused_with_the_nearest_known_one(model: CausalLM) -> None:
    error = refusal(model, IDS, attention_masks=None)
    assert error.what == "the model takes no argument 'attention_masks'."
    assert error.why == "an argument that is ignored changes results in silence."
    assert error.fix == (
        "Did you mean 'attention_mask'? It takes input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, "
        "use_cache, cache_position, logits_to_keep, output_hidden_states, return_dict."
    )
    assert error.argument == "attention_masks"
    assert refusal(model, IDS, labels=IDS).fix.startswith("It takes input_ids, ")


@pytest.mark.parametrize("arguments", [{}, {"input_ids": IDS, "inputs_embeds": torch.zeros(B, T, C)}])
def test_exactly_one_input_is_given(model: CausalLM, arguments: dict[str, Tensor]) -> None:
    error = refusal(model, **arguments)
    assert error.what == "give exactly one of input_ids and inputs_embeds."
    assert error.argument == "input_ids"


@pytest.mark.parametrize("shape", [(B, 0), (0, T)])
def test_an_empty_input_is_refused(model: CausalLM, shape: tuple[int, ...]) -> None:
    error = refusal(model, torch.zeros(shape, dtype=torch.long))
    assert error.what == f"the input has shape {shape}: there is no token to run."
    assert error.argument == "input_ids"


@pytest.mark.parametrize("name", ["input_ids", "inputs_embeds"])
def test_what_is_no_tensor_is_refused(model: CausalLM, name: str) -> None:
    error = refusal(model, **{name: [[1, 2]]})
    assert error.what == f"{name} is a list, not a tensor."
    assert error.fix == "Pass torch.tensor(…) of shape [B, T]."
    assert error.argument == name


@pytest.mark.parametrize("wrong", [-1, V])
def test_ids_outside_the_vocabulary_are_refused(model: CausalLM, wrong: int) -> None:
    error = refusal(model, torch.tensor([[0, V - 1, wrong]]))
    assert error.what == f"input_ids holds {wrong}, which is outside the vocabulary of {V}."
    assert error.fix == "Use ids of this model's tokenizer; mark padding in attention_mask, with any valid id."
    assert error.argument == "input_ids"


@pytest.mark.parametrize("ids", [IDS[0], IDS[None], IDS.float(), IDS > 3])
def test_ids_are_a_matrix_of_integers(model: CausalLM, ids: Tensor) -> None:
    error = refusal(model, ids)
    assert error.what == f"input_ids has shape {tuple(ids.shape)} and dtype {ids.dtype}; it must be integers [B, T]."
    assert error.fix == "Pass one prompt as input_ids[None], embeddings as inputs_embeds."
    assert error.argument == "input_ids"


@pytest.mark.parametrize("shape", [(T, C), (B, T, C + 1)])
def test_embeddings_have_the_models_size(model: CausalLM, shape: tuple[int, ...]) -> None:
    error = refusal(model, inputs_embeds=torch.zeros(shape))
    assert error.what == f"inputs_embeds has shape {shape}; it must be [B, T, {C}]."
    assert error.argument == "inputs_embeds"


def test_a_cache_of_another_batch_is_refused(model: CausalLM) -> None:
    error = refusal(model, IDS, past_key_values=FakeCache(3))
    assert error.what == f"the cache holds 3 rows, the input has {B}."
    assert error.fix == "Make the cache for this batch, or use its `select` or `repeat`."
    assert error.argument == "past_key_values"


def test_cache_position_may_say_the_next_cells_and_no_others(model: CausalLM) -> None:
    cache = FakeCache()
    model(IDS, past_key_values=cache, cache_position=torch.arange(T))
    for wrong in ([4, 5], [5], [[5, 6]], [6, 5]):
        error = refusal(model, IDS[:, :2], past_key_values=cache, cache_position=torch.tensor(wrong))
        assert error.what == "cache_position must be the next cells, 5 to 6."
        assert error.why == "a cache appends; it cannot write elsewhere."
        assert error.fix == "Leave cache_position out, or crop the cache first."
        assert error.argument == "cache_position"
    model(IDS[:, :2], past_key_values=cache, cache_position=torch.tensor([5, 6]))
    model(IDS, cache_position=torch.arange(T))


@pytest.mark.parametrize("shape", [(B, T), (B, T + 1), (B, 3), (1, T + 2), (B, 1, T + 2), (T + 2,)])
def test_a_mask_of_another_width_means_tokens_fed_twice_or_lost(model: CausalLM, shape: tuple[int, ...]) -> None:
    cache = FakeCache()
    model(IDS, past_key_values=cache)
    error = refusal(model, IDS[:, :2], torch.ones(shape), past_key_values=cache)
    assert error.what == f"attention_mask has shape {shape}; it must be [{B}, {T + 2}]."
    assert error.why == (
        f"the cache holds {T} cells and this call brings 2; a mask of another width means that tokens are fed twice or lost."
    )
    assert error.fix == "Feed only tokens that the cache does not hold yet, with a mask over all of them."
    assert error.argument == "attention_mask"


@pytest.mark.parametrize(
    ("fed", "later", "said", "held"),
    [
        ([0, 0, 1, 1, 1], [1, 1, 1, 1, 1], 5, 3),  # uncovers padding
        ([1, 1, 1, 1, 1], [0, 0, 1, 1, 1], 3, 5),  # hides tokens
    ],
)
def test_a_mask_that_contradicts_what_the_cache_holds_is_refused(
    model: CausalLM, fed: list[int], later: list[int], said: int, held: int
) -> None:
    cache = FakeCache()
    ones = [1] * T
    model(IDS, torch.tensor([ones, fed]), past_key_values=cache)
    error = refusal(model, IDS[:, :1], torch.tensor([[*ones, 1], [*later, 1]]), past_key_values=cache)
    assert error.what == f"attention_mask marks {said} tokens of row 1's past; its next position is {held}."
    assert error.why == "a cache knows which of its cells are padding; a later mask cannot hide or uncover any."
    assert error.fix.startswith("Repeat the mask under which these cells were fed")
    assert error.argument == "attention_mask"


@pytest.mark.parametrize("shape", [(B, T + 1), (3, T), (T,), (1, B, T)])
def test_positions_of_another_shape_are_refused(model: CausalLM, shape: tuple[int, ...]) -> None:
    error = refusal(model, IDS, position_ids=torch.zeros(shape, dtype=torch.long))
    assert error.what == f"position_ids has shape {shape}; it must be [{B}, {T}] or [1, {T}]."
    assert error.argument == "position_ids"


@pytest.mark.parametrize("mask", [None, torch.ones(B, T), torch.tensor([[0, 1, 1, 1, 1]] * B)])
def test_negative_positions_of_tokens_are_refused(model: CausalLM, mask: Tensor | None) -> None:
    error = refusal(model, IDS, mask, torch.tensor([[-1, -1, 0, 1, 2]]))
    assert error.what == "position_ids holds negative numbers."
    assert error.fix == "Mark padding in attention_mask."
    assert error.argument == "position_ids"


def test_the_context_is_not_exceeded_by_cells_or_by_positions() -> None:
    model = make(max_seq_len=7)
    cache = FakeCache()
    model(IDS, past_key_values=cache)
    model(IDS, position_ids=torch.tensor([[2, 3, 4, 5, 6]]))
    positions = torch.tensor([[0, 1, 2, 3, 7]])
    for arguments in (
        {"past_key_values": cache, "input_ids": IDS[:, :3]},
        {"input_ids": IDS, "position_ids": positions},
    ):
        error = refusal(model, kind=ContextLengthError, **arguments)
        assert error.what == "8 tokens are more than this model's context of 7."
        assert error.why == "positions past it were never trained and cannot be told apart reliably."
        assert error.fix == "Shorten the input to 7 tokens, new ones included."
        assert (error.tokens, error.limit) == (8, 7)
    model(IDS[:, :2], past_key_values=cache)


def test_a_model_without_a_limit_takes_any_length() -> None:
    model = make(max_seq_len=None)
    model(torch.zeros(1, 999, dtype=torch.long), use_cache=True)
    assert last(model).positions.shape == (1, 999)


def test_a_cache_that_streams_takes_a_text_beyond_the_context() -> None:
    """It sees to distances itself; a cache that does not is refused at the same length."""
    model, cache = make(max_seq_len=7), FakeCache(streams=True)
    for _ in range(4):
        model(IDS, past_key_values=cache)
    assert last(model).positions.tolist() == [[15, 16, 17, 18, 19]]
    model(IDS, position_ids=torch.arange(20, 25)[None], past_key_values=cache)
    assert last(model).positions.tolist() == [[20, 21, 22, 23, 24]]
    plain = FakeCache()
    plain.rows = [list(row) for row in cache.rows]
    assert refusal(model, IDS, past_key_values=plain, kind=ContextLengthError).limit == 7
