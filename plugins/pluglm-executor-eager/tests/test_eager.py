"""The eager executor is a call of the module, and nothing else."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from pluglm_executor_eager import pluglm_build_executor

from pluglm import UnsupportedRequestError
from pluglm.contracts import ExecutorRequest, ForwardInput, ForwardOutput


class Doubling(torch.nn.Module):
    def forward(self, inputs: ForwardInput) -> ForwardOutput:
        assert inputs.embeds is not None
        return ForwardOutput(inputs.embeds * 2)


def request(**changed: Any) -> ExecutorRequest:
    fields: dict[str, Any] = {
        "module": Doubling(), "description": SimpleNamespace(), "layout": SimpleNamespace(), "device": "cpu",
        "dtype": "float32",
    }  # fmt: skip
    return ExecutorRequest(**{**fields, **changed})


def test_a_forward_pass_is_a_call_of_the_module() -> None:
    executor = pluglm_build_executor(request())
    x = torch.randn(2, 3, 5)
    inputs = ForwardInput(None, torch.arange(3)[None], None, embeds=x)
    assert torch.equal(executor.run(inputs).logits, x * 2)


@pytest.mark.parametrize("changed", [{"variant": "fast"}, {"options": (("threads", 2),)}])
def test_a_variant_or_an_option_is_refused_by_name(changed: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedRequestError, match=r"knows no (variant 'fast'|option 'threads')"):
        pluglm_build_executor(request(**changed))
