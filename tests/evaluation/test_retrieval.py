"""Recall@1 against what can be counted by hand."""

import numpy as np
import pytest

from dalle2_jax.data import FolderConfig, ShapesSource, example, make_source
from dalle2_jax.data.synthetic import grammar
from dalle2_jax.data.synthetic.digits import write
from dalle2_jax.evaluation.retrieval import distinct_examples, recall_at_1, table


def test_recall_of_perfect_and_of_swapped_embeddings():
    embeddings = np.random.default_rng(0).standard_normal((5, 8))
    assert recall_at_1(embeddings, embeddings) == {"image_to_text": 1.0, "text_to_image": 1.0, "chance": 0.2}
    swapped = recall_at_1(embeddings, embeddings[[1, 0, 2, 3, 4]])
    assert swapped["image_to_text"] == swapped["text_to_image"] == pytest.approx(3 / 5)


def test_recall_has_two_directions():
    """Every image finds its caption, but the second caption finds the first image."""
    image_emb = np.array([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    text_emb = np.array([[1.0, 0.1], [1.0, 0.2], [-1.0, 0.1]])
    rates = recall_at_1(image_emb, text_emb)
    assert rates["image_to_text"] == pytest.approx(3 / 3)  # the second image is still closest to the second caption
    assert rates["text_to_image"] == pytest.approx(2 / 3)  # the second caption is closest to the first image


def test_recall_does_not_see_lengths():
    """Cosine similarity: rows of any positive length."""
    random = np.random.default_rng(1)
    image_emb, text_emb = random.standard_normal((2, 20, 4))
    lengths = random.uniform(0.1, 10, (20, 1))
    assert recall_at_1(image_emb * lengths, text_emb) == recall_at_1(image_emb, text_emb)


def test_recall_of_random_embeddings_is_chance():
    random = np.random.default_rng(2)
    rates = [recall_at_1(*random.standard_normal((2, 10, 16)))["image_to_text"] for _ in range(300)]
    assert np.mean(rates) == pytest.approx(0.1, abs=4 * np.std(rates) / 300**0.5)


def test_distinct_shapes_differ_in_more_than_the_background():
    """Captions may leave the background out, so two scenes that differ in it alone could share a caption."""
    source = ShapesSource("val", 16, max_objects=1, num_examples=500)
    indices = distinct_examples(source, 64)
    assert len(indices) == 64 and indices == sorted(indices)
    looks = [tuple((o.shape, o.colour, o.size) for o in source.scene(index).objects) for index in indices]
    assert len(set(looks)) == 64
    first = [tuple((o.shape, o.colour, o.size) for o in source.scene(index).objects) for index in range(indices[-1])]
    assert len(set(first)) == 63  # none of those before the last was passed over without need


def test_distinct_shapes_have_no_caption_in_common():
    """Of two objects too, which a caption may name in either order."""
    source = ShapesSource("val", 16, max_objects=2, num_examples=800)
    indices = distinct_examples(source, 800)
    assert len(indices) > 400
    seen = {}
    for index in indices:
        for caption in grammar.captions(source.scene(index)):
            assert seen.setdefault(caption, index) == index, caption


def test_fewer_where_there_are_no_more(tmp_path):
    """Of the digits, as many as there are captions."""
    write(tmp_path / "digits")
    source = make_source(FolderConfig(str(tmp_path / "digits"), 8), "val")
    indices = distinct_examples(source, 10_000)
    captions = [example(source, index)["caption"] for index in range(len(source))]
    assert len(indices) == len(set(captions)) == len({captions[index] for index in indices}) < len(source)


def test_table():
    """A column a mapping, a dash where a rate is missing; without a count a rate has no interval."""
    columns = {"matched": {"colour": 0.5, "all": 0.25}, "shuffled": {"colour": 0.125}}
    lines = table("12 images", columns, {"colour": 8}).splitlines()
    assert [line.split() for line in lines] == [
        ["12", "images", "n", "matched", "shuffled"],
        ["colour", "8", "50.0%", "[21.5,", "78.5]", "12.5%", "[2.2,", "47.1]"],
        ["all", "-", "25.0%", "-"],
    ]
    assert len({len(line) for line in lines}) == 1
