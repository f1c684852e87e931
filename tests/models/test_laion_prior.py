"""LAION's prior: by theory, and against what three versions of its own library computed.

The recordings' weights are random, in the layouts of the library's 1.15.6 (``laion_prior``: with tables of timesteps,
null embeddings and a rotated part of each head), 1.0.0 (``laion_prior_padding``: sinusoids, several tokens an
embedding) and 0.14.1 (``laion_prior_hidden``: padding hidden from attention, no rotary positions). float32 on CPU.
"""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions
from tiny import close, differ, jitted, normal, random_variables, same

from dalle2_jax.diffusion import Ddpm, make_schedule, predictor, q_sample
from dalle2_jax.errors import UserError
from dalle2_jax.models.multi_query import MultiQueryTransformer, _buckets
from dalle2_jax.models.priors.laion_prior import LaionPriorConfig, LaionPriorNetwork
from dalle2_jax.weights.families.laion import IGNORED, laion_rules, laion_sizes, select_tensors
from dalle2_jax.weights.rules import from_tensors
from dalle2_jax.weights.tensors import open_tensors

FIXTURES = Path(__file__).parent.parent / "fixtures" / "models"
YES, NO = jnp.ones(4, bool), jnp.zeros(4, bool)
TINY = LaionPriorConfig(8, 2, 2, 6, 12, 5, 1000)


class Recorded:
    """A recorded network: its config, its weights as ours, its arguments and all outputs."""

    def __init__(self, name, **changes):
        path = FIXTURES / f"{name}.safetensors"
        tensors = select_tensors(open_tensors(path), path.name)
        arrays = np.load(FIXTURES / f"{name}.npz")
        self.outputs = {key: jnp.asarray(arrays[key]) for key in arrays.files if arrays[key].dtype != np.int64}
        t = jnp.asarray(arrays["t"].astype(np.int32))
        self.args = self.outputs["x_t"], t, *(self.outputs[key] for key in ("text_emb", "text", "mask"))
        sizes = laion_sizes(tensors, path.name)
        if sizes["nulls"] == "hidden":
            sizes["context_length"] = self.args[3].shape[1]
        self.config = LaionPriorConfig(**sizes)
        self.model = LaionPriorNetwork(self.config)
        shapes = jax.eval_shape(self.model.init, jax.random.key(0), *self.args)["params"]
        self.params = {"params": from_tensors(laion_rules(self.config), tensors, shapes, path.name, IGNORED)}

    def __call__(self, *dropped, **changed):
        args = dict(zip(("x_t", "t", "text_emb", "text", "mask"), self.args, strict=True)) | changed
        drops = {"learned": (NO, NO), "padding": (), "hidden": (NO,)}[self.config.nulls]
        return jitted(self.model)(self.params, *args.values(), *dropped, *drops[len(dropped) :])


@pytest.fixture(scope="module")
def learned():
    return Recorded("laion_prior")


@pytest.fixture(scope="module")
def padding():
    return Recorded("laion_prior_padding")


@pytest.fixture(scope="module")
def hidden():
    return Recorded("laion_prior_hidden")


@pytest.mark.parametrize("name", ["learned", "padding", "hidden"])
def test_forward_equals_the_recorded(name, request):
    recorded = request.getfixturevalue(name)
    close(recorded(), recorded.outputs["out"])


def test_what_is_dropped_equals_the_recorded(learned, hidden):
    for recorded in (learned, hidden):
        close(recorded(mask=jnp.ones_like(recorded.args[4])), recorded.outputs["out_no_mask"])
        close(recorded(YES), recorded.outputs["out_null_text"])
    close(learned(YES, YES), learned.outputs["out_null"])
    close(learned(NO, YES), learned.outputs["out_null_image"])


def test_short_captions_are_padded(learned):
    short = learned(text=learned.args[3][:, :10], mask=learned.args[4][:, :10])
    close(short, learned.outputs["out_short"])


def test_position_buckets_equal_the_recorded(learned):
    distances = learned.outputs["buckets"]  # of 0 .. 149
    same(_buckets(np.arange(150), 0)[:, 0], distances)
    same(_buckets(np.array([3]), 5)[0], [3, 2, 1, 0, 0, 0])  # the null key, tokens 0 to 2, itself, the next


