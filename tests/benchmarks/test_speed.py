"""The benchmark of speed itself: it finds wrong contenders, pairs rounds, names what it leaves out, and runs."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

HERE = Path(__file__).resolve().parent
CONTENDERS = """
import os
import numpy as np

TABLE = np.random.default_rng(0).normal(size=(40, 40)).astype(np.float32)

class Right:
    table = TABLE
    def imports(self): return {"right": "1"}
    def load(self, job): return {"weight_bytes": self.table.nbytes, "told": job}
    def prefill(self, rows): self.cells, self.last = [list(row) for row in rows], [row[-1] for row in rows]
    def step(self, tokens):
        self.last = tokens
        for row, token in zip(self.cells, tokens): row.append(token)
    def logits(self): return self.table[self.last]
    def decode(self, first, count):
        chosen, tokens = [], first
        for _ in range(count):
            self.step(tokens)
            tokens = self.logits().argmax(-1).tolist()
            chosen.append(tokens)
        return chosen
    def rewind(self, length): self.cells = [row[:length] for row in self.cells]

class Wrong(Right):
    table = TABLE[::-1]

class Liar(Right):
    def decode(self, first, count): return [[0 for _ in first] for _ in range(count)]

class Refuses(Right):
    def load(self, job): raise ValueError("no such weights\\nhere")

class Dies(Right):
    calls = 0
    def decode(self, first, count):
        self.calls += 1
        if self.calls == 3:
            print("out of luck")
            os._exit(7)
        return super().decode(first, count)
"""


@pytest.fixture
def peers(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The package beside this file, as the benchmark imports it."""
    monkeypatch.syspath_prepend(str(HERE))
    import peers.build_llama
    import peers.measure
    import peers.table
    import peers.verify

    return peers


