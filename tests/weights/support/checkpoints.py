"""Tiny checkpoints in the public layouts, from which systems can be sampled, and in-process commands."""

import contextlib
import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from guided_files import weight
from raised import mentions

from dalle2_jax.cli import weights as weights
from dalle2_jax.cli.process import run_cli
from dalle2_jax.models.clip import Clip, ClipConfig
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.models.priors.prior import PriorConfig, PriorNetwork
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.models.vit import VisionConfig
from dalle2_jax.weights.clip.openai import openai_rules
from dalle2_jax.weights.families import guided_diffusion
from dalle2_jax.weights.families.glide import glide_rules
from dalle2_jax.weights.families.guided_diffusion import adm_model, adm_rules
from dalle2_jax.weights.karlo import original
from dalle2_jax.weights.rules import shapes
from dalle2_jax.weights.tensors import open_tensors, write_safetensors

FIXTURES = Path(__file__).parents[2] / "fixtures"
KARLO, VARIATIONS = FIXTURES / "karlo_tiny", FIXTURES / "karlo_tiny_iv"

# --- sizes ----------------------------------------------------------------------------------

DIM, LENGTH, VOCAB_SIZE = 64, 77, 578
TOWER = {"width": DIM, "layers": 1, "heads": 1, "activation": "quick_gelu"}
CLIP = ClipConfig(
    DIM,
    TextConfig(VOCAB_SIZE, LENGTH, **TOWER),
    VisionConfig(32, 16, **TOWER),
)
PRIOR = PriorConfig(DIM, 1, 1, DIM, LENGTH, "clip", text_width=DIM, learned_null=False)
UNET = UNetConfig(8, 3, 6, DIM, (1,), 1, (8,), head_channels=DIM)
DECODER = DecoderConfig(dataclasses.replace(UNET, context_dim=12), DIM, 2, "clip", text_width=DIM, text_emb_proj=True)
PLAIN = {"attention_resolutions": (), "middle_attention": False}
UPSAMPLER = dataclasses.replace(UNET, image_size=32, in_channels=6, out_channels=3, scale_shift=False, **PLAIN)
GLIDE = DecoderConfig(
    dataclasses.replace(UNET, context_dim=DIM), None, text_input="tokens", text=TextConfig(300, 12, DIM, 1, 1, "gelu")
)
CLASSES = 5


def file(path, *tables, seed=7):
    """Writes a file of random tensors for tables of (rules, module, inputs)."""
    sizes = {}
    for rules, module, inputs in tables:
        tree = jax.eval_shape(lambda module=module, inputs=inputs: module.init(jax.random.key(0), *inputs))["params"]
        sizes |= shapes(rules, tree)
    return write(path, {key: weight(key, size, seed) for key, size in sizes.items()})


def write(path, tensors, dtype=np.float32):
    """Writes a safetensors file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(path, {key: value.shape for key, value in tensors.items()}, tensors.items(), dtype)
    return path


def read(path):
    """Returns the arrays of a safetensors file."""
    return {key: tensor.read() for key, tensor in open_tensors(path).items()}


def network_inputs(unet):
    """Returns x_t and t for a network."""
    return jnp.zeros((1, unet.image_size, unet.image_size, unet.in_channels)), jnp.zeros(1, jnp.int32)


# --- layouts --------------------------------------------------------------------------------


def openai_clip(path):
    """Writes a CLIP as OpenAI's state dict."""
    tokens = jnp.zeros((1, LENGTH), jnp.int32), jnp.ones((1, LENGTH), bool)
    return file(path, (openai_rules(CLIP), Clip(CLIP), (jnp.zeros((1, 32, 32, 3)), *tokens)))


def karlo_five(folder):
    """Writes the five files that Karlo was published in, and one unrelated file."""
    states = jnp.zeros((1, LENGTH, DIM)), jnp.ones((1, LENGTH), bool)
    emb, t = jnp.zeros((1, DIM)), jnp.zeros(1, jnp.int32)
    step = "ckpt-step=01000000-of-01000000.safetensors"
    openai_clip(folder / "ViT-L-14.safetensors")
    file(folder / f"prior-{step}", (original.prior_rules(PRIOR), PriorNetwork(PRIOR), (emb, t, emb, *states)))
    inputs = (*network_inputs(DECODER.unet), emb, emb, *states)
    file(folder / f"decoder-{step}", (original.decoder_rules(DECODER), DecoderNetwork(DECODER), inputs))
    networks = [guided_diffusion.unet_rules(UPSAMPLER, f"model_{name}.") for name in ("first_steps", "last_step")]
    both = [(rules, UNet(UPSAMPLER), network_inputs(UPSAMPLER)) for rules in networks]
    file(folder / "improved-sr-ckpt-step=1.2M.safetensors", *both)
    stats = np.random.default_rng(3).uniform(0.5, 1.5, (2, DIM)).astype(np.float32)
    write(folder / "ViT-L-14_stats.safetensors", {"0": stats[0], "1": stats[1]})
    write(folder / "notes.safetensors", {"note": stats})
    return folder


