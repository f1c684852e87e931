"""Runs a command: one-line errors and exit codes."""

import contextlib
import os
import signal
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from dalle2_jax import signals
from dalle2_jax.errors import Interrupted, SystemWarning, TemporaryError, UsageError, UserError, printable
from dalle2_jax.signals import Terminated


def run_cli(action: Callable[[], None]) -> int:
    """Runs a command and returns its exit code; every error is one line on standard error.

    Returns:
      0 on success, 2 for a wrong argument on the command line or in a config, 75 if the same command can be run again
      (a lost host), 130 and 143 after SIGINT and SIGTERM, and 1 for any other failure. An unexpected exception is
      reported with the path of a file that has the traceback; ``--debug`` prints the traceback instead.
    """
    try:
        with signals.handled(), warnings_as_lines():
            action()
    except Interrupted as error:
        return _failed(error, 128 + error.number)
    except UsageError as error:
        return _failed(error, 2)
    except TemporaryError as error:
        return _failed(error, 75)
    except UserError as error:
        return _failed(error, 1)
    except OSError as error:
        return _failed(f"{error}{_disk_advice(error)}", 1)
    except KeyboardInterrupt:
        return _stopped(signal.SIGINT)
    except Terminated:
        return _stopped(signal.SIGTERM)
    except Exception as error:  # the last resort: a command never ends in a traceback
        number = signals.received()
        if number is not None:  # a library replaced the signal's exception by one of its own
            return _stopped(signal.Signals(number))
        return _failed(f"{_one_line(error)}. {_report(error)}", 1)
    return 0


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Prints every SystemWarning as one line on standard error."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", SystemWarning)
        show = warnings.showwarning

        def show_line(message: Warning | str, category: type[Warning], *details: Any) -> None:
            if issubclass(category, SystemWarning):
                print(f"warning: {printable(message)}", file=sys.stderr)
            else:
                show(message, category, *details)

        warnings.showwarning = show_line
        yield


def exit_process(code: int) -> NoReturn:
    """Ends the process with an exit code.

    After a failure it waits for no thread, worker process or exit handler: any of them may hang.
    """
    if code:
        signals.clean_up()
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)
    sys.exit(0)


def _stopped(number: signal.Signals) -> int:
    print(signals.WORDS[number], file=sys.stderr)
    return 128 + number


def _failed(message: object, code: int) -> int:
    print(f"error: {printable(message)}", file=sys.stderr)
    return code


def _disk_advice(error: OSError) -> str:
    """Returns what to do about a full disk; "" for other errors."""
    from dalle2_jax.files import disk_full

    return ": free some space and run the same command again" if disk_full(error) else ""


def _one_line(error: Exception) -> str:
    """Describes an exception that is no UserError."""
    reason = printable(error)[:200]
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in reason:
        return f"out of memory ({reason or 'no details'})"
    return f"unexpected {type(error).__name__}: {reason}"


def _report(error: Exception) -> str:
    """Prints an exception's traceback with --debug, else writes it to a file; returns a sentence about where it is."""
    lines = "".join(traceback.format_exception(error))
    if "--debug" in sys.argv:
        print(lines, file=sys.stderr)
        return "The traceback is above"
    try:
        handle, path = tempfile.mkstemp(prefix="dalle2_jax-", suffix=".log")
        with os.fdopen(handle, "w") as file:
            file.write(lines)
    except OSError:
        return "Add --debug to print the traceback"
    return f"The traceback is in {path}; --debug prints it"
