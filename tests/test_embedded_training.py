"""A prior trained on embeddings: as on the pictures, without CLIP's weights, and on those of the right CLIP."""

import shutil

import jax
import numpy as np
import pytest
import tiny_system
from tiny_data import write_clip, write_pictures

from dalle2_jax import build, data, rng
from dalle2_jax.data.__main__ import main
from dalle2_jax.job import build_job
from dalle2_jax.training.loop import calibrated, train
from dalle2_jax.training.sharding import MeshConfig, make_mesh, shard_batch
from dalle2_jax.types import UserError
from dalle2_jax.workdir import StageFolder

pytestmark = pytest.mark.usefixtures("quick_programs")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures"))


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("system"))


@pytest.fixture(scope="module")
def embedded(tmp_path_factory, system, pictures):
    out = tmp_path_factory.mktemp("embedded")
    words = ["embed", "--system", system, "--data", f"folder:{pictures}", "--out", out, "--text_seq"]
    assert main([*map(str, words), "--batch_size", "20"]) == 0
    return out


def config_of(which, source, **conditioning):
    """A tiny config on a folder of pictures or of embeddings."""
    config = tiny_system.get_config(which)
    kind = "embeddings" if (source / "clip").is_dir() else "folder"
    config.data = {"kind": kind, "path": str(source)} | ({"resolution": 8} if kind == "folder" else {})
    config.conditioning.update(conditioning)
    config.total_steps = 3
    return config


def both(which, system, pictures, embedded, tmp_path, edit=lambda config: None, **conditioning):
    """Builds a job on the pictures and one on their embeddings, beside the same CLIP."""
    jobs = []
    for source in (pictures, embedded):
        root = tmp_path / source.name
        root.mkdir()
        (root / "clip").symlink_to(system / "clip")
        config = config_of(which, source, **conditioning)
        edit(config)
        jobs.append(build_job(config, root, "tests/tiny_system.py:prior"))
    return jobs


def losses(job, count=2):
    """The losses of a job's first batches under fresh weights."""
    variables = jax.jit(job.stage.init)(jax.random.key(0))
    stats = calibrated(job) or variables.stats

    @jax.jit
    def loss(frozen, batch, key):
        return job.stage.loss(variables.params, stats, key, job.stage.prepare(frozen, batch))[0]

    keys = jax.random.split(rng.root(1), count)
    return [float(loss(job.frozen, shard_batch(next(job.stream), job.mesh), key)) for key in keys]


READS = {
    # what a prior is told: edits of its model
    "tokens": {},
    "states": {"text_input": "clip"},
    "empty caption": {"learned_null": False},
    "states and empty caption": {"text_input": "clip", "learned_null": False},
}


@pytest.mark.parametrize("reads", READS)
def test_the_prior_learns_the_same_of_embeddings(system, pictures, embedded, tmp_path, reads):
    seen, told = both("prior", system, pictures, embedded, tmp_path, lambda config: config.model.update(READS[reads]))
    assert seen.frozen and not told.frozen
    batch = next(told.stream)
    assert "image" not in batch and {*told.stage.said, "tokens", "mask"} == {*batch}
    told.stream.set_state({"global_next_index": 0})
    np.testing.assert_allclose(losses(told), losses(seen), rtol=2e-3 if "states" in reads else 1e-5)


WHITENED = {"whiten": True, "calibration_examples": 16}


