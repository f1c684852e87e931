"""LoRA by theory: the first step is the base's, a change is the product of its factors, and only factors learn."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core
from raised import mentions

from dalle2_jax import rng, testing
from dalle2_jax.errors import UserError
from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.priors.prior import PriorConfig
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.models.vit import VisionConfig
from dalle2_jax.stages import (
    ClipStage,
    DecoderStage,
    DiffusionConfig,
    LoraConfig,
    LoraStage,
    PriorStage,
    SamplingConfig,
    Variables,
    abstract_variables,
)
from dalle2_jax.stages.lora import TARGETS, merge
from dalle2_jax.training.accumulation import loss_and_gradients

CONVOLUTIONS = (r"conv_\d/kernel$", r"(^|/)skip/kernel$")
BATCH = testing.tiny_batch(4)


def lora_of(kind, **fields):
    targets = CONVOLUTIONS if kind == "upsampler" else TARGETS
    return LoraStage(testing.tiny_stage(kind), LoraConfig(**{"rank": 2, "alpha": 3.0, "targets": targets, **fields}))


def frozen_of(stage):
    """The weights that a LoRA requires."""
    return {**testing.tiny_frozen(stage.inner), stage.name: testing.tiny_variables(stage.inner)}


def named(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves_of(tree)}


def leaves_of(tree):
    return jax.tree_util.tree_leaves_with_path(tree)


def trained(stage, seed=1):
    """Factors as training might leave them: none is zero."""
    noise = np.random.default_rng(seed)
    shapes = jax.eval_shape(stage.init, jax.random.key(0)).params
    return jax.tree.map(lambda leaf: jnp.asarray(0.1 * noise.standard_normal(leaf.shape, np.float32)), shapes)


# --- the change -------------------------------------------------------------------------------

KERNELS = {
    # path: (its shape, the shape as a stack of matrices [layers, in, out])
    "transformer/blocks/attn/qkv": ((2, 6, 3, 2, 5), (2, 6, 30)),
    "transformer/blocks/attn/out": ((2, 3, 2, 5), (2, 6, 5)),
    "transformer/blocks/fc": ((2, 6, 20), (2, 6, 20)),
    "blocks/attn/q": ((2, 6, 2, 5), (2, 6, 10)),  # of heads that share their keys, and a gated MLP
    "blocks/attn/kv": ((2, 6, 2, 5), (2, 6, 10)),
    "gated/blocks/fc": ((2, 6, 2, 20), (2, 6, 40)),
    "mid_attn/attn/qkv": ((6, 3, 2, 5), (1, 6, 30)),
    "mid_attn/attn/context_kv": ((6, 2, 2, 5), (1, 6, 20)),
    "mid_attn/attn/out": ((2, 3, 5), (1, 6, 5)),
    "context_kv": ((6, 4, 2, 2, 5), (1, 6, 80)),  # the autoregressive prior's: every layer's at once
    "image_token_proj": ((6, 4, 5), (1, 6, 20)),
    "pool/query": ((6, 2, 5), (1, 6, 10)),
    "pool/out": ((2, 3, 5), (1, 6, 5)),
    "mid_0/conv_1": ((3, 3, 4, 5), (1, 36, 5)),
    "text_seq_proj": ((6, 5), (1, 6, 5)),
}


@dataclasses.dataclass(frozen=True)
class Kernels:
    """A stage of one kernel."""

    path: str
    name: str = "kernels"
    requires: tuple[str, ...] = ()

    def init(self, key):
        tree = {"kernel": jnp.zeros(KERNELS[self.path][0]), "bias": jnp.zeros(3)}
        for name in reversed(self.path.split("/")):
            tree = {name: tree}
        return Variables(tree, {})


@pytest.mark.parametrize("path", KERNELS)
def test_a_change_is_the_product_of_its_factors(path):
    """Of rank 2, seen as matrices from inputs to outputs, layer by layer; scaled by alpha / rank."""
    shape, matrices = KERNELS[path]
    config = LoraConfig(rank=2, alpha=3.0, targets=(r"kernel$",))
    stage = LoraStage(Kernels(path), config)
    factors = trained(stage)
    a, b = (np.asarray(named(factors)[f"{path}/lora_{name}"], np.float64) for name in "ab")
    layers, inputs, outputs = matrices
    base = jax.tree.map(lambda leaf: leaf + 1.0, stage.inner.init(None).params)
    merged = named(merge(base, factors, config))
    wanted = 1.0 + 1.5 * np.matmul(a.reshape(layers, inputs, 2), b.reshape(layers, 2, outputs))
    np.testing.assert_allclose(merged[f"{path}/kernel"], wanted.reshape(shape), rtol=1e-6)
    np.testing.assert_array_equal(merged[f"{path}/bias"], np.ones(3))
    assert a.size + b.size == layers * 2 * (inputs + outputs)


def test_fresh_factors_are_a_gaussian_of_the_inputs_and_zero():
    stage = LoraStage(Kernels("mid_0/conv_1"), LoraConfig(rank=512, targets=("conv_1",)))
    fresh = named(stage.init(jax.random.key(0)).params)
    np.testing.assert_allclose(np.std(fresh["mid_0/conv_1/lora_a"]), 36**-0.5, rtol=0.03)
    assert not fresh["mid_0/conv_1/lora_b"].any()


def test_every_kernel_has_noise_of_its_own():
    fresh = named(jax.jit(lora_of("prior").init)(jax.random.key(0)).params)
    a = [np.asarray(leaf).ravel() for name, leaf in fresh.items() if name.endswith("lora_a")]
    assert len({tuple(np.round(leaf[:4] / leaf[0], 3)) for leaf in a}) == len(a) == 4


def test_a_changed_layer_adds_what_passes_its_factors():
    """x W' = x W + alpha / rank (x A) B, for attention of a scanned transformer too."""
    noise = np.random.default_rng(0)
    kernel, a, b, h = (
        noise.standard_normal(shape, np.float32) for shape in ((2, 6, 3, 2, 4), (2, 6, 1), (2, 1, 3, 2, 4), (5, 6))
    )
    tree = {"blocks": {"attn": {"qkv": {"kernel": jnp.asarray(kernel)}}}}
    factors = {"blocks": {"attn": {"qkv": {"lora_a": jnp.asarray(a), "lora_b": jnp.asarray(b)}}}}
    merged = np.asarray(merge(tree, factors, LoraConfig(rank=1, alpha=2.0))["blocks"]["attn"]["qkv"]["kernel"])
    for layer in range(2):
        plain, changed = (np.einsum("bd,dqnk->bqnk", h, stack[layer]) for stack in (kernel, merged))
        added = np.einsum("br,rqnk->bqnk", h @ a[layer], b[layer])
        np.testing.assert_allclose(changed, plain + 2.0 * added, rtol=1e-4, atol=1e-4)


