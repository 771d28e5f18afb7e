"""The page about code written for transformers is true: its programs run, one after the other, and print what it says."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "how-to" / "run-code-written-for-transformers.md"
BLOCK = re.compile(r"(<!-- output -->\n)?```(\w*)\n(.*?)```", re.DOTALL)


def test_the_programs_of_the_page_run_in_order() -> None:
    names: dict[str, object] = {}
    printed, ran = "", 0
    for output, language, text in BLOCK.findall(PAGE.read_text(encoding="utf-8")):
        if output:
            assert printed == text
            continue
        assert language == "python"
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile(text, str(PAGE), "exec"), names)
        printed, ran = out.getvalue(), ran + 1
    assert ran == 6


def test_the_program_of_the_readme_runs() -> None:
    readme = (ROOT / "plugins" / "pluglm-hf" / "README.md").read_text(encoding="utf-8")
    programs = [text for _, language, text in BLOCK.findall(readme) if language == "python"]
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(programs[0], "README.md", "exec"), {})
    assert len(programs) == 1 and out.getvalue().startswith("['import os")


def test_every_public_name_is_in_the_table_of_some_page() -> None:
    """A name that nobody can find is of no use; processors and criteria keep the reference's own documentation."""
    import pluglm_hf

    readme = (ROOT / "plugins" / "pluglm-hf" / "README.md").read_text(encoding="utf-8") + PAGE.read_text(
        encoding="utf-8"
    )
    homes = {
        "pluglm_hf.auto",
        "pluglm_hf.caches",
        "pluglm_hf.encoder_decoder_cache",
        "pluglm_hf.streamers",
        "pluglm_hf.quantization",
        "pluglm_hf.pipelines",
    }
    wanted = {name for name, home in pluglm_hf._HOMES.items() if home in homes}
    missing = {name for name in wanted if name not in readme}
    assert missing <= {"AutoConfig", "AutoModelForSeq2SeqLM", "BaseStreamer", "TextGenerationPipeline"}
