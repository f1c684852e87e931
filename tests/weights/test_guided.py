"""ADM's files: what they hold, and that our network does with it what the public code does."""

import dataclasses

import guided_files as files
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dalle2_jax import build
from dalle2_jax.models.decoder import DecoderNetwork
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.stages import DecoderStage, UpsamplerStage
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.types import UserError
from dalle2_jax.weights import empty, fill, write_safetensors
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.guided import adm_model, adm_rules, recognise, unet_rules, unet_sizes
from dalle2_jax.weights.landing import read, write_stage
from dalle2_jax.workdir import StageFolder

TINY = "guided_adm_unet_tiny"
UNET = UNetConfig(
    image_size=16,
    channels=32,
    channel_mult=(1, 2),
    num_res_blocks=1,
    out_channels=6,
    attention_resolutions=(8,),
    head_channels=16,
)
MODEL = adm_model(UNET, classes=5)


@pytest.fixture(scope="module")
def tiny():
    """The recorded checkpoint."""
    return files.source(files.tiny(TINY)).tensors


def network_shapes(model):
    label = jnp.zeros((1, 1), jnp.int32)
    x, t = jnp.zeros((1, 16, 16, model.unet.in_channels)), jnp.zeros(1, jnp.int32)
    return jax.eval_shape(DecoderNetwork(model).init, jax.random.key(0), x, t, None, None, label)["params"]


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_the_forward_pass_is_the_public_ones(order, tiny, capsys):
    params = fill(adm_rules(MODEL, order), tiny, network_shapes(MODEL), "tiny")
    arrays = {name.removeprefix(f"{order}_"): value for name, value in files.recorded(TINY).items()}
    x, t, label = arrays["x"], arrays["t"], arrays["y"][:, None]
    ours = jax.jit(DecoderNetwork(MODEL).apply)({"params": params}, x, t, None, None, label)
    error = files.error(ours, arrays["out"])
    with capsys.disabled():
        print(f"\nADM, {order} attention order: one forward pass within {error:.1e}")
    assert error <= 1e-5


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_import_and_export_return_every_tensor(order, tiny):
    rules = adm_rules(MODEL, order)
    exported = dict(empty(rules, fill(rules, tiny, network_shapes(MODEL), "tiny")))
    assert exported.keys() == tiny.keys()
    for key, value in exported.items():
        np.testing.assert_array_equal(value, tiny[key].read())


# --- the released files -----------------------------------------------------------------------

RELEASED = {
    # file: (stage, parameters, heads of 384 channels, pictures, family)
    "guided_64_diffusion": ("decoder", 295_904_454, 6, 64, "ADM 64 (heads of 64 channels, new attention order)"),
    "guided_256_diffusion": ("decoder", 553_838_086, 6, 256, "ADM 256 (heads of 64 channels, legacy attention order)"),
    "guided_64_256_upsampler": ("upsampler_1", 311_795_910, 4, 256, "ADM upsampler 256 (4 heads, legacy"),
}


def first_key_row(component):
    """Which row of the middle attention's convolution is the first head's first key."""
    (rule,) = (rule for rule in component.params if rule.path == "unet/mid_attn/attn/qkv/bias")
    rows = component.tensors["middle_block.1.qkv.bias"].shape[0]
    return rule.layout.join([np.arange(rows)])[1, 0, 0]


