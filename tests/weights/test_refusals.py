"""Whatever an import cannot do is said in one line that names the file and the key, and nothing is left half-written."""

import os
import shutil
import signal
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor

import checkpoints
import numpy as np
import pytest
from checkpoints import FIXTURES, KARLO, VARIATIONS, assert_refused, good, listing, read, run, take, write
from command_line import PATIENCE, Shop, assert_one_line

from dalle2_jax import build
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights import __main__ as weights

CODE = b"cposix\nsystem\n(S'echo harm'\ntR."


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    return checkpoints.karlo_five(tmp_path_factory.mktemp("files"))


@pytest.fixture(scope="module")
def system(tmp_path_factory, five):
    """A system with a CLIP alone. Nothing here changes it."""
    return take(tmp_path_factory.mktemp("system") / "clip", five / "ViT-L-14.safetensors")


def part(five, name):
    """The file of a part of Karlo."""
    (path,) = (path for path in five.iterdir() if path.name.startswith(name))
    return path


def changed(five, folder, key, value=None):
    """CLIP's file with another value for a key, or none."""
    tensors = read(part(five, "ViT-L-14.")) | {key: value}
    return write(folder / "changed.safetensors", {key: value for key, value in tensors.items() if value is not None})


def cut(five, folder):
    path = folder / "cut.safetensors"
    path.write_bytes(part(five, "ViT-L-14.").read_bytes()[:100_000])
    return path


def harmful(folder):
    """An archive whose description asks for the shell."""
    with zipfile.ZipFile(folder / "harm.pt", "w") as archive:
        archive.writestr("x/constants.pkl", b"")
        archive.writestr("x/data.pkl", CODE)
    return folder / "harm.pt"


def without(folder, name):
    """Karlo-tiny's folder but for one component."""
    shutil.copytree(KARLO, folder / "karlo", ignore=shutil.ignore_patterns(name, "parity*"))
    return folder / "karlo"


ALONE = {
    # into a folder that is not there: what is given, of Karlo's files and a folder for more; parts of the line
    "another family": lambda five, to: ([part(five, "notes")], ["notes.safetensors is none of the families known"]),
    "nothing there": lambda five, to: ([to / "none.pt"], ["there is nothing at", "none.pt"]),
    "a key missing": lambda five, to: (
        [changed(five, to, "ln_final.weight")],
        ["changed.safetensors lacks tensor ln_final.weight"],
    ),
    "a key too many": lambda five, to: (
        [changed(five, to, "visual.extra", np.zeros(2))],
        ["changed.safetensors has tensor visual.extra with no place here"],
    ),
    "a wrong shape": lambda five, to: (
        [changed(five, to, "ln_final.weight", np.zeros(63))],
        ["changed.safetensors: ln_final.weight [63] does not fit params/text/ln_final/scale [64]"],
    ),
    "cut short": lambda five, to: ([cut(five, to)], ["cut.safetensors is damaged or cut short"]),
    "code": lambda five, to: ([harmful(to)], ["harm.pt holds more than weights", "could run code (posix.system)"]),
    "no decoder": lambda five, to: ([without(to, "decoder")], ["karlo lacks decoder: get the whole folder"]),
    "no weights": lambda five, to: (
        [without(to, "diffusion_pytorch_model.safetensors")],
        ["prior holds no weights: diffusion_pytorch_model.safetensors is missing"],
    ),
    "no CLIP": lambda five, to: (
        [part(five, "decoder")],
        ["decoder-ckpt", "(Karlo decoder) needs the CLIP it was trained with", "import auto CLIP"],
    ),
    "no statistics": lambda five, to: (
        [part(five, "ViT-L-14."), part(five, "prior")],
        ["prior-ckpt", "says nothing of parameters stats/mean, stats/std (ViT-L-14_stats.th completes it)"],
    ),
    "statistics alone": lambda five, to: ([part(five, "ViT-L-14_")], ["is no whole prior: give the prior too"]),
    "an image tower alone": lambda five, to: (
        [VARIATIONS / "image_encoder"],
        ["image_encoder (CLIP image encoder (transformers)) is no whole clip: give the text encoder too"],
    ),
    "a prior of another CLIP": lambda five, to: (
        [part(five, "ViT-L-14."), KARLO / "prior"],
        ["karlo_tiny/prior (prior (PriorTransformer)) does not fit a CLIP of 64 dimensions", "of 48"],
    ),
    "two CLIPs": lambda five, to: (
        [KARLO / "text_encoder", part(five, "ViT-L-14.")],
        ["text_encoder and", "ViT-L-14.safetensors both hold stage clip"],
    ),
    "another vocabulary": lambda five, to: (
        [FIXTURES / "weights" / "clip_torchscript.pt", "--tokenizer", KARLO / "tokenizer"],
        ["karlo_tiny/tokenizer has 578 tokens", "clip_torchscript.pt knows 40"],
    ),
    "no tokenizer there": lambda five, to: (
        [part(five, "ViT-L-14."), "--tokenizer", to],
        ["holds no CLIP tokenizer"],
    ),
}


