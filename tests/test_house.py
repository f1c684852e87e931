"""The house stands as DESIGN.md draws it: import walls, size budgets, docstrings, quiet imports.

Every rule is a function from a file to its violations, so that it is tried on planted ones too.
"""

import ast
import os
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import dalle2_jax

ROOT = Path(__file__).parents[1]

WALLS = {
    # room: the rooms it may import, beside itself. types, rng and files are the foundation.
    "types": (),
    "rng": (),
    "files": (),
    "entry": ("types",),
    "text": ("types", "files"),
    "diffusion": ("types", "rng"),
    "models": ("types",),
    "data": ("types", "files", "text"),
    "workdir": ("types", "files"),
    "stages": ("types", "rng", "models", "diffusion"),
    "weights": ("types", "files", "models", "text", "workdir"),
    "training": ("types", "rng", "files", "workdir", "stages.base"),
    "generation": ("types", "rng", "files", "diffusion", "stages", "text"),
    "evaluation": ("types", "rng", "files", "data", "stages", "generation"),
    "sections": ("types", "models"),
    "networks": ("types", "models", "sections"),
    "sweep": ("types", "files", "entry", "workdir"),
    "finetune": ("types", "workdir"),
    "build": (
        *("types", "text", "data", "diffusion", "models", "stages", "training"),
        *("generation", "workdir", "sections", "networks", "finetune"),
    ),
    "job": (
        *("types", "text", "data", "stages", "training", "generation"),
        *("workdir", "sections", "networks", "finetune", "build"),
    ),
    "testing": ("types", "rng", "files", "text", "data", "diffusion", "models", "stages", "training", "generation"),
}
"""An entry point (train.py, sample.py, a room's ``__main__.py``) may import every room."""

GUESTS = {
    # a library: the rooms that may import it; "entry point" for those of WALLS' note
    "jax": {*WALLS, "entry point"} - {"data", "text"},
    "flax": {"models", "training", "testing"},
    "optax": {"stages", "training", "testing"},
    "orbax": {"workdir"},
    "ml_collections": {"job", "entry point"},
    "grain": {"data"},
    "tensorboardX": {"training"},
    "sentencepiece": {"text"},
    "tensorflow": set(),
    "tensorflow_datasets": {"data"},
    "pyarrow": {"data"},
    "torch": {"weights"},
    "safetensors": {"weights"},
}

LINES_A_FILE, LINES_A_FUNCTION, LETTERS_A_LINE = 400, 60, 120

QUIET_CALLS = ("jax.jit", "jax.tree_util.register_dataclass", "jax.tree_util.register_static")
"""The calls of jax that make no array and ask for no device."""


class File(NamedTuple):
    """A Python file: its path from the repository's root, and its text."""

    path: Path
    text: str

    @property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def room(self) -> str:
        """Its row of WALLS; "entry point" for those that may import all."""
        if self.path.parts[0] != "dalle2_jax" or self.path.name == "__main__.py":
            return "entry point"
        return self.path.parts[1].removesuffix(".py")


def repository(*patterns: str) -> list[File]:
    """Returns the files that match."""
    paths = sorted(path for pattern in patterns for path in ROOT.glob(pattern))
    return [File(path.relative_to(ROOT), path.read_text()) for path in paths]


PACKAGE = ("dalle2_jax/**/*.py", "train.py", "sample.py")
EVERYTHING = (*PACKAGE, "configs/*.py", "tests/**/*.py", "benchmarks/**/*.py")


