"""Streams of captioned images as tokens, and random single examples: helpers of the data tests."""

import numpy as np

from dalle2_jax.data import make_stream, prepare


def text_stream(source, tokenizer, context_length, *args, degrading=None, **options):
    """Returns a stream of a source, with tokens if there is a tokenizer, and with degraded images if requested."""
    return make_stream(prepare(source, tokenizer, context_length if tokenizer else 0, degrading), *args, **options)


def sample(source, index, seed):
    """Returns one example with the crop and the caption that a generator of this seed chooses."""
    return {name: column[0] for name, column in source.fetch([index], [np.random.default_rng(seed)]).items()}
