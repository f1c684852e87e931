"""A stage lands whole in a system's folder, or not at all."""

import errno
import os
import stat

import jax
import numpy as np
import pytest
from checkpoints import listing

from dalle2_jax.training.sharding import MeshConfig, make_mesh, tree_shardings, with_shardings
from dalle2_jax.types import UserError
from dalle2_jax.weights import landing
from dalle2_jax.weights.component import Component, merged
from dalle2_jax.weights.landing import STEP, Trees, staging, stored_config, write_files, write_stage
from dalle2_jax.weights.rules import dense, leaf
from dalle2_jax.weights.tensors import Tensor
from dalle2_jax.workdir import Checkpoints, StageFolder


def fill(folder, *names):
    """Makes stages of one file."""
    for name in names:
        (folder / name).mkdir()
        (folder / name / "config.json").write_text("{}")


def component(stage="prior", **fields):
    said = {"family": "a prior", "where": "file", "config": {"model": {}}, "tensors": {}}
    return Component(stage, **said | fields)


# --- staging --------------------------------------------------------------------------------


def test_stages_appear_together_at_the_end(tmp_path):
    root = tmp_path / "runs" / "new"
    with staging(root, ["clip", "prior"]) as folder:
        fill(folder, "clip", "prior")
        assert not (root / "clip").exists()
    assert sorted(path.name for path in root.iterdir()) == ["clip", "prior"]


def test_an_error_leaves_the_system_as_it_was(tmp_path):
    fill(tmp_path, "clip")
    before = listing(tmp_path)
    for root in (tmp_path, tmp_path / "new"):
        with pytest.raises(KeyError), staging(root, ["prior"]) as folder:
            fill(folder, "prior")
            raise KeyError
        assert listing(tmp_path) == before


def test_a_full_disk_is_said_to_be(tmp_path):
    with pytest.raises(UserError, match=r"new cannot be written \(No space left on device\): make room"):
        with staging(tmp_path / "new", ["prior"]):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not listing(tmp_path)


def test_a_stage_that_cannot_be_moved_takes_the_others_back(tmp_path):
    """Somebody else made the second one meanwhile."""
    with pytest.raises(UserError, match="cannot be written"), staging(tmp_path, ["clip", "prior"]) as folder:
        fill(folder, "clip", "prior")
        fill(tmp_path, "prior")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["prior"]


@pytest.mark.parametrize("link", [False, True])
def test_a_stage_that_is_there_is_not_touched(tmp_path, link):
    if link:
        (tmp_path / "prior").symlink_to("nowhere")
    else:
        fill(tmp_path, "prior")
    with pytest.raises(UserError, match="prior is there already: remove it"):
        with staging(tmp_path, ["clip", "prior"]):
            raise AssertionError
    assert [path.name for path in tmp_path.iterdir()] == ["prior"]


def test_what_the_dead_left_is_removed_and_what_the_living_make_is_not(tmp_path):
    fill(tmp_path, ".importing-dead")
    with staging(tmp_path, ["prior"]) as living:
        fill(living, "prior")
        with staging(tmp_path, ["decoder"]) as other:
            fill(other, "decoder")
            assert sorted(tmp_path.iterdir()) == sorted([living, other])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["decoder", "prior"]


def test_disks_without_locks_are_written_and_not_swept(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(landing.fcntl, "flock", refuse)
    fill(tmp_path, ".importing-dead")
    with staging(tmp_path, ["prior"]) as folder:
        fill(folder, "prior")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".importing-dead", "prior"]


# --- exports --------------------------------------------------------------------------------


def test_an_export_appears_whole_and_for_everybody(tmp_path):
    target = tmp_path / "more" / "out"
    write_files(target, lambda folder: (folder / "a").write_text("b"))
    assert (target / "a").read_text() == "b" and stat.S_IMODE(target.stat().st_mode) == 0o755
    with pytest.raises(UserError, match="out is there already"):
        write_files(target, None)
    assert [path.name for path in target.parent.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("error", "raised"), [(OSError(errno.ENOSPC, "No space left"), UserError), (KeyError("a"), KeyError)]
)
def test_an_export_that_fails_leaves_nothing(tmp_path, error, raised):
    def write(folder):
        (folder / "half").write_text("b")
        raise error

    with pytest.raises(raised):
        write_files(tmp_path / "out", write)
    assert not listing(tmp_path)


# --- a stage --------------------------------------------------------------------------------


def test_a_stage_lies_as_training_would_leave_it(tmp_path):
    trees = Trees({"a": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}}, {"mean": np.ones(3, np.float32)})
    write_stage(StageFolder(tmp_path, "prior"), component(), trees)
    folder = StageFolder(tmp_path, "prior")
    assert folder.latest_step() == STEP and folder.read_json("source.json") == {"family": "a prior", "files": "file"}
    assert folder.read_json("config.json") == stored_config(component()) == {
        "stage": "prior",
        "total_steps": 0,
        "model": {},
    }
    shapes = jax.eval_shape(lambda: {"ema": trees.params, "stats": trees.stats})
    restored = Checkpoints(folder).restore(with_shardings(shapes, tree_shardings(shapes, make_mesh(MeshConfig()))))
    np.testing.assert_array_equal(restored.trees["ema"]["a"]["kernel"], trees.params["a"]["kernel"])
    np.testing.assert_array_equal(restored.trees["stats"]["mean"], trees.stats["mean"])
    assert not [path for path in tmp_path.rglob("*") if "tmp" in path.name]


def tensors(**arrays):
    return {key: Tensor(value.shape, "float32", None, lambda value=value: value) for key, value in arrays.items()}


def test_parts_become_one_stage():
    weights = component(tensors=tensors(w=np.zeros((2, 3))), params=dense("out", "w")[:1], needs="statistics")
    said = {"config": {"conditioning": {"whiten": True}}, "where": "other", "needs": "weights"}
    stats = component(stats=leaf("mean", "0"), **said)
    whole = merged([weights, stats])["prior"]
    assert whole.config == {"model": {}, "conditioning": {"whiten": True}} and whole.where == "file and other"
    assert (*whole.params, *whole.stats) == (*weights.params, *stats.stats)
    again = merged([weights, stats, stats, weights])
    assert again == {"prior": whole}


def test_of_two_priors_the_first_counts_and_two_clips_are_refused():
    first, second = (component(params=leaf(*names)) for names in (("a", "a"), ("a", "b")))
    second = component(where="other", params=[*second.params, *leaf("more", "c")])
    assert merged([first, second])["prior"] is first and merged([second, first])["prior"] is second
    first, second = (component("clip", where=each.where, params=each.params) for each in (first, second))
    assert merged([second, first])["clip"] is second
    with pytest.raises(UserError, match="file and other both hold stage clip"):
        merged([first, second])


def test_parts_that_disagree_are_refused():
    one, other = (
        component(config={"model": {"width": width, "own": None}}, where=str(width), params=leaf(str(width), "x"))
        for width in (1, 2)
    )
    with pytest.raises(UserError, match="1 and 2 do not belong together: model.width is 1 in one, 2 in the other"):
        merged([one, other])
