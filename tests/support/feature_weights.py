"""Random weights of feature networks, the same here and where their outputs were recorded.

../fixtures/features/outputs.npz holds what the published implementations computed with these weights: pytorch-fid
0.3.0, torchvision 0.23.0, lpips 0.1.4, efficientnet_lite_pytorch 0.1.0 and facebookresearch/dinov2, with torch 2.8.0.
../fixtures/features/record.py recorded it.
"""

import pathlib
import zlib

import numpy as np

RECORDED = pathlib.Path(__file__).parents[1] / "fixtures" / "features" / "outputs.npz"

BUFFERS = ("num_batches_tracked", "scaling_layer.shift", "scaling_layer.scale")
"""Ends of names of tensors that are not random."""


def random_state(shapes):
    """Returns random tensors {name: float32}, given {name: shape}; each depends on its name and shape only.

    Activations keep their size through a network, and rounding errors too: kernels have variance 2 / fan_in.
    """
    state = {}
    for name, shape in shapes.items():
        noise = np.random.default_rng(zlib.crc32(name.encode())).standard_normal(shape, np.float32)
        last = name.rpartition(".")[2]
        if name.startswith("lin") or last == "running_var":
            state[name] = np.abs(noise) + np.float32(1 if last == "running_var" else 0.1)
        elif last == "weight" and len(shape) > 1:
            state[name] = noise * np.float32((2 / np.prod(shape[1:])) ** 0.5)
        elif last in ("weight", "gamma"):
            state[name] = np.float32(1) + np.float32(0.1) * noise
        else:
            state[name] = np.float32(0.1) * noise
    return state


def images(count, side, seed=0):
    """Returns smooth random images uint8[count, side, side, 3]."""
    noise = np.random.default_rng(seed)
    coarse = noise.integers(0, 256, (count, side // 8, side // 8, 3)).repeat(8, axis=1).repeat(8, axis=2)
    return np.clip(coarse + noise.normal(0, 12, coarse.shape), 0, 255).astype(np.uint8)
