"""The commands `generate`, `explain` and `chat` as a user types them, mistakes included."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

import pluglm
from pluglm import Plan
from pluglm.cli.main import main


@dataclass(frozen=True)
class Result:
    """What a command printed, and how it ended."""

    code: int
    out: str
    err: str


class Run:
    """Runs `pluglm` in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(self, *arguments: str | Path, stdin: str = "") -> Result:
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        with pytest.raises(SystemExit) as end:
            main([str(a) for a in arguments])
        printed = self._capsys.readouterr()
        assert isinstance(end.value.code, int)
        return Result(end.value.code, printed.out, printed.err)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(capsys, monkeypatch)


def text_of(lm: pluglm.LanguageModel, prompt: object, **settings: object) -> str:
    text = lm.generate(prompt, **settings)
    assert isinstance(text, str)
    return text


# generate


def test_generate_prints_the_prompt_and_its_completion(run: Run, folder: Path, lm: pluglm.LanguageModel) -> None:
    expected = "the cat" + text_of(lm, "the cat", max_new_tokens=12) + "\n"
    assert run("generate", "-m", folder, "-n", "12", "the cat") == Result(0, expected, "")
    assert run("generate", "-m", folder, "-n", "12", "--no-stream", "the cat") == Result(0, expected, "")


@pytest.mark.parametrize("prompt", [(), ("-",)], ids=["left out", "dash"])
def test_generate_reads_the_prompt_from_standard_input(
    run: Run, folder: Path, lm: pluglm.LanguageModel, prompt: Sequence[str]
) -> None:
    result = run("generate", "-m", folder, "-n", "5", *prompt, stdin="a mat\n")
    assert result == Result(0, "a mat\n" + text_of(lm, "a mat\n", max_new_tokens=5) + "\n", "")


def test_generate_as_json_says_all_that_is_known(run: Run, folder: Path, lm: pluglm.LanguageModel) -> None:
    result = run(
        "generate", "-m", folder, "--json", "-n", "6", "--temperature", "1.1", "--top-k", "50", "--top-p", "0.95",
        "--min-p", "0.01", "--repetition-penalty", "1.1", "--seed", "5", "--num-return-sequences", "2", "the cat",
    )  # fmt: skip
    said = json.loads(result.out)
    assert (result.code, result.err, said["prompt"]) == (0, "", "the cat")
    done = lm.complete(
        "the cat", max_new_tokens=6, temperature=1.1, top_k=50, top_p=0.95, min_p=0.01, repetition_penalty=1.1, seed=5,
        num_return_sequences=2,
    )  # fmt: skip
    assert isinstance(done, list)
    assert [(c["text"], tuple(c["token_ids"]), c["finish_reason"]) for c in said["completions"]] == [
        (c.text, c.token_ids, c.finish_reason) for c in done
    ]
    assert Plan.from_json(said["plan"]).hash == lm.plan.hash and said["generate_s"] > 0


def test_generate_stops_at_each_of_several_texts(run: Run, folder: Path, lm: pluglm.LanguageModel) -> None:
    whole = text_of(lm, "the cat", max_new_tokens=30)
    stop = max(whole.split("\ufffd"), key=len)[-2:]
    result = run("generate", "-m", folder, "-n", "30", "--stop", "never said", "--stop", stop, "the cat")
    assert result.out == "the cat" + whole.partition(stop)[0] + "\n"


PARTS = {
    "architecture": "llama", "attention": "eager", "cache": "static", "decoding": "sampling", "executor": "eager",
    "tokenizer": "tokenizers", "quantizer": "torchao:int8",
}  # fmt: skip


def test_every_part_can_be_named(run: Run, folder: Path) -> None:
    named = [f"--{kind}={name}" for kind, name in PARTS.items()]
    result = run("explain", folder, "--json", "--dtype", "bfloat16", "--device", "cpu", *named)
    plan = Plan.from_json(json.loads(result.out))
    assert result.code == 0 and (plan.dtype, plan.device) == ("bfloat16", "cpu")
    for kind, name in PARTS.items():
        assert plan[kind].requested == name
    result = run("generate", "-m", folder, "--json", "-n", "3", "--dtype", "bfloat16", *named, "the cat")
    assert result.code == 0 and Plan.from_json(json.loads(result.out)["plan"]).hash == plan.hash


# explain


