"""Features of VGG16 an image, next to those of torchvision in an interpreter of its own, in alternating runs.

    python benchmarks/features.py --torch_python /path/to/python [--side 64] [--images 64] [--rounds 5]

Prints one JSON line: median images per second of both, and per second of CPU time ("cpu"), which other processes on the
machine change less; and the ratios of ours to torch's.
"""

import argparse
import statistics
import subprocess
import time

import common
import jax
import numpy as np

from dalle2_jax.evaluation.features import FeatureNetwork, extract
from dalle2_jax.evaluation.features.encoders import make_network
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.types import Params
from dalle2_jax.weights.features.table import NETWORKS, shapes

PEER = """
import sys, time, torch
from torchvision.models import vgg16
side, images, batch = map(int, sys.argv[1:])
torch.set_grad_enabled(False)
network = vgg16().features.eval()
pixels = torch.randint(0, 256, (images, side, side, 3), dtype=torch.uint8)
mean, std = torch.tensor([.485, .456, .406]).view(1, 3, 1, 1), torch.tensor([.229, .224, .225]).view(1, 3, 1, 1)
def run():
    for part in pixels.split(batch):
        network((part.permute(0, 3, 1, 2).float() / 255 - mean) / std).mean((2, 3))
run()
print("ready", flush=True)
for _ in sys.stdin:
    start, cpu = time.perf_counter(), time.process_time()
    run()
    print(images / (time.perf_counter() - start), images / (time.process_time() - cpu), flush=True)
"""


def random_network() -> FeatureNetwork:
    """Returns VGG16 with random weights."""
    noise, abstract = np.random.default_rng(0), shapes(NETWORKS["vgg16"])

    def values(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        return noise.standard_normal(leaf.shape, np.float32) * np.float32((2 / np.prod(leaf.shape[:-1])) ** 0.5)

    variables: Params = jax.tree.map(values, abstract)
    return make_network("vgg16", variables, "random", make_mesh(MeshConfig()))


def main() -> None:
    """Measures both in alternating rounds."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch_python", required=True, help="an interpreter with torch and torchvision")
    parser.add_argument("--side", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--images", type=int, default=64, help="images a round")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each")
    options = parser.parse_args()
    images = np.random.default_rng(1).integers(0, 256, (options.images, options.side, options.side, 3), np.uint8)
    network, rates = random_network(), {name: [] for name in ("jax", "torch", "jax cpu", "torch cpu")}
    extract(network, images, options.batch_size)
    words = [options.torch_python, "-c", PEER, *map(str, (options.side, options.images, options.batch_size))]
    peer = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert peer.stdin and peer.stdout and peer.stdout.readline() == "ready\n"
    for _ in range(options.rounds):
        start, cpu = time.perf_counter(), time.process_time()
        extract(network, images, options.batch_size)
        rates["jax"].append(options.images / (time.perf_counter() - start))
        rates["jax cpu"].append(options.images / (time.process_time() - cpu))
        print(file=peer.stdin, flush=True)
        for name, rate in zip(("torch", "torch cpu"), peer.stdout.readline().split(), strict=True):
            rates[name].append(float(rate))
    peer.stdin.close()
    peer.wait()
    medians = {name: round(statistics.median(each), 2) for name, each in rates.items()}
    ratios = {name: round(medians[name] / medians[name.replace("jax", "torch")], 3) for name in ("jax", "jax cpu")}
    common.emit(benchmark="features of vgg16", side=options.side, images_per_second=medians, ratios=ratios)


if __name__ == "__main__":
    main()
