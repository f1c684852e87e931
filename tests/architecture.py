"""The rules of the architecture: functions from a file, or from all files, to the violations in them.

docs/design.md has the packages and the reasons. `test_house.py` applies the rules and tries each on planted violations.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from pathlib import Path

import glossary
from raised import MAX_PLAIN_WORDS, plain_words

ROOT = Path(__file__).parents[1]

FOUNDATION = ("errors", "ranges", "types")

BOUNDARIES = {
    # package: what it may import in addition to itself and FOUNDATION. Only rows above a row may be named in it.
    "errors": (),
    "ranges": (),
    "types": (),
    "rng": (),
    "signals": (),
    "files": (),
    "reading": (),
    "compilation": ("reading", "files"),
    "lock": ("files", "signals"),
    "text": ("reading", "files"),
    "diffusion": ("rng",),
    "models": ("rng",),
    "data": ("reading", "files", "signals", "lock", "text"),
    "workdir": ("reading", "files"),
    "pretrained": ("files", "lock", "data.storage.remote", "data.storage.retry", "workdir"),
    "stages": ("rng", "models", "diffusion"),
    "training": ("reading", "rng", "files", "signals", "compilation", "workdir", "stages.base"),
    "config": (
        *("reading", "files", "signals", "pretrained", "workdir", "text", "data", "diffusion", "models", "stages"),
        "training",
    ),
    "system": (
        *("rng", "reading", "files", "compilation", "pretrained", "workdir", "text", "data", "diffusion", "models"),
        *("stages", "training", "config"),
    ),
    "weights": (
        *("reading", "files", "signals", "pretrained", "lock", "models", "text", "workdir", "stages", "config"),
        *("training.sharding", "system.load", "system.loaded_stage"),  # to export or pack a trained system
    ),
    "run": ("compilation", "lock", "workdir", "text", "data", "stages", "training", "config", "system"),
    "planning": ("files", "data", "diffusion", "stages", "training", "config", "system"),
    "report": ("reading", "files", "workdir"),
    "evaluation": (
        *("rng", "reading", "files", "lock", "compilation", "pretrained", "models", "workdir", "data", "stages"),
        *("system", "weights"),
        "training.sharding",  # batches of images on several devices
    ),
    "server": ("files", "data.images.decoding", "system"),
    "testing": ("rng", "files", "text", "data", "diffusion", "models", "stages", "training", "system"),
}
"""``cli`` may import every package, and is imported only by the entry points. A name with a dot allows one module."""

LIBRARIES = {
    # library: the packages that may import it; "entry point" for cli, train.py and sample.py
    "jax": {*BOUNDARIES, "entry point"} - {"data", "text", "errors", "ranges"},
    "flax": {"models", "training", "testing"},
    "optax": {"stages", "training", "testing"},
    "orbax": {"workdir"},
    "ml_collections": {"config", "entry point"},
    "grain": {"data"},
    "tensorboardX": {"training"},
    "sentencepiece": {"text"},
    "tensorflow": set(),
    "tensorflow_datasets": {"data"},
    "pyarrow": {"data"},
    "torch": {"weights"},
    "safetensors": {"weights", "workdir"},
    "fastapi": {"server"},
    "uvicorn": {"server"},
}

LIGHT = ("importlib", "typing")
"""What ``import dalle2_jax`` may import."""

MAX_FILES, MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_LINE, MAX_PARAMETERS = 15, 400, 60, 120, 8

REGISTRATIONS = ("jax.tree_util.register_dataclass", "jax.tree_util.register_static")
"""Calls that may run when a module is imported: they make no array and ask for no device."""

FOREIGN_OBJECTS = {
    "dalle2_jax/data/arrays.py": "objects of the user",
    "dalle2_jax/data/formats/tfds.py": "features of tensorflow_datasets",
    "dalle2_jax/data/storage/files.py": "os.RWF_NOWAIT exists on Linux only; __del__ may run after a failed __init__",
    "dalle2_jax/data/storage/retry.py": "threading.local",
    "dalle2_jax/signals.py": "bars of tqdm",
    "dalle2_jax/system/inputs.py": "objects of the user",
    "dalle2_jax/training/sharding.py": "keys of jax.tree_util",
}
"""Files that look for an attribute of an object which is not of this package: path -> which objects."""


class File:
    """A file: its path from the repository's root, and its text."""

    def __init__(self, path: Path | str, text: str):
        self.path, self.text = Path(path), text

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree of a Python file."""
        return ast.parse(self.text)

    @cached_property
    def nodes(self) -> list[ast.AST]:
        """All nodes of the syntax tree."""
        return list(ast.walk(self.tree))

    @property
    def package(self) -> str:
        """The file's row in BOUNDARIES; "entry point" for cli and the scripts, which may import everything."""
        if self.path.parts[0] != "dalle2_jax" or self.path.name == "__main__.py" or self.path.parts[1] == "cli":
            return "entry point"
        return self.path.parts[1].removesuffix(".py")

    @property
    def module(self) -> str:
        """The name that the file is imported by."""
        return ".".join(self.path.with_suffix("").parts).removesuffix(".__init__")


