"""The shapes data set with networks that diffusers can load: a small system that can be exported.

    for stage in clip prior decoder upsampler_1; do
        python train.py --config configs/shapes_diffusers.py:$stage --workdir runs/exportable
    done
    dalle2 weights export diffusers runs/exportable exported

The architecture is Karlo's (configs/karlo.py, with its sources) at the sizes of configs/shapes.py. Differences from the
demo, configs/shapes.py, are what diffusers' UnCLIPPipeline, transformers' CLIPModel and OpenAI's CLIP require:

| stage       | here                                          | in the demo                         |
| ----------- | --------------------------------------------- | ----------------------------------- |
| clip        | CLIP's tokenizer, raw embeddings, heads of 64 | own tokenizer, unit embeddings      |
| prior       | reads CLIP's text states; whitened embeddings | reads tokens                        |
| decoder     | reads CLIP's text states; learned variance    | reads tokens; pixels folded 4x4     |
| upsampler_1 | down- and upsamples in residual blocks        | pixels folded 2x2                   |

Networks without folded pixels compute more per image, so that this system trains several times slower than the demo.
Its accuracy has not been measured.
"""

from ml_collections import ConfigDict

from dalle2_jax.config.page_defaults import machine_config
from dalle2_jax.errors import choose


def get_config(which: str) -> ConfigDict:
    """Returns the config of one stage."""
    config = choose("config of configs/shapes_diffusers.py", which, STAGES)()
    config.stage = which
    return config


def common(total_steps: int, batch_size: int, lr: float, resolution: int) -> ConfigDict:
    """Returns the fields that all stages share."""
    data = {"kind": "shapes", "resolution": resolution, "max_objects": 1, "jitter": 0.04}
    text = {"kind": "clip", "vocab_size": 2048, "context_length": 24}
    return machine_config(total_steps, batch_size, data, text, lr)


def clip() -> ConfigDict:
    """A ViT of 16 patches and a text encoder of 3 layers, as wide as the embeddings."""
    config = common(600, 128, 1e-3, resolution=32)
    config.model = {
        "embed_dim": 64,
        "text": {"width": 64, "layers": 3, "heads": 1},
        "vision": {"kind": "vit", "image_size": 32, "patch_size": 8, "width": 64, "layers": 4, "heads": 1},
    }
    config.embedding = {"normalisation": "raw", "scale": 1.0}
    return config


def prior() -> ConfigDict:
    """4 layers of width 128; it reads CLIP's text states and predicts the whitened embedding."""
    config = common(1200, 64, 1e-3, resolution=32)
    config.model = {"width": 128, "layers": 4, "heads": 4, "text_input": "clip", "learned_null": False}
    config.conditioning = {"drop_text": 0.2, "whiten": True}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"}
    config.sampling = {"name": "ddpm", "steps": 25, "guidance": 1.0, "clip_sample": 5.0}
    return config


def decoder() -> ConfigDict:
    """A U-Net of three levels on 32x32 with attention at 16 and 8."""
    config = common(6000, 16, 5e-4, resolution=32)
    config.model = {
        "unet": {
            "image_size": 32,
            "in_channels": 3,
            "out_channels": 6,
            "channels": 32,
            "channel_mult": (1, 2, 2),
            "num_res_blocks": 1,
            "attention_resolutions": (16, 8),
            "head_channels": 32,
            "norm_groups": 16,
            "context_dim": 64,
        },
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
    config.sampling = {"name": "ddpm", "steps": 25, "guidance": 2.0}
    return config


def upsampler_1() -> ConfigDict:
    """A U-Net of three levels without attention, 32x32 to 64x64."""
    config = common(1500, 8, 1e-3, resolution=64)
    config.model = {
        "image_size": 64,
        "in_channels": 6,
        "out_channels": 3,
        "channels": 16,
        "channel_mult": (1, 2, 2),
        "num_res_blocks": 1,
        "attention_resolutions": (),
        "middle_attention": False,
        "norm_groups": 8,
        "scale_shift": False,
    }
    config.conditioning = {"low_size": 32, "crop_fraction": 0.5}
    config.diffusion = {"schedule": "cosine", "num_steps": 1000, "prediction": "eps"}
    config.sampling = {"name": "ddpm", "steps": 7}
    return config


STAGES = {"clip": clip, "prior": prior, "decoder": decoder, "upsampler_1": upsampler_1}
