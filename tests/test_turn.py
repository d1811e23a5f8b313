"""Interrupts, threads, hooks and the collector: whoever comes in the midst of a step, requests stay whole."""

from __future__ import annotations

import gc
import random
import signal
import sys
import threading
from collections.abc import Callable, Iterator

import pytest
import torch
from tiny import tiny

from graphattn import LLM, InvalidArgumentError, InvalidRequestError, SamplingParams
from graphattn.engine.turn import Turn, interrupts_held

pytestmark = pytest.mark.usefixtures("one_thread")
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[(7 * row + column) % 128 for column in range(3 + 5 * row)] for row in range(6)]


@pytest.fixture
def llm(overlap: bool) -> Iterator[LLM]:
    options = {"max_batch": 4, "num_pages": 40, "max_seq_len": 64, "max_prefill_tokens": 16}
    with LLM(tiny("llama", dtype=torch.float32), **options) as engine:
        yield engine


def tokens(llm: LLM, rows: list[int] | None = None) -> list[tuple[int, ...]]:
    return [out.token_ids for out in llm.generate([PROMPTS[row] for row in rows or range(len(PROMPTS))], GREEDY)]


def in_a_step(llm: LLM, action: Callable[[], object]) -> list:
    """Calls something from a hook of the model, once, while all prompts are generated for; returns what it raised."""
    raised = []

    def hook(*args) -> None:
        handle.remove()
        try:
            action()
        except Exception as error:
            raised.append(error)

    handle = llm.model.model.layers[1].register_forward_pre_hook(hook)
    return raised


def test_an_interrupt_anywhere_leaves_requests_whole(llm: LLM) -> None:
    """A real SIGINT at one line after the other that the library executes, most of them while requests move."""
    wanted, few = tokens(llm), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    line, interrupted = 0, 0
    while True:
        line += 1 + line % 13
        left = line

        def trace(frame, event, arg):
            nonlocal left
            if "graphattn/engine" not in frame.f_code.co_filename and "pages.py" not in frame.f_code.co_filename:
                return None
            if event == "line":
                left -= 1
                if left == 0:
                    signal.raise_signal(signal.SIGINT)
            return trace

        sys.settrace(trace)
        try:
            llm.generate(PROMPTS[:2], few)
        except KeyboardInterrupt:
            interrupted += 1
        finally:
            sys.settrace(None)
        assert not llm.has_work and not llm.pool.num_used, line
        if left > 0:
            break
    assert interrupted > 50 and tokens(llm) == wanted
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_second_interrupt_is_let_through() -> None:
    reached = []
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)
        reached.append(1)
        signal.raise_signal(signal.SIGINT)
        reached.append(2)
    assert reached == [1] and signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_ones_own_is_called_once_the_body_has_ended() -> None:
    called = []
    usual = signal.signal(signal.SIGINT, lambda number, frame: called.append(number))
    try:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            assert not called
        assert called == [signal.SIGINT]
    finally:
        signal.signal(signal.SIGINT, usual)


def test_threads_share_an_engine(llm: LLM) -> None:
    wanted, wrong = tokens(llm), []

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(6):
            rows = rng.sample(range(len(PROMPTS)), 3)
            try:
                assert tokens(llm, rows) == [wanted[row] for row in rows]
            except Exception as error:
                wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and not llm.has_work and not llm.pool.num_used


@pytest.mark.parametrize("call", ["generate", "step", "add_request", "close", "load_weights", "time_steps"])
def test_a_call_from_within_a_step_is_refused(llm: LLM, call: str) -> None:
    arguments = {"generate": ([1, 2], GREEDY), "add_request": ([1, 2],), "load_weights": ({},), "time_steps": (1, 9)}
    wanted = tokens(llm)
    raised = in_a_step(llm, lambda: getattr(llm, call)(*arguments.get(call, ())))
    assert tokens(llm) == wanted
    assert [type(error) for error in raised] == [InvalidRequestError]
    assert f"{call} was called from within a step" in str(raised[0])
    assert tokens(llm) == wanted and not llm.has_work


def test_what_is_aborted_within_a_step_ends_with_it(llm: LLM) -> None:
    wanted = tokens(llm)
    other = llm.add_request(PROMPTS[5], GREEDY)
    raised = in_a_step(llm, lambda: llm.abort(other))
    assert tokens(llm) == wanted and not raised
    (last,) = [delta.output for delta in llm.step() if delta.output is not None]
    assert (last.request_id, last.finish_reason) == (other, "abort")


def test_a_stream_that_is_collected_within_a_step(llm: LLM) -> None:
    wanted = tokens(llm)
    ring: list = [llm.generate(PROMPTS[5], GREEDY, stream=True)]
    next(ring[0])
    ring.append(ring)
    del ring
    raised = in_a_step(llm, gc.collect)
    assert tokens(llm) == wanted and not raised
    assert not llm.has_work and not llm.pool.num_used


def test_a_stream_whose_requests_are_gone_says_so(llm: LLM) -> None:
    stream = llm.generate(PROMPTS[:2], GREEDY, stream=True)
    next(stream)
    llm._engine._requests.clear()
    with pytest.raises(InvalidRequestError, match=r"samples are gone.*make a new LLM"):
        list(stream)


def test_what_was_queued_before_one_fails_is_not_left_behind(llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    row, made = llm.pools.row, []

    def third_fails():
        made.append(1)
        if len(made) == 3:
            raise MemoryError("no more rows")
        return row()

    monkeypatch.setattr(llm.pools, "row", third_fails)
    with pytest.raises(MemoryError):
        llm.generate(PROMPTS, GREEDY)
    assert not llm.has_work


def test_weights_of_a_closed_engine(llm: LLM) -> None:
    llm.close()
    with pytest.raises(InvalidArgumentError, match="the LLM is closed"):
        llm.load_weights({})


def test_a_turn_is_given_back_when_its_body_raises() -> None:
    turn = Turn()
    with pytest.raises(ZeroDivisionError), turn.taken("one"):
        1 / 0  # noqa: B018
    with turn.taken("another"):
        assert turn.is_mine
    assert not turn.is_mine
