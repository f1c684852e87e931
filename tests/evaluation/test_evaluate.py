"""`evaluate`: every measure of a tiny system, samples that are generated once, and what cannot be measured."""

import json
import shutil

import jax
import numpy as np
import pytest
from evaluated_system import SIDE, Shapes, generating, load, network, pixel_distance
from jax.sharding import AxisType
from raised import mentions

import dalle2_jax as d2
from dalle2_jax import data
from dalle2_jax.errors import ConfigError, DataError, UsageError, UserError
from dalle2_jax.evaluation import context, references, registry, run
from dalle2_jax.evaluation.distances import Statistics
from dalle2_jax.evaluation.features import FeatureNetwork
from dalle2_jax.evaluation.measures import images
from dalle2_jax.evaluation.options import make_options
from dalle2_jax.system.system import System

pytestmark = pytest.mark.filterwarnings("ignore::dalle2_jax.errors.SystemWarning")  # of captions that are truncated

NUM = 12
DATA = data.ShapesSource("train", SIDE, max_objects=1, num_examples=40)


@pytest.fixture(scope="module")
def system(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield load(tmp_path_factory.mktemp("system"))


def evaluate(system, *measures, **options):
    given = {"data": DATA, "num": NUM, "batch_size": 8, "features": [network()]}
    return d2.evaluate(system, measures, **{**given, **options})


# --- every measure ------------------------------------------------------------------------------


def test_measures_and_functions_have_the_same_names():
    assert registry.MEASURES.keys() == run.FUNCTIONS.keys()
    for protocol in registry.PROTOCOLS.values():
        assert {*protocol.measures} <= registry.MEASURES.keys()


FIGURES = {
    "attributes": {"colour", "shape", "size", "count", "all"},
    "retrieval": {f"{way}_at_{k}" for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)},
    "zero_shot": {"top_1", "top_5"},
    "linear_probe": {"accuracy"},
    "prior": {"cosine_image", "cosine_text", "cosine_unrelated", "nearest"},
    "ablation": {f"{way}_{to}" for way in ("caption", "text_embedding", "prior") for to in ("image", "text")},
    "fd": {"FD-VGG16"},
    "kid": {"KID-VGG16"},
    "inception_score": {"IS-VGG16"},
    "precision_recall": {f"{name}-VGG16" for name in ("precision", "recall", "density", "coverage")},
    "cmmd": {"CMMD"},
    "clip_score": {"CLIP score"},
}


@pytest.fixture(scope="module")
def measured(system, tmp_path_factory):
    """All measures but those of single stages and of other data, in one call."""
    return evaluate(system, *FIGURES, out=tmp_path_factory.mktemp("out") / "all")


@pytest.mark.parametrize("measure", FIGURES)
def test_every_figure_has_its_count_and_interval(measured, measure):
    figures = measured.measures[measure]
    assert FIGURES[measure] <= figures.keys()
    for name, figure in figures.items():
        assert np.isfinite(figure.value) and 1 <= figure.n <= 40 and figure.interval is not None, name
        if not name.startswith(("KID", "IS", "FD")):  # whose intervals are those of unbiased or trimmed estimates
            assert figure.interval[0] <= figure.value + 1e-9 and figure.value - 1e-9 <= figure.interval[1], name
        if figure.share:
            assert 0 <= figure.value <= 1, name


def test_results_are_read_back_and_reported(measured, tmp_path):
    written = json.loads((measured.save(tmp_path) / "results.json").read_text())
    assert written["measures"].keys() == FIGURES.keys() and written["settings"]["seed"] == 1
    assert d2.Evaluation.load(tmp_path).figures == measured.figures
    assert (tmp_path / "grid.png").is_file()
    assert repr(measured).count("\n") == 1 and f"{len(measured)} figures" in repr(measured)
    assert measured["clip_score/CLIP score"].baseline.n == NUM
    lines = measured.table().splitlines()
    assert len(lines) == 1 + len(measured) and "baseline" in lines[0] and "(shuffled captions)" in measured.table()
    d2.write_report([measured.system], tmp_path / "report.html", results=[tmp_path])
    assert "clip_score / CLIP score" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"measures": {"a": {"b": {"value": 1}}}}', '{"measures": [1]}'])
