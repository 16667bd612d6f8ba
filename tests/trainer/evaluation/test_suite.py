"""Suites from configuration to output of `lgaf eval`, on small sets in official layouts, on two ranks."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from data_pipeline.formats.pair_file import write_pairs
from tests.trainer.conftest import ROOT, run
from tests.trainer.evaluation.layouts import write_ijb, write_megaface, write_scface, write_tinyface
from tests.trainer.inference.test_embedder import image_bytes
from tests.trainer.report.test_training import Page
from trainer import backbones, config_file
from trainer.__main__ import app
from trainer.backbones.iresnet import IResNetConfig
from trainer.evaluation.suite import Suite, SuiteConfig
from trainer.inference.alignment import aligned
from trainer.inference.images import open_image, resized, to_network
from trainer.inference.network import Network, write_pt

SIZE = 32
SHIPPED = sorted((ROOT / "configs" / "eval").glob("*.toml"))
SETS = ("lfw", "cfp_fp", "cplfw", "agedb_30", "calfw")


def write_sets(folder):
    """Write twenty pairs each; genuine pairs repeat one image, and k labels of set k are wrong."""
    for k, name in enumerate(SETS):
        images = [image_bytes(1000 * k + i - (i % 4 == 1)) for i in range(40)]
        issame_P = np.tile([True, False], 10)
        issame_P[1 : 4 * k : 4] = True
        write_pairs(folder / f"{name}.bin", images, issame_P.tolist())


def write_protocols(folder):
    """Write all other protocols, then a different image to every file."""
    write_tinyface(
        folder / "tinyface" / "Testing_Set",
        [f"{i}_1.jpg" for i in range(1, 6)],
        [f"{i}_2.jpg" for i in range(1, 6)],
        [f"{i}.jpg" for i in range(9)],
    )
    write_scface(folder / "SCface_database")
    for prefix in ("ijbb", "ijbc"):
        faces = [(1 + i // 2, 1 + i // 2, 0.9) for i in range(16)]
        pairs = [(1, 5, 1), (2, 6, 1), (3, 7, 1), (1, 6, 0), (2, 7, 0), (3, 8, 0)]
        galleries = ([(1, 1), (2, 2)], [(3, 3), (4, 4)])
        probes = [(5, 1), (6, 2), (7, 3), (8, 4)]
        write_ijb(folder / prefix.upper(), faces, pairs, galleries, probes, prefix)
    people = [(f"p{i // 2}/{i}.png", f"p{i // 2}") for i in range(8)]
    write_megaface(folder / "megaface", people, {10: [f"{i}/{i}.jpg" for i in range(10)]})
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".jpg", ".png"))
    for i, path in enumerate(files):
        path.write_bytes(image_bytes(i, kind="JPEG", size=Image.open(path).width))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_sets(folder)
    write_protocols(folder)
    return folder


@pytest.fixture(scope="module")
def network(tmp_path_factory):
    """A file of `lgaf checkpoint extract`, and the network in it."""
    torch.manual_seed(0)
    config = IResNetConfig(blocks=[1, 1, 1, 1], width=8, embedding_size=16, stem_stride=2)
    model = backbones.build(config, SIZE).eval()
    path = tmp_path_factory.mktemp("network") / "network.pt"
    write_pt(Network(model, config, SIZE, 7), path)
    return path, model


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """The shipped suites in one file."""
    path = tmp_path_factory.mktemp("suites") / "everything.toml"
    texts = [re.sub("^folder.*$", "", shipped.read_text(), flags=re.M) for shipped in SHIPPED]
    path.write_text("\n".join(texts))
    return path


@pytest.fixture(scope="module")
def evaluated(data, network, everything, tmp_path_factory):
    """The command's output, and its output folder."""
    out = tmp_path_factory.mktemp("out") / "results"
    done = run("eval", network[0], "--suite", everything, "--set", f"folder={data}", "--out", out, ranks=2)
    assert done.returncode == 0, done.stderr
    return done.stdout, out


class PlainEmbedder:
    """Return the results of the reference: one process, one list of images."""

    def __init__(self, model):
        self.model = model

    @torch.no_grad()
    def embed(self, faces):
        pixels = [np.asarray(self.cropped(face)) for face in faces]
        images_BCHW = to_network(np.stack(pixels), torch.device("cpu"))
        return (self.model(images_BCHW).emb_BD + self.model(images_BCHW.flip(3)).emb_BD).numpy()

    def cropped(self, face):
        image = open_image(face.path, face.encoded)
        if face.landmark_52 is None:
            return resized(image, SIZE)
        return aligned(image, face.landmark_52, SIZE, "")


def figures_of(results):
    """By protocol, task and name, from results.json."""
    return {
        (protocol, task, name): value
        for protocol, tasks in results.items()
        for task, scores in tasks.items()
        for name, value in scores["figures"].items()
    }


def test_two_ranks_find_what_one_process_does(evaluated, data, network, everything):
    config = config_file.load(SuiteConfig, everything, [f"folder={data}"])
    found = figures_of(json.loads((evaluated[1] / "results.json").read_text())["results"])
    expected = {
        (protocol, task, name): value
        for protocol, tasks in Suite(config).evaluate(PlainEmbedder(network[1])).items()
        for task, scores in tasks.items()
        for name, value in scores.figures.items()
    }
    # Of hundreds of ranks a few may change places by the rounding of another batch.
    assert found == pytest.approx(expected, abs=0.01)
    assert {protocol for protocol, _, _ in found} >= {
        "LFW",
        "TinyFace",
        "SCFace",
        "IJB-B",
        "IJB-C",
        "MegaFace",
    }


