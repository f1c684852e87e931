"""Karlo at its real size, with random weights: written as diffusers has it, imported, sampled, compared with diffusers.

    python benchmarks/karlo_full.py --folder /tmp/karlo --peer path/to/python

Each part runs in a process of its own, whose time and peak memory are measured. The folder takes 28 GB of disk.
``--peer`` is an interpreter with torch, diffusers 0.33.1 and transformers 4.46.3: it evaluates the decoder once on the
inputs that ours saw.
"""

import argparse
import functools
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import common
import jax
import numpy as np

from dalle2_jax import compilation, text
from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import UserError
from dalle2_jax.stages import Stage
from dalle2_jax.system import load
from dalle2_jax.training.sharding import MeshConfig, make_mesh
from dalle2_jax.weights.karlo.export import TrainedStage, export_diffusers
from dalle2_jax.weights.stage_writer import Trees, write_folder

CONFIG = "configs/karlo.py"
STAGES = ("clip", "prior", "decoder", "upsampler_1")
PROMPT = "a photo of a red panda eating noodles"
BUFFER = 1 << 22

PEER = """
import json, sys
import numpy as np
import torch
from diffusers import UNet2DConditionModel
from diffusers.pipelines.unclip.text_proj import UnCLIPTextProjModel

folder, inputs, output = sys.argv[1:]
given = {name: torch.from_numpy(value) for name, value in np.load(inputs).items()}
project = UnCLIPTextProjModel.from_pretrained(folder + "/text_proj").eval()
decoder = UNet2DConditionModel.from_pretrained(folder + "/decoder").eval()
with torch.no_grad():
    text_seq, emb = project(
        image_embeddings=given["image_emb"], prompt_embeds=given["text_emb"],
        text_encoder_hidden_states=given["text"], do_classifier_free_guidance=False,
    )
    seen = torch.nn.functional.pad(given["mask"], (text_seq.shape[1] - given["mask"].shape[1], 0), value=True)
    x = given["x"].permute(0, 3, 1, 2)
    out = decoder(x, given["t"], encoder_hidden_states=text_seq, class_labels=emb, attention_mask=seen).sample
np.save(output, out.permute(0, 2, 3, 1).numpy())
"""


class RandomLeaf:
    """An array of random numbers that is made when it is asked for, and not kept."""

    def __init__(self, path: str, shape: tuple[int, ...], number: int):
        self.path, self.shape, self.number = path, shape, number

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        size = int(np.prod(self.shape))
        start = self.number * 7919 % BUFFER
        flat = np.take(_noise(), np.arange(start, start + size), mode="wrap").reshape(self.shape)
        if self.path.endswith(("scale", "std")):
            return 1 + 0.1 * flat
        fan_in = size // self.shape[-1] if self.path.endswith("kernel") else 100
        return flat * np.float32(fan_in) ** -0.5


@functools.cache
def _noise() -> np.ndarray:
    return np.random.default_rng(0).standard_normal(BUFFER, np.float32)