def test_guided_sampling_equals_the_recorded(learned):
    """The whole of the library's ancestral sampling: all steps from its noises, at guidance 2.5."""
    run = {key.removeprefix("ddpm/"): value for key, value in learned.outputs.items() if key.startswith("ddpm/")}
    text, schedule = [value[:2] for value in learned.args[2:]], make_schedule("cosine", 60)
    drop = jnp.array([True, True, False, False])  # the two without anything, the two with all
    text = [jnp.concatenate([value, value]) for value in text]
    cache = jitted(learned.model, "encode_prefix")(learned.params, *text, drop)

    def guided(x_t, t):
        both = jnp.concatenate([x_t, x_t]), jnp.concatenate([t, t])
        without, conditioning = jnp.split(learned.model.apply(learned.params, cache, *both, drop, method="denoise"), 2)
        return without + 2.5 * (conditioning - without)

    stepper, predict = Ddpm(), predictor("x0", guided)
    rows = stepper.rows(schedule)

    @jax.jit
    def step(x_t, t, noise):
        row = jax.tree.map(lambda table: jnp.asarray(table)[t], rows)
        return predict(x_t, row.level).x_0, stepper.step(predict, x_t, row, lambda: noise, ())[0]

    x_t, states = run["noise"][0], [*run["x_t"], run["image_emb"] * 24**0.5]
    for turn, t in enumerate(reversed(range(60))):
        x_0, after = step(states[turn], t, run["noise"][turn + 1])
        close(x_0, run["x_0"][turn])
        close(after, states[turn + 1], 1e-4)
        _, x_t = step(x_t, t, run["noise"][turn + 1])
    close(x_t / 24**0.5, run["image_emb"], 1e-4)


def test_loss_equals_the_recorded(learned):
    """Unit image embeddings times sqrt(width) are noised, and the un-noised ones predicted."""
    x_0 = learned.outputs["loss/image_emb"] * 24**0.5
    x_t = q_sample(make_schedule("cosine", 60), x_0, learned.args[1], learned.outputs["loss/noise"])
    close(jnp.square(learned(x_t=x_t) - x_0).mean(), learned.outputs["loss/value"])


def inputs(config, context=None):
    length = context or config.context_length
    mask = jnp.arange(length)[None] < jnp.array([3, length, 1, 2])[:, None]
    t = jnp.array([0, 3, 500, 999], jnp.int32)
    return normal(1, 4, config.width), t, normal(2, 4, config.width), normal(3, 4, length, config.width), mask


VARIANTS = {
    "learned": TINY,
    "padding": replace(
        TINY, nulls="padding", attention="relaxed", timesteps=None, text_tokens=2, image_tokens=2, norm_in=True
    ),
    "hidden": replace(TINY, nulls="hidden", attention="dot", rotary=False, norm_out=False, time_tokens=2),
}


@pytest.fixture(scope="module", params=VARIANTS)
def prior(request):
    config = VARIANTS[request.param]
    params = random_variables(LaionPriorNetwork(config), *inputs(config))
    if config.attention == "relaxed":  # or the bias alone would say where to look
        params["params"]["transformer"]["position_bias"] /= 128
    return config, params, inputs(config)


def test_every_input_matters(prior):
    config, params, args = prior
    predict = jitted(LaionPriorNetwork(config))
    out = predict(params, *args)
    assert out.shape == (4, 8) and out.dtype == jnp.float32
    shift = jnp.linspace(0, 1, config.width)
    for i, arg in enumerate(args[:4]):
        changed = jnp.abs(arg - 2) if arg.dtype == jnp.int32 else arg + shift.reshape((1,) * (arg.ndim - 1) + (-1,))
        differ(predict(params, *args[:i], changed, *args[i + 1 :]), out)


def test_padding_and_the_length_of_text_emb_have_no_effect(prior):
    config, params, (x_t, t, text_emb, text, mask) = prior
    predict = jitted(LaionPriorNetwork(config))
    out = predict(params, x_t, t, text_emb, text, mask)
    same(out, predict(params, x_t, t, text_emb, jnp.where(mask[:, :, None], text, 7.0), mask))
    close(out, predict(params, x_t, t, 3 * text_emb, text, mask))
    differ(out[0], predict(params, x_t, t, text_emb, text, jnp.ones_like(mask))[0])


def test_tokens_see_none_after_them():
    model = MultiQueryTransformer(TINY.transformer())
    x, visible = normal(5, 2, 7, 8), jnp.array([[True] * 7, [False] + [True] * 6])
    params = random_variables(model, x, visible)
    out = jitted(model)(params, x, visible)
    late = jitted(model)(params, x.at[:, 4:].set(jnp.flip(x[:, 4:], axis=2)), visible)
    same(late[:, :4], out[:, :4])
    differ(late[:, 4:], out[:, 4:])
    early = jitted(model)(params, x.at[:, 0].set(-x[:, 0]), visible)
    differ(early[0, 6], out[0, 6])
    same(early[1, 1:], out[1, 1:])  # there it is not to be seen


