"""Systems by name: loaded on first use, the least recently used evicted; jobs are forgotten in time."""

from types import SimpleNamespace

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.server.api import jobs
from dalle2_jax.server.engine import sampling
from dalle2_jax.server.engine.systems import Systems, UnknownSystem


class Loaders:
    """Loaders of systems of a thousand bytes each, which record what is loaded."""

    def __init__(self, *names):
        self.loads = []
        self.by_name = {name: lambda name=name: self.load(name) for name in names}

    def load(self, name):
        self.loads.append(name)
        variables = {"w": np.zeros(250, np.float32)}
        return SimpleNamespace(name=name, stages={"decoder": SimpleNamespace(variables=variables)})


def test_a_system_is_loaded_once_when_it_is_first_used():
    loaders = Loaders("a", "b")
    systems = Systems(loaders.by_name)
    assert systems.names == ("a", "b") and systems.loaded == () and systems.nbytes == 0
    assert systems.get("a") is systems.get("a") and loaders.loads == ["a"]
    assert systems.nbytes == 1000


def test_the_least_recently_used_is_evicted_by_memory():
    loaders = Loaders("a", "b", "c")
    systems = Systems(loaders.by_name, memory=2500)
    for name in ("a", "b", "a", "c"):
        systems.get(name)
    assert systems.loaded == ("a", "c") and systems.nbytes == 2000
    systems.get("b")
    assert loaders.loads == ["a", "b", "c", "b"] and systems.loaded == ("c", "b")


def test_the_system_in_use_stays_even_if_it_is_too_large():
    systems = Systems(Loaders("a", "b").by_name, memory=1)
    systems.get("a")
    systems.get("b")
    assert systems.loaded == ("b",)


def test_an_unknown_system_names_those_there_are():
    with pytest.raises(UnknownSystem, check=mentions("a", "b", name="c")):
        Systems(Loaders("a", "b").by_name).check("c")


def test_programs_do_not_accumulate(tiny, monkeypatch):
    """Settings that no one had before compile programs; after too many, all are dropped."""
    cleared = []
    monkeypatch.setattr(sampling, "MAX_PROGRAMS", 3)
    monkeypatch.setattr(sampling.jax, "clear_caches", lambda: cleared.append(True))
    monkeypatch.setattr(sampling.RowSampler, "run", lambda self, rows, size, callback: rows)
    monkeypatch.setattr(sampling, "_after", lambda item, state, row: item)
    runner = sampling.CascadeRunner(Systems({"tiny": lambda: tiny}))
    task = sampling.Task("tiny", "text2image", {"prompt": "a"}, {"num": 1})
    [[item]] = runner.run([task.item()], 1, None)
    for size in (1, 2, 3, 1, 2, 3):
        runner.run([item], size, None)
    assert not cleared
    runner.run([item], 4, None)
    assert cleared


def test_finished_jobs_are_forgotten_by_age_and_size(monkeypatch):
    store = jobs.Jobs(seconds=100)
    old, new = store.add("me", 1), store.add("me", 1)
    old.result = new.result = {"data": [{"b64_json": "x" * 1000}]}
    monkeypatch.setattr(jobs, "MAX_BYTES", 1500)
    running = store.add("me", 1)
    assert store.get("me", new.id) is new and store.get("me", running.id) is running
    with pytest.raises(jobs.ApiError):
        store.get("me", old.id)
    new.created -= 101
    store.add("me", 1)
    with pytest.raises(jobs.ApiError):
        store.get("me", new.id)
    assert store.get("me", running.id) is running
