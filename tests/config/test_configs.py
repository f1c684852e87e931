"""Every config of ``configs/`` builds, from shapes alone; the paper's have the paper's sizes.

A config file may have ``sweep(which)``, a list of ``{"section.field": value}``: each is tried too.
"""

import dataclasses
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict
from raised import mentions

from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.specs import STAGES
from dalle2_jax.diffusion import NoiseStatistics
from dalle2_jax.errors import ConfigError, UsageError
from dalle2_jax.stages import DiffusionStage, abstract_variables
from dalle2_jax.training.optim import make_optimizer
from dalle2_jax.training.step import abstract_state

ROOT = pathlib.Path(__file__).parents[2]


def load(path):
    """Returns a config file as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


FILES = {path.stem: load(path) for path in sorted(ROOT.glob("configs/*.py"))}
NAMED = [(family, which) for family, module in FILES.items() for which in module.STAGES]


def variants(module, which):
    """Yields the config of a stage, and each entry of its sweep."""
    yield module.get_config(which)
    for overrides in getattr(module, "sweep", lambda which: ())(which):
        config = module.get_config(which)
        config.unlock()
        config.update_from_flattened_dict(overrides)
        yield config


def stage_of(module, config, form=""):
    """Returns a config's stage, with the clip of the same file and form; as many pieces of text as it asks for."""
    vocab_size = config.text.vocab_size
    clip = None
    if "clip" in Experiment.from_config(config).requires:
        clip = Experiment.from_config(module.get_config(f"clip{form}").to_dict()).build(vocab_size, None)
    return Experiment.from_config(config.to_dict()).build(vocab_size, clip)


def measured(stage):
    """Returns the stage with the moments that are measured after training, where its sampling asks for them."""
    if stage.sampling.variance != "analytic":
        return stage
    return dataclasses.replace(stage, noise_statistics=NoiseStatistics((1.0,) * stage.diffusion.num_steps, 1.0))


def builds(module, config, form=""):
    """Goes through a whole config as training and sampling do, and makes no array."""
    stage = stage_of(module, config, form)
    experiment = Experiment.from_config(config)
    experiment.check_trainable()
    run, side, length = experiment.run, experiment.resolution, experiment.spec.text.context_length
    optimizer = make_optimizer(experiment.optim, run.total_steps)
    state = abstract_state(stage, optimizer)  # every parameter is under a rule of weight decay, too
    if (stage, side, length) not in COMPUTED:  # a sweep over the optimizer's fields computes the same
        computes(stage, state, side, length)
        COMPUTED.add((stage, side, length))
    return stage, state.params


COMPUTED = set()


def computes(stage, state, side, length):
    """Traces a stage's loss on a batch of so large images and so long captions, and its sampling."""
    batch = {
        "image": jax.ShapeDtypeStruct((2, side, side, 3), jnp.uint8),
        "tokens": jax.ShapeDtypeStruct((2, length), jnp.int32),
        "mask": jax.ShapeDtypeStruct((2, length), jnp.bool_),
    }
    key = jax.random.key(0)
    frozen = {name: abstract_variables(stage.clip if name == "clip" else stage) for name in stage.requires}

    def loss(params, stats, frozen, batch):
        return stage.loss(params, stats, frozen, key, stage.prepare(frozen, batch))[0]

    assert jax.eval_shape(loss, state.params, state.stats, frozen, batch).shape == ()
    if isinstance(stage, DiffusionStage):
        target = measured(stage)
        target.check_sampling(stage.sampling)

        def generate(params, stats, frozen, batch):
            _, condition = stage.example(stats, key, stage.prepare(frozen, batch))
            return target.sample_x_0(params, jax.random.split(key, 2), condition, target.plan(stage.sampling))

        samples = jax.eval_shape(generate, state.params, state.stats, frozen, batch)
        assert samples.dtype == jnp.float32 and samples.shape[0] == 2


@pytest.mark.parametrize(("family", "which"), NAMED)
def test_builds(family, which):
    module = FILES[family]
    name, comma, form = which.partition(",")
    for config in variants(module, which):
        assert config.stage == (name if name in STAGES else "clip")  # configs/clip.py names sizes
        builds(module, config, comma + form)


@pytest.mark.parametrize("family", FILES)
def test_page(family):
    """A config file is a runnable page: its docstring has the command, and an unknown stage is answered."""
    assert f"python train.py --config configs/{family}.py:" in FILES[family].__doc__
    name = [*FILES[family].STAGES][-1]
    with pytest.raises(UsageError, check=mentions(f"configs/{family}.py", f"'{name}x'", f"'{name}'")):
        FILES[family].get_config(f"{name}x")


def test_sweep_is_tried(tmp_path):
    (tmp_path / "swept.py").write_text(
        "from tiny_system import STAGES, get_config\n"
        "def sweep(which):\n"
        "    return [{'optim.lr': 0.1}, {'optim.lrr': 0.1}]\n"
    )
    module = load(tmp_path / "swept.py")
    _, good, bad = variants(module, "clip")
    builds(module, good)
    with pytest.raises(ConfigError, check=mentions("'lr'", field="optim.lrr")):
        builds(module, bad)


# --- the paper's sizes ----------------------------------------------------------------------