def logits(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_equal_logits_are_right_at_every_size_of_weights_and_others_at_none(peers: Any) -> None:
    reference = logits(0, 5, 2, 31)
    for bits, trained in itertools.product((32, 16, 8, 4), (False, True)):
        verdict = peers.verify.compare(reference, reference + 3.0, bits, trained=trained)  # a softmax sees no shift
        assert verdict.wrong is None and verdict.agreement == 1.0 and verdict.error < 1e-6
        assert "apart, more than" in peers.verify.compare(reference, logits(1, 5, 2, 31), bits, trained=trained).wrong


def test_one_wrong_position_of_many_is_seen(peers: Any) -> None:
    reference = logits(0, 50, 1, 31)
    got = reference.copy()
    got[17] = logits(1, 31)
    verdict = peers.verify.compare(reference, got, 4, trained=False)
    assert (
        verdict.error < 0.3 and verdict.wrong == f"logits of one position are {verdict.worst:.2g} apart, more than 0.95"
    )


def test_other_best_tokens_are_wrong_though_the_logits_are_near(peers: Any) -> None:
    reference = logits(0, 9, 1, 31) * 100
    near, best = reference.copy(), reference.argmax(-1)[..., None]
    np.put_along_axis(near, best, reference.max(-1, keepdims=True) * 0.5, -1)
    verdict = peers.verify.compare(reference, near, 4, trained=True)
    assert verdict.wrong == "the best token agrees at 0% of the positions, fewer than 40%"


def test_logits_that_are_not_finite_or_of_another_shape_are_wrong(peers: Any) -> None:
    reference = logits(0, 2, 1, 7)
    broken = reference.copy()
    broken[1, 0, 3] = np.nan
    assert peers.verify.compare(reference, broken, 4, trained=True).wrong == "logits are not finite"
    assert (
        peers.verify.compare(reference, reference[:1], 4, trained=True).wrong == "logits are [1, 1, 7], not [2, 1, 7]"
    )


def test_tokens_of_equal_logits_are_all_chosen_by_them(peers: Any) -> None:
    tied = np.array([[0.0, 2.0, 2.0], [1.0, 0.0, 0.0]])
    assert peers.verify.chosen_by(tied, [2, 0]) and peers.verify.chosen_by(tied, [1, 0])
    assert not peers.verify.chosen_by(tied, [2, 1])


@pytest.fixture
def bench(peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Three rounds of a small task."""
    (tmp_path / "fakes.py").write_text(CONTENDERS, encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    config = {"vocab_size": 40, "num_hidden_layers": 3, "num_key_value_heads": 2, "head_dim": 8}
    model = peers.measure.Model("fake", config, tmp_path, tmp_path)
    return peers.measure.Bench(model, peers.measure.Task("decode", prompt=5, tokens=6, rows=2), 1, 3, tmp_path, 1 << 20)


def outcome(peers: Any, name: str, peer: str) -> Any:
    line = peers.measure.Line(name, peer, 16, f"fakes:{name}", options={"dtype": "bfloat16"})
    return peers.measure.Outcome(line, Path(sys.executable), Path("somewhere"))


def test_contenders_take_turns_and_those_that_are_wrong_or_die_get_no_time(peers: Any, bench: Any) -> None:
    outcomes = [outcome(peers, "Right", "transformers"), *(
        outcome(peers, name, name.lower()) for name in ("Wrong", "Liar", "Refuses", "Dies")
    )]  # fmt: skip
    with bench.start(outcomes[0]) as process:
        bench.load(process, outcomes[0])
        reference = bench.trace(process)
    speeds, how = bench.compare(outcomes, reference, Path(sys.executable))
    right, wrong, liar, refuses, dies = outcomes
    assert len(right.seconds) == len(speeds) == 3 and right.why is None and how in ("C", "numpy")
    assert right.facts["error"] == 0.0 and right.facts["told"]["capacity"] == 5 + 16
    assert right.facts["told"]["cache_type"] == "bf16" and right.facts["told"]["batch"] == 2
    assert wrong.why.startswith("wrong: logits are ") and not wrong.seconds
    assert liar.why == "wrong: decode chooses another token than the logits of the same pass"
    assert refuses.why == "ValueError: no such weights here"
    assert dies.why == "died in 'decode' (exit code 7): out of luck"
    entries = [peers.table.figures(o, outcomes, speeds, bench) for o in outcomes]
    assert ["ratio" in entry for entry in entries] == [True, False, False, False, False]


def test_ratios_are_those_of_each_round_and_not_of_the_medians(peers: Any, bench: Any) -> None:
    base, other = outcome(peers, "Right", "llama.cpp"), outcome(peers, "Other", "pluglm-cpu")
    facts = {"weight_bytes": 1000, "peak_bytes": 9000, "error": 0.0, "agreement": 1.0}
    base.facts, other.facts = facts, facts | {"weight_bytes": 1500}
    base.seconds, other.seconds = [6.0, 2.0, 3.0], [1.0, 1.0, 3.0]
    entry = peers.table.figures(other, [base, other], [500.0, 500.0, 500.0], bench)
    assert entry["ratio"] == {"llama.cpp": {"median": 2.0, "min": 1.0, "max": 6.0}}
    assert entry["ratio_equal_bytes"]["llama.cpp"] == {"median": 3.0, "min": 1.5, "max": 9.0}
    assert entry["tokens_s"] == {"median": 12.0, "min": 4.0, "max": 12.0}  # 2 rows × 6 passes
    cell = 3 * 2 * 2 * 8 * 2  # layers, keys and values, heads, width, bytes
    assert entry["peak_over_needed"] == round(9000 / (1500 + 2 * 21 * cell), 2)
    held = 1500 + 2 * 8 * cell
    assert entry["share_of_read"]["max"] == round(held * 6 / 1.0 / 500.0, 3)
    assert peers.table.figures(base, [base, other], [1.0] * 3, bench)["ratio"] == {}


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_a_contender_that_is_not_asked_is_stopped(peers: Any, bench: Any) -> None:
    with bench.start(outcome(peers, "Right", "transformers")) as process:
        process.ask("imports")
        os.waitid(os.P_PID, process.child.pid, os.WSTOPPED | os.WNOWAIT)
        assert Path(f"/proc/{process.child.pid}/stat").read_text().split(") ")[1].startswith("T")


def test_a_model_that_is_too_short_for_a_task_is_left_out_with_the_reason(peers: Any) -> None:
    tasks = sys.modules["peers.tasks"]
    config = {"max_position_embeddings": 1024}
    assert tasks.fitted(tasks.TASKS["long"], None, config) == "4128 tokens do not fit into its context of 1024"
    assert tasks.fitted(tasks.TASKS["decode"], 9, config).tokens == 9
    assert tasks.fitted(tasks.TASKS["prefill"], 9, config).tokens == 0


def test_what_cannot_be_made_says_why(peers: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, config = sys.modules["peers.checkpoints"], {"hidden_size": 1}
    monkeypatch.setattr(peers.build_llama, "cxx_compiler", lambda: sys.executable)
    with pytest.raises(made.CannotMakeError, match="^llama.cpp is not built in .*, and building was not wished$"):
        peers.build_llama.find_llama(tmp_path, jobs=1, build=False)
    monkeypatch.setattr(peers.build_llama, "cxx_compiler", lambda: None)
    with pytest.raises(made.CannotMakeError, match="^no C[+]{2} compiler is installed$"):
        peers.build_llama.find_llama(tmp_path, jobs=1)
    with pytest.raises(made.CannotMakeError, match="^[0-9.]+ GB are wanted in .*, [0-9.]+ GB are free$"):
        made.need_room(tmp_path, 10**18)
    monkeypatch.setattr(made, "matrix_elements", lambda _: 1)
    with pytest.raises(made.CannotMakeError, match="^no q4_0.gguf: .*gguf"):  # this Python has no package gguf
        made.find_gguf(made.Model("none", config, tmp_path, tmp_path), "q4_0", Path(sys.executable))


def test_the_command_measures_and_says_what_it_left_out(tmp_path: Path) -> None:
    command = [
        sys.executable, str(HERE / "speed.py"), "--models", "m0", "--bits", "16", "--peers", "llama.cpp", "pluglm-eager",
        "--rounds", "1", "--tokens", "3", "--threads", "1", "--read-mb", "8", "--no-build", "--cache", str(tmp_path),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    result = json.loads(last)
    llama, eager = result["results"][0]["contenders"]
    assert llama["why"].startswith("left out: ") and any(llama["why"] in line for line in table)
    assert eager["agreement"] > 0.9 and 0 < eager["error"] < 0.08 and eager["tokens_s"]["median"] > 0
    assert len(eager["plan"]) == 64 and eager["versions"]["pluglm"] and result["threads"] == 1
    # embedding, 2 layers of 64 × (64 + 32 + 32 + 64 + 3 × 96), and five norms, two bytes each
    assert eager["weight_bytes"] == 2 * (320 * 64 + 2 * 64 * 480 + 5 * 64)
