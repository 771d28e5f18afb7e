"""The bookkeeping of accelerators, which reads its flags one step late, run on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pluglm_decoding_blocks import loop
from pluglm_decoding_blocks.rows import DeviceRows

from pluglm.contracts import GenerationOutput
from pluglm.errors import GenerationError
from pluglm.testing.decoding import LONG, SHORT, after
from pluglm.testing.scripted_model import ScriptedModel

Run = Callable[..., GenerationOutput]

V = 23
METHODS = ("contrastive-search", "dola")


@pytest.fixture
def late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "make_rows", lambda job, device: DeviceRows(job.settings, job.limits, device))


def ended_early(run: Run, name: str) -> GenerationOutput:
    mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
    rows = [LONG, (0, 0, *SHORT)]
    return run(name, ScriptedModel(V, after(6, 1)), rows, attention_mask=mask, eos_token_id=1, max_new_tokens=12)


@pytest.mark.parametrize("name", METHODS)
def test_rows_end_where_they_end_on_the_host(name: str, run: Run, request: pytest.FixtureRequest) -> None:
    host = ended_early(run, name)
    request.getfixturevalue("late")
    device = ended_early(run, name)
    assert torch.equal(host.sequences, device.sequences)
    assert (device.num_new_tokens, device.finish_reasons) == (host.num_new_tokens, host.finish_reasons)
    assert device.finish_reasons[0] == "eos"


@pytest.mark.usefixtures("late")
@pytest.mark.parametrize("name", METHODS)
def test_scores_that_are_no_numbers_still_fail_the_call(name: str, run: Run) -> None:
    def script(history: tuple[int, ...]) -> dict[int, Any]:
        return {3: float("nan")} if len(history) == len(LONG) + 2 else {1: -1000.0}

    with pytest.raises(GenerationError, match="row 0 at new token 2 are not finite"):
        run(name, ScriptedModel(V, script), [LONG])