def test_cached_equals_full(prior):
    config, params, (x_t, t, *text) = prior
    model, drops = LaionPriorNetwork(config), [YES & (jnp.arange(4) % 2 == 0)] if config.learned_null else []
    cache = jitted(model, "encode_prefix")(params, *text, *drops)
    for step in (t, jnp.flip(t)):  # one cache, many steps
        close(jitted(model, "denoise")(params, cache, x_t, step), jitted(model)(params, x_t, step, *text, *drops))


def test_dropped_parts_equal_their_null_embeddings():
    model, (x_t, t, text_emb, text, mask) = LaionPriorNetwork(TINY), inputs(TINY)
    params, predict = random_variables(model, x_t, t, text_emb, text, mask), jitted(model)
    # only the direction of a text embedding is read, so that only a null of unit length can be given as one
    null = params["params"]["null_text_emb"]
    params["params"]["null_text_emb"] = null / jnp.linalg.norm(null)
    names = ("null_image_emb", "null_text_emb", "null_text")
    image, summary, states = (
        jnp.broadcast_to(params["params"][name], x.shape) for name, x in zip(names, (x_t, text_emb, text), strict=True)
    )
    dropped = predict(params, x_t, t, text_emb, text, mask, YES, YES)
    close(dropped, predict(params, image, t, summary, states, mask | True, NO, NO))
    same(dropped, predict(params, 5 + x_t, t, jnp.flip(text_emb), jnp.flip(text), jnp.flip(mask), YES, YES))
    for drops in ((NO, YES), (YES, NO)):
        differ(dropped, predict(params, x_t, t, text_emb, text, mask, *drops))
    close(predict(params, x_t, t, text_emb, text, mask, NO, NO), predict(params, x_t, t, text_emb, text, mask))


def test_hidden_text_is_forgotten():
    config = VARIANTS["hidden"]
    model, (x_t, t, text_emb, text, mask) = LaionPriorNetwork(config), inputs(config)
    params, drop = random_variables(model, x_t, t, text_emb, text, mask), jnp.array([True, False, True, False])
    out = jitted(model)(params, x_t, t, text_emb, text, mask, drop)
    other = jitted(model)(params, x_t, t, jnp.flip(text_emb), jnp.flip(text), jnp.flip(mask), drop)
    same(out[::2], other[::2])
    differ(out[1::2], other[1::2])


def test_every_parameter_has_a_gradient():
    model, args = LaionPriorNetwork(TINY), inputs(TINY)
    drops = [jnp.arange(4) == 0, jnp.arange(4) == 1]  # their null embeddings learn too

    @jax.jit
    @jax.grad
    def gradients(params):
        return jnp.square(model.apply(params, *args, *drops)).sum()

    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients(random_variables(model, *args))):
        assert jnp.isfinite(gradient).all() and (gradient != 0).any(), jax.tree_util.keystr(path)


def test_bfloat16_and_remat(prior):
    config, params, args = prior
    half = jitted(LaionPriorNetwork(replace(config, dtype="bfloat16", remat=True)))(params, *args)
    assert half.dtype == jnp.float32
    close(half, jitted(LaionPriorNetwork(config))(params, *args), 0.1)
    zeros = [jnp.zeros_like(arg) for arg in args]
    assert jnp.isfinite(jitted(LaionPriorNetwork(replace(config, dtype="bfloat16", remat=True)))(params, *zeros)).all()


def test_mistakes():
    with pytest.raises(UserError, check=mentions("nulls", "'none'", "padding")):
        replace(TINY, nulls="none")
    with pytest.raises(UserError, check=mentions("attention", "'flash'", "relaxed")):
        replace(TINY, attention="flash")
    with pytest.raises(UserError, check=mentions("head_width 5", "even")):
        replace(TINY, head_width=5)
    long = LaionPriorNetwork(TINY), inputs(TINY, context=6)
    with pytest.raises(UserError, check=mentions("6 tokens", "prior", "context_length", 5)):
        random_variables(long[0], *long[1])
    for name, dropped, fact in (
        ("padding", (YES,), "empty caption"),
        ("padding", (None, YES), "null image embedding"),
        ("hidden", (NO, YES), "null image embedding"),
    ):
        with pytest.raises(UserError, check=mentions("prior", fact)):
            random_variables(LaionPriorNetwork(VARIANTS[name]), *inputs(VARIANTS[name]), *dropped)
