"""CLIP at its published sizes: Radford et al. 2021 (arXiv 2103.00020), Tables 18-20, and OpenCLIP's two largest.

    python train.py --config configs/clip.py:vit_b32 --workdir runs/clip --config.data.path=images

Published weights of these sizes need no training: `dalle2 weights import` reads them. These configs
train from scratch on a folder of captioned images.

|             | dim  | image   | image tower              | text tower     | rate   | parameters    |
| ----------- | ---- | ------- | ------------------------ | -------------- | ------ | ------------- |
| rn50        | 1024 | 224     | blocks 3,4,6,3 of 64     | 12 x 512 x 8   | 5e-4   | 102,007,137   |
| rn101       | 512  | 224     | blocks 3,4,23,3 of 64    | 12 x 512 x 8   | 5e-4   | 119,688,033   |
| rn50x4      | 640  | 288     | blocks 4,6,10,6 of 80    | 12 x 640 x 10  | 5e-4   | 178,300,601   |
| rn50x16     | 768  | 384     | blocks 6,8,18,8 of 96    | 12 x 768 x 12  | 4e-4   | 290,979,217   |
| rn50x64     | 1024 | 448     | blocks 3,15,36,10 of 128 | 12 x 1024 x 16 | 3.6e-4 | 623,258,305   |
| vit_b32     | 512  | 224     | 12 x 768 x 12            | 12 x 512 x 8   | 5e-4   | 151,277,313   |
| vit_b16     | 512  | 224     | 12 x 768 x 12            | 12 x 512 x 8   | 5e-4   | 149,620,737   |
| vit_l14     | 768  | 224     | 24 x 1024 x 16           | 12 x 768 x 12  | 4e-4   | 427,616,513   |
| vit_l14_336 | 768  | 336     | 24 x 1024 x 16           | 12 x 768 x 12  | 2e-5   | 427,944,193   |
| vit_h14     | 1024 | 224     | 32 x 1280 x 16           | 24 x 1024 x 16 | -      | 986,109,441   |
| vit_bigg14  | 1280 | 224     | 48 x 1664 x 16           | 32 x 1280 x 20 | -      | 2,539,567,105 |

Towers are layers x width x heads; a ResNet's are the blocks of its four stages and the width of the first. All but
OpenCLIP's two have quick_gelu. vit_l14_336 is vit_l14 after one epoch more, at the larger size. OpenCLIP's two are set
to train as the other ViTs, which is not how they were trained: a place to start from.

Trained with: 32 epochs of 400 M pairs in batches of 32,768, AdamW with weight decay 0.2, 2,000 steps of warm-up, then
a cosine to zero; beta2 0.98 and eps 1e-6 for ViTs, 0.999 and 1e-8 for ResNets; the temperature from 0.07, at most 100.
"""

from ml_collections import ConfigDict

from dalle2_jax.config.page_defaults import pod_config
from dalle2_jax.errors import choose

STEPS = 32 * 400_000_000 // 32_768


def get_config(which: str) -> ConfigDict:
    """Returns the config of one size; each is the stage clip."""
    config = choose("config of configs/clip.py", which, STAGES)()
    config.stage = "clip"
    return config


def common(embed_dim: int, resolution: int, vision: dict, text: dict, optim: dict, total_steps: int) -> ConfigDict:
    """Returns what every size shares."""
    tokenizer = {"kind": "clip", "vocab_size": 49_408, "context_length": 77}
    schedule = {"warmup_steps": 2000, "schedule": "cosine", "weight_decay": 0.2}
    config = pod_config(total_steps, 32_768, resolution, tokenizer, {**schedule, **optim})
    config.sample_every = 0
    config.model = {
        "embed_dim": embed_dim,
        "text": text,
        "vision": {**vision, "image_size": resolution},
        "remat": "blocks",
        "dtype": "bfloat16",
    }
    # a standard deviation of 0.54 per dimension, as the paper's 17.2 at 1,024
    config.embedding = {"normalisation": "unit", "scale": round(17.2 * (embed_dim / 1024) ** 0.5, 2)}
    return config


def tower(layers: int, width: int, heads: int, activation: str) -> dict:
    """A transformer of either kind."""
    return {"layers": layers, "width": width, "heads": heads, "activation": activation}


def vit(
    embed_dim: int,
    patch: int,
    image: tuple[int, int, int],
    text: tuple[int, int, int],
    lr: float = 5e-4,
    resolution: int = 224,
    activation: str = "quick_gelu",
    mlp_ratio: float = 4.0,
    total_steps: int = STEPS,
) -> ConfigDict:
    """A ViT over patches of ``patch`` pixels; ``image`` and ``text`` are layers, width, heads."""
    vision = {"kind": "vit", "patch_size": patch, "mlp_ratio": mlp_ratio, **tower(*image, activation)}
    optim = {"lr": lr, "beta2": 0.98, "eps": 1e-6}
    return common(embed_dim, resolution, vision, tower(*text, activation), optim, total_steps)


def resnet(embed_dim: int, blocks: tuple[int, ...], width: int, text: int, lr: float, resolution: int) -> ConfigDict:
    """A ResNet; its text tower has 12 layers of width ``text``. Heads have 64 channels in both."""
    vision = {"kind": "resnet", "layers": blocks, "width": width, "heads": width // 2}
    optim = {"lr": lr, "beta2": 0.999, "eps": 1e-8}
    return common(embed_dim, resolution, vision, tower(12, text, text // 64, "quick_gelu"), optim, STEPS)


BASE, LARGE = (12, 768, 12), (24, 1024, 16)
"""The image towers of two sizes."""

STAGES = {
    "rn50": lambda: resnet(1024, (3, 4, 6, 3), 64, 512, 5e-4, 224),
    "rn101": lambda: resnet(512, (3, 4, 23, 3), 64, 512, 5e-4, 224),
    "rn50x4": lambda: resnet(640, (4, 6, 10, 6), 80, 640, 5e-4, 288),
    "rn50x16": lambda: resnet(768, (6, 8, 18, 8), 96, 768, 4e-4, 384),
    "rn50x64": lambda: resnet(1024, (3, 15, 36, 10), 128, 1024, 3.6e-4, 448),
    "vit_b32": lambda: vit(512, 32, BASE, (12, 512, 8)),
    "vit_b16": lambda: vit(512, 16, BASE, (12, 512, 8)),
    "vit_l14": lambda: vit(768, 14, LARGE, (12, 768, 12), 4e-4),
    "vit_l14_336": lambda: vit(768, 14, LARGE, (12, 768, 12), 2e-5, 336, total_steps=STEPS // 32),
    "vit_h14": lambda: vit(1024, 14, (32, 1280, 16), (24, 1024, 16), activation="gelu"),
    "vit_bigg14": lambda: vit(1280, 14, (48, 1664, 16), (32, 1280, 20), activation="gelu", mlp_ratio=4.9231),
}
