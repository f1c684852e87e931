"""The side of diffusers in `peers.py`: Karlo's blocks and prior in PyTorch, channels last, on a GPU if there is one.

Runs in a Python that has torch and diffusers (the extra ``parity``); this package is not imported.
"""

import argparse
import functools
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import diffusers
import torch
import torch.nn.functional as F
from peers_worker import chosen, serve, sizes


def wait():
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def make_decoder(size):
    """Returns Karlo's U-Net at these sizes."""
    attending = ("SimpleCrossAttnDownBlock2D",) * 3, ("SimpleCrossAttnUpBlock2D",) * 3
    return diffusers.UNet2DConditionModel(
        sample_size=size["image_size"],
        layers_per_block=2,
        in_channels=3,
        out_channels=6,
        down_block_types=("ResnetDownsampleBlock2D", *attending[0]),
        up_block_types=(*attending[1], "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=tuple(size["channels"] * factor for factor in size["mult"]),
        cross_attention_dim=size["context_dim"],
        class_embed_type="identity",
        attention_head_dim=size["channels"] * size["mult"][1] // max(size["channels"] * size["mult"][1] // 64, 1),
        resnet_time_scale_shift="scale_shift",
    ).to(memory_format=torch.channels_last)


def make_prior(size):
    """Returns Karlo's prior at these sizes."""
    return diffusers.PriorTransformer(
        num_attention_heads=size["heads"],
        attention_head_dim=size["width"] // size["heads"],
        num_layers=size["layers"],
        embedding_dim=size["embed_dim"],
        num_embeddings=size["tokens"],
        additional_embeddings=4,
    )


def decoder_inputs(size, batch):
    """Returns x, t and the condition of a batch."""
    side, width, tokens = size["image_size"], size["context_dim"], 81
    x = torch.randn(batch, 3, side, side).contiguous(memory_format=torch.channels_last)
    t = torch.tensor([999, 700, 300, 10])[torch.arange(batch) % 4]
    lengths = torch.tensor([81, 24, 16, 12])[torch.arange(batch) % 4]
    return (
        x,
        t,
        {
            "encoder_hidden_states": torch.randn(batch, tokens, width),
            "class_labels": torch.randn(batch, 4 * size["channels"]),
            "attention_mask": torch.arange(tokens)[None] < lengths[:, None],
        },
    )


def prior_inputs(size, batch):
    """Returns x, t and the condition of a batch."""
    dim, tokens = size["embed_dim"], size["tokens"]
    lengths = (10 + 4 * torch.arange(batch)).clamp(max=tokens)
    return (
        torch.randn(batch, dim),
        (torch.arange(batch) * 62) % 1000,
        {
            "proj_embedding": torch.randn(batch, dim),
            "encoder_hidden_states": torch.randn(batch, tokens, dim),
            "attention_mask": torch.arange(tokens)[None] < lengths[:, None],
        },
    )


def network_calls(model, inputs, target, computing):
    """Returns a forward pass, a train step of AdamW, all parameters in float32, and a trace of steps."""
    x, t, condition = inputs
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.01)

    def forward():
        with torch.no_grad(), computing():
            model(x, t, **condition, return_dict=False)
        wait()

    def step():
        optimizer.zero_grad(set_to_none=True)
        with computing():
            output = model(x, t, **condition, return_dict=False)[0]
        F.mse_loss(output.float(), target).backward()
        optimizer.step()
        wait()

    def operations():
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            step()
            step()
        return {each.key: each.self_cpu_time_total for each in profile.key_averages() if each.self_cpu_time_total}

    return {"forward": forward, "step": step, "operations": operations}


def sample_call(decoder_size, prior_size, steps, prepare, computing):
    """Returns the sampling of one image with guidance: the prior's steps, then the decoder's; no text encoder."""
    decoder, prior = prepare(make_decoder(decoder_size).eval()), prepare(make_prior(prior_size).eval())
    kinds = ("fixed_small_log", "sample"), ("learned_range", "epsilon")
    schedulers = [
        diffusers.UnCLIPScheduler(variance_type=variance, prediction_type=prediction, clip_sample_range=5.0)
        for variance, prediction in kinds
    ]
    _, _, texts = prior_inputs(prior_size, 2)
    _, _, contexts = decoder_inputs(decoder_size, 2)

    def denoise(scheduler, x, predict, scale):
        scheduler.set_timesteps(steps)
        for i, t in enumerate(scheduler.timesteps):
            with computing():
                uncond, cond = predict(torch.cat([x, x]), t).float().chunk(2)
            channels = x.shape[1]
            mixed = uncond[:, :channels] + scale * (cond[:, :channels] - uncond[:, :channels])
            output = torch.cat([mixed, cond[:, channels:]], 1)
            following = scheduler.timesteps[i + 1] if i + 1 < steps else None
            x = scheduler.step(output, t, x, prev_timestep=following).prev_sample
        return x

    @torch.no_grad()
    def sample():
        embedding = torch.randn(1, prior_size["embed_dim"])
        denoise(schedulers[0], embedding, lambda x, t: prior(x, t, **texts, return_dict=False)[0], 4.0)
        side = decoder_size["image_size"]
        noise = torch.randn(1, 3, side, side)
        denoise(schedulers[1], noise, lambda x, t: decoder(x, t, **contexts, return_dict=False)[0], 8.0)
        wait()

    return {"sample": sample}


def main():
    """Serves one section."""
    parser = argparse.ArgumentParser()
    parser.add_argument("section", choices=("decoder", "prior", "sample"))
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--operations", action="store_true")
    options = parser.parse_args()
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_default_device(device)
    prepare = torch.compile if options.compile else lambda model: model
    half = options.dtype == "bfloat16"
    computing = functools.partial(torch.autocast, device, torch.bfloat16, enabled=half)
    decoder_size, prior_size, steps = sizes(options.tiny)
    facts = {"torch": torch.__version__, "diffusers": diffusers.__version__, "threads": torch.get_num_threads()}
    if options.section == "sample":
        serve(facts, sample_call(decoder_size, prior_size, steps, prepare, computing))
        return
    size = decoder_size if options.section == "decoder" else prior_size
    model = (make_decoder if options.section == "decoder" else make_prior)(size)
    inputs = (decoder_inputs if options.section == "decoder" else prior_inputs)(size, size["batch"])
    shape = (size["batch"], 6, *inputs[0].shape[2:]) if options.section == "decoder" else inputs[0].shape
    target = torch.randn(shape)
    facts["parameters"] = sum(each.numel() for each in model.parameters() if each.requires_grad)
    serve(facts, chosen(network_calls(prepare(model), inputs, target, computing), options.operations))


if __name__ == "__main__":
    main()
