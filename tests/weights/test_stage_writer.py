"""Stages and exports appear complete under their final names, or not at all."""

import dataclasses
import errno
import os
import stat

import jax
import numpy as np
import pytest
from checkpoints import listing
from raised import mentions

from dalle2_jax import lock
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.errors import WeightsError
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.training.sharding import (
    MeshConfig,
    make_mesh,
    tree_shardings,
    with_shardings,
)
from dalle2_jax.weights import detect
from dalle2_jax.weights.component import Component, merge_parts
from dalle2_jax.weights.rules import dense, leaf
from dalle2_jax.weights.stage_writer import (
    STEP,
    Trees,
    imported_experiment,
    staging,
    write_folder,
    write_json,
    write_stage,
)
from dalle2_jax.weights.tensors import Tensor
from dalle2_jax.workdir import digests
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

PRIOR = {
    "model": {"width": 16, "layers": 1, "heads": 2},
    "text": {"context_length": 8},
    "diffusion": {"prediction": "x0"},
    "sampling": {"steps": 2},
}


def make_stages(folder, *names):
    """Creates stages of one file each."""
    for name in names:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")


def component(stage="prior", **fields):
    defaults = {"family": "a prior", "where": "file", "config": {"model": {}}, "tensors": {}}
    return Component(stage, **defaults | fields)


# --- staging --------------------------------------------------------------------------------


def test_stages_appear_together_at_the_end(tmp_path):
    root = tmp_path / "runs" / "new"
    with staging(root, ["clip", "prior"]) as folder:
        make_stages(folder, "clip", "prior")
        assert not (root / "clip").exists()
    assert sorted(path.name for path in root.iterdir()) == ["clip", "prior"]


def test_an_error_leaves_the_system_unchanged(tmp_path):
    make_stages(tmp_path, "clip")
    before = listing(tmp_path)
    for root in (tmp_path, tmp_path / "new"):
        with pytest.raises(KeyError), staging(root, ["prior"]) as folder:
            make_stages(folder, "prior")
            raise KeyError
        assert listing(tmp_path) == before


def test_a_full_disk_is_reported(tmp_path):
    with pytest.raises(WeightsError, check=mentions(os.strerror(errno.ENOSPC), path=tmp_path / "new")):
        with staging(tmp_path / "new", ["prior"]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not listing(tmp_path)


def test_if_one_stage_cannot_be_moved_none_is(tmp_path):
    """Another process creates the second stage during the import."""
    fails = pytest.raises(WeightsError, check=mentions(os.strerror(errno.ENOTEMPTY), path=tmp_path))
    with fails, staging(tmp_path, ["clip", "prior"]) as folder:
        make_stages(folder, "clip", "prior")
        make_stages(tmp_path, "prior")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prior"]


@pytest.mark.parametrize("link", [False, True])
def test_an_existing_stage_is_not_touched(tmp_path, link):
    if link:
        (tmp_path / "prior").symlink_to("nowhere")
    else:
        make_stages(tmp_path, "prior")
    with pytest.raises(WeightsError, check=mentions("exists", path=tmp_path / "prior")):
        with staging(tmp_path, ["clip", "prior"]):
            raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


def test_folders_of_dead_processes_are_removed_and_those_of_running_ones_are_not(tmp_path):
    make_stages(tmp_path, f".importing-{lock.own_mark()}00000000")
    with staging(tmp_path, ["prior"]) as living:
        make_stages(living, "prior")
        with staging(tmp_path, ["decoder"]) as other:
            make_stages(other, "decoder")
            assert sorted(tmp_path.iterdir()) == sorted([living, other])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder", "prior"]


def test_disks_without_locks_are_written_and_not_cleaned(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_locks)
    make_stages(tmp_path, dead := f".importing-{lock.own_mark()}00000000")
    with staging(tmp_path, ["prior"]) as folder:
        make_stages(folder, "prior")
    assert sorted(path.name for path in tmp_path.iterdir()) == [dead, "prior"]


# --- exports --------------------------------------------------------------------------------


def test_an_export_appears_complete_and_readable(tmp_path):
    target = tmp_path / "more" / "out"
    write_folder(target, lambda folder: (folder / "a").write_text("b"))
    assert (target / "a").read_text() == "b" and stat.S_IMODE(target.stat().st_mode) == 0o755
    with pytest.raises(WeightsError, check=mentions("exists", path=target)):
        write_folder(target, None)
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(errno.ENOSPC, "No space left"), WeightsError), (KeyError("a"), KeyError)]
)
def test_an_export_that_fails_leaves_nothing(tmp_path, error, raised):
    def write(folder):
        (folder / "half").write_text("b")
        raise error

    with pytest.raises(raised):
        write_folder(tmp_path / "out", write)
    assert not listing(tmp_path)


