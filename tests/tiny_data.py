"""Captioned pictures in a folder, and a finished CLIP to embed them: what tests of stored embeddings share."""

import json

import cv2
import numpy as np
import tiny_system

from dalle2_jax import build, data, testing
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.stages.base import fingerprint
from dalle2_jax.text import train_sentencepiece
from dalle2_jax.workdir import Checkpoints, StageFolder

WORDS = "red green blue large small circle square".split()


def write_pictures(folder, count=48):
    """Writes pictures of noise at 8x8, of one to three captions each."""
    noise, lines = np.random.default_rng(0), []
    for number in range(count):
        cv2.imwrite(str(folder / f"{number:02d}.png"), noise.integers(256, size=(8, 8, 3), dtype=np.uint8))
        texts = [" ".join(noise.choice(WORDS, 3)) for _ in range(number % 3 + 1)]
        lines.append(json.dumps({"file_name": f"{number:02d}.png", "text": texts}))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


def write_clip(root, seed=0):
    """Writes a finished CLIP of random weights."""
    config = tiny_system.get_config("clip").to_dict() | {"total_steps": 0}
    tokenizer = train_sentencepiece(data.ShapesSource("train", 8, num_examples=64).captions(64), 300)
    stage = build.build_stage(config, tokenizer.vocab_size, None)
    variables, folder = testing.tiny_variables(stage, seed), StageFolder(root, "clip")
    checkpoints = Checkpoints(folder)
    checkpoints.save(0, {"ema": variables.params, "stats": variables.stats}, {})
    checkpoints.wait()
    tokenizer.save(folder.path / "tokenizer")
    folder.write_json("config.json", config)
    folder.write_json("contract.json", vars(EmbeddingContract(fingerprint(variables.params), 8, "unit", 1.5)))
    return root
