"""Stored embeddings: `EmbeddingSource` reads the rows that `write_split` wrote, also after interruptions."""

import dataclasses
import errno
import json
import os
import pickle
import shutil

import cv2
import numpy as np
import pytest
from embedding_tasks import CONTRACT, DIM, LENGTH, SumEmbedder, task_of
from raised import mentions
from streams import sample

from dalle2_jax.data import (
    EmbeddingsConfig,
    EmbeddingSource,
    FolderSource,
    MissingColumnsError,
    example,
    fixed_batch,
    make_source,
    make_stream,
    prepare,
)
from dalle2_jax.data.embeddings.write import claim, write_split
from dalle2_jax.errors import ConfigError, DataError, UserError
from dalle2_jax.testing import WordTokenizer


@pytest.fixture
def image_folder(tmp_path):
    """Returns a folder of twelve images with one to three captions each; the sixth and the last are damaged."""
    folder, noise = tmp_path / "images", np.random.default_rng(0)
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as metadata:
        for number in range(12):
            cv2.imwrite(str(folder / f"{number}.png"), noise.integers(256, size=(8, 8, 3), dtype=np.uint8))
            texts = [f"Wort ü {number} {other}" for other in range(number % 3 + 1)]
            metadata.write(json.dumps({"file_name": f"{number}.png", "text": texts}) + "\n")
    for number in (5, 11):
        (folder / f"{number}.png").write_bytes(b"no image")
    return folder


@pytest.fixture
def task(image_folder, tmp_path):
    task = task_of(image_folder, tmp_path / "embedded", states=True)
    assert write_split(task) == 10
    return task


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_image_has_its_embeddings_and_all_its_captions(task):
    source, plain = EmbeddingSource(task.out), task.source
    valid = [index for index in range(12) if index not in (5, 11)]
    assert len(source) == 10
    for row, index in enumerate(valid):
        found, image = example(source, row), example(plain, index)
        assert found["key"] == f"{index}.png" and found["captions"] == image["captions"]
        assert found["caption"] == image["caption"]
        np.testing.assert_array_equal(found["image_emb"], task.embedder.images(image["image"][None])[0])
        tokens, mask = task.tokenizer.encode([found["caption"]], LENGTH)
        np.testing.assert_array_equal(found["tokens"], tokens[0])
        np.testing.assert_array_equal(found["mask"], mask[0])
        np.testing.assert_array_equal(found["text_emb"], task.embedder.captions(tokens, mask)["text_emb"][0])
    assert example(source, -1)["key"] == "10.png" and next(source.captions(1)) == "Wort ü 0 0"
    assert len([*source.captions(99)]) == sum(len(example(plain, index)["captions"]) for index in valid)
    with pytest.raises(IndexError):
        source.fetch([10])


def test_captions_are_sampled_as_from_an_image_folder(task):
    """The same generator samples the same caption, so training on embeddings and on images is comparable."""
    source, plain = EmbeddingSource(task.out), task.source
    for row, index in enumerate(range(5)):
        for seed in range(6):
            rows, caption = sample(source, row, seed), sample(plain, index, seed)["caption"]
            assert rows["caption"] == caption
            np.testing.assert_array_equal(rows["tokens"], task.tokenizer.encode([caption], LENGTH)[0][0])
            np.testing.assert_array_equal(rows["text_emb"], rows["tokens"][:DIM])


@pytest.mark.parametrize("max_calls", [1, 2, 4])
def test_a_killed_run_resumes_and_writes_the_same_files(task, image_folder, tmp_path, max_calls):
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        write_split(task_of(image_folder, out, SumEmbedder(max_calls - 1), states=True))
    (out / "train" / ".00003.left").mkdir(exist_ok=True)  # as left behind by kill -9
    with pytest.raises(DataError, check=mentions(f"{max_calls - 1} shards", path=out / "train")):
        EmbeddingSource(out)
    rest = SumEmbedder()
    assert write_split(task_of(image_folder, out, rest, states=True)) == 10
    assert rest.calls == 4 - (max_calls - 1)
    assert contents(out) == contents(task.out)
    again = SumEmbedder()
    assert write_split(task_of(image_folder, out, again, states=True)) == 10 and again.calls == 0