def count(tree):
    """Returns the number of parameters in a tree of shapes."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def transformer(width, layers):
    """Parameters of a transformer's blocks: 12 D^2 weights, and 13 D offsets and gains, a layer."""
    return layers * (12 * width**2 + 13 * width)


PAPER = {
    # stage: (what the paper says, the least and the most it may be here). Table 3 rounds to one digit or two.
    "clip": ("ViT-H/16", 980e6, 990e6),  # 0.93 B in blocks; 0.05 B in the token embedding
    "prior": ("1B", 1.2e9, 1.5e9),  # 1.209 B in blocks, 0.1 B in the token embedding
    # nominal: the two transformers alone have 1.209 + 0.798 B in blocks, then embedding and cross-attention
    "ar_prior": ("1B", 2.0e9, 2.4e9),
    "decoder": ("3.5B", 3.4e9, 3.6e9),
    "upsampler_1": ("700M", 650e6, 750e6),
    "upsampler_2": ("300M", 250e6, 350e6),
}

UPSAMPLERS = {
    # the network of Table 3's columns with the time embedding added, and with scale and shift, in millions
    "upsampler_1": {False: 691.6, True: 729.7},
    "upsampler_2": {False: 267.1, True: 282.1},
}


@pytest.fixture(scope="module")
def paper():
    module = FILES["paper"]
    stages = {which: stage_of(module, module.get_config(which)) for which in module.STAGES}
    return {name: (stage, jax.eval_shape(stage.init, jax.random.key(0)).params) for name, stage in stages.items()}


def test_paper_sizes(paper, capsys):
    """All five columns of Table 3 and CLIP; ``capsys`` is off so that the table is seen in every run."""
    assert paper.keys() == PAPER.keys()
    with capsys.disabled():
        print(f"\n{'configs/paper.py':<18}{'parameters':>16}   the paper says")
        for name, (published, _, _) in PAPER.items():
            print(f"{name:<18}{count(paper[name][1]):>16,}   {published}")
    for name, (_, least, most) in PAPER.items():
        assert least <= count(paper[name][1]) <= most, name


def test_paper_transformers(paper):
    """Every transformer that the paper gives a width and a depth has them."""
    params = {name: tree for name, (_, tree) in paper.items()}
    for blocks, width, depth in (
        (params["clip"]["visual"]["transformer"], 1280, 32),
        (params["clip"]["text"]["transformer"], 1024, 24),
        (params["prior"]["transformer"], 2048, 24),
        (params["decoder"]["caption_encoder"]["transformer"], 2048, 24),
        (params["ar_prior"]["caption_encoder"]["transformer"], 2048, 24),
        (params["ar_prior"]["latent_decoder"], 1664, 24),
    ):
        assert count(blocks) == transformer(width, depth)
    assert 2.2e9 < count(params["decoder"]["unet"]) < 2.4e9  # GLIDE: about 2.3 B and a text encoder of 1.2 B


@pytest.mark.parametrize("name", UPSAMPLERS)
def test_paper_upsamplers(paper, name):
    stage, params = paper[name]
    assert round(count(params) / 1e6, 1) == UPSAMPLERS[name][stage.model.scale_shift]
    kinds = {jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)}
    assert not any("attn" in kind or "qkv" in kind for kind in kinds)


PUBLISHED = {
    # (file, config): the released checkpoint's parameters, exactly
    ("glide", "decoder"): 385_030_726,
    ("glide", "upsampler_1"): 398_361_286,
    ("glide", "decoder,inpaint"): 385_037_638,
    ("glide", "upsampler_1,inpaint"): 398_368_198,
    ("adm", "decoder"): 295_904_454,
    ("adm", "decoder,256"): 553_838_086,
    ("adm", "upsampler_1"): 311_795_910,
}


@pytest.mark.parametrize(("family", "which"), PUBLISHED)
def test_published_sizes(family, which):
    stage = stage_of(FILES[family], FILES[family].get_config(which))
    assert count(jax.eval_shape(stage.init, jax.random.key(0)).params) == PUBLISHED[family, which]


# --- mistakes -------------------------------------------------------------------------------

TOP = ["seed", "total_steps", "batch_size", "log_every", "checkpoint_every", "data", "model", "optim", "mesh"]


@pytest.mark.parametrize(("family", "which"), NAMED)
def test_names_at_the_top(family, which):
    """DESIGN.md: names that every config has at its top."""
    config = FILES[family].get_config(which)
    assert isinstance(config, ConfigDict) and {*TOP} <= {*config}


def sections(config, path=""):
    """Yields the path of every section of a config."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield f"{path}{name}"
            yield from sections(value, f"{path}{name}.")


@pytest.mark.parametrize("which", FILES["shapes"].STAGES)
def test_unknown_field_anywhere(which):
    """A field that is not there is an error in every section, and offers the nearest name."""
    module = FILES["shapes"]
    paths = ["", *sections(module.get_config(which).to_dict())]
    assert {"model", "optim", "data", "mesh", "text"} <= {*paths}
    for path in paths:
        config = module.get_config(which)
        section = config[path] if path else config
        name = next(key for key in sorted(section) if key != "kind")
        with section.unlocked():
            section[f"{name}x"] = section[name]
        with pytest.raises(
            ConfigError, check=mentions(f"'{name}'", field=".".join([*path.split("."), f"{name}x"]).lstrip("."))
        ):
            builds(module, config)
