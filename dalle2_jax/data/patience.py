"""Reading what may fail or hang: within a time limit, and tried again."""

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

PAUSES = (0.2, 2.0, 10.0)
"""Seconds to wait before each new attempt at a read that failed."""


class Pulse:
    """When work of many parts last got on: it hangs if that was long ago, however long the whole takes."""

    def __init__(self) -> None:
        self.beat()

    def beat(self) -> None:
        """Notes that it got on."""
        self.last = time.monotonic()


def persistently(
    attempt: Callable[[], Any],
    seconds: float,
    between: Callable[[], None] = lambda: None,
    final: tuple[type[OSError], ...] = (),
    pulse: Pulse | None = None,
) -> Any:
    """Returns what ``attempt`` does, tried again after `PAUSES` while it fails with OSError or takes too long.

    Args:
        seconds: for each attempt, or from beat to beat of ``pulse``.
        between: called before each new one.
        final: errors after which there is none.
        pulse: of what the attempt does.

    Raises:
        OSError: that of the last attempt.
    """
    for pause in (*PAUSES, None):
        try:
            return within(seconds, attempt, pulse)
        except OSError as error:
            if pause is None or isinstance(error, final):
                raise
            time.sleep(pause)
            between()


def within(seconds: float, action: Callable[[], Any], pulse: Pulse | None = None) -> Any:
    """Returns what ``action`` does, in a thread of its own, which is left behind when it takes too long.

    With a ``pulse`` each of its beats gives it as long again. The thread waits for the next action of the same caller:
    to start one for every read takes longer than the read.

    Raises:
        TimeoutError: it took longer.
    """
    helper = getattr(_helpers, "helper", None)
    if helper is None or helper.process != os.getpid():  # threads do not live on in a process that was forked
        helper = _helpers.helper = _Helper()
    helper.actions.put(action)
    try:
        answer, error = _answer(helper, seconds, pulse)
    except BaseException as raised:
        _helpers.helper = None  # its late answer is nobody's
        if isinstance(raised, queue.Empty):
            raise TimeoutError(f"no answer within {seconds} s") from None
        raise
    if error is not None:
        raise error
    return answer


def _answer(helper: "_Helper", seconds: float, pulse: Pulse | None) -> tuple[Any, BaseException | None]:
    end = time.monotonic() + seconds
    while True:
        try:
            return helper.answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            if pulse is None or pulse.last + seconds <= time.monotonic():
                raise
            end = pulse.last + seconds


class _Helper:
    """A thread that acts for another, and ends when that has left or forgotten it."""

    def __init__(self) -> None:
        self.actions: queue.SimpleQueue = queue.SimpleQueue()
        self.answers: queue.SimpleQueue = queue.SimpleQueue()
        self.process = os.getpid()
        threading.Thread(target=_serve, args=(self.actions, self.answers), daemon=True).start()

    def __del__(self) -> None:
        self.actions.put(None)


def _serve(actions: queue.SimpleQueue, answers: queue.SimpleQueue) -> None:
    while (action := actions.get()) is not None:
        try:
            answers.put((action(), None))
        except BaseException as error:  # raised again by the caller
            answers.put((None, error))
        del action  # and what it holds open


_helpers = threading.local()