# --- the stage --------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["clip_resnet", "decoder", "upsampler"])
def lora(request):
    """A LoRA of a stage of each kind; its loss and gradient, and the inner stage's loss, each a program."""
    stage = lora_of(request.param)
    frozen, key = frozen_of(stage), jax.random.key(7)

    @jax.jit
    def run(factors, frozen, batch):
        prepared = stage.prepare(frozen, batch)
        stats = frozen[stage.name].stats
        return jax.value_and_grad(stage.loss, has_aux=True)(factors, stats, frozen, key, prepared)

    @jax.jit
    def inner(params, frozen, batch):
        return stage.inner.loss(params, frozen[stage.name].stats, frozen, key, stage.inner.prepare(frozen, batch))

    return (
        stage,
        frozen[stage.name].params,
        lambda factors: run(factors, frozen, BATCH),
        lambda params: inner(params, frozen, BATCH),
    )


def test_the_first_loss_is_the_bases_and_only_b_learns_from_it(lora):
    stage, base, run, inner = lora
    factors = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf if path[-1].key == "lora_a" else jnp.zeros_like(leaf), trained(stage)
    )
    (loss, outputs), grads = run(factors)
    wanted, wanted_outputs = inner(base)
    np.testing.assert_allclose(loss, wanted, rtol=1e-6)
    assert jax.tree.structure(outputs) == jax.tree.structure(wanted_outputs)
    jax.tree.map(np.testing.assert_array_equal, merge(base, factors, stage.config), base)
    for name, grad in named(grads).items():
        assert np.asarray(grad).any() == name.endswith("lora_b"), name


