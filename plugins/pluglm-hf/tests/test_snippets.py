"""Programs written for transformers do the same with pluglm_hf."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import hf_snippets as snippets
import pluglm_hf
import pytest
import torch


@pytest.mark.parametrize("snippet", snippets.SNIPPETS, ids=lambda s: s.__name__)
def test_a_program_does_the_same_by_a_changed_import(
    snippet: Callable[..., Any], transformers: Any, folders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    with warnings.catch_warnings():  # the reference's own remarks
        warnings.simplefilter("ignore")
        expected = snippet(transformers, folders)
        printed = capsys.readouterr().out
    same(snippet(pluglm_hf, folders), expected, snippet.__name__)
    assert capsys.readouterr().out == printed


def same(got: Any, expected: Any, where: str) -> None:
    """Equal: integers and texts exactly, other tensors to a tolerance."""
    if isinstance(expected, torch.Tensor):
        assert got.shape == expected.shape, where
        if expected.is_floating_point():
            torch.testing.assert_close(
                got.float(), expected.float(), rtol=1e-4, atol=1e-4, msg=lambda m: f"{where}: {m}"
            )
        else:
            assert got.tolist() == expected.tolist(), where
    elif isinstance(expected, Mapping):
        assert set(got) == set(expected), where
        for key in expected:
            same(got[key], expected[key], f"{where}[{key!r}]")
    elif isinstance(expected, Sequence) and not isinstance(expected, str):
        assert len(got) == len(expected), where
        for i, (g, e) in enumerate(zip(got, expected, strict=True)):
            same(g, e, f"{where}[{i}]")
    else:
        assert got == expected, where
