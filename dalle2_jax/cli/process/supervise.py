"""Runs a multi-host command in a child process, so that the loss of another host ends it with one line.

When a host is lost, native code ends the processes of the others: JAX's coordination service when heartbeats are
missing, gloo when a connection breaks, both with a stack trace and SIGABRT. The parent process turns that into a
TemporaryError (exit code 75).
"""

import contextlib
import ctypes
import os
import re
import signal
import subprocess
import sys
from typing import IO

from dalle2_jax import signals
from dalle2_jax.errors import TemporaryError, UserError

CHILD = "DALLE2_JAX_CHILD_OF"
"""Environment variable of the child process: the process id of its parent."""

_PR_SET_PDEATHSIG = 1

_NATIVE = re.compile(rb"[IWEF]\d{4} \d\d:\d\d:\d\d\.|WARNING: All log messages before absl::InitializeLog")
_OURS = re.compile(rb"(error|warning|note): |interrupted|terminated|.*\r$", re.DOTALL)
_FATAL = re.compile(rb"F\d{4} \d\d:\d\d:\d\d\.|terminate called|\*\*\* (Check failure|SIG)|Fatal Python error")
_TASK = re.compile(rb"/task:(\d+)")


def supervise() -> None:
    """Runs this command again in a child process and exits with its exit code; in the child, returns at once.

    Raises:
      SystemExit: in the parent, with the child's exit code.
      TemporaryError: in the parent, when native code ended the child: another host is lost.
    """
    if os.environ.get(CHILD) == str(os.getppid()):
        _end_with_parent()
        return
    environment = {**os.environ, CHILD: str(os.getpid())}
    command = [sys.executable, *sys.orig_argv[1:]]
    with (
        subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, start_new_session=True) as child,
        signals.on_exit(child.kill),
        signals.handled(child.send_signal, patient=lambda: True),
    ):
        assert child.stderr is not None
        native = forward(child.stderr)
        code = child.wait()
    if code == -signal.SIGABRT:
        tasks = sorted({task.decode() for task in _TASK.findall(native)})
        which = f"host {', '.join(tasks)} is" if tasks else "another host is"
        raise TemporaryError(f"{which} lost: start all hosts again; the same command continues")
    if code < 0:
        raise UserError(f"signal {-code} ended the process of this host; signal 9 often means too little memory")
    sys.exit(code)


def forward(stream: IO[bytes]) -> bytes:
    """Copies a child's standard error to this process's, except log messages of native code, which it returns."""
    native: list[bytes] = []
    fatal, in_message, rest = False, False, b""
    while True:
        chunk = os.read(stream.fileno(), 2**16)
        *lines, rest = re.split(rb"(?<=[\n\r])", rest + chunk)
        for line in lines if chunk else [*lines, rest]:
            fatal = fatal or bool(_FATAL.match(line))
            in_message = bool(_NATIVE.match(line)) or (in_message and not _OURS.match(line))
            if (fatal or in_message) and not line.startswith(b"error: "):
                native.append(line)
            else:
                os.write(2, line)
        if not chunk:
            return b"".join(native)


def _end_with_parent() -> None:
    """Makes this process end when its parent ends, for whatever reason."""
    with contextlib.suppress(OSError, AttributeError):  # prctl exists on Linux only
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signals.end_with(os.getppid())
