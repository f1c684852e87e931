"""The command line: ``dalle2 COMMAND``, the same as ``python -m dalle2_jax COMMAND``.

``python train.py`` and ``python sample.py`` are ``dalle2 train`` and ``dalle2 sample``. A command's module is imported
only when that command runs.
"""

import importlib
import sys
from collections.abc import Sequence
from typing import NoReturn

import dalle2_jax
from dalle2_jax import signals

COMMANDS = {
    "init": "copy the example configs into a folder",
    "train": "train one stage of a system, or continue its training",
    "sample": "generate and edit images with a trained system",
    "data": "convert, inspect, preview and embed data sets",
    "weights": "import and export public checkpoints",
    "evaluate": "measure a trained system",
    "report": "write curves, samples and measures of systems as one HTML file",
    "plan": "plan memory, time and cost on accelerators that are not here",
    "serve": "serve systems by OpenAI's Images API",
    "sweep": "train a stage once for each variation of its config",
    "text": "train a tokenizer",
}
"""Command -> what it does. Each command is the function ``main`` of the module of its name in this package."""

_HELP = ("-h", "--help")


def usage() -> str:
    """Returns the help of the command line."""
    width = max(map(len, COMMANDS))
    commands = "\n".join(f"  {name:{width}}  {summary}" for name, summary in COMMANDS.items())
    return (
        "usage: dalle2 COMMAND [OPTION ...]\n\n"
        "Text-to-image generation with DALL-E 2 (unCLIP) in JAX.\n\n"
        f"commands:\n{commands}\n\n"
        "options:\n  --help     print this help; dalle2 COMMAND --help prints a command's\n"
        "  --version  print the version\n\n"
        "example:\n  dalle2 train --config shapes:clip --workdir runs/demo"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit code.

    Args:
      arguments: the command and its options; those of the process if None.
    """
    command, *rest = [*(sys.argv[1:] if arguments is None else arguments)] or ["--help"]
    if command in _HELP:
        print(usage())
        return 0
    if command == "--version":
        print(dalle2_jax.__version__)
        return 0
    from dalle2_jax.cli.process.quiet import silence_libraries
    from dalle2_jax.cli.process.run_cli import run_cli

    def run() -> None:
        from dalle2_jax.errors import choose

        choose("command", command, COMMANDS)
        importlib.import_module(f"dalle2_jax.cli.{command}").main()

    silence_libraries()
    argv, sys.argv = sys.argv, [f"dalle2 {command}", *rest]
    try:
        return run_cli(run)
    finally:
        sys.argv = argv


def start(*command: str) -> NoReturn:
    """Runs a command as the main program of this process, and ends the process.

    Args:
      *command: the command; none if it is the first of the process's arguments.
    """
    signals.start_quietly()
    code = main([*command, *sys.argv[1:]])
    from dalle2_jax.cli.process.run_cli import exit_process

    exit_process(code)
