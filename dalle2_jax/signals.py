"""SIGINT and SIGTERM: a command ends within seconds, with one line, and leaves no unfinished files behind.

Python calls signal handlers in the main thread between two bytecodes. While that thread is inside XLA, compiling or
waiting for a device, no handler runs. `handled` therefore also starts a thread that reads the signals from a pipe
(``signal.set_wakeup_fd``) and ends the process when the main thread does not: after `GRACE` seconds if its handler
has not run, after `LIMIT` seconds if it is still cleaning up, and at once on a second signal. Hidden files, locks and
child processes that must be removed then are registered with `on_exit`.
"""

import contextlib
import multiprocessing
import os
import pathlib
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

GRACE = 3.0
"""Seconds for the main thread to run its signal handler."""

LIMIT = 12.0
"""Seconds for the main thread to end after a signal."""

SAME = 0.3
"""Seconds within which a second signal is ignored: Ctrl-C may reach a process twice."""

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

Action = Callable[[int], None]


class Terminated(BaseException):
    """Raised in the main thread when SIGTERM arrives, so that files and child processes are cleaned up."""


def raise_for(number: int) -> None:
    """Raises KeyboardInterrupt for SIGINT and `Terminated` for SIGTERM."""
    raise KeyboardInterrupt if number == signal.SIGINT else Terminated


def start_quietly() -> None:
    """Makes SIGINT and SIGTERM end the process with one line until `handled` is entered, while modules are imported.

    Changes the handlers of the process; called by the command line only.
    """
    for number in WORDS:
        if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
            signal.signal(number, _end_at_once)


def _end_at_once(number: int, _: object) -> None:
    os.write(2, f"{WORDS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)


@contextlib.contextmanager
def handled(action: Action = raise_for, patient: Callable[[], bool] = lambda: False) -> Iterator[None]:
    """Calls ``action`` with the number of each first SIGINT or SIGTERM, in the main thread.

    Inside another `handled` it replaces that one's action until its end. In other threads it does nothing.

    Args:
      action: raises an exception, or records the signal.
      patient: whether the main thread may take as long as it needs; a second signal still ends the process at once.
    """
    global _watch
    if threading.current_thread() is not threading.main_thread():
        yield
    elif _watch is not None:
        outer = _watch.action, _watch.patient
        _watch.action, _watch.patient = action, patient
        try:
            yield
        finally:
            _watch.action, _watch.patient = outer
    else:
        _watch = _Watch(action, patient)
        try:
            with _watch.installed():
                yield
        finally:
            _watch = None


@contextlib.contextmanager
def on_exit(clean: Callable[[], Any]) -> Iterator[None]:
    """Registers a function that removes a hidden file or ends a child process if the process ends inside the block."""
    key = object()
    _cleaners[key] = clean
    try:
        yield
    finally:
        _cleaners.pop(key, None)


def at_end(clean: Callable[[], Any]) -> None:
    """Registers, until the process ends, a function that removes a file: `clean_up` runs it, exit handlers may not."""
    _cleaners[object()] = clean


def clean_up() -> None:
    """Runs the functions registered with `on_exit`, and ends the worker processes of multiprocessing."""
    while _cleaners:
        _, clean = _cleaners.popitem()
        with contextlib.suppress(Exception):
            clean()
    kill(worker_processes())


def worker_processes() -> set[int]:
    """Returns the process ids of multiprocessing's children; on Linux also of children that are still starting."""
    found = {child.pid for child in multiprocessing.active_children() if child.pid}
    for status in pathlib.Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            if parent == os.getpid() and b"multiprocessing.spawn" in (status.parent / "cmdline").read_bytes():
                found.add(int(status.parent.name))
    return found


def end_with(parent: int) -> None:
    """Starts a thread that ends this process within about a second after its parent has ended, for whatever reason."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def kill(processes: Iterable[int]) -> None:
    """Kills processes; ignores processes that have ended already."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, signal.SIGKILL)


def received() -> int | None:
    """Returns the signal that arrived inside the most recent `handled`, None if there was none."""
    return _received


_watch: "_Watch | None" = None
_received: int | None = None
_cleaners: dict[object, Callable[[], Any]] = {}


class _Watch:
    """The handlers of both signals, and the thread that ends the process if the main thread does not."""

    def __init__(self, action: Action, patient: Callable[[], bool]):
        self.action, self.patient = action, patient
        self._seen = threading.Event()
        self._again = 0  # number of signals that `_unraisable` sends again
        self._hook: Callable[[Any], Any] = sys.unraisablehook

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Installs the handlers, except for a signal that is ignored, as under nohup."""
        global _received
        _received = None
        read, write = os.pipe()
        os.set_blocking(write, False)
        numbers = [number for number in WORDS if signal.getsignal(number) is not signal.SIG_IGN]
        handlers = {number: signal.signal(number, self._handle) for number in numbers}
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._hook = sys.unraisablehook
        sys.unraisablehook = hook = self._unraisable
        threading.Thread(target=self._read, args=(read,), daemon=True, name="signals").start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)
            if sys.unraisablehook is hook:
                sys.unraisablehook = self._hook
            os.close(write)

    def _handle(self, number: int, _: object) -> None:
        global _received
        _received = number
        self._seen.set()
        self.action(number)

    def _unraisable(self, unraisable: Any) -> None:
        """Sends a signal again whose exception was raised inside a callback that discards it, such as ``__del__``."""
        if isinstance(unraisable.exc_value, KeyboardInterrupt | Terminated) and _received is not None:
            self._again += 1
            main = threading.main_thread().ident
            threading.Timer(0.2, signal.pthread_kill, (main, _received)).start()
        else:
            self._hook(unraisable)

    def _read(self, pipe: int) -> None:
        """Reads the numbers of signals until the pipe is closed."""
        first, begun, due = 0, 0.0, None
        while True:
            ready, _, _ = select.select([pipe], [], [], None if due is None else max(0.0, due - time.monotonic()))
            now = time.monotonic()
            if not ready:
                if self.patient():
                    due = now + GRACE
                elif self._seen.is_set() and now < begun + LIMIT:
                    due = begun + LIMIT
                else:
                    _end(first)
                continue
            numbers = os.read(pipe, 64)
            if not numbers:
                os.close(pipe)
                return
            for number in numbers:
                if self._again:
                    self._again -= 1
                elif number in WORDS and not first:
                    first, begun, due = number, now, now + GRACE
                elif number in WORDS and now > begun + SAME:
                    _end(number)


def _end(number: int) -> None:
    """Ends the process at once."""
    clean_up()
    bars = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    line_break = "\n" if getattr(bars, "_instances", None) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{line_break}{WORDS[signal.Signals(number)]}\n".encode())
    os._exit(128 + number)
