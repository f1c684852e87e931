"""What a process skips when it loads a system: libraries that it does not use, shapes that are on disk, and programs
that are compiled.
"""

import json
import logging
import os
import subprocess
import sys

import jax
import pytest

from dalle2_jax import compilation, testing
from dalle2_jax.stages import abstract_variables
from dalle2_jax.system import load

LOADED = """
import sys
from dalle2_jax.cli import sample
from dalle2_jax.system.system import load
assert {"clip", "prior", "decoder", "upsampler_1"} == set(load("shapes").stages)
unused = {"grain", "optax", "orbax", "pyarrow", "tensorstore", "ml_collections", "tensorflow_datasets", "scipy"}
assert not unused & set(sys.modules), unused & set(sys.modules)
"""


def test_a_packed_system_is_loaded_without_libraries_of_data_and_training():
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_program_that_is_compiled_ahead_is_not_compiled_by_its_call(caplog):
    function = jax.jit(lambda state, x: state + x, donate_argnums=0)
    state = jax.numpy.ones(7)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        compilation.compile_ahead(function, state, 2.0)
        assert sum("Finished XLA compilation" in record.message for record in caplog.records) == 1
        assert not state.is_deleted()
        caplog.clear()
        assert function(state, 2.0).tolist() == [3.0] * 7
    assert state.is_deleted() and not caplog.records


# --- shapes on disk ---------------------------------------------------------------------------

SHAPES = {"params": {"a": {"kernel": jax.ShapeDtypeStruct((2, 3), "float32")}}, "stats": {}}
OTHER = {"params": {"b": jax.ShapeDtypeStruct((), "bfloat16")}, "stats": {"n": jax.ShapeDtypeStruct((4,), "int32")}}


class Builder:
    """Returns shapes, and counts how often."""

    def __init__(self, shapes=SHAPES):
        self.shapes, self.count = shapes, 0

    def __call__(self):
        self.count += 1
        return self.shapes


@pytest.fixture
def cache(tmp_path):
    """An empty cache of compiled programs; yields the folder of shapes."""
    before = jax.config.values["jax_compilation_cache_dir"]
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    yield tmp_path / "shapes"
    jax.config.update("jax_compilation_cache_dir", before)


@pytest.mark.parametrize("shapes", [SHAPES, OTHER])
def test_shapes_are_built_once(cache, shapes):
    build = Builder(shapes)
    results = [compilation.load_or_build_shapes("a network", build) for _ in range(3)]
    assert build.count == 1 and results == [shapes] * 3
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("kind", testing.KINDS)
def test_stored_shapes_of_a_stage(cache, kind):
    stage = testing.tiny_stage(kind)
    expected = abstract_variables(stage)
    for _ in range(2):  # built, and read
        found = load._shapes(stage)
        assert found == expected and jax.tree.structure(found) == jax.tree.structure(expected)
    assert len(list(cache.iterdir())) == 1


def test_other_keys_are_other_shapes(cache, monkeypatch):
    first, build = Builder(), Builder(OTHER)
    compilation.load_or_build_shapes("a network", first)
    compilation.load_or_build_shapes("another network", build)
    with jax.enable_x64(True):
        compilation.load_or_build_shapes("a network", build)
    for change in ((jax, "__version__", "0.0"), (compilation, "_SOURCES", ("types.py",))):
        monkeypatch.setattr(*change)
        compilation._code.cache_clear()
        compilation.load_or_build_shapes("a network", build)
    monkeypatch.undo()
    compilation._code.cache_clear()
    assert build.count == 4
    assert compilation.load_or_build_shapes("a network", Builder(OTHER)) == SHAPES and first.count == 1


def test_a_description_that_holds_for_one_process_is_not_stored(cache):
    compilation.load_or_build_shapes("<function f at 0x7f00>", Builder())
    assert not cache.exists()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content.replace(b"3", b"5"),
        lambda content: b"\xff" + content,
        lambda content: b"[" * 100_000 + b"]" * 100_000,
        lambda content: json.dumps({"shapes": 1, "digest": compilation._digest(1)}).encode(),
        lambda content: json.dumps({"shapes": ["float33"], "digest": compilation._digest(["float33"])}).encode(),
        lambda content: b"[]",
        lambda content: b" " * (compilation.MAX_BYTES + 1),
    ],
)
def test_a_damaged_file_is_replaced(cache, damage):
    compilation.load_or_build_shapes("a network", Builder())
    (path,) = cache.iterdir()
    content = path.read_bytes()
    path.write_bytes(damage(content))
    build = Builder()
    assert compilation.load_or_build_shapes("a network", build) == SHAPES and build.count == 1
    assert path.read_bytes() == content


def test_a_folder_that_cannot_be_written(cache):
    cache.write_text("a file where the folder belongs")
    build = Builder()
    assert [compilation.load_or_build_shapes("a network", build) for _ in range(2)] == [SHAPES] * 2
    assert build.count == 2 and cache.is_file()


def test_no_cache(tmp_path, monkeypatch):
    before = jax.config.values["jax_compilation_cache_dir"]
    for folder in (None, "gs://bucket/cache"):
        jax.config.update("jax_compilation_cache_dir", folder)
        assert compilation.load_or_build_shapes("a network", Builder()) == SHAPES
    jax.config.update("jax_compilation_cache_dir", before)


def test_the_oldest_files_are_removed(cache, monkeypatch):
    monkeypatch.setattr(compilation, "MAX_FILES", 3)
    for number in range(5):
        compilation.load_or_build_shapes(f"network {number}", Builder())
        for path in cache.iterdir():
            os.utime(path, ns=(0, path.stat().st_mtime_ns - 10**9))
    build = Builder()
    for number in reversed(range(5)):
        compilation.load_or_build_shapes(f"network {number}", build)
        if number == 2:
            assert build.count == 0  # the newest three are there
    assert build.count == 2 and len(list(cache.iterdir())) == 3


TOGETHER = """
import sys, jax
from dalle2_jax import compilation
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
shapes = {"params": {"w": jax.ShapeDtypeStruct((2, 3), "float32")}}
print("ready", flush=True)
sys.stdin.readline()
for number in range(100):
    assert compilation.load_or_build_shapes(f"network {number}", lambda: shapes) == shapes
"""


def test_two_processes_at_once(cache):
    words = [sys.executable, "-c", TOGETHER, str(cache.parent)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen(words, **pipes) for _ in range(2)]
    for child in children:
        assert child.stdout.readline() == "ready\n", child.stderr.read()
    for child in children:
        child.stdin.write("go\n")
        child.stdin.flush()
    outputs = [child.communicate() for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs
    assert len(list(cache.glob("*.json"))) == 100 and len(list(cache.iterdir())) == 100
