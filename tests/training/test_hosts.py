"""The parent of a process that joins other hosts turns its end into one line and an exit code."""

import os
import signal
import subprocess
import sys

import pytest
from raised import mentions

from dalle2_jax.cli.process import supervise
from dalle2_jax.errors import TemporaryError, UserError

OWN_LINE = "warning: a line of this package"

LOST = f"""
import os, sys
print({OWN_LINE!r}, file=sys.stderr)
print("E1128 19:25:59.936919   25741 coordination_service_agent.cc:289] Polled an error from coordination service:",
      "/job:jax_worker/replica:0/task:3", "The tasks have crashed.", sep="\\n", file=sys.stderr)
print("F1128 19:25:59.936959   25741 client.h:80] Terminating process", file=sys.stderr)
print("*** Check failure stack trace: ***", "    @     0x7f289a420634  absl::Flush()", sep="\\n", file=sys.stderr)
sys.stderr.flush()
os.abort()
"""


def run_supervised(monkeypatch, program):
    monkeypatch.setattr(sys, "orig_argv", ["python", "-S", "-c", program])
    supervise.supervise()


def test_a_lost_host_is_one_temporary_error(monkeypatch, capfd):
    with pytest.raises(TemporaryError, check=mentions("host 3")):
        run_supervised(monkeypatch, LOST)
    assert capfd.readouterr().err == f"{OWN_LINE}\n"


@pytest.mark.parametrize("code", [0, 1, 75])
def test_the_exit_code_is_the_childs(monkeypatch, capfd, code):
    with pytest.raises(SystemExit) as end:
        run_supervised(monkeypatch, f"import sys; print('error: its own', file=sys.stderr); sys.exit({code})")
    assert end.value.code == code and capfd.readouterr().err == "error: its own\n"


def test_a_killed_child_is_a_user_error(monkeypatch):
    with pytest.raises(UserError, check=mentions("signal 9")):
        run_supervised(monkeypatch, "import os; os.kill(os.getpid(), 9)")


def test_signals_reach_the_child(monkeypatch, tmp_path):
    """The child handles the signal, and its exit code is the command's."""
    program = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(5))
time.sleep(0.5)
os.kill(os.getppid(), signal.SIGTERM)
time.sleep(60)
"""
    with pytest.raises(SystemExit) as end:
        run_supervised(monkeypatch, program)
    assert end.value.code == 5


def test_in_the_child_it_returns(monkeypatch):
    monkeypatch.setenv(supervise.CHILD, str(os.getppid()))
    monkeypatch.setattr(supervise, "_end_with_parent", lambda: None)
    assert supervise.supervise() is None
    assert signal.getsignal(signal.SIGTERM) in (signal.SIG_DFL, signal.getsignal(signal.SIGTERM))


def test_our_own_error_is_printed_among_native_messages():
    read, write = os.pipe()
    os.write(write, b"F1128 21:30:00.1 1 client.cc:1] lost\n  @ 0x1 stack\nerror: host 0 is lost\n")
    os.close(write)
    program = "import sys; from dalle2_jax.cli.process import supervise; supervise.forward(sys.stdin.buffer)"
    done = subprocess.run([sys.executable, "-c", program], stdin=read, capture_output=True)
    os.close(read)
    assert done.stderr == b"error: host 0 is lost\n"
