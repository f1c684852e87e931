"""The real command line, in processes of its own: train, kill, resume, sample, evaluate, and every mistake.

One tiny system (``tiny_system.py``) is trained once. Compiled programs are kept between processes, so
that all but the first start in seconds; two processes run at a time.
"""

import dataclasses
import json
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from command_line import (
    CONFIG,
    MOMENTS,
    Shop,
    assert_one_line,
    assert_same_end,
    contents,
    copy_of,
    damage,
    evaluate_words,
    failures,
    kill_when,
    restored,
    sample_words,
    steps_in,
    train_words,
    wrong_words,
)
from PIL import Image
from tiny_system import CHECKPOINT_EVERY, STEPS

from dalle2_jax import build
from dalle2_jax.diffusion import NoiseMoments
from dalle2_jax.diffusion.timesteps import HISTORY
from dalle2_jax.training.sharding import MeshConfig, make_mesh

PROMPTS = ["a large red circle", ""]


@pytest.fixture(scope="session")
def shop(tmp_path_factory):
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(tmp_path_factory.mktemp("compiled"))
    with ThreadPoolExecutor(2) as pool:
        yield Shop(environment, pool)


@pytest.fixture(scope="session")
def system(shop, tmp_path_factory):
    """A whole system, trained without a break. Tests that change something change a copy."""
    root = tmp_path_factory.mktemp("system") / "tiny"
    for stages in (("clip", "upsampler_1"), ("prior", "decoder")):
        list(shop.pool.map(lambda stage: shop.train(stage, root), stages))
    return root


# --- training, killing, resuming ------------------------------------------------------------


def test_uninterrupted_run(system):
    """What the whole system leaves on disk."""
    for stage in ("clip", "prior", "decoder", "upsampler_1"):
        assert steps_in(system, stage) == [STEPS - CHECKPOINT_EVERY, STEPS]  # the two that keep_checkpoints asks for
        lines = [json.loads(line) for line in (system / stage / "metrics.jsonl").read_text().splitlines()]
        assert [line["step"] for line in lines] == list(range(2, STEPS + 1, 2))
        assert all({"loss", "examples_per_second"} <= line.keys() for line in lines)
    history = restored(system, "upsampler_1").trees["stats"]
    assert history["counts"].sum() == STEPS * 8 and history["counts"].min() >= HISTORY  # so it was used
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

    moments = {"prior": "while a checkpoint is written", "decoder": "in the first steps", "upsampler_1": "late"}
    list(shop.pool.map(killed_and_resumed, moments, moments.values()))


def test_damaged_checkpoint(shop, system, tmp_path):
    """Training and sampling fall back on the one before, and say so; training then ends as it should."""
    root, before = copy_of(system, tmp_path, "clip", "prior", "decoder"), STEPS - CHECKPOINT_EVERY
    damage(root, "decoder", STEPS)
    sampled = shop.good(*sample_words(root, tmp_path / "out", "--prompt", "red", "--num", "1"))
    assert f"checkpoints/{STEPS} cannot be read" in sampled.stderr and f"step {before} is used" in sampled.stderr
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["checkpoints"]["decoder"] == before
    trained = shop.train("decoder", root)
    assert f"checkpoints/{STEPS} cannot be read" in trained.stdout
    assert f"decoder: continues from step {before}" in trained.stdout
    assert "Traceback" not in sampled.stderr + trained.stderr
    assert_same_end(root, system, "decoder")


def test_no_space(shop, system, tmp_path):
    """No file may grow over 30 kB, so no checkpoint is written: one line; with space again, the run goes on."""
    cramped = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000));"
    cramped += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    # Compiled programs may not be written either, and jax would say so.
    alone = dataclasses.replace(shop, environment={**shop.environment, "JAX_ENABLE_COMPILATION_CACHE": "false"})
    done = alone.run("-c", cramped, *train_words("upsampler_1", tmp_path))
    assert_one_line(done, 1, "a checkpoint cannot be written to", "File too large", "make room")
    assert not steps_in(tmp_path, "upsampler_1")
    shop.train("upsampler_1", tmp_path)
    assert_same_end(tmp_path, system, "upsampler_1")


def test_pictures_while_training(shop, tmp_path):
    overrides = ("--config.sample_every=4", "--config.total_steps=8")
    shop.train("upsampler_1", tmp_path, *overrides)
    drawn = sorted(path.name for path in (tmp_path / "upsampler_1" / "samples").iterdir())
    assert drawn == ["00000004.png", "00000008.png"]


# --- sampling and measuring -----------------------------------------------------------------


