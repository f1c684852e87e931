"""Untrusted embeddings: sizes that files claim are checked before memory is allocated."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hostile_files import npy, pickled
from raised import mentions

from dalle2_jax.data import EmbeddingSource, example
from dalle2_jax.data.embeddings import clip_retrieval
from dalle2_jax.errors import DataError

pytestmark = pytest.mark.usefixtures("alone")


def test_a_small_parquet_that_expands_to_long_texts_is_rejected(tmp_path, monkeypatch):
    monkeypatch.setattr(clip_retrieval, "_BASE_TEXT", 2**21)
    monkeypatch.setattr(clip_retrieval, "_BYTES_AT_ONCE", 2**21)
    path = tmp_path / "metadata_0.parquet"
    for rows, valid in ((10, True), (2_000, False)):
        long = pyarrow.DictionaryArray.from_arrays(pyarrow.array(np.zeros(rows, np.int32)), ["x" * 2**17])
        for texts in (long, long.cast(pyarrow.string())):
            pyarrow.parquet.write_table(pyarrow.table({"key": ["k"] * rows, "caption": texts}), path)
            if valid:
                assert len(clip_retrieval._columns(path)[1]) == rows
            else:
                with pytest.raises(DataError, check=mentions("caption", "memory", path=path)):
                    clip_retrieval._columns(path)


def test_metadata_columns_that_are_not_text_are_rejected(tmp_path):
    nested = pyarrow.array([[[["x"]]]])
    pyarrow.parquet.write_table(pyarrow.table({"key": ["k"], "caption": nested}), tmp_path / "metadata_0.parquet")
    with pytest.raises(DataError, check=mentions("cannot be read", path=tmp_path / "metadata_0.parquet")):
        clip_retrieval._columns(tmp_path / "metadata_0.parquet")


def write_embeddings(root):
    shard = root / "train" / "00000"
    shard.mkdir(parents=True)
    (root / "clip").mkdir()
    contract = {"clip": "c", "dim": 4, "normalisation": "unit", "scale": 1.0}
    (root / "clip" / "contract.json").write_text(json.dumps(contract))
    rows = {
        "captions": np.array([0, 1, 3]),
        "image_emb": np.ones((2, 4), np.float32),
        "text_emb": np.ones((3, 4), np.float32),
        "tokens": np.ones((3, 5), np.int32),
        "mask": np.ones((3, 5), bool),
    }
    for name, array in rows.items():
        np.save(shard / f"{name}.npy", array)
    lines = [{"key": "a", "captions": ["x"], "fixed": 0}, {"key": "b", "captions": ["y", "z"], "fixed": 1}]
    (shard / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)))
    about = {"contract": contract, "context_length": 5, "text_seq": False}
    about |= {"source": "", "pictures": 2, "shard_size": 2}
    (root / "train" / "split.json").write_text(json.dumps(about))
    return reindexed(root)


def reindexed(root):
    """Writes an index that matches the files in the folder, as an attacker would."""
    sizes = {path.name: path.stat().st_size for path in (root / "train" / "00000").iterdir()}
    index = {"shards": [{"pictures": 2, "captions": 3, "bytes": sizes}]}
    (root / "train" / "index.json").write_text(json.dumps(index))
    return root


def read_all(root):
    source = EmbeddingSource(root)
    found = [example(source, index) for index in range(len(source))]
    source.gather(np.arange(len(source)), np.zeros(len(source), np.int64))
    return found


def test_embeddings_are_read(tmp_path):
    first, second = read_all(write_embeddings(tmp_path))
    assert (first["caption"], second["caption"]) == ("x", "z")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions", pickled()),
        ("captions", np.array([0, 10**12, 3])),
        ("captions", np.array([1, 2, 3])),
        ("captions", np.array([0.0, 1.0, 3.0])),
        ("captions", np.array([[0], [1], [3]])),
        ("image_emb", npy((10**12, 4), "<f4")),
        ("image_emb", np.ones((2, 3), np.float32)),
        ("image_emb", np.array([["a"], ["b"]])),
        ("text_emb", np.ones(3, np.float32)),
        ("tokens", np.ones((3, 5), np.float64)),
        ("tokens", np.ones((3, 2), np.int32)),
        ("captions.jsonl", b"[" * 100_000),
        ("captions.jsonl", b'{"key": "a"}\n{"key": "b", "captions": [], "fixed": 7}'),
        ("captions.jsonl", b"1"),
    ],
)
def test_damaged_embeddings_are_one_error(name, content, tmp_path):
    root = write_embeddings(tmp_path)
    path = root / "train" / "00000" / (name if "." in name else f"{name}.npy")
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    reindexed(root)
    with pytest.raises(DataError, check=mentions("damaged", path=root / "train" / "00000")):
        read_all(root)


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("index.json", {"shards": []}),
        ("index.json", {"shards": [{"pictures": 10**15, "bytes": {"captions.npy": 152}}]}),
        ("index.json", {"shards": [{"pictures": 2, "bytes": {"../../secret": 1}}]}),
        ("index.json", {"shards": [3]}),
        ("index.json", []),
        ("index.json", 3),
        ("split.json", []),
        ("split.json", {"context_length": "5", "contract": {}, "text_seq": False}),
    ],
)
def test_a_damaged_index_of_embeddings_is_one_error(file, change, tmp_path):
    root = write_embeddings(tmp_path)
    (root / "train" / file).write_text(json.dumps(change))
    with pytest.raises(DataError, check=mentions("damaged", path=root / "train" / file)):
        read_all(root)
