"""The code blocks of the documentation, and the commands of its shell blocks, at tiny sizes."""

import pathlib
import re
import subprocess
from typing import NamedTuple

ROOT = pathlib.Path(__file__).parents[2]

NOT_RUN = {
    # first words of commands that are not run, and why
    "git": "downloads",
    "hf": "downloads",
    "img2dataset": "downloads",
    "pip": "installs; its extras are checked",
    "python3": "creates an environment",
    "make": "its target is checked",
    "pre-commit": "installs",
    "cd": "belongs to an installation",
    "source": "belongs to an installation",
    "tensorboard": "is a server",
    "mkdocs": "builds the site, which .ci/run does",
}

TINY = {
    # option: its value in tests
    "--num": "2",
    "--measure": "retrieval",
    "--frames": "2",
    "--components": "1,2",
    "--batch_size": "2",
    "--decoder.steps": "8",
    "--config.total_steps": "2",
    "--config.batch_size": "8",
    "--config.optim.sam_batch": "4",
    "--config.workers": "0",
    "--config.model.dtype": "float32",
}
EVALUATED = "8"
"""Examples of an evaluation: more than the neighbours and subsets that measures need."""

TEXTUAL_STEPS = re.compile(r"[a-z]+\d+")

ONE_HOST = ("--multihost", "--config.mesh.fsdp")
"""Options that need several hosts or devices, which are left away."""


class Block(NamedTuple):
    """A code block of a page: its language ("" for shell commands and plain text), text and line."""

    language: str
    text: str
    line: int


def blocks(path):
    """Returns the code blocks of a page."""
    text = path.read_text()
    found = re.finditer(r"^```([\w-]*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [Block(match[1], match[2], text[: match.start()].count("\n") + 2) for match in found]


def is_shell(block):
    """Whether a block has commands: it starts with one, or with a loop over some."""
    first = block.text.split(maxsplit=1)[0] if block.text.strip() else ""
    return block.language == "" and (first in {"python", "dalle2", "for", "mkdir", "ln", *NOT_RUN})


RECORD = r"""
PATH=/nonexistent
record() { printf '%s\0' "$@"; printf '\n\0'; }
command_not_found_handle() { record "$@"; }
cd() { record cd "$@"; }
source() { record source "$@"; }
"""


def commands(block):
    """Returns the commands of a shell block as lists of words, in the order in which bash would run them."""
    script = RECORD + block.text
    done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
    assert not done.stderr, done.stderr
    words = done.stdout.split("\0")[:-1]
    found, current = [], []
    for word in words:
        if word == "\n":
            found.append(current)
            current = []
        else:
            current.append(word)
    return found


def tiny(words):
    """Returns a command with tiny sizes, for one host."""
    result, name = [], ""
    for word in words:
        if word.split("=")[0] in ONE_HOST:
            continue
        option, equals, _ = word.partition("=")
        if equals and option in TINY:
            word = f"{option}={TINY[option]}"
        elif name in TINY and not TEXTUAL_STEPS.fullmatch(word):
            word = TINY[name]
        name = word if word.startswith("--") and not equals else ""
        result.append(word)
    if "evaluate" in result:
        where = result.index("--num") if "--num" in result else len(result)
        result[where : where + 2] = ["--num", EVALUATED]
    return result
