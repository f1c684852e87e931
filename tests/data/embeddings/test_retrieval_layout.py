"""The layout of img2dataset and clip-retrieval: rows are matched by key, and unmatched rows are counted."""

import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from raised import mentions
from retrieval_folders import CONTRACT, embedding, write
from streams import text_stream

from dalle2_jax.data import EmbeddingsConfig, MissingColumnsError, RetrievalSource, example, make_source
from dalle2_jax.errors import DataError
from dalle2_jax.testing import WordTokenizer


def scaled(row):
    row = row.astype(np.float32)
    return 3.0 * row / np.linalg.norm(row)


PARTS = [[(3, "three"), (1, "ein ü")], [(0, None), (2, "two"), (3, "three again")]]
PARTS += [[(10 + number, "x")] for number in range(10)]


def assert_pair(source, index, key, caption):
    found = example(source, index)
    assert int(found["key"]) == key and found["caption"] == caption and found["captions"] == (caption,)
    np.testing.assert_allclose(found["image_emb"], scaled(embedding(key)), rtol=1e-5)
    np.testing.assert_allclose(found["text_emb"], scaled(embedding(key, 10)), rtol=1e-5)


def test_rows_are_matched_with_their_metadata(tmp_path):
    source = make_source(EmbeddingsConfig(str(write(tmp_path, PARTS))), "train")
    assert isinstance(source, RetrievalSource) and len(source) == 13
    for index, (key, caption) in enumerate([(3, "three"), (1, "ein ü"), (2, "two"), (10, "x")]):
        assert_pair(source, index, key, caption)
    assert_pair(pickle.loads(pickle.dumps(source)), -1, 19, "x")  # parts are sorted by number
    assert dict(source.rejections.counts) == {"no caption": 1, "repeated key": 1}
    assert [*source.captions(2)] == ["three", "ein ü"]


def test_text_embeddings_of_another_run_are_matched_by_key(tmp_path):
    images = write(tmp_path / "images", [[(5, "-"), (1, "-")], [(4, "-"), (4, "-"), (2, "-")]], ("img_emb",))
    texts = write(tmp_path / "texts", [[(4, "four")], [(2, "two"), (9, "nine"), (5, "five"), (1, None)]], ("text_emb",))
    source = make_source(EmbeddingsConfig(str(images), str(texts)), "train")
    assert len(source) == 3
    for index, (key, caption) in enumerate([(5, "five"), (4, "four"), (2, "two")]):
        assert_pair(source, index, key, caption)
    assert dict(source.rejections.counts) == {
        "no caption": 1,
        "repeated key": 1,
        "no text with its key": 1,
        "no image with its key": 1,
    }
    write(tmp_path / "others", [[(77, "x")]], ("text_emb",))
    with pytest.raises(DataError, check=mentions("no image", "same key", path=images)):
        RetrievalSource(images, text_path=tmp_path / "others")


def test_a_split_may_have_its_own_folder(tmp_path):
    write(tmp_path / "val", [[(7, "seven")]])
    write(tmp_path, PARTS)
    assert_pair(RetrievalSource(tmp_path, "val"), 0, 7, "seven")
    with pytest.raises(DataError, check=mentions("'test'", tmp_path / "test/metadata", path=tmp_path)):
        RetrievalSource(tmp_path, "test")


def test_batches_have_tokens(tmp_path):
    source = RetrievalSource(write(tmp_path, [[(1, "red"), (2, "green")]], column="image_path"))
    assert example(source, 1)["key"] == "/data/000000002.jpg"
    batch = next(text_stream(source, WordTokenizer(), 5, 2, seed=0))
    assert batch.keys() == {"image_emb", "text_emb", "tokens", "mask"} and batch["tokens"].shape == (2, 5)
    order = np.argsort(batch["image_emb"][:, 1] / batch["image_emb"][:, 0])
    np.testing.assert_array_equal(batch["tokens"][order], WordTokenizer().encode(["red", "green"], 5)[0])


def test_raw_embeddings_are_not_normalised(tmp_path):
    write(tmp_path, PARTS)
    (tmp_path / "clip" / "contract.json").write_text(json.dumps({**CONTRACT, "normalisation": "raw"}))
    np.testing.assert_allclose(example(RetrievalSource(tmp_path), 0)["image_emb"], 3.0 * embedding(3), rtol=1e-5)


def test_rows_that_are_not_finite_are_skipped_and_counted(tmp_path, caplog):
    write(tmp_path, PARTS)
    for kind, number, value in (("img_emb", 0, np.nan), ("text_emb", 4, np.inf)):
        path = tmp_path / kind / f"{kind}_{number}.npy"
        rows = np.load(path)
        rows[0, 2] = value
        np.save(path, rows)
    source = RetrievalSource(tmp_path)
    stream = text_stream(source, WordTokenizer(), 5, 4, seed=0)
    for _ in range(4):
        assert all(np.isfinite(rows).all() for rows in next(stream).values())
    stream.close()  # its thread would read the files that are replaced below
    assert_pair(source, 0, 1, "ein ü")
    assert source.rejections.counts == {"no caption": 1, "repeated key": 1, "not finite": 2}
    assert sorted(source.rejections.records) == ["0", "5"] and caplog.text.count("not finite") == 1
    for number in range(len(PARTS)):
        path = tmp_path / "img_emb" / f"img_emb_{number}.npy"
        np.save(path, np.full_like(np.load(path), np.nan))
    with pytest.raises(DataError, check=mentions("100 embeddings", "not finite", path=tmp_path)):
        RetrievalSource(tmp_path).fetch([0])


def _break(folder, kind):
    """Damages one part of the folder; returns the file or folder at fault, and facts about the fault."""
    if kind == "rows":
        np.save(folder / "img_emb" / "img_emb_1.npy", np.zeros((2, 4), np.float16))
        return folder / "img_emb" / "img_emb_1.npy", (2, 3)
    if kind == "missing":
        (folder / "text_emb" / "text_emb_3.npy").unlink()
        return folder / "text_emb", ("text_emb_3.npy", "metadata_3.parquet")
    if kind == "cut":
        path = folder / "text_emb" / "text_emb_0.npy"
        path.write_bytes(path.read_bytes()[:-3])
        return path, ("damaged",)
    if kind == "parquet":
        path = folder / "metadata" / "metadata_1.parquet"
        path.write_bytes(path.read_bytes()[:-30])
        return path, ("parquet file",)
    if kind == "column":
        path = folder / "metadata" / "metadata_2.parquet"
        pyarrow.parquet.write_table(pyarrow.table({"url": ["a"]}), path)
        return path, ("key", "image_path")
    if kind == "dim":
        (folder / "clip" / "contract.json").write_text(json.dumps({**CONTRACT, "dim": 5}))
        return folder, ("width", 4, 5)
    (folder / "clip" / "contract.json").unlink()
    return folder, ("clip/contract.json",)


@pytest.mark.parametrize("kind", ["rows", "missing", "cut", "parquet", "column", "dim", "contract"])
def test_inconsistent_files_raise_one_line_errors(tmp_path, kind):
    path, facts = _break(write(tmp_path, PARTS), kind)
    with pytest.raises(DataError, check=mentions(*facts, path=path)):
        RetrievalSource(tmp_path)


def test_text_states_are_missing_from_this_layout(tmp_path):
    with pytest.raises(MissingColumnsError) as caught:
        RetrievalSource(write(tmp_path, PARTS)).select(("image_emb", "text_seq"))
    assert caught.value.missing == ("text_seq",)