def test_damaged_results_are_named(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(DataError) as error:
        d2.Evaluation.load(tmp_path)
    assert error.value.path == tmp_path / "results.json"


def test_the_three_conditions_of_the_ablation_differ(system, measured):
    decoded = system.decode(None, ["red"], seed=1).numpy
    assert decoded.shape == (1, SIDE, SIDE, 3)
    with pytest.raises(UsageError):
        system.decode(None)
    values = [measured[f"ablation/{way}_image"].value for way in ("caption", "text_embedding", "prior")]
    assert len({*values}) == 3


# --- samples ------------------------------------------------------------------------------------


def test_samples_are_those_of_text2image(system, tmp_path):
    evaluate(system, "clip_score", out=tmp_path, num=3, batch_size=4)
    captions = json.loads((tmp_path / "samples/data/00000.json").read_text())
    assert captions == [DATA.caption(index) for index in range(3)]
    with pytest.warns(d2.SystemWarning):  # of long captions
        expected = system.text2image([*captions, captions[0]], num=1, seed=1, batch_size=4)
    np.testing.assert_array_equal(np.load(tmp_path / "samples/data/00000.npy"), expected.numpy[:3])


def test_truncated_captions_are_counted(system):
    with pytest.warns(d2.SystemWarning, match="of 12 captions"):
        evaluate(system, "clip_score")


def test_all_measures_share_samples(system, monkeypatch, tmp_path):
    generate = generating(monkeypatch, Shapes(SIDE))
    evaluate(system, "kid", "clip_score", "precision_recall", out=tmp_path, num=None)
    assert [first for _, first, _ in generate.batches] == [*range(0, 40, 8)]
    evaluate(system, "kid", "cmmd", out=tmp_path)
    assert len(generate.batches) == 5  # nothing again


def test_an_interrupted_evaluation_continues(system, monkeypatch, tmp_path):
    whole = evaluate(system, "clip_score", "kid", out=tmp_path / "whole", num=20)
    original = context.generate

    def interrupted(generator, condition, first, captions):
        if first == 8:
            raise KeyboardInterrupt
        return original(generator, condition, first, captions)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(context, "generate", interrupted)
        evaluate(system, "clip_score", "kid", out=tmp_path / "parts", num=20)
    parts = evaluate(system, "clip_score", "kid", out=tmp_path / "parts", num=20)
    for file in ("00000.npy", "00001.npy", "00002.npy"):
        one, other = (tmp_path / name / "samples/data" / file for name in ("whole", "parts"))
        assert one.read_bytes() == other.read_bytes(), file
    assert parts.figures == whole.figures


@pytest.mark.parametrize(
    ("changed", "field"),
    [
        ({"seed": 2}, "seed"),
        ({"sampling": {"decoder": {"steps": 2}}}, "sampling.decoder.steps"),
        ({"batch_size": 4}, "batch_size"),
        ({"split": "compositional", "data": "shapes"}, "data"),
    ],
)
def test_out_of_other_settings_is_rejected(system, monkeypatch, tmp_path, changed, field):
    generating(monkeypatch, Shapes(SIDE))
    evaluate(system, "clip_score", out=tmp_path)
    with pytest.raises(ConfigError) as error:
        evaluate(system, "clip_score", out=tmp_path, **changed)
    assert error.value.field == field


@pytest.mark.sharding
def test_several_devices_generate_the_same_images(system, tmp_path):
    axes, kinds = ("data", "fsdp", "tensor"), (AxisType.Auto,) * 3
    meshes = [jax.make_mesh((size, 1, 1), axes, kinds, devices=jax.devices()[:size]) for size in (8, 1)]
    folders = [tmp_path / str(mesh.size) for mesh in meshes]
    found = [
        evaluate(d2.load(system.path, mesh=mesh), "clip_score", num=6, out=folder)
        for mesh, folder in zip(meshes, folders, strict=True)
    ]
    several, one = (np.load(folder / "samples/data/00000.npy").astype(int) for folder in folders)
    assert several.shape == one.shape == (6, SIDE, SIDE, 3) and np.abs(several - one).max() <= 1
    assert found[0]["clip_score/CLIP score"].value == pytest.approx(found[1]["clip_score/CLIP score"].value, abs=0.1)


def test_without_a_batch_size_that_of_the_samples_is_kept(system, monkeypatch, tmp_path):
    generating(monkeypatch, Shapes(SIDE))
    for _ in range(2):
        evaluate(system, "clip_score", out=tmp_path, num=5, batch_size=None)
    evaluate(system, "clip_score", out=tmp_path, num=30, batch_size=None)
    assert json.loads((tmp_path / "samples/data/settings.json").read_text())["batch_size"] == 5


# --- images that are known ----------------------------------------------------------------------


def test_real_images_are_perfect(system, monkeypatch):
    generate = generating(monkeypatch, Shapes(64), 64)
    found = evaluate(system, "attributes", "kid", "fd", data=generate.source, num=100)
    assert found["attributes/all"].value == 1 > 0.2 > found["attributes/all"].baseline.value
    assert found["attributes/background_std"].value == found["attributes/background_std"].baseline.value == 0
    assert found["fd/FD-VGG16"].value == pytest.approx(0, abs=1e-6)
    assert found["fd/FD-VGG16"].baseline.value > 1e-4
    assert found["kid/KID-VGG16"].value < 0.01


def test_names_are_those_of_the_network(system, monkeypatch):
    generating(monkeypatch, Shapes(SIDE))
    both = [network(), network("inception", "Inception", dims=3)]
    found = evaluate(system, "fd", "kid", "inception_score", features=both)
    assert {*found} >= {"fd/FID", "kid/KID", "inception_score/IS", "fd/FD-VGG16", "kid/KID-VGG16"}


def test_memorised_images_are_nearer_than_held_out_ones(system, monkeypatch):
    monkeypatch.setattr(images, "MAX_TRAINING", 64)
    train = data.source_named("shapes", "train", SIDE)
    generating(monkeypatch, lambda generator, condition, first, captions: train.fetch(range(len(captions)))["image"])
    found = evaluate(system, "memorisation", data="shapes")
    assert found["memorisation/cosine-VGG16_to_nearest"].value == pytest.approx(0, abs=1e-6)
    nearer = found["memorisation/cosine-VGG16_nearer"]
    assert nearer.value == 1 > nearer.baseline.value


def test_lpips_ranks_the_nearest_images(system, monkeypatch):
    monkeypatch.setattr(images, "MAX_TRAINING", 64)
    train = data.source_named("shapes", "train", SIDE)
    generating(monkeypatch, lambda generator, condition, first, captions: train.fetch(range(len(captions)))["image"])
    found = evaluate(system, "memorisation", data="shapes", lpips=pixel_distance())
    nearest = found["memorisation/LPIPS_to_nearest"]
    assert nearest.value == 0 < nearest.baseline.value
    assert found["memorisation/LPIPS_nearer"].value == 1


def test_a_sweep_of_guidance_writes_a_plot(system, monkeypatch, tmp_path):
    generate = generating(monkeypatch, Shapes(SIDE))
    found = evaluate(system, "fd", "clip_score", "retrieval", guidance=(1, 2.5), out=tmp_path)
    assert {"fd at guidance 1", "fd at guidance 2.5", "retrieval"} < found.measures.keys() and len(
        generate.batches
    ) == 4
    rows = json.loads((tmp_path / "guidance.json").read_text())
    assert [row["guidance"] for row in rows] == [1, 2.5]
    assert rows[0]["figures"].keys() == {"fd/FD-VGG16", "clip_score/CLIP score"}
    assert (tmp_path / "guidance.png").is_file()
    settings = json.loads((tmp_path / "samples/data-guidance_2.5/settings.json").read_text())
    assert settings["sampling"]["decoder"]["guidance"] == 2.5


def test_the_protocol_of_coco(system, monkeypatch, tmp_path):
    """Random captions, all real images, guidance 1.25."""
    generating(monkeypatch, Shapes(SIDE))
    found = evaluate(system, protocol="coco30k", out=tmp_path)
    assert found.measures.keys() == {"fd", "clip_score"} and found["fd/FD-VGG16"].n == NUM
    stored = json.loads((tmp_path / "samples/data-guidance_1.25/00000.json").read_text())
    order = np.random.default_rng(1).permutation(40)
    assert stored == [DATA.caption(int(index)) for index in order[:8]]
    assert found["fd/FD-VGG16"].baseline.n == 20  # half of all


# --- reference statistics -----------------------------------------------------------------------


def test_statistics_replace_the_real_images(system, monkeypatch, tmp_path):
    generating(monkeypatch, Shapes(SIDE))
    known, path = network(), tmp_path / "shapes.npz"
    references.statistics_of(known, DATA, 30, "shapes").save(path)
    with_images = evaluate(system, "fd", features=known, num=30)
    with_file = evaluate(system, "fd", features=known, num=30, reference=path)
    assert with_file["fd/FD-VGG16"].value == pytest.approx(with_images["fd/FD-VGG16"].value, abs=1e-9)
    assert Statistics.load(path).n == 30
    for other in (network("inception"), network(dims=3)):
        with pytest.raises(DataError):
            evaluate(system, "fd", features=other, reference=path)
    monkeypatch.setattr(context.Context, "size", 8)
    with pytest.raises(DataError, check=mentions("8x8")):
        evaluate(system, "fd", features=known, reference=path)


def test_real_features_are_computed_once(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(references, "CHUNK", 16)
    seen = []
    known = network(seen=seen)
    first = references.real_features(known, DATA, range(40))
    count = len(seen)
    same = references.real_features(known, data.ShapesSource(DATA.split, SIDE, max_objects=1), range(40))
    np.testing.assert_array_equal(first, same)
    assert len(seen) == count  # recognised by content
    file = next((tmp_path / "dalle2_jax/features/vgg16-feed").iterdir())
    file.write_bytes(b"damaged")
    np.testing.assert_array_equal(first, references.real_features(known, DATA, range(40)))


# --- what cannot be measured --------------------------------------------------------------------

PLAIN = {"image": np.random.default_rng(0).integers(0, 256, (NUM, 20, 20, 3), np.uint8), "caption": ["a"] * NUM}


@pytest.mark.parametrize(
    ("measures", "options", "error", "field"),
    [
        (["fdd"], {}, UsageError, None),
        ([], {}, ConfigError, "measures"),
        (["kid", "kid"], {}, UsageError, None),
        (["fd"], {"features": None}, ConfigError, "features"),
        (["memorisation"], {"features": None}, ConfigError, "features"),
        (["fd"], {"num": 4}, DataError, None),
        (["kid"], {"num": 3}, ConfigError, "num"),
        (["kid"], {"num": 0}, ConfigError, "num"),
        (["kid"], {"num": 41}, UserError, None),
        (["kid"], {"numm": 4}, ConfigError, "numm"),
        (["kid"], {"guidance": "2"}, ConfigError, "guidance"),
        (["kid"], {"guidance": (1, 1)}, ConfigError, "guidance"),
        (["retrieval"], {"guidance": (1, 2)}, ConfigError, "guidance"),
        (["kid"], {"sampling": {"decoder": {"stepz": 4}}}, ConfigError, "decoder.stepz"),
        (["kid"], {"protocol": "coco"}, UsageError, None),
        (["attributes"], {"data": PLAIN}, UserError, None),
        (["binding"], {}, UserError, None),
        (["attributes", "binding"], {}, UserError, None),
        (["binding"], {"data": PLAIN}, UserError, None),
        (["emoji"], {}, DataError, None),
        (["digits"], {}, UserError, None),
        (["bits_per_dim"], {}, ConfigError, "stage"),
        (["zero_shot"], {"data": PLAIN}, ConfigError, "label"),
        (["clip_score"], {"data": {**PLAIN, "image": np.full((NUM, 9, 9, 3), np.nan)}}, DataError, None),
        (["fd"], {"reference": "nowhere.npz"}, DataError, None),
        (["memorisation"], {}, ConfigError, "data"),
        (["memorisation"], {"data": "shapes", "split": "train"}, ConfigError, "split"),
    ],
)
def test_errors_come_before_sampling(system, monkeypatch, measures, options, error, field):
    monkeypatch.setattr(context, "generate", None)
    with pytest.raises(error) as caught:
        evaluate(system, *measures, **options)
    if field is not None:
        assert caught.value.field == field
    assert "\n" not in str(caught.value)


def test_too_few_images_name_the_measures_that_need_fewer(system):
    with pytest.raises(DataError, check=mentions("KID", "CMMD")):
        evaluate(system, "fd", num=4)


def test_a_network_that_is_not_imported_names_the_command(system, tmp_path):
    with pytest.raises(UserError, check=mentions("dalle2 weights import")):
        evaluate(system, "kid", features=tmp_path)
    with pytest.raises(ConfigError, check=mentions("dalle2 weights import")):
        evaluate(system, "kid", features=())


def test_a_network_without_classes_has_no_inception_score(system):
    plain = FeatureNetwork("vgg16", "VGG16", None, 4, 2, 0, "0", lambda images: images)
    with pytest.raises(UserError, check=mentions("no classes")):
        evaluate(system, "inception_score", features=plain)


def test_images_of_several_sizes_are_resized(system, monkeypatch):
    """The data's images become squares of the samples' size."""
    generating(monkeypatch, Shapes(SIDE))
    sizes = [np.zeros((20 + number, 30, 3), np.uint8) for number in range(NUM)]
    found = evaluate(system, "kid", data={"image": sizes, "caption": PLAIN["caption"]})
    assert found["kid/KID-VGG16"].n == NUM


def test_a_system_without_the_stages(system):
    for missing, measure in (("prior", "clip_score"), ("decoder", "kid"), ("clip", "retrieval"), ("prior", "prior")):
        stages = {name: stage for name, stage in system.stages.items() if name != missing}
        with pytest.raises(UserError, check=mentions("no trained stage", missing)):
            evaluate(System(system.path, stages, system.mesh), measure)


def test_a_clip_of_another_contract_is_rejected(system, tmp_path):
    """The stages of a system share one CLIP; any other compares images and captions only."""
    shutil.copytree(system.path, tmp_path / "mixed")
    contract = tmp_path / "mixed" / "prior" / "contract.json"
    contract.write_text(json.dumps({**json.loads(contract.read_text()), "clip": "deadbeef"}))
    (contract.parent / "digests.json").unlink(missing_ok=True)
    with pytest.raises(d2.ContractError) as error:
        evaluate(tmp_path / "mixed", "prior")
    assert error.value.differences["clip"][0] == "deadbeef"


def test_another_clip_measures_the_score(system, monkeypatch, tmp_path):
    generating(monkeypatch, Shapes(SIDE))
    other = load(tmp_path, seed=5)
    own, others = (evaluate(system, "clip_score", clip=each)["clip_score/CLIP score"] for each in (None, other.path))
    assert own != others == evaluate(system, "clip_score", clip=other)["clip_score/CLIP score"]


def test_options_are_normalised():
    options = make_options({"features": "a", "guidance": 2, "out": "~/x"})
    assert options.features == ("a",) and options.guidance == (2,) and options.out.is_absolute()
