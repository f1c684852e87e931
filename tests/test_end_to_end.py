"""The real command line, in processes of its own: train, kill, resume, sample, evaluate, and every mistake.

One tiny system (``tiny_system.py``) is trained once. Compiled programs are kept between processes, so
that all but the first start in seconds; two processes run at a time.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
import resource
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import tiny_system
from PIL import Image
from tiny_system import CHECKPOINT_EVERY, STEPS

from dalle2_jax import build, text
from dalle2_jax.sections import expand
from dalle2_jax.training.optim import OptimConfig, make_optimizer
from dalle2_jax.training.sharding import with_shardings
from dalle2_jax.training.step import abstract_state, state_shardings
from dalle2_jax.workdir import Checkpoints, StageFolder

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = "tests/tiny_system.py"
PATIENCE = 900  # seconds; only a hang takes so long
PROMPTS = ["a large red circle", ""]


@dataclasses.dataclass(frozen=True)
class Shop:
    """Where commands run: the environment that they share, and a pool that runs two at a time."""

    environment: dict
    pool: ThreadPoolExecutor

    def start(self, *words, **options):
        """Starts ``python WORDS`` and returns its Popen."""
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        return subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, env=self.environment, **pipes, **options)

    def run(self, *words, **options):
        """Runs ``python WORDS`` to its end; returns the CompletedProcess."""
        with self.start(*words, **options) as process:
            out, err = process.communicate(timeout=PATIENCE)
        return subprocess.CompletedProcess(words, process.returncode, out, err)

    def good(self, *words):
        """Runs a command that must succeed; returns what it printed."""
        done = self.run(*words)
        assert done.returncode == 0, f"{words}\n{done.stdout}\n{done.stderr}"
        return done

    def train(self, stage, root, *overrides):
        """Trains a stage that must end well."""
        return self.good(*train_words(stage, root, *overrides))


def train_words(stage, root, *overrides):
    return ["train.py", "--config", f"{CONFIG}:{stage}", "--workdir", root, *overrides]


def sample_words(system, out, *words):
    return ["sample.py", "text2image", "--system", system, "--out", out, *words]


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")), "PYTHONWARNINGS": "default"}
    with ThreadPoolExecutor(2) as pool:
        yield Shop(environment, pool)


@pytest.fixture(scope="session")
def system(shop, tmp_path_factory):
    """A whole system, trained without a break. Tests that change something change a copy."""
    root = tmp_path_factory.mktemp("system") / "tiny"
    for stages in (("clip", "upsampler_1"), ("prior", "decoder")):
        list(shop.pool.map(lambda stage: shop.train(stage, root), stages))
    return root


def copy_of(system, root, *stages):
    """Copies stages of a system; returns the new system's folder."""
    for stage in stages:
        shutil.copytree(system / stage, root / stage)
    return root


def contents(root):
    """Returns a digest of every file below a folder, by path."""
    return {str(path): hashlib.md5(path.read_bytes()).hexdigest() for path in root.rglob("*") if path.is_file()}


# --- training, killing, resuming ------------------------------------------------------------


def restored(root, name):
    """Reads a stage's newest checkpoint back, on one device."""
    vocab_size = text.load_tokenizer(root / "clip" / "tokenizer").vocab_size if (root / "clip").is_dir() else None
    clip = vocab_size and build.build_stage(tiny_system.get_config("clip").to_dict(), vocab_size, None)
    config = tiny_system.get_config(name).to_dict()
    stage = build.build_stage(config, vocab_size, clip)
    optimizer = make_optimizer(expand(OptimConfig, config["optim"], "optim"), STEPS)
    axes = (jax.sharding.AxisType.Auto,) * 3
    mesh = jax.make_mesh((1, 1, 1), ("data", "fsdp", "tensor"), axis_types=axes, devices=jax.devices()[:1])
    target = with_shardings(abstract_state(stage, optimizer), state_shardings(stage, optimizer, mesh))
    return Checkpoints(StageFolder(root, name)).restore(target.trees())


def logged(root, name):
    """Returns the lines of metrics.jsonl without the timings."""
    lines = [json.loads(line) for line in (root / name / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in ("examples_per_second", "data_wait")} for line in lines]


def assert_same_end(root, reference, name):
    """A run ended as another: the same bits in parameters, average and optimizer, data position and log."""
    one, other = restored(root, name), restored(reference, name)
    assert one.step == other.step == STEPS and not one.skipped
    assert {"params", "ema", "opt_state"} <= one.trees.keys()
    assert jax.tree.structure(one.trees) == jax.tree.structure(other.trees)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(one.trees), jax.tree.leaves(other.trees), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b), err_msg=jax.tree_util.keystr(path))
    assert one.data_state == other.data_state
    assert logged(root, name) == logged(reference, name)
    assert not [path for path in (root / name).rglob("*") if "tmp" in path.name]


