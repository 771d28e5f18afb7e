"""A generation read token by token: in order, never far ahead, and ended by whoever closes it."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from pluglm.streaming import QueueStreamer, in_background, stream_tokens

IDS = torch.tensor([[3, 1, 4]])


class Counting:
    """A strategy that makes 100, 101, … until a criterion stops it; `at` runs before a token of that number."""

    def __init__(self, count: int = 1000, at: dict[int, Callable[[], None]] | None = None) -> None:
        self.count, self.at = count, at or {}
        self.made = 0
        self.saw: dict[str, Any] = {}
        self.ended = False

    def __call__(self, model: Any, input_ids: Tensor, **arguments: Any) -> None:
        self.saw = {**arguments, "model": model, "grad": torch.is_grad_enabled(), "thread": threading.current_thread()}
        for i in range(self.count):
            self.at.get(i, lambda: None)()
            arguments["streamer"].put(torch.tensor([100 + i, -1]))
            self.made += 1
            if any(bool(criterion(input_ids, None).all()) for criterion in arguments["stopping_criteria"]):
                break
        arguments["streamer"].end()
        self.ended = True


def fail() -> None:
    raise ValueError("broken on purpose")


def running() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "pluglm-stream"]


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert running() == []


def test_a_token_a_row_arrives_each_step_in_order() -> None:
    strategy = Counting(200)
    assert list(stream_tokens(strategy, "model", IDS, {"x": 5})) == [[token, -1] for token in range(100, 300)]
    assert strategy.saw["model"] == "model"
    assert strategy.saw["x"] == 5
    assert not strategy.saw["grad"], "gradients are off in the thread, whose setting is its own"


def test_tokens_arrive_while_the_strategy_still_works() -> None:
    go_on = threading.Event()
    tokens = stream_tokens(Counting(2, {1: lambda: _wait(go_on)}), None, IDS, {})
    assert next(tokens) == [100, -1]
    go_on.set()
    assert list(tokens) == [[101, -1]]


def _wait(event: threading.Event) -> None:
    assert event.wait(10)


def test_nothing_runs_before_the_first_token_is_asked_for() -> None:
    strategy = Counting()
    tokens = stream_tokens(strategy, None, IDS, {})
    tokens.close()
    assert strategy.saw == {}


def test_an_exception_in_the_strategy_is_raised_in_the_reader_after_the_tokens_before_it() -> None:
    tokens = stream_tokens(Counting(9, {3: fail}), None, IDS, {})
    assert [next(tokens)[0] for _ in range(3)] == [100, 101, 102]
    with pytest.raises(ValueError, match="broken on purpose"):
        next(tokens)


def test_an_exception_before_the_first_token_is_raised() -> None:
    with pytest.raises(ValueError, match="broken on purpose"):
        next(stream_tokens(Counting(9, {0: fail}), None, IDS, {}))


def test_even_an_exit_in_the_strategy_reaches_the_reader() -> None:
    def leave() -> None:
        raise SystemExit(3)

    with pytest.raises(SystemExit):
        list(stream_tokens(Counting(9, {1: leave}), None, IDS, {}))


def test_closing_the_iterator_stops_the_strategy_and_joins_its_thread() -> None:
    strategy = Counting(10**9)
    tokens = stream_tokens(strategy, None, IDS, {})
    assert [next(tokens)[0], next(tokens)[0]] == [100, 101]
    (criterion,) = strategy.saw["stopping_criteria"]
    assert criterion(torch.zeros(2, 3), None).tolist() == [False, False]
    assert len(running()) == 1
    tokens.close()
    assert criterion(torch.zeros(2, 3), None).tolist() == [True, True]
    assert strategy.ended
    assert running() == []


def test_dropping_the_iterator_stops_the_strategy() -> None:
    strategy = Counting(10**9)
    for _ in stream_tokens(strategy, None, IDS, {}):
        break
    assert strategy.ended
    assert running() == []


def test_an_exception_after_closing_is_not_raised_at_the_reader() -> None:
    strategy = Counting(10**9)
    tokens = stream_tokens(strategy, None, IDS, {})
    next(tokens)
    strategy.count = 0
    strategy.at = dict.fromkeys(range(200), fail)
    tokens.close()


def test_the_callers_own_criteria_are_kept() -> None:
    strategy = Counting()

    def own(ids: Tensor, scores: Tensor | None) -> Tensor:
        return torch.full((ids.shape[0],), strategy.made == 4)

    steps = list(stream_tokens(strategy, None, IDS, {"stopping_criteria": [own]}))
    assert [step[0] for step in steps] == [100, 101, 102, 103]
    assert strategy.saw["stopping_criteria"][0] is own
    assert len(strategy.saw["stopping_criteria"]) == 2


def test_a_slow_reader_holds_the_strategy_back() -> None:
    strategy = Counting(10**9)
    tokens = stream_tokens(strategy, None, IDS, {})
    next(tokens)
    deadline = time.monotonic() + 10
    while strategy.made < 60 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.25)
    assert 60 <= strategy.made <= 66, "64 steps wait in the queue, one was read, one is being put"
    assert [next(tokens)[0] for _ in range(100)] == list(range(101, 201))
    tokens.close()


def test_a_full_queue_does_not_hold_back_what_was_cancelled() -> None:
    streamer = QueueStreamer(room=2)
    for i in range(2):
        streamer.put(torch.tensor([i]))
    waiting = threading.Thread(target=streamer.put, args=(torch.tensor([2]),))
    waiting.start()
    waiting.join(0.2)
    assert waiting.is_alive()
    streamer.cancelled.set()
    waiting.join(5)
    assert not waiting.is_alive()
    assert streamer.steps.qsize() == 2


def test_an_event_loop_gets_the_same_items_and_runs_beside_them() -> None:
    ticks = 0

    async def main() -> list[list[int]]:
        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0.001)

        ticking = asyncio.create_task(tick())
        slow = Counting(5, dict.fromkeys(range(5), lambda: time.sleep(0.02)))
        items = [item async for item in in_background(stream_tokens(slow, None, IDS, {}))]
        ticking.cancel()
        return items

    assert asyncio.run(main()) == [[token, -1] for token in range(100, 105)]
    assert ticks > 5


def test_leaving_an_async_loop_stops_the_strategy() -> None:
    strategy = Counting(10**9)

    async def main() -> None:
        items = in_background(stream_tokens(strategy, None, IDS, {}))
        async for item in items:
            assert item == [100, -1]
            break
        await items.aclose()

    asyncio.run(main())
    deadline = time.monotonic() + 10
    while running() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert strategy.ended


def test_a_cancelled_task_stops_the_strategy() -> None:
    go_on, strategy = threading.Event(), Counting(10**9)
    strategy.at = {3: lambda: _wait(go_on)}

    async def read() -> None:
        async for _ in in_background(stream_tokens(strategy, None, IDS, {})):
            pass

    async def main() -> None:
        task = asyncio.create_task(read())
        while strategy.made < 3:
            await asyncio.sleep(0.01)
        task.cancel()
        go_on.set()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(main())
    deadline = time.monotonic() + 10
    while running() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert strategy.ended


def test_an_exception_in_the_strategy_reaches_the_async_reader() -> None:
    async def main() -> None:
        async for _ in in_background(stream_tokens(Counting(9, {3: fail}), None, IDS, {})):
            pass

    with pytest.raises(ValueError, match="broken on purpose"):
        asyncio.run(main())


def test_a_program_that_an_exception_ends_in_a_stream_leaves_in_order() -> None:
    program = (
        "import time, torch\n"
        "from pluglm.streaming import stream_tokens\n"
        "def strategy(model, ids, streamer, stopping_criteria):\n"
        "    while not bool(stopping_criteria[0](ids, None).all()):\n"
        "        torch.randn(64, 64) @ torch.randn(64, 64)\n"
        "        streamer.put(torch.tensor([1]))\n"
        "tokens = stream_tokens(strategy, None, torch.tensor([[1]]), {})\n"
        "next(tokens)\n"
        "raise SystemExit('the reader fails')\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stderr.strip()) == (1, "the reader fails")
