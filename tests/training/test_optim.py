"""The optimizer by theory: rates, decay, clipping, and the average of the weights."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from raised import mentions

from dalle2_jax import testing
from dalle2_jax.config.parse import expand
from dalle2_jax.errors import ConfigError, SystemWarning
from dalle2_jax.models.priors.laion_prior import LaionPriorConfig
from dalle2_jax.training.optim import (
    OptimConfig,
    changed_state_field,
    decay_mask,
    ema_update,
    learning_rate,
    make_optimizer,
    path_name,
    state_structure,
)


def rates(total=100, **fields):
    schedule = learning_rate(OptimConfig(lr=0.5, **fields), total)
    return np.asarray([float(schedule(step)) for step in range(total + 1)])


def test_the_rate_warms_up_linearly_and_stays():
    values = rates(warmup_steps=10)
    np.testing.assert_allclose(values[0], 0.05, rtol=1e-5)  # the first step moves
    np.testing.assert_allclose(np.diff(values[:10]), np.diff(values[:2])[0] * np.ones(9), rtol=1e-4)
    assert (np.diff(values[:11]) > 0).all()
    np.testing.assert_allclose(values[10:], 0.5)
    np.testing.assert_allclose(rates(), 0.5)


@pytest.mark.parametrize("warmup", [0, 20])
def test_the_rate_falls_by_half_a_cosine(warmup):
    values = rates(warmup_steps=warmup, schedule="cosine")
    done = np.arange(101 - warmup) / (100 - warmup)
    np.testing.assert_allclose(values[warmup:], 0.25 * (1 + np.cos(math.pi * done)), atol=1e-6)
    assert values.argmax() == warmup and values[-1] < 1e-7


def test_an_unknown_schedule_is_a_config_error():
    with pytest.raises(ConfigError, check=mentions("'linear'", "'cosine'", field="optim.schedule")):
        learning_rate(OptimConfig(schedule="linear"), 10)


@pytest.mark.parametrize(("total", "steps"), [(10, 1), (40, 4), (3, 0), (100, 10)])
def test_a_short_run_warms_up_for_a_tenth_of_its_steps(total, steps):
    """As a smoke test with --config.total_steps=40 does."""
    with pytest.warns(SystemWarning, match="optim.warmup_steps"):
        values = rates(total, warmup_steps=100)
    np.testing.assert_allclose(values, rates(total, warmup_steps=steps))


def test_a_run_that_is_longer_than_its_warm_up_keeps_it():
    assert rates(101, warmup_steps=100).argmax() == 100


# --- decay ------------------------------------------------------------------------------------


def stages():
    """Every stage, and networks with parameters that the tiny ones lack."""
    for kind in testing.KINDS:
        yield kind, testing.tiny_stage(kind)
    decoder, prior = testing.tiny_stage("decoder"), testing.tiny_stage("prior")
    clip_text = {"text_input": "clip", "text_width": testing.WIDTH}
    shape = {"channel_mult": (1, 2), "resblock_updown": False, "attention_resolutions": (8,)}
    unet = dataclasses.replace(decoder.model.unet, **shape)
    karlo = dataclasses.replace(decoder.model, unet=unet, text=None, text_emb_proj=True, **clip_text)
    yield "decoder of clip's text", dataclasses.replace(decoder, model=karlo)
    yield (
        "prior of clip's text",
        dataclasses.replace(prior, model=dataclasses.replace(prior.model, vocab_size=None, **clip_text)),
    )
    sizes = {"timesteps": None, "text_tokens": 2, "image_tokens": 2, "norm_in": True}
    laion = LaionPriorConfig(testing.EMBED_DIM, 1, 2, 6, 12, **sizes)
    yield "prior of LAION's", dataclasses.replace(prior, model=laion)


STAGES = dict(stages())
CLIPS = [name for name in STAGES if name.startswith("clip")]


def decayed_of(stage):
    """Returns whether each of a stage's parameters is decayed, by name."""
    params = jax.eval_shape(stage.init, jax.random.key(0)).params
    mask = jax.tree_util.tree_leaves_with_path(decay_mask(params, stage.training_rules.decay))
    assert len(mask) == len(jax.tree.leaves(params))
    return {path_name(path): decayed for path, decayed in mask}


