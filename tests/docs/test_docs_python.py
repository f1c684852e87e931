"""The code of docs/python.md runs, on tiny stages, and has the shapes that it says."""

import pathlib
import re

import jax
import numpy as np
import pytest

from dalle2_jax import testing
from dalle2_jax.models.priors.ar_prior import ArPriorConfig
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.stages import ArPriorStage
from dalle2_jax.system import LoadedStage, load

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "python.md"
KINDS = {"clip": "clip_vit", "prior": "prior", "decoder": "decoder", "upsampler_1": "upsampler"}


def ar_prior():
    text = TextConfig(testing.VOCAB_SIZE, testing.CONTEXT_LENGTH, 16, layers=1, heads=2)
    model = ArPriorConfig(
        text, width=16, layers=1, heads=2, context_length=8, components=6, buckets=4, embed_dim=testing.EMBED_DIM
    )
    return ArPriorStage(model, testing.tiny_stage("clip_vit"))


@pytest.fixture(scope="module")
def names():
    """What the page's blocks define. They are traced, not computed: arrays have shapes alone."""
    members = {}
    for name, kind in KINDS.items():
        stage = testing.tiny_stage(kind)
        reads = name != "upsampler_1"
        tokenizer, length = (testing.WordTokenizer(), testing.CONTEXT_LENGTH) if reads else (None, 0)
        members[name] = LoadedStage(stage, testing.tiny_variables(stage), 1, None, tokenizer, length)
    stage = ar_prior()
    variables = testing.tiny_variables(stage)
    members["ar_prior"] = LoadedStage(stage, variables, 1, None, testing.WordTokenizer(), testing.CONTEXT_LENGTH)
    names = {"__name__": "page"}

    def run():
        for number, block in enumerate(re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)):
            exec(compile(block, f"docs/python.md, block {number}", "exec"), names)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(load, "load_system", lambda root, mesh: members)
        jax.eval_shape(run)
    return names


def test_forward_passes(names):
    shapes = {name: value.shape for name, value in names["predictions"].items()}
    small, crop = testing.LOW_SIZE, testing.IMAGE_SIZE // 2
    assert shapes == {
        "prior": (2, testing.EMBED_DIM),
        "decoder": (2, small, small, 3),
        "upsampler_1": (2, crop, crop, 3),
    }
    assert names["image_emb"].shape == names["text_emb"].shape == (2, testing.EMBED_DIM)
    assert names["logits"].shape == (2, 6, 4)


def test_loss_and_run(names):
    assert names["loss"].shape == () and names["outputs"].metrics["mse"].shape == ()
    assert names["images"].shape == names["x_T"].shape


def test_schedule_of_another_implementation(names):
    np.testing.assert_allclose(names["schedule"].alpha_bar, names["alphas_cumprod"], rtol=1e-9)
    assert [len(table) for table in names["coefficients"]] == [5, 5, 5]
