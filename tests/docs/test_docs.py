"""Every command and every Python block of the README and the documentation runs, at tiny sizes, page by page.

A page runs in a folder of its own: with the tiny pages of ``tiny_pages.py`` in place of configs/, and with the systems
and files that its text takes for granted.
"""

import contextlib
import importlib.util
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
import warnings

import checkpoints
import cv2
import jax
import numpy as np
import pytest
import tiny_pages
from doc_blocks import NOT_RUN, ROOT, blocks, commands, is_shell, tiny
from emoji_packages import write_packages

from dalle2_jax import cli, pretrained
from dalle2_jax.cli import serve
from dalle2_jax.config import sweep

PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
RUN_ELSEWHERE = ("python.md", "serving.md")
"""Pages that ``test_docs_python.py`` and ``tests/server/test_serving_page.py`` run."""

NOTEBOOKS = sorted(ROOT.glob("examples/*.ipynb"))

SMALL = (
    # text of Python code: its size in tests. Sizes are those of commands, whose programs are then compiled already.
    (r"STEPS = \d+", "STEPS = 3"),
    (r"\b(num|frames)=([3-9]|\d\d+)\b", r"\1=2"),
    (r'("steps": |\bsteps=)\d\d+\b', r"\g<1>8"),
    (r"(?m)^SAMPLES = \d+", "SAMPLES = 1000"),
    (r'"(clip|prior|decoder)": \d+', r'"\1": 2'),
)

GIVEN = {
    # page: what its commands and blocks find in their folder, see Given
    "README.md": ("demo", "included", "digits", "karlo", "shared"),
    "degradation.md": ("images",),
    "diffusion.md": ("demo", "karlo"),
    "distillation.md": ("demo",),
    "editing.md": ("demo", "images"),
    "embeddings.md": ("digits",),
    "emoji.md": ("included",),
    "evaluation.md": ("demo", "digits", "included"),
    "feature_networks.md": ("demo",),
    "fine_tuning.md": ("imported", "images"),
    "memory.md": ("images",),
    "pods.md": ("demo", "shared"),
    "pretrained.md": ("demo", "included"),
    "public_weights.md": ("karlo", "images"),
    "report.md": ("demo",),
    "sampling.md": ("demo",),
    "sweeps.md": ("demo",),
    "own_data.md": ("digits", "tars"),
    "paper.md": ("demo", "included"),
    "quickstart.md": ("demo", "included"),
    "face.md": ("demo",),
    "quickstart.ipynb": ("demo",),
}

MAKES_DIGITS = ("README.md", "own_data.md")
"""Pages that write the digits themselves, and then train on them what is trained already."""

MAKES_EMOJI = ("emoji.md",)
"""Pages that write the data set of emoji: here from tiny packages in the folder ``packages``, without SVG."""

ABSENT = (
    "tensorflow_datasets",
    "base.pt",
    "64_256_upsampler.pt",
    "best.pth",
    "laion/images",
    "configs/emoji.py",
    "emoji/images",
    "folder:runs/emoji-",
    "docs/emoji_report",
    "published/",
    "runs/inception",
    "runs/lpips",
    "v4:",
    "v5e",
    "v5p",
    "v6e:",
    "h100:",
    "h200:",
)
"""Commands with one of these need files or compilers that no test has, or take long;
``test_documented_commands.py`` parses them."""


def run(words):
    """Runs a command of this package in this process; it must succeed."""
    assert cli.main(list(map(str, words))) == 0, words


def run_here(command):
    """Runs a command of a sweep in this process, not in one of its own, at tiny sizes; returns its exit code."""
    return cli.main(tiny(["dalle2", *command[len(sweep.COMMAND) :]])[1:])


def train(page, stage, root, *more):
    """Trains a tiny stage."""
    run(["train", "--config", f"configs/{page}.py:{stage}", "--workdir", root, *more])


# --- what pages take for granted --------------------------------------------------------------


class Given:
    """Makes, once in the file, what pages find in their folder."""

    def __init__(self, root):
        self.root, self.made = root, set()

    def make(self, name):
        """Returns the folder with a given thing; it is made at the first call."""
        folder = self.root / name
        if name not in self.made:
            folder.mkdir(exist_ok=True)
            tiny_pages.write(folder / "configs")
            with contextlib.chdir(folder):
                getattr(self, name)(folder)
            self.made.add(name)
        return folder

    def demo(self, folder):
        """A system of tiny shapes."""
        for stage in ("clip", "prior", "decoder", "upsampler_1"):
            train("shapes", stage, "runs/demo")
        self.images(folder)

    def included(self, folder):
        """A tiny system under the names of those that come with the package."""
        run(["weights", "pack", self.make("demo") / "runs" / "demo", folder / "included" / "shapes"])
        shutil.copytree(folder / "included" / "shapes", folder / "included" / "emoji")

    def digits(self, folder):
        """The digits and a system trained on them."""
        run(["data", "digits", "runs/digits-data"])
        for stage in ("clip", "prior", "decoder"):
            train("folder", stage, "runs/digits", "--config.data.path=runs/digits-data")

    def images(self, folder):
        """Images, a mask, and a folder of captioned images."""
        noise = np.random.default_rng(0)
        (folder / "my-images").mkdir()
        for name in ("in", "a", "b", *(f"my-images/{number}" for number in range(16))):
            cv2.imwrite(str(folder / f"{name}.png"), noise.integers(256, size=(64, 64, 3), dtype=np.uint8))
        for number in range(16):
            (folder / "my-images" / f"{number}.txt").write_text("a caption of some words")
        mask = np.zeros((64, 64, 3), np.uint8)
        mask[:, 32:] = 255
        cv2.imwrite(str(folder / "mask.png"), mask)

    def karlo(self, folder):
        """Karlo's parts, tiny, in two folders."""
        checkpoints.karlo_five(folder / "karlo")
        (folder / "karlo-variations").mkdir()
        (folder / "karlo" / "ViT-L-14.safetensors").rename(folder / "karlo-variations" / "ViT-L-14.safetensors")

    def imported(self, folder):
        """A system imported from them."""
        karlo = self.make("karlo")
        run(["weights", "import", "auto", karlo / "karlo", karlo / "karlo-variations", folder / "runs" / "karlo"])

    def shared(self, folder):
        """A shared folder with images, and a workdir with CLIP."""
        shutil.copytree(self.make("demo") / "runs" / "demo" / "clip", folder / "shared" / "run" / "clip")
        shutil.copytree(self.make("demo") / "my-images", folder / "shared" / "images")

    def tars(self, folder):
        """A hundred tar shards of one image each."""
        (folder / "data").mkdir()
        digits = self.make("digits") / "runs" / "digits-data"
        images = sorted(digits.rglob("*.png"))[:100]
        for number, image in enumerate(images):
            parts = {"png": image.read_bytes(), "txt": b"a digit", "json": b'{"similarity": 0.5}'}
            write_tar(folder / "data" / f"{number:05d}.tar", f"{number:09d}", parts)