@pytest.mark.parametrize("name", CLIPS)
def test_clip_decays_all_but_gains_and_biases(name):
    """Radford et al. 2021, section 2.5."""
    for path, decayed in decayed_of(STAGES[name]).items():
        assert decayed != (path.rpartition("/")[2] in ("bias", "scale", "logit_scale")), path


EMBEDDINGS = {
    "clip_vit": {
        *("text/token_embedding/embedding", "text/positional_embedding", "text/proj/kernel", "visual/proj/kernel"),
        *("visual/class_embedding", "visual/positional_embedding", "visual/patch_embed/kernel"),
    },
    "clip_resnet": {
        *("text/token_embedding/embedding", "text/positional_embedding", "text/proj/kernel"),
        *("visual/pool/positional_embedding", "visual/pool/query/kernel", "visual/stem_1/conv/kernel"),
    },
}
GAINS = {
    "clip_vit": {"logit_scale", "text/ln_final/scale", "text/ln_final/bias", "visual/ln_pre/scale"},
    "clip_resnet": {"logit_scale", "text/ln_final/scale", "visual/stem_1/norm/scale", "visual/pool/query/bias"},
}


@pytest.mark.parametrize("name", EMBEDDINGS)
def test_clips_embeddings_are_decayed_by_name(name):
    decayed = decayed_of(STAGES[name])
    assert all(decayed[path] for path in EMBEDDINGS[name])
    assert not any(decayed[path] for path in GAINS[name])


@pytest.mark.parametrize("name", [name for name in STAGES if name not in CLIPS])
def test_decay_reaches_every_matrix_and_nothing_else(name):
    mask = decayed_of(STAGES[name]).items()
    for name, decayed in mask:
        assert decayed == name.endswith("/kernel"), name
        assert not (decayed and ("embedding" in name or "bias" in name)), name
    assert {True, False} == {decayed for _, decayed in mask}


def test_an_optimizer_decays_by_a_stages_rules():
    params = {"positional_embedding": jnp.ones(2), "kernel": jnp.ones(2), "bias": jnp.ones(2)}
    optimizer = make_optimizer(OptimConfig(lr=0.1, weight_decay=0.5), 10, STAGES["clip_vit"].training_rules.decay)
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    assert {name: bool(update.any()) for name, update in updates.items()} == {
        **{"positional_embedding": True, "kernel": True, "bias": False}
    }


def test_a_parameter_that_no_rule_covers_is_an_error():
    with pytest.raises(ValueError, check=mentions("a/gate")):
        decay_mask({"a": {"gate": jnp.zeros(1)}})


def step(config, params, grads, state=None):
    optimizer = make_optimizer(config, 100)
    state = optimizer.init(params) if state is None else state
    return optimizer.update(grads, state, params)


PARAMS = {"kernel": jnp.full((2, 2), 4.0), "bias": jnp.full(2, 4.0)}


def test_decay_is_decoupled_from_the_gradient():
    updates, _ = step(OptimConfig(lr=0.1, weight_decay=0.5), PARAMS, jax.tree.map(jnp.zeros_like, PARAMS))
    np.testing.assert_allclose(updates["kernel"], -0.1 * 0.5 * 4.0)  # lr x decay x value
    np.testing.assert_allclose(updates["bias"], 0.0)


def test_two_steps_are_adams():
    config = OptimConfig(lr=0.1, beta1=0.8, beta2=0.9, eps=1e-3, clip_norm=0.0)
    grads = [{"kernel": jnp.full((2, 2), g), "bias": jnp.full(2, -g)} for g in (0.3, -0.1)]
    first, state = step(config, PARAMS, grads[0])
    second, _ = step(config, PARAMS, grads[1], state)
    mean, square = 0.2 * 0.3, 0.1 * 0.09  # Kingma & Ba 2015, algorithm 1
    expected = [-0.1 * (mean / 0.2) / (math.sqrt(square / 0.1) + 1e-3)]
    mean, square = 0.8 * mean + 0.2 * -0.1, 0.9 * square + 0.1 * 0.01
    expected += [-0.1 * (mean / (1 - 0.8**2)) / (math.sqrt(square / (1 - 0.9**2)) + 1e-3)]
    for update, value in zip((first, second), expected, strict=True):
        np.testing.assert_allclose(update["kernel"], value, rtol=1e-5)
        np.testing.assert_allclose(update["bias"], -value, rtol=1e-5)


