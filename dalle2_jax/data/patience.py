"""Reading what may fail or hang: within a time limit, and tried again."""

import os
import queue
import threading
import time
from collections.abc import Callable
from typing import Any

PAUSES = (0.2, 2.0, 10.0)
"""Seconds to wait before each new attempt at a read that failed."""


def persistently(
    attempt: Callable[[], Any],
    seconds: float,
    between: Callable[[], None] = lambda: None,
    final: tuple[type[OSError], ...] = (),
) -> Any:
    """Returns what ``attempt`` does, tried again after `PAUSES` while it fails with OSError or takes too long.

    Args:
        seconds: for each attempt.
        between: called before each new one.
        final: errors after which there is none.

    Raises:
        OSError: that of the last attempt.
    """
    for pause in (*PAUSES, None):
        try:
            return within(seconds, attempt)
        except OSError as error:
            if pause is None or isinstance(error, final):
                raise
            time.sleep(pause)
            between()


def within(seconds: float, action: Callable[[], Any]) -> Any:
    """Returns what ``action`` does, in a thread of its own, which is left behind when it takes too long.

    The thread waits for the next action of the same caller: to start one for every read takes longer than the read.

    Raises:
        TimeoutError: it took longer.
    """
    helper = getattr(_helpers, "helper", None)
    if helper is None or helper.process != os.getpid():  # threads do not live on in a process that was forked
        helper = _helpers.helper = _Helper()
    helper.actions.put(action)
    try:
        answer, error = helper.answers.get(timeout=seconds)
    except BaseException as raised:
        _helpers.helper = None  # its late answer is nobody's
        if isinstance(raised, queue.Empty):
            raise TimeoutError(f"no answer within {seconds} s") from None
        raise
    if error is not None:
        raise error
    return answer


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