def test_damage_to_an_export_is_found_by_import(tmp_path):
    out = tmp_path / "out"
    write_folder(out, lambda folder: write_json(folder / "part/config.json", {"hidden_size": 8}))
    (out / "part/config.json").write_text((out / "part/config.json").read_text().replace("8", "9"))
    for path in (out, out / "part", out / "part/config.json"):
        with pytest.raises(WeightsError, check=mentions("part/config.json", "digests.json", path=out)):
            detect.detect(path)
        fact = "known family" if path.is_dir() else ".safetensors"
        unknown = pytest.raises(WeightsError, check=mentions(fact, path=path))
        with digests.unverified(skip=True), unknown:
            detect.detect(path)


# --- a stage --------------------------------------------------------------------------------


def test_a_stage_is_written_as_training_writes_it(tmp_path):
    trees = Trees({"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}, {"mean": np.ones(3, np.float32)})
    contract = EmbeddingContract("0a1b", 3, "raw", 1.0)
    write_stage(StageFolder(tmp_path, "prior"), component(config=PRIOR), trees, contract)
    folder = StageFolder(tmp_path, "prior")
    assert folder.latest_step() == STEP and folder.read_json("source.json") == {"family": "a prior", "files": "file"}
    experiment = stored_experiment(folder)
    assert experiment == imported_experiment(component(config=PRIOR)) and experiment.run.total_steps == 0
    assert (experiment.spec.model.width, experiment.data, experiment.optim, experiment.mesh) == (16, None, None, None)
    assert folder.read_json("contract.json") == dataclasses.asdict(contract)
    shapes = jax.eval_shape(lambda: {"ema": trees.params, "stats": trees.stats})
    restored = Checkpoints(folder).restore(with_shardings(shapes, tree_shardings(shapes, make_mesh(MeshConfig()))))
    np.testing.assert_array_equal(restored.trees["ema"]["a"]["kernel"], trees.params["a"]["kernel"])
    np.testing.assert_array_equal(restored.trees["stats"]["mean"], trees.stats["mean"])
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]


def tensors(**arrays):
    return {key: Tensor(value.shape, "float32", None, lambda value=value: value) for key, value in arrays.items()}


def test_parts_are_joined_to_one_stage():
    weights = component(tensors=tensors(w=np.zeros((2, 3))), params=dense("out", "w")[:1], completed_by="statistics")
    other = {"config": {"conditioning": {"whiten": True}}, "where": "other", "completed_by": "weights"}
    stats = component(stats=leaf("mean", "0"), **other)
    joined = merge_parts([weights, stats])["prior"]
    assert joined.config == {"model": {}, "conditioning": {"whiten": True}} and joined.where == "file and other"
    assert (*joined.params, *joined.stats) == (*weights.params, *stats.stats)
    again = merge_parts([weights, stats, stats, weights])
    assert again == {"prior": joined}


def test_the_first_of_two_priors_is_used_and_two_clips_are_rejected():
    first, second = (component(params=leaf(*names)) for names in (("a", "a"), ("a", "b")))
    second = component(where="other", params=[*second.params, *leaf("more", "c")])
    assert merge_parts([first, second])["prior"] is first and merge_parts([second, first])["prior"] is second
    first, second = (component("clip", where=each.where, params=each.params) for each in (first, second))
    assert merge_parts([second, first])["clip"] is second
    with pytest.raises(WeightsError, check=mentions("file", "stage clip", "params/a", path="other")):
        merge_parts([first, second])


def test_parts_with_different_configs_are_rejected():
    one, other = (
        component(config={"model": {"width": width, "own": None}}, where=str(width), params=leaf(str(width), "x"))
        for width in (1, 2)
    )
    with pytest.raises(WeightsError, check=mentions("model.width", 1, 2)):
        merge_parts([one, other])