def test_hosts_share_the_work_and_write_the_same_files(task, image_folder, tmp_path):
    out, shares = tmp_path / "shared", [SumEmbedder() for _ in range(3)]
    hosts = [
        task_of(image_folder, out, embedder, states=True, host=host, hosts=3) for host, embedder in enumerate(shares)
    ]
    claim(hosts[0])
    (out / "train" / ".00003.tmp").mkdir()  # belongs to a running host and must not be removed
    assert write_split(hosts[1]) is None and write_split(hosts[0]) is None
    with pytest.raises(DataError, check=mentions("3 shards", path=out / "train")):
        EmbeddingSource(out)
    assert write_split(hosts[2]) == 10 == write_split(hosts[0])
    assert [share.calls for share in shares] == [2, 1, 1]
    (out / "train" / ".00003.tmp").rmdir()
    assert contents(out) == contents(task.out)
    with pytest.raises(UserError, check=mentions(out / "train", "shard_size", 3, 4, "--out")):
        claim(dataclasses.replace(hosts[0], shard_size=4))


def test_batches_have_no_images(task):
    names = ("image_emb", "text_emb", "text_seq", "null_text_emb", "null_text_seq", "null_mask")
    source = EmbeddingSource(task.out).select((*names, "tokens", "mask"))
    stream = make_stream(pickle.loads(pickle.dumps(source)), 5, seed=0)
    batch = next(stream)
    assert {name: (rows.shape, rows.dtype.name) for name, rows in batch.items()} == {
        "image_emb": ((5, DIM), "float32"),
        "text_emb": ((5, DIM), "float32"),
        "text_seq": ((5, LENGTH, 3), "float32"),
        "tokens": ((5, LENGTH), "int32"),
        "mask": ((5, LENGTH), "bool"),
        "null_text_emb": ((5, DIM), "float32"),
        "null_text_seq": ((5, LENGTH, 3), "float32"),
        "null_mask": ((5, LENGTH), "bool"),
    }
    np.testing.assert_allclose(batch["text_seq"][..., 0], batch["tokens"] / 7, rtol=1e-3)
    assert batch["null_mask"].sum() == 10 and (batch["null_text_emb"][:, :3] == [1, 2, 0]).all()
    stream.set_state({"global_next_index": 0})
    np.testing.assert_array_equal(next(stream)["image_emb"], batch["image_emb"])
    everything = EmbeddingSource(task.out)
    fixed, captions = fixed_batch(everything, [2, 0], source.columns)
    assert fixed.keys() == batch.keys() and captions[1] == example(everything, 0)["caption"]


def test_a_range_without_valid_images_is_an_empty_shard(image_folder, tmp_path):
    for number in (3, 4):
        (image_folder / f"{number}.png").write_bytes(b"")
    task = task_of(image_folder, tmp_path / "embedded", states=True)
    assert write_split(task) == 8
    source = EmbeddingSource(task.out)
    assert [example(source, row)["key"] for row in range(8)] == [
        f"{number}.png" for number in (0, 1, 2, 6, 7, 8, 9, 10)
    ]


def test_a_damaged_shard_is_named_and_rewritten(task):
    shard, complete = task.folder / "00001", contents(task.out)
    cut = (shard / "text_emb.npy").read_bytes()
    for name, content in (
        ("text_emb.npy", cut[:-4]),
        ("tokens.npy", None),
        ("image_emb.npy", b"\0" * (shard / "image_emb.npy").stat().st_size),
        ("captions.npy", b"\0" * (shard / "captions.npy").stat().st_size),
    ):
        (shard / name).unlink()
        if content is not None:
            (shard / name).write_bytes(content)
        with pytest.raises(DataError, check=mentions(path=shard)):
            EmbeddingSource(task.out).fetch([4])
        shutil.rmtree(shard)
        with pytest.raises(DataError, check=mentions(path=shard)):
            EmbeddingSource(task.out)
        write_split(task)
        assert contents(task.out) == complete
    shutil.rmtree(shard)
    (task.source.records.path / "4.png").write_bytes(b"")  # the image was lost in the meantime
    assert write_split(task) == len(EmbeddingSource(task.out)) == 9