def read_files(*patterns: str) -> list[File]:
    """Returns the files of the repository that match glob patterns."""
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern)})
    return [_read(path) for path in paths if "fixtures" not in path.parts]


@cache
def _read(path: Path) -> File:
    """Returns a file, read and parsed once for all rules."""
    return File(path.relative_to(ROOT), path.read_text())


# --- imports ----------------------------------------------------------------------------------


def imports(file: File, runtime: bool = False) -> Iterator[tuple[int, str]]:
    """Yields (line, name) for each import anywhere in a file; ``from package import name`` gives "package.name".

    Args:
      file: a Python file.
      runtime: omit imports below ``if TYPE_CHECKING``.
    """
    checked = [node for node in file.nodes if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)]
    omitted = {id(inner) for node in checked if runtime for inner in ast.walk(node)}
    for node in file.nodes:
        if id(node) in omitted:
            continue
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def import_boundaries(file: File) -> Iterator[str]:
    """An import that BOUNDARIES or LIBRARIES does not allow."""
    if file.path == Path("dalle2_jax/__init__.py"):
        for node in file.tree.body:  # imports inside functions are lazy
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
                yield from (f"{node.lineno}: the package imports {name}" for name in names if name not in LIGHT)
        return
    if file.package != "entry point" and file.package not in BOUNDARIES:
        yield f"1: the package {file.package!r} has no row in BOUNDARIES"
        return
    for line, name in imports(file):
        library = name.split(".")[0]
        if name.startswith("."):
            yield f"{line}: a relative import"
        elif library in LIBRARIES and file.package not in LIBRARIES[library]:
            yield f"{line}: {file.package} imports {library}"
        elif library == "dalle2_jax" and file.package != "entry point" and not _allowed(file.package, name):
            yield f"{line}: {file.package} imports {name}"


def _allowed(package: str, name: str) -> bool:
    inner = name.removeprefix("dalle2_jax").removeprefix(".")
    options = (package, *FOUNDATION, *BOUNDARIES[package], "__version__")
    return not inner or any(inner == option or inner.startswith(f"{option}.") for option in options)


def import_cycles(files: Iterable[File]) -> list[list[str]]:
    """Returns groups of modules that import each other, at import time or inside functions.

    The lazy root package is omitted: its functions import the modules that it re-exports.
    """
    modules = {file.module: file for file in files if file.module != "dalle2_jax"}
    edges = {
        name: {
            target
            for _, imported in imports(file, runtime=True)
            for target in ((imported,) if imported in modules else (imported.rpartition(".")[0],))
            if target in modules and target != name
        }
        for name, file in modules.items()
    }
    reached = {name: _reachable(name, edges) for name in edges}
    groups = {frozenset(other for other in reached[name] if name in reached[other]) for name in edges}
    return sorted(sorted(group) for group in groups if group)