@pytest.fixture(scope="module")
def drawn(shop, system, tmp_path_factory):
    """Two runs of one command, one with batches of 1 and one of 4 by what samples.json of the first says."""
    root = tmp_path_factory.mktemp("drawn")
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    given = [*words, "--num", "3", "--seed", "5", "--decoder.steps", "3", "--decoder.sampler", "ddpm"]
    given += ["--decoder.image_guidance", "1.5", "--decoder.text_guidance", "3", "--decoder.threshold", "dynamic"]
    given += ["--decoder.guidance_schedule", "cosine", "--decoder.guidance_rescale", "0.3"]
    given += ["--prior.guidance_interval", "0.1,0.9", "--prior.guidance", "2", "--prior.candidates", "3"]
    first, again = shop.pool.map(lambda name: shop.good(*sample_words(system, root / name, *given)), ("first", "again"))
    assert first.stderr.count("warning") == again.stderr.count("warning") == 0
    written = json.loads((root / "first" / "samples.json").read_text())
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    told = ["--prompts", root / "prompts.txt", "--num", "3", "--seed", written["seed"]]
    told += ["--prior.candidates", written["candidates"]]
    for stage, sampling in written["sampling"].items():
        sampling["guidance_interval"] = ",".join(map(str, sampling["guidance_interval"]))
        sampling["sampler"] = sampling.pop("name")
        told += [part for name, value in sampling.items() if value is not None for part in (f"--{stage}.{name}", value)]
    sizes = [("--batch_size", size) for size in (1, 4)]
    list(shop.pool.map(lambda size: shop.good(*sample_words(system, root / f"by_{size[1]}", *told, *size)), sizes))
    return root


def pixels(folder, pattern="*_*.png"):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob(pattern)}


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
    decoder = {name: sampling["decoder"][name] for name in ("name", "steps", "image_guidance", "text_guidance")}
    assert decoder == {"name": "ddpm", "steps": "3", "image_guidance": 1.5, "text_guidance": 3.0}
    assert sampling["upsampler_1"]["name"] == "ddim" and sampling["prior"]["steps"] == 4
    assert sampling["prior"]["guidance_interval"] == [0.1, 0.9]
    assert written["candidates"] == 3 and {"dalle2_jax", "jax", "numpy"} <= written["versions"].keys()
    assert written["pictures"] == [
        {"file": f"{i}_{j}.png", "prompt": prompt, "index": i, "sample": j}
        for i, prompt in enumerate(PROMPTS)
        for j in range(3)
    ]
    assert pixels(drawn / "first", "grid.png")["grid.png"].shape[1] > 4 * 100  # four pictures a row, enlarged


def test_editing(shop, system, drawn, tmp_path):
    """A picture drawn again, varied, and in part anew, by the commands; wrong ones are said in one line."""
    image, mask = drawn / "first" / "0_0.png", tmp_path / "mask.png"
    Image.fromarray(np.repeat(np.arange(16) >= 8, 16).reshape(16, 16).T.astype(np.uint8) * 255).save(mask)

    def words(command, *more):
        return ["sample.py", command, "--system", system, "--image", image, "--num", "2", *more]

    cases = {
        "inpaint": words("inpaint", "--mask", mask, "--prompt", "a red star", "--resample", "1,2"),
        "own": words("inpaint", "--mask", mask),
        "variations": words("variations", "--image", drawn / "first" / "1_0.png"),
        "eta": words("variations", "--eta", "0.7"),
        "reconstruct": words("reconstruct", "--decoder.steps", "5", "--whole_inversion"),
    }
    list(shop.pool.map(lambda name: shop.good(*cases[name], "--out", tmp_path / name), cases))
    before = np.asarray(Image.open(image)).astype(int)
    for name in ("inpaint", "own"):
        for picture in pixels(tmp_path / name).values():
            assert np.abs(picture[:, :8] - before[:, :8]).max() <= 1 and np.abs(picture - before).max() > 1
    assert pixels(tmp_path / "variations").keys() == {f"{i}_{j}.png" for i in range(2) for j in range(2)}
    written = json.loads((tmp_path / "eta" / "samples.json").read_text())
    assert (written["command"], written["eta"], written["image"]) == ("variations", 0.7, [str(image)])
    assert {name: written["sampling"]["decoder"][name] for name in ("name", "eta", "guidance")} == {
        "name": "ddim", "eta": 0.7, "guidance": 1.0
    }
    wrong = {
        "large.png": (words("variations", "--image", tmp_path / "large.png"), 1, "large.png"),
        "sampler": (words("reconstruct", "--decoder.sampler", "ddpm"), 2, "--decoder.sampler is ddim here"),
        "jump": (words("inpaint", "--mask", mask, "--resample", "50,2"), 1, "resampling takes stretches of 1 to"),
    }
    for name, (given, code, says) in wrong.items():
        assert_one_line(shop.run(*given, "--out", tmp_path / name), code, says)


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
    measured = shop.good(*evaluate_words("attributes", reference, "--prior", "ar", "--num", "2"))
    assert "2 val captions" in measured.stdout
    assert_same_end(killed, reference, "ar_prior")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0_0.png", "0_1.png", "grid.png", "samples.json"}


