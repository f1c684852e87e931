"""A signal ends a command within seconds, with one line; no hidden file or child process remains."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dalle2_jax import signals
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config import sweep

ROOT = Path(__file__).parents[2]

IN_NATIVE_CODE = """
import ctypes, sys, threading
from pathlib import Path
from dalle2_jax import lock, signals

out = Path(sys.argv[1])
patient = sys.argv[2] == "patient"
mutex = ctypes.create_string_buffer(64)
lock_mutex = ctypes.CDLL(None).pthread_mutex_lock
lock_mutex(mutex)
signals.GRACE = 0.2
with signals.handled(patient=lambda: patient), lock.hold_folder(out), lock.unfinished(out, ".half.") as folder:
    (folder / "file").write_text("x")
    threading.Timer(0.5, print, ["ready"], {"flush": True}).start()
    lock_mutex(mutex)  # never returns: as inside XLA, no Python code runs in this thread
"""


@pytest.mark.parametrize("patient", ["patient", "impatient"])
def test_a_main_thread_in_native_code_does_not_delay_the_end(tmp_path, patient):
    """One signal suffices; a patient block is waited for until a second signal."""
    words = [sys.executable, "-c", IN_NATIVE_CODE, str(tmp_path / "out"), patient]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(words, cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        if patient == "patient":
            time.sleep(2 * signals.SAME)
            assert process.poll() is None
            while process.poll() is None:
                process.send_signal(signal.SIGTERM)
                time.sleep(2 * signals.SAME)
        _, err = process.communicate(timeout=30)
    assert (process.returncode, err) == (143, "terminated\n")
    assert not (tmp_path / "out").exists()


class Swallows:
    """A signal arrives in its destructor, where Python discards exceptions."""

    def __del__(self):
        os.kill(os.getpid(), signal.SIGINT)
        for _ in range(1000):  # the handler runs between two of these
            pass


def test_a_signal_inside_a_destructor_is_sent_again(capfd):
    def action():
        Swallows()
        time.sleep(10)

    start = time.monotonic()
    assert run_cli.run_cli(action) == 130
    assert time.monotonic() - start < 5 and capfd.readouterr().err == "interrupted\n"


def test_an_error_that_replaced_a_signals_exception_counts_as_the_signal(capsys):
    def action():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
        except BaseException:
            raise ImportError("numpy._core.multiarray failed to import") from None

    assert run_cli.run_cli(action) == 143
    assert capsys.readouterr().err == "terminated\n"


def test_handlers_are_restored_and_ignored_signals_stay_ignored():
    before = {number: signal.getsignal(number) for number in signals.WORDS}
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # as under nohup
    with signals.handled():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
    signal.signal(signal.SIGINT, before[signal.SIGINT])
    assert {number: signal.getsignal(number) for number in signals.WORDS} == before
    assert signals.received() is None


CHILD = """
import signal, sys, time

def end(*_):
    time.sleep(0.2)
    open(sys.argv[1], "w").write("saved")
    sys.exit(3)

signal.signal(signal.SIGTERM, end)
open(sys.argv[1], "w").write("started")
time.sleep(60)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_sweep_waits_for_its_training_to_end(tmp_path, number, capsys):
    file = tmp_path / "file"

    def interrupt():
        while not (file.exists() and file.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), number)

    threading.Thread(target=interrupt, daemon=True).start()
    code = run_cli.run_cli(lambda: sweep.run_command([sys.executable, "-c", CHILD, str(file)]))
    assert (code, capsys.readouterr().err) == (128 + number, f"{signals.WORDS[number]}\n")
    assert file.read_text() == "saved"


class Reached(BaseException):
    """Raised in place of ending the process."""


def test_a_failed_command_ends_at_once_and_removes_its_files(tmp_path, monkeypatch):
    """A thread that never ends would block the exit handlers of Python."""

    def end(code):
        raise Reached(code)

    (tmp_path / "file").write_text("x")
    monkeypatch.setattr(os, "_exit", end)
    signals.at_end((tmp_path / "file").unlink)
    with pytest.raises(Reached) as reached:
        run_cli.exit_process(75)
    assert reached.value.args == (75,) and not (tmp_path / "file").exists()
    with pytest.raises(SystemExit) as ended:
        run_cli.exit_process(0)
    assert ended.value.code == 0


@pytest.mark.parametrize(("number", "line"), [(signal.SIGINT, "interrupted\n"), (signal.SIGTERM, "terminated\n")])
def test_a_signal_while_modules_are_imported_is_one_line(number, line):
    program = "import time; from dalle2_jax import signals; signals.start_quietly(); print(flush=True); time.sleep(60)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", program], **pipes) as process:
        process.stdout.readline()
        process.send_signal(number)
        assert process.communicate(timeout=60) == ("", line)
    assert process.returncode == 128 + number