def _reachable(start: str, edges: dict[str, set[str]]) -> set[str]:
    found, waiting = set(), [start]
    while waiting:
        for target in edges[waiting.pop()] - found:
            found.add(target)
            waiting.append(target)
    return found


# --- sizes ------------------------------------------------------------------------------------


def budgets(file: File) -> Iterator[str]:
    """A file, function or line that is too long, a file name that says nothing, or postponed work."""
    lines = file.text.splitlines()
    if len(lines) > MAX_FILE_LINES:
        yield f"{len(lines)}: more than {MAX_FILE_LINES} lines"
    if file.path.name in ("utils.py", "util.py", "helpers.py", "misc.py"):
        yield "1: the file's name does not say what is in it"
    for number, line in enumerate(lines, 1):
        if len(line) > MAX_LINE:
            yield f"{number}: {len(line)} characters in a line"
        if any(word in line for word in ("TO" + "DO", "FIX" + "ME")):
            yield f"{number}: postponed work"
    for node in file.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or node.lineno) - node.lineno + 1
            if length > MAX_FUNCTION_LINES:
                yield f"{node.lineno}: {node.name} has {length} lines"


def parameters(file: File) -> Iterator[str]:
    """A function with too many parameters, ``self`` and those of a network's ``__call__`` not counted."""
    for node in file.nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name != "__call__":
            names = [arg.arg for arg in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            count = len([name for name in names if name not in ("self", "cls")])
            if count > MAX_PARAMETERS:
                yield f"{node.lineno}: {node.name} has {count} parameters"


def full_folders(paths: Iterable[Path]) -> list[str]:
    """Returns folders with more than MAX_FILES files."""
    folders = [str(path.parent) for path in paths]
    return sorted({folder for folder in folders if folders.count(folder) > MAX_FILES})


# --- what code may do -------------------------------------------------------------------------


def docstrings(file: File) -> Iterator[str]:
    """A module, or a public class or function of a module, without a docstring."""
    if file.text.strip() and not ast.get_docstring(file.tree):
        yield "1: no docstring"
    for node in file.tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            if not ast.get_docstring(node):
                yield f"{node.lineno}: {node.name} has no docstring"


def stage_switches(file: File) -> Iterator[str]:
    """An ``isinstance`` on a stage outside config, which alone chooses implementations."""
    if file.package == "config":
        return
    for node in file.nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "isinstance" and len(node.args) == 2:
            if any(name.endswith("Stage") for name in _names(node.args[1])):
                yield f"{node.lineno}: {ast.unparse(node)}"


def _names(node: ast.AST) -> list[str]:
    found = [inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)]
    return found + [inner.attr for inner in ast.walk(node) if isinstance(inner, ast.Attribute)]


def attribute_probes(file: File) -> Iterator[str]:
    """A ``hasattr``, or a ``getattr`` with a default, outside the files of FOREIGN_OBJECTS."""
    if file.path.as_posix() in FOREIGN_OBJECTS:
        return
    for node in file.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            if node.func.id == "hasattr" or node.func.id == "getattr" and len(node.args) == 3:
                yield f"{node.lineno}: {ast.unparse(node)}"


def config_mappings(file: File) -> Iterator[str]:
    """A ``.get(`` on a config outside config: beyond it configs are typed values.

    ``config.content`` is exempt: the JSON of a public checkpoint's config file.
    """
    if file.package == "config":
        return
    for node in file.nodes:
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            names = _names(node.func.value)
            if "content" not in names and any("config" in name.lower() for name in names):
                yield f"{node.lineno}: {ast.unparse(node)}"


