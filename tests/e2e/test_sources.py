"""Where a model is looked for, and what a name may not carry along."""

from __future__ import annotations

from pathlib import Path

import pytest

import pluglm


def test_a_revision_of_a_folder_is_refused_and_not_ignored(folder: Path) -> None:
    with pytest.raises(pluglm.InputError) as caught:
        pluglm.explain(folder, revision="main")
    message = str(caught.value)
    assert "is a folder, so revision='main' means nothing" in message
    assert "only repositories on the Hub have revisions" in message
    assert "Leave revision out" in message
    assert caught.value.argument == "revision"
