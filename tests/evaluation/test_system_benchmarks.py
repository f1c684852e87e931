"""Benchmarks of systems: editors whose results are known get the figures that they should, and pages their tables."""

import argparse
import importlib
import json
import pathlib
import runpy
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from raised import mentions

from dalle2_jax.config.sweep import read_runs
from dalle2_jax.data import ShapesSource
from dalle2_jax.data.synthetic.scene_reader import read_scene
from dalle2_jax.data.synthetic.scenes import Scene
from dalle2_jax.data.synthetic.shapes import COLOURS, render
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.system.editing.similarity import MAX_PSNR

BENCHMARKS = pathlib.Path(__file__).parents[2] / "benchmarks"
SIDE, COUNT = 64, 6

OPTIONS = argparse.Namespace(steps=250, edit_steps=50, theta=(0.25, 0.5), seed=0)


@pytest.fixture(scope="module")
def benchmark():
    """Imports a program of benchmarks/ by its name."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        yield importlib.import_module
    finally:
        sys.path.remove(str(BENCHMARKS))


@pytest.fixture(scope="module")
def data(benchmark):
    """Rendered scenes of one object, of different colours and shapes."""
    source = ShapesSource("val", SIDE, max_objects=1, jitter=0.04)
    scenes = [source.scene(index) for index in range(COUNT)]
    captions = [source.caption(index) for index in range(COUNT)]
    return benchmark("measured").HeldOut(scenes, captions, np.stack([render(scene, SIDE) for scene in scenes]))


def images(pixels):
    """What a method of a system returns, as far as benchmarks read it."""
    return SimpleNamespace(numpy=np.asarray(pixels, np.uint8))


class Perfect:
    """An editor without errors: it renders what it is asked for."""

    def reconstruct(self, given, **_):
        return images(np.stack([np.asarray(image) for image in given]))

    def variations(self, given, num=1, **_):
        return images(np.stack([np.asarray(image) for image in given for _ in range(num)]))

    def interpolate(self, pair, frames, **_):
        first, last = (np.asarray(image, np.float64) for image in pair)
        return images(np.rint([first + share * (last - first) for share in np.linspace(0, 1, frames)]))

    def text_diff(self, image, before, after, frames, **_):
        given, [colour] = np.asarray(image), [name for name in COLOURS if name in after.split()]
        background = render(Scene((), read_scene(given).background), SIDE)
        foreground = (given != background).any(axis=2, keepdims=True)
        return images([given, np.where(foreground, np.asarray(COLOURS[colour], np.uint8), given)])

    def inpaint(self, image, mask, caption, **_):
        return images(image[None])


class Careless(Perfect):
    """An editor that ignores what it is given: every image is black."""

    def reconstruct(self, given, **_):
        return images(np.zeros((len(given), SIDE, SIDE, 3)))

    def variations(self, given, num=1, **_):
        return images(np.zeros((len(given) * num, SIDE, SIDE, 3)))

    def text_diff(self, image, before, after, frames, **_):
        return images(np.zeros((frames, SIDE, SIDE, 3)))

    def inpaint(self, image, mask, caption, **_):
        return images(np.zeros((1, SIDE, SIDE, 3)))


def values(figures):
    """Returns figures as numbers, in order."""
    return [figure.value for figure in figures.values()]


def test_perfect_editor(benchmark, data):
    editing, measured = benchmark("editing"), benchmark("measured")
    distance = ("pixels", measured.root_mean_square)
    assert values(editing.reconstruction(Perfect(), data, OPTIONS)) == [MAX_PSNR, 0.0]
    varied = [*editing.variations(Perfect(), data, OPTIONS, *distance).values()]
    for shape, everything, apart in (varied[:3], varied[3:]):
        assert shape.value == everything.value == 1.0 and everything.baseline.value < 1.0
        assert apart.value == 0.0 < apart.baseline.value
    ends, *paths = values(editing.interpolation(Perfect(), data, OPTIONS, *distance))
    assert ends == MAX_PSNR
    for evenness, smooth, worst in (paths[:3], paths[3:]):
        assert smooth == 1.0 and 1.0 <= evenness <= worst < 1.05


def test_text_diff_of_both_rotations(benchmark, data):
    """The first frame is the image itself, and the second has the other colour and nothing else changed."""
    figures = benchmark("editing").text_diff(Perfect(), data, OPTIONS)
    before, after = (
        {name: figure for name, figure in figures.items() if name.startswith(f"theta {theta}:")}
        for theta in OPTIONS.theta
    )
    assert values(before)[0] == 0.0 and values(before)[-2:] == [0.0, 1.0]
    assert values(after)[0] == 1.0 and values(after)[-2:] == [1.0, 0.0]
    assert all(figure.n == COUNT for figure in figures.values())
    assert values(figures)[-4:] == [0.0, 0.0, 1.0, 1.0]  # as in the paper: colour changed, and all of these


def test_careless_editor(benchmark, data):
    editing, measured = benchmark("editing"), benchmark("measured")
    assert values(editing.reconstruction(Careless(), data, OPTIONS))[0] < 20
    found = editing.variations(Careless(), data, OPTIONS, "pixels", measured.root_mean_square)
    assert values(found)[:2] == [0.0, 0.0]
    assert set(values(editing.text_diff(Careless(), data, OPTIONS))) <= {0.0}


def test_inpainting(benchmark, data):
    inpainting = benchmark("inpainting")
    masks = inpainting.boxes(COUNT, SIDE, 0)
    shares = masks.mean(axis=(1, 2))
    assert ((shares >= 0.25**2) & (shares <= 0.75**2)).all() and len({*shares}) > 1
    for editor, error, unchanged in ((Perfect(), 0.0, 1.0), (Careless(), None, 0.0)):
        pixels = inpainting.inpainted(inpainting.Method("one", editor), data, masks, 0)
        figures, compared = inpainting.measure(data, masks, pixels, None)
        assert figures["unchanged outside"].value == unchanged
        assert figures["RMS error inside"].value == (pytest.approx(compared.mean()) if error is None else error)


def test_error_is_that_of_the_box(benchmark):
    inpainting, given = benchmark("inpainting"), np.zeros((1, 4, 4, 3), np.uint8)
    mask, changed = np.zeros((1, 4, 4), bool), given.copy()
    mask[0, :2] = True
    changed[0, 0] = 10  # half of the box
    assert inpainting.error_inside(changed, given, mask) == pytest.approx(np.sqrt(50))
    assert inpainting.unchanged_outside(changed, given, mask).value == 1.0
    changed[0, 3, 3, 0] = 1
    assert inpainting.unchanged_outside(changed, given, mask).value == 0.0


def test_cached_prior_has_the_same_logits(benchmark, monkeypatch, capsys):
    priors = benchmark("priors")
    for name, value in {"CODES": 6, "POSITIONS": 8, "BUCKETS": 16, "CAPTION": 4}.items():
        monkeypatch.setattr(priors, name, value)
    model, variables, prefix = priors.network(32, 1)
    found = {name: sampler(variables, prefix) for name, sampler in priors.make_samplers(model).items()}
    codes, logits = found["cached"]
    assert (codes == found["uncached"][0]).all() and len({*codes.tolist()}) > 1
    assert abs(logits - found["uncached"][1]).max() < priors.MAX_LOGIT_DIFFERENCE


def test_a_system_without_a_prior(benchmark, tmp_path):
    with pytest.raises(UsageError, check=mentions("nowhere")):
        benchmark("priors").measure_system(argparse.Namespace(system=tmp_path / "nowhere"))


def test_tables_of_ablations_have_every_run_once(benchmark):
    """Every run of configs/ablations.py is a row of one table."""
    rows = [row[:2] for table in benchmark("ablations").TABLES.values() for row in table.rows]
    page = BENCHMARKS.parent / "configs" / "ablations.py"
    configs = [name for name in runpy.run_path(str(page))["STAGES"] if not name.startswith("clip")]
    runs = [(config, number) for config in configs for number, _ in enumerate(read_runs(f"{page}:{config}", page))]
    assert sorted(rows) == sorted(runs)


def test_a_failed_training_ends_the_ablations(benchmark, monkeypatch, tmp_path):
    ablations = benchmark("ablations")
    monkeypatch.setattr(ablations.sweep, "run_command", lambda command: 1)
    options = argparse.Namespace(out=tmp_path, system=None)
    with pytest.raises(UserError, check=mentions("00_blur_rate")):
        next(ablations.train(ablations.TABLES["corruptions"], options))


def test_columns_of_equal_settings_share_their_images(benchmark, monkeypatch):
    ablations, asked = benchmark("ablations"), []

    def evaluate(system, measures, **how):
        asked.append((how["split"], how["sampling"].get("decoder", {}).get("guidance")))
        return {f"attributes/{name}": len(asked) for name in ("all", "background_std")}

    monkeypatch.setattr(ablations.d2, "evaluate", evaluate)
    options = argparse.Namespace(num=COUNT, seed=0)
    found = ablations.measure(pathlib.Path("runs"), ablations.TABLES["decoders"].columns, options)
    assert asked == [("val", 1.0), ("val", 2.0), ("compositional", 1.0)]
    assert found == [1, 2, 3, 1]


PLANNED = {
    "stage": "prior",
    "batch_size": 4096,
    "devices": 64,
    "memory": {"peak": 3 * 2**30, "available": 4 * 2**30},
    "fits": True,
    "traffic": {"collectives": {"all-gather": {"sent_bytes": 2**30}, "all-reduce": {"sent_bytes": 2**31}}},
    "time": {"compute": 0.25, "memory": 0.5, "network": 1, "utilisation": 0.25, "serial_utilisation": 0.2},
    "device_days": [64, 128],
}


def test_tables_of_plans_have_the_rows_of_a_folder(benchmark, tmp_path):
    (tmp_path / "prior-v5p.json").write_text(json.dumps(PLANNED))
    too_large = {**PLANNED, "memory": {**PLANNED["memory"], "peak": None}, "fits": False, "traffic": None, "time": None}
    (tmp_path / "clip-v5p.json").write_text(json.dumps({**too_large, "stage": "clip"}))
    command, _, _, _, *rows = benchmark("plans").tables(tmp_path).splitlines()
    assert "v5p:4x4x4" in command and "fsdp=64" in command
    assert rows == [
        "| prior, 4,096 | 3.0 / 4.0 | 3.0 | 0.25, 0.5, 1 | 20% to 25% | 2.0 to 1.0 |",
        "| clip, 4,096 | more / 4.0, does not fit | - | - | - | - |",
    ]


def test_smallest_slices_have_a_table_of_their_own(benchmark, tmp_path):
    plan = {**PLANNED, "topology": "v5p:2x2x1", "devices": 4}
    found = {"settings": {"model.remat": "blocks", "optim.accumulate": 1024}, "plan": plan}
    (tmp_path / "prior-v5p-smallest.json").write_text(json.dumps({"smallest": found}))
    (tmp_path / "clip-v5p-smallest.json").write_text(json.dumps({"smallest": None}))
    command, *_, row = benchmark("plans").tables(tmp_path).splitlines()
    assert "--search smallest" in command
    assert row == "| prior, 4,096 | v5p:2x2x1 | 4 | 1,024 | 3.0 / 4.0 | 20% to 25% | 128 to 64 |"


def test_plans_need_a_page_with_their_place(benchmark, tmp_path, monkeypatch):
    page = tmp_path / "page.md"
    words = ["plans.py", "--folder", str(tmp_path / "plans"), "--row", "prior:v5p", "--page", str(page)]
    monkeypatch.setattr(sys, "argv", words)
    for facts in (("page.md",), ("page.md", "<!-- plans -->")):
        with pytest.raises(UsageError, check=mentions(*facts)):
            benchmark("plans").main()
        assert not (tmp_path / "plans").exists()
        page.write_text("no place\n")


def test_operations_of_both_sides_have_the_same_kinds(benchmark):
    module = benchmark("peers_operations")
    network = "jit(step)/transpose(jvp(UNet))/UNet._down/down_0_0"
    ours = {
        f"convolution ynn_fusion.1 {network}/conv_1/conv_general_dilated": "convolutions",
        "dot ynn_fusion.2 ": "matrix products",
        "add,broadcast,constant,multiply multiply_add_fusion.986 jit(step)/add": "optimizer",
        "copy,transpose transpose_copy_fusion.7 ": "copies and layout",
        f"copy copy.7 {network}/attn/transpose": "copies and layout",
        f"multiply,reduce,transpose fusion.3 {network}/norm_1/reduce_sum": "norms and other element-wise work",
    }
    theirs = {
        "aten::mkldnn_convolution": "convolutions",
        "aten::convolution_backward": "convolutions",
        "aten::addmm": "matrix products",
        "Optimizer.step#AdamW.step": "optimizer",
        "aten::lerp_": "optimizer",
        "aten::copy_": "copies and layout",
        "aten::native_group_norm": "norms and other element-wise work",
    }
    for rules, names in ((module.OURS, ours), (module.THEIRS, theirs)):
        assert {name: module.kind_of(name, rules) for name in names} == names
        seconds = module.by_kind(dict.fromkeys(names, 1.0), rules, 14.0)
        assert {*seconds} == {*module.KINDS} and sum(seconds.values()) == pytest.approx(14.0)
    lines = module.table({"convolutions": 1.0}, {"convolutions": 0.25, "optimizer": 0.5}).splitlines()
    assert lines[2] == "| convolutions | 1.00 | 0.25 |" and lines[-1] == "| all | 1.00 | 0.75 |"


@pytest.mark.parametrize("name", ["peers", "peers_operations"])
def test_no_side_starts_without_its_peer(benchmark, monkeypatch, tmp_path, name):
    module = benchmark(name)
    monkeypatch.setattr(module, "Side", None)  # a call would be a TypeError
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--peer", str(tmp_path / "no-python")])
    with pytest.raises(UsageError, check=mentions("--peer", "no-python")):
        module.main()


def test_checkouts_take_turns_each_from_an_empty_cache(benchmark, monkeypatch, tmp_path, capfd):
    module = benchmark("checkouts")
    for name in ("before", "after"):
        (tmp_path / name).mkdir()
        rules = "install:\n\ttouch installed\n"
        rules += "demo:\n\t! ls $(XDG_CACHE_HOME) >> found\n\tmkdir -p $(XDG_CACHE_HOME)/program $(DEMO)\n"
        (tmp_path / name / "Makefile").write_text(rules)
        git = ["git", "-C", str(tmp_path / name), "-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    folders = [str(tmp_path / name) for name in ("before", "after")]
    out = ["--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["checkouts.py", *folders, "--repeats", "2", *out])
    module.main()
    assert [json.loads(line)["checkout"] for line in capfd.readouterr().out.splitlines()] == 2 * folders
    assert all((tmp_path / name / "found").read_text() == "" for name in ("before", "after"))
    runs = ("0-before", "1-after", "2-before", "3-after")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*runs}
    assert all((tmp_path / "out" / run / "demo").is_dir() for run in runs)
    nothing = [*folders, "--target", "nothing", "--out", str(tmp_path / "other")]
    for words, error, facts in (
        (nothing, UserError, ["nothing", "before"]),
        ([str(tmp_path), *out], UsageError, ["Makefile", str(tmp_path)]),
        ([*folders, *out], UsageError, ["--out", str(tmp_path / "out")]),
    ):
        monkeypatch.setattr(sys, "argv", ["checkouts.py", *words])
        with pytest.raises(error, check=mentions(*facts)):
            module.main()


def test_table_takes_its_place_on_a_page(benchmark, tmp_path):
    measured, page = benchmark("measured"), tmp_path / "page.md"
    page.write_text("before\n\n<!-- editing -->\nold\n<!-- /editing -->\n\nafter\n")
    for text in ("| one |\n", "| two |\n"):
        measured.put(page, "editing", text)
        assert page.read_text() == f"before\n\n<!-- editing -->\n\n{text}\n<!-- /editing -->\n\nafter\n"
    with pytest.raises(UsageError, check=mentions("page.md", "<!-- priors -->")):
        measured.put(page, "priors", "| one |")


def test_documented_places_exist(benchmark):
    """The pages have a place for every table and figure that is written to them."""
    docs = BENCHMARKS.parent / "docs"
    tables = ("editing", "inpainting", "priors", "cache", *benchmark("ablations").TABLES)
    paper = (*tables, *benchmark("paper_figures").FIGURES)
    places = [("paper.md", name) for name in paper]
    places += [("howto/plan.md", "plans")]
    places += [("howto/editing.md", name) for name in benchmark("emoji_figures").FIGURES]
    for file, name in places:
        page = (docs / file).read_text()
        start, end = page.find(f"<!-- {name} -->"), page.find(f"<!-- /{name} -->")
        assert 0 <= start < end, name
