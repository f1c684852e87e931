"""Failed imports and exports: one error line that names file and key, and no partial output."""

import errno
import os
import shutil
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import numpy as np
import pytest
from checkpoints import (
    FIXTURES,
    KARLO,
    VARIATIONS,
    assert_error,
    import_into,
    listing,
    read,
    run,
    run_ok,
    write,
)
from command_line import TIMEOUT, CommandRunner, assert_one_line, environment

from dalle2_jax.cli import weights as weights
from dalle2_jax.system import load
from dalle2_jax.training.sharding import MeshConfig, make_mesh

CODE = b"cposix\nsystem\n(S'echo harm'\ntR."


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return checkpoints.karlo_five(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def system(tmp_path_factory, five):
    """A system with only a CLIP. No test changes it."""
    return import_into(tmp_path_factory.mktemp("system") / "clip", five / "ViT-L-14.safetensors")


def part(five, name):
    """Returns the file of a part of Karlo."""
    (path,) = (path for path in five.iterdir() if path.name.startswith(name))
    return path


def changed(five, folder, key, value=None):
    """Writes CLIP's file with another value for a key, or without the key."""
    tensors = read(part(five, "ViT-L-14.")) | {key: value}
    return write(folder / "changed.safetensors", {key: value for key, value in tensors.items() if value is not None})


def cut(five, folder):
    path = folder / "cut.safetensors"
    path.write_bytes(part(five, "ViT-L-14.").read_bytes()[:100_000])
    return path


def harmful(folder):
    """Writes an archive whose pickle calls os.system."""
    with zipfile.ZipFile(folder / "harm.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", CODE)
    return folder / "harm.pt"


def without(folder, name):
    """Copies Karlo-tiny's folder without one component."""
    shutil.copytree(KARLO, folder / "karlo", ignore=shutil.ignore_patterns(name, "parity*"))
    return folder / "karlo"


INTO_NEW = {
    # into a new system. case: (Karlo's files, folder for more) -> (arguments, facts in the error line)
    "another family": lambda five, to: ([part(five, "notes")], ["notes.safetensors", "known family"]),
    "nothing there": lambda five, to: ([to / "none.pt"], [to / "none.pt"]),
    "a key missing": lambda five, to: (
        [changed(five, to, "ln_final.weight")],
        ["changed.safetensors", "lacks", "ln_final.weight"],
    ),
    "a key too many": lambda five, to: (
        [changed(five, to, "visual.extra", np.zeros(2))],
        ["changed.safetensors", "unexpected", "visual.extra"],
    ),
    "a wrong shape": lambda five, to: (
        [changed(five, to, "ln_final.weight", np.zeros(63))],
        ["changed.safetensors", "ln_final.weight [63]", "params/text/ln_final/scale [64]"],
    ),
    "cut short": lambda five, to: ([cut(five, to)], ["cut.safetensors", "damaged"]),
    "code": lambda five, to: ([harmful(to)], ["harm.pt", "run code", "posix.system"]),
    "no decoder": lambda five, to: ([without(to, "decoder")], [to / "karlo", "lacks decoder"]),
    "no weights": lambda five, to: (
        [without(to, "diffusion_pytorch_model.safetensors")],
        [to / "karlo/prior", "no weights", "diffusion_pytorch_model.safetensors"],
    ),
    "no CLIP": lambda five, to: (
        [part(five, "decoder")],
        ["decoder-ckpt", "Karlo decoder", "CLIP"],
    ),
    "no statistics": lambda five, to: (
        [part(five, "ViT-L-14."), part(five, "prior")],
        ["prior-ckpt", "stats/mean", "stats/std", "ViT-L-14_stats.th"],
    ),
    "statistics alone": lambda five, to: ([part(five, "ViT-L-14_")], ["ViT-L-14_stats", "complete prior"]),
    "an image tower alone": lambda five, to: (
        [VARIATIONS / "image_encoder"],
        ["image_encoder", "complete clip", "text encoder"],
    ),
    "a prior of another CLIP": lambda five, to: (
        [part(five, "ViT-L-14."), KARLO / "prior"],
        ["karlo_tiny/prior", "PriorTransformer", 64, 48],
    ),
    "two CLIPs": lambda five, to: (
        [KARLO / "text_encoder", part(five, "ViT-L-14.")],
        ["text_encoder", "ViT-L-14.safetensors", "stage clip"],
    ),
    "another vocabulary": lambda five, to: (
        [FIXTURES / "weights" / "clip_torchscript.pt", "--tokenizer", KARLO / "tokenizer"],
        ["karlo_tiny/tokenizer", "578 tokens", "clip_torchscript.pt", 40],
    ),
    "no tokenizer there": lambda five, to: (
        [part(five, "ViT-L-14."), "--tokenizer", to],
        [to, "CLIP tokenizer"],
    ),
}


@pytest.mark.parametrize("mistake", INTO_NEW)
def test_an_import_that_fails_writes_nothing(mistake, five, tmp_path):
    words, facts = INTO_NEW[mistake](five, tmp_path)
    before = listing(tmp_path)
    assert_error(run(weights, "import", "auto", *words, tmp_path / "new"), *facts)
    assert listing(tmp_path) == before


INTO_SYSTEM = {
    # the same, into a system that has a CLIP
    "an existing stage": lambda five, to: ([part(five, "ViT-L-14.")], ["clip exists"]),
    "the second stage of two": lambda five, to: (
        [part(five, "decoder"), KARLO / "prior"],
        ["karlo_tiny/prior", "48 dimensions", 64],
    ),
    "no statistics": lambda five, to: ([part(five, "prior")], ["prior-ckpt", "stats/mean", "stats/std"]),
}


@pytest.mark.parametrize("mistake", INTO_SYSTEM)
def test_an_import_that_fails_leaves_the_system_unchanged(mistake, five, system, tmp_path):
    words, facts = INTO_SYSTEM[mistake](five, tmp_path)
    before = listing(system)
    assert_error(run(weights, "import", "auto", *words, system), *facts)
    assert listing(system) == before


def test_a_wrong_kind(five, tmp_path):
    for kind in ("glide", "adm", "karlo", "kandinsky", "open_clip"):
        path = part(five, "ViT-L-14.") if kind != "open_clip" else part(five, "prior")
        done = run(weights, "import", kind, path, tmp_path / "new")
        assert_error(done, path, f"kind {kind}")
    assert_error(run(weights, "import", "glyde", path, tmp_path / "new"), "'glyde'", "glide", code=2)
    given = (part(five, "decoder"), tmp_path / "new", "--tokenizer", KARLO / "tokenizer")
    assert_error(run(weights, "import", "auto", *given), "tokenizer", "CLIP", code=2)
    assert not (tmp_path / "new").exists()


def test_a_folder_that_cannot_be_written(five, system, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    clip = part(five, "ViT-L-14.")
    done = run(weights, "import", "auto", clip, tmp_path / "file" / "system")
    assert_error(done, tmp_path / "file" / "system", "cannot be written", "another folder")
    done = run(weights, "export", "hf_clip", system, tmp_path / "file" / "out")
    assert_error(done, tmp_path / "file" / "out", "cannot be written", "another folder")


def test_systems_that_cannot_be_exported(system, tmp_path):
    done = run(weights, "export", "diffusers", system, tmp_path / "out")
    assert_error(done, "decoder", "upsampler_1")
    done = run(weights, "export", "hf_clip", tmp_path / "none", tmp_path / "out")
    assert_error(done, tmp_path / "none")
    assert not listing(tmp_path)


# --- processes that end in the middle -------------------------------------------------------


@pytest.fixture(scope="module")
def runner():
    with ThreadPoolExecutor(1) as pool:
        yield CommandRunner(environment(JAX_ENABLE_COMPILATION_CACHE="false"), pool)


def words(*given):
    return ["-m", "dalle2_jax", "weights", "import", "auto", *given]


def test_a_full_disk(runner, five, tmp_path):
    """With a limit of 200 kB per file CLIP can be written, the decoder cannot."""
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
    limit += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    done = runner.run("-c", limit, *words(five, tmp_path / "new"))
    done.stderr = done.stderr[done.stderr.find("error: ") :]
    assert_one_line(done, 1, str(tmp_path / "new"), os.strerror(errno.EFBIG))
    assert not listing(tmp_path)


def test_the_next_import_removes_what_a_killed_one_left(runner, five, system, tmp_path):
    shutil.copytree(system, tmp_path / "system")
    root, before = tmp_path / "system", listing(tmp_path / "system")
    process = runner.start(*words(part(five, "decoder"), part(five, "improved"), root))
    end = time.monotonic() + TIMEOUT
    while process.poll() is None and not [*root.glob(".importing-*/decoder")]:
        assert time.monotonic() < end
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = root.glob(".importing-*")
    assert {path: held for path, held in listing(root).items() if left not in (path, *path.parents)} == before
    assert load.load_system(root, make_mesh(MeshConfig())).keys() == {"clip"}
    run_ok(weights, "import", "auto", part(five, "decoder"), root)
    assert sorted(path.name for path in root.iterdir()) == ["clip", "decoder"]
