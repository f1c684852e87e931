"""transformers loads the files of `export_hf` and computes the same outputs (needs the extra ``parity``)."""

import warnings

import jax.numpy as jnp
import numpy as np
import pytest
from clips import error, forward, random_clip, to_images

from dalle2_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from dalle2_jax.text import clip_tokenizer
from dalle2_jax.weights.clip.transformers import export_hf

torch = pytest.importorskip("torch")
with warnings.catch_warnings(action="ignore"):
    transformers = pytest.importorskip("transformers")

TEXT = TextConfig(vocab_size=530, context_length=12, width=24, layers=2, heads=3, activation="gelu", mlp_ratio=1.5)
VISION = VisionConfig(12, 4, width=20, layers=3, heads=2, activation="quick_gelu", mlp_ratio=8.05)
CONFIG = ClipConfig(28, TEXT, VISION)
CAPTIONS = ["a red cube", "Zebra!", "", "a very long caption of many more words than fit"]


@pytest.mark.filterwarnings("ignore")
def test_clip_model_loads_and_agrees(tmp_path):
    trees, ours = random_clip(CONFIG), clip_tokenizer(530)
    export_hf(tmp_path, CONFIG, trees, ours)
    tokens, mask = ours.encode(CAPTIONS, 12)
    tokenizer = transformers.CLIPTokenizer.from_pretrained(tmp_path)
    theirs = tokenizer(CAPTIONS, padding="max_length", truncation=True, return_tensors="np")
    np.testing.assert_array_equal(theirs.attention_mask, mask)
    np.testing.assert_array_equal(theirs.input_ids[mask], tokens[mask])

    processor = transformers.CLIPImageProcessor.from_pretrained(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (4, 12, 12, 3), np.uint8)
    pixels = processor(list(image), return_tensors="np").pixel_values
    np.testing.assert_allclose(to_images(pixels, CONFIG), image / 127.5 - 1, rtol=0, atol=1e-5)

    model, report = transformers.CLIPModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(theirs.input_ids), torch.from_numpy(pixels))
    variables = {"params": trees.params}
    captions = jnp.asarray(tokens), jnp.asarray(mask)
    image_emb, text_emb, _, _ = forward(CONFIG, variables, to_images(pixels, CONFIG), *captions)
    for embedding, recorded in ((image_emb, out.image_embeds), (text_emb, out.text_embeds)):
        unit = embedding / jnp.linalg.norm(embedding, axis=-1, keepdims=True)
        assert error(unit, jnp.asarray(recorded.numpy())) <= 1e-5


@pytest.mark.filterwarnings("ignore")
def test_a_single_text_tower_loads(tmp_path):
    config = ClipConfig(28, TEXT, None)
    trees = random_clip(CONFIG)
    export_hf(tmp_path, config, trees, clip_tokenizer(530))
    model, report = transformers.CLIPTextModelWithProjection.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    tokens, mask = clip_tokenizer(530).encode(CAPTIONS, 12)
    with torch.no_grad():
        out = model.eval()(torch.from_numpy(tokens.astype(np.int64)))
    image = jnp.zeros((4, 12, 12, 3))
    _, text_emb, states, _ = forward(CONFIG, {"params": trees.params}, image, jnp.asarray(tokens), jnp.asarray(mask))
    assert error(text_emb, jnp.asarray(out.text_embeds.numpy())) <= 1e-5
    assert error(states, jnp.asarray(out.last_hidden_state.numpy())) <= 1e-5
