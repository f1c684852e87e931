"""Retries with a time limit, for reads that may fail or hang."""

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

PAUSES = (0.2, 2.0, 10.0)
"""Seconds to wait before each new attempt."""


class Heartbeat:
    """The time of the last progress of a long task, which hangs if that is too long ago."""

    def __init__(self) -> None:
        self.beat()

    def beat(self) -> None:
        """Records progress."""
        self.last = time.monotonic()


def with_retries(
    attempt: Callable[[], Any],
    seconds: float,
    between: Callable[[], None] = lambda: None,
    final: tuple[type[OSError], ...] = (),
    heartbeat: Heartbeat | None = None,
) -> Any:
    """Returns the result of ``attempt``, which is repeated after `PAUSES` if it raises OSError or takes too long.

    Args:
        attempt: the function.
        seconds: time limit of each attempt, or between two beats of ``heartbeat``.
        between: called before each new attempt.
        final: errors that are not retried.
        heartbeat: heartbeat of the attempt.

    Raises:
        OSError: the last attempt failed.
    """
    for pause in (*PAUSES, None):
        try:
            return within(seconds, attempt, heartbeat)
        except OSError as error:
            if pause is None or isinstance(error, final):
                raise
            time.sleep(pause)
            between()


def within(seconds: float, action: Callable[[], Any], heartbeat: Heartbeat | None = None) -> Any:
    """Returns the result of ``action``, run in another thread, which is abandoned when it takes too long.

    Each beat of ``heartbeat`` restarts the time limit. The thread is used again for the next action of the same caller,
    since starting one takes longer than most reads.

    Raises:
        TimeoutError: the action took longer than ``seconds``.
    """
    helper = getattr(_helpers, "helper", None)
    if helper is None or helper.process != os.getpid():  # threads do not survive a fork
        helper = _helpers.helper = _Helper()
    helper.actions.put(action)
    try:
        answer, error = _answer(helper, seconds, heartbeat)
    except BaseException as raised:
        _helpers.helper = None  # ignore its late answer
        helper.actions.put(None)  # at once: the error's traceback may keep the helper alive for long
        if isinstance(raised, queue.Empty):
            raise TimeoutError(f"no answer within {seconds} s") from None
        raise
    if error is not None:
        raise error
    return answer


def _answer(helper: "_Helper", seconds: float, heartbeat: Heartbeat | None) -> tuple[Any, BaseException | None]:
    end = time.monotonic() + seconds
    while True:
        try:
            return helper.answers.get(timeout=max(0.0, end - time.monotonic()))
        except queue.Empty:
            if heartbeat is None or heartbeat.last + seconds <= time.monotonic():
                raise
            end = heartbeat.last + seconds


class _Helper:
    """A thread that runs actions for another thread, and ends with it."""

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
        except BaseException as error:  # re-raised by the caller
            answers.put((None, error))
        del action  # and the files that it holds open


_helpers = threading.local()
