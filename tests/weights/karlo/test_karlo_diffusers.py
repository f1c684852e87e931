"""Diffusers loads exported systems, with equal outputs; needs the extra ``parity`` (torch, diffusers).

    pip install 'dalle2_jax[parity]'
    python -m pytest -m parity tests/weights

Diffusers 0.33.1 with transformers 4.46.3 are the last versions that support these pipelines.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from karlo_recordings import FOLDER, VARIATIONS, error, karlo, max_and_mean_difference
from test_karlo import other, trained
from test_karlo_cascade import MEAN, NETWORK, PROMPTS, RUN

from dalle2_jax.models.decoder import DecoderNetwork
from dalle2_jax.models.priors.prior import PriorNetwork
from dalle2_jax.models.unet import UNet
from dalle2_jax.weights.karlo.export import VARIATIONS as INNER
from dalle2_jax.weights.karlo.export import export_diffusers

pytestmark = [pytest.mark.parity, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module", autouse=True)
def diffusers():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("torch")
        module = pytest.importorskip("diffusers", minversion="0.33.1")
        if not hasattr(module, "UnCLIPPipeline"):
            pytest.skip("this version of diffusers has no UnCLIPPipeline")
        return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the exported folder of the imported Karlo-tiny."""
    folder = tmp_path_factory.mktemp("exported")
    export_diffusers(folder, trained(karlo()))
    return folder


def fed(monkeypatch, pipeline, recorded, stages):
    """Makes a pipeline use recorded noise."""
    import sys

    import torch

    noises = iter([noise for s in stages for noise in (recorded[f"{s}/init_noise"], *recorded[f"{s}/step_noise"])])

    def next_noise(shape, *_, **__):
        noise = next(noises)
        assert tuple(shape) == noise.shape
        return torch.from_numpy(noise)

    for module in (type(pipeline).__module__, type(pipeline.decoder_scheduler).__module__):
        monkeypatch.setattr(sys.modules[module], "randn_tensor", next_noise)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def assert_images_within(within, name, images, theirs):
    maximum, mean = max_and_mean_difference(images, theirs)
    within(f"{name} of the exported folder, images", maximum, RUN)
    within(f"{name} of the exported folder, on average", mean, MEAN)


def test_text_to_image_equals_the_recorded(monkeypatch, diffusers, folder, within):
    recorded = np.load(FOLDER / "parity.npz")
    pipeline = fed(monkeypatch, diffusers.UnCLIPPipeline.from_pretrained(folder), recorded, ("prior", "decoder", "sr"))
    assert_images_within(
        within, "UnCLIPPipeline", pipeline(PROMPTS, output_type="np").images, recorded["pipeline/images_nhwc01"]
    )


def test_image_variations_of_the_exported_folder_equal_the_recorded(monkeypatch, diffusers, folder, within):
    from PIL import Image

    recorded = np.load(VARIATIONS / "parity_iv.npz")
    pipeline = diffusers.UnCLIPImageVariationPipeline.from_pretrained(folder / INNER)
    pipeline = fed(monkeypatch, pipeline, recorded, ("decoder", "sr"))
    image = Image.fromarray(recorded["image_u8"])
    samples = pipeline(image, decoder_num_inference_steps=10, super_res_num_inference_steps=7, output_type="np").images
    assert_images_within(within, "UnCLIPImageVariationPipeline", samples, recorded["images_nhwc01"])


# --- other sizes ----------------------------------------------------------------------------


def normal(*shape):
    return np.random.default_rng(3).standard_normal(shape).astype(np.float32)


T = np.array([49, 3], np.int32)
MASK = np.arange(9)[None] < np.array([[4], [9]])


@pytest.fixture(scope="module")
def both(diffusers, tmp_path_factory):
    """Returns a system with sizes and options that Karlo does not have, and diffusers' pipeline of its export."""
    stages, folder = other(), tmp_path_factory.mktemp("other")
    export_diffusers(folder, stages)
    return stages, diffusers.UnCLIPPipeline.from_pretrained(folder)


def theirs(network, *inputs, **named):
    """Calls a torch network on arrays; returns its first output or only field."""
    import torch

    def tensor(value):
        return torch.from_numpy(np.array(value))

    with torch.no_grad():
        out = network(*map(tensor, inputs), **{name: tensor(value) for name, value in named.items()})
    out = out if isinstance(out, tuple) else (next(iter(out.values())),)
    return tuple(jnp.asarray(value.numpy()) for value in out)


def test_another_prior(both, within):
    stages, pipeline = both
    prior = stages["prior"]
    x, emb, text = normal(2, 12), normal(2, 12) + 1, normal(2, 9, 12)
    ours = jax.jit(PriorNetwork(prior.model).apply)({"params": prior.trees.params}, x, T, emb, text, MASK)
    named = {"proj_embedding": emb, "encoder_hidden_states": text, "attention_mask": MASK}
    within("another prior", error(ours, *theirs(pipeline.prior, x, T, **named)), NETWORK)


def test_another_decoder(both, within):
    stages, pipeline = both
    decoder = stages["decoder"]
    network, params = DecoderNetwork(decoder.model), {"params": decoder.trees.params}
    x, emb, text_emb, text = normal(2, 12, 12, 3), normal(2, 12), normal(2, 12) + 1, normal(2, 9, 12)
    ours = jax.jit(network.apply)(params, x, T, emb, text_emb, text, MASK)
    named = {"image_embeddings": emb, "prompt_embeds": text_emb, "text_encoder_hidden_states": text}
    project = pipeline.text_proj.forward
    context, added = theirs(lambda **tensors: project(**tensors, do_classifier_free_guidance=False), **named)
    named = {
        "encoder_hidden_states": context,
        "class_labels": added,
        "attention_mask": np.pad(MASK, ((0, 0), (3, 0)), constant_values=True),
    }
    (out,) = theirs(pipeline.decoder, x.transpose(0, 3, 1, 2), T, **named)
    within("another decoder", error(ours, out.transpose(0, 2, 3, 1)), NETWORK)


def test_another_upsampler(both, within):
    stages, pipeline = both
    upsampler = stages["upsampler_1"]
    x = normal(2, 24, 24, 6)
    ours = jax.jit(UNet(upsampler.model).apply)({"params": upsampler.trees.params}, x, T)
    for network in (pipeline.super_res_first, pipeline.super_res_last):
        (out,) = theirs(network, x.transpose(0, 3, 1, 2), T)
        within("another upsampler", error(ours, out.transpose(0, 2, 3, 1)), NETWORK)


def test_another_clip(both):
    stages, pipeline = both
    tokens, _ = stages["clip"].tokenizer.encode(PROMPTS, 9)
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", truncation=True, max_length=9).input_ids
    np.testing.assert_array_equal(tokens, ids)
    assert pipeline.text_encoder.config.hidden_act == "gelu"
