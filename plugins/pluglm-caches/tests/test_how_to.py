"""The page that shows how to write a layout is true: its code passes the kit, save for what the page says."""

import inspect
import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[3] / "docs" / "how-to" / "write-a-cache-layout.md"


@pytest.mark.skipif(not PAGE.exists(), reason="the page is in the repository, not in the wheel")
def test_the_layout_of_the_page_passes_the_kit_except_where_the_page_says(tmp_path):
    names = {"__name__": "page"}
    for block in re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL):
        exec(block, names)
    kit, failed = names["TestConcat"](), []
    kit.max_examples = 8
    for name, test in inspect.getmembers(kit, inspect.ismethod):
        if name.startswith("test_"):
            try:
                test(tmp_path) if inspect.signature(test).parameters else test()
            except pytest.skip.Exception:
                pass
            except AssertionError:
                failed.append(name)
    assert failed == ["test_segments_and_prefix_lengths_come_back_with_the_keys"]
