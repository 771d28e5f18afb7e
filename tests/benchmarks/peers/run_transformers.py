"""Transformers as a contender: its model, sdpa, a DynamicCache and an argmax, without what `generate` adds to that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


class Hf:
    """See `peers.contender.Contender`. Options: dtype."""

    def imports(self) -> dict[str, str]:
        """torch and what loads a causal model."""
        import torch
        import transformers
        from transformers import AutoModelForCausalLM  # noqa: F401 - its modules are imported when it is first named

        return {"transformers": transformers.__version__, "torch": torch.__version__}

    def load(self, job: dict[str, Any]) -> dict[str, Any]:
        """In evaluation mode, without gradients."""
        import torch
        from transformers import AutoModelForCausalLM

        if job["cache_type"] != {"bfloat16": "bf16"}.get(job["dtype"], job["dtype"]):
            raise ValueError(f"a cache of {job['cache_type']} is not offered in {job['dtype']}")
        torch.set_num_threads(job["threads"])
        torch.set_grad_enabled(False)
        self.torch = torch
        dtype = getattr(torch, job["dtype"])
        self.model = AutoModelForCausalLM.from_pretrained(job["path"], dtype=dtype, attn_implementation="sdpa").eval()
        return {"weight_bytes": sum(weight.nbytes for weight in self.model.parameters())}

    def prefill(self, rows: list[list[int]]) -> None:
        """The whole prompt in one pass, into a new cache."""
        from transformers import DynamicCache

        self.cache = DynamicCache(config=self.model.config)
        self._pass(self.torch.tensor(rows))

    def step(self, tokens: list[int]) -> None:
        """One pass."""
        self._pass(self.torch.tensor(tokens)[:, None])

    def logits(self) -> np.ndarray:
        """[B, V] float32."""
        return self.last.float().numpy()

    def decode(self, first: list[int], count: int) -> list[list[int]]:
        """The chosen tokens stay tensors until the last one."""
        tokens, chosen = self.torch.tensor(first)[:, None], []
        for _ in range(count):
            self._pass(tokens)
            tokens = self.last.argmax(-1, keepdim=True)
            chosen.append(tokens)
        return self.torch.cat(chosen, dim=1).T.tolist()

    def rewind(self, length: int) -> None:
        """Crop, by how much: what is to be kept is no longer taken."""
        surplus = self.cache.get_seq_length() - length
        if surplus:
            self.cache.crop(-surplus)

    def _pass(self, token_ids: Any) -> None:
        output = self.model(token_ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.last = output.logits[:, -1]
