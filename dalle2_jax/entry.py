"""What every front door does: one-line errors, exit codes, and the compilation cache."""

import argparse
import math
import os
import pathlib
import sys
from collections.abc import Callable
from typing import NoReturn

import jax

from dalle2_jax.types import UsageError, UserError


def enable_compilation_cache() -> None:
    """Keeps compiled programs on disk, so that only a program's first run on a machine compiles it.

    In ``$JAX_COMPILATION_CACHE_DIR``, else in the user's cache folder.
    """
    if not jax.config.jax_compilation_cache_dir:
        base = pathlib.Path(os.environ.get("XDG_CACHE_HOME", pathlib.Path.home() / ".cache"))
        jax.config.update("jax_compilation_cache_dir", str(base / "dalle2_jax" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def positive(word: str) -> int:
    """Reads a whole number above zero, for an argument parser."""
    number = int(word)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not above 0")
    return number


def seed(word: str) -> int:
    """Reads a seed, for an argument parser: a whole number of 32 bits, as random keys take."""
    number = int(word)
    if not 0 <= number < 2**32:
        raise argparse.ArgumentTypeError(f"{number} is not from 0 to 2**32 - 1")
    return number


def finite(word: str) -> float:
    """Reads a number that is neither infinite nor nan, for an argument parser."""
    number = float(word)
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"{word} is not a finite number")
    return number


def interval(word: str) -> tuple[float, float]:
    """Reads two numbers with a comma between, for an argument parser."""
    low, high = word.split(",")
    return finite(low), finite(high)


def pair(word: str) -> tuple[int, int]:
    """Reads two whole numbers above zero with a comma between, for an argument parser."""
    one, other = word.split(",")
    return positive(one), positive(other)


def share(word: str) -> float:
    """Reads a number from 0 to 1, for an argument parser."""
    number = finite(word)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"{word} is not from 0 to 1")
    return number


def guarded(action: Callable[[], None]) -> int:
    """Runs a front door and returns its exit code.

    0, or after one line on standard error: 2 for a wrong word on the command line or in a config,
    1 for any other mistake the user can mend. Bugs keep their traceback.
    """
    try:
        action()
    except UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


class Parser(argparse.ArgumentParser):
    """Says a wrong word in one line, as every other mistake is said; sub-commands inherit it."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError."""
        raise UsageError(f"{message}; see {self.prog} --help")


def parser(prog: str, description: str, example: str, **kwargs) -> Parser:
    """Returns an argument parser whose help ends with an example."""
    return Parser(
        prog=prog,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        **kwargs,
    )
