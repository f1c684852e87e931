"""A tiny system in memory, for tests of the Python face."""

from pathlib import Path

import pytest

from dalle2_jax import testing
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.system import LoadedStage
from dalle2_jax.system.system import System
from dalle2_jax.training.sharding import MeshConfig, make_mesh

KINDS = {"clip": "clip_vit", "prior": "prior", "decoder": "decoder", "upsampler_1": "upsampler"}


@pytest.fixture(scope="session")
def system():
    """Untrained stages: their images are noise."""
    stages, embedding = {}, testing.tiny_stage("clip_vit").embedding
    space = EmbeddingContract("c0ffee", testing.EMBED_DIM, embedding.normalisation, embedding.scale)
    for name, kind in KINDS.items():
        stage = testing.tiny_stage(kind)
        reads_text = name != "upsampler_1"
        tokenizer, length = (testing.WordTokenizer(), testing.CONTEXT_LENGTH) if reads_text else (None, 0)
        contract = space if reads_text else None
        stages[name] = LoadedStage(stage, testing.tiny_variables(stage), 7, contract, tokenizer, length)
    return System(Path("runs/nowhere"), stages, make_mesh(MeshConfig()))