@pytest.mark.parametrize("mistake", ALONE)
def test_nothing_is_made_of_it(mistake, five, tmp_path):
    words, parts = ALONE[mistake](five, tmp_path)
    before = listing(tmp_path)
    assert_refused(run(weights, "import", "auto", *words, tmp_path / "new"), *parts)
    assert listing(tmp_path) == before


BESIDE = {
    # the same, into the system with a CLIP
    "a stage that is there": lambda five, to: ([part(five, "ViT-L-14.")], ["clip is there already: remove it"]),
    "the second stage of two": lambda five, to: (
        [part(five, "decoder"), KARLO / "prior"],
        ["does not fit a CLIP of 64 dimensions"],
    ),
    "no statistics": lambda five, to: ([part(five, "prior")], ["says nothing of parameters stats/mean, stats/std"]),
}


@pytest.mark.parametrize("mistake", BESIDE)
def test_a_system_stays_as_it_was(mistake, five, system, tmp_path):
    words, parts = BESIDE[mistake](five, tmp_path)
    before = listing(system)
    assert_refused(run(weights, "import", "auto", *words, system), *parts)
    assert listing(system) == before


def test_another_kind_than_it_is(five, tmp_path):
    for kind in ("glide", "adm", "karlo", "kandinsky", "open_clip"):
        path = part(five, "ViT-L-14.") if kind != "open_clip" else part(five, "prior")
        done = run(weights, "import", kind, path, tmp_path / "new")
        assert_refused(done, path, f"is no {kind} checkpoint")
    assert_refused(run(weights, "import", "glyde", path, tmp_path / "new"), "invalid choice: 'glyde'", code=2)
    given = (part(five, "decoder"), tmp_path / "new", "--tokenizer", KARLO / "tokenizer")
    assert_refused(run(weights, "import", "auto", *given), "--tokenizer is CLIP's", code=2)
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written(five, system, tmp_path):
    (tmp_path / "file").write_text("not a folder")
    clip = part(five, "ViT-L-14.")
    done = run(weights, "import", "auto", clip, tmp_path / "file" / "system")
    assert_refused(done, tmp_path / "file", "cannot be written (Not a directory): choose another folder")
    done = run(weights, "export", "hf_clip", system, tmp_path / "file" / "out")
    assert_refused(done, tmp_path / "file", "cannot be written (Not a directory): choose another folder")


def test_systems_that_cannot_go_out(system, tmp_path):
    done = run(weights, "export", "diffusers", system, tmp_path / "out")
    assert_refused(done, "unCLIP's pipelines need stage decoder, upsampler_1")
    done = run(weights, "export", "hf_clip", tmp_path / "none", tmp_path / "out")
    assert_refused(done, "there is no system at", tmp_path / "none")
    assert not listing(tmp_path)


# --- processes that end in the middle -------------------------------------------------------


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    with ThreadPoolExecutor(1) as pool:
        yield Shop(environment | {"JAX_ENABLE_COMPILATION_CACHE": "false"}, pool)


def words(*given):
    return ["-m", "dalle2_jax.weights", "import", "auto", *given]


def test_a_full_disk(shop, five, tmp_path):
    """No file may grow over 200 kB: CLIP is written, the decoder is not."""
    limit = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
    limit += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    done = shop.run("-c", limit, *words(five, tmp_path / "new"))
    done.stderr = done.stderr[done.stderr.find("error: ") :]
    assert_one_line(done, 1, "cannot be written", "File too large", "make room")
    assert not listing(tmp_path)


def test_a_kill_leaves_what_the_next_import_removes(shop, five, system, tmp_path):
    shutil.copytree(system, tmp_path / "system")
    root, before = tmp_path / "system", listing(tmp_path / "system")
    process = shop.start(*words(part(five, "decoder"), part(five, "improved"), root))
    end = time.monotonic() + PATIENCE
    while process.poll() is None and not [*root.glob(".importing-*/decoder")]:
        assert time.monotonic() < end
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    (left,) = root.glob(".importing-*")
    assert {path: held for path, held in listing(root).items() if left not in (path, *path.parents)} == before
    assert build.load_system(root, make_mesh(MeshConfig())).keys() == {"clip"}
    good(weights, "import", "auto", part(five, "decoder"), root)
    assert sorted(path.name for path in root.iterdir()) == ["clip", "decoder"]
