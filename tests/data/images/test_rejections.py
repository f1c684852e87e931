"""Rejections in worker processes are counted by the original source."""

import gc
import json
import multiprocessing
import os
import pickle
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
from raised import mentions
from streams import text_stream

from dalle2_jax.data import FolderSource, MixtureSource
from dalle2_jax.data.images.rejections import RejectionLog
from dalle2_jax.errors import UserError


def test_copies_report_to_the_original():
    original = RejectionLog()
    assert original.add(3, "torn") and not original.add(4, "torn") and 3 in original and 5 not in original
    one, other = (pickle.loads(pickle.dumps(original)) for _ in range(2))
    assert 3 in one and not one.add(7, "torn")
    assert one.add(8, "lost") and not other.add(9, "lost"), "a cause is new once across all copies"
    other.add(8, "lost")
    pickle.loads(pickle.dumps(other)).add(10, "empty")
    assert Counter(original.causes().values()) == {"torn": 3, "lost": 2, "empty": 1}
    assert not original.add(11, "empty") and Counter(original.causes().values()) == {"torn": 3, "lost": 2, "empty": 2}
    assert 8 not in original, "a record rejected by a copy is still read by the original"


def test_the_report_file_is_removed_with_the_original():
    original = RejectionLog()
    copy = pickle.loads(pickle.dumps(original))
    path = original._path
    assert os.path.exists(path)
    del original
    gc.collect()
    assert not os.path.exists(path)
    copy.add(1, "late")
    assert Counter(copy.causes().values()) == {"late": 1}


def test_copies_made_concurrently_report_to_one_file():
    original = RejectionLog()
    with ThreadPoolExecutor(8) as pool:
        copies = [pickle.loads(content) for content in pool.map(pickle.dumps, [original] * 64)]
    for place, copy in enumerate(copies):
        copy.add(place, "torn")
    assert len(original) == 64 and {len(copy) for copy in copies} == {64}
    original.add(3, "torn")
    original.add(99, "torn")
    assert len(original) == 65 == len(original.causes())


def test_a_partially_written_report_is_read_when_complete():
    original = RejectionLog()
    pickle.dumps(original)
    for text, count in ((json.dumps([1, "torn"]) + "\n[2", 1), (', "torn"]\n', 2)):
        with open(original._path, "a") as file:
            file.write(text)
        assert Counter(original.causes().values()) == {"torn": count}


def _reject(log, start):
    for place in range(start, start + 400):
        log.add(place, f"cause {place % 3}")


def test_reports_of_concurrent_processes_are_not_interleaved():
    original = RejectionLog()
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_reject, args=(original, start)) for start in (0, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert Counter(original.causes().values()) == {"cause 0": 200, "cause 1": 200, "cause 2": 200}


@pytest.fixture
def folder(tmp_path):
    """Returns a folder of twelve images, two truncated and one empty; metadata names a 13th and has a broken line."""
    lines = []
    for number in range(12):
        cv2.imwrite(str(tmp_path / f"{number}.png"), np.full((8, 8, 3), number, np.uint8))
    for number in range(13):
        lines.append(json.dumps({"file_name": f"{number}.png", "text": str(number)}))
    for number in (2, 5):
        (tmp_path / f"{number}.png").write_bytes((tmp_path / f"{number}.png").read_bytes()[:40])
    (tmp_path / "7.png").write_bytes(b"")
    (tmp_path / "metadata.jsonl").write_text("\n".join([*lines, "{"]))
    return tmp_path


CAUSES = {"missing": 1, "broken metadata": 1, "not an image": 2, "empty": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_rejections_in_workers_are_counted(folder, workers):
    source = FolderSource(folder, resolution=8, max_rejected=0.5)
    mixture = MixtureSource({"mine": (source, 1.0)})
    for one, prefix in ((source, ""), (mixture, "mine: ")):
        stream = text_stream(one, None, 8, 6, seed=0, num_workers=workers)
        for _ in range(4):
            next(stream)
        stream.close()
        assert one.rejections.counts == {prefix + cause: count for cause, count in CAUSES.items()}
        places = {"2": "not an image", "5": "not an image", "7": "empty"}
        assert one.rejections.records == {prefix + place: prefix + cause for place, cause in places.items()}


def test_too_many_rejections_in_a_worker_end_the_run(folder):
    source = FolderSource(folder, resolution=8, max_rejected=0.02)
    stream = text_stream(source, None, 8, 6, seed=0, num_workers=1)
    with pytest.raises(UserError, check=mentions("14 records", "1 broken metadata", "1 missing", "max_rejected=0.02")):
        for _ in range(40):
            next(stream)
    stream.close()