@pytest.mark.parametrize(("clip_norm", "norm"), [(1.0, 1.0), (0.0, 10.0), (20.0, 10.0)])
def test_gradients_are_clipped_by_their_global_norm(clip_norm, norm):
    grads = jax.tree.map(lambda leaf: leaf * 10 / math.sqrt(6) / 4, PARAMS)
    _, state = step(OptimConfig(clip_norm=clip_norm), PARAMS, grads)
    leaves = jax.tree.leaves(state, is_leaf=lambda leaf: hasattr(leaf, "mu"))
    (moments,) = (leaf for leaf in leaves if hasattr(leaf, "mu"))
    mean = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(moments.mu)])
    np.testing.assert_allclose(np.linalg.norm(mean), 0.1 * norm, rtol=1e-5)  # (1 - beta1) x gradient


# --- average ----------------------------------------------------------------------------------


def test_the_average_follows_its_formula():
    generator = np.random.default_rng(0)
    ema, by_hand = {"w": jnp.zeros(3)}, np.zeros(3)
    for done in range(1, 40):
        params = generator.standard_normal(3)
        ema = ema_update(ema, {"w": jnp.asarray(params, jnp.float32)}, jnp.int32(done), 0.7)
        decay = min(0.7, (1 + done) / (10 + done))
        by_hand = decay * by_hand + (1 - decay) * params
    np.testing.assert_allclose(ema["w"], by_hand, atol=1e-6)


def test_the_average_of_a_constant_is_the_constant():
    params = {"w": jnp.asarray([0.1, 1e8, -3.3e-7])}
    for done in (1, 100, 1_000_000):
        np.testing.assert_array_equal(ema_update(params, params, jnp.int32(done), 0.9999)["w"], params["w"])


CHANGES = {"lr": 1.0, "warmup_steps": 5, "schedule": "cosine", "beta1": 0.5, "beta2": 0.5, "eps": 1e-3}
CHANGES |= {"weight_decay": 0.0, "clip_norm": 7.0, "ema_decay": 0.0, "sam_rho": 0.1, "sam_batch": 4}
CHANGES |= {"accumulate": 2, "ema_memory": "pinned_host"}
OF_STATE = ("name", "mu_dtype")


FIELDS = [field.name for field in dataclasses.fields(OptimConfig) if field.name not in OF_STATE]


@pytest.mark.parametrize("field", FIELDS)
def test_the_state_has_one_structure_whatever_the_values(field):
    """So that a run may continue with others."""
    before = OptimConfig(weight_decay=0.1)
    after = dataclasses.replace(before, **{field: CHANGES[field]})
    assert before != after and state_structure(before) == state_structure(after)


@pytest.mark.parametrize(
    "change", [{"clip_norm": 0.0}, {"name": "adafactor"}, {"name": "muon"}, {"mu_dtype": "bfloat16"}], ids=str
)
def test_a_change_of_the_states_form_is_named(change):
    before, after = OptimConfig(), OptimConfig(lr=1.0, **change)
    assert state_structure(before) != state_structure(after)
    assert changed_state_field(before, after) == next(iter(change))
    assert changed_state_field(before, OptimConfig(lr=1.0)) is None


# --- memory -----------------------------------------------------------------------------------

SQUARE = {"kernel": jnp.full((256, 128), 4.0)}


def bytes_of(state):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(state))


def test_bfloat16_moments_take_half_the_memory_and_lead_to_nearly_the_same_updates():
    grads = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((256, 128), np.float32))}
    (wanted, full), (got, half) = (
        step(OptimConfig(lr=0.1, weight_decay=0.1, mu_dtype=dtype), SQUARE, grads) for dtype in ("float32", "bfloat16")
    )
    assert bytes_of(full) - bytes_of(half) == 2 * 256 * 128
    np.testing.assert_allclose(got["kernel"], wanted["kernel"], atol=0.1 * 2**-7)
    assert got["kernel"].dtype == jnp.float32


