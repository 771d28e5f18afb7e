"""The reference executor: torch runs the module's operations one after another."""

from __future__ import annotations

from pluglm.contracts import ForwardInput, ForwardOutput, ModelModule


class EagerExecutor:
    """Runs a module by calling it. `run` is the module's own bound method, so nothing stands between."""

    name = "eager"

    def __init__(self, module: ModelModule) -> None:
        # Not module.__call__: hooks of nn.Module on the whole model would run, but its bookkeeping costs a microsecond.
        self._forward = module.forward

    def run(self, inputs: ForwardInput) -> ForwardOutput:
        """One forward pass; see `Executor.run`."""
        return self._forward(inputs)
