"""The layout of img2dataset and clip-retrieval: rows are found by key, and what has no counterpart is counted."""

import json
import pickle

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from dalle2_jax.data import EmbeddingsConfig, RetrievalSource, make_source, make_stream
from dalle2_jax.testing import WordTokenizer
from dalle2_jax.types import UserError

CONTRACT = {"clip": "12345678", "dim": 4, "normalisation": "unit", "scale": 3.0}


def emb(key, shift=0):
    """Stands for what CLIP says of the picture ``key``, or of its text: no two are alike, none of unit length."""
    return np.array([1.0 + shift, key + 1.0, -2.0, 0.5 * key], np.float16)


def scaled(row):
    row = row.astype(np.float32)
    return 3.0 * row / np.linalg.norm(row)


def write(folder, parts, kinds=("img_emb", "text_emb"), column="key"):
    """Writes parts of (key, caption) pairs as clip-retrieval does."""
    for kind in (*kinds, "metadata"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number, part in enumerate(parts):
        keys, captions = [f"{key:09d}" for key, _ in part], [caption for _, caption in part]
        named = [f"/data/{key}.jpg" for key in keys] if column == "image_path" else keys
        table = pyarrow.table({column: named, "caption": pyarrow.array(captions, pyarrow.string())})
        pyarrow.parquet.write_table(table, folder / "metadata" / f"metadata_{number}.parquet")
        for kind in kinds:
            rows = np.stack([emb(key, shift=10 * (kind == "text_emb")) for key, _ in part])
            np.save(folder / kind / f"{kind}_{number}.npy", rows)
    (folder / "clip").mkdir(exist_ok=True)
    (folder / "clip" / "contract.json").write_text(json.dumps(CONTRACT))
    return folder


PARTS = [[(3, "three"), (1, "ein ü")], [(0, None), (2, "two"), (3, "three again")]]
PARTS += [[(10 + number, "x")] for number in range(10)]


def assert_pair(source, index, key, caption):
    example = source[index]
    assert int(example["key"]) == key and example["caption"] == caption and example["captions"] == (caption,)
    np.testing.assert_allclose(example["image_emb"], scaled(emb(key)), rtol=1e-5)
    np.testing.assert_allclose(example["text_emb"], scaled(emb(key, 10)), rtol=1e-5)


def test_rows_lie_beside_their_metadata(tmp_path):
    source = make_source(EmbeddingsConfig(str(write(tmp_path, PARTS))), "train")
    assert isinstance(source, RetrievalSource) and len(source) == 13
    for index, (key, caption) in enumerate([(3, "three"), (1, "ein ü"), (2, "two"), (10, "x")]):
        assert_pair(source, index, key, caption)
    assert_pair(pickle.loads(pickle.dumps(source)), -1, 19, "x")  # parts are in the order of their numbers
    assert dict(source.rejected) == {"no caption": 1, "repeated key": 1}
    assert [*source.captions(2)] == ["three", "ein ü"]


def test_texts_of_another_run_are_found_by_key(tmp_path):
    images = write(tmp_path / "images", [[(5, "-"), (1, "-")], [(4, "-"), (4, "-"), (2, "-")]], ("img_emb",))
    texts = write(tmp_path / "texts", [[(4, "four")], [(2, "two"), (9, "nine"), (5, "five"), (1, None)]], ("text_emb",))
    source = make_source(EmbeddingsConfig(str(images), str(texts)), "train")
    assert len(source) == 3
    for index, (key, caption) in enumerate([(5, "five"), (4, "four"), (2, "two")]):
        assert_pair(source, index, key, caption)
    assert dict(source.rejected) == {
        "no caption": 1,
        "repeated key": 1,
        "no text of its key": 1,
        "no picture of its key": 1,
    }
    write(tmp_path / "others", [[(77, "x")]], ("text_emb",))
    with pytest.raises(UserError, match="no picture of .* has a text of the same key"):
        RetrievalSource(images, text_path=tmp_path / "others")


def test_a_split_may_have_a_folder_of_its_own(tmp_path):
    write(tmp_path / "val", [[(7, "seven")]])
    write(tmp_path, PARTS)
    assert_pair(RetrievalSource(tmp_path, "val"), 0, 7, "seven")
    with pytest.raises(UserError, match="no embeddings of split 'test'"):
        RetrievalSource(tmp_path, "test")


def test_batches_have_tokens(tmp_path):
    source = RetrievalSource(write(tmp_path, [[(1, "red"), (2, "green")]], column="image_path"))
    assert source[1]["key"] == "/data/000000002.jpg"
    batch = next(make_stream(source, WordTokenizer(), 5, 2, seed=0))
    assert batch.keys() == {"image_emb", "text_emb", "tokens", "mask"} and batch["tokens"].shape == (2, 5)
    order = np.argsort(batch["image_emb"][:, 1] / batch["image_emb"][:, 0])
    np.testing.assert_array_equal(batch["tokens"][order], WordTokenizer().encode(["red", "green"], 5)[0])


def test_raw_embeddings_keep_their_length(tmp_path):
    write(tmp_path, PARTS)
    (tmp_path / "clip" / "contract.json").write_text(json.dumps({**CONTRACT, "normalisation": "raw"}))
    np.testing.assert_allclose(RetrievalSource(tmp_path)[0]["image_emb"], 3.0 * emb(3), rtol=1e-5)


def test_rows_that_are_not_finite_are_passed_over_and_counted(tmp_path, caplog):
    write(tmp_path, PARTS)
    for kind, number, value in (("img_emb", 0, np.nan), ("text_emb", 4, np.inf)):
        path = tmp_path / kind / f"{kind}_{number}.npy"
        rows = np.load(path)
        rows[0, 2] = value
        np.save(path, rows)
    source = RetrievalSource(tmp_path)
    stream = make_stream(source, WordTokenizer(), 5, 4, seed=0)
    for _ in range(4):
        assert all(np.isfinite(rows).all() for rows in next(stream).values())
    assert_pair(source, 0, 1, "ein ü")
    assert source.rejected == {"no caption": 1, "repeated key": 1, "not finite": 2}
    assert sorted(source.refusals()) == ["0", "5"] and caplog.text.count("not finite") == 1
    for number in range(len(PARTS)):
        path = tmp_path / "img_emb" / f"img_emb_{number}.npy"
        np.save(path, np.full_like(np.load(path), np.nan))
    with pytest.raises(UserError, match="in a row are not finite"):
        RetrievalSource(tmp_path)[0]


def _break(folder, kind):
    """Spoils something; returns what the error must say."""
    if kind == "rows":
        np.save(folder / "img_emb" / "img_emb_1.npy", np.zeros((2, 4), np.float16))
        return "img_emb_1.npy has 2 rows, and its metadata 3"
    if kind == "missing":
        (folder / "text_emb" / "text_emb_3.npy").unlink()
        return "no text_emb_3.npy beside metadata_3.parquet"
    if kind == "cut":
        path = folder / "text_emb" / "text_emb_0.npy"
        path.write_bytes(path.read_bytes()[:-3])
        return "text_emb_0.npy is damaged"
    if kind == "parquet":
        path = folder / "metadata" / "metadata_1.parquet"
        path.write_bytes(path.read_bytes()[:-30])
        return "metadata_1.parquet cannot be read"
    if kind == "column":
        pyarrow.parquet.write_table(pyarrow.table({"url": ["a"]}), folder / "metadata" / "metadata_2.parquet")
        return "metadata_2.parquet has no column key or image_path"
    if kind == "dim":
        (folder / "clip" / "contract.json").write_text(json.dumps({**CONTRACT, "dim": 5}))
        return "has embeddings of 4 numbers, and its contract says 5"
    (folder / "clip" / "contract.json").unlink()
    return "does not say whose embeddings these are"


@pytest.mark.parametrize("kind", ["rows", "missing", "cut", "parquet", "column", "dim", "contract"])
def test_what_does_not_fit_is_said_in_one_line(tmp_path, kind):
    message = _break(write(tmp_path, PARTS), kind)
    with pytest.raises(UserError, match=message) as caught:
        RetrievalSource(tmp_path)
    assert "\n" not in str(caught.value)


def test_text_states_are_not_to_be_had(tmp_path):
    with pytest.raises(UserError, match="has no text_seq: use python -m dalle2_jax.data embed"):
        RetrievalSource(write(tmp_path, PARTS)).telling(("image_emb", "text_seq"), 8)
