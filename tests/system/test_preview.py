"""Preview images of a stage in training."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image

from dalle2_jax import testing
from dalle2_jax.stages import SamplingConfig, Variables
from dalle2_jax.system import make_preview

CAPTIONS = ["one caption", "another", ""]


def noisy(stage, seed):
    """Returns variables of random numbers, of shapes alone."""
    noise = np.random.default_rng(seed)
    shapes = jax.eval_shape(stage.init, jax.random.key(0))
    return jax.tree.map(lambda leaf: 0.2 * noise.standard_normal(leaf.shape, np.float32), shapes)


@pytest.mark.parametrize("kind", ["decoder", "upsampler"])
def test_preview(kind, tmp_path):
    """A captioned grid a visit, under the step's number; the same weights generate the same images."""
    stage = testing.tiny_stage(kind)
    frozen = {name: noisy(stage.clip, 9) for name in stage.requires}
    preview = make_preview(stage, frozen, testing.tiny_batch(len(CAPTIONS)), CAPTIONS, tmp_path / "samples")
    for step, seed in ((10, 0), (20, 0), (30, 1)):
        preview(Variables(*noisy(stage, seed)), step)
    files = sorted((tmp_path / "samples").iterdir())
    assert [file.name for file in files] == ["00000010.png", "00000020.png", "00000030.png"]
    first, second, third = (np.asarray(Image.open(file)) for file in files)
    assert first.shape[1] > len(CAPTIONS) * 100  # three images side by side, enlarged
    np.testing.assert_array_equal(first, second)
    assert (first != third).any()


def test_a_preview_does_without_what_is_measured_after_training(tmp_path):
    stage = testing.tiny_stage("upsampler")
    stage = dataclasses.replace(stage, sampling=SamplingConfig("ddpm", steps=2, variance="analytic"))
    make_preview(stage, {}, testing.tiny_batch(1), [""], tmp_path)(Variables(*noisy(stage, 0)), 1)
    assert (tmp_path / "00000001.png").is_file()


@pytest.mark.parametrize("kind", ["clip_vit", "prior"])
def test_no_preview_without_images(kind, tmp_path):
    stage = testing.tiny_stage(kind)
    assert make_preview(stage, {}, testing.tiny_batch(1), [""], tmp_path) is None
