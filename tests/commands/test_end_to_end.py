"""The command line end to end: train, kill, resume, sample, evaluate, and invalid commands.

One tiny system (``tiny_system.py``) is trained once. Commands that are killed, or have a full disk, run in child
processes; all others in this process.
"""

import dataclasses
import json
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from command_line import (
    CONFIG,
    MOMENTS,
    CommandRunner,
    InProcessRunner,
    assert_one_line,
    assert_same_end,
    contents,
    copy_of,
    damage,
    environment,
    evaluate_words,
    failures,
    invalid_commands,
    kill_when,
    restored,
    sample_words,
    steps_in,
    train_words,
)
from PIL import Image
from raised import mentions
from tiny_system import CHECKPOINT_EVERY, STEPS

import dalle2_jax as d2
from dalle2_jax.diffusion import NoiseStatistics
from dalle2_jax.diffusion.timesteps import HISTORY
from dalle2_jax.system import load
from dalle2_jax.training.sharding import MeshConfig, make_mesh

PROMPTS = ["a large red circle", ""]


@pytest.fixture(scope="session")
def in_process():
    return InProcessRunner()


@pytest.fixture(scope="session")
def runner():
    with ThreadPoolExecutor(2) as pool:
        yield CommandRunner(environment(), pool)


@pytest.fixture(scope="session")
def system(in_process, tmp_path_factory):
    """A complete system, trained without interruption. Tests change copies only."""
    root = tmp_path_factory.mktemp("system") / "tiny"
    for stage in ("clip", "prior", "decoder", "upsampler_1"):
        in_process.train(stage, root)
    return root


# --- training, killing, resuming ------------------------------------------------------------


def test_uninterrupted_run(system):
    """The files of a complete system."""
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


def test_killed_again_and_again(runner, in_process, system, tmp_path):
    """Killed at every moment in turn and run again, it ends like an uninterrupted run."""
    for moment in MOMENTS:
        out = kill_when(runner, moment, "clip", tmp_path)
        assert "Traceback" not in out
    last = steps_in(tmp_path, "clip")[-1]
    assert last >= 16
    assert f"from step {last}" in in_process.train("clip", tmp_path).stdout
    assert_same_end(tmp_path, system, "clip")
    again = contents(tmp_path / "clip" / "checkpoints")
    assert f"clip: {STEPS} steps" in in_process.train("clip", tmp_path).stdout  # nothing left to train
    assert contents(tmp_path / "clip" / "checkpoints") == again


def test_every_stage_survives_a_kill(runner, in_process, system, tmp_path):
    """One kill per stage, each at another moment."""

    def killed(stage, moment):
        root = copy_of(system, tmp_path / stage, "clip") if stage != "upsampler_1" else tmp_path / stage
        kill_when(runner, moment, stage, root)
        return root

    moments = {"prior": "while a checkpoint is written", "decoder": "in the first steps", "upsampler_1": "late"}
    for stage, root in zip(moments, runner.pool.map(killed, moments, moments.values()), strict=True):
        in_process.train(stage, root)
        assert_same_end(root, system, stage)


def test_damaged_checkpoint(in_process, system, tmp_path):
    """Training and sampling use the previous checkpoint and say so; training ends like an uninterrupted run."""
    root, before = copy_of(system, tmp_path, "clip", "prior", "decoder"), STEPS - CHECKPOINT_EVERY
    damage(root, "decoder", STEPS)
    sampled = in_process.run_ok(*sample_words(root, tmp_path / "out", "--prompt", "red", "--num", "1"))
    assert f"checkpoints/{STEPS}" in sampled.stderr and f"step {before}" in sampled.stderr
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["checkpoints"]["decoder"] == before
    trained = in_process.train("decoder", root)
    assert f"checkpoints/{STEPS}" in trained.stdout and f"from step {before}" in trained.stdout
    assert "Traceback" not in sampled.stderr + trained.stderr
    assert_same_end(root, system, "decoder")


