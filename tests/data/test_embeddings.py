"""Embeddings on disk: what `write_split` writes, however often it is killed, `EmbeddingSource` reads, row for row."""

import dataclasses
import errno
import json
import os
import pickle
import shutil

import cv2
import numpy as np
import pytest

from dalle2_jax.data import EmbeddingsConfig, EmbeddingSource, FolderSource, fixed_batch, make_source, make_stream
from dalle2_jax.data.embed import Task, claim, write_split
from dalle2_jax.testing import WordTokenizer
from dalle2_jax.types import UserError

DIM, LENGTH = 6, 8
CONTRACT = {"clip": "12345678", "dim": DIM, "normalisation": "unit", "scale": 1.5}


class SumEmbedder:
    """Embeds by sums, and counts its calls."""

    batch_size = 4

    def __init__(self, patience=10**9):
        self.calls, self.patience = 0, patience

    def images(self, pictures):
        self.calls += 1
        if self.calls > self.patience:
            raise KeyboardInterrupt
        assert pictures.dtype == np.uint8 and len(pictures) <= self.batch_size
        return pictures.reshape(len(pictures), -1).astype(np.float32)[:, :DIM]

    def captions(self, tokens, mask):
        assert len(tokens) <= self.batch_size
        states = np.repeat(tokens[:, :, None], 3, axis=2).astype(np.float32) / 7
        return {"text_emb": tokens[:, :DIM].astype(np.float32), "text_seq": states}

    def empty(self, tokens, mask):
        said = self.captions(tokens, mask)
        return {"null_text_emb": said["text_emb"][0], "null_text_seq": said["text_seq"][0], "null_mask": mask[0]}


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures of one to three captions, of which the sixth and the last are damaged."""
    folder, noise = tmp_path / "pictures", np.random.default_rng(0)
    folder.mkdir()
    with (folder / "metadata.jsonl").open("w") as metadata:
        for number in range(12):
            cv2.imwrite(str(folder / f"{number}.png"), noise.integers(256, size=(8, 8, 3), dtype=np.uint8))
            texts = [f"Wort ü {number} {other}" for other in range(number % 3 + 1)]
            metadata.write(json.dumps({"file_name": f"{number}.png", "text": texts}) + "\n")
    for number in (5, 11):
        (folder / f"{number}.png").write_bytes(b"no picture")
    return folder


def task_of(pictures, out, embedder=None, **fields):
    (out / "clip").mkdir(parents=True, exist_ok=True)
    (out / "clip" / "contract.json").write_text(json.dumps(CONTRACT))
    source = FolderSource(pictures, resolution=8)
    task = Task(source, "train", embedder or SumEmbedder(), WordTokenizer(), LENGTH, out, shard_size=3)
    return dataclasses.replace(task, **fields)


@pytest.fixture
def task(pictures, tmp_path):
    task = task_of(pictures, tmp_path / "embedded", states=True)
    assert write_split(task) == 10
    return task


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_picture_has_its_rows_and_all_its_captions(task):
    source, plain = EmbeddingSource(task.out), task.source
    good = [index for index in range(12) if index not in (5, 11)]
    assert len(source) == 10
    for row, index in enumerate(good):
        example, picture = source[row], plain[index]
        assert example["key"] == f"{index}.png" and example["captions"] == picture["captions"]
        assert example["caption"] == picture["caption"]
        np.testing.assert_array_equal(example["image_emb"], task.embedder.images(picture["image"][None])[0])
        tokens, mask = task.tokenizer.encode([example["caption"]], LENGTH)
        np.testing.assert_array_equal(example["tokens"], tokens[0])
        np.testing.assert_array_equal(example["mask"], mask[0])
        np.testing.assert_array_equal(example["text_emb"], task.embedder.captions(tokens, mask)["text_emb"][0])
    assert source[-1]["key"] == "10.png" and next(source.captions(1)) == "Wort ü 0 0"
    assert len([*source.captions(99)]) == sum(len(plain[index]["captions"]) for index in good)
    with pytest.raises(IndexError):
        source[10]


def test_captions_are_drawn_as_from_the_pictures(task):
    """The same generator draws the same caption, so that the two kinds of training see the same."""
    source, plain = EmbeddingSource(task.out), task.source
    for row, index in enumerate(range(5)):
        for seed in range(6):
            rows = source.rows(row, source.choose(row, np.random.default_rng(seed)))
            _, caption = plain.draw(index, np.random.default_rng(seed))
            np.testing.assert_array_equal(rows["tokens"], task.tokenizer.encode([caption], LENGTH)[0][0])
            np.testing.assert_array_equal(rows["text_emb"], rows["tokens"][:DIM])


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_a_killed_run_goes_on_and_writes_the_same(task, pictures, tmp_path, patience):
    out = tmp_path / "killed"
    with pytest.raises(KeyboardInterrupt):
        write_split(task_of(pictures, out, SumEmbedder(patience - 1), states=True))
    (out / "train" / ".00003.left").mkdir(exist_ok=True)  # as kill -9 leaves it
    with pytest.raises(UserError, match=rf"train is unfinished \({patience - 1} shards"):
        EmbeddingSource(out)
    rest = SumEmbedder()
    assert write_split(task_of(pictures, out, rest, states=True)) == 10
    assert rest.calls == 4 - (patience - 1)
    assert contents(out) == contents(task.out)
    again = SumEmbedder()
    assert write_split(task_of(pictures, out, again, states=True)) == 10 and again.calls == 0


def test_hosts_share_the_work_and_write_the_same(task, pictures, tmp_path):
    out, shares = tmp_path / "shared", [SumEmbedder() for _ in range(3)]
    hosts = [
        task_of(pictures, out, embedder, states=True, host=host, hosts=3) for host, embedder in enumerate(shares)
    ]
    claim(hosts[0])
    (out / "train" / ".00003.tmp").mkdir()  # of a host at work: nobody may clear it
    assert write_split(hosts[1]) is None and write_split(hosts[0]) is None
    with pytest.raises(UserError, match=r"train is unfinished \(3 shards are complete"):
        EmbeddingSource(out)
    assert write_split(hosts[2]) == 10 == write_split(hosts[0])
    assert [share.calls for share in shares] == [2, 1, 1]
    (out / "train" / ".00003.tmp").rmdir()
    assert contents(out) == contents(task.out)
    with pytest.raises(UserError, match="holds other embeddings"):
        claim(dataclasses.replace(hosts[0], shard_size=4))


def test_batches_have_no_pictures(task):
    names = ("image_emb", "text_emb", "text_seq", "null_text_emb", "null_text_seq", "null_mask")
    source = EmbeddingSource(task.out).telling(names, LENGTH)
    stream = make_stream(pickle.loads(pickle.dumps(source)), None, LENGTH, 5, seed=0)
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
    fixed, captions = fixed_batch(source, None, LENGTH, [2, 0])
    assert fixed.keys() == batch.keys() and captions[1] == source[0]["caption"]


def test_a_range_without_a_good_picture_is_an_empty_shard(pictures, tmp_path):
    for number in (3, 4):
        (pictures / f"{number}.png").write_bytes(b"")
    task = task_of(pictures, tmp_path / "embedded", states=True)
    assert write_split(task) == 8
    source = EmbeddingSource(task.out, fields=("image_emb", "text_emb", "text_seq"))
    assert [source[row]["key"] for row in range(8)] == [f"{number}.png" for number in (0, 1, 2, 6, 7, 8, 9, 10)]


def test_a_damaged_shard_is_named_and_made_again(task):
    shard, whole = task.folder / "00001", contents(task.out)
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
        with pytest.raises(UserError, match="00001 is damaged .*: remove it") as caught:
            EmbeddingSource(task.out)[4]
        assert "\n" not in str(caught.value)
        shutil.rmtree(shard)
        with pytest.raises(UserError, match="00001 is damaged"):
            EmbeddingSource(task.out)
        write_split(task)
        assert contents(task.out) == whole
    shutil.rmtree(shard)
    (task.source.records.path / "4.png").write_bytes(b"")  # lost meanwhile
    assert write_split(task) == len(EmbeddingSource(task.out)) == 9


def test_other_data_or_another_clip_is_refused(task, pictures):
    for fields in ({"states": False}, {"shard_size": 4}, {"source": FolderSource(pictures, resolution=16)}):
        with pytest.raises(UserError, match="holds other embeddings .*: use another --out"):
            write_split(dataclasses.replace(task, **fields))
    other = {**CONTRACT, "scale": 2.0}
    (task.out / "clip" / "contract.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"was embedded by .*1\.5.*, .*2\.0"):
        EmbeddingSource(task.out)
    (task.out / "clip" / "contract.json").unlink()
    with pytest.raises(UserError, match="does not say whose embeddings these are"):
        EmbeddingSource(task.out)


def test_what_is_not_there_is_said_in_one_line(task, pictures, tmp_path):
    with pytest.raises(UserError, match="no folder .*nowhere: write it with"):
        make_source(EmbeddingsConfig(str(tmp_path / "nowhere")), "train")
    with pytest.raises(UserError, match="no embeddings of split 'val', only train"):
        make_source(EmbeddingsConfig(str(task.out)), "val")
    with pytest.raises(UserError, match="context_length must be 8, not 9"):
        EmbeddingSource(task.out).telling(("image_emb",), 9)
    bare = task_of(pictures, tmp_path / "bare")
    write_split(bare)
    with pytest.raises(UserError, match="has no text_seq: embed into a new folder with --text_seq"):
        EmbeddingSource(bare.out).telling(("image_emb", "text_seq"), LENGTH)
    (bare.folder / "index.json").write_text("{")
    with pytest.raises(UserError, match="index.json is not valid JSON"):
        EmbeddingSource(bare.out)


def test_embeddings_that_are_not_finite_are_not_written(pictures, tmp_path):
    class Broken(SumEmbedder):
        def images(self, pictures):
            return super().images(pictures) * np.float32(np.nan)

    class Loud(SumEmbedder):
        def captions(self, tokens, mask):
            said = super().captions(tokens, mask)
            return {**said, "text_seq": said["text_seq"] * 1e6}

    for embedder, name in ((Broken(), "image_emb"), (Loud(), "text_seq")):
        task = task_of(pictures, tmp_path / name, embedder, states=True)
        with pytest.raises(UserError, match=f"{name} of .* is not finite"):
            write_split(task)
        assert not [*task.folder.glob("*0*")]


def test_a_full_disk_leaves_nothing_half_written(task, pictures, tmp_path, monkeypatch):
    def fsync(handle):
        if "tokens" in os.readlink(f"/proc/self/fd/{handle}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    other = task_of(pictures, tmp_path / "full", states=True)
    with monkeypatch.context() as full, pytest.raises(OSError, match="tokens.npy cannot be written .No space left"):
        full.setattr(os, "fsync", fsync)
        write_split(other)
    assert [path.name for path in other.folder.iterdir()] == ["split.json"]
    assert write_split(other) == 10 and contents(other.out) == contents(task.out)