def test_explain_prints_parts_reasons_and_what_was_not_chosen(run: Run, folder: Path, lm: pluglm.LanguageModel) -> None:
    result = run("explain", folder)
    assert (result.code, result.err) == (0, "")
    assert result.out == str(pluglm.explain(folder)) + "\n"
    for fragment in (
        lm.plan.hash[:12], "attention=auto -> pluglm-attention-sdpa:attention/sdpa", "tier portable",
        "not pluglm-attention-eager:attention/eager",
    ):  # fmt: skip
        assert fragment in result.out


def test_explain_as_json_is_a_plan_that_load_replays(run: Run, folder: Path, lm: pluglm.LanguageModel) -> None:
    plan = Plan.from_json(json.loads(run("explain", folder, "--json").out))
    assert pluglm.load(folder, plan=plan).plan.hash == lm.plan.hash


def test_explain_prints_the_model_on_one_page(run: Run, folder: Path) -> None:
    result = run("explain", folder, "--program")
    assert result.code == 0 and len(result.out.splitlines()) < 40
    for fragment in (
        "llama: 2 layers, hidden 24, vocabulary 307",
        "context 192",
        "layers 0 to 1",
        "final norm",
        "head",
    ):
        assert fragment in result.out
    program = json.loads(run("explain", folder, "--program", "--json").out)
    assert len(program["layers"]) == 2


# chat


def test_two_turns_of_a_chat_remember_the_first(run: Run, folder: Path, lm: pluglm.LanguageModel) -> None:
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}]
    first = text_of(lm, messages, max_new_tokens=8)
    messages += [{"role": "assistant", "content": first}, {"role": "user", "content": "and you ?"}]
    second = text_of(lm, messages, max_new_tokens=8)
    result = run("chat", "-m", folder, "-n", "8", "--system", "be brief", stdin="hello\nand you ?\n")
    assert result == Result(0, f"{first}\n{second}\n", "")


def test_reset_forgets_and_an_empty_line_ends(run: Run, folder: Path, lm: pluglm.LanguageModel) -> None:
    first = text_of(lm, [{"role": "user", "content": "hello"}], max_new_tokens=8)
    result = run("chat", "-m", folder, "-n", "8", stdin="hello\n/reset\nhello\n\nnot read\n")
    assert result == Result(0, f"{first}\n{first}\n", "")


def test_a_turn_that_is_too_long_is_said_and_the_chat_goes_on(run: Run, folder: Path, lm: pluglm.LanguageModel) -> None:
    answer = text_of(lm, [{"role": "user", "content": "hello"}], max_new_tokens=8)
    result = run("chat", "-m", folder, "-n", "8", stdin="q" * 300 + "\nhello\n")
    assert result.code == 0 and result.out == answer + "\n"
    assert "context" in result.err and "/reset" in result.err


def test_a_message_that_the_template_refuses_does_not_end_the_chat(
    run: Run, folder: Path, lm: pluglm.LanguageModel, tmp_path: Path, write_model: object
) -> None:
    import shutil

    model = Path(shutil.copytree(folder, tmp_path / "strict"))
    said = json.loads((model / "tokenizer_config.json").read_text())
    said["chat_template"] = (
        "{% if messages[-1].content == 'no' %}{{ raise_exception('not that') }}{% endif %}" + said["chat_template"]
    )
    (model / "tokenizer_config.json").write_text(json.dumps(said))
    answer = text_of(lm, [{"role": "user", "content": "hello"}], max_new_tokens=8)
    result = run("chat", "-m", model, "-n", "8", stdin="no\nhello\n")
    assert result.code == 0 and result.out == answer + "\n"
    assert "not that" in result.err


def test_a_model_without_a_template_cannot_chat(run: Run, tmp_path: Path, write_model) -> None:  # type: ignore[no-untyped-def]
    result = run("chat", "-m", write_model(tmp_path / "base", template=False), stdin="hello\n")
    assert (result.code, result.out) == (1, "")
    assert "cannot chat" in result.err and "pluglm generate" in result.err


# Mistakes