def test_other_data_or_another_clip_is_rejected(task, image_folder):
    for fields, name in (
        ({"states": False}, "text_seq"),
        ({"shard_size": 4}, "shard_size"),
        ({"source": FolderSource(image_folder, resolution=16)}, "source"),
    ):
        with pytest.raises(UserError, check=mentions(task.folder, name, "--out")):
            write_split(dataclasses.replace(task, **fields))
    other = {**CONTRACT, "scale": 2.0}
    (task.out / "clip" / "contract.json").write_text(json.dumps(other))
    with pytest.raises(DataError, check=mentions(1.5, 2.0, path=task.folder)):
        EmbeddingSource(task.out)
    (task.out / "clip" / "contract.json").unlink()
    with pytest.raises(DataError, check=mentions(path=task.out)):
        EmbeddingSource(task.out)


def test_missing_splits_and_columns_raise_user_errors(task, image_folder, tmp_path):
    with pytest.raises(DataError, check=mentions(path=tmp_path / "nowhere")):
        make_source(EmbeddingsConfig(str(tmp_path / "nowhere")), "train")
    with pytest.raises(DataError, check=mentions("'val'", "train", "dalle2 data embed", path=task.out)):
        make_source(EmbeddingsConfig(str(task.out)), "val")
    with pytest.raises(ConfigError, check=mentions(8, 9, task.out, field="text.context_length")):
        prepare(EmbeddingSource(task.out), WordTokenizer(), 9).select(("image_emb", "tokens", "mask"))
    bare = task_of(image_folder, tmp_path / "bare")
    write_split(bare)
    with pytest.raises(MissingColumnsError, check=mentions("--text_seq", missing=("text_seq",))):
        EmbeddingSource(bare.out).select(("image_emb", "text_seq"))
    (bare.folder / "index.json").write_text("{")
    with pytest.raises(DataError, check=mentions(path=bare.folder / "index.json")):
        EmbeddingSource(bare.out)


def test_embeddings_that_are_not_finite_are_not_written(image_folder, tmp_path):
    class Broken(SumEmbedder):
        def images(self, images):
            return super().images(images) * np.float32(np.nan)

    class Loud(SumEmbedder):
        def captions(self, tokens, mask):
            columns = super().captions(tokens, mask)
            return {**columns, "text_seq": columns["text_seq"] * 1e6}

    for embedder, name in ((Broken(), "image_emb"), (Loud(), "text_seq")):
        task = task_of(image_folder, tmp_path / name, embedder, states=True)
        with pytest.raises(UserError, check=mentions(name, "not finite")):
            write_split(task)
        assert not [*task.folder.glob("*0*")]


NO_SPACE = os.strerror(errno.ENOSPC)


def test_a_full_disk_leaves_no_partial_shard(task, image_folder, tmp_path, monkeypatch):
    def fsync(handle):
        if "tokens" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, NO_SPACE)

    other = task_of(image_folder, tmp_path / "full", states=True)
    with monkeypatch.context() as full, pytest.raises(OSError, check=mentions("tokens.npy", NO_SPACE)):
        full.setattr(os, "fsync", fsync)
        write_split(other)
    assert [path.name for path in other.folder.iterdir()] == ["split.json"]
    assert write_split(other) == 10 and contents(other.out) == contents(task.out)


def cut(path):
    """Truncates a file to half its size."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


@pytest.mark.parametrize("name", ["train/index.json", "empty.npz"])
def test_truncated_files_that_can_be_rebuilt_are_rebuilt(task, name):
    index = (task.folder / "index.json").read_text()
    for damage in (cut, lambda path: path.write_text("[1]"), lambda path: path.write_bytes(b"")):
        damage(task.out / name)
        assert write_split(task) == 10 and (task.folder / "index.json").read_text() == index
        with np.load(task.out / "empty.npz") as empty:
            assert set(empty) == {"null_text_emb", "null_text_seq", "null_mask"}


@pytest.mark.parametrize("name", ["split.json", "00000/image_emb.npy", "00000/captions.npy", "00000/captions.jsonl"])
@pytest.mark.parametrize("indexed", [True, False])
def test_resuming_over_a_truncated_file_is_rejected(task, name, indexed):
    write_split(task)
    if not indexed:
        (task.folder / "index.json").unlink()
    for damage in (cut, lambda path: path.write_bytes(b"")):
        damage(task.folder / name)
        with pytest.raises(DataError, check=mentions("remove", path=task.folder / name.partition("/")[0])):
            write_split(task)