def test_the_average_is_that_of_the_four_and_is_called_so(evaluated):
    results = json.loads((evaluated[1] / "results.json").read_text())["results"]
    accuracy = {
        name: tasks["verification"]["figures"]["accuracy"]
        for name, tasks in results.items()
        if "verification" in tasks
    }
    assert accuracy["LFW"] == 1
    four = [accuracy[name] for name in ("CFP-FP", "CPLFW", "AgeDB-30", "CALFW")]
    assert len(set(four)) > 1
    average = results["average of four (as in the LGAF paper)"]["verification"]
    assert average["figures"] == {"accuracy": pytest.approx((four[0] + four[1] + four[2] + four[3]) / 4)}
    assert average["convention"].endswith("mean of CFP-FP, CPLFW, AgeDB-30, CALFW")


def test_what_was_evaluated_is_written_down(evaluated, network):
    found = json.loads((evaluated[1] / "results.json").read_text())
    assert (found["suite"], found["checkpoint"]) == ("everything", str(network[0]))
    assert (found["step"], found["world_size"]) == (7, 2)
    assert set(found["versions"]) >= {"lgaf", "torch"}
    conventions = [scores["convention"] for tasks in found["results"].values() for scores in tasks.values()]
    assert all(conventions)


def test_the_terminal_shows_every_figure(evaluated):
    results = json.loads((evaluated[1] / "results.json").read_text())["results"]
    said = evaluated[0]
    assert all(name in said for name in results)
    assert f"{100 * results['CALFW']['verification']['figures']['accuracy']:.2f}" in said
    assert "all 130 subjects, 650 probes per distance" in said
    assert str(evaluated[1]) in said


def test_the_report_and_the_drawings_show_curves_of_all(evaluated):
    page = Page(evaluated[1] / "report.html")
    titles = [title for title in page.in_("h3")]
    for title in (
        "ROC, verification: true accept rate",
        "Similarity of pairs: LFW, verification",
        "ROC, 1:1: true accept rate",
        "CMC, 1:N: probes found",
        "CMC, all subjects: probes found",
    ):
        assert title in titles
    drawings = [ElementTree.parse(path).getroot() for path in evaluated[1].glob("*.svg")]
    assert len(drawings) == len(titles)
    texts = {text.text for root in drawings for text in root.iter("{http://www.w3.org/2000/svg}text")}
    assert {*titles, "false accept rate", "SCFace d1"} <= texts
    assert not re.search(r"\b(nan|inf)\b", page.html)


def test_a_damaged_image_of_one_rank_ends_all_with_its_name(network, tmp_path):
    folder = write_tinyface(
        tmp_path / "Testing_Set", ["1_1.jpg"], ["1_2.jpg"], [f"{i}.jpg" for i in range(50)]
    )
    damaged = folder / "Gallery_Distractor" / "9.jpg"  # the last by name, so of the last rank
    damaged.write_bytes(damaged.read_bytes()[:200])
    suite = tmp_path / "suite.toml"
    suite.write_text('[[tinyface]]\nname = "TinyFace"\npath = "Testing_Set"\n')
    options = ("--set", f"folder={tmp_path}", "--out", tmp_path / "out", "--batch-size", 2)
    done = run("eval", network[0], "--suite", suite, *options, ranks=2, timeout_s=120)
    assert done.returncode == 1
    assert done.stderr.count("lgaf:") == 1, done.stderr
    assert f"lgaf: rank 1: {damaged} cannot be decoded" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_a_shipped_suite_says_which_file_is_missing(path, tmp_path):
    with pytest.raises(ValueError, match=str(tmp_path)):
        Suite(config_file.load(SuiteConfig, path, [f"folder={tmp_path}"]))


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('[[tinyfaces]]\nname = "x"', "unknown key tinyfaces; did you mean tinyface"),
        (
            '[[pairs]]\nname = "x"\nfile = "y"',
            r"unknown key pairs.0.file; valid keys of \[pairs.0\]: name, path",
        ),
        ('[[pairs]]\nname = "x"', "pairs.0.path: expected a value, found none"),
        (
            '[[pairs]]\nname = "x"\npath = "y"\n[[ijb]]\nname = "x"\npath = "z"',
            "different names, found x more",
        ),
        ('[[average]]\nname = "m"\nof = ["lfw"]', r"average 'm': expected names of \[\[pairs\]\]"),
        ('[[average]]\nname = "m"\nof = []', "average.0.of"),
    ],
)
def test_a_suite_with_a_mistake_is_refused(text, complaint, tmp_path):
    path = tmp_path / "suite.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=complaint) as raised:
        config_file.load(SuiteConfig, path)
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("options", [[], ["--suite", "a.toml", "--pairs", "b.bin"]])
def test_eval_wants_a_suite_or_pairs(options):
    done = CliRunner().invoke(app, ["eval", "network.pt", *options])
    assert "expected --suite or --pairs, found " in str(done.exception)


def test_eval_of_pairs_has_no_keys_to_change():
    done = CliRunner().invoke(app, ["eval", "network.pt", "--pairs", "b.bin", "--set", "folder=x"])
    assert "--set changes keys of a suite: expected --suite" in str(done.exception)
