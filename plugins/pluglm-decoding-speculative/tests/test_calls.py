"""What a call may say, what is refused, and what the package says of itself."""

from __future__ import annotations

import importlib.resources
import json
import subprocess
import sys
from typing import Any

import pluglm_decoding_speculative
import pytest
import torch
from pluglm_decoding_speculative.assistant import Assistant, read_assistant
from pluglm_decoding_speculative.strategies import Assisted
from speculating import Remembering, V, build, call, repeats

from pluglm.contracts import DecodingRequest, GenerationConfig
from pluglm.errors import InputError, PluglmError, UnsupportedRequestError
from pluglm.manifest import parse_manifest
from pluglm.testing.decoding import LONG, text
from pluglm.testing.scripted_model import ScriptedModel

FACTS = json.loads((importlib.resources.files(pluglm_decoding_speculative) / "pluglm.json").read_text("utf-8"))
NAMES = ("prompt-lookup", "assisted", "early-exit")


@pytest.mark.parametrize("facts", FACTS["providers"], ids=lambda facts: facts["name"])
def test_the_facts_name_the_fields_and_needs_of_the_strategy(facts: dict[str, Any]) -> None:
    parse_manifest(FACTS, "pluglm.json")
    strategy = build(facts["name"])
    assert strategy.name == facts["name"]
    assert sorted(strategy.fields) == facts["features"]
    assert sorted(strategy.needs) == facts["needs"] == ["rollback"]


def test_importing_the_package_imports_no_torch() -> None:
    code = "import sys, pluglm_decoding_speculative as p; p.assisted; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "said", "message"),
    (
        ("prompt-lookup", {"prompt_lookup_num_tokens": 0}, "prompt_lookup_num_tokens=0 makes no sense"),
        ("prompt-lookup", {"max_matching_ngram_size": 1.5}, "max_matching_ngram_size=1.5 makes no sense"),
        ("prompt-lookup", {"max_matching_ngram_size": 2**70}, "is more than 64"),
        ("assisted", {"num_assistant_tokens": True}, "num_assistant_tokens=True makes no sense"),
        ("assisted", {"num_assistant_tokens_schedule": "wild"}, 'must be "constant" or "heuristic"'),
        ("assisted", {"assistant_confidence_threshold": 1.0}, "must be a number from 0 to below 1"),
        ("prompt-lookup", {"use_cache": False}, "use_cache=False cannot be combined with speculation"),
        ("prompt-lookup", {"seed": (1, 2), "temperature": 1.0}, "there are 2 seeds for 1 rows"),
        ("assisted", {"max_new_tokens": None}, "how long the completion may be"),
    ),
)
def test_what_makes_no_sense_is_refused(name: str, said: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call(build(name), Remembering(V, repeats), [LONG], **said)


@pytest.mark.parametrize("name", NAMES)
def test_further_arguments_of_the_forward_call_are_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"output_hidden_states cannot be combined[\s\S]*some of which never count"):
        build(name)(
            ScriptedModel(V), torch.tensor([LONG]), generation_config=GenerationConfig(max_new_tokens=2),
            output_hidden_states=True,
        )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_positions_of_the_prompt_are_passed_on(name: str) -> None:
    given = call(build(name), Remembering(V, repeats), [LONG], position_ids=torch.tensor([[2, 3, 4, 5]]))
    assert given.completion(0) == call(build(name), Remembering(V, repeats), [LONG]).completion(0)


@pytest.mark.parametrize("name", NAMES)
def test_several_sequences_need_sampling(name: str) -> None:
    with pytest.raises(UnsupportedRequestError, match=r"all of them would be the same[\s\S]*Set temperature"):
        call(build(name), ScriptedModel(V), [LONG], num_return_sequences=2)


def test_prompt_lookup_has_no_options_and_no_assistant() -> None:
    with pytest.raises(UnsupportedRequestError, match="option 'assistant' is not known"):
        build("prompt-lookup", options=(("assistant", "x"),))
    with pytest.raises(UnsupportedRequestError, match="variant 'fast' is not known"):
        build("prompt-lookup", variant="fast")
    with pytest.raises(UnsupportedRequestError, match="assistant_model"):
        call(build("prompt-lookup"), ScriptedModel(V), [LONG], assistant_model=ScriptedModel(V))


def test_without_an_assistant_the_call_is_refused_and_told_how_to_pass_one() -> None:
    strategy = Assisted(DecodingRequest(V, "cpu", None))
    with pytest.raises(InputError, match=r"there is no assistant[\s\S]*assistant_model=…, or name one"):
        call(strategy, ScriptedModel(V), [LONG])


@pytest.mark.parametrize("name", (7, "", None))
def test_an_assistant_is_named_by_a_text(name: object) -> None:
    with pytest.raises(UnsupportedRequestError, match="not the name or folder of a model"):
        build_assisted(assistant=name)


def test_an_assistant_that_is_not_there_is_refused_when_the_strategy_is_built() -> None:
    with pytest.raises(PluglmError, match="no-such-folder"):
        build_assisted(assistant="./no-such-folder")


def build_assisted(**options: Any) -> Any:
    request = DecodingRequest(V, "cpu", text, options=tuple(options.items()))
    return pluglm_decoding_speculative.assisted.pluglm_build_decoding(request=request)


def test_what_is_no_model_cannot_assist() -> None:
    with pytest.raises(InputError, match="assistant_model is a str, not a decoder-only model of pluglm"):
        call(build("assisted"), ScriptedModel(V), [LONG], assistant_model="distil")


def test_an_assistant_with_another_vocabulary_is_refused() -> None:
    request = DecodingRequest(V, "cpu", text)
    with pytest.raises(UnsupportedRequestError, match=f"the assistant has {V + 1} token ids, the model {V}"):
        read_assistant(Assistant(ScriptedModel(V + 1), V + 1, None), request)
    other = Assistant(ScriptedModel(V), V, None, lambda ids: text(ids) if ids != [4] else "?")
    with pytest.raises(UnsupportedRequestError, match=r"token id 4 is '\?' to the assistant and 'e' to the model"):
        read_assistant(other, request)
    same = Assistant(ScriptedModel(V), V, None, text)
    assert read_assistant(same, request) is same


def test_an_assistant_of_the_call_is_used_and_looked_at_once() -> None:
    strategy = Assisted(DecodingRequest(V, "cpu", text))
    looked: list[int] = []

    def decode(ids: Any) -> str:
        looked.append(1)
        return text(ids)

    helper = Remembering(V, repeats)
    assistant = Assistant(helper, V, None, decode)
    for _ in range(2):
        call(strategy, Remembering(V, repeats), [LONG], assistant_model=assistant)
        assert strategy.statistics.accepted == strategy.statistics.guessed > 3
    assert len(looked) == V
    assert len(helper.caches) == 2
