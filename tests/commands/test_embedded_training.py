"""Training on stored embeddings: equal to training on images, needs no CLIP weights, and checks the CLIP's identity."""

import functools
import shutil

import jax
import numpy as np
import pytest
import tiny_system
from raised import mentions
from tiny_data import write_clip, write_images

from dalle2_jax import data, rng
from dalle2_jax.cli import main
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import ConfigError, ContractError, UserError
from dalle2_jax.run import build_job
from dalle2_jax.system import load
from dalle2_jax.training.loop import calibrated, train
from dalle2_jax.training.sharding import MeshConfig, make_mesh, shard_batch
from dalle2_jax.workdir.folder import StageFolder


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("system"))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, system, image_folder):
    out = tmp_path_factory.mktemp("embedded")
    args = ["embed", "--system", system, "--data", f"folder:{image_folder}", "--out", out, "--text_seq"]
    assert main(["data", *map(str, args), "--batch_size", "20"]) == 0
    return out


def config_of(which, source, **conditioning):
    """Returns a tiny config on a folder of images or of embeddings."""
    config = tiny_system.get_config(which)
    kind = "embeddings" if (source / "clip").is_dir() else "folder"
    config.data = {"kind": kind, "path": str(source)} | ({"resolution": 8} if kind == "folder" else {})
    config.conditioning.update(conditioning)
    config.total_steps = 3
    return config


def both(which, system, image_folder, embedded, tmp_path, edit=lambda config: None, **conditioning):
    """Builds a job on the images and one on their embeddings, in workdirs with the same CLIP."""
    jobs = []
    for source in (image_folder, embedded):
        root = tmp_path / source.name
        root.mkdir()
        (root / "clip").symlink_to(system / "clip")
        config = config_of(which, source, **conditioning)
        edit(config)
        jobs.append(build_job(Experiment.from_config(config), root, "tests/support/tiny_system.py:prior"))
    return jobs


@functools.cache
def initial_variables(stage):
    """Returns the same arrays for the job on images and for the one on embeddings, whose stages are equal."""
    return jax.jit(stage.init)(jax.random.key(0))


def losses(job, count=2):
    """Returns the losses of a job's first batches with initial weights."""
    variables = initial_variables(job.stage)
    stats = calibrated(job) or variables.stats

    @jax.jit
    def loss(frozen, batch, key):
        return job.stage.loss(variables.params, stats, frozen, key, job.stage.prepare(frozen, batch))[0]

    keys = jax.random.split(rng.root(1), count)
    return [float(loss(job.frozen, shard_batch(next(job.stream), job.mesh), key)) for key in keys]


READS = {
    # conditioning of the prior: changes of its model config
    "tokens": {},
    "states": {"text_input": "clip"},
    "empty caption": {"learned_null": False},
    "states and empty caption": {"text_input": "clip", "learned_null": False},
}


@pytest.mark.parametrize("reads", READS)
def test_a_prior_has_the_same_losses_on_embeddings(system, image_folder, embedded, tmp_path, reads):
    on_images, on_embeddings = both(
        "prior", system, image_folder, embedded, tmp_path, lambda config: config.model.update(READS[reads])
    )
    assert on_images.frozen and not on_embeddings.frozen
    batch = next(on_embeddings.stream)
    assert "image" not in batch and {*on_embeddings.stage.inputs} == {*batch}
    on_embeddings.stream.set_state({"global_next_index": 0})
    np.testing.assert_allclose(losses(on_embeddings), losses(on_images), rtol=2e-3 if "states" in reads else 1e-5)


WHITENED = {"whiten": True, "calibration_examples": 16}