def steps_in(root, name):
    folder = root / name / "checkpoints"
    return sorted(int(path.name) for path in folder.glob("*") if path.name.isdigit())


MOMENTS = {
    # when to kill: what must be there by then, of a stage's folder
    "at the start": lambda folder: (folder / "config.json").exists(),
    "in the first steps": lambda folder: (folder / "metrics.jsonl").exists() and (folder / "metrics.jsonl").stat().st_size,
    "while a checkpoint is written": lambda folder: any(int(p.name.split(".")[0]) >= 8 for p in folder.glob("*/*tmp*")),
    "late": lambda folder: (folder / "checkpoints" / "16").exists(),
}


def kill_when(shop, moment, stage, root):
    """Starts training and kills it, as ``kill -9`` does, at the moment."""
    process = shop.start(*train_words(stage, root))
    reached, end = MOMENTS[moment], time.monotonic() + PATIENCE
    while process.poll() is None and not reached(root / stage):
        assert time.monotonic() < end, moment
        time.sleep(0.001)
    process.kill()
    out, err = process.communicate()
    assert process.returncode == -signal.SIGKILL, f"ended before it was killed {moment}: {out}\n{err}"
    return out


def test_uninterrupted_run(system):
    """What the whole system leaves on disk."""
    for stage in ("clip", "prior", "decoder", "upsampler_1"):
        assert steps_in(system, stage) == [STEPS - CHECKPOINT_EVERY, STEPS]  # the two that keep_checkpoints asks for
        lines = [json.loads(line) for line in (system / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(2, STEPS + 1, 2))
        assert all({"loss", "examples_per_second"} <= line.keys() for line in lines)
    contracts = [json.loads((system / stage / "contract.json").read_text()) for stage in ("clip", "prior", "decoder")]
    assert contracts[0] == contracts[1] == contracts[2]
    assert (contracts[0]["dim"], contracts[0]["scale"]) == (8, 1.5)


def test_killed_again_and_again(shop, system, tmp_path):
    """Killed in turn at every moment, by the same command it ends as if nothing had happened."""
    for moment in MOMENTS:
        out = kill_when(shop, moment, "clip", tmp_path)
        assert "Traceback" not in out
    last = steps_in(tmp_path, "clip")[-1]
    assert last >= 16
    assert f"clip: continues from step {last}" in shop.train("clip", tmp_path).stdout
    assert_same_end(tmp_path, system, "clip")
    again = contents(tmp_path / "clip" / "checkpoints")
    assert f"clip: {STEPS} steps" in shop.train("clip", tmp_path).stdout  # a finished run has nothing to do
    assert contents(tmp_path / "clip" / "checkpoints") == again


def test_every_stage_survives_a_kill(shop, system, tmp_path):
    """One kill a stage, each at another moment."""

    def killed_and_resumed(stage, moment):
        root = copy_of(system, tmp_path / stage, "clip") if stage != "upsampler_1" else tmp_path / stage
        kill_when(shop, moment, stage, root)
        shop.train(stage, root)
        assert_same_end(root, system, stage)

    moments = {"prior": "while a checkpoint is written", "decoder": "late", "upsampler_1": "in the first steps"}
    list(shop.pool.map(killed_and_resumed, moments, moments.values()))


def damage(system, stage, step):
    """Cuts the arrays of a checkpoint short."""
    files = [path for path in (system / stage / "checkpoints" / str(step)).rglob("d/*") if path.is_file()]
    assert files
    for path in files:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_damaged_checkpoint(shop, system, tmp_path):
    """Training and sampling fall back on the one before, and say so; training then ends as it should."""
    root = copy_of(system, tmp_path, "clip", "prior", "decoder")
    damage(root, "clip", STEPS)
    damage(root, "decoder", STEPS)
    sampled = shop.pool.submit(shop.good, *sample_words(root, tmp_path / "out", "--prompt", "red", "--num", "1"))
    assert f"checkpoints/{STEPS} cannot be read" in sampled.result().stderr
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["checkpoints"]["decoder"] == STEPS - CHECKPOINT_EVERY
    said = shop.train("clip", root).stdout
    assert f"checkpoints/{STEPS} cannot be read" in said and f"continues from step {STEPS - CHECKPOINT_EVERY}" in said
    assert_same_end(root, system, "clip")


def test_no_space(shop, system, tmp_path):
    """No file may grow over 30 kB, so no checkpoint is written: one line; with space again, the run goes on."""

    def cramped():
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))

    done = shop.run(*train_words("upsampler_1", tmp_path), preexec_fn=cramped)
    assert_one_line(done, 1, "a checkpoint cannot be written to", "File too large", "make room")
    assert not steps_in(tmp_path, "upsampler_1")
    shop.train("upsampler_1", tmp_path)
    assert_same_end(tmp_path, system, "upsampler_1")


