"""Every command and every option that a page of documentation, a config page, a docstring or a message names exists.

Whole commands are read by the parsers that would read them; an option in a sentence must be one of some command.
"""

import argparse
import ast
import functools
import importlib.util
import pathlib
import re
import shlex

import pytest

from dalle2_jax.cli import data as data_command
from dalle2_jax.cli import evaluate as evaluation_command
from dalle2_jax.cli import plan as plan_command
from dalle2_jax.cli import report, sample, serve, sweep
from dalle2_jax.cli import text as text_command
from dalle2_jax.cli import weights as weights_command
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.parse import expand
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.stages.lora import LoraConfig
from dalle2_jax.training.optim import OptimConfig
from dalle2_jax.training.sharding import MeshConfig

ROOT = pathlib.Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("benchmarks/*.md"), ROOT / "Makefile"]
STYLE_SHEET = ROOT / "dalle2_jax/report/style.py"  # two dashes begin a custom property of CSS there
PROGRAMS = [
    path
    for where in ("configs/", "dalle2_jax/**/", "", "benchmarks/")
    for path in ROOT.glob(f"{where}*.py")
    if path != STYLE_SHEET
]

PARSERS = {
    "sample.py": sample.make_parser(),
    "dalle2 data": data_command.make_parser(),
    "dalle2 evaluate": evaluation_command.make_parser(),
    "dalle2 plan": plan_command.make_parser(),
    "dalle2 report": report.make_parser(),
    "dalle2 serve": serve.make_parser(),
    "dalle2 sweep": sweep.make_parser(),
    "dalle2 text": text_command.make_parser(),
    "dalle2 weights": weights_command.make_parser(),
}
TRAIN_FLAGS = {
    *("config", "workdir", "multihost", "[no]multihost", "debug", "help", "version", "noverify", "heartbeat"),
    "profile",
}
FOREIGN = (
    r"(?:\S*(?:ruff|basedpyright|mkdocs) |\S*pip\d? |curl |docker |hf |img2dataset|git |kubectl |ln |"
    r"\S*python3? -m (?:pip|pytest|venv)|.*XLA_FLAGS)"
)
"""How a line with a command of another program begins."""
FOREIGN_OPTIONS = {"logdir", "short", "porcelain"}
"""Of tensorboard and git, named within other lines."""


# --- what is named --------------------------------------------------------------------------


def texts():
    """Yields (file, text, whole): pages; and the strings of programs, X where something is filled in.

    Docstrings and constants of a module have whole commands, other strings parts of them.
    """
    for path in PAGES:
        yield path, path.read_text(), True
    for path in PROGRAMS:
        text = path.read_text()
        if not any(word in text for word in ("--", "python", "dalle2 ")):
            continue
        tree = ast.parse(text)
        of_module = (ast.walk(node) for node in tree.body if isinstance(node, ast.Expr | ast.Assign))
        of_module = {id(part) for parts in of_module for part in parts}
        for node in ast.walk(tree):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "X" for part in node.values)
                yield path, "".join(parts), id(node) in of_module
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield path, node.value, id(node) in of_module


@functools.cache
def lines():
    """Returns (file, line, whole) of all that may name an option; a line has what continues it after a backslash."""
    named = (
        (path.relative_to(ROOT), text, whole)
        for path, text, whole in texts()
        if "--" in text or "python" in text or "dalle2" in text
    )
    return [
        (str(path), line.strip(), whole)
        for path, text, whole in named
        for line in re.sub(r"\\\n\s*", "", text).splitlines()
    ]


def commands(program):
    """Yields (file, words) of every command of a program that is written out."""
    prefix = "" if program.startswith("dalle2") else "python3? "
    for path, line, whole in lines():
        for match in re.finditer(rf"{prefix}{re.escape(program)} ([^`|;#]*)", line):
            command = re.sub(r"\[.*?\]$", "", match[1].replace("...", "X")).strip().rstrip(").,:")
            if whole and " " in command:  # more than the name of a command
                yield path, shlex.split(re.sub(r"\$\$?\w+|\$\(\w+\)", "X", command))


