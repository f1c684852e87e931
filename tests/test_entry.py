"""What every front door does."""

import argparse

import jax
import pytest

from dalle2_jax import entry
from dalle2_jax.types import UsageError, UserError


def raising(error):
    """Returns an action that ends in ``error``."""

    def action():
        raise error

    return action


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (UsageError("no such field"), 2, "error: no such field\n"),
        (UserError("no such system"), 1, "error: no such system\n"),
        (PermissionError(13, "Permission denied", "runs"), 1, "error: [Errno 13] Permission denied: 'runs'\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
    ],
)
def test_guarded_says_one_line(error, code, said, capsys):
    assert entry.guarded(raising(error)) == code
    assert capsys.readouterr() == ("", said)


def test_guarded_returns_zero_and_keeps_bugs():
    assert entry.guarded(lambda: None) == 0
    with pytest.raises(ZeroDivisionError):
        entry.guarded(raising(ZeroDivisionError()))


@pytest.fixture
def parser():
    parser = entry.parser("python x.py", "Does x.", "python x.py go --num 3")
    command = parser.add_subparsers(dest="command", required=True).add_parser("go")
    command.add_argument("--num", type=entry.positive, default=1)
    return parser


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "the following arguments are required: command; see python x.py --help"),
        (["og"], "invalid choice: 'og'"),
        (["go", "--nun", "3"], "unrecognized arguments: --nun 3"),
        (["go", "--num", "0"], "argument --num: 0 is not above 0; see python x.py go --help"),
        (["go", "--num", "2.5"], "argument --num: invalid positive value: '2.5'"),
    ],
)
def test_parser_raises_usage_errors(parser, words, message):
    """In a sub-command too; nothing is printed and nobody exits but ``guarded``."""
    with pytest.raises(UsageError) as caught:
        parser.parse_args(words)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_help_ends_with_an_example(parser, capsys):
    with pytest.raises(SystemExit) as caught:
        parser.parse_args(["--help"])
    assert caught.value.code == 0
    assert capsys.readouterr().out.rstrip().endswith("example:\n  python x.py go --num 3")


@pytest.mark.parametrize(
    ("read", "good", "bad"),
    [
        (entry.positive, {"1": 1, "16": 16}, ["0", "-3"]),
        (entry.seed, {"0": 0, "4294967295": 2**32 - 1}, ["-1", "4294967296"]),
        (entry.finite, {"1": 1.0, "-2.5": -2.5, "1e3": 1000.0}, ["nan", "inf", "-inf"]),
        (entry.interval, {"0.2,0.8": (0.2, 0.8), "0,1": (0.0, 1.0)}, ["0,nan", "inf,1"]),
    ],
)
def test_words_to_numbers(read, good, bad):
    for word, number in good.items():
        assert read(word) == number
    for word in bad:
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
    """The user's own place for it is kept; else it is in the user's cache folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    jax.config.update("jax_compilation_cache_dir", given)
    entry.enable_compilation_cache()
    assert jax.config.jax_compilation_cache_dir == (given or str(tmp_path / "dalle2_jax" / "jax"))