def test_adafactor_stores_a_row_and_a_column_of_second_moments():
    grads = {"kernel": jnp.full((256, 128), -0.3)}
    update, state = step(OptimConfig(name="adafactor", lr=0.1, beta1=0.0, weight_decay=0.5), SQUARE, grads)
    assert bytes_of(state) < 4 * 3 * (256 + 128)
    # sqrt of the second moment is the gradient's size; its root mean square is not above 1
    np.testing.assert_allclose(update["kernel"], 0.1 * (1.0 - 0.5 * 4.0), rtol=1e-5)
    _, with_momentum = step(OptimConfig(name="adafactor", mu_dtype="bfloat16"), SQUARE, grads)
    assert bytes_of(with_momentum) > 2 * 256 * 128


# --- Muon -------------------------------------------------------------------------------------

KERNELS = {
    "unet/conv_1/kernel": ((3, 3, 16, 32), [(144, 32)]),
    "fc_1/kernel": ((48, 24), [(48, 24)]),
    "unet/attn/qkv/kernel": ((48, 3, 4, 16), [(48, 16)] * 12),
    "unet/attn/out/kernel": ((4, 16, 48), [(64, 48)]),
    "text/blocks/attn/out/kernel": ((2, 4, 16, 48), [(64, 48)] * 2),
    "text/blocks/fc/kernel": ((2, 32, 64), [(32, 64)] * 2),
}
"""Kernels by path: their shapes, and the matrices that Muon makes orthogonal."""


@pytest.mark.parametrize("name", KERNELS)
def test_muon_updates_each_matrix_by_a_nearly_orthogonal_one(name):
    shape, matrices = KERNELS[name]
    grads = {name: jnp.asarray(np.random.default_rng(0).standard_normal(shape, np.float32))}
    update, _ = step(OptimConfig(name="muon", lr=0.1), {name: jnp.ones(shape)}, grads)
    found = -update[name]
    heads_first = jnp.moveaxis(found.reshape(48, 12, 16), 1, 0) if "qkv" in name else found
    values = jnp.linalg.svd(heads_first.reshape(len(matrices), *matrices[0]), compute_uv=False) / (
        0.1 * 0.2 * max(matrices[0]) ** 0.5
    )
    assert float(values.min()) > 0.6 and float(values.max()) < 1.3  # Newton-Schulz leaves 0.7 to 1.2
    root_mean_square = float(jnp.sqrt(jnp.mean(found**2)))
    np.testing.assert_allclose(root_mean_square, 0.1 * 0.2, rtol=0.2)
    assert float(jnp.sum(found * grads[name])) > 0  # downhill


def test_muon_leaves_other_parameters_to_adam():
    params = {"bias": jnp.ones((4,)), "token_embedding": {"embedding": jnp.ones((8, 4))}, "scale": jnp.ones(4)}
    grads = jax.tree.map(lambda leaf: 0.3 * leaf, params)
    update, _ = step(OptimConfig(name="muon", lr=0.1, clip_norm=0.0, weight_decay=0.5), params, grads)
    adam = optax.nadam(0.1, b1=0.9, b2=0.999)
    with jax.numpy_dtype_promotion("standard"):
        expected, _ = adam.update(grads, adam.init(params), params)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), update, expected)


def test_muon_decays_kernels():
    params = {"kernel": jnp.full((8, 4), 2.0)}
    grads = {"kernel": jnp.eye(8, 4)}
    config = OptimConfig(name="muon", lr=0.1)
    (plain, _), (decayed, _) = (
        step(dataclasses.replace(config, weight_decay=decay), params, grads) for decay in (0, 0.5)
    )
    np.testing.assert_allclose(decayed["kernel"] - plain["kernel"], -0.1 * 0.5 * 2.0, rtol=1e-5)


@pytest.mark.parametrize(
    "section, field, facts",
    [
        ({"name": "adamv"}, "optim", ["adamv", "adamw", "adafactor", "muon"]),
        ({"ema_memory": "host"}, "optim", ["host", "pinned_host"]),
        ({"mu_dtype": "float16"}, "optim.mu_dtype", ["float16", "bfloat16"]),
        ({"accumulate": 0}, "optim.accumulate", [0]),
    ],
)
def test_unknown_choices_are_rejected(section, field, facts):
    with pytest.raises(ConfigError, check=mentions(*facts, field=field)):
        expand(OptimConfig, section, "optim")