def test_pictures_while_training(shop, tmp_path):
    overrides = ("--config.sample_every=4", "--config.total_steps=8")
    shop.train("upsampler_1", tmp_path, *overrides)
    assert sorted(path.name for path in (tmp_path / "upsampler_1" / "samples").iterdir()) == [
        "00000004.png",
        "00000008.png",
    ]


# --- sampling and measuring -----------------------------------------------------------------

LONG = "a red circle " * 20


@pytest.fixture(scope="module")
def drawn(shop, system, tmp_path_factory):
    """Two runs of one command, one with batches of 1 and one of 4 by what samples.json of the first says."""
    root = tmp_path_factory.mktemp("drawn")
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    given = [*words, "--num", "3", "--seed", "5", "--decoder.steps", "3", "--decoder.guidance", "1.5"]
    given += ["--upsampler_1.sampler", "ddpm", "--prior.candidates", "3"]
    first, again = shop.pool.map(
        lambda name: shop.good(*sample_words(system, root / name, *given)), ("first", "again")
    )
    assert first.stderr.count("warning") == again.stderr.count("warning") == 0
    written = json.loads((root / "first" / "samples.json").read_text())
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    told = ["--prompts", root / "prompts.txt", "--num", "3", "--seed", written["seed"]]
    told += ["--prior.candidates", written["candidates"]]
    for stage, sampling in written["sampling"].items():
        told += [f"--{stage}.sampler", sampling["name"], f"--{stage}.steps", sampling["steps"]]
        told += [f"--{stage}.guidance", sampling["guidance"]]
        told += [f"--{stage}.eta", sampling["eta"]] if sampling["name"] == "ddim" else []
    list(
        shop.pool.map(
            lambda size: shop.good(*sample_words(system, root / f"by_{size}", *told, "--batch_size", size)), (1, 4)
        )
    )
    return root


def pixels(folder):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob("*_*.png")}


def test_same_command_same_files(drawn):
    names = {f"{i}_{j}.png" for i in range(len(PROMPTS)) for j in range(3)} | {"grid.png", "samples.json"}
    assert {path.name for path in (drawn / "first").iterdir()} == names
    for name in names:
        assert (drawn / "first" / name).read_bytes() == (drawn / "again" / name).read_bytes(), name


@pytest.mark.parametrize("size", [1, 4])
def test_batch_size_changes_no_picture(drawn, size):
    """And samples.json alone says how to draw them again."""
    first, other = pixels(drawn / "first"), pixels(drawn / f"by_{size}")
    assert first.keys() == other.keys() and len(first) == 6
    for name, picture in first.items():
        assert picture.shape == (16, 16, 3)
        assert np.abs(picture - other[name]).max() <= 1, name  # another batch size may round another way
    assert all((first[a] != first[b]).any() for a in first for b in first if a < b)


def test_samples_json(drawn, system):
    written = json.loads((drawn / "first" / "samples.json").read_text())
    assert written["command"] == "text2image" and written["system"] == str(system) and written["seed"] == 5
    assert written["clip"] == json.loads((system / "clip" / "contract.json").read_text())["clip"]
    assert written["checkpoints"] == dict.fromkeys(("clip", "prior", "decoder", "upsampler_1"), STEPS)
    sampling = written["sampling"]
    assert (sampling["decoder"]["steps"], sampling["decoder"]["guidance"]) == ("3", 1.5)
    assert sampling["upsampler_1"]["name"] == "ddpm" and sampling["prior"]["steps"] == 4
    assert written["candidates"] == 3 and {"dalle2_jax", "jax", "numpy"} <= written["versions"].keys()
    assert written["pictures"] == [
        {"file": f"{i}_{j}.png", "prompt": prompt, "index": i, "sample": j}
        for i, prompt in enumerate(PROMPTS)
        for j in range(3)
    ]
    assert Image.open(drawn / "first" / "grid.png").width > 4 * 100  # four pictures a row, enlarged