def test_no_space(runner, in_process, system, tmp_path):
    """With files limited to 30 kB no checkpoint can be written: one line. Without the limit the run continues."""
    cramped = "import os, resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000));"
    cramped += "os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    # Compiled programs cannot be written either, and JAX would print it: those of a fast compilation are not.
    never = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "10000"}
    alone = dataclasses.replace(runner, environment={**runner.environment, **never})
    done = alone.run("-c", cramped, *train_words("upsampler_1", tmp_path))
    assert_one_line(done, 1, tmp_path / "upsampler_1", "File too large")
    assert not steps_in(tmp_path, "upsampler_1")
    in_process.train("upsampler_1", tmp_path)
    assert_same_end(tmp_path, system, "upsampler_1")


def test_previews_while_training(in_process, tmp_path):
    in_process.train("upsampler_1", tmp_path, f"--config.sample_every={STEPS // 2}")  # as many steps: one program
    previews = sorted(path.name for path in (tmp_path / "upsampler_1" / "samples").iterdir())
    assert previews == [f"{step:08d}.png" for step in (STEPS // 2, STEPS)]


# --- sampling and measuring -----------------------------------------------------------------


@pytest.fixture(scope="module")
def outputs(in_process, system, tmp_path_factory):
    """Two runs of one command, and two with the settings of the first's samples.json and batches of 1 and 4."""
    root = tmp_path_factory.mktemp("outputs")
    words = [word for prompt in PROMPTS for word in ("--prompt", prompt)]
    given = [*words, "--num", "3", "--seed", "5", "--decoder.steps", "3", "--decoder.sampler", "ddpm"]
    given += ["--decoder.image_guidance", "1.5", "--decoder.text_guidance", "3", "--decoder.threshold", "dynamic"]
    given += ["--decoder.guidance_schedule", "cosine", "--decoder.guidance_rescale", "0.3"]
    given += ["--prior.guidance_interval", "0.1,0.9", "--prior.guidance", "2", "--prior.candidates", "3"]
    first, again = (in_process.run_ok(*sample_words(system, root / name, *given)) for name in ("first", "again"))
    assert first.stderr.count("warning") == again.stderr.count("warning") == 0
    written = json.loads((root / "first" / "samples.json").read_text())
    (root / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    recorded = ["--prompts", root / "prompts.txt", "--num", "3", "--seed", written["seed"]]
    recorded += ["--prior.candidates", written["candidates"]]
    for stage, sampling in written["sampling"].items():
        sampling["guidance_interval"] = ",".join(map(str, sampling["guidance_interval"]))
        sampling["sampler"] = sampling.pop("name")
        recorded += [
            part for name, value in sampling.items() if value is not None for part in (f"--{stage}.{name}", value)
        ]
    sizes = [("--batch_size", size) for size in (1, 4)]
    for size in sizes:
        in_process.run_ok(*sample_words(system, root / f"by_{size[1]}", *recorded, *size))
    return root


def pixels(folder, pattern="*_*.png"):
    return {path.name: np.asarray(Image.open(path)).astype(int) for path in folder.glob(pattern)}


def test_same_command_same_files(outputs):
    names = {f"{i}_{j}.png" for i in range(len(PROMPTS)) for j in range(3)} | {"grid.png", "samples.json"}
    assert {path.name for path in (outputs / "first").iterdir()} == names
    for name in names:
        assert (outputs / "first" / name).read_bytes() == (outputs / "again" / name).read_bytes(), name


@pytest.mark.parametrize("size", [1, 4])
def test_batch_size_changes_no_image(outputs, size):
    """And samples.json has everything that is needed to generate them again."""
    first, other = pixels(outputs / "first"), pixels(outputs / f"by_{size}")
    assert first.keys() == other.keys() and len(first) == 6
    for name, image in first.items():
        assert image.shape == (16, 16, 3)
        assert np.abs(image - other[name]).max() <= 1, name  # another batch size may round another way
    assert all((first[a] != first[b]).any() for a in first for b in first if a < b)


def test_samples_json(outputs, system):
    written = json.loads((outputs / "first" / "samples.json").read_text())
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
    assert pixels(outputs / "first", "grid.png")["grid.png"].shape[1] > 4 * 100  # four images a row, enlarged


def test_editing(in_process, system, outputs, tmp_path):
    """Reconstruction, variations and inpainting by the commands; invalid ones fail with one line."""
    image, mask = outputs / "first" / "0_0.png", tmp_path / "mask.png"
    Image.fromarray(np.repeat(np.arange(16) >= 8, 16).reshape(16, 16).T.astype(np.uint8) * 255).save(mask)

    def words(command, *more):
        return ["sample.py", command, "--system", system, "--image", image, "--num", "2", *more]

    cases = {
        "inpaint": words("inpaint", "--mask", mask, "--prompt", "a red star", "--resample", "1,2"),
        "own": words("inpaint", "--mask", mask),
        "variations": words("variations", "--image", outputs / "first" / "1_0.png"),
        "eta": words("variations", "--eta", "0.7"),
        "reconstruct": words("reconstruct", "--decoder.steps", "5", "--whole_inversion"),
    }
    for name, given in cases.items():
        in_process.run_ok(*given, "--out", tmp_path / name)
    before = np.asarray(Image.open(image)).astype(int)
    for name in ("inpaint", "own"):
        for edited in pixels(tmp_path / name).values():
            assert np.abs(edited[:, :8] - before[:, :8]).max() <= 1 and np.abs(edited - before).max() > 1
    assert pixels(tmp_path / "variations").keys() == {f"{i}_{j}.png" for i in range(2) for j in range(2)}
    written = json.loads((tmp_path / "eta" / "samples.json").read_text())
    assert (written["command"], written["eta"], written["image"]) == ("variations", 0.7, [str(image)])
    assert {name: written["sampling"]["decoder"][name] for name in ("name", "eta", "guidance")} == {
        "name": "ddim",
        "eta": 0.7,
        "guidance": 1.0,
    }
    wrong = {
        "large.png": (words("variations", "--image", tmp_path / "large.png"), 1, ["large.png"]),
        "sampler": (words("reconstruct", "--decoder.sampler", "ddpm"), 2, ["--decoder.sampler", "ddim"]),
        "jump": (words("inpaint", "--mask", mask, "--resample", "50,2"), 1, ["1 to 3", 50, 2]),
    }
    for name, (given, code, facts) in wrong.items():
        assert_one_line(in_process.run(*given, "--out", tmp_path / name), code, *facts)


def test_ar_prior(runner, in_process, system, tmp_path):
    """The autoregressive prior replaces the diffusion prior, and survives a kill like every stage."""
    reference = copy_of(system, tmp_path / "reference", "clip", "decoder")
    killed = copy_of(system, tmp_path / "killed", "clip")
    kill_when(runner, "while a checkpoint is written", "ar_prior", killed)
    in_process.train("ar_prior", reference)
    in_process.train("ar_prior", killed)
    in_process.run_ok(*sample_words(reference, tmp_path / "out", "--prior", "ar", "--prompt", "red", "--num", "2"))
    measured = in_process.run_ok(*evaluate_words("attributes", reference, "--prior", "ar", "--num", "2"))
    assert "attributes/all" in measured.stdout
    assert_same_end(killed, reference, "ar_prior")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"0_0.png", "0_1.png", "grid.png", "samples.json"}


def test_noise_statistics_and_bits_per_dim(in_process, system, tmp_path):
    """Both go over every step of a stage; noise statistics let the prior be sampled with variance analytic."""
    root = copy_of(system, tmp_path / "tiny", "clip", "prior", "decoder")
    bits = in_process.run_ok(
        *evaluate_words("bits_per_dim", system, "--stage", "decoder", "--num", "3", "--out", tmp_path)
    )
    words = ("--stage", "prior", "--num", "6", "--batch_size", "4")
    assert "prior_eps" in in_process.run_ok(*evaluate_words("noise_statistics", root, *words)).stdout
    analytic = ("--prior.sampler", "ddpm", "--prior.variance", "analytic", "--prompt", "red", "--num", "1")
    in_process.run_ok(*sample_words(root, tmp_path / "out", *analytic))
    assert json.loads((tmp_path / "out" / "samples.json").read_text())["sampling"]["prior"]["variance"] == "analytic"
    assert "bits_per_dim/decoder_total" in bits.stdout
    written = json.loads((tmp_path / "results.json").read_text())["measures"]["bits_per_dim"]
    total, prior, vlb = (written[f"decoder_{name}"]["value"] for name in ("total", "prior", "vlb"))
    assert np.isfinite(total) and 0 < prior < total == pytest.approx(prior + vlb)
    statistics = json.loads((root / "prior" / "noise_statistics.json").read_text())
    assert statistics["step"] == STEPS and len(statistics["eps"]) == 100 and min(statistics["eps"]) > 0
    for step in (STEPS, STEPS - CHECKPOINT_EVERY):  # of another checkpoint, they are not used
        (root / "prior" / "noise_statistics.json").write_text(json.dumps({**statistics, "step": step}))
        (root / "prior" / "digests.json").unlink(missing_ok=True)  # as one does after an edit
        prior = load.load_system(root, make_mesh(MeshConfig()), ("clip", "prior"))["prior"].stage
        expected = NoiseStatistics(tuple(statistics["eps"]), statistics["x_0"])
        assert prior.noise_statistics == (expected if step == STEPS else None)


def test_evaluation(in_process, system, tmp_path):
    done = in_process.run_ok(*evaluate_words("retrieval,attributes,prior", system, "--num", "6", "--out", tmp_path))
    written = json.loads((tmp_path / "results.json").read_text())["measures"]
    recall = written["retrieval"]["image_to_text_at_1"]
    assert recall["n"] == 6 and recall["baseline"]["value"] == pytest.approx(1 / 6)
    assert {"colour", "shape", "size", "all"} <= written["attributes"].keys()
    assert "prior/cosine_image" in done.stdout and "shuffled captions" in done.stdout
    assert (tmp_path / "grid.png").is_file()
    first = (tmp_path / "samples" / "data" / "00000.npy").read_bytes()
    in_process.run_ok(*evaluate_words("clip_score", system, "--num", "9", "--out", tmp_path))
    assert (tmp_path / "samples" / "data" / "00000.npy").read_bytes() == first  # generated once


def test_sweep(runner, in_process, tmp_path):
    """A run that fails does not stop the runs after it; ``--list`` prints the commands."""
    words = ("-m", "dalle2_jax", "sweep", "--config", f"{CONFIG}:upsampler_1", "--out", tmp_path)
    done = runner.run(*words)
    failed, last = "01_lr=0.01_batch_size=0", "02_total_steps=6"
    assert done.returncode == 1 and "config.batch_size" in done.stderr
    assert mentions("1 of 3 runs", failed)(done.stderr.splitlines()[-1])
    rows = json.loads((tmp_path / "sweep.json").read_text())
    assert [set(row) for row in rows] == [{"run", "varied", "loss"}, {"run", "varied"}, {"run", "varied", "loss"}]
    assert rows[2]["varied"] == {"total_steps": 6} and last in done.stdout
    assert steps_in(tmp_path / last, "upsampler_1")[-1] == 6
    listed = in_process.run_ok(*words, "--list").stdout.splitlines()
    assert len(listed) == 3 and "--config.optim.lr=0.01 --config.batch_size=0" in listed[1]


# --- mistakes -------------------------------------------------------------------------------


def test_invalid_commands(in_process, system, tmp_path):
    """Each fails with one line and its exit code, and leaves and changes no file."""
    cases = {name: (*case, 2) for name, case in invalid_commands(system, tmp_path).items()}
    cases |= {name: (*case, 1) for name, case in failures(system, tmp_path).items()}
    before = contents(tmp_path) | contents(system), {path.name for path in tmp_path.iterdir()}
    done = {name: in_process.run(*words) for name, (words, _, _) in cases.items()}
    wrong = []
    for name, (_, facts, code) in cases.items():
        try:
            assert_one_line(done[name], code, *facts)
        except AssertionError as error:
            wrong.append(f"{name}: {error}\n{done[name]}")
    assert not wrong, "\n\n".join(wrong)
    assert (contents(tmp_path) | contents(system), {path.name for path in tmp_path.iterdir()}) == before


LONG = "a red circle " * 20


def test_long_prompt_is_cut_with_a_warning(in_process, system, tmp_path):
    done = in_process.run_ok(*sample_words(system, tmp_path, "--prompt", "red", "--prompt", LONG, "--num", "1"))
    warnings = [line for line in done.stderr.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2  # the prior's and the decoder's
    assert all(mentions("prompt 1", "32 tokens")(line) for line in warnings)
    assert (tmp_path / "1_0.png").is_file()


def test_unfinished_stage_samples_with_a_warning(in_process, system, tmp_path):
    """And a stage without a checkpoint is not used; both by the command and from Python."""
    root = copy_of(system, tmp_path / "tiny", "clip", "prior", "decoder", "upsampler_1")
    config = json.loads((root / "decoder" / "experiment.json").read_text())
    (root / "decoder" / "experiment.json").write_text(json.dumps({**config, "total_steps": 2 * STEPS}))
    (root / "decoder" / "digests.json").unlink()  # as one does after an edit
    shutil.rmtree(root / "upsampler_1" / "checkpoints")
    done = in_process.run_ok(*sample_words(root, tmp_path / "out", "--prompt", "red", "--num", "1"))
    warned = sorted(line for line in done.stderr.splitlines() if line.startswith("warning: "))
    assert len(warned) == 2 and f"{STEPS} of {2 * STEPS} steps" in warned[0] and "no checkpoint" in warned[1]
    with pytest.warns(d2.SystemWarning) as raised:
        loaded = d2.load(str(root))
    assert len(raised) == 2 and [*loaded.stages] == ["clip", "prior", "decoder"]
    [pixels] = loaded.text2image("red", num=1).numpy
    np.testing.assert_array_equal(pixels, np.asarray(Image.open(tmp_path / "out" / "0_0.png")))
    assert pixels.shape == (8, 8, 3)


def test_python_face_is_the_command(in_process, system, outputs, tmp_path):
    """Interpolation and text diffs by the command, and the same images from Python."""
    a, b = (outputs / "first" / f"{index}_0.png" for index in range(2))
    common, texts = ["--system", system, "--frames", "3", "--decoder.steps", "2"], ["--from", "red", "--to", "star"]
    in_process.run_ok(
        "sample.py", "interpolate", *common, "--image", a, "--image", b, "--eta", "0", "--out", tmp_path / "ab"
    )
    in_process.run_ok("sample.py", "text_diff", *common, *texts, "--image", a, "--out", tmp_path / "rs")
    loaded, options = d2.load(system, verify=False), {"frames": 3, "decoder": {"steps": "2"}}
    between = loaded.interpolate([a, b], eta=0.0, **options)
    for name, result in (("ab", between), ("rs", loaded.text_diff(a, "red", "star", **options))):
        stored = [np.asarray(Image.open(tmp_path / name / f"{i}_0.png")) for i in range(3)]
        np.testing.assert_array_equal(result.numpy, stored)
        assert json.loads((tmp_path / name / "samples.json").read_text()) == json.loads(json.dumps(result.provenance))


@pytest.mark.parametrize(
    ("command", "example"),
    [
        ("train.py", "python train.py --config configs/shapes.py:decoder --workdir runs/demo"),
        ("sample.py", "python sample.py text2image --system runs/demo --prompt"),
        ("sample.py text2image", "--decoder.guidance 3"),
        ("sample.py inpaint", "--mask mask.png"),
        ("dalle2 evaluate", "dalle2 evaluate shapes --measures attributes,retrieval"),
        ("dalle2 sweep", "dalle2 sweep --config configs/shapes.py:decoder --system runs/demo"),
    ],
)
def test_help_has_an_example(in_process, command, example):
    done = in_process.run_ok(*command.split(), "--help")
    assert example in done.stdout and not done.stderr
