"""What all commands share: errors, exit codes, argument types, help, config pages and the compilation cache."""

import argparse
import importlib
import logging
import os
import pathlib
import signal
import subprocess
import sys
import tempfile
import warnings
from types import SimpleNamespace

import jax
import pytest
from raised import mentions

from dalle2_jax import cli, compilation
from dalle2_jax.cli import args
from dalle2_jax.cli import data as data_command
from dalle2_jax.cli.process import quiet, run_cli
from dalle2_jax.config import pages, shipped
from dalle2_jax.data.embeddings import write
from dalle2_jax.data.emoji import concepts, styles
from dalle2_jax.data.images import source
from dalle2_jax.data.tools import convert
from dalle2_jax.errors import TemporaryError, UsageError, UserError
from dalle2_jax.files import cache_folder, write_atomically
from dalle2_jax.ranges import Side
from dalle2_jax.training import hosts, optim


def raising(error):
    """Returns an action that ends in ``error``."""

    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (UsageError("no such field"), 2, "error: no such field\n"),
        (UserError("no such system"), 1, "error: no such system\n"),
        (PermissionError(13, "Permission denied", "runs"), 1, "error: [Errno 13] Permission denied: 'runs'\n"),
        (TemporaryError("host 1 is lost"), 75, "error: host 1 is lost\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_an_error_is_one_line(error, code, line, capsys):
    assert run_cli.run_cli(raising(error)) == code
    assert capsys.readouterr() == ("", line)


def test_success_returns_zero():
    assert run_cli.run_cli(lambda: None) == 0


@pytest.mark.parametrize("error", [ZeroDivisionError("by\nzero"), MemoryError(), RecursionError("too deep")])
def test_unexpected_errors_are_one_line_and_a_file(error, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run_cli.run_cli(raising(error)) == 1
    out, err = capsys.readouterr()
    (report,) = tmp_path.iterdir()
    assert out == "" and err.startswith("error: ") and err.count("\n") == 1 and str(report) in err
    assert "Traceback" in report.read_text() and type(error).__name__ in report.read_text()


def test_a_warning_of_the_package_is_one_line(capsys):
    def action():
        optim.learning_rate(optim.OptimConfig(warmup_steps=100), 40)

    before = warnings.showwarning
    assert run_cli.run_cli(action) == 0
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("warning: ") and "warmup_steps 100" in err and err.count("\n") == 1
    assert warnings.showwarning is before


def test_debug_prints_the_traceback(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["sample.py", "--debug"])
    assert run_cli.run_cli(raising(ZeroDivisionError())) == 1
    assert "Traceback" in capsys.readouterr().err


def test_sigterm_cleans_up_and_exits_with_143(capsys):
    cleaned = []

    def action():
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        finally:
            cleaned.append(True)

    before = signal.getsignal(signal.SIGTERM)
    assert run_cli.run_cli(action) == 143
    assert cleaned and capsys.readouterr() == ("", "terminated\n")
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def parser():
    parser = args.make_parser("python x.py", "Does x.", "python x.py go --num 3")
    command = parser.add_subparsers(dest="command", required=True).add_parser("go")
    command.add_argument("--num", type=args.positive_int, default=1)
    return parser


@pytest.mark.parametrize(
    ("words", "facts"),
    [
        ([], ["required", "command", "python x.py --help"]),
        (["og"], ["command", "'og'", "'go'"]),
        (["go", "--nun", "3"], ["--nun 3"]),
        (["go", "--num", "0"], ["--num", 1, 0, "python x.py go --help"]),
        (["go", "--num", "2.5"], ["--num", "whole number", "'2.5'"]),
    ],
)
def test_parser_raises_usage_errors(parser, words, facts):
    """In a sub-command too; the parser neither prints nor exits."""
    with pytest.raises(UsageError, check=mentions(*facts)):
        parser.parse_args(words)


def test_help_ends_with_an_example(parser, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.rstrip().endswith("example:\n  python x.py go --num 3")


@pytest.mark.parametrize(
    ("read", "valid", "invalid"),
    [
        (args.positive_int, {"1": 1, "16": 16}, ["0", "-3", str(2**31)]),
        (args.number(Side), {"16": 16}, ["0", "1000000"]),
        (args.fraction, {"0": 0.0, "1": 1.0}, ["-0.1", "1.1", "nan"]),
        (args.int_pair, {"10,5": (10, 5)}, ["0,1", "10,100000000"]),
        (args.seed, {"0": 0, "4294967295": 2**32 - 1}, ["-1", "4294967296"]),
        (args.finite_float, {"1": 1.0, "-2.5": -2.5, "1e3": 1000.0}, ["nan", "inf", "-inf"]),
        (args.interval, {"0.2,0.8": (0.2, 0.8), "0,1": (0.0, 1.0)}, ["0,nan", "inf,1"]),
    ],
)
def test_words_to_numbers(read, valid, invalid):
    for word, number in valid.items():
        assert read(word) == number
    for word in invalid:
        with pytest.raises(argparse.ArgumentTypeError):
            read(word)
    for word in ("many", "1,2,3"):
        with pytest.raises(ValueError):
            read(word)


@pytest.fixture
def cache_settings():
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.mark.parametrize("given", ["", "elsewhere"])
def test_compilation_cache(given, tmp_path, monkeypatch, cache_settings):
    """JAX's own setting has precedence; the default is in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", given)
    compilation.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == (given or str(tmp_path / "dalle2_jax" / "jax"))


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("not a program", "SyntaxError"),
        (b"\xff\xfe", "SyntaxError"),
        ("x = 1", "function get_config"),
        ("import sys; sys.exit(0)", "SystemExit: 0"),
        ("def get_config(which):\n    return which.lower", ""),
        ("def get_config(which):\n    return 1 / 0", "ZeroDivisionError"),
        ("def get_config(which):\n    raise ValueError('one\\ntwo')", "ValueError: one"),
        ("def get_config():\n    return 1", "TypeError"),
        ("def get_config(which):\n    while True:\n        yield which", "10000 items"),
        ("def get_config(which):\n    return get_config(which)", "RecursionError"),
    ],
)
def test_a_config_file_that_fails_is_a_usage_error(program, reason, tmp_path):
    file = tmp_path / "config.py"
    file.write_bytes(program if isinstance(program, bytes) else program.encode())
    if not reason:
        assert pages.call_config_page(f"{file}:Clip")() == "clip"
        return
    with pytest.raises(UsageError, check=mentions(reason, file)):
        pages.call_config_page(f"{file}:clip")


@pytest.mark.parametrize("file", ["", "none.py", "."])
def test_a_config_file_that_is_not_there_is_a_usage_error(file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, check=mentions(f"'{file}'", "FILE:STAGE", "shapes")):
        pages.call_config_page(f"{file}:clip")


def test_a_config_file_may_lack_a_function_and_take_no_stage(tmp_path):
    (tmp_path / "config.py").write_text("def get_config(which='a'): return which\ndef sweep(which): yield which")
    assert pages.call_config_page(str(tmp_path / "config.py")) == "a"
    assert pages.call_config_page(f"{tmp_path}/config.py:b", "sweep") == ["b"]
    assert pages.call_config_page(f"{tmp_path}/config.py:b", "other", absent=[]) == []


@pytest.mark.parametrize("address", [None, "nonsense", "localhost:123456", ":1", "no host:80"])
def test_hosts_that_cannot_join_are_one_line(address, monkeypatch):
    if address:
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", address)
    else:
        monkeypatch.delenv("JAX_COORDINATOR_ADDRESS", raising=False)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    with pytest.raises(UserError, check=mentions("--multihost")), hosts.joined(args.HEARTBEAT):
        pass


@pytest.mark.parametrize("home", ["none", "a file", "read-only"])
def test_no_cache_without_a_folder_for_it(home, tmp_path, monkeypatch, cache_settings):
    """Without a home folder, as in a container, or with a read-only one, there is no cache and no error."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if home == "none":

        def no_home():
            raise RuntimeError("Could not determine home directory.")

        monkeypatch.setattr(pathlib.Path, "home", no_home)
    elif home == "a file":
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    else:
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        monkeypatch.setattr(os, "access", lambda *_: False)
    jax.config.update("jax_compilation_cache_dir", "")
    compilation.enable_compilation_cache()
    assert not jax.config.jax_compilation_cache_dir
    if home != "read-only":
        with pytest.raises(OSError):
            write_atomically(cache_folder("folders") / "a.index", b"")


def test_an_empty_path_is_invalid():
    """It would mean the current folder."""
    assert args.path("runs") == pathlib.Path("runs")
    with pytest.raises(argparse.ArgumentTypeError):
        args.path("")


HEAVY = ("jax", "numpy", "grain", "tensorflow_datasets", "pyarrow", "cv2", "PIL", "flax", "optax", "orbax", "sklearn")
"""Libraries that take long to import."""


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_help_imports_nothing_heavy(command):
    """Measured as imports rather than seconds, which depend on the machine."""
    program = (
        "import sys\nfrom dalle2_jax import cli\n"
        f"try:\n    cli.main([{command!r}, '--help'])\nexcept SystemExit:\n    pass\n"
        f"print(*[name for name in {HEAVY} if name in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == "\n" and done.stdout.startswith("usage: dalle2 ") and "example:\n" in done.stdout


def test_the_light_parsers_know_the_library():
    """Parsers repeat a few names and defaults of modules that take long to import."""
    assert data_command.FORMATS == (*convert.FORMATS,)
    assert (data_command.STYLES, data_command.GROUPS) == ((*styles.STYLES,), concepts.GROUPS)
    assert (data_command.MAX_REJECTED, data_command.SHARD_SIZE) == (source.MAX_REJECTED, write.SHARD_SIZE)


def test_every_command_has_a_module():
    assert all(callable(importlib.import_module(f"dalle2_jax.cli.{command}").main) for command in cli.COMMANDS)
    assert all(command in cli.usage() for command in cli.COMMANDS)


def test_an_unknown_command_is_a_usage_error(capsys):
    assert cli.main(["trian"]) == 2
    assert "'train'" in capsys.readouterr().err


@pytest.fixture
def process_settings(monkeypatch):
    """Restores what `silence_libraries` changes."""
    levels = {name: logging.getLogger(name).level for name in quiet.LEVELS}
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "")
    yield
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


def test_noise_of_libraries_is_silenced_by_commands_only(process_settings, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "unraisablehook", seen.append)
    for name in quiet.LEVELS:
        logging.getLogger(name).setLevel(logging.INFO)
    cli.main(["--help"])
    assert sys.unraisablehook == seen.append  # no command ran
    for _ in range(2):  # the second call adds no second filter
        quiet.silence_libraries()
    assert {name: logging.getLogger(name).level for name in quiet.LEVELS} == quiet.LEVELS
    others = [SimpleNamespace(exc_value=error) for error in (RuntimeError("other"), None)]
    for each in (SimpleNamespace(exc_value=RuntimeError("Event loop is closed")), *others):
        sys.unraisablehook(each)
    assert seen == others


def test_init_copies_the_pages_and_changes_no_file(tmp_path, capsys):
    assert cli.main(["init", str(tmp_path / "new")]) == 0
    pages_there = {path.stem for path in (tmp_path / "new" / "configs").iterdir()}
    assert pages_there == {*shipped.page_names()} and "shapes" in pages_there
    mine = tmp_path / "new" / "configs" / "shapes.py"
    mine.write_text("# mine")
    (tmp_path / "new" / "configs" / "clip.py").unlink()
    assert cli.main(["init", str(tmp_path / "new")]) == 0
    assert mine.read_text() == "# mine" and (tmp_path / "new" / "configs" / "clip.py").is_file()
    assert "dalle2 train --config" in capsys.readouterr().out


def test_a_page_of_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    """A file of that name in the current folder goes first."""
    monkeypatch.chdir(tmp_path)
    assert pages.call_config_page("shapes:clip").stage == "clip"
    assert shipped.find_page("none") is None and shipped.find_page("../shapes") is None
    (tmp_path / "shapes").write_text("def get_config(which): return which")
    assert pages.call_config_page("shapes:clip") == "clip"