def test_ar_prior(shop, system, tmp_path):
    """The other prior takes the first one's place, and survives a kill as every stage does."""
    reference = copy_of(system, tmp_path / "reference", "clip", "decoder")
    killed = copy_of(system, tmp_path / "killed", "clip")
    kill = shop.pool.submit(kill_when, shop, "while a checkpoint is written", "ar_prior", killed)
    shop.train("ar_prior", reference)
    kill.result()
    resumed = shop.pool.submit(shop.train, "ar_prior", killed)
    shop.good(*sample_words(reference, tmp_path / "out", "--prior", "ar", "--prompt", "red", "--num", "2"))
    resumed.result()
    assert_same_end(killed, reference, "ar_prior")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0_0.png", "0_1.png", "grid.png", "samples.json"}


@pytest.mark.parametrize("command", ["retrieval", "attributes"])
def test_evaluation(shop, system, tmp_path, command):
    done = shop.good("-m", "dalle2_jax.evaluation", command, "--system", system, "--num", "6", "--out", tmp_path)
    written = json.loads((tmp_path / "results.json").read_text())
    if command == "retrieval":
        assert written.keys() == {"image_to_text", "text_to_image", "chance"}
        assert written["chance"] == pytest.approx(1 / 6)
        assert "CLIP, 6 val examples" in done.stdout and "recall@1" in done.stdout
    else:
        assert written.keys() == {"matched", "shuffled"}
        assert {"colour", "shape", "size", "all"} <= written["matched"].keys()
        assert "6 val captions" in done.stdout and "shuffled" in done.stdout
        assert (tmp_path / "grid.png").is_file()


# --- mistakes -------------------------------------------------------------------------------


def assert_one_line(done, code, *parts):
    """A mistake was said in one line on standard error, without a traceback, and with this exit code."""
    assert "Traceback" not in done.stdout + done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    for part in parts:
        assert part in done.stderr
    assert done.returncode == code, done.stderr


def mistakes(system, root):
    """Returns {name: (command, exit code, parts of the one line)}; folders of broken systems are made in ``root``."""
    file = root / "file"
    file.write_text("not a folder")
    (root / "empty").mkdir()
    no_prior = copy_of(system, root / "no_prior", "clip", "decoder")
    no_clip = copy_of(system, root / "no_clip", "prior", "decoder")
    unfinished = copy_of(system, root / "unfinished", "clip", "prior", "decoder")
    config = json.loads((unfinished / "decoder" / "config.json").read_text())
    (unfinished / "decoder" / "config.json").write_text(json.dumps({**config, "total_steps": 2 * STEPS}))
    mixed = copy_of(system, root / "mixed", "clip", "prior", "decoder")
    contract = json.loads((mixed / "prior" / "contract.json").read_text())
    (mixed / "prior" / "contract.json").write_text(json.dumps({**contract, "clip": "deadbeef"}))
    ruined = copy_of(system, root / "ruined", "clip")
    for step in steps_in(ruined, "clip"):
        damage(ruined, "clip", step)

    def train(stage, *overrides, to=root / "empty"):
        return train_words(stage, to, *overrides)

    def sample(where, *words):
        return sample_words(where, root / "out", "--prompt", "red", *words)

    evaluate = ["-m", "dalle2_jax.evaluation"]
    how = f"python train.py --config {CONFIG}:"
    return {
        # wrong words
        "unknown stage": (train("decodr"), 2, ["'decodr': did you mean 'decoder'"]),
        "unknown field": (train("clip", "--config.optim.lrr=3"), 2, ["config.optim 'lrr': did you mean 'lr'"]),
        "unknown field at the top": (train("clip", "--config.batchsize=3"), 2, ["did you mean 'batch_size'"]),
        "wrong type": (train("clip", "--config.total_steps=many"), 2, ["total_steps", "'many'"]),
        "refused value": (train("clip", "--config.log_every=0"), 2, ["config.log_every must be at least 1"]),
        "unknown dtype": (train("clip", "--config.model.dtype=half"), 2, ["config.model.dtype 'half'"]),
        "unknown flag": (train("clip", "--wrkdir=x"), 2, ["'wrkdir'. Did you mean: workdir"]),
        "stray word": (train("clip", "please"), 2, ["unexpected word 'please'"]),
        "no workdir": (["train.py", "--config", f"{CONFIG}:clip"], 2, ["--workdir FOLDER"]),
        "empty workdir": (train("clip", to=""), 2, ["--workdir FOLDER"]),
        "no config": (["train.py", "--workdir", root], 2, ["--config FILE:STAGE"]),
        "no config file": (["train.py", "--config", "confgs/x.py:clip", "--workdir", root], 2, ["confgs/x.py"]),
        "config without stage": (["train.py", "--config", CONFIG, "--workdir", root], 2, ["FILE:STAGE"]),
        "unknown command": (["sample.py", "text2imag"], 2, ["'text2imag'", "--help"]),
        "no out": (["sample.py", "text2image", "--system", system], 2, ["required: --out"]),
        "no prompt": (sample_words(system, root / "out"), 2, ["--prompt"]),
        "no pictures": (sample(system, "--num", "0"), 2, ["--num: 0 is not above 0"]),
        "unknown sampler": (sample(system, "--decoder.sampler", "ddimm"), 2, ["--decoder.*", "did you mean 'ddim'"]),
        "too many steps": (sample(system, "--decoder.steps", "5000"), 2, ["--decoder.*", "5000 of 100 steps"]),
        "stage not there": (sample(system, "--upsampler_2.steps", "3"), 2, ["upsampler_2"]),
        "seed of a giant": (sample(system, "--seed", 10**20), 2, ["--seed"]),
        "nothing to measure": ([*evaluate, "retrieval", "--system", system, "--num", "-1"], 2, ["--num"]),
        # what is not there, or not as it should be
        "no system": (sample(root / "nowhere"), 1, ["there is no system at", "train.py --workdir"]),
        "no clip yet": (train("prior"), 1, ["no trained stage clip", f"{how}clip"]),
        "missing stage": (sample(no_prior), 1, ["no trained stage prior", f"{how}prior"]),
        "missing clip": (sample(no_clip), 1, ["no trained stage clip", f"{how}clip"]),
        "unfinished stage": (sample(unfinished), 1, ["decoder", f"{STEPS} of {2 * STEPS} steps", f"{how}decoder"]),
        "other clip": (sample(mixed), 1, ["prior", "clip 'deadbeef' against", "train prior again"]),
        "other clip in training": (train("prior", to=mixed), 1, ["deadbeef", "remove", "put back"]),
        "other config": (
            train("clip", "--config.optim.lr=0.5", to=system),
            1,
            ["made with another config", "optim.lr: stored 0.001, wanted 0.5", "another --workdir"],
        ),
        "ruined checkpoints": (train("clip", to=ruined), 1, ["no checkpoint of stage clip can be read"]),
        "workdir below a file": (train("clip", to=file / "x"), 1, ["Not a directory", str(file)]),
        "out below a file": (sample_words(system, file / "x", "--prompt", "red"), 1, ["Not a directory", str(file)]),
        "no prompts file": (sample_words(system, root / "out", "--prompts", root / "no.txt"), 1, ["no.txt"]),
        "no such split": (
            [*evaluate, "attributes", "--system", system, "--split", "vall"],
            1,
            ["no split 'vall'", "compositional"],
        ),
        "too few examples": ([*evaluate, "attributes", "--system", system, "--num", "65"], 1, ["the 64 examples"]),
        "not digits": ([*evaluate, "digits", "--system", system], 1, ["digits folder alone"]),
    }


