"""The conformance kit for executors that choose tokens, `pluglm.contracts.DecodesAhead`.

    class TestRuns(DecodesAheadContract):
        def parts(self):
            return executor, layout, vocab_size

The model is small and random; its logits are finite and no two of them equal. Needs `pluglm[testing]`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pluglm.contracts import CacheLayout, Decoded, DecodeRun, DecodesAhead, ForwardInput

#: Three prompts of four cells; the second has two of padding.
IDS = torch.tensor([[3, 5, 7, 9], [0, 0, 6, 8], [2, 4, 1, 3]])
POSITIONS = torch.tensor([[0, 1, 2, 3], [-1, -1, 0, 1], [0, 1, 2, 3]])


class DecodesAheadContract:
    """Subclass it in a test file, as `Test…`. A test may be weakened only by `xfail(reason=…)`."""

    def parts(self) -> tuple[Any, CacheLayout, int]:
        """The executor, what makes its caches (able to hold 60 cells), and V."""
        raise NotImplementedError

    def begun(self, rows: int, capacity: int = 60) -> tuple[Any, Any, Tensor]:
        """The executor, a cache that holds the prompts of the first rows, and their next tokens [rows, 1]."""
        executor, layout, _ = self.parts()
        cache = layout.new(batch_size=rows, capacity=capacity)
        dense = rows == 1
        with torch.no_grad():
            output = executor.run(ForwardInput(IDS[:rows], POSITIONS[:rows], cache, dense=dense, logits_to_keep=1))
        return executor, cache, output.logits[:, -1].argmax(-1, keepdim=True)

    def singly(self, executor: Any, cache: Any, token_ids: Tensor, count: int) -> Tensor:
        """[rows, count] chosen pass by pass."""
        made = []
        with torch.no_grad():
            for _ in range(count):
                at = cache.next_positions(1)
                logits = executor.run(ForwardInput(token_ids, at, cache, dense=cache.dense, logits_to_keep=1)).logits
                token_ids = logits[:, -1].argmax(-1, keepdim=True)
                made.append(token_ids)
        return torch.cat(made, dim=1)

    def in_runs(self, executor: Any, cache: Any, token_ids: Tensor, count: int, **said: Any) -> Tensor:
        """The same by runs, as many as it takes. said: further fields of `DecodeRun`."""
        made = torch.empty(len(token_ids), 0, dtype=torch.int64)
        while made.shape[1] < count:
            done = self.decode(executor, DecodeRun(token_ids, cache, count - made.shape[1], **said))
            assert 0 < done.token_ids.shape[1] <= count - made.shape[1]
            assert done.logits is None
            made = torch.cat((made, done.token_ids), dim=1)
            token_ids = made[:, -1:]
        return made

    def decode(self, executor: DecodesAhead, run: DecodeRun) -> Decoded:
        """One run, which the executor must not decline."""
        with torch.no_grad():
            done = executor.decode(run)
        assert done is not None
        assert done.token_ids.dtype is torch.int64
        return done

    def test_it_says_that_it_decodes_ahead(self) -> None:
        assert isinstance(self.parts()[0], DecodesAhead)

    def test_runs_choose_what_single_passes_choose_and_keep_as_many_cells(self) -> None:
        for rows in (1, 3):
            executor, one, first = self.begun(rows)
            _, two, _ = self.begun(rows)
            want = self.singly(executor, one, first, 40)
            assert torch.equal(self.in_runs(executor, two, first, 40), want)
            assert one.length == two.length == 44
            assert torch.equal(one.next_positions(1), two.next_positions(1))
            # Either way goes on where the other stopped.
            assert torch.equal(
                self.in_runs(executor, one, want[:, -1:], 5), self.singly(executor, two, want[:, -1:], 5)
            )

    def test_a_run_is_over_when_a_row_has_ended(self) -> None:
        executor, one, first = self.begun(1)
        _, two, _ = self.begun(1)
        want = self.singly(executor, one, first, 30)[0].tolist()
        end = max(want.index(token) for token in want)  # the last one that is new
        made: list[int] = []
        token_ids = first
        while not made or made[-1] != want[end]:
            done = self.decode(executor, DecodeRun(token_ids, two, 30 - len(made), (want[end],)))
            made += done.token_ids[0].tolist()
            token_ids = done.token_ids[:, -1:]
        assert made == want[: end + 1]
        assert two.length == 4 + len(made)  # the last token is not in it

    def test_rows_that_have_ended_get_padding_and_may_leave_holes(self) -> None:
        for holes in (False, True):
            executor, cache, first = self.begun(3)
            _, alone, _ = self.begun(1)
            before = cache.next_positions(1)[:, 0].tolist()
            said = {"ended": (False, True, True), "pad": 2, "holes": holes}
            fed = first.clone()
            fed[1:] = 2
            made = self.in_runs(executor, cache, fed, 12, **said)
            assert bool((made[1:] == 2).all())
            assert made[0].tolist() == self.singly(executor, alone, first[:1], 12)[0].tolist()
            grown = [12, 0, 0] if holes else [12, 12, 12]
            assert cache.next_positions(1)[:, 0].tolist() == [a + b for a, b in zip(before, grown, strict=True)]

    def test_a_run_fills_a_cache_to_its_last_cell(self) -> None:
        executor, one, first = self.begun(1, capacity=14)
        _, two, _ = self.begun(1, capacity=14)
        assert torch.equal(self.in_runs(executor, two, first, 10), self.singly(executor, one, first, 10))
        assert one.length == two.length == 14