@pytest.mark.parametrize("name", RELEASED)
def test_every_tensor_of_the_released_files_has_its_place(name):
    where, count, heads, side, family = RELEASED[name]
    (component,) = recognise(files.source(files.shapes(name)))
    assert component.stage == where and component.family.startswith(family)
    stage = files.stage_of(component)
    assert files.fits(component, stage) == count
    unet = stage.model.unet
    assert unet.heads(384) == heads and unet.image_size == side and stage.borrows == ()
    assert component.tokenizer.vocab_size == stage.model.num_classes == 1000
    channels = unet.level_channels(len(unet.channel_mult) - 1)
    assert first_key_row(component) == (channels if side == 64 else channels // unet.heads(channels))
    assert stage.diffusion.schedule == ("cosine" if side == 64 else "linear")
    assert (stage.diffusion.variance, stage.sampling.name, stage.sampling.steps) == ("learned_range", "ddpm", 250)


def without_labels(tensors):
    return {key: value for key, value in tensors.items() if key != "label_emb.weight"}


def test_a_network_that_is_told_nothing():
    (component,) = recognise(files.source(without_labels(files.shapes("guided_256_diffusion"))))
    stage = files.stage_of(component)
    assert isinstance(stage, DecoderStage) and stage.model.text_input is None
    assert files.fits(component, stage) == 553_838_086 - 1000 * 1024
    (component,) = recognise(files.source(without_labels(files.shapes("guided_64_256_upsampler"))))
    stage = files.stage_of(component)
    assert isinstance(stage, UpsamplerStage) and not stage.is_told and component.tokenizer is None
    assert files.fits(component, stage) == 311_795_910 - 1000 * 768


SMALL = UNetConfig(8, 3, 6, 64, (1,), 1, (8,))


@pytest.mark.parametrize(("channels", "classes"), [(3, 5), (3, None), (6, 5), (6, None)])
def test_a_smaller_network_goes_through_a_file_into_a_system(channels, classes, tmp_path):
    """And the stage of the system draws."""
    unet = dataclasses.replace(SMALL, in_channels=channels)
    tensors = files.drawn(adm_rules(adm_model(unet, classes)), adm_model(unet, classes))
    path = tmp_path / "adm.safetensors"
    write_safetensors(path, {key: value.shape for key, value in tensors.items()}, tensors.items())
    (component,) = recognise(Source.open(path))
    stage = files.stage_of(component)
    folder = StageFolder(tmp_path / "system", component.stage)
    write_stage(folder, component, read(component, files.abstract(stage)))
    member = build.load_member(folder.root, component.stage, make_mesh(MeshConfig()))
    assert member.stage == stage and member.tokenizer == component.tokenizer
    for key, value in empty(component.params, member.variables.params):
        np.testing.assert_array_equal(value, tensors[key])
    told = {}
    if member.tokenizer:
        told = dict(zip(("tokens", "mask"), member.tokenizer.encode(["3", "a sea"], 1), strict=True))
    small = jnp.zeros((2, 2, 2, 3))
    condition = stage.condition(small, told or None) if channels == 6 else stage.condition(told)
    config = dataclasses.replace(stage.sampling, steps=2)
    keys = jax.random.split(jax.random.key(0), 2)
    drawn = jax.jit(lambda variables: stage.draw(variables, keys, condition, config, {}))(member.variables)
    assert drawn.shape == (2, 8, 8, 3) and np.isfinite(drawn).all() and drawn.std() > 0.1


def test_other_files_are_not_taken_for_adms(tmp_path):
    tiny = files.shapes(TINY)
    for other in (
        {},
        {"visual.conv1.weight": (8, 3, 4, 4)},
        {**tiny, "transformer_proj.weight": (8, 8)},  # GLIDE
        {**tiny, "clip_tok_proj.weight": (8, 8)},  # Karlo
        {key: shape for key, shape in tiny.items() if not key.startswith("output_blocks")},  # a classifier
    ):
        assert recognise(files.source(other)) == []
    assert recognise(Source(tmp_path)) == []


# --- sizes ------------------------------------------------------------------------------------

BASE = UNetConfig(16, 3, 6, 8, (1, 2), 2, (8,), 4, norm_groups=4)
SIZES = {
    "attention below": BASE,
    "no attention at all": dataclasses.replace(BASE, attention_resolutions=(), middle_attention=False),
    "attention on every level": dataclasses.replace(BASE, attention_resolutions=(16, 8)),
    "a context": dataclasses.replace(BASE, context_dim=12),
    "an added time embedding": dataclasses.replace(BASE, scale_shift=False, out_channels=3),
    "convolutions up and down": dataclasses.replace(BASE, resblock_updown=False),
    "half the channels at first": dataclasses.replace(BASE, channel_mult=(0.5, 1, 1), num_res_blocks=1, image_size=32),
    "one level": dataclasses.replace(BASE, channel_mult=(1,), attention_resolutions=(8,), image_size=8),
    "a wide time embedding": dataclasses.replace(BASE, emb_dim=20),
    "the small picture beside": dataclasses.replace(BASE, in_channels=6),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_read_back_from_the_shapes(name):
    config = SIZES[name]
    x = jnp.zeros((1, config.image_size, config.image_size, config.in_channels))
    context = config.context_dim and jnp.zeros((1, 3, config.context_dim))
    params = jax.eval_shape(UNet(config).init, jax.random.key(0), x, jnp.zeros(1, jnp.int32), None, context)["params"]
    hollow = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    rules = unet_rules(config, "model.")
    tensors = {key.removeprefix("model."): value for key, value in empty(rules, hollow)}
    sizes = unet_sizes(files.source(tensors).tensors)
    assert UNetConfig(**sizes, head_channels=config.head_channels, norm_groups=config.norm_groups) == config
    assert unet_sizes(files.source(tensors).tensors, 64)["image_size"] == 64
    fill(unet_rules(config), files.source(tensors).tensors, params, name)


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["time_embed.0.weight", "input_blocks.1.0.emb_layers.1.weight", "out.2.weight"])
def test_a_file_cut_short_is_said_to_be(missing):
    tensors = files.shapes("guided_64_diffusion")
    del tensors[missing]
    with pytest.raises(UserError, match=f"cut.pt lacks tensor {missing}"):
        recognise(files.source(tensors, "cut.pt"))


def test_half_a_network_is_said_to_be():
    tensors = files.shapes("guided_64_diffusion")
    half = {key: shape for key, shape in tensors.items() if not key.startswith("output_blocks.1")}
    with pytest.raises(UserError, match="half.pt is not a whole U-Net of guided-diffusion's"):
        recognise(files.source(half, "half.pt"))


def test_a_tensor_too_few_too_many_or_of_another_shape_is_named():
    tensors = files.shapes(TINY)
    rules, abstract = adm_rules(MODEL), network_shapes(MODEL)
    key = "middle_block.1.qkv.weight"
    few = {name: shape for name, shape in tensors.items() if name != key}
    for changed, message in (
        (few, f"lacks tensor {key}"),
        ({**tensors, "out.7.weight": (3,)}, "has tensor out.7.weight with no place here"),
        ({**tensors, key: (192, 32, 1)}, rf"{key} \[192, 32, 1\] does not fit unet/mid_attn/attn/qkv/kernel"),
    ):
        with pytest.raises(UserError, match=message):
            fill(rules, files.source(changed).tensors, abstract, "file.pt")


def test_channels_that_adm_never_reads_are_refused():
    tensors = {**files.shapes("guided_64_diffusion"), "input_blocks.0.0.weight": (192, 4, 3, 3)}
    with pytest.raises(UserError, match="latent.pt reads 4 channels: ADM's networks read 3, or 6"):
        recognise(files.source(tensors, "latent.pt"))


def test_an_unknown_attention_order_is_answered():
    with pytest.raises(UserError, match="unknown attention order 'newer': did you mean 'new'"):
        unet_rules(UNET, attention_order="newer")


