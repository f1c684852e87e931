"""A report: complete, escaped, self-contained, and written from damaged, unfinished and foreign folders too."""

import html.parser
import json
import re
import sys

import numpy as np
import pytest
from raised import mentions
from run_folders import HOSTILE, metrics, write_results, write_samples, write_stage, write_system

import dalle2_jax
from dalle2_jax import cli
from dalle2_jax.errors import UserError
from dalle2_jax.files import write_png
from dalle2_jax.report import embed, read, write, write_report


class Elements(html.parser.HTMLParser):
    """Collects the elements of a page, and checks that every one is closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.open, self.found, self.texts = [], [], []
        self.feed(page)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self.open += [] if tag in self.VOID else [tag]

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def named(self, tag):
        return [attributes for name, attributes in self.found if name == tag]


def report(tmp_path, *runs, **options):
    """Writes a report; returns its elements and what it shows."""
    systems = write_report(runs, tmp_path / "report.html", **options)
    return Elements((tmp_path / "report.html").read_text()), systems


def test_a_report_shows_everything_of_a_system(tmp_path):
    elements, [system] = report(tmp_path, write_system(tmp_path / "demo"))
    assert [stage.name for stage in system.stages] == ["clip", "decoder"] and system.name == "demo"
    decoder = system.stages[1]
    assert decoder.state == "unfinished: 500 of 1,000 steps" and system.stages[0].state == "finished"
    assert decoder.images == 4000 and decoder.metrics.seconds == pytest.approx(50) and decoder.parameters == 1234
    assert decoder.provenance["jax"] == "0.10" and decoder.provenance["commit"] == "abc"
    assert [image.caption for image in decoder.samples] == [f"step {n:,}" for n in (100, 300, 500, 600, 800, 1000)]
    text = " ".join(elements.texts)
    for shown in ("94.9 % [91.5, 97.0]", "optim.lr", "50 s", "4,000", "Held-out loss", "Learning rate", "demo"):
        assert shown.lower() in text.lower(), shown
    assert len(elements.named("img")) == 6 and len(elements.named("polyline")) > 10


def test_a_report_is_self_contained_and_escaped(tmp_path):
    elements, _ = report(tmp_path, write_system(tmp_path / "demo"), title=HOSTILE)
    assert elements.texts.count(HOSTILE) >= 4  # as text: two titles, the measure, the config page
    assert not elements.named("script") and not elements.named("link") and not elements.named("iframe")
    assert all(image["src"].startswith("data:image/webp;base64,") for image in elements.named("img"))
    assert all(link["href"].startswith("#") for link in elements.named("a"))
    assert not any(key.startswith("on") for _, attributes in elements.found for key in attributes)
    [policy] = [meta["content"] for meta in elements.named("meta") if "http-equiv" in meta]
    assert policy.startswith("default-src 'none'")
    assert "url(" not in (tmp_path / "report.html").read_text()


def test_several_systems_are_compared(tmp_path):
    first, second = tmp_path / "a" / "demo", tmp_path / "b" / "demo"
    for root, lr in ((first, 1e-3), (second, 3e-4)):
        write_stage(root, "clip", lr=lr)
        write_results(root / "retrieval", {"image_to_text": 0.5, "n": {"image_to_text": 64}, "interval": {}})
    elements, systems = report(tmp_path, first, second)
    assert [system.name for system in systems] == ["a/demo", "b/demo"]
    text = "\n".join(elements.texts)
    assert (
        "clip: optim.lr" in text
        and "0.0003" in text
        and "optim.clip_norm" not in text.split("Config differences")[1].split("a/demo")[1][:200]
    )
    assert {link["href"] for link in elements.named("a")} == {"#comparison", "#system-0", "#system-1"}
    assert "clip: loss" in text and "retrieval: image_to_text" in text


def test_a_sweep_is_its_runs_and_shared_stages_are_links(tmp_path):
    base = tmp_path / "base"
    write_stage(base, "clip")
    for number in (0, 1):
        root = tmp_path / "sweep" / f"{number:02d}_lr={number}"
        write_stage(root, "decoder", lr=number)
        (root / "clip").symlink_to(base / "clip")
    (tmp_path / "sweep" / "sweep.json").write_text("[]")
    elements, systems = report(tmp_path, tmp_path / "sweep")
    assert [system.name for system in systems] == ["00_lr=0", "01_lr=1"]
    assert [stage.linked for stage in systems[0].stages] == [(base / "clip").resolve(), None]
    assert sum("A link to" in text for text in elements.texts) == 2
    assert not any(text == "clip: loss" for text in elements.texts)


# --- damaged, unfinished, foreign ---------------------------------------------------------------


def test_damaged_lines_are_skipped_and_counted(tmp_path):
    good = [json.dumps(metrics(step)) for step in (10, 20, 30)]
    bad = ['{"step": 15, "lo', "[]", '{"loss": 1}', "\x00\x01", '{"step": "x"}', '{"step": true}', "[" * 5000]
    values = '{"step": 25, "loss": NaN, "a": 1e999, "b": "text", "c": [1], "d": true, "e": null, "loss2": 3}'
    write_stage(tmp_path / "demo", "clip", lines=[good[0], *bad, good[1], values, good[2]])
    elements, [system] = report(tmp_path, tmp_path / "demo")
    metrics_read = system.stages[0].metrics
    assert metrics_read.curves["loss"].steps == (10, 20, 30) and metrics_read.curves["loss2"].values == (3,)
    assert not {"a", "b", "c", "d", "e"} & {*metrics_read.curves} and metrics_read.last_step == 30
    assert any(f"{len(bad)} lines" in text for text in elements.texts)


@pytest.mark.parametrize("content", [None, "", "\n\n", "nothing here\n"])
def test_a_stage_without_metrics_is_shown(tmp_path, content):
    folder = write_stage(tmp_path / "demo", "clip", lines=[])
    if content is None:
        (folder / "metrics.jsonl").unlink()
    else:
        (folder / "metrics.jsonl").write_text(content)
    elements, [system] = report(tmp_path, tmp_path / "demo")
    assert system.stages[0].state == "no logged step" and "no logged step" in elements.texts
    assert any("metrics.jsonl" in note for note in system.stages[0].metrics.notes)


def test_damaged_files_become_notes(tmp_path):
    root = write_system(tmp_path / "demo")
    (root / "decoder" / "experiment.json").write_text("{")
    (root / "clip" / "run.json").write_text("[]")
    (root / "decoder" / "samples" / "00000100.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    (root / "attributes" / "results.json").write_text('{"a": "no number"}')
    elements, [system] = report(tmp_path, root)
    notes = [*system.notes, *(note for stage in system.stages for note in stage.notes)]
    for part in ("experiment.json is not valid JSON", "run.json holds no JSON", "00000100.png", "has no figures"):
        assert any(part in note for note in notes), part
    assert all(any(note in text for text in elements.texts) for note in notes)
    assert system.stages[1].state == "500 steps" and len(system.stages[1].samples) == 5


def test_no_link_is_followed_to_a_file(tmp_path):
    """A system of someone else could name any file of this machine."""
    root, secret = write_system(tmp_path / "demo"), tmp_path / "secret"
    secret.write_text('{"step": 1, "secret": 1}\n')
    write_png(tmp_path / "secret.png", np.zeros((8, 8, 3), np.uint8))
    (root / "clip" / "metrics.jsonl").unlink()
    (root / "clip" / "metrics.jsonl").symlink_to(secret)
    (root / "decoder" / "samples" / "00000100.png").unlink()
    (root / "decoder" / "samples" / "00000100.png").symlink_to(tmp_path / "secret.png")
    (root / "attributes" / "results.json").unlink()
    (root / "attributes" / "results.json").symlink_to(secret)
    _, [system] = report(tmp_path, root)
    assert not system.stages[0].metrics.curves and len(system.stages[1].samples) == 5 and not system.evaluations


@pytest.mark.parametrize(
    ("make", "fact"),
    [
        (lambda root: None, "runs/demo"),
        (lambda root: root.mkdir(), "experiment.json"),
        (lambda root: write_stage(root.parent, root.name), "a stage"),
        (lambda root: root.write_text("a file"), "runs/demo"),
    ],
)
def test_what_is_no_system_is_one_error(tmp_path, make, fact, capsys):
    make(tmp_path / "demo")
    with pytest.raises(UserError, check=mentions(tmp_path / "demo", fact)):
        write_report([tmp_path / "demo"], tmp_path / "report.html")
    assert cli.main(["report", str(tmp_path / "demo"), "--out", str(tmp_path / "report.html")]) == 1
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "report.html").exists()


def test_results_elsewhere_are_added_and_must_exist(tmp_path):
    write_stage(tmp_path / "demo", "clip")
    write_results(tmp_path / "elsewhere", {"shuffled": {"all": 0.1}, "matched": {"all": 0.9}, "n": {"all": 64}})
    _, [system] = report(tmp_path, tmp_path / "demo", results=[tmp_path / "elsewhere"])
    [evaluation] = system.evaluations
    [figure] = evaluation.figures
    assert (figure.name, figure.value, figure.n, figure.baseline.value) == ("all", 0.9, 64, 0.1)
    with pytest.raises(UserError, check=mentions(tmp_path / "nowhere", "results.json")):
        report(tmp_path, tmp_path / "demo", results=[tmp_path / "nowhere"])
    with pytest.raises(UserError, check=mentions(tmp_path, "a folder", tmp_path / "report.html")):
        write_report([tmp_path / "demo"], tmp_path)


# --- bounds -------------------------------------------------------------------------------------


def test_a_large_file_is_read_in_pieces_and_the_page_stays_small(tmp_path, monkeypatch):
    monkeypatch.setattr("dalle2_jax.report.curves._WHOLE", 200_000)
    monkeypatch.setattr("dalle2_jax.report.curves._PIECES", 20)
    monkeypatch.setattr("dalle2_jax.report.curves._PIECE", 5_000)
    lines = [json.dumps(metrics(step)) for step in range(1, 10_001)]
    write_stage(tmp_path / "demo", "clip", lines=lines, total_steps=10_000)
    _, [system] = report(tmp_path, tmp_path / "demo")
    found = system.stages[0].metrics
    assert (
        found.last_step == 10_000 and found.curves["loss"].steps[0] < 50 and not any("lines" in n for n in found.notes)
    )
    assert any("100,000" in note for note in found.notes)
    assert found.seconds == pytest.approx(1000, rel=0.01)  # of the steps between the pieces too
    assert (tmp_path / "report.html").stat().st_size < 200_000


def test_curves_keep_their_mean_in_few_points(tmp_path):
    lines = [json.dumps({"step": step, "loss": step % 7}) for step in range(1, 5001)]
    write_stage(tmp_path / "demo", "clip", lines=lines)
    _, [system] = report(tmp_path, tmp_path / "demo")
    curve = system.stages[0].metrics.curves["loss"]
    assert 200 <= len(curve.steps) <= 400 and [*curve.steps] == sorted(curve.steps)
    assert np.mean(curve.values) == pytest.approx(3, abs=0.1) and curve.steps[-1] > 4950


def test_metrics_systems_and_images_are_limited(tmp_path, monkeypatch):
    many = json.dumps({"step": 1, **{f"m{number}": 1.0 for number in range(150)}})
    folder = write_stage(tmp_path / "demo", "clip", lines=[many])
    write_samples(folder, (1, 2, 3))
    monkeypatch.setattr(write, "IMAGE_BYTES", 2_000)
    elements, [system] = report(tmp_path, tmp_path / "demo")
    assert len(system.stages[0].metrics.curves) == 100 and any("more than 100" in text for text in elements.texts)
    assert len(system.stages[0].samples) < 3 and any("omitted" in text for text in elements.texts)
    monkeypatch.setattr(read, "MAX_SYSTEMS", 0)
    with pytest.raises(UserError, check=mentions("1 systems", 0)):
        report(tmp_path, tmp_path / "demo")


def test_an_image_of_too_many_pixels_is_not_decoded(tmp_path, monkeypatch):
    monkeypatch.setattr(embed, "MAX_PIXELS", 100)
    folder = write_stage(tmp_path / "demo", "decoder")
    write_samples(folder, (1,))
    _, [system] = report(tmp_path, tmp_path / "demo")
    assert not system.stages[0].samples and any("pixels" in note for note in system.stages[0].notes)


# --- the command --------------------------------------------------------------------------------


def test_the_command_writes_the_report_and_prints_its_size(tmp_path, capsys):
    write_system(tmp_path / "demo")
    out = tmp_path / "new" / "report.html"
    assert cli.main(["report", str(tmp_path / "demo"), "--out", str(out), "--title", "Mine"]) == 0
    assert re.search(r"report\.html: 1 system\(s\), 2 stages, \d\.\d MB", capsys.readouterr().out)
    assert "<title>Mine</title>" in out.read_text() and dalle2_jax.write_report is write_report


def test_the_report_needs_no_jax():
    modules = [name for name in sys.modules if name.startswith("dalle2_jax.report")]
    assert modules and all("jax" not in vars(sys.modules[name]) for name in modules)