def karlo_variations(folder):
    """Writes the folder of Karlo-tiny's second pipeline, including the components it shares with the first."""
    shutil.copytree(VARIATIONS, folder)
    for name in ("decoder", "super_res_first", "super_res_last", "text_encoder", "text_proj", "tokenizer"):
        shutil.copytree(KARLO / name, folder / name)
    for name in ("decoder_scheduler", "super_res_scheduler"):
        shutil.copytree(KARLO / name, folder / name)
    return folder


def glide(folder, inpaint=False):
    """Writes GLIDE's base for 8 x 8 pixels, and its upsampler to 32 x 32."""
    more = 4 if inpaint else 0
    sizes = {
        "base": {"in_channels": 3 + more},
        "upsampler": {"in_channels": 6 + more, "image_size": 32, "channel_mult": (1,) if inpaint else (1, 1, 1)},
    }
    tokens = jnp.zeros((1, 12), jnp.int32)
    for name, fields in sizes.items():
        unet = dataclasses.replace(GLIDE.unet, **fields)
        unet = dataclasses.replace(unet, attention_resolutions=()) if name == "upsampler" else unet
        model = dataclasses.replace(GLIDE, unet=unet)
        inputs = (*network_inputs(unet), None, None, tokens)
        file(folder / f"{name}.safetensors", (glide_rules(model), DecoderNetwork(model), inputs))
    return folder


def adm(path, **fields):
    """Writes a class-conditional ADM network."""
    model = adm_model(dataclasses.replace(UNET, **fields), CLASSES)
    inputs = (*network_inputs(model.unet), None, None, jnp.zeros((1, 1), jnp.int32))
    return file(path, (adm_rules(model), DecoderNetwork(model), inputs))


def kandinsky(folder, diffusers):
    """Writes Kandinsky 2.2's prior with its CLIP, converted from a diffusers folder."""
    for name in ("prior", "text_encoder", "tokenizer", "image_encoder"):
        shutil.copytree(diffusers / name, folder / name)
    shutil.copytree(diffusers / "prior_scheduler", folder / "scheduler")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "KandinskyV22PriorPipeline"}))
    return folder


def eclipse(folder, diffusers):
    """Writes ECLIPSE's prior, which has no timestep, converted from a diffusers folder."""
    tensors = read(diffusers / "prior" / "diffusion_pytorch_model.safetensors")
    tensors = {key: value for key, value in tensors.items() if not key.startswith("time_embedding.")}
    tensors["positional_embedding"] = np.delete(tensors["positional_embedding"], LENGTH + 1, axis=1)
    write(folder / "diffusion_pytorch_model.safetensors", tensors)
    config = json.loads((diffusers / "prior" / "config.json").read_text()) | {"additional_embeddings": 3}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


# --- commands -------------------------------------------------------------------------------


class Done(NamedTuple):
    """Result of a command that was run in this process."""

    returncode: int
    stdout: str
    stderr: str


def run(command, *words):
    """Runs a command in this process, given its module and arguments; returns its exit code and output."""
    with (
        mock.patch.object(sys, "argv", ["dalle2", *map(str, words)]),
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()) as err,
    ):
        code = run_cli.run_cli(command.main)
    return Done(code, out.getvalue(), err.getvalue())


def run_ok(command, *words):
    """Runs a command that must succeed; see `run`."""
    done = run(command, *words)
    assert done.returncode == 0, done
    return done


def import_into(system, *words):
    """Imports sources, with more arguments, into a system; returns its folder."""
    run_ok(weights, "import", "auto", *words, system)
    return system


def listing(folder):
    """Returns {path: content} of everything in a folder; None if there is no folder."""
    if not folder.exists():
        return None
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def assert_error(done, *facts, code=1):
    """Asserts that a command printed one error line, which mentions ``facts``, and returned an exit code."""
    line = done.stderr.rpartition("\r")[2]
    line = line[line.find("error: ") :]
    assert line.startswith("error: ") and line.count("\n") == 1, done
    assert mentions(*facts)(line)
    assert done.returncode == code and "Traceback" not in done.stderr, done
