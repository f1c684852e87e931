"""Retrieval, zero-shot classification and the linear probe, of embeddings that are known."""

from types import SimpleNamespace

import numpy as np
import pytest
from raised import mentions

from dalle2_jax import data
from dalle2_jax.data.synthetic import grammar
from dalle2_jax.data.synthetic.digits import write
from dalle2_jax.errors import ConfigError, DataError, UserError
from dalle2_jax.evaluation import examples
from dalle2_jax.evaluation.context import Examples, unit
from dalle2_jax.evaluation.measures import clip
from dalle2_jax.evaluation.options import Options

SOURCE = data.ShapesSource("train", 16, max_objects=1, num_examples=400)


def recall(image_emb, text_emb):
    found = Examples(range(len(image_emb)), [], unit(image_emb), unit(text_emb))
    return clip.retrieval(SimpleNamespace(embedded=lambda num: found), len(image_emb))


def test_recall_of_perfect_and_of_swapped_embeddings():
    embeddings = np.random.default_rng(0).standard_normal((5, 8)).astype(np.float32)
    figures = recall(embeddings, embeddings)
    assert figures["image_to_text_at_1"].value == figures["text_to_image_at_1"].value == 1
    assert figures["image_to_text_at_1"].baseline.value == 0.2 and "image_to_text_at_5" not in figures  # 5 of 5
    swapped = recall(embeddings, embeddings[[1, 0, 2, 3, 4]])
    assert swapped["image_to_text_at_1"].value == pytest.approx(3 / 5) and swapped["image_to_text_at_1"].n == 5


def test_recall_has_two_directions():
    """Every image finds its caption, but the second caption finds the first image."""
    figures = recall(np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]), np.array([[1.0, 0.1], [1.0, 0.2], [-1.0, 0.1]]))
    assert figures["image_to_text_at_1"].value == 1 and figures["text_to_image_at_1"].value == pytest.approx(2 / 3)


def test_recall_at_k_counts_the_nearest_k():
    ranks = clip.own_rank(np.array([[3.0, 4.0, 1.0], [9.0, 8.0, 8.0], [1.0, 2.0, 3.0]]))
    assert ranks.tolist() == [1, 2, 0]  # of equal values the own one is the last


def test_recall_of_random_embeddings_is_chance():
    random = np.random.default_rng(2)
    rates = [recall(*random.standard_normal((2, 10, 16)))["image_to_text_at_1"].value for _ in range(300)]
    assert np.mean(rates) == pytest.approx(0.1, abs=4 * np.std(rates) / 300**0.5)


def test_constant_embeddings_find_nothing():
    assert recall(np.ones((6, 3)), np.ones((6, 3)))["image_to_text_at_1"].value == 0


def test_a_few_examples_are_spread_over_a_sorted_data_set(monkeypatch):
    """They are the first of more examples, so that a larger measurement generates only what is missing."""
    source = data.as_source({"image": np.zeros((200, 8, 8, 3), np.uint8), "caption": ["a"] * 200})
    order = examples.order(source)
    assert sorted(order) == list(range(200)) and order == examples.order(source)
    assert min(order[:20]) < 40 and max(order[:20]) >= 160
    monkeypatch.setattr(examples, "MAX_ORDERED", 50)
    assert sorted(examples.order(source)) == list(range(0, 200, 4))
    assert examples.order(SOURCE) == range(len(SOURCE))


def test_distinct_shapes_differ_in_more_than_the_background():
    """Captions may omit the background, so two scenes that differ in it alone could share a caption."""
    indices = examples.distinct(SOURCE, 64)
    assert len(indices) == 56 and indices == sorted(indices)
    scenes = [SOURCE.scene(index) for index in range(indices[-1] + 1)]
    looks = [tuple((each.shape, each.colour, each.size) for each in scene.objects) for scene in scenes]
    assert len({looks[index] for index in indices}) == 56 == len({*looks})  # none was passed over without need


def test_distinct_shapes_have_no_caption_in_common():
    """Of two objects too, which a caption may name in either order."""
    source = data.ShapesSource("train", 16, max_objects=2, num_examples=800)
    indices = examples.distinct(source, 800)
    assert len(indices) > 400
    seen = {}
    for index in indices:
        for caption in grammar.captions(source.scene(index)):
            assert seen.setdefault(caption, index) == index, caption


def test_fewer_where_there_are_no_more(tmp_path):
    write(tmp_path / "digits")
    source = data.make_source(data.FolderConfig(str(tmp_path / "digits"), 8), "val")
    captions = examples.captions(source, range(len(source)))
    indices = examples.distinct(source, 10_000)
    assert len(indices) == len({*captions}) == len({captions[index] for index in indices}) < len(source)


