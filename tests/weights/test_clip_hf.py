"""CLIP in transformers' folders: parity with recorded outputs, and the table against the published names."""

import gzip
import json

import jax
import numpy as np
import pytest
from clips import FIXTURES, FOLDER, abstract, error, forward, imported, pictures, recorded, stage_of

from dalle2_jax.weights import clip_hf
from dalle2_jax.weights.component import Source


@pytest.mark.parametrize("name", ["quick_gelu", "gelu"])
def test_outputs_are_those_of_transformers(name):
    folder = FOLDER / f"clip_hf_{name}"
    (component,) = clip_hf.recognise(Source.open(folder))
    config, variables = imported(component)
    theirs = recorded(folder / "parity.npz")
    image = pictures(theirs.pixel_values, config)
    for mask in (theirs.attention_mask > 0, None):
        image_emb, text_emb, states, logits = forward(config, variables, image, theirs.input_ids, mask)
        assert error(image_emb, theirs.image_embeds_raw) <= 1e-5
        assert error(text_emb, theirs.text_embeds_raw) <= 1e-5
        assert error(states, theirs.text_last_hidden_state) <= 1e-5
        np.testing.assert_allclose(logits, theirs.logits_per_image, rtol=0, atol=1e-4)
