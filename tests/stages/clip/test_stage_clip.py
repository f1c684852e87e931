"""CLIP as a stage: the loss by hand, the temperature, the embedding space, captions of another length."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from raised import mentions

from dalle2_jax import testing
from dalle2_jax.errors import UserError
from dalle2_jax.stages import (
    ClipStage,
    EmbeddingConfig,
    LoraConfig,
    LoraStage,
    Variables,
    images,
)
from dalle2_jax.stages.clip import fit_captions, unit

SIZE = 6


@pytest.fixture(scope="module", params=["clip_vit", "clip_resnet"])
def clip(request):
    """A stage, its variables, and, in one program, its loss and the embeddings that it is made of."""
    stage = testing.tiny_stage(request.param)

    @jax.jit
    def run(params, stats, key, batch):
        collections = {"params": params} | ({"batch_stats": stats} if stats else {})
        image = images.to_float(batch["image"])
        embeddings, _ = stage.network.apply(
            collections, image, batch["tokens"], batch["mask"], train=True, mutable=["batch_stats"]
        )
        return stage.loss(params, stats, {}, key, batch), embeddings[:2]

    return stage, testing.tiny_variables(stage), run


def loss_of(clip, batch, **params):
    _, variables, run = clip
    return run({**variables.params, **params}, variables.stats, jax.random.key(0), batch)[0]


def cross_entropy(logits):
    """Of the diagonal, in float64."""
    shifted = logits - logits.max(axis=1, keepdims=True)
    return -np.mean(np.diagonal(shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))))


def test_the_loss_is_the_papers(clip):
    _, variables, run = clip
    (loss, (metrics, _)), embeddings = run(*variables, jax.random.key(0), testing.tiny_batch(SIZE))
    image_emb, text_emb = (np.asarray(emb, np.float64) for emb in embeddings)
    image_emb, text_emb = (emb / np.linalg.norm(emb, axis=1, keepdims=True) for emb in (image_emb, text_emb))
    logits = math.exp(float(variables.params["logit_scale"])) * image_emb @ text_emb.T
    np.testing.assert_allclose(loss, (cross_entropy(logits) + cross_entropy(logits.T)) / 2, rtol=2e-5)
    right = np.arange(SIZE)
    np.testing.assert_allclose(metrics["image_to_text"], (logits.argmax(axis=1) == right).mean())
    np.testing.assert_allclose(metrics["text_to_image"], (logits.argmax(axis=0) == right).mean())


def test_equal_embeddings_leave_the_loss_of_a_guess(clip):
    batch = {name: np.repeat(rows, SIZE, axis=0) for name, rows in testing.tiny_batch(1).items()}
    np.testing.assert_allclose(loss_of(clip, batch)[0], math.log(SIZE), rtol=1e-5)


def test_the_temperature_is_clipped_at_100(clip):
    batch = testing.tiny_batch(SIZE)
    at_100, (metrics, _) = loss_of(clip, batch, logit_scale=jnp.float32(math.log(100)))
    above, (clipped, _) = loss_of(clip, batch, logit_scale=jnp.float32(9.0))
    np.testing.assert_allclose([metrics["temperature"], clipped["temperature"]], 100, rtol=1e-5)
    np.testing.assert_allclose(at_100, above, rtol=1e-6)
    below, (free, _) = loss_of(clip, batch, logit_scale=jnp.float32(math.log(50)))
    np.testing.assert_allclose(free["temperature"], 50, rtol=1e-5)
    assert below < above


def test_the_temperature_has_a_gradient_wherever_it_is(clip):
    """Above the maximum it is that at the maximum, so that weights from elsewhere can come down."""
    stage, variables, _ = clip
    batch = testing.tiny_batch(SIZE)

    def loss(log_scale, variables):
        return stage.loss(
            {**variables.params, "logit_scale": log_scale}, variables.stats, {}, jax.random.key(0), batch
        )[0]

    slope = jax.jit(jax.grad(loss))
    at_100, above = (slope(jnp.float32(value), variables) for value in (math.log(100), 9.0))
    assert abs(at_100) > 1e-3
    np.testing.assert_allclose(above, at_100, rtol=1e-5)


@pytest.mark.parametrize(("value", "projected"), [(9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0), (-math.inf, 0.0)])
def test_the_temperature_is_clipped_after_an_update(clip, value, projected):
    stage, variables, _ = clip
    params = {**variables.params, "logit_scale": jnp.float32(value)}
    after = stage.training_rules.project(params)
    np.testing.assert_allclose(after["logit_scale"], projected, rtol=1e-6)
    assert after["logit_scale"].dtype == jnp.float32
    assert all(after[name] is params[name] for name in params if name != "logit_scale")


def test_a_lora_keeps_the_temperature_of_its_base(clip):
    stage, _, _ = clip
    lora = LoraStage(stage, LoraConfig())
    factors = {"text": {"proj": {"lora_a": jnp.ones(2)}}}
    assert lora.training_rules.project(factors) is factors
    assert lora.training_rules.averaged_stats == stage.training_rules.averaged_stats


def test_only_batch_norm_has_statistics_and_training_moves_them(clip):
    stage, variables, _ = clip
    _, outputs = loss_of(clip, testing.tiny_batch(SIZE))
    assert bool(variables.stats) == (stage == testing.tiny_stage("clip_resnet"))
    assert jax.tree.structure(outputs.stats) == jax.tree.structure(variables.stats)
    for before, after in zip(jax.tree.leaves(variables.stats), jax.tree.leaves(outputs.stats), strict=True):
        assert not np.array_equal(before, after)


# --- what CLIP lends --------------------------------------------------------------------------


def test_embeddings_come_in_the_contracts_space(clip):
    stage, variables, _ = clip
    batch, other = testing.tiny_batch(SIZE), ClipStage(stage.model, EmbeddingConfig("raw", 2.0))
    encode = jax.jit(lambda image: (stage.encode_image(variables, image), other.encode_image(variables, image)))
    embedding, raw = encode(batch["image"])
    np.testing.assert_allclose(jnp.linalg.norm(embedding, axis=1), stage.embedding.scale, rtol=1e-5)
    np.testing.assert_allclose(embedding / stage.embedding.scale, unit(raw), rtol=1e-4, atol=1e-5)
    doubled = encode(batch["image"].repeat(2, axis=1).repeat(2, axis=2))[0]  # images are fitted
    np.testing.assert_allclose(doubled, embedding, rtol=1e-4, atol=1e-5)
    one = encode(batch["image"][2:4])[0]  # nothing is learned of the rest of the batch
    np.testing.assert_allclose(one, embedding[2:4], rtol=1e-4, atol=1e-5)


def test_embedding_config():
    raw = jnp.asarray([[3.0, 4.0], [0.0, 0.0], [-1e-3, 0.0]])
    np.testing.assert_allclose(EmbeddingConfig("raw", 2.0).apply(raw), 2 * raw)
    np.testing.assert_allclose(EmbeddingConfig().apply(raw), 17.2 * np.array([[0.6, 0.8], [0, 0], [-1, 0]]), rtol=1e-6)
    gradient = jax.grad(lambda emb: EmbeddingConfig().apply(emb).sum())(raw)
    assert np.isfinite(gradient).all()
    with pytest.raises(UserError, check=mentions("embedding.normalisation", "'l2'", "'unit'", "'raw'")):
        EmbeddingConfig("l2")


CAPTIONS = ["", "one", "a b c d", "a b c d e", "a b c d e f", "a b c d e f g", "a b c d e f g h i j k l m n o p"]


@pytest.mark.parametrize("encoded", [6, 8, 12, 30])
def test_captions_of_another_length_are_as_if_encoded_for_this_one(encoded):
    encode = testing.WordTokenizer().encode
    captions = [caption for caption in CAPTIONS if encoded >= 8 or len(caption.split()) + 2 <= encoded]
    fitted = fit_captions(*map(jnp.asarray, encode(captions, encoded)), 8)
    for ours, theirs in zip(fitted, encode(captions, 8), strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


def test_clip_reads_longer_captions():
    stage = testing.tiny_stage("clip_vit")
    variables: Variables = testing.tiny_variables(stage)
    read = jax.jit(stage.encode_text)
    long, short = (
        dict(zip(("tokens", "mask"), testing.WordTokenizer().encode(CAPTIONS, length), strict=True))
        for length in (12, testing.CONTEXT_LENGTH)
    )
    for name, value in read(variables, long).items():
        np.testing.assert_array_equal(value, read(variables, short)[name])
    np.testing.assert_allclose(
        jnp.linalg.norm(read(variables, short)["text_emb"], axis=1), stage.embedding.scale, rtol=1e-5
    )
