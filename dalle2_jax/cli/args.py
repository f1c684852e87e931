"""Types of command-line arguments, and the argument parser that all commands share.

Every command builds its parser from this module and other light ones (`errors`, `ranges`), so that ``--help`` imports
neither JAX nor NumPy. What a command runs is imported inside the function that runs it.
"""

import argparse
import pathlib
from collections.abc import Callable
from typing import Annotated, Any, NoReturn

from dalle2_jax.errors import UsageError
from dalle2_jax.pretrained import find_system
from dalle2_jax.ranges import AnyFloat, Fraction, PositiveInt, Range, Seed, alternatives

HEARTBEAT = 15
"""Seconds without a heartbeat after which a host counts as lost: the default of ``--heartbeat``."""

NOVERIFY = "load checkpoints without checking their digests, which detect damage on disk"
"""Help of ``--noverify``, of every command that loads checkpoints."""

SYSTEM = "folder of the system, such as runs/demo; or the name of one in the package, such as shapes; or a URL"
"""Help of ``--system``."""

TRUST = "open the data path or URL that the system's config names; without it only --data names data"
"""Help of ``--trust_system``, of every command that reads data which a system's stored config names."""

Reader = Callable[[str], int | float]


def number(hint: Any) -> Reader:
    """Returns a function that reads a number for an argument parser.

    Args:
      hint: an annotated type with a range, such as `ranges.Side`.
    """
    ((kind, within),) = [(kind, within) for kind, within in alternatives(hint) if within is not None]

    def read(word: str) -> int | float:
        value = kind(word)
        if value not in within:
            raise argparse.ArgumentTypeError(f"{word[:100]} is not {within}")
        return value

    read.__name__ = {int: "whole number", float: "number"}[kind]  # argparse prints it: "invalid number value"
    return read


def path(word: str) -> pathlib.Path:
    """Reads the path of a file or folder, for an argument parser."""
    if not word:
        raise argparse.ArgumentTypeError("the path is empty")
    return pathlib.Path(word)


def system(word: str) -> pathlib.Path:
    """Reads the folder, name or URL of a system, for an argument parser; a system at a URL is downloaded."""
    if "://" not in word:
        return find_system(path(word))
    from dalle2_jax.pretrained.download import fetch_system

    return fetch_system(word)


positive_int = number(PositiveInt)


seed = number(Seed)


finite_float = number(AnyFloat)


fraction = number(Fraction)


def positive_ints(word: str) -> tuple[int, ...]:
    """Reads whole numbers from 1 on separated by commas, for an argument parser."""
    return tuple(int(positive_int(number)) for number in word.split(","))


def interval(word: str) -> tuple[float, float]:
    """Reads two numbers separated by a comma, for an argument parser."""
    low, high = word.split(",")
    return finite_float(low), finite_float(high)


def fraction_or_two(word: str) -> float | tuple[float, float]:
    """Reads a number from 0 to 1, or two separated by a comma, for an argument parser."""
    numbers = [float(fraction(part)) for part in word.split(",")]
    if len(numbers) > 2 or sorted(numbers) != numbers:
        raise argparse.ArgumentTypeError(f"{word[:100]} is not a number, or two ascending ones, from 0 to 1")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def int_pair(word: str) -> tuple[int, int]:
    """Reads two whole numbers from 1 to 1,000 separated by a comma, for an argument parser."""
    read = number(Annotated[int, Range(1, 1_000)])
    first, second = word.split(",")
    return int(read(first)), int(read(second))


class Parser(argparse.ArgumentParser):
    """An argument parser that raises UsageError instead of exiting; its sub-commands do so too."""

    def error(self, message: str) -> NoReturn:
        """Raises UsageError with argparse's message, shortened."""
        reason = message if len(message) <= 500 else f"{message[:300]}..."
        raise UsageError(f"{reason}; see {self.prog} --help")


def make_parser(prog: str, description: str, example: str) -> Parser:
    """Returns an argument parser with ``--debug`` whose help ends with an example.

    Args:
      prog: the command, such as "dalle2 sweep".
      description: what it does, as a sentence.
      example: one or more complete commands.
    """
    parser = Parser(
        prog=prog,
        description=description,
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--debug", action="store_true", help="print the traceback of an unexpected error")
    return parser
