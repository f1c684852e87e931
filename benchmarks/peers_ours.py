"""This package's side of `peers.py`: the networks and the sampling of `peers_torch.py`."""

import argparse
import dataclasses
import functools
import pathlib
import re
import sys
import tempfile
from collections import defaultdict

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
import optax
from peers_worker import chosen, serve, sizes

from dalle2_jax import rng
from dalle2_jax.compilation import compile_ahead
from dalle2_jax.diffusion import NoiseStatistics
from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.priors.prior import PriorConfig, PriorNetwork
from dalle2_jax.models.transformer import TextConfig
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.planning.hlo import Module
from dalle2_jax.stages import (
    ClipStage,
    DecoderStage,
    DiffusionConfig,
    ImageSamplingConfig,
    PriorStage,
    SamplingConfig,
)

NESTING = ("call", "while", "conditional")
"""Instructions whose time is that of other instructions."""


def unet_config(size, dtype):
    """Returns Karlo's U-Net at these sizes."""
    levels = tuple(size["image_size"] // 2**level for level in range(1, 4))
    return UNetConfig(
        image_size=size["image_size"],
        out_channels=6,
        channels=size["channels"],
        channel_mult=size["mult"],
        num_res_blocks=2,
        attention_resolutions=levels,
        head_channels=min(64, size["channels"] * size["mult"][1]),
        context_dim=size["context_dim"],
        dtype=dtype,
    )


def prior_config(size, dtype):
    """Returns Karlo's prior at these sizes."""
    return PriorConfig(
        size["width"],
        size["layers"],
        size["heads"],
        size["embed_dim"],
        size["tokens"],
        text_input="clip",
        text_width=size["embed_dim"],
        learned_null=False,
        dtype=dtype,
    )


def noise(seed, *shape):
    """Returns float32 normals."""
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def decoder_inputs(size, batch):
    """Returns what the U-Net takes."""
    side, t = size["image_size"], jnp.asarray(np.resize([999, 700, 300, 10], batch), jnp.int32)
    lengths = jnp.asarray(np.resize([81, 24, 16, 12], batch))
    emb, context = noise(1, batch, 4 * size["channels"]), noise(2, batch, 81, size["context_dim"])
    return noise(0, batch, side, side, 3), t, emb, context, jnp.arange(81)[None] < lengths[:, None]


def prior_inputs(size, batch):
    """Returns what the prior takes."""
    dim, tokens = size["embed_dim"], size["tokens"]
    t, lengths = jnp.arange(batch, dtype=jnp.int32) * 62 % 1000, jnp.minimum(10 + 4 * jnp.arange(batch), tokens)
    mask = jnp.arange(tokens)[None] < lengths[:, None]
    return noise(0, batch, dim), t, noise(1, batch, dim), noise(2, batch, tokens, dim), mask


def network_calls(network, inputs):
    """Returns the parameter count, and the calls: a forward pass, a train step of AdamW, and a trace of steps."""
    params = jax.jit(network.init)(jax.random.key(0), *inputs)["params"]
    optimizer = optax.adamw(1e-4, weight_decay=0.01)
    forward = jax.jit(lambda params: network.apply({"params": params}, *inputs))
    target = noise(3, *jax.eval_shape(forward, params).shape)

    def loss(params):
        return jnp.square(network.apply({"params": params}, *inputs) - target).mean()

    def step(params, state):
        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    held = [params, jax.jit(optimizer.init)(params)]
    jitted = jax.jit(step, donate_argnums=(0, 1))

    @functools.cache
    def compile_once():  # in the first step, whose seconds are reported
        compile_ahead(jitted, *held)

    def run_step():
        compile_once()
        held[:] = jitted(*held)
        jax.block_until_ready(held)

    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    return count, {
        "forward": lambda: jax.block_until_ready(forward(held[0])),
        "step": run_step,
        "operations": lambda: traced_operations(jitted.lower(*held).compile().as_text(), run_step),
    }


def traced_operations(program, run_step):
    """Returns the nanoseconds of each instruction of a compiled step on a CPU, by "opcodes instruction op_name".

    The opcodes of a fusion are those of its computation, separated by commas.
    """
    module, names = Module(program, devices=1), {}
    for computation in module.computations.values():
        for instruction in computation.values():
            source = re.search(r'op_name="([^"]*)"', instruction.rest)
            opcodes = ",".join(sorted(module.opcodes(instruction) - {"parameter"}))
            names[instruction.name] = f"{opcodes} {instruction.name} {source[1] if source else ''}"
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            for _ in range(2):
                run_step()
        (file,) = pathlib.Path(folder).rglob("*.xplane.pb")
        data = jax.profiler.ProfileData.from_file(str(file))
    found = defaultdict(float)
    for plane in data.planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in names and names[event.name].split()[0] not in NESTING:
                    found[names[event.name]] += event.duration_ns
    return dict(found)


def sample_call(decoder_size, prior_size, steps, dtype):
    """Returns the sampling of one image with guidance: the prior's steps, then the decoder's; no text encoder."""
    dim, tokens = prior_size["embed_dim"], prior_size["tokens"]
    text = TextConfig(100, tokens, dim, layers=1, heads=1)
    clip = ClipStage(ClipConfig(dim, text, None))
    prior = PriorStage(
        DiffusionConfig(prediction="x0"),
        SamplingConfig("ddpm", steps=steps, guidance=4.0),
        "prior",
        prior_config(prior_size, dtype),
        clip,
    )
    parts = {"text_input": "clip", "text_width": dim, "text_emb_proj": True}
    decoder = DecoderStage(
        DiffusionConfig(variance="learned_range", loss="hybrid"),
        ImageSamplingConfig("ddpm", steps=steps, guidance=8.0),
        "decoder",
        DecoderConfig(unet_config(decoder_size, dtype), dim, **parts),
        clip,
        empty_caption=True,
    )
    mask = jnp.arange(tokens)[None] < 12
    empty = jnp.arange(tokens)[None] < 2
    shared = {"text_emb": noise(1, 1, dim), "mask": mask, "null_text_emb": noise(2, 1, dim), "null_mask": empty}
    states = {"text_seq": noise(3, 1, tokens, dim), "null_text_seq": noise(4, 1, tokens, dim)}
    batch = {**shared, **states, "tokens": jnp.ones((1, tokens), jnp.int32), "image_emb": noise(5, 1, dim)}
    key = rng.per_image(rng.root(0), jnp.arange(1))
    calls = []
    for stage in (prior, decoder):
        unit = NoiseStatistics((1.0,) * stage.diffusion.num_steps, 1.0)
        stage = dataclasses.replace(stage, noise_statistics=unit)
        params = jax.jit(stage.init)(rng.root(0)).params
        program = jax.jit(
            lambda params, stage=stage: stage.sample_x_0(params, key, stage.condition(batch), stage.plan())
        )
        calls.append(lambda program=program, params=params: jax.block_until_ready(program(params)))
    return {"sample": lambda: [call() for call in calls]}


def main():
    """Serves one section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=("decoder", "prior", "sample"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--operations", action="store_true")
    options = parser.parse_args()
    decoder_size, prior_size, steps = sizes(options.tiny)
    facts = {"jax": jax.__version__}
    if options.section == "sample":
        serve(facts, sample_call(decoder_size, prior_size, steps, options.dtype))
        return
    if options.section == "decoder":
        inputs = decoder_inputs(decoder_size, decoder_size["batch"])
        count, calls = network_calls(UNet(unet_config(decoder_size, options.dtype)), inputs)
    else:
        inputs = prior_inputs(prior_size, prior_size["batch"])
        count, calls = network_calls(PriorNetwork(prior_config(prior_size, options.dtype)), inputs)
    serve({**facts, "parameters": count}, chosen(calls, options.operations))


if __name__ == "__main__":
    main()
