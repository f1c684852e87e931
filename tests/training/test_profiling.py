"""Traces of chosen steps."""

import dataclasses

import pytest
from line_stage import STEPS, make_job
from raised import mentions

from dalle2_jax.errors import SystemWarning, UsageError
from dalle2_jax.training.loop import train
from dalle2_jax.training.reporting.profiling import Profile


def test_chosen_steps_are_traced(tmp_path, monkeypatch):
    """Steps are counted from the first of the process, also where a run continues."""
    train(make_job(tmp_path, total_steps=3))
    job = dataclasses.replace(make_job(tmp_path), profile=Profile(2, 3))
    assert int(train(job).step) == STEPS
    (trace,) = job.folder.path.glob("profile/**/*.xplane.pb")
    content = trace.read_bytes()
    assert b"step_num" in content or b"train" in content


def test_a_trace_ends_with_the_run(tmp_path):
    job = dataclasses.replace(make_job(tmp_path, total_steps=2), profile=Profile(2, 50))
    train(job)
    assert [*job.folder.path.glob("profile/**/*.xplane.pb")]


def test_steps_that_never_come_are_reported(tmp_path):
    job = dataclasses.replace(make_job(tmp_path, total_steps=2), profile=Profile(10, 12))
    with pytest.warns(SystemWarning, match="2 steps, before step 10"):
        train(job)
    assert not (job.folder.path / "profile").exists()


@pytest.mark.parametrize("words", ["", "3", "3,2", "0,2", "a,b", "1,2,3", "-1,2"])
def test_what_is_no_profile(words):
    with pytest.raises(UsageError, check=mentions("FIRST,LAST")):
        Profile.parse(words)


def test_two_numbers_are_a_profile():
    assert Profile.parse("10,12") == Profile(10, 12)