def imports(file: File) -> Iterator[tuple[int, str]]:
    """Yields (line, module) for each import anywhere in a file; ``from package import name`` names both."""
    for node in ast.walk(file.tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, "." * node.level + (node.module or "")
            if node.module == "dalle2_jax" or node.module == "dalle2_jax.stages":
                yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def walls(file: File) -> Iterator[str]:
    """An import that DESIGN.md does not draw."""
    if file.path == Path("dalle2_jax/__init__.py"):
        yield from (f"{line}: the package itself imports {module}" for line, module in imports(file))
        return
    if file.room != "entry point" and file.room not in WALLS:
        yield f"1: the room {file.room!r} has no row in WALLS"
        return
    for line, module in imports(file):
        guest = module.split(".")[0]
        if module.startswith("."):
            yield f"{line}: a relative import"
        elif guest in GUESTS and file.room not in GUESTS[guest]:
            yield f"{line}: {file.room} imports {guest}"
        elif guest == "dalle2_jax" and file.room != "entry point" and not _drawn(file.room, module):
            yield f"{line}: {file.room} imports {module}"


def _drawn(room: str, module: str) -> bool:
    """Whether WALLS lets ``room`` import ``module``."""
    if module == "dalle2_jax":
        return True  # the names taken from it are judged one by one
    inner = module.removeprefix("dalle2_jax.")
    own = (room, *WALLS[room])
    return any(inner == allowed or inner.startswith(f"{allowed}.") for allowed in own)


def budgets(file: File) -> Iterator[str]:
    """A file or function over its budget, a line too long, a name that says nothing, or work put off."""
    lines = file.text.splitlines()
    if len(lines) > LINES_A_FILE:
        yield f"{len(lines)}: more than {LINES_A_FILE} lines"
    if file.path.name in ("utils.py", "util.py", "helpers.py", "misc.py"):
        yield "1: a file named for nothing"
    for number, line in enumerate(lines, 1):
        if len(line) > LETTERS_A_LINE:
            yield f"{number}: {len(line)} letters in a line"
        if any(word in line for word in ("TO" "DO", "FIX" "ME")):
            yield f"{number}: work put off"
    for node in ast.walk(file.tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = node.end_lineno - node.lineno + 1
            if length > LINES_A_FUNCTION:
                yield f"{node.lineno}: {node.name} has {length} lines"


def docstrings(file: File) -> Iterator[str]:
    """A module, or a public class or function of a module, without a docstring."""
    tree = file.tree
    if file.text.strip() and not ast.get_docstring(tree):
        yield "1: no docstring"
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield f"{node.lineno}: {node.name} has no docstring"


def quiet_imports(file: File) -> Iterator[str]:
    """Something done by importing a file that may ask for a device, or that changes jax for everybody."""
    if "jax_enable_x64" in file.text or "enable_x64" in file.text:
        yield "1: float64 switched on"
    for call in _calls_at_import(file.tree):
        name = ast.unparse(call.func)
        if name.startswith(("jax.", "jnp.", "np.random.", "numpy.random.")) and name not in QUIET_CALLS:
            yield f"{call.lineno}: calls {name} when imported"
        if name in ("open", "print"):
            yield f"{call.lineno}: calls {name} when imported"


def _calls_at_import(node: ast.AST) -> Iterator[ast.Call]:
    """Yields the calls that run when a module is imported: not those inside functions or under __main__."""
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return
    if isinstance(node, ast.Call):
        yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        decorators = getattr(node, "decorator_list", [])
        defaults = [default for default in (*node.args.defaults, *node.args.kw_defaults) if default is not None]
        for child in (*decorators, *defaults):
            yield from _calls_at_import(child)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _calls_at_import(child)


RULES = {walls: PACKAGE, budgets: EVERYTHING, docstrings: PACKAGE, quiet_imports: (*PACKAGE, "configs/*.py")}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_house(rule):
    files = repository(*RULES[rule])
    assert len(files) > 50
    wrong = [f"{file.path}:{violation}" for file in files for violation in rule(file)]
    assert not wrong, "\n".join(wrong)


def test_every_wall_has_a_room():
    rooms = {file.room for file in repository("dalle2_jax/**/*.py")} - {"entry point", "__init__"}
    assert rooms <= {*WALLS}
    assert {*WALLS} - rooms <= {"testing"}  # the one row that may wait for its room
    assert all(room.split(".")[0] in WALLS for row in WALLS.values() for room in row)


PLANTED = {
    walls: {
        "dalle2_jax/diffusion/planted.py": ["import flax.linen as nn", "from dalle2_jax.models import unet"],
        "dalle2_jax/models/planted.py": ["from dalle2_jax import rng", "from dalle2_jax.diffusion import sample"],
        "dalle2_jax/data/planted.py": ["import jax.numpy as jnp", "def f():\n    import jax"],
        "dalle2_jax/training/planted.py": [
            "from dalle2_jax.stages import ClipStage",
            "import dalle2_jax.stages.clip",
            "from orbax.checkpoint import v1",
        ],
        "dalle2_jax/stages/planted.py": ["from dalle2_jax import build", "from ..models import unet"],
        "dalle2_jax/generation/planted.py": ["from ml_collections import ConfigDict"],
        "dalle2_jax/attic/planted.py": ["import os"],
        "dalle2_jax/__init__.py": ["from dalle2_jax import build"],
    },
    budgets: {
        "tests/planted.py": ["x = 1\n" * 401, "def f():\n" + "    x = 1\n" * 60, "x = '" + "a" * 120 + "'"],
        "dalle2_jax/data/utils.py": ["x = 1"],
    },
    docstrings: {"dalle2_jax/types.py": ["x = 1", '"""Doc."""\ndef f(): pass', '"""Doc."""\nclass F: pass']},
    quiet_imports: {
        "dalle2_jax/rng.py": [
            "N = jax.device_count()",
            "class A:\n    x = jnp.zeros(3)",
            "def f(x=jnp.ones(1)): pass",
            "@decorate(jax.devices())\ndef f(): pass",
            "if True:\n    print('hello')",
            "jax.config.update('jax_enable_x64', True)",
        ],
    },
}

SOUND = {
    walls: (
        "dalle2_jax/training/sound.py",
        "from dalle2_jax.stages.base import Stage\nfrom dalle2_jax import rng\nimport jax",
    ),
    budgets: ("tests/sound.py", "x = 1\n" * 300 + "def f():\n" + "    x = 1\n" * 59),
    docstrings: ("dalle2_jax/types.py", '"""Doc."""\ndef _f(): pass\ndef g():\n    """Doc."""'),
    quiet_imports: (
        "dalle2_jax/rng.py",
        "@functools.partial(jax.jit, static_argnames='x')\ndef f():\n    return jax.devices()\n"
        "if __name__ == '__main__':\n    print(f())",
    ),
}


@pytest.mark.parametrize(
    ("rule", "path", "text"),
    [(rule, path, text) for rule, files in PLANTED.items() for path, texts in files.items() for text in texts],
    ids=lambda value: getattr(value, "__name__", None) or str(value).splitlines()[0][:40],
)
def test_rule_finds_planted_violation(rule, path, text):
    assert list(rule(File(Path(path), text)))


@pytest.mark.parametrize("rule", SOUND, ids=lambda rule: rule.__name__)
def test_rule_passes_sound_file(rule):
    path, text = SOUND[rule]
    assert not list(rule(File(Path(path), text)))


def test_imports_touch_no_device():
    """With a platform that does not exist, the first array or question for a device would raise."""
    modules = [module.name for module in pkgutil.walk_packages(dalle2_jax.__path__, "dalle2_jax.")]
    names = [name for name in modules if not name.endswith("__main__")] + ["train", "sample"]
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    program = f"import importlib\nfor name in {names}: importlib.import_module(name)"
    for suffix, code in (("", 0), ("\nimport jax; jax.devices()", 1)):
        done = subprocess.run([sys.executable, "-c", program + suffix], env=environment, cwd=ROOT, capture_output=True)
        assert done.returncode == code, done.stderr.decode()
