"""A tiny system in memory, of untrained stages: its images are noise."""

from pathlib import Path

from dalle2_jax import testing
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.system import LoadedStage
from dalle2_jax.system.system import System
from dalle2_jax.training.sharding import MeshConfig, make_mesh

KINDS = {"clip": "clip_vit", "prior": "prior", "decoder": "decoder", "upsampler_1": "upsampler"}


def make_system():
    """Returns a system that generates images of 8x8, then 16x16."""
    stages, embedding = {}, testing.tiny_stage("clip_vit").embedding
    space = EmbeddingContract("c0ffee", testing.EMBED_DIM, embedding.normalisation, embedding.scale)
    for name, kind in KINDS.items():
        stage = testing.tiny_stage(kind)
        reads_text = name != "upsampler_1"
        tokenizer, length = (testing.WordTokenizer(), testing.CONTEXT_LENGTH) if reads_text else (None, 0)
        contract = space if reads_text else None
        stages[name] = LoadedStage(stage, testing.tiny_variables(stage), 7, contract, tokenizer, length)
    return System(Path("runs/nowhere"), stages, make_mesh(MeshConfig()))