def random_tree(shapes: Any) -> Any:
    """Returns a tree of random leaves of these shapes."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(shapes)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    made = [RandomLeaf(name, leaf.shape, i) for i, (name, (_, leaf)) in enumerate(zip(names, leaves, strict=True))]
    return jax.tree_util.tree_unflatten(structure, made)


def write(folder: pathlib.Path) -> None:
    """Writes the whole pipeline with random weights, a tensor at a time."""
    tokenizer, clip, trained = text.clip_tokenizer(), None, {}
    for name in STAGES:
        config = common.load_config(f"{CONFIG}:{name}")
        stage: Stage = Experiment.from_config(config).build(tokenizer.vocab_size, clip)
        clip = stage if name == "clip" else clip
        shapes = jax.eval_shape(stage.init, jax.random.key(0))
        trees = Trees(random_tree(shapes.params), random_tree(shapes.stats))
        trained[name] = TrainedStage(stage, trees, tokenizer)
    write_folder(folder, lambda temporary: export_diffusers(temporary, trained))


def evaluate(system: pathlib.Path, inputs: pathlib.Path, output: pathlib.Path) -> None:
    """Evaluates the decoder once, on inputs that it writes."""
    members = load.load_system(system, make_mesh(MeshConfig()), ("clip", "decoder"))
    stage, variables = members["decoder"].stage, members["decoder"].variables
    random = np.random.default_rng(1)
    width, length = members["clip"].stage.model.embed_dim, members["clip"].context_length
    states = members["clip"].stage.model.text.width
    mask = np.arange(length)[None] < 12
    given = {
        "x": random.standard_normal((1, *stage.sample_shape({})), np.float32),
        "t": np.asarray([500], np.int32),
        "image_emb": random.standard_normal((1, width), np.float32),
        "text_emb": random.standard_normal((1, width), np.float32),
        "text": random.standard_normal((1, length, states), np.float32),
        "mask": mask,
    }
    np.savez(inputs, **{**given, "t": given["t"].astype(np.int64)})
    nothing = {"null_text": given["text"], "null_mask": mask, "null_text_emb": given["text_emb"]}

    @jax.jit
    def forward(params: Any, given: dict[str, jax.Array]) -> jax.Array:
        conditioning = {name: given[name] for name in ("image_emb", "text_emb", "text", "mask")} | nothing
        drops = {name: np.zeros(1, bool) for name in stage.drop_rates}
        return stage.bind(params, conditioning, drops, None)(given["x"], given["t"])

    first, seconds = common.median_seconds(lambda: forward(variables.params, given), 3, warm_up=1)
    common.emit(benchmark="karlo_full", part="decoder forward", first_s=round(first, 1), median_s=round(seconds, 2))
    np.save(output, np.asarray(forward(variables.params, given)))


def measured(part: str, *words: str | os.PathLike) -> None:
    """Runs a command, and prints its time and peak memory. UserError if it fails."""
    start = time.perf_counter()
    process = os.posix_spawn(words[0], [os.fspath(word) for word in words], os.environ)
    _, status, usage = os.wait4(process, 0)
    seconds = time.perf_counter() - start
    if status:
        raise UserError(f"{part} failed with exit code {os.waitstatus_to_exitcode(status)}")
    gigabytes = usage.ru_maxrss / 1024**2
    common.emit(benchmark="karlo_full", part=part, seconds=round(seconds, 1), peak_gib=round(gigabytes, 2))


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the parts that are not there yet."""
    parser = args.make_parser(
        "python benchmarks/karlo_full.py", __doc__.splitlines()[0], __doc__.splitlines()[2].strip()
    )
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="scratch folder with 28 GB of free space")
    parser.add_argument("--peer", help="an interpreter with torch and diffusers 0.33.1")
    parser.add_argument("--evaluate", nargs=3, type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--write", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    compilation.enable_compilation_cache()
    theirs, system = options.folder / "diffusers", options.folder / "system"
    if options.write:
        return write(theirs)
    if options.evaluate:
        return evaluate(*options.evaluate)
    this, python = os.path.abspath(__file__), sys.executable
    if not theirs.exists():
        measured("write", python, this, "--folder", options.folder, "--write")
    if not system.exists():
        measured("import", python, "-m", "dalle2_jax", "weights", "import", "karlo", theirs, system)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        inputs, ours, peers = (pathlib.Path(scratch) / name for name in ("inputs.npz", "ours.npy", "peers.npy"))
        words = ("--folder", options.folder, "--evaluate", system, inputs, ours)
        measured("load the decoder and evaluate it", python, this, *words)
        if options.peer:
            measured("the same by diffusers", options.peer, "-c", PEER, theirs, inputs, peers)
            one, other = np.load(ours), np.load(peers)
            error = float(np.abs(one - other).max() / np.abs(other).max())
            common.emit(benchmark="karlo_full", part="decoder forward against diffusers", relative_error=error)
    words = ("text2image", "--system", system, "--prompt", PROMPT, "--num", "1", "--out", options.folder / "images")
    measured("one image", python, "sample.py", *words)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
