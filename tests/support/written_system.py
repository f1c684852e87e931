"""Writes a tiny system as an importer does: configs without data, checkpoints at step 0, random weights."""

import tiny_system

from dalle2_jax import testing
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.data import ShapesSource
from dalle2_jax.stages import EmbeddingContract, fingerprint
from dalle2_jax.text import train_sentencepiece
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

IMPORTED = ("clip", "prior", "decoder", "upsampler_1")
SECTIONS = ("stage", "model", "text", "diffusion", "sampling", "conditioning", "embedding")


def write_system(root, seed=0):
    """Writes the system below ``root`` and returns it."""
    tokenizer = train_sentencepiece(ShapesSource("train", 8, num_examples=64).captions(64), 300)
    clip = contract = None
    for name in IMPORTED:
        config = tiny_system.get_config(name).to_dict()
        stored = {key: config[key] for key in SECTIONS if key in config} | {"total_steps": 0}
        stage = Experiment.from_config(stored).build(tokenizer.vocab_size, clip)
        variables = testing.tiny_variables(stage, seed)
        folder = StageFolder(root, name)
        checkpoints = Checkpoints(folder)
        checkpoints.save(0, {"ema": variables.params, "stats": variables.stats}, {})
        checkpoints.wait()
        folder.write_json("config.json", stored)
        if name == "clip":
            clip, contract = stage, EmbeddingContract(fingerprint(variables.params), 8, "unit", 1.5)
        if name != "upsampler_1":
            tokenizer.save(folder.path / "tokenizer")
            old = ("clip", "dim", "normalisation", "scale")  # as contracts were before they had preprocessing
            folder.write_json("contract.json", {field: getattr(contract, field) for field in old})
    return root
