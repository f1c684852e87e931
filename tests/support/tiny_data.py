"""Writes a folder of captioned images and an untrained CLIP to embed them; shared by tests of stored embeddings."""

import dataclasses
import json

import cv2
import numpy as np
import tiny_system

from dalle2_jax import data, testing
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.stages import EmbeddingContract, fingerprint
from dalle2_jax.text import train_sentencepiece
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

WORDS = "red green blue large small circle square".split()


def write_images(folder, count=48):
    """Writes images of noise at 8x8 with one to three captions each; returns the folder."""
    noise, lines = np.random.default_rng(0), []
    for number in range(count):
        cv2.imwrite(str(folder / f"{number:02d}.png"), noise.integers(256, size=(8, 8, 3), dtype=np.uint8))
        texts = [" ".join(noise.choice(WORDS, 3)) for _ in range(number % 3 + 1)]
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_clip(root, seed=0):
    """Writes the stage of a CLIP with random weights, with a final checkpoint at step 0; returns ``root``."""
    config = tiny_system.get_config("clip").to_dict() | {"total_steps": 0}
    tokenizer = train_sentencepiece(data.ShapesSource("train", 8, num_examples=64).captions(64), 300)
    stage = Experiment.from_config(config).build(tokenizer.vocab_size, None)
    variables, folder = testing.tiny_variables(stage, seed), StageFolder(root, "clip")
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, {"ema": variables.params, "stats": variables.stats}, {})
    checkpoints.wait()
    tokenizer.save(folder.path / "tokenizer")
    folder.write_json("config.json", config)
    contract = EmbeddingContract(fingerprint(variables.params), 8, "unit", 1.5)
    folder.write_json("contract.json", dataclasses.asdict(contract))
    return root
