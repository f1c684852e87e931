"""ADM's files: import, and parity of the network with the public code."""

import dataclasses

import guided_files as files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import UserError, WeightsError
from dalle2_jax.models.decoder import DecoderNetwork
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.stages import DecoderStage, UpsamplerStage
from dalle2_jax.system import load
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights.component import Source
from dalle2_jax.weights.families.guided_diffusion import (
    adm_model,
    adm_rules,
    detect,
    unet_rules,
    unet_sizes,
)
from dalle2_jax.weights.rules import from_tensors, to_tensors
from dalle2_jax.weights.stage_writer import read_component, write_stage
from dalle2_jax.weights.tensors import write_safetensors
from dalle2_jax.workdir.folder import StageFolder

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
    """Returns the recorded checkpoint."""
    return files.source(files.tiny(TINY)).tensors


def network_shapes(model):
    label = jnp.zeros((1, 1), jnp.int32)
    x, t = jnp.zeros((1, 16, 16, model.unet.in_channels)), jnp.zeros(1, jnp.int32)
    return jax.eval_shape(DecoderNetwork(model).init, jax.random.key(0), x, t, None, None, label)["params"]


@pytest.mark.parametrize("order", ["legacy", "new"])
def test_the_adm_forward_pass_equals_the_public_ones(order, tiny, capsys):
    params = from_tensors(adm_rules(MODEL, order), tiny, network_shapes(MODEL), "tiny")
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
    exported = dict(to_tensors(rules, from_tensors(rules, tiny, network_shapes(MODEL), "tiny")))
    assert exported.keys() == tiny.keys()
    for key, value in exported.items():
        np.testing.assert_array_equal(value, tiny[key].read())


# --- the released files -----------------------------------------------------------------------

RELEASED = {
    # file: (stage, parameters, heads of 384 channels, image size, family)
    "guided_64_diffusion": ("decoder", 295_904_454, 6, 64, "ADM 64 (heads of 64 channels, new attention order)"),
    "guided_256_diffusion": ("decoder", 553_838_086, 6, 256, "ADM 256 (heads of 64 channels, legacy attention order)"),
    "guided_64_256_upsampler": ("upsampler_1", 311_795_910, 4, 256, "ADM upsampler 256 (4 heads, legacy"),
}


def first_key_row(component):
    """Returns the row of the middle attention's convolution that is the first head's first key."""
    (rule,) = (rule for rule in component.params if rule.path == "unet/mid_attn/attn/qkv/bias")
    rows = component.tensors["middle_block.1.qkv.bias"].shape[0]
    return rule.layout.join([np.arange(rows)])[1, 0, 0]


@pytest.mark.parametrize("name", RELEASED)
def test_the_tables_of_the_released_files(name):
    where, count, heads, side, family = RELEASED[name]
    (component,) = detect(files.source(files.shapes(name)))
    assert component.stage == where and component.family.startswith(family)
    stage = files.stage_of(component)
    assert files.check_table(component, stage) == count
    unet = stage.model.unet
    assert unet.heads(384) == heads and unet.image_size == side and stage.requires == ()
    assert component.tokenizer.vocab_size == stage.model.num_classes == 1000
    channels = unet.level_channels(len(unet.channel_mult) - 1)
    assert first_key_row(component) == (channels if side == 64 else channels // unet.heads(channels))
    assert stage.diffusion.schedule == ("cosine" if side == 64 else "linear")
    assert (stage.diffusion.variance, stage.sampling.name, stage.sampling.steps) == ("learned_range", "ddpm", 250)


def without_labels(tensors):
    return {key: value for key, value in tensors.items() if key != "label_emb.weight"}


def test_an_unconditional_network():
    (component,) = detect(files.source(without_labels(files.shapes("guided_256_diffusion"))))
    stage = files.stage_of(component)
    assert isinstance(stage, DecoderStage) and stage.model.text_input is None
    assert files.check_table(component, stage) == 553_838_086 - 1000 * 1024
    (component,) = detect(files.source(without_labels(files.shapes("guided_64_256_upsampler"))))
    stage = files.stage_of(component)
    assert isinstance(stage, UpsamplerStage) and not stage.reads_text and component.tokenizer is None
    assert files.check_table(component, stage) == 311_795_910 - 1000 * 768


SMALL = UNetConfig(8, 3, 6, 64, (1,), 1, (8,))


@pytest.mark.parametrize(("channels", "classes"), [(3, 5), (3, None), (6, 5), (6, None)])
def test_a_smaller_network_is_imported_and_sampled(channels, classes, tmp_path):
    unet = dataclasses.replace(SMALL, in_channels=channels)
    tensors = files.random_tensors(adm_rules(adm_model(unet, classes)), adm_model(unet, classes))
    path = tmp_path / "adm.safetensors"
    write_safetensors(path, {key: value.shape for key, value in tensors.items()}, tensors.items())
    (component,) = detect(Source.open(path))
    stage = files.stage_of(component)
    folder = StageFolder(tmp_path / "system", component.stage)
    write_stage(folder, component, read_component(component, files.abstract(stage)))
    loaded = load.load_stage(folder.root, component.stage, make_mesh(MeshConfig()))
    assert loaded.stage == stage and loaded.tokenizer == component.tokenizer
    for key, value in to_tensors(component.params, loaded.variables.params):
        np.testing.assert_array_equal(value, tensors[key])
    conditioning = {}
    if loaded.tokenizer:
        conditioning = dict(zip(("tokens", "mask"), loaded.tokenizer.encode(["3", "a sea"], 1), strict=True))
    small = jnp.zeros((2, 2, 2, 3))
    condition = stage.low_res_condition(small, conditioning or None) if channels == 6 else stage.condition(conditioning)
    config = dataclasses.replace(stage.sampling, steps=2)
    keys = jax.random.split(jax.random.key(0), 2)
    samples = jax.jit(lambda variables: stage.sample(variables, keys, condition, stage.plan(config)))(loaded.variables)
    assert samples.shape == (2, 8, 8, 3) and np.isfinite(samples).all() and samples.std() > 0.1


def test_other_files_are_not_detected_as_adm(tmp_path):
    tiny = files.shapes(TINY)
    for other in (
        {},
        {"visual.conv1.weight": (8, 3, 4, 4)},
        {**tiny, "transformer_proj.weight": (8, 8)},  # GLIDE
        {**tiny, "clip_tok_proj.weight": (8, 8)},  # Karlo
        {key: shape for key, shape in tiny.items() if not key.startswith("output_blocks")},  # a classifier
    ):
        assert detect(files.source(other)) == []
    assert detect(Source(tmp_path)) == []


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
    "with a low-resolution image": dataclasses.replace(BASE, in_channels=6),
}