# --- classification -----------------------------------------------------------------------------


class Known:
    """A system that embeds an image or a caption by the colour and shape that it shows or names."""

    def __init__(self, source):
        self.names = sorted({*examples.fields(source, range(len(source)), "object")})

    def embed_text(self, texts):
        return np.array([[float(name in text) for name in self.names] for text in texts], np.float32)


@pytest.fixture
def known(monkeypatch):
    system = Known(SOURCE)

    def embed(system, source, indices):
        noise = np.random.default_rng(0).normal(0, 0.05, (len(indices), len(system.names)))
        return unit((system.embed_text(examples.fields(source, indices, "object")) + noise).astype(np.float32))

    monkeypatch.setattr(examples, "embed_images", embed)
    train = data.ShapesSource("train", 16, max_objects=1, num_examples=2000)
    return SimpleNamespace(
        system=system, clip_source=SOURCE, options=Options(), split="val", divided=True, open=lambda stage, split: train
    )


def test_a_clip_that_knows_every_class(known):
    zero_shot, probe = clip.zero_shot(known, 50), clip.linear_probe(known, 50)
    assert zero_shot["top_1"].value == zero_shot["top_5"].value == 1 and zero_shot["top_1"].n == 50
    assert zero_shot["top_1"].baseline.value == 1 / len(known.system.names)
    assert probe["accuracy"].value > 0.9 > 0.3 > probe["accuracy"].baseline.value


def test_a_clip_that_knows_no_class(known, monkeypatch):
    random = np.random.default_rng(1)
    monkeypatch.setattr(examples, "embed_images", lambda *given: random.normal(size=(len(given[2]), 32)))
    known.system.embed_text = lambda texts: random.normal(size=(len(texts), 32)).astype(np.float32)
    assert clip.zero_shot(known, 200)["top_1"].value < 0.1 and clip.linear_probe(known, 50)["accuracy"].value < 0.2


def test_templates_are_the_captions_of_classes(known):
    asked, embed = [], known.system.embed_text
    known.system.embed_text = lambda texts: asked.extend(texts) or embed(texts)
    known.options = Options(templates=("x {} y",))
    clip.zero_shot(known, 50)
    assert {f"x {name} y" for name in known.system.names} <= {*asked}


def test_classes_have_to_be_named_and_several(known):
    known.clip_source = data.as_source({"image": np.zeros((6, 16, 16, 3), np.uint8), "caption": ["a"] * 6})
    with pytest.raises(ConfigError) as error:
        clip.zero_shot(known, 4)
    assert error.value.field == "label"
    known.options = Options(label="style")
    with pytest.raises(DataError, check=mentions("'style'")):
        clip.zero_shot(known, 4)
    known.clip_source, known.options = data.ShapesSource("val", 16, max_objects=1), Options(label="background")
    with pytest.raises(DataError, check=mentions("1 classes")):
        clip.zero_shot(known, 1)


# --- binding ------------------------------------------------------------------------------------

TWO = data.ShapesSource("val", 16, num_examples=300)


def binding(monkeypatch, embed_text, num=100):
    """Measures a CLIP that embeds the image of a scene as it embeds the scene's own caption."""
    monkeypatch.setattr(
        examples, "embed_images", lambda system, source, indices: unit(embed_text([source.caption(i) for i in indices]))
    )
    return clip.binding(SimpleNamespace(system=SimpleNamespace(embed_text=embed_text), clip_source=TWO), num)


def words_in_order(texts):
    """Embeddings of which every word and its place matter."""
    generators = [np.random.default_rng(list(text.encode())) for text in texts]
    return np.stack([generator.normal(size=64) for generator in generators])


def words_alone(texts):
    """Embeddings of the words without their order, or which of two opposites a relation is."""
    opposite = {"right": "left", "below": "above", "under": "over"}
    bags = [" ".join(sorted(opposite.get(word.strip(","), word.strip(",")) for word in text.split())) for text in texts]
    return words_in_order(bags)


def test_binding_of_a_clip_that_reads_and_of_a_bag_of_words(monkeypatch):
    read, bag = binding(monkeypatch, words_in_order), binding(monkeypatch, words_alone)
    assert read.keys() == bag.keys() == {"colour", "shape", "size", "place", "all"}
    assert all(figure.value == 1 for figure in read.values()) and read["all"].n == read["place"].n == 100
    assert read["size"].n < 100 and read["size"].baseline.value == 0.5
    # articles ("an orange star") and synonyms of sizes tell some captions apart
    assert bag["all"].value < 0.2 and bag["shape"].value < 0.2


def test_binding_needs_enough_scenes(monkeypatch):
    with pytest.raises(UserError, check=mentions(300)):
        binding(monkeypatch, words_alone, num=300)