@pytest.mark.parametrize(("which", "conditioning"), [("prior", WHITENED), ("ar_prior", {})])
def test_statistics_are_measured_of_embeddings(system, pictures, embedded, tmp_path, which, conditioning):
    seen, told = both(which, system, pictures, embedded, tmp_path, **conditioning)
    for one, other in zip(*(jax.tree.leaves(calibrated(job)) for job in (told, seen)), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(losses(told), losses(seen), rtol=1e-4)


@pytest.mark.parametrize("reads", ["tokens", "states"])
def test_a_decoder_learns_the_same_of_pictures_with_embeddings(system, pictures, embedded, tmp_path, reads):
    """Without CLIP's weights in memory."""
    jobs = []
    for name, told in (("seen", {}), ("told", {"embeddings": str(embedded)})):
        (tmp_path / name).mkdir()
        (tmp_path / name / "clip").symlink_to(system / "clip")
        config = config_of("decoder", pictures)
        config.data.update(told)
        if reads == "states":
            config.model.text_input = "clip"
            del config.model["text"]
        jobs.append(build_job(config, tmp_path / name, "tests/tiny_system.py:decoder"))
    seen, told = jobs
    assert seen.frozen and not told.frozen
    np.testing.assert_allclose(losses(told), losses(seen), rtol=2e-3 if reads == "states" else 1e-5)
    told.stream.set_state({"global_next_index": 0})
    assert int(train(told).step) == 3
    assert StageFolder(tmp_path / "told", "decoder").read_json("contract.json") is not None


def test_every_stage_takes_of_pictures_with_embeddings_what_it_reads(system, pictures, embedded, tmp_path):
    (tmp_path / "clip").symlink_to(system / "clip")
    for which, names in (("prior", {"image_emb", "text_emb", "tokens", "mask"}), ("upsampler_1", {"image"})):
        config = config_of(which, pictures)
        config.data.embeddings = str(embedded)
        config.data.resolution = 16 if which == "upsampler_1" else 8
        job = build_job(config, tmp_path, f"tests/tiny_system.py:{which}")
        assert {*next(job.stream)} == names


def test_clip_may_come_later(system, embedded, tmp_path):
    """Without a clip in the workdir its description comes with the embeddings; sampling needs it."""
    job = build_job(config_of("prior", embedded), tmp_path, "tests/tiny_system.py:prior")
    assert int(train(job).step) == 3
    contract = StageFolder(system, "clip").read_json("contract.json")
    assert StageFolder(tmp_path, "prior").read_json("contract.json") == contract
    mesh = make_mesh(MeshConfig())
    with pytest.raises(UserError, match="stage prior needs stage clip"):
        build.load_system(tmp_path, mesh)
    (tmp_path / "clip").symlink_to(system / "clip")
    members = build.load_system(tmp_path, mesh)
    assert members["prior"].contract == members["clip"].contract and members["prior"].tokenizer is not None
    build_job(config_of("prior", embedded), tmp_path, "tests/tiny_system.py:prior")  # goes on


def test_embeddings_of_another_clip_are_refused(system, pictures, embedded, tmp_path, capsys):
    other = write_clip(tmp_path, seed=1)
    ours, theirs = (StageFolder(root, "clip").read_json("contract.json")["clip"] for root in (system, other))
    with pytest.raises(UserError, match=f"holds other CLIP embeddings .*clip '{ours}' against '{theirs}'") as caught:
        build_job(config_of("prior", embedded), tmp_path, "tests/tiny_system.py:prior")
    assert "\n" not in str(caught.value) and not (tmp_path / "prior").exists()
    words = ["embed", "--system", other, "--data", f"folder:{pictures}", "--out", embedded]
    assert main([*map(str, words)]) == 1
    told = capsys.readouterr().err
    assert ours in told and theirs in told and told.count("\n") == 1


def test_a_prior_in_training_keeps_its_clip(system, embedded, tmp_path):
    """A run that goes on is refused embeddings of another CLIP, though none lies beside it."""
    train(build_job(config_of("prior", embedded), tmp_path / "run", "tests/tiny_system.py:prior"))
    other = shutil.copytree(embedded, tmp_path / "other")
    for path in (other / "clip" / "contract.json", other / "train" / "split.json"):
        clip = StageFolder(system, "clip").read_json("contract.json")["clip"]
        path.write_text(path.read_text().replace(clip, "deadbeef"))
    with pytest.raises(UserError, match="was trained with another clip"):
        build_job(config_of("prior", other), tmp_path / "run", "tests/tiny_system.py:prior")


def test_stages_that_draw_pictures_need_pictures(system, embedded, tmp_path):
    (tmp_path / "clip").symlink_to(system / "clip")
    for which in ("decoder", "upsampler_1"):
        with pytest.raises(UserError, match=f"stage {which} is trained on pictures, and EmbeddingSource.* has none"):
            build_job(config_of(which, embedded), tmp_path, "tests/tiny_system.py:prior")


def test_the_context_is_that_of_the_embeddings(system, embedded, tmp_path):
    (tmp_path / "clip").symlink_to(system / "clip")
    config = config_of("prior", embedded)
    config.text.context_length = 14
    with pytest.raises(UserError, match="context_length must be 32, not 14"):
        build_job(config, tmp_path, "tests/tiny_system.py:prior")


def test_embed_takes_its_data_from_clip_or_a_config(system, tmp_path, capsys):
    """CLIP's own 64 shapes, and those of a config; the command says what it cannot do."""
    words = ["embed", "--system", str(system), "--out", str(tmp_path)]
    assert main(words) == 0
    assert "embeddings of 64 pictures" in capsys.readouterr().out
    assert main([*words, "--split", "val", "--config", "tests/tiny_system.py:decoder"]) == 0
    val, shapes = data.EmbeddingSource(tmp_path, "val"), data.ShapesSource("val", 8, num_examples=64)
    assert len(val) == 64 and val[5]["caption"] == shapes.caption(5) and val[5]["captions"] == shapes[5]["captions"]
    for wrong, message in (
        (["--config", "tests/none.py:clip"], "--config must be FILE:STAGE"),
        (["--data", "shape"], "unknown data set 'shape'"),
        (["--system", str(tmp_path / "none")], "there is no system"),
    ):
        assert main([*words, *wrong]) == 1
        assert message in capsys.readouterr().err