M = "MODEL"
MISTAKES: dict[str, tuple[tuple[str, ...], int, tuple[str, ...]]] = {
    "command": (("generat", "x"), 2, ("No such command", "generat")),
    "option": (("generate", "-m", M, "--temprature", "1", "x"), 2, ("No such option", "--temperature")),
    "model": (("generate", "-m", "./nothing", "x"), 1, ("ModelNotFoundError", "no model folder", "To do")),
    "model of explain": (("explain", "./nothing"), 1, ("ModelNotFoundError", "no such folder")),
    "model of chat": (("chat", "-m", "./nothing"), 1, ("ModelNotFoundError", "no such folder")),
    "architecture": (("generate", "-m", M, "--architecture", "lama", "x"), 1, ("Did you mean 'llama'?",)),
    "attention": (("generate", "-m", M, "--attention", "spda", "x"), 1, ("PluginNotFoundError", "Did you mean 'sdpa'?")),
    "cache": (("generate", "-m", M, "--cache", "dinamic", "x"), 1, ("Did you mean 'dynamic'?",)),
    "decoding": (("generate", "-m", M, "--decoding", "gredy", "x"), 1, ("Did you mean 'greedy'?",)),
    "executor": (("explain", M, "--executor", "egaer"), 1, ("Did you mean 'eager'?",)),
    "tokenizer": (("explain", M, "--tokenizer", "tokenisers"), 1, ("Did you mean 'tokenizers'?",)),
    "quantizer": (("explain", M, "--quantizer", "torcha"), 1, ("Did you mean 'torchao'?",)),
    "device": (("explain", M, "--device", "gpu"), 1, ("device='gpu'", "cuda")),
    "dtype": (("explain", M, "--dtype", "bfloat"), 1, ("dtype='bfloat'", "bfloat16")),
    "part option without a value": (("explain", M, "--option", "cache.size"), 2, ("KIND.NAME=JSON", "cache.size")),
    "part option of no kind": (("explain", M, "--option", "cash.size=3"), 2, ("KIND.NAME=JSON", "cash.size=3")),
    "part option of auto": (("explain", M, "--option", "cache.size=3"), 1, ("options for the cache need a named one",)),
    "part option nobody has": (
        ("generate", "-m", M, "--cache", "dynamic", "--option", "cache.size=3", "x"), 1, ("no option 'size'",)),
    "tokens as a word": (("generate", "-m", M, "-n", "many", "x"), 2, ("'many'", "integer")),
    "tokens below zero": (("generate", "-m", M, "-n", "-1", "x"), 1, ("max_new_tokens=-1", ">= 0")),
    "too many tokens": (("generate", "-m", M, "-n", "1000", "x"), 1, ("ContextLengthError", "1000", "at most")),
    "temperature": (("generate", "-m", M, "--temperature", "0", "x"), 1, ("temperature=0.0", "a number > 0")),
    "top-p": (("generate", "-m", M, "--top-p", "2", "x"), 1, ("top_p=2.0", "from 0 to 1")),
    "a prompt too many": (("generate", "-m", M, "x", "y"), 2, ("unexpected extra argument", "y")),
    "greedy samples": (("generate", "-m", M, "--num-return-sequences", "2", "x"), 1, ("num_return_sequences=2", "sampling")),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "code", "fragments"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_told_in_words_and_by_the_exit_code(
    run: Run, folder: Path, arguments: tuple[str, ...], code: int, fragments: tuple[str, ...]
) -> None:
    result = run(*(str(folder) if a == M else a for a in arguments), stdin="x\n")
    assert result.code == code
    for fragment in fragments:
        assert fragment in result.err
    assert "Traceback" not in result.err and result.out in ("", "x")


def test_debug_shows_where_an_error_was_raised(folder: Path) -> None:
    with pytest.raises(pluglm.PluginNotFoundError):
        main(["--debug", "explain", str(folder), "--cache", "dinamic"])


# The program itself


def program(*arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pluglm.cli", *map(str, arguments)]
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=100, check=False)


def test_the_program_generates_and_writes_nothing_else(folder: Path, lm: pluglm.LanguageModel) -> None:
    done = program("generate", "-m", folder, "-n", "12", stdin="the cat")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "the cat" + text_of(lm, "the cat", max_new_tokens=12) + "\n"


def test_the_program_tells_a_typo_without_a_traceback(folder: Path) -> None:
    done = program("generate", "-m", folder, "--attention", "spda", "the cat")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("PluginNotFoundError: ") and "Traceback" not in done.stderr


def test_an_error_of_a_call_comes_before_anything_is_printed(run: Run, folder: Path) -> None:
    for more in ((), ("--no-stream",)):
        for wrong in (("--temperature", "0"), ("--stop", "")):
            result = run("generate", "-m", folder, *wrong, *more, "the cat")
            assert (result.code, result.out) == (1, "")