def options_of(parser):
    """Yields the options of a parser and its commands, without the dashes."""
    for action in parser._actions:
        yield from (word.removeprefix("--") for word in action.option_strings)
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from options_of(command)


def known_options():
    """Returns the options of all commands and of the programs in benchmarks/."""
    ours = {option for parser in PARSERS.values() for option in options_of(parser)}
    texts = (path.read_text() for path in ROOT.glob("benchmarks/*.py"))
    return ours | TRAIN_FLAGS | {name for text in texts for name in re.findall(r'add_argument\(\s*"--([\w.]+)"', text)}


# --- tests ----------------------------------------------------------------------------------


def test_every_option_that_is_named_exists():
    known, wrong = known_options() | FOREIGN_OPTIONS, []
    for path, line, _ in lines():
        if re.match(FOREIGN, line):
            continue
        for word in re.findall(r"(?<![\w-])--([A-Za-z\[][\w.\[\]]*)", line):
            name = word.rstrip(".").replace("STAGE", "decoder")
            placeholder = name.startswith("X.") or name.rpartition(".")[2] in ("X", "OPTION", "decoder")
            if name not in known and not name.startswith("config.") and not placeholder:
                wrong.append(f"{path}: --{word} in {line[:100]!r}")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("program", PARSERS)
def test_every_command_is_read_by_its_parser(program):
    found, wrong = list(commands(program)), []
    assert found
    for path, words in found:
        try:
            PARSERS[program].parse_args(words)
        except (UserError, ValueError, SystemExit) as error:
            if getattr(error, "code", 1):  # --help exits with 0
                wrong.append(f"{path}: {program} {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)


@functools.cache
def page(file):
    """Returns a config page as a module."""
    spec = importlib.util.spec_from_file_location("page", ROOT / file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_config(file, which, overrides):
    """Goes through the config of a stage with other values for some fields, as training does, and makes no array."""
    module = page(file)
    config = module.get_config(which)
    with config.unlocked():
        for field, value in overrides.items():
            *path, name = field.split(".")
            section = functools.reduce(lambda section, part: section[part], path, config)
            try:
                section[name] = ast.literal_eval(value)
            except (ValueError, SyntaxError):
                section[name] = value
    config = config.to_dict()
    experiment = Experiment.from_config(config)
    expand(OptimConfig, config["optim"], "optim")
    expand(MeshConfig, config["mesh"], "mesh")
    if "lora" in config:
        expand(LoraConfig, config["lora"], "lora")
    if config.get("init_from"):  # then the network is the other system's
        return
    clip, form = None, "".join(which.partition(",")[1:])
    if "clip" in experiment.requires:
        clip = Experiment.from_config(module.get_config(f"clip{form}")).build(99, None)
    experiment.build(config["text"]["vocab_size"], clip)


def test_every_training_command_names_a_config_and_its_fields():
    found, wrong, seen = list(commands("train.py")), [], set()
    assert found
    for path, words in found:
        words = [part for word in words for part in (word.split("=", 1) if word.startswith("--") else [word])]
        given = dict(zip(words[::2], words[1::2], strict=False)) if "--multihost" not in words else None
        if given is None:
            words.insert(words.index("--multihost") + 1, "True")
            given = dict(zip(words[::2], words[1::2], strict=False))
        file, _, which = given.pop("--config").partition(":")
        overrides = {name.removeprefix("--config."): value for name, value in given.items() if "--config." in name}
        others = [name for name in given if "--config." not in name and name.removeprefix("--") not in TRAIN_FLAGS]
        wrong += [f"{path}: train.py has no {name}" for name in others]
        if not (ROOT / file).is_file():  # the user's own
            continue
        for stage in page(file).STAGES if which == "X" else [which]:
            if (key := (file, stage, *sorted(overrides.items()))) in seen:
                continue
            seen.add(key)
            try:
                check_config(file, stage, overrides)
            except (UsageError, KeyError) as error:
                wrong.append(f"{path}: {shlex.join(words)}: {error}")
    assert not wrong, "\n".join(wrong)
