"""A trained system is exported and imported again with equal weights (configs/shapes_diffusers.py)."""

import jax
import numpy as np
import pytest
import tiny_pages
from command_line import InProcessRunner

from dalle2_jax import weights
from dalle2_jax.system import load
from dalle2_jax.training.sharding import MeshConfig, make_mesh

STAGES = ("clip", "prior", "decoder", "upsampler_1")


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    """A system of configs/shapes_diffusers.py with tiny networks, by the programs that tests/docs compiles too."""
    root = tmp_path_factory.mktemp("trained")
    tiny_pages.write(root / "configs")
    for stage in STAGES:
        words = ("--config", f"{root}/configs/shapes_diffusers.py:{stage}", "--workdir", root / "system")
        InProcessRunner().run_ok("train.py", *words)
    return root / "system"


def variables(root):
    """Returns the stages' averaged weights and statistics, by stage."""
    stages = load.load_system(root, make_mesh(MeshConfig()))
    return {name: jax.device_get(tuple(each.variables)) for name, each in stages.items()}


def test_the_pipelines_of_diffusers(system, tmp_path):
    weights.export(system, tmp_path / "out")
    weights.import_weights([tmp_path / "out", tmp_path / "out" / "image_variations"], tmp_path / "again")
    ours, theirs = variables(system), variables(tmp_path / "again")
    for params, _ in (ours["clip"], theirs["clip"]):
        del params["logit_scale"]  # omitted by the export
    last = theirs["upsampler_1"][1].pop("last")  # the pipeline has a separate network for the last step
    jax.tree.map(np.testing.assert_array_equal, last, ours["upsampler_1"][0])
    assert ours.keys() == theirs.keys() == {*STAGES}
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(ours["prior"][1]))  # whitening was estimated


@pytest.mark.parametrize("form", ["hf_clip", "openai_clip", "open_clip"])
def test_clip(system, form, tmp_path):
    weights.export(system, tmp_path / "out", form=form)
    kind = "openai_clip" if form == "openai_clip" else "auto"
    weights.import_weights(tmp_path / "out", tmp_path / "again", kind=kind)
    jax.tree.map(np.testing.assert_array_equal, variables(system)["clip"], variables(tmp_path / "again")["clip"])
