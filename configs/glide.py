"""GLIDE as released: Nichol et al. 2021 (arXiv 2112.10741), the filtered model of 300 M parameters (section 5.3).

    for stage in decoder upsampler_1; do
        python train.py --config configs/glide.py:$stage --workdir runs/glide --multihost --config.data.path=IMAGES
    done

There is no prior and no CLIP: the decoder and the upsampler read the caption themselves, and these two are a complete
system. "decoder,inpaint" and "upsampler_1,inpaint" are also conditioned on the known part of an image; GLIDE fine-tuned
them from the others, with the weights of the new channels initialised to zero.

|                        | decoder     | upsampler_1 | with inpaint              |
| ---------------------- | ----------- | ----------- | ------------------------- |
| parameters             | 385,030,726 | 398,361,286 | 385,037,638 / 398,368,198 |
| image size             | 64          | 256         | the same                  |
| channels               | 192         | 192         | the same                  |
| channel multiples      | 1,2,3,4     | 1,1,2,2,4,4 | the same                  |
| res blocks             | 3           | 2           | the same                  |
| attention at           | 32,16,8     | 32,16,8     | the same                  |
| noise schedule         | cosine      | linear      | the same                  |
| iterations             | 1.1M        | 400K        | 500K                      |
| captions dropped       | -           | -           | 20 % (and guidance)       |
| sampling steps         | 100         | 27, DDIM    | 100 / 27                  |
| guidance               | 3           | none        | 5 / none                  |

Sizes, schedules and dropout are those of the released files; iterations are section 5.3's. Batch sizes and learning
rates of these models are not published: the batches are those of the paper's larger models (2048, 512), the rates
ADM's. The released decoder was trained on with 20 % of captions dropped, which is what "decoder" does from the start.
"""

from ml_collections import ConfigDict

from dalle2_jax.config.page_defaults import pod_config
from dalle2_jax.errors import choose


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    config = choose("config of configs/glide.py", which, STAGES)()
    config.stage = which.partition(",")[0]
    return config


def common(total_steps: int, batch_size: int, resolution: int) -> ConfigDict:
    """Returns what every stage shares."""
    text = {"kind": "glide", "vocab_size": 50_257, "context_length": 128}
    optim = {"lr": 1e-4, "clip_norm": 1.0, "ema_decay": 0.9999}
    return pod_config(total_steps, batch_size, resolution, text, optim)


def network(**unet) -> dict:
    """The caption's transformer, and the U-Net that attends to its states."""
    return {
        "unet": {
            "out_channels": 6,
            "channels": 192,
            "attention_resolutions": (32, 16, 8),
            "head_channels": 64,
            "context_dim": 512,
            "dropout": 0.1,
            "remat": "blocks",
            "dtype": "bfloat16",
            **unet,
        },
        "image_emb_dim": None,
        "text_input": "tokens",
        "text": {"width": 512, "layers": 16, "heads": 8, "activation": "gelu"},
    }


def diffusion(schedule: str) -> dict:
    """A noise schedule, and the learned variance that all have."""
    return {
        "schedule": schedule,
        "num_steps": 1000,
        "prediction": "eps",
        "variance": "learned_range",
        "loss": "hybrid",
    }


def decoder() -> ConfigDict:
    """Captions to 64x64 images."""
    config = common(1_100_000, 2048, 64)
    config.model = network(image_size=64, in_channels=3, channel_mult=(1, 2, 3, 4), num_res_blocks=3)
    config.conditioning = {"drop_text": 0.2, "inpaint": False}
    config.diffusion = diffusion("cosine")
    config.sampling = {"name": "ddpm", "steps": 100, "guidance": 3.0}
    return config


def upsampler_1() -> ConfigDict:
    """64 -> 256."""
    config = common(400_000, 512, 256)
    config.model = network(image_size=256, in_channels=6, channel_mult=(1, 1, 2, 2, 4, 4), num_res_blocks=2)
    config.conditioning = {
        "low_size": 64,
        "crop_fraction": 1.0,
        "blur_rate": 0.0,
        "upscale": "linear",
        "drop_text": 0.2,
        "inpaint": False,
    }
    config.diffusion = diffusion("linear")
    config.sampling = {"name": "ddim", "steps": "fast27", "temperature": 0.997}
    return config


def decoder_inpaint() -> ConfigDict:
    """The decoder, conditioned on a known image and its mask."""
    config = decoder()
    config.total_steps = 500_000
    config.model.unet.in_channels = 7
    config.conditioning.inpaint = True
    config.sampling.guidance = 5.0
    return config


def upsampler_1_inpaint() -> ConfigDict:
    """The upsampler, conditioned on a known image and its mask."""
    config = upsampler_1()
    config.total_steps = 500_000
    config.model.unet.in_channels = 10
    config.conditioning.inpaint = True
    config.sampling.name = "ddpm"
    return config


STAGES = {
    "decoder": decoder,
    "upsampler_1": upsampler_1,
    "decoder,inpaint": decoder_inpaint,
    "upsampler_1,inpaint": upsampler_1_inpaint,
}