def test_trained_factors_lose_as_their_merged_weights(lora):
    stage, base, run, inner = lora
    factors = trained(stage)
    (loss, _), grads = run(factors)
    merged = merge(base, factors, stage.config)
    np.testing.assert_allclose(loss, inner(merged)[0], rtol=1e-5)
    assert all(np.asarray(grad).any() for grad in jax.tree.leaves(grads))
    before, after = named(base), named(merged)
    changed = {name for name, leaf in after.items() if (np.asarray(leaf) != before[name]).any()}
    assert changed == {f"{name.rpartition('/')[0]}/kernel" for name in named(factors)}


def results(jaxpr):
    """Yields the shapes of all results within a program."""
    for equation in jaxpr.eqns:
        yield from (getattr(out.aval, "shape", ()) for out in equation.outvars)
        for inner in core.jaxprs_in_params(equation.params):
            yield from results(inner)


def test_nothing_of_a_kernels_size_is_computed():
    """Neither changed kernels nor their gradients."""
    stage = lora_of("prior")
    frozen, shapes = frozen_of(stage), jax.eval_shape(stage.init, jax.random.key(0)).params

    def loss(factors):
        return stage.loss(factors, {}, frozen, jax.random.key(7), stage.prepare(frozen, BATCH))[0]

    found = set(results(jax.make_jaxpr(jax.grad(loss))(shapes).jaxpr))
    base = named(frozen["prior"].params)
    stacked = [leaf.shape for name, leaf in base.items() if re.search("blocks.*kernel", name)]
    kernels = {*stacked, *(shape[1:] for shape in stacked)}
    assert len(kernels) == 8 and not found & kernels
    assert {leaf.shape for leaf in jax.tree.leaves(shapes)} <= found


def test_statistics_that_no_training_changes_are_frozen():
    """A second network of an upsampler is not saved with each LoRA of the first."""
    plain = lora_of("upsampler")
    stage = dataclasses.replace(plain, inner=dataclasses.replace(plain.inner, last_network=True))
    base = testing.tiny_variables(stage.inner)
    assert jax.eval_shape(stage.init, jax.random.key(0)).stats == {} and base.stats.keys() == {"last"}
    factors, frozen = trained(stage), {stage.name: stage.frozen_part(base)}
    assert stage.merged(frozen, Variables(factors, {})).stats["last"] is base.stats["last"]
    key = jax.random.key(7)
    losses = [
        jax.jit(lambda one=one, frozen=frozen: one.loss(factors, {}, frozen, key, one.prepare(frozen, BATCH)))()
        for one, frozen in ((stage, frozen), (plain, {plain.name: Variables(base.params, {})}))
    ]
    assert losses[0][1].stats == {}
    np.testing.assert_array_equal(losses[0][0], losses[1][0])


def test_default_targets():
    """Attention, MLPs and the projections of the context; no table, norm, convolution or output."""
    wanted = {
        "clip_vit": {f"{tower}/transformer/blocks" for tower in ("text", "visual")},
        "clip_resnet": {"text/transformer/blocks", "visual/pool"},
        "prior": {"transformer/blocks"},
        "decoder": {"caption_encoder/transformer/blocks", "unet/mid_attn/attn", "image_token_proj"},
    }
    for kind, places in wanted.items():
        targeted = {name.rpartition("/")[0] for name in named(trained(lora_of(kind)))}
        assert {next(place for place in places if path.startswith(place)) for path in targeted} == places
        blocks = [path.partition("blocks/")[2] for path in targeted if "blocks/" in path]
        assert {*blocks} == {"attn/qkv", "attn/out", "fc", "proj"}


