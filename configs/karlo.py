"""Karlo v1-alpha (kakaobrain, 2022): unCLIP on 115 M images, from scratch or from its published weights.

    python train.py --config configs/karlo.py:decoder --config.init_from=runs/karlo \\
        --workdir runs/tuned --config.data.path=IMAGES

trains the decoder of an imported system on your own images, as do "prior" and "upsampler_1" for theirs. Without
``init_from`` every stage is trained from nothing, clip first (its sizes are ViT-L/14's):

    for stage in clip prior decoder upsampler_1; do
        python train.py --config configs/karlo.py:$stage --workdir runs/own --multihost --config.data.path=IMAGES
    done

|                       | clip        | prior         | decoder          | upsampler_1     |
| --------------------- | ----------- | ------------- | ---------------- | --------------- |
| parameters            | 427,616,513 | 1,022,028,544 | 893,318,086      | 2 x 691,579,523 |
| output                | -           | 768, whitened | 64 x 64          | 256 x 256       |
| width or channels     | 1024, 768   | 2048          | 320              | 320             |
| layers or multiples   | 24, 12      | 20            | 1,2,3,4          | 1,2,3,4         |
| heads or head width   | 16, 12      | 32            | 64 channels      | no attention    |
| it predicts           | -           | x_0           | noise, variance  | noise           |
| captions dropped      | -           | 20 %          | 30 %             | -               |
| image embeddings      | -           | -             | dropped 10 %     | -               |
| iterations            | -           | 1M            | 1M               | 1M + 234K       |
| sampling steps        | -           | 25            | 25               | 7               |
| guidance              | -           | 4             | 8                | none            |

Source: its configs and model card, and the decoder's dropout of 0.1. A dropped caption is replaced by the empty one, a
dropped image embedding by a learned one. CLIP's embeddings are raw; the prior is in the space where they have mean 0
and deviation 1. The upsampler's second network takes the last sampling step: it was fine-tuned with a GAN loss,
which this package does not have, so training does not change it. Batch sizes, learning rates and averages are not
published: those here are the paper's, which Karlo follows.

The prior samples two embeddings per image and uses the one that is closer to the caption, which Karlo does not:
`--prior.candidates 1` of ``sample.py`` is Karlo's way.
"""

from ml_collections import ConfigDict

from dalle2_jax.config.page_defaults import pod_config
from dalle2_jax.errors import choose


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    config = choose("config of configs/karlo.py", which, STAGES)()
    config.stage = which
    return config


def common(batch_size: int, resolution: int, lr: float, **optim) -> ConfigDict:
    """Returns what every stage shares."""
    text = {"kind": "clip", "vocab_size": 49_408, "context_length": 77}
    adam = {"lr": lr, "clip_norm": 1.0, "ema_decay": 0.9999, **optim}
    config = pod_config(1_000_000, batch_size, resolution, text, adam)
    config.sample_every = 0
    return config


def clip() -> ConfigDict:
    """ViT-L/14, trained as Radford et al. 2021 (tables 18 to 20) trained it."""
    config = common(32_768, 224, 4e-4, warmup_steps=2000, schedule="cosine", beta2=0.98, eps=1e-6, weight_decay=0.2)
    config.model = {
        "embed_dim": 768,
        "text": {"width": 768, "layers": 12, "heads": 12},
        "vision": {"kind": "vit", "image_size": 224, "patch_size": 14, "width": 1024, "layers": 24, "heads": 16},
        "remat": "blocks",
        "dtype": "bfloat16",
    }
    config.embedding = {"normalisation": "raw", "scale": 1.0}
    return config


def prior() -> ConfigDict:
    """Captions to image embeddings, whitened; it reads CLIP's states of the caption."""
    config = common(4096, 224, 1.1e-4, beta2=0.96, eps=1e-6, weight_decay=6e-2)
    config.model = {
        "width": 2048,
        "layers": 20,
        "heads": 32,
        "text_input": "clip",
        "learned_null": False,
        "remat": "blocks",
        "dtype": "bfloat16",
    }
    config.conditioning = {"drop_text": 0.2, "whiten": True}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
    config.sampling = {"name": "ddpm", "steps": 25, "guidance": 4.0, "clip_sample": 5.0}
    return config


def unet(image_size: int, **fields) -> dict:
    """What the two U-Nets share."""
    sizes = {"channels": 320, "channel_mult": (1, 2, 3, 4), "num_res_blocks": 3}
    return {"image_size": image_size, **sizes, "remat": "blocks", "dtype": "bfloat16", **fields}


def decoder() -> ConfigDict:
    """Image embeddings and CLIP's text states to 64x64 images."""
    config = common(2048, 224, 1.2e-4)  # CLIP reads the same images
    attention = {"attention_resolutions": (32, 16, 8), "head_channels": 64, "context_dim": 1536}
    config.model = {
        "unet": unet(64, in_channels=3, out_channels=6, dropout=0.1, **attention),
        "image_tokens": 4,
        "text_input": "clip",
        "text_emb_proj": True,
    }
    config.conditioning = {"drop_image": 0.1, "drop_text": 0.3, "empty_caption": True}
    config.diffusion = {
        "schedule": "cosine",
        "num_steps": 1000,
        "prediction": "eps",
        "variance": "learned_range",
        "loss": "hybrid",
    }
    config.sampling = {"name": "ddpm", "steps": 25, "guidance": 8.0}
    return config


def upsampler_1() -> ConfigDict:
    """64x64 images to 256x256, without attention."""
    config = common(1024, 256, 1.2e-4)
    plain = {"attention_resolutions": (), "middle_attention": False, "scale_shift": False}
    config.model = unet(256, in_channels=6, out_channels=3, **plain)
    config.conditioning = {"low_size": 64, "last_network": True}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps"}
    config.sampling = {"name": "ddpm", "steps": 7}
    return config


STAGES = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler_1": upsampler_1}