def test_moments_and_bits_per_dim(shop, system, tmp_path):
    """Both go over every step of a stage; the moments let the prior be sampled with the variance they give."""
    root = copy_of(system, tmp_path / "tiny", "clip", "prior", "decoder")
    bits = shop.pool.submit(
        shop.good, *evaluate_words("bits_per_dim", system, "--stage", "decoder", "--num", "3", "--out", tmp_path)
    )
    words = ("--stage", "prior", "--num", "6", "--batch_size", "4")
    assert "variance analytic" in shop.good(*evaluate_words("moments", root, *words)).stdout
    analytic = ("--prior.sampler", "ddpm", "--prior.variance", "analytic", "--prompt", "red", "--num", "1")
    shop.good(*sample_words(root, tmp_path / "out", *analytic))
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["sampling"]["prior"]["variance"] == "analytic"
    assert "decoder, 3 val examples" in bits.result().stdout
    written = json.loads((tmp_path / "results.json").read_text())
    assert np.isfinite(written["total"]) and 0 < written["prior"] < written["total"]
    assert written["total"] == pytest.approx(written["prior"] + written["vlb"])
    moments = json.loads((root / "prior" / "moments.json").read_text())
    assert moments["step"] == STEPS and len(moments["eps"]) == 100 and min(moments["eps"]) > 0
    for step in (STEPS, STEPS - CHECKPOINT_EVERY):  # of another checkpoint, they are not used
        (root / "prior" / "moments.json").write_text(json.dumps({**moments, "step": step}))
        prior = build.load_system(root, make_mesh(MeshConfig()), ("clip", "prior"))["prior"].stage
        assert prior.moments == (NoiseMoments(tuple(moments["eps"]), moments["x_0"]) if step == STEPS else None)


@pytest.mark.parametrize("command", ["retrieval", "attributes"])
def test_evaluation(shop, system, tmp_path, command):
    done = shop.good(*evaluate_words(command, system, "--num", "6", "--out", tmp_path))
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


def test_sweep(shop, tmp_path):
    """A run that fails does not stop those after it; the same command has nothing left to train but that one."""
    words = ("-m", "dalle2_jax.sweep", "--config", f"{CONFIG}:upsampler_1", "--out", tmp_path)
    done = shop.run(*words)
    failed, last = "01_lr=0.01_batch_size=0", "02_total_steps=6"
    assert done.returncode == 1 and "config.batch_size must be at least 1, not 0" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: 1 of 3 runs failed: {failed}")
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [set(row) for row in rows] == [{"run", "varied", "loss"}, {"run", "varied"}, {"run", "varied", "loss"}]
    assert rows[2]["varied"] == {"total_steps": 6} and last in done.stdout
    assert steps_in(tmp_path / last, "upsampler_1")[-1] == 6
    listed = shop.good(*words, "--list").stdout.splitlines()
    assert len(listed) == 3 and "--config.optim.lr=0.01 --config.batch_size=0" in listed[1]


# --- mistakes -------------------------------------------------------------------------------


def test_mistakes(shop, system, tmp_path):
    """Each in one line, with its exit code, and nothing is left behind or changed by any."""
    cases = {name: (*case, 2) for name, case in wrong_words(system, tmp_path).items()}
    cases |= {name: (*case, 1) for name, case in failures(system, tmp_path).items()}
    before = contents(tmp_path) | contents(system), {path.name for path in tmp_path.iterdir()}
    done = {name: shop.pool.submit(shop.run, *words) for name, (words, _, _) in cases.items()}
    wrong = []
    for name, (_, parts, code) in cases.items():
        try:
            assert_one_line(done[name].result(), code, *parts)
        except AssertionError as error:
            wrong.append(f"{name}: {error}\n{done[name].result()}")
    assert not wrong, "\n\n".join(wrong)
    assert (contents(tmp_path) | contents(system), {path.name for path in tmp_path.iterdir()}) == before


LONG = "a red circle " * 20


def test_long_prompt_is_cut_with_a_warning(shop, system, tmp_path):
    done = shop.good(*sample_words(system, tmp_path, "--prompt", "red", "--prompt", LONG, "--num", "1"))
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2  # the prior's and the decoder's
    assert all("prompt 1 is longer" in line and "32 tokens" in line for line in warnings)
    assert (tmp_path / "1_0.png").is_file()


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("train.py", "python train.py --config configs/shapes.py:decoder --workdir runs/demo"),
        ("sample.py", "python sample.py text2image --system runs/demo --prompt"),
        ("sample.py text2image", "--decoder.guidance 3"),
        ("sample.py inpaint", "--mask mask.png"),
        ("-m dalle2_jax.evaluation", "python -m dalle2_jax.evaluation attributes --system runs/demo"),
        ("-m dalle2_jax.sweep", "python -m dalle2_jax.sweep --config configs/shapes.py:decoder --system runs/demo"),
    ],
)
def test_help_has_an_example(shop, command, example):
    done = shop.good(*command.split(), "--help")
    assert example in done.stdout and not done.stderr