@pytest.mark.parametrize(
    ("kind", "fields", "facts"),
    [
        ("prior", {"rank": 0}, ["rank 0", 1]),
        ("prior", {"targets": ()}, ["targets", "MLP kernels"]),
        ("prior", {"targets": ("(",)}, ["'('", "regular expression"]),
        ("prior", {"targets": ("blocks/fcc/",)}, ["stage prior", "'blocks/fcc/'", "time_mlp/fc_1/kernel"]),
        ("prior", {"targets": (TARGETS[0], "fcc")}, ["stage prior", "'fcc'"]),
        ("upsampler", {"targets": TARGETS}, ["stage upsampler_1", r"'/conv_\\d/kernel$'"]),
    ],
)
def test_mistakes_are_answered(kind, fields, facts):
    with pytest.raises(UserError, check=mentions(*facts)):
        jax.eval_shape(lora_of(kind, **fields).init, jax.random.key(0))


# --- its size ---------------------------------------------------------------------------------


def karlo(channels, width, embed_dim, context_dim):
    """A decoder like Karlo's, of its sizes or smaller ones."""
    text = TextConfig(600, 77, embed_dim, layers=1, heads=2)
    clip = ClipStage(ClipConfig(embed_dim, text, VisionConfig(32, 16, 64, layers=1, heads=2)))
    unet = UNetConfig(64, 3, 6, channels, (1, 2, 3, 4), 3, (32, 16, 8), head_channels=width, context_dim=context_dim)
    model = DecoderConfig(unet, embed_dim, 4, "clip", text_width=embed_dim, text_emb_proj=True)
    diffusion = DiffusionConfig("eps", "learned_range", "hybrid")
    return DecoderStage(diffusion, SamplingConfig(), "decoder", model, clip)


def size(stage):
    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(stage.init, jax.random.key(0)).params))


@pytest.mark.parametrize(("sizes", "full"), [((320, 64, 768, 1536), 893_318_086), ((64, 16, 48, 40), None)])
def test_a_lora_is_small(sizes, full):
    """Below a twentieth of the decoder: at Karlo's size, below a hundredth."""
    stage = karlo(*sizes)
    share = size(LoraStage(stage, LoraConfig())) / size(stage)
    assert share < (0.01 if full else 0.05)
    assert full is None or size(stage) == full


@pytest.mark.numerics
def test_training_a_lora_of_karlos_prior_copies_none_of_its_weights():
    """4.1 GB in float32; the temporaries of a step of one example are its activations, and less than 1.5 GB."""
    text = TextConfig(600, 77, 768, layers=1, heads=12)
    network = PriorConfig(2048, 20, 32, 768, 77, text_input="clip", text_width=768, learned_null=False)
    clip = ClipStage(ClipConfig(768, text, None))
    prior = PriorStage(DiffusionConfig("x0"), SamplingConfig("ddpm"), "prior", network, clip)
    stage = LoraStage(prior, LoraConfig(rank=4))
    columns = {"image_emb": (768,), "text_emb": (768,), "text_seq": (77, 768)}
    batch = {name: jax.ShapeDtypeStruct((1, *shape), jnp.float32) for name, shape in columns.items()}
    batch |= {"tokens": jax.ShapeDtypeStruct((1, 77), jnp.int32), "mask": jax.ShapeDtypeStruct((1, 77), jnp.bool_)}
    frozen = {"prior": abstract_variables(prior), "clip": abstract_variables(clip)}
    assert 4 * sum(leaf.size for leaf in jax.tree.leaves(frozen["prior"].params)) > 4e9

    step = jax.jit(functools.partial(loss_and_gradients, stage, 1))
    program = step.lower(abstract_variables(stage), frozen, rng.root(0), batch).compile()
    assert program.memory_analysis().temp_size_in_bytes < 1.5e9
