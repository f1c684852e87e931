"""configs/clip.py has the released checkpoints' sizes, and importers read those sizes from their shapes."""

import importlib.util
import pathlib
import re

import jax
import pytest
from clips import abstract, shape_only

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.weights.clip.openai import openai_rules, openai_stats, read_sizes
from dalle2_jax.weights.rules import shapes

CONFIGS = pathlib.Path(__file__).parents[3] / "configs" / "clip.py"

PUBLISHED = {
    "rn50": 102_007_137,
    "rn101": 119_688_033,
    "rn50x4": 178_300_601,
    "rn50x16": 290_979_217,
    "rn50x64": 623_258_305,
    "vit_b32": 151_277_313,
    "vit_b16": 149_620_737,
    "vit_l14": 427_616_513,
    "vit_l14_336": 427_944_193,
    "vit_h14": 986_109_441,
    "vit_bigg14": 2_539.57e6,  # published to this precision
}


@pytest.fixture(scope="module")
def configs():
    spec = importlib.util.spec_from_file_location("clip_configs", CONFIGS)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", PUBLISHED)
def test_size(configs, name):
    config = configs.get_config(name).to_dict()
    stage = Experiment.from_config(config).build(config["text"]["vocab_size"], None)
    trees = abstract(stage)
    count = sum(leaf.size for leaf in jax.tree.leaves(trees.params))
    assert count == PUBLISHED[name] or (name == "vit_bigg14" and abs(count - PUBLISHED[name]) <= 5000)
    assert f"{count:,}" in re.search(rf"\| {name} .*", configs.__doc__)[0]
    model = stage.model
    table, stats = openai_rules(model), openai_stats(model)
    tensors = shape_only({**shapes(table, trees.params), **shapes(stats, trees.stats)})
    found = read_sizes(tensors, "shape_only")
    assert found.text == model.text and found.embed_dim == model.embed_dim
    if name == "vit_bigg14":  # the same hidden width by a ratio with more digits
        assert abs(found.vision.mlp_ratio - model.vision.mlp_ratio) < 1e-3
        assert found.vision.heads == model.vision.heads
    else:
        assert found.vision == model.vision


def test_all_are_published(configs):
    assert configs.STAGES.keys() == PUBLISHED.keys()