@pytest.mark.parametrize("name", SIZES)
def test_sizes_are_read_back_from_the_shapes(name):
    config = SIZES[name]
    x = jnp.zeros((1, config.image_size, config.image_size, config.in_channels))
    context = config.context_dim and jnp.zeros((1, 3, config.context_dim))
    params = jax.eval_shape(UNet(config).init, jax.random.key(0), x, jnp.zeros(1, jnp.int32), None, context)["params"]
    zero_params = jax.tree.map(lambda leaf: np.broadcast_to(np.float32(0), leaf.shape), params)
    rules = unet_rules(config, "model.")
    tensors = {key.removeprefix("model."): value for key, value in to_tensors(rules, zero_params)}
    sizes = unet_sizes(files.source(tensors).tensors)
    assert UNetConfig(**sizes, head_channels=config.head_channels, norm_groups=config.norm_groups) == config
    assert unet_sizes(files.source(tensors).tensors, 64)["image_size"] == 64
    from_tensors(unet_rules(config), files.source(tensors).tensors, params, name)


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["time_embed.0.weight", "input_blocks.1.0.emb_layers.1.weight", "out.2.weight"])
def test_a_missing_tensor_is_named(missing):
    tensors = files.shapes("guided_64_diffusion")
    del tensors[missing]
    with pytest.raises(WeightsError, check=mentions(path="cut.pt", missing=(missing,))):
        detect(files.source(tensors, "cut.pt"))


def test_half_a_network_is_rejected():
    tensors = files.shapes("guided_64_diffusion")
    half = {key: shape for key, shape in tensors.items() if not key.startswith("output_blocks.1")}
    with pytest.raises(WeightsError, check=mentions("complete U-Net", "guided-diffusion", path="half.pt")):
        detect(files.source(half, "half.pt"))


def test_missing_unexpected_and_misshapen_tensors_are_named():
    tensors = files.shapes(TINY)
    rules, abstract = adm_rules(MODEL), network_shapes(MODEL)
    key = "middle_block.1.qkv.weight"
    few = {name: shape for name, shape in tensors.items() if name != key}
    for changed, facts in (
        (few, ["lacks", key]),
        ({**tensors, "out.7.weight": (3,)}, ["unexpected", "out.7.weight"]),
        ({**tensors, key: (192, 32, 1)}, [f"{key} [192, 32, 1]", "unet/mid_attn/attn/qkv/kernel"]),
    ):
        with pytest.raises(WeightsError, check=mentions(*facts, path="file.pt")):
            from_tensors(rules, files.source(changed).tensors, abstract, "file.pt")


def test_another_number_of_input_channels_is_rejected():
    tensors = {**files.shapes("guided_64_diffusion"), "input_blocks.0.0.weight": (192, 4, 3, 3)}
    with pytest.raises(WeightsError, check=mentions("ADM", "input channels", 4, path="latent.pt")):
        detect(files.source(tensors, "latent.pt"))


def test_an_unknown_attention_order():
    with pytest.raises(UserError, check=mentions("attention order", "'newer'", "'new'")):
        unet_rules(UNET, attention_order="newer")
