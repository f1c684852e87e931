"""GLIDE's files: import, and parity of the networks with the public code."""

import dataclasses
import importlib.util
from pathlib import Path

import guided_files as files
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.stages import (
    DecoderStage,
    DiffusionConfig,
    SamplingConfig,
    UpsamplerStage,
)
from dalle2_jax.system import load
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights.component import Hints, Source
from dalle2_jax.weights.config_files import WeightsWarning
from dalle2_jax.weights.families.glide import detect, glide_rules, read_sizes
from dalle2_jax.weights.rules import from_tensors, to_tensors
from dalle2_jax.weights.stage_writer import read_component, write_stage
from dalle2_jax.weights.tensors import write_safetensors
from dalle2_jax.workdir.folder import StageFolder

# Every network in this file has the assumed head width.
pytestmark = pytest.mark.filterwarnings("ignore::dalle2_jax.weights.config_files.WeightsWarning")

CONFIGS = Path(__file__).parents[3] / "configs"


def tiny(name):
    """Returns the config and the parameters of a recorded network."""
    tensors = files.source(files.tiny(name)).tensors
    model = read_sizes(tensors, "tiny", head_channels=16, image_size=16)
    x = jnp.zeros((1, 16, 16, model.unet.in_channels))
    args = x, jnp.zeros(1, jnp.int32), None, None, jnp.zeros((1, 16), jnp.int32)
    abstract = jax.eval_shape(DecoderNetwork(model).init, jax.random.key(0), *args)["params"]
    return model, from_tensors(glide_rules(model), tensors, abstract, "tiny"), tensors


def stages_own(prediction="eps"):
    """Returns the diffusion and sampling configs of a stage."""
    return DiffusionConfig(prediction, variance="learned_range", loss="hybrid"), SamplingConfig()


def captions_of(arrays):
    return {"tokens": arrays["tokens"], "mask": arrays["mask"]}


@pytest.fixture(scope="module")
def text2im():
    return tiny("glide_text2im_tiny")


def test_the_forward_pass_equals_the_public_ones(text2im, capsys):
    model, params, _ = text2im
    arrays = files.recorded("glide_text2im_tiny")
    encode = jax.jit(lambda *args: DecoderNetwork(model).apply(*args, method=DecoderNetwork.encode_condition))
    condition = encode({"params": params}, None, None, arrays["tokens"], arrays["mask"])
    stage = DecoderStage(*stages_own(), "decoder", model, clip=None)
    nothing_dropped = {"text": jnp.zeros(3, bool)}

    @jax.jit
    def run(params, batch, x, t):
        return stage.bind(params, stage.condition(batch), nothing_dropped, None)(x, t)

    errors = {
        "its caption's feature": files.error(condition.emb, arrays["xf_proj"]),
        "its caption's states": files.error(condition.context.transpose(0, 2, 1), arrays["xf_out_ncl"]),
        "one forward pass": files.error(run(params, captions_of(arrays), arrays["x"], arrays["t"]), arrays["out"]),
    }
    with capsys.disabled():
        print("".join(f"\nGLIDE base: {what} within {error:.1e}" for what, error in errors.items()))
    assert max(errors.values()) <= 1e-5


def test_the_upsamplers_forward_pass_equals_the_public_ones(capsys):
    """Includes the upsampling of the low-resolution image."""
    model, params, _ = tiny("glide_superres_tiny")
    arrays = files.recorded("glide_superres_tiny")
    stage = UpsamplerStage(*stages_own(), "upsampler_1", model, 4, crop_fraction=1.0, upscale="linear")

    @jax.jit
    def run(params, low_res, batch, x, t):
        return stage.bind(params, stage.low_res_condition(low_res, batch), {"text": jnp.zeros(3, bool)}, None)(x, t)

    out = run(params, arrays["low_res"], captions_of(arrays), arrays["x"], arrays["t"])
    error = files.error(out, arrays["out"])
    with capsys.disabled():
        print(f"\nGLIDE upsampler: one forward pass within {error:.1e}")
    assert error <= 1e-5


def test_import_and_export_return_every_tensor(text2im):
    model, params, tensors = text2im
    exported = dict(to_tensors(glide_rules(model), params))
    assert exported.keys() == tensors.keys()
    for key, value in exported.items():
        np.testing.assert_array_equal(value, tensors[key].read())


# --- the released files -----------------------------------------------------------------------

RELEASED = {
    # file: (config, parameters, sampler, steps, guidance)
    "glide_base": ("decoder", 385_030_726, "ddpm", 100, 3.0),
    "glide_upsample": ("upsampler_1", 398_361_286, "ddim", "fast27", 1.0),
    "glide_base_inpaint": ("decoder,inpaint", 385_037_638, "ddpm", 100, 5.0),
    "glide_upsample_inpaint": ("upsampler_1,inpaint", 398_368_198, "ddpm", "fast27", 1.0),
}


