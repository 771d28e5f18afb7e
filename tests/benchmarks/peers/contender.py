"""What every contender can do, and the list of those that are measured: data, so that adding one is adding a line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import numpy as np


class Contender(Protocol):
    """One library with one model. Lives in a process of its own, which `peers.serve` runs."""

    def imports(self) -> dict[str, str]:
        """Import what is needed. Returns name -> version."""
        ...

    def load(self, job: dict[str, Any]) -> dict[str, Any]:
        """Load a model and make room.

        Args:
            job: path (folder or file), threads, batch (rows), capacity (cells a row), cache_type ("bf16", "f16" or
                "float32"), and the options of the contender's line below.
        Returns: weight_bytes, what one pass reads of the weights; and facts for the last line.
        """
        ...

    def prefill(self, rows: list[list[int]]) -> None:
        """Read prompts of equal length [B][T] into an empty cache; logits of the last token only."""
        ...

    def step(self, tokens: list[int]) -> None:
        """One more token a row."""
        ...

    def logits(self) -> np.ndarray:
        """[B, V] float32, of the last pass."""
        ...

    def decode(self, first: list[int], count: int) -> list[list[int]]:
        """`count` passes: of `first`, then of the token of the highest logit of each row. Returns [count][B]."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all cells of every row but the first `length`."""
        ...


@dataclass(frozen=True)
class Line:
    """One contender.

    Attributes:
        name: in the table. peer: on the command line. bits: of a weight; equal ones are compared. target: its class.
        file: "checkpoint", or the type of its GGUF file. needs: a quantizer that must be installed. options: of its class.
    """

    name: str
    peer: str
    bits: int
    target: str
    file: str = "checkpoint"
    needs: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


PLUGLM, TRANSFORMERS, LLAMA = "peers.run_pluglm:Pluglm", "peers.run_transformers:Hf", "peers.run_llama:Llama"
F32, BF16 = {"dtype": "float32"}, {"dtype": "bfloat16"}

LINES = (
    Line("llama.cpp bf16", "llama.cpp", 16, LLAMA, file="bf16"),
    Line("transformers bf16", "transformers", 16, TRANSFORMERS, options=BF16),
    Line("pluglm cpu bf16", "pluglm-cpu", 16, PLUGLM, options={**BF16, "executor": "cpu"}),
    Line("pluglm eager bf16", "pluglm-eager", 16, PLUGLM, options={**BF16, "executor": "eager"}),
    Line("llama.cpp q8_0", "llama.cpp", 8, LLAMA, file="q8_0"),
    Line("pluglm cpu int8", "pluglm-cpu", 8, PLUGLM, needs="native",
         options={**BF16, "executor": "cpu", "quantizer": "native:int8"}),
    Line("llama.cpp q4_0", "llama.cpp", 4, LLAMA, file="q4_0"),
    Line("pluglm cpu int4", "pluglm-cpu", 4, PLUGLM, needs="native",
         options={**BF16, "executor": "cpu", "quantizer": "native:int4"}),
    Line("transformers float32", "transformers", 32, TRANSFORMERS, options=F32),
    Line("pluglm cpu float32", "pluglm-cpu", 32, PLUGLM, options={**F32, "executor": "cpu"}),
    Line("pluglm eager float32", "pluglm-eager", 32, PLUGLM, options={**F32, "executor": "eager"}),
)  # fmt: skip
PEERS = tuple(dict.fromkeys(line.peer for line in LINES))
#: Whose output counts as right: the same weights in float32.
REFERENCE = Line("reference", "transformers", 32, TRANSFORMERS, options=F32)
#: The others are divided by these, where they take part.
BASELINES = ("llama.cpp", "transformers")
