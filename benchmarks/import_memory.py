"""Measures the memory that an import takes in addition to its weights: a prior in Karlo's layout, of random numbers.

    python benchmarks/import_memory.py [--width 1280 --layers 8]

Both imports run in processes of their own; the peak of one of a tiny prior is what Python, JAX and CLIP take.
"""

import os
import pathlib
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import jax
import jax.numpy as jnp
import numpy as np
from common import PACKAGE, ROOT, emit, output

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.models.priors.prior import PriorConfig, PriorNetwork
from dalle2_jax.weights.karlo.priors import prior_config_file, prior_rules
from dalle2_jax.weights.rules import shapes
from dalle2_jax.weights.stage_writer import write_json
from dalle2_jax.weights.tensors import write_safetensors

CLIP = ROOT / "tests" / "fixtures" / "karlo_tiny" / "text_encoder"
EMBED_DIM, CONTEXT_LENGTH = 48, 77
"""Of that CLIP."""

WATCHED = "import resource, runpy\n"
WATCHED += "try: runpy.run_module('dalle2_jax', run_name='__main__')\n"
WATCHED += "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
"""Runs a command, and prints the peak of its memory in kB."""


def write_prior(folder: pathlib.Path, width: int, layers: int) -> int:
    """Writes a folder of diffusers' with a prior of random numbers; returns its bytes in float32."""
    model = PriorConfig(width, layers, width // 64, EMBED_DIM, CONTEXT_LENGTH, "clip", None, EMBED_DIM, False)
    inputs = jnp.zeros((1, EMBED_DIM)), jnp.zeros(1, jnp.int32), jnp.zeros((1, EMBED_DIM))
    texts = jnp.zeros((1, CONTEXT_LENGTH, EMBED_DIM)), jnp.ones((1, CONTEXT_LENGTH), bool)
    params = jax.eval_shape(PriorNetwork(model).init, jax.random.key(0), *inputs, *texts)["params"]
    sizes = shapes(prior_rules(model), params) | {"clip_mean": (1, EMBED_DIM), "clip_std": (1, EMBED_DIM)}
    noise = np.random.default_rng(0)
    write_json(folder / "config.json", prior_config_file(model))
    # positive, as clip_std must be
    tensors = ((key, np.abs(noise.standard_normal(shape, np.float32))) for key, shape in sizes.items())
    write_safetensors(folder / "diffusion_pytorch_model.safetensors", sizes, tensors)
    return 4 * sum(int(np.prod(shape)) for shape in sizes.values())


def measure(root: pathlib.Path, *words: object) -> tuple[int, float]:
    """Imports CLIP and a prior; returns the peak of the memory, in bytes, and seconds."""
    start = time.perf_counter()
    given = ["weights", "import", "auto", CLIP, root / "prior", root / "system", *words]
    printed = output([sys.executable, "-c", WATCHED, *given], {**os.environ, **PACKAGE}, ROOT)
    return 1024 * int(printed.split()[-1]), time.perf_counter() - start


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/import_memory.py --dtype bfloat16"
    parser = args.make_parser("python benchmarks/import_memory.py", "Measures the memory of an import.", example)
    parser.add_argument("--width", type=args.positive_int, default=1280, help="of the prior (default %(default)s)")
    parser.add_argument("--layers", type=args.positive_int, default=8, help="of the prior (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the import")
    options = parser.parse_args()
    peaks = {}
    for name, width, layers in (("tiny", 64, 1), ("large", options.width, options.layers)):
        with tempfile.TemporaryDirectory() as folder:
            root = pathlib.Path(folder)
            size = write_prior(root / "prior", width, layers)
            peaks[name], seconds = measure(root, "--dtype", options.dtype)
    emit(
        benchmark="import_memory",
        dtype=options.dtype,
        component_bytes=size,
        baseline_bytes=peaks["tiny"],
        peak_bytes=peaks["large"],
        ratio=(peaks["large"] - peaks["tiny"]) / size,
        seconds=seconds,
    )


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