def import_effects(file: File) -> Iterator[str]:
    """Something that importing a file does: a call for its effect, an array, a device, or another module changed."""
    if "enable_x64" in file.text:
        yield "1: float64 is enabled"
    for node in _run_at_import(file.tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            if ast.unparse(node.value.func) not in REGISTRATIONS:
                yield f"{node.lineno}: {ast.unparse(node)[:60]}"
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name.startswith(("jax.", "jnp.", "np.random.", "numpy.random.")):
                if name != "jax.jit" and name not in REGISTRATIONS:
                    yield f"{node.lineno}: calls {name}"
            elif name in ("open", "print"):
                yield f"{node.lineno}: calls {name}"
        elif isinstance(node, ast.Assign | ast.AugAssign | ast.Delete):
            targets = [node.target] if isinstance(node, ast.AugAssign) else node.targets
            for target in targets:
                if isinstance(target, ast.Attribute | ast.Subscript):
                    yield f"{node.lineno}: changes {ast.unparse(target)}"


def _run_at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Yields the nodes that run when a module is imported: not those inside functions or under ``__main__``."""
    if isinstance(node, ast.If) and "__name__" in ast.unparse(node.test):
        return
    yield node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
        defaults = [default for default in (*node.args.defaults, *node.args.kw_defaults) if default is not None]
        decorators = [] if isinstance(node, ast.Lambda) else node.decorator_list
        for child in (*decorators, *defaults):
            yield from _run_at_import(child)
    else:
        for child in ast.iter_child_nodes(node):
            yield from _run_at_import(child)


# --- language ---------------------------------------------------------------------------------


def unused_words(file: File) -> Iterator[str]:
    """A word of the glossary's left column, as a name or in prose."""
    texts = list(enumerate(file.text.splitlines(), 1)) if file.path.suffix == ".md" else []
    if file.path.suffix == ".py":
        tokens = list(tokenize.generate_tokens(io.StringIO(file.text).readline))
        literals = (tokenize.COMMENT, tokenize.STRING, *_FSTRING_TEXT)
        texts = [(token.start[0], token.string) for token in tokens if token.type in literals]
        names = {(token.start[0], token.string) for token in tokens if token.type == tokenize.NAME}
        for line, name in sorted(names):
            yield from (f"{line}: the name {name}; use {instead}" for instead in glossary.instead_of_name(name))
    for line, text in texts:
        yield from (f"{line}: {found!r}; write {instead}" for found, instead in glossary.instead_of_prose(text))


_FSTRING_TEXT = (tokenize.FSTRING_MIDDLE,) if hasattr(tokenize, "FSTRING_MIDDLE") else ()


def frozen_prose(file: File) -> Iterator[str]:
    """A test that compares the sentence of an error or warning: `raised.mentions` compares its fields and facts."""
    for node in file.nodes:
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith((".raises", ".warns")):
            for keyword in node.keywords:
                if keyword.arg == "match" and (text := _literal(keyword.value)) is None:
                    yield f"{node.lineno}: match={ast.unparse(keyword.value)} is no literal"
                elif keyword.arg == "match" and plain_words(text) > MAX_PLAIN_WORDS:
                    yield f"{node.lineno}: match={text!r}"
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], ast.In | ast.NotIn | ast.Eq):
            sides = (node.left, node.comparators[0])
            if any(re.search(_MESSAGE, ast.unparse(side)) for side in sides):
                texts = [text for side in sides if (text := _literal(side)) is not None]
                yield from (f"{node.lineno}: {text!r}" for text in texts if plain_words(text) > MAX_PLAIN_WORDS)


_MESSAGE = r"\bstr\((error|raised|caught)|\bmessage\b|\bstderr\b|\berr\b|\bcaplog\.text\b"
"""What is the text of an error or warning in tests."""


def _literal(node: ast.AST) -> str | None:
    """Returns a string literal's text, with "{}" for what is formatted into it; None for anything else."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    texts = [part.value if isinstance(part, ast.Constant) else "{}" for part in parts]
    literal = isinstance(node, ast.JoinedStr) or isinstance(node, ast.Constant) and isinstance(node.value, str)
    return "".join(texts) if literal else None