def write_tar(path, key, parts):
    """Writes a tar shard of one record."""
    with tarfile.open(path, "w") as tar:
        for suffix, content in parts.items():
            member = tarfile.TarInfo(f"{key}.{suffix}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    return Given(tmp_path_factory.mktemp("given"))


@pytest.fixture
def folder(request, given, tmp_path, monkeypatch):
    """The current folder of a page's commands."""
    page = request.getfixturevalue("page").name
    tiny_pages.write(tmp_path / "configs")
    for name in GIVEN.get(page, ()):
        shutil.copytree(given.make(name), tmp_path, symlinks=True, dirs_exist_ok=True)
    if "included" in GIVEN.get(page, ()):
        monkeypatch.setattr(pretrained, "FOLDER", tmp_path / "included")
    if page in MAKES_EMOJI:
        (tmp_path / "packages").mkdir()
        write_packages(tmp_path / "packages", monkeypatch)
    if page in MAKES_DIGITS:
        shutil.rmtree(tmp_path / "runs" / "digits-data")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sweep, "run_command", run_here)
    for name in [name for name in sys.modules if name.split(".")[0] == "configs"]:
        monkeypatch.delitem(sys.modules, name)
    return tmp_path


# --- running ----------------------------------------------------------------------------------


def check_foreign(words):
    """Checks what can be checked of a command that is not run."""
    if words[0] == "make":
        assert re.search(rf"^{words[-1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), words
    if words[0] == "pip" and "[" in words[-1]:
        extras = re.findall(r"^(\w+) =$", (ROOT / "setup.cfg").read_text().partition("extras_require")[2], re.MULTILINE)
        assert {*words[-1].partition("[")[2].rstrip("]").split(",")} <= {*extras}, words


def execute(words):
    """Runs a command of a page."""
    if words[0] in NOT_RUN:
        return check_foreign(words)
    if words[1] == "-c" or any(name in word for word in words for name in ABSENT):
        return None
    words = [word.replace("/shared/", "shared/") for word in tiny(words)]
    if words[0] in ("ln", "mkdir"):
        return subprocess.run(words, check=True)
    if words[:2] == ["dalle2", "--version"]:
        return None
    if words[:2] == ["dalle2", "serve"]:  # it ends with a signal; tests/server runs it
        return serve.read_config(serve.make_parser().parse_args(words[2:]))
    if words[:3] == ["dalle2", "data", "emoji"]:
        words = [*words, "--from", "packages", "--styles", "noto,fluent_3d", "--resolution", "32"]
    if words[0] == "dalle2":
        return run(words[1:])
    assert words[0] == "python", words
    if words[1] in ("train.py", "sample.py"):
        return run([words[1].removesuffix(".py"), *words[2:]])
    assert (ROOT / words[1]).exists(), words
    return None


def execute_python(text, names, path, line=1):
    """Runs Python code as users do, at `SMALL` sizes, without strict promotion; tracebacks name its file and line."""
    for pattern, small in SMALL:
        text = re.sub(pattern, small, text)
    code = compile("\n" * (line - 1) + text, str(path), "exec")
    with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        warnings.simplefilter("ignore", UserWarning)  # of unfinished stages and truncated captions
        exec(code, names)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in RUN_ELSEWHERE], ids=lambda page: page.name)
def test_page(page, folder):
    names = {"__name__": page.name}
    for block in blocks(page):
        if is_shell(block):
            for words in commands(block):
                execute(words)
        elif block.language == "python":
            execute_python(block.text, names, page, block.line)


@pytest.mark.parametrize("page", NOTEBOOKS, ids=lambda page: page.name)
def test_notebook(page, folder):
    cells = json.loads(page.read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs") or cell.get("execution_count")], "clear the outputs"
    texts = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    names = {"__name__": "__main__"}
    for text in texts:
        execute_python(text, names, page)


def test_configuration_reference_is_current():
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        spec = importlib.util.spec_from_file_location("configuration", ROOT / "docs" / "configuration.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert module.PAGE.read_text() == module.page(), "run python docs/configuration.py"


def test_every_page_is_in_the_site():
    listed = set(re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE))
    assert {str(page.relative_to(ROOT / "docs")) for page in PAGES[1:]} <= listed
