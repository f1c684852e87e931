"""The rules of `architecture.py` hold in every file, and each rule finds the violations that are planted for it."""

import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import architecture
import glossary
import pytest
from architecture import BOUNDARIES, FOREIGN_OBJECTS, ROOT, File, read_files

import dalle2_jax

PACKAGE = ("dalle2_jax/**/*.py", "train.py", "sample.py")
CODE = (*PACKAGE, "configs/*.py", "tests/**/*.py", "benchmarks/**/*.py", ".ci/*.py", "docs/*.py", "setup.py")
PROSE = (*CODE, "*.md", "docs/**/*.md", "benchmarks/*.md")
NOT_PROSE = (
    *("tests/glossary.py", "tests/test_house.py", "tests/architecture.py"),
    *("dalle2_jax/data/synthetic/digits.py", "dalle2_jax/data/synthetic/grammar.py"),
)
"""Files that quote the words of the glossary, and those whose captions have them."""

RULES = {
    architecture.import_boundaries: PACKAGE,
    architecture.budgets: CODE,
    architecture.parameters: PACKAGE,
    architecture.docstrings: PACKAGE,
    architecture.stage_switches: PACKAGE,
    architecture.attribute_probes: PACKAGE,
    architecture.config_mappings: PACKAGE,
    architecture.import_effects: (*PACKAGE, "configs/*.py"),
    architecture.unused_words: PROSE,
    architecture.frozen_prose: ("tests/**/*.py",),
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_every_file(rule):
    files = read_files(*RULES[rule])
    if rule is architecture.unused_words:
        files = [file for file in files if file.path.as_posix() not in NOT_PROSE]
    assert len(files) > 50
    violations = [f"{file.path}:{violation}" for file in files for violation in rule(file)]
    assert not violations, "\n".join(violations)


def test_imports_have_no_cycle():
    assert architecture.import_cycles(read_files("dalle2_jax/**/*.py")) == []


def test_folders_are_small():
    files = [path.relative_to(ROOT) for pattern in ("dalle2_jax/**/*.*", "configs/*.py") for path in ROOT.glob(pattern)]
    full = architecture.full_folders(path for path in files if path.suffix != ".pyc")
    assert not full


def test_boundaries_name_packages_above():
    """No package may import one that may import it: every row names rows above it only."""
    rows = list(BOUNDARIES)
    packages = {file.package for file in read_files("dalle2_jax/**/*.py")} - {"entry point", "__init__"}
    assert packages == set(rows)
    for place, (package, allowed) in enumerate(BOUNDARIES.items()):
        assert {name.split(".")[0] for name in allowed} <= set(rows[:place]), package


# --- planted violations -------------------------------------------------------------------------

PLANTED = {
    architecture.import_boundaries: {
        "dalle2_jax/diffusion/planted.py": ["import flax.linen as nn", "from dalle2_jax.models import unet"],
        "dalle2_jax/models/planted.py": ["from dalle2_jax import files", "from dalle2_jax.diffusion import sample"],
        "dalle2_jax/data/planted.py": ["import jax.numpy as jnp", "def f():\n    import jax"],
        "dalle2_jax/training/planted.py": [
            "from dalle2_jax.stages import ClipStage",
            "import dalle2_jax.stages.clip",
            "from orbax.checkpoint import v1",
        ],
        "dalle2_jax/stages/planted.py": ["from dalle2_jax import config", "from ..models import unet"],
        "dalle2_jax/system/planted.py": ["from ml_collections import ConfigDict", "from dalle2_jax import cli"],
        "dalle2_jax/weights/planted.py": ["from dalle2_jax.system import cascade"],
        "dalle2_jax/attic/planted.py": ["import os"],
        "dalle2_jax/errors.py": ["import jax"],
        "dalle2_jax/__init__.py": ["from dalle2_jax import run", "import jax"],
    },
    architecture.budgets: {
        "tests/planted.py": [
            "x = 1\n" * 401,
            "def f():\n" + "    x = 1\n" * 60,
            "x = '" + "a" * 120 + "'",
            "x = 1  # TO" + "DO",
        ],
        "dalle2_jax/data/utils.py": ["x = 1"],
    },
    architecture.parameters: {
        "dalle2_jax/planted.py": [
            "def f(a, b, c, d, e, f, g, h, i): pass",
            "def f(a, *, b, c, d, e, f, g, h, i): pass",
        ],
    },
    architecture.docstrings: {
        "dalle2_jax/types.py": ["x = 1", '"""Doc."""\ndef f(): pass', '"""Doc."""\nclass F: pass']
    },
    architecture.stage_switches: {
        "dalle2_jax/run.py": ["isinstance(stage, LoraStage)", "isinstance(s, stages.ClipStage | stages.DecoderStage)"],
        "dalle2_jax/stages/planted.py": ["isinstance(self.base, (DecoderStage, UpsamplerStage))"],
    },
    architecture.attribute_probes: {
        "dalle2_jax/data/planted.py": ["hasattr(source, 'gather')", "getattr(source, 'rejected', {})"],
    },
    architecture.config_mappings: {
        "dalle2_jax/run.py": ["config.get('data')", "self.config['model'].get('text', {})", "stage_config.get('a')"],
    },
    architecture.import_effects: {
        "dalle2_jax/rng.py": [
            "N = jax.device_count()",
            "class A:\n    x = jnp.zeros(3)",
            "def f(x=jnp.ones(1)): pass",
            "@decorate(jax.devices())\ndef f(): pass",
            "if True:\n    print('hello')",
            "jax.config.update('jax_enable_x64', True)",
            "jax.config.update('jax_debug_nans', True)",
            "logging.getLogger('absl').setLevel(50)",
            "os.environ['XLA_FLAGS'] = ''",
            "sys.unraisablehook = print",
            "del os.environ['HOME']",
        ],
    },
    architecture.unused_words: {
        "dalle2_jax/planted.py": [
            *(f"# {word.example}" for word in glossary.PROSE),
            *(f'"""A text.\n\n{word.example}."""' for word in glossary.PROSE),
            *(f"x = f'{{y}} {word.example}'" for word in glossary.PROSE),
            *(f"{word.example} = 1" for word in glossary.IDENTIFIERS),
            "def get_pictures(): pass",
            "class PictureSource: pass",
            "def test_what_is_told(): pass",
        ],
        "docs/planted.md": [word.example for word in glossary.PROSE],
    },
    architecture.frozen_prose: {
        "tests/planted.py": [
            "pytest.raises(UserError, match='the last good checkpoint is step 3')",
            "pytest.raises(UserError, match=f'{name} is not an empty folder')",
            "pytest.warns(SystemWarning, match='prompt 1 is longer than the prior')",
            "pytest.raises(UserError, match=message)",
            "assert 'there is no system at' in done.stderr",
            "assert f'{file} is not a file' not in str(caught.value)",
            "assert message == 'steps are too far apart'",
        ],
    },
}

SOUND = {
    architecture.import_boundaries: (
        "dalle2_jax/training/sound.py",
        "from dalle2_jax.stages.base import Stage\nfrom dalle2_jax import errors, rng\nimport jax\nimport dalle2_jax",
    ),
    architecture.budgets: ("tests/sound.py", "x = 1\n" * 300 + "def f():\n" + "    x = 1\n" * 59),
    architecture.parameters: ("dalle2_jax/sound.py", "class A:\n    def f(self, a, b, c, d, e, f, g, *, h): pass"),
    architecture.docstrings: (
        "dalle2_jax/types.py",
        '"""Doc."""\ndef _f(): pass\ndef g():\n    """Doc."""',
    ),
    architecture.stage_switches: ("dalle2_jax/run.py", "isinstance(stage, Sampler)\nisinstance(x, int)"),
    architecture.attribute_probes: ("dalle2_jax/run.py", "getattr(x, 'name')\nx.hasattr()"),
    architecture.config_mappings: ("dalle2_jax/run.py", "queue.get(1)\nmetadata.get('a')\nconfig.name"),
    architecture.import_effects: (
        "dalle2_jax/rng.py",
        "@functools.partial(jax.jit, static_argnames='x')\ndef f():\n    return jax.devices()\n"
        "x: int = 3\nTABLE = dict(a=1)\njax.tree_util.register_static(A)\n"
        "if __name__ == '__main__':\n    print(f())",
    ),
    architecture.unused_words: (
        "dalle2_jax/sound.py",
        '"""Connection refused. Makes room for an image."""\ndef sample_timesteps(shopping, goods): pass',
    ),
    architecture.frozen_prose: (
        "tests/sound.py",
        "pytest.raises(UserError, match=rf'checkpoints/{step} .*no route', check=mentions('optim.lr', -1.0))\n"
        "assert 'optim.lr' in str(error.value) and 'a text of many words' in captions\nassert done.stderr == ''",
    ),
}


@pytest.mark.parametrize("rule", PLANTED, ids=lambda rule: rule.__name__)
def test_planted_violations_are_found(rule):
    for path, texts in PLANTED[rule].items():
        for text in texts:
            assert list(rule(File(path, text))), f"{path}: {text}"


@pytest.mark.parametrize("rule", SOUND, ids=lambda rule: rule.__name__)
def test_sound_file_passes(rule):
    assert list(rule(File(*SOUND[rule]))) == []


def test_every_rule_has_planted_violations():
    assert set(RULES) == set(PLANTED) == set(SOUND)


def test_planted_cycle_is_found():
    files = [
        File("dalle2_jax/data/__init__.py", "from dalle2_jax.data.a import A"),
        File("dalle2_jax/data/a.py", "def f():\n    from dalle2_jax.data import b"),
        File("dalle2_jax/data/b.py", "import dalle2_jax.data.a"),
        File("dalle2_jax/data/c.py", "if TYPE_CHECKING:\n    from dalle2_jax.data import d"),
        File("dalle2_jax/data/d.py", "from dalle2_jax.data.c import C"),
    ]
    groups = architecture.import_cycles(files)
    assert any({"dalle2_jax.data.a", "dalle2_jax.data.b"} <= set(group) for group in groups)
    assert not any("dalle2_jax.data.c" in group for group in groups)


def test_planted_full_folder_is_found():
    files = [Path(f"dalle2_jax/data/f{number}.py") for number in range(16)]
    assert architecture.full_folders(files[:15]) == []
    assert architecture.full_folders(files) == ["dalle2_jax/data"]


# --- imports, run -------------------------------------------------------------------------------

_IMPORT_ALL = """
import importlib, logging, os, sys
def state():
    flags = {{name: os.environ[name] for name in os.environ if name.startswith(("JAX_", "XLA_", "TF_"))}}
    return flags, sys.unraisablehook, sys.excepthook, sys.stderr, logging.getLogger("absl").level
import absl.logging, cv2, jax, tensorflow_datasets  # noqa: what these change is not this package's doing
before = state()
for name in {names}: importlib.import_module(name)
changed = [new for old, new in zip(before, state()) if old != new]
assert not changed, changed
"""


def test_imports_change_nothing_and_touch_no_device():
    """With a platform that does not exist, the first array or question for a device would raise."""
    modules = [module.name for module in pkgutil.walk_packages(dalle2_jax.__path__, "dalle2_jax.")]
    names = [name for name in modules if not name.endswith("__main__")] + ["train", "sample"]
    environment = {**os.environ, "JAX_PLATFORMS": "no_such_platform"}
    for suffix, code in (("", 0), ("import jax; jax.devices()", 1)):
        program = _IMPORT_ALL.format(names=names) + suffix
        done = subprocess.run([sys.executable, "-c", program], env=environment, cwd=ROOT, capture_output=True)
        assert done.returncode == code, done.stderr.decode()


def test_exempt_files_exist():
    """A file that was renamed is not exempt under its old name."""
    assert [path for path in FOREIGN_OBJECTS if not Path(ROOT, path).exists()] == []