@pytest.fixture(scope="module")
def mistaken(shop, system, tmp_path_factory):
    """Every mistake's command, all started at once, and the folders before any of them ran."""
    root = tmp_path_factory.mktemp("mistakes")
    cases = mistakes(system, root)
    before = contents(root) | contents(system)
    futures = {name: shop.pool.submit(shop.run, *words) for name, (words, _, _) in cases.items()}
    return root, cases, futures, before


def test_mistakes(mistaken, system):
    """Each in one line, with its exit code, and nothing is left behind or changed by any."""
    root, cases, futures, before = mistaken
    wrong = []
    for name, (_, code, parts) in cases.items():
        try:
            assert_one_line(futures[name].result(), code, *parts)
        except AssertionError as error:
            wrong.append(f"{name}: {error}\n{futures[name].result()}")
    assert not wrong, "\n\n".join(wrong)
    assert contents(root) | contents(system) == before
    assert not (root / "out").exists() and not list((root / "empty").iterdir())


def test_long_prompt_is_cut_with_a_warning(shop, system, tmp_path):
    done = shop.good(*sample_words(system, tmp_path, "--prompt", "red", "--prompt", LONG, "--num", "1"))
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2  # the prior's and the decoder's
    assert all("prompt 1 is longer" in line and "32 tokens" in line for line in warnings)
    assert (tmp_path / "1_0.png").is_file()


@pytest.mark.parametrize(
    "command", [["train.py"], ["sample.py"], ["sample.py", "text2image"], ["-m", "dalle2_jax.evaluation"]], ids=" ".join
)
def test_help(shop, command):
    """Of every command: what it does and an example, whatever else is wrong."""
    done = shop.good(*command, "--help")
    assert done.stdout.count("python ") >= 1 and "--" in done.stdout and not done.stderr