def config_of(which):
    spec = importlib.util.spec_from_file_location("glide", CONFIGS / "glide.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(which).to_dict()


@pytest.mark.parametrize("name", RELEASED)
def test_the_tables_of_the_released_files(name):
    which, count, sampler, steps, guidance = RELEASED[name]
    (component,) = detect(files.source(files.shapes(name)))
    stage = files.stage_of(component)
    assert component.stage == which.partition(",")[0] == stage.name and stage.inpaint == ("inpaint" in which)
    assert files.check_table(component, stage) == count
    assert component.tokenizer.vocab_size == 50_257 and component.tokenizer.encode([""], 128)[1].sum() == 0
    assert (stage.sampling.name, stage.sampling.steps, stage.sampling.guidance) == (sampler, steps, guidance)
    stage.check_sampling(stage.sampling)


@pytest.mark.parametrize("name", RELEASED)
def test_the_config_page_equals_the_file(name):
    """Except for dtype and rematerialisation."""
    (component,) = detect(files.source(files.shapes(name)))
    config = {key: value for key, value in config_of(RELEASED[name][0]).items() if key in (*component.config, "stage")}
    ours = files.stage_of(dataclasses.replace(component, config=config))
    computed = {"dtype": "float32", "remat": "none"}
    plain = dataclasses.replace(ours.model, unet=dataclasses.replace(ours.model.unet, **computed))
    assert dataclasses.replace(ours, model=plain) == files.stage_of(component)


def test_other_files_are_not_detected(tmp_path):
    for name in ("guided_64_diffusion", "guided_adm_unet_tiny"):
        assert detect(files.source(files.shapes(name))) == []
    assert detect(files.source({})) == [] == detect(Source(tmp_path))


SMALL_UNET = UNetConfig(8, 3, 6, 64, (1,), 1, (8,), context_dim=64, dropout=0.1)
SMALL = DecoderConfig(SMALL_UNET, None, text_input="tokens", text=TextConfig(300, 4, 64, 1, 1, "gelu"))


@pytest.mark.parametrize("channels", [3, 6, 7, 10])
def test_a_smaller_network_is_imported_and_sampled(channels, tmp_path):
    """Its vocabulary has the first of GLIDE's merges."""
    model = dataclasses.replace(SMALL, unet=dataclasses.replace(SMALL_UNET, in_channels=channels))
    tensors = files.random_tensors(glide_rules(model), model)
    path = tmp_path / "glide.safetensors"
    write_safetensors(path, {key: value.shape for key, value in tensors.items()}, tensors.items())

    (component,) = detect(Source.open(path))
    stage = files.stage_of(component)
    assert stage.model == model
    folder = StageFolder(tmp_path / "system", component.stage)
    write_stage(folder, component, read_component(component, files.abstract(stage)))
    loaded = load.load_stage(folder.root, component.stage, make_mesh(MeshConfig()))
    assert loaded.stage == stage and loaded.context_length == 4 and loaded.tokenizer == component.tokenizer
    for key, value in to_tensors(glide_rules(model), loaded.variables.params):
        np.testing.assert_array_equal(value, tensors[key])
    if channels == 7:
        images = sample(loaded)
        assert images.shape == (2, 8, 8, 3) and np.isfinite(images).all() and images.std() > 0.1


def sample(loaded):
    """Samples an image for a caption and an unconditional one, with two guided steps."""
    captions = dict(zip(("tokens", "mask"), loaded.tokenizer.encode(["a sea", ""], 4), strict=True))
    config, stage = dataclasses.replace(loaded.stage.sampling, steps=2), loaded.stage
    keys = jax.random.split(jax.random.key(0), 2)
    run = jax.jit(
        lambda variables, captions: stage.sample(variables, keys, stage.condition(captions), stage.plan(config))
    )
    return run(loaded.variables, captions)


# --- damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", ["token_embedding.weight", "positional_embedding", "time_embed.0.weight", "input_blocks.0.0.bias"]
)
def test_a_missing_tensor_is_named(missing):
    tensors = files.shapes("glide_base")
    del tensors[missing]
    with pytest.raises(WeightsError, check=mentions(path="cut.pt", missing=(missing,))):
        (component,) = detect(files.source(tensors, "cut.pt"))
        files.check_table(component, files.stage_of(component))


def test_another_number_of_input_channels_is_rejected():
    tensors = {**files.shapes("glide_base"), "input_blocks.0.0.weight": (192, 4, 3, 3)}
    with pytest.raises(WeightsError, check=mentions("GLIDE", "input channels", 4, path="odd.pt")):
        detect(files.source(tensors, "odd.pt"))


@pytest.mark.filterwarnings("error")
def test_an_assumed_head_width_causes_a_warning():
    source = files.source(files.shapes("glide_base"))
    with pytest.warns(WeightsWarning, match="file.pt.* 64 .*head_channels"):
        detect(source)
    detect(dataclasses.replace(source, hints=Hints(head_channels=64)))
