"""What copies of a source refuse in other processes, the original counts."""

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

from dalle2_jax.data import FolderSource, MixtureSource, make_stream
from dalle2_jax.data.refusals import Refusals
from dalle2_jax.types import UserError


def test_copies_report_to_the_original():
    original = Refusals()
    assert original.add(3, "torn") and not original.add(4, "torn") and 3 in original and 5 not in original
    one, other = (pickle.loads(pickle.dumps(original)) for _ in range(2))
    assert 3 in one and not one.add(7, "torn")
    assert one.add(8, "lost") and not other.add(9, "lost"), "a cause is new once, whoever meets it"
    other.add(8, "lost")
    pickle.loads(pickle.dumps(other)).add(10, "empty")
    assert Counter(original.causes().values()) == {"torn": 3, "lost": 2, "empty": 1}
    assert not original.add(11, "empty") and Counter(original.causes().values()) == {"torn": 3, "lost": 2, "empty": 2}
    assert 8 not in original, "what others could not read may be read here"


def test_the_file_of_reports_goes_with_the_original():
    original = Refusals()
    copy = pickle.loads(pickle.dumps(original))
    path = original._path
    assert os.path.exists(path)
    del original
    gc.collect()
    assert not os.path.exists(path)
    copy.add(1, "late")
    assert Counter(copy.causes().values()) == {"late": 1}


def test_copies_made_at_once_report_to_one_file():
    original = Refusals()
    with ThreadPoolExecutor(8) as pool:
        copies = [pickle.loads(content) for content in pool.map(pickle.dumps, [original] * 64)]
    for place, copy in enumerate(copies):
        copy.add(place, "torn")
    assert len(original) == 64 and {len(copy) for copy in copies} == {64}
    original.add(3, "torn")
    original.add(99, "torn")
    assert len(original) == 65 == len(original.causes())


def test_half_a_report_waits_for_the_rest():
    original = Refusals()
    pickle.dumps(original)
    for text, count in ((json.dumps([1, "torn"]) + "\n[2", 1), (', "torn"]\n', 2)):
        with open(original._path, "a") as file:
            file.write(text)
        assert Counter(original.causes().values()) == {"torn": count}


def _refuse(refusals, start):
    for place in range(start, start + 400):
        refusals.add(place, f"cause {place % 3}")


def test_reports_of_several_processes_stay_whole():
    original = Refusals()
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=_refuse, args=(original, start)) for start in (0, 200)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert Counter(original.causes().values()) == {"cause 0": 200, "cause 1": 200, "cause 2": 200}


@pytest.fixture
def folder(tmp_path):
    """Twelve pictures, of which two are torn and one empty; metadata names one more and has a broken line."""
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


CAUSES = {"missing": 1, "broken metadata": 1, "not a picture": 2, "empty": 1}


@pytest.mark.parametrize("workers", [0, 2])
def test_what_workers_refuse_is_counted(folder, workers):
    source = FolderSource(folder, resolution=8, max_rejected=0.5)
    mixture = MixtureSource({"mine": (source, 1.0)})
    for one, prefix in ((source, ""), (mixture, "mine: ")):
        stream = make_stream(one, None, 8, 6, seed=0, num_workers=workers)
        for _ in range(4):
            next(stream)
        stream.close()
        assert one.rejected == {prefix + cause: count for cause, count in CAUSES.items()}
        places = {"2": "not a picture", "5": "not a picture", "7": "empty"}
        assert one.refusals() == {prefix + place: prefix + cause for place, cause in places.items()}


def test_too_many_end_the_run_from_a_worker_too(folder):
    source = FolderSource(folder, resolution=8, max_rejected=0.02)
    stream = make_stream(source, None, 8, 6, seed=0, num_workers=1)
    with pytest.raises(UserError, match="are bad .found so far: .* more than max_rejected=0.02") as told:
        for _ in range(40):
            next(stream)
    assert "\n" not in str(told.value)
    stream.close()
