"""pluglm as a contender: the executor's own border, one pass a token, as its strategies call it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class Pluglm:
    """See `peers.contender.Contender`. Options: dtype, executor, and a quantizer or none."""

    def imports(self) -> dict[str, str]:
        """torch and pluglm; plugins are imported while loading, by the plan."""
        import torch

        import pluglm
        import pluglm.lm

        return {"pluglm": pluglm.__version__, "torch": torch.__version__}

    def load(self, job: dict[str, Any]) -> dict[str, Any]:
        """A static cache, sdpa."""
        import torch

        import pluglm

        torch.set_num_threads(job["threads"])
        self.torch = torch
        torch.set_grad_enabled(False)
        if job["cache_type"] != {"bfloat16": "bf16"}.get(job["dtype"], job["dtype"]):
            raise ValueError(f"a cache of {job['cache_type']} is not offered in {job['dtype']}")
        options = {"executor": {"threads": job["threads"]}} if job["executor"] == "cpu" else {}
        self.lm = pluglm.load(
            job["path"], dtype=job["dtype"], device="cpu", cache="static", attention="sdpa", decoding="greedy",
            executor=job["executor"], quantizer=job.get("quantizer"), options=options,
        )  # fmt: skip
        self.run = self.lm.model.executor.run
        self.cache = self.lm.new_cache(batch_size=job["batch"], capacity=job["capacity"])
        weights = bytes_read(self.lm.model.module)
        return {"weight_bytes": weights, "plan": self.lm.plan.hash, "isa": getattr(self.lm.model.executor, "isa", None)}

    def prefill(self, rows: list[list[int]]) -> None:
        """The whole prompt in one pass."""
        self.cache.reset()
        self._pass(self.torch.tensor(rows))

    def step(self, tokens: list[int]) -> None:
        """One pass."""
        self._pass(self.torch.tensor(tokens)[:, None])

    def logits(self) -> np.ndarray:
        """[B, V] float32."""
        return self.last.float().numpy()

    def decode(self, first: list[int], count: int) -> list[list[int]]:
        """The chosen tokens stay tensors until the last one."""
        tokens, chosen, native = self.torch.tensor(first)[:, None], [], self._native_passes()
        for _ in range(count):
            self._pass(tokens)
            tokens = self.last.argmax(-1, keepdim=True)
            chosen.append(tokens)
        if native is not None and self._native_passes() != native + count:
            raise RuntimeError("passes went through torch, not through the native executor that is to be measured.")
        return self.torch.cat(chosen, dim=1).T.tolist()

    def rewind(self, length: int) -> None:
        """Crop."""
        self.cache.crop(length)

    def _native_passes(self) -> int | None:
        passes: int | None = getattr(self.lm.model.executor, "native_passes", None)
        return passes

    def _pass(self, token_ids: Any) -> None:
        from pluglm.contracts import ForwardInput

        positions = self.cache.next_positions(token_ids.shape[1])
        self.last = self.run(ForwardInput(token_ids, positions, self.cache, dense=True, logits_to_keep=1)).logits[:, -1]


def bytes_read(module: Any) -> int:
    """What one pass reads of a module's weights: every tensor once, but for an embedding table that is no head."""
    from pluglm.contracts.packed import BlockedLinear, GroupedLinear

    found: dict[int, int] = {}
    tied = not any(tensor.dim() > 1 for tensor in [*module.head.parameters(), *module.head.buffers()])
    for part in module.modules():
        if isinstance(part, BlockedLinear):
            tensors = [part.blocks.codes, part.blocks.scale, part.blocks.offset]
        elif isinstance(part, GroupedLinear):
            weight = part.grouped()
            found[id(part)] = weight.codes.numel() * weight.bits // 8 + 2 * weight.scale.numel()
            tensors = []
        elif part is module.embed and not tied:
            tensors = []  # one row a token
        else:
            tensors = [*part.parameters(recurse=False), *part.buffers(recurse=False)]
        found |= {tensor.data_ptr(): tensor.nbytes for tensor in tensors if tensor is not None}
    return sum(found.values())
