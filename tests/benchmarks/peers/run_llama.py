"""llama.cpp as a contender: its C interface through llama-cpp-python, given token ids, none of its sampling."""

from __future__ import annotations

from typing import Any

import numpy as np

PASS_TOKENS = 512  # of one row at once in a prompt, as llama.cpp's own default
GGML_TYPES = {"float32": 0, "f16": 1, "bf16": 30}  # enum ggml_type; files hold these numbers, so they stay


class Llama:
    """See `peers.contender.Contender`. No options: its file says what it is."""

    def imports(self) -> dict[str, str]:
        """The library and its binding."""
        import llama_cpp

        llama_cpp.llama_backend_init()
        return {"llama-cpp-python": llama_cpp.__version__}

    def load(self, job: dict[str, Any]) -> dict[str, Any]:
        """llama.cpp's defaults but for threads, room, and the type of keys and values."""
        import llama_cpp

        self.lib, self.batch_rows = llama_cpp, job["batch"]
        settings = llama_cpp.llama_model_default_params()
        settings.n_gpu_layers = 0
        self.model = llama_cpp.llama_model_load_from_file(job["path"].encode(), settings)
        if not self.model:
            raise RuntimeError("llama.cpp cannot load the file; its own words are in the log.")
        chosen = llama_cpp.llama_context_default_params()
        chosen.n_ctx = job["capacity"] * job["batch"]
        chosen.n_seq_max = job["batch"]
        chosen.n_batch = chosen.n_ubatch = max(PASS_TOKENS, job["batch"])
        chosen.n_threads = chosen.n_threads_batch = job["threads"]
        chosen.type_k = chosen.type_v = GGML_TYPES[job["cache_type"]]
        self.context = llama_cpp.llama_init_from_model(self.model, chosen)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context; its own words are in the log.")
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.batch = llama_cpp.llama_batch_init(max(PASS_TOKENS, job["batch"]), 0, 1)
        self.length = 0
        return {
            "weight_bytes": llama_cpp.llama_model_size(self.model),
            "system": llama_cpp.llama_print_system_info().decode(),
        }

    def prefill(self, rows: list[list[int]]) -> None:
        """Row by row, in passes of PASS_TOKENS; the other passes give no logits."""
        self.lib.llama_memory_clear(self.memory, True)
        last = []
        for row, tokens in enumerate(rows):
            for start in range(0, len(tokens), PASS_TOKENS):
                part = tokens[start : start + PASS_TOKENS]
                end = start + len(part) == len(tokens)
                asked = [end and i == len(part) - 1 for i in range(len(part))]
                self._pass(part, range(start, start + len(part)), [row] * len(part), asked)
            last.append(self._row(-1).copy() if len(rows) > 1 else self._row(-1))
        self.rows, self.length = last, len(rows[0])

    def step(self, tokens: list[int]) -> None:
        """All rows in one pass."""
        count = len(tokens)
        self._pass(tokens, [self.length] * count, range(count), [True] * count)
        self.rows = [self._row(i) for i in range(count)]
        self.length += 1

    def logits(self) -> np.ndarray:
        """[B, V] float32: a copy, since llama.cpp writes the next ones to the same place."""
        return np.stack(self.rows)

    def decode(self, first: list[int], count: int) -> list[list[int]]:
        """The argmax is numpy's, over the logits where they lie."""
        tokens, chosen = first, []
        for _ in range(count):
            self.step(tokens)
            tokens = [int(row.argmax()) for row in self.rows]
            chosen.append(tokens)
        return chosen

    def rewind(self, length: int) -> None:
        """Drop the cells behind."""
        for row in range(self.batch_rows):
            if not self.lib.llama_memory_seq_rm(self.memory, row, length, -1):
                raise RuntimeError(f"llama.cpp cannot go back to {length} cells.")
        self.length = length

    def _pass(self, tokens: Any, positions: Any, rows: Any, asked: Any) -> None:
        batch = self.batch
        batch.n_tokens = len(tokens)
        for i, (token, position, row, wanted) in enumerate(zip(tokens, positions, rows, asked, strict=True)):
            batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.logits[i] = token, position, 1, wanted
            batch.seq_id[i][0] = row
        code = self.lib.llama_decode(self.context, batch)
        if code:
            raise RuntimeError(f"llama_decode returned {code}.")

    def _row(self, index: int) -> np.ndarray:
        self.lib.llama_synchronize(self.context)
        return np.ctypeslib.as_array(self.lib.llama_get_logits_ith(self.context, index), shape=(self.vocab,))