@pytest.mark.parametrize(("which", "conditioning"), [("prior", WHITENED), ("ar_prior", {})])
def test_whitening_statistics_are_the_same_on_embeddings(system, image_folder, embedded, tmp_path, which, conditioning):
    on_images, on_embeddings = both(which, system, image_folder, embedded, tmp_path, **conditioning)
    for one, other in zip(*(jax.tree.leaves(calibrated(job)) for job in (on_embeddings, on_images)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses(on_embeddings), losses(on_images), rtol=1e-4)


@pytest.mark.parametrize("reads", ["tokens", "states"])
def test_a_decoder_has_the_same_losses_on_images_with_embeddings(system, image_folder, embedded, tmp_path, reads):
    """CLIP's weights are not loaded."""
    jobs = []
    for name, section in (("images", {}), ("embeddings", {"embeddings": str(embedded)})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clip").symlink_to(system / "clip")
        config = config_of("decoder", image_folder)
        config.data.update(section)
        if reads == "states":
            config.model.text_input = "clip"
            del config.model["text"]
        jobs.append(build_job(Experiment.from_config(config), tmp_path / name, "tests/support/tiny_system.py:decoder"))
    on_images, on_embeddings = jobs
    assert on_images.frozen and not on_embeddings.frozen
    np.testing.assert_allclose(losses(on_embeddings), losses(on_images), rtol=2e-3 if reads == "states" else 1e-5)
    if reads == "states":  # with text_emb and text_seq of the stored ones, too
        on_embeddings.stream.set_state({"global_next_index": 0})
        assert int(train(on_embeddings).step) == 3
        assert StageFolder(tmp_path / "embeddings", "decoder").read_json("contract.json") is not None


def test_every_stage_selects_its_inputs_from_images_with_embeddings(system, image_folder, embedded, tmp_path):
    (tmp_path / "clip").symlink_to(system / "clip")
    for which, names in (("prior", {"image_emb", "text_emb", "tokens", "mask"}), ("upsampler_1", {"image"})):
        config = config_of(which, image_folder)
        config.data.embeddings = str(embedded)
        config.data.resolution = 16 if which == "upsampler_1" else 8
        job = build_job(Experiment.from_config(config), tmp_path, f"tests/support/tiny_system.py:{which}")
        assert {*next(job.stream)} == names


def test_clip_may_be_added_after_training(system, embedded, tmp_path):
    """Without a clip in the workdir, the embeddings provide its description; only sampling needs its weights."""
    job = build_job(
        Experiment.from_config(config_of("prior", embedded)),
        tmp_path,
        "tests/support/tiny_system.py:prior",
    )
    assert int(train(job).step) == 3
    contract = StageFolder(system, "clip").read_json("contract.json")
    assert StageFolder(tmp_path, "prior").read_json("contract.json") == contract
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, check=mentions("stage prior", "stage clip", tmp_path)):
        load.load_system(tmp_path, mesh)
    (tmp_path / "clip").symlink_to(system / "clip")
    stages = load.load_system(tmp_path, mesh)
    assert stages["prior"].contract == stages["clip"].contract and stages["prior"].tokenizer is not None
    build_job(
        Experiment.from_config(config_of("prior", embedded)),
        tmp_path,
        "tests/support/tiny_system.py:prior",
    )  # resumes


def test_embeddings_of_another_clip_are_rejected(system, image_folder, embedded, tmp_path, capsys):
    other = write_clip(tmp_path, seed=1)
    ours, theirs = (StageFolder(root, "clip").read_json("contract.json")["clip"] for root in (system, other))
    with pytest.raises(ContractError, check=mentions(embedded, ours, theirs, differences={"clip": (ours, theirs)})):
        build_job(
            Experiment.from_config(config_of("prior", embedded)),
            tmp_path,
            "tests/support/tiny_system.py:prior",
        )
    assert not (tmp_path / "prior").exists()
    args = ["embed", "--system", other, "--data", f"folder:{image_folder}", "--out", embedded]
    assert main(["data", *map(str, args)]) == 1
    error = capsys.readouterr().err
    assert ours in error and theirs in error and error.count("\n") == 1


def test_a_resumed_prior_rejects_embeddings_of_another_clip(system, embedded, tmp_path):
    """The contract of the run is checked even if the workdir has no clip."""
    train(
        build_job(
            Experiment.from_config(config_of("prior", embedded)),
            tmp_path / "run",
            "tests/support/tiny_system.py:prior",
        )
    )
    other = shutil.copytree(embedded, tmp_path / "other")
    for path in (other / "clip" / "contract.json", other / "train" / "split.json"):
        clip = StageFolder(system, "clip").read_json("contract.json")["clip"]
        path.write_text(path.read_text().replace(clip, "deadbeef"))
    (other / "clip" / "digests.json").unlink()
    with pytest.raises(ContractError, check=mentions(tmp_path / "run/prior", differences={"clip": (clip, "deadbeef")})):
        build_job(
            Experiment.from_config(config_of("prior", other)),
            tmp_path / "run",
            "tests/support/tiny_system.py:prior",
        )


def test_stages_that_generate_images_need_images(system, embedded, tmp_path):
    (tmp_path / "clip").symlink_to(system / "clip")
    for which in ("decoder", "upsampler_1"):
        with pytest.raises(data.MissingColumnsError, check=mentions("EmbeddingSource", missing=("image",))):
            build_job(
                Experiment.from_config(config_of(which, embedded)),
                tmp_path,
                "tests/support/tiny_system.py:prior",
            )


def test_the_context_length_must_match_the_embeddings(system, embedded, tmp_path):
    (tmp_path / "clip").symlink_to(system / "clip")
    config = config_of("prior", embedded)
    config.text.context_length = 14
    with pytest.raises(ConfigError) as caught:
        build_job(Experiment.from_config(config), tmp_path, "tests/support/tiny_system.py:prior")
    assert caught.value.field == "text.context_length"


def test_embed_uses_the_data_of_clip_or_of_a_config(system, tmp_path, capsys):
    """By default CLIP's 64 training shapes, or the data of a config; unsupported requests are one-line errors."""
    args = ["embed", "--system", str(system), "--out", str(tmp_path)]
    assert main(["data", *args]) == 0
    assert "embeddings of 64 images" in capsys.readouterr().out
    assert main(["data", *args, "--split", "val", "--config", "tests/support/tiny_system.py:decoder"]) == 0
    val, shapes = data.EmbeddingSource(tmp_path, "val"), data.ShapesSource("val", 8, max_objects=1, num_examples=64)
    found = data.example(val, 5)
    assert len(val) == 64 and found["caption"] == shapes.caption(5)
    assert found["captions"] == data.example(shapes, 5)["captions"]
    for wrong, code, fact in (
        (["--config", "tests/none.py:clip"], 2, "FILE:STAGE"),
        (["--data", "shape"], 1, "'shape'"),
        (["--system", str(tmp_path / "none")], 1, str(tmp_path / "none")),
    ):
        assert main(["data", *args, *wrong]) == code
        assert fact in capsys.readouterr().err
