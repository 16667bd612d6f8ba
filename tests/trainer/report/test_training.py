"""The report shows its inputs, loads nothing, and omits missing data."""

import base64
import io
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from trainer.evaluation.metrics.verification import verify_similarities
from trainer.evaluation.protocols.pairs import scores_of
from trainer.report.training import JudgedPair, write_report

VOID = {"meta", "img"}
HOSTILE = "<script>alert('&amp;')</script>\"><img src=http://evil.example/x onerror=alert(1)>"
RESULT = {
    "verification_accuracy": 0.94321,
    "verification_accuracy_untrained": 0.6128,
    "samples_per_s": 2312.4,
    "steps": 3000,
    "world_size": 2,
    "device": "a device for tests",
    "versions": {"lgaf": "0.1.0", "torch": "2.13.0"},
}


class Page(HTMLParser):
    """The page as a browser parses it: elements, text by element, and unclosed elements."""

    def __init__(self, path):
        super().__init__()
        self.html = path.read_text(encoding="utf-8")
        self.open, self.elements, self.texts, self.figures = [], [], [], []
        self.feed(self.html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "data":
            self.figures.append(dict(attrs)["value"])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append((self.open[-1] if self.open else "", data))

    def in_(self, tag):
        return [text for element, text in self.texts if element == tag and text.strip()]

    @property
    def text(self):
        return "".join(text for tag, text in self.texts if tag != "style")

    def path(self, title, css_class):
        """The curves of one chart, as lists of (x, y)."""
        chart = self.html[self.html.index(f"<h3>{title}</h3>") :]
        drawing = chart[: chart.index("</svg>")]
        paths = re.findall(rf'class="{css_class}[^"]*" d="M([^"]*)h\.01"', drawing)
        return [[tuple(map(int, point.split())) for point in path.split("L")] for path in paths]


def jpeg(shade=128):
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16), (shade, shade, shade)).save(encoded, "JPEG")
    return encoded.getvalue()


def train_record(step, **values):
    return {
        "kind": "train", "step": step, "samples": 64 * step, "loss": 10 / step, "learning_rate": 0.1,
        "samples_per_s": 2000.0, "data_wait_s": 0.002, "step_s": 0.04, "time_s": 0.04 * step, **values,
    }  # fmt: skip


def evaluation_record(step, accuracy, name="held_out"):
    return {"kind": "evaluation", "step": step, "set": name, "accuracy": accuracy, "accuracy_std": 0.01}


def write_run(folder, records=(), result=None):
    folder.mkdir(parents=True, exist_ok=True)
    if records:
        (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    if result is not None:
        (folder / "result.json").write_text(json.dumps(result))
    return folder


RECORDS = [
    *(train_record(step) for step in range(1, 40)),
    *(evaluation_record(s, 0.6 + s / 200) for s in (0, 39)),
]


@pytest.fixture(scope="module")
def verification():
    rng = np.random.default_rng(0)
    issame_P = np.tile([True, False], 300)
    return verify_similarities(np.clip(rng.normal(np.where(issame_P, 0.5, 0.1), 0.15), -1, 1), issame_P)


def everything(verification, text=str):
    """All that a report can be given; `text` may change every text in it."""
    return {
        "results": {text("held_out"): {text("verification"): scores_of(verification)}},
        "faces": [(jpeg(10), text("ann")), (jpeg(20), text("ann")), (jpeg(30), text("bob"))],
        "pairs": [
            (jpeg(40), jpeg(50), True, 0.7, 0.3),
            (jpeg(40), jpeg(60), False, 0.1, 0.3),
            (jpeg(40), jpeg(70), False, 0.3, 0.3),
            JudgedPair(jpeg(40), jpeg(80), True, -0.2, 0.3),
        ],
        "splits": {text("occlusion"): [(text("none"), 0.96, 400), (text("mask"), 0.9125, 80)]},
        "config_text": text("seed = 7\n[data]\n"),
    }


@pytest.fixture(scope="module")
def complete(tmp_path_factory, verification):
    run_dir = write_run(tmp_path_factory.mktemp("runs") / "demo", RECORDS, RESULT)
    path = write_report(run_dir, **everything(verification))
    assert path == run_dir / "report.html"
    assert sorted(file.name for file in run_dir.iterdir()) == ["metrics.jsonl", "report.html", "result.json"]
    return Page(path)


def test_all_sections_are_there(complete):
    assert complete.in_("h1") == ["demo"]
    assert complete.in_("h2")[1:] == [
        "Training", "Verification", "Pairs", "By nuisance", "Faces of the dataset", "Details",
    ]  # fmt: skip
    assert complete.in_("h3") == [
        "Loss", "Verification accuracy", "Learning rate", "Samples per second", "Step time, ms",
        "ROC, verification: true accept rate", "Similarity of pairs: held_out, verification",
        "Judged right", "Judged wrong", "occlusion",
    ]  # fmt: skip
    assert complete.in_("pre") == ["seed = 7\n[data]\n"]
    assert complete.in_("summary") == ["Configuration", "Result"]


def test_the_numbers_are_those_given(complete, verification):
    figures = set(map(float, complete.figures))
    headline = [RESULT[key] for key in RESULT if key not in ("device", "versions")]
    summary = [value for key, value in verification.summary().items()]
    last = [39 * 64, 10 / 39, 0.05]  # samples, loss, part of the time that went into waiting
    pairs_and_splits = [0.7, 0.1, 0.3, -0.2, 0.96, 400, 0.9125, 80]
    assert all(
        any(math.isclose(value, figure, abs_tol=1e-12) for figure in figures)
        for value in [*headline, *summary, *last, *pairs_and_splits]
    )
    shown = complete.text.replace("\N{NARROW NO-BREAK SPACE}", " ")
    for text in (
        "61.3 %",
        "94.3 %",
        "+33.0 points",
        "2,312",
        "3,000",
        "a device for tests",
        "5.0 %",
        "0.256",
    ):
        assert text in shown
    assert "lgaf 0.1.0 · torch 2.13.0" in shown
    assert f"threshold {verification.threshold:.3f}" in shown
    assert "TAR@FAR 0.01" in shown
    assert "TAR@FAR 0.001" not in shown


def test_it_asks_for_nothing_from_elsewhere_and_runs_nothing(complete):
    allowed = {
        "html", "head", "meta", "title", "style", "body", "header", "main", "section", "h1", "h2", "h3", "p",
        "div", "span", "dl", "dt", "dd", "data", "i", "b", "s", "u", "ul", "li", "figure", "figcaption",
        "img", "svg", "path", "table", "thead", "tbody", "tr", "th", "td", "details", "summary", "pre",
    }  # fmt: skip
    assert {tag for tag, _ in complete.elements} <= allowed
    for tag, attributes in complete.elements:
        assert not {name for name in attributes if name in ("href", "srcset") or name.startswith("on")}
        assert attributes.get("src", "data:image/").startswith("data:image/"), tag
        assert "url(" not in attributes.get("style", "")
    assert not re.search(r"https?:|url\(|@import", complete.html)
    assert ("meta", "default-src 'none'; img-src data:; style-src 'unsafe-inline'") in [
        (tag, attributes.get("content")) for tag, attributes in complete.elements
    ]


def images_of(page):
    sources = [attributes["src"] for tag, attributes in page.elements if tag == "img"]
    return [base64.b64decode(source.partition(";base64,")[2]) for source in sources]


def test_the_images_are_those_given(complete, tmp_path):
    shades = [40, 50, 40, 60, 40, 70, 40, 80, 10, 20, 30]
    assert images_of(complete) == [jpeg(shade) for shade in shades]
    encoded = io.BytesIO()
    Image.new("RGB", (4, 4)).save(encoded, "PNG")
    page = Page(write_report(write_run(tmp_path, RECORDS), faces=[(encoded.getvalue(), "x"), (jpeg(), "x")]))
    kinds = [re.match("data:image/([a-z]+)", a["src"])[1] for tag, a in page.elements if tag == "img"]
    assert kinds == ["png", "jpeg"]


def test_neighbours_with_one_label_stand_together(complete):
    faces = complete.html[complete.html.index("Faces of the dataset") :]
    assert re.findall("<figcaption>(.*?)</figcaption>", faces) == ["ann", "bob"]
    assert "--images:2" in faces


def test_pairs_are_sorted_by_whether_they_were_judged_right(complete):
    """A similarity that just reaches the threshold is accepted, as in the protocol."""
    verdicts = re.findall(
        r'class="pair (\w+)".*?<b>&#1000[37]; ([a-z ]+)</b><data value="([^"]+)"', complete.html
    )
    assert verdicts == [
        ("right", "one person", "0.7"),
        ("right", "two people", "0.1"),
        ("wrong", "two people", "0.3"),
        ("wrong", "one person", "-0.2"),
    ]


def test_splits_say_how_sure_they_are(tmp_path):
    """Wilson's interval of 5 in 10 is 0.2366 to 0.7634, of 10 in 10 0.7225 to 1; the axis starts at 0.5."""
    splits = {"light": [("dim", 0.5, 10), ("bright", 1.0, 10), ("none", 0.0, 0)], "empty": []}
    page = Page(write_report(write_run(tmp_path, RECORDS), splits=splits))
    bars = [float(n) for bar in re.findall(r'<u style="left:(.*?)%;width:(.*?)%', page.html) for n in bar]
    assert bars == pytest.approx([0, 52.68, 44.5, 55.5], abs=0.05)
    assert "light" in page.in_("h3")
    assert "empty" not in page.text


def test_curves_lie_where_the_records_say(tmp_path):
    records = [train_record(1, loss=20.0), train_record(5, loss=5.0), train_record(9, loss=0.0)]
    records += [evaluation_record(0, 0.5), evaluation_record(4, 0.9), evaluation_record(8, 0.7, "other")]
    page = Page(write_report(write_run(tmp_path, records)))
    assert page.path("Loss", "line c0") == [[(0, 0), (500, 750), (1000, 1000)]]
    assert page.path("Verification accuracy", "line c0") == [[(0, 1000), (500, 0)]]
    assert page.path("Verification accuracy", "line c1") == [[(1000, 500)]]
    assert page.path("Step time, ms", "line c1") == [[(0, 950), (500, 950), (1000, 950)]]
    time_chart = page.html[page.html.index("<h3>Step time, ms</h3>") :]
    assert re.findall('class="y"[^>]*>(.*?)<', time_chart) == ["0", "10", "20", "30", "40"]


def test_the_roc_climbs_in_steps(tmp_path):
    """Descending: genuine, then one of each at once, impostor. FAR 0 stands at the left end."""
    result = verify_similarities(np.array([0.9, 0.5, 0.5, 0.3]), np.array([True, False] * 2), folds=2)
    page = Page(write_report(write_run(tmp_path, RECORDS), results={"x": {"task": scores_of(result)}}))
    assert page.path("ROC, task: true accept rate", "line c0") == [
        [(0, 1000), (0, 500), (500, 500), (500, 0), (1000, 0)]
    ]


def test_after_a_crash_the_later_record_of_a_step_counts(tmp_path):
    before = [train_record(step, loss=100.0) for step in (1, 2, 3, 5)] + [evaluation_record(3, 0.1)]
    after = [train_record(step, loss=10.0) for step in (3, 4, 5)] + [evaluation_record(3, 0.9)]
    page = Page(write_report(write_run(tmp_path, before + after)))
    assert page.path("Loss", "line c0") == [[(0, 0), (250, 0), (500, 900), (750, 900), (1000, 900)]]
    titles = re.findall("<title>held_out(.*?)</title>", page.html)
    assert titles == [", step 3: 90.0\N{NARROW NO-BREAK SPACE}%"]


def test_a_line_that_a_crash_cut_short_is_counted_and_left_out(tmp_path):
    run_dir = write_run(tmp_path, RECORDS)
    half = json.dumps(train_record(40))[:30]
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write(
            half
            + json.dumps(train_record(41))
            + "\n"
            + json.dumps({"kind": "later", "step": 41})
            + "\n"
            + half
        )
    page = Page(write_report(run_dir))
    assert "2 lines of metrics.jsonl could not be read" in page.text
    assert page.in_("h2")[-1] == "Details"


def test_values_that_are_not_numbers_are_not_drawn(tmp_path):
    records = [train_record(1, loss=4.0), train_record(2, loss=math.nan), train_record(3, loss=None)]
    records += [train_record(4, loss=math.inf), train_record(5, loss=1.0, data_wait_s="long")]
    page = Page(write_report(write_run(tmp_path, records)))
    assert page.path("Loss", "line c0") == [[(0, 0), (1000, 750)]]
    assert not re.search(r"\b(nan|inf)\b", page.html)


def test_hostile_texts_stay_texts(tmp_path, verification):
    result = RESULT | {"device": HOSTILE, "versions": {HOSTILE: HOSTILE}, HOSTILE: [HOSTILE]}
    records = [*RECORDS, evaluation_record(0, 0.5, HOSTILE)]
    run_dir = write_run(tmp_path / HOSTILE.replace("/", "_"), records, result)
    page = Page(write_report(run_dir, **everything(verification, lambda text: text + HOSTILE)))
    harmless_run = write_run(
        tmp_path / "harmless",
        [*RECORDS, evaluation_record(0, 0.5, "x")],
        RESULT | {"versions": {"x": "x"}, "x": 1},
    )
    harmless = Page(write_report(harmless_run, **everything(verification)))
    assert [tag for tag, _ in page.elements] == [tag for tag, _ in harmless.elements]
    assert [sorted(attributes) for _, attributes in page.elements] == [
        sorted(attributes) for _, attributes in harmless.elements
    ]
    for where in ("held_out", "ann", "occlusion", "none", "seed = 7\n[data]\n"):
        assert where + HOSTILE in page.text
    assert "ann" + HOSTILE in [attributes.get("alt") for _, attributes in page.elements]
    assert HOSTILE in page.in_("dd")


def test_a_label_that_is_not_unicode_is_shown_nevertheless(tmp_path):
    page = Page(write_report(write_run(tmp_path, RECORDS), faces=[(jpeg(), "caf\udce9")]))
    assert "caf?" in page.text


@pytest.mark.parametrize(
    ("records", "result", "given", "headings"),
    [
        (RECORDS, None, [], ["Training"]),
        ([r for r in RECORDS if r["kind"] == "train"], None, [], ["Training"]),
        ([r for r in RECORDS if r["kind"] == "evaluation"], None, [], ["Training"]),
        ([{"kind": "train", "step": 1}], None, ["config_text"], ["Details"]),
        ((), RESULT, [], ["verification accuracy, untrained → trained", "Details"]),
        ((), {"verification_accuracy": 0.9}, [], ["verification accuracy", "Details"]),
        ((), {"verification_accuracy": None, "steps": 5}, [], ["Details"]),
        ((), {}, [], []),
        ((), {}, ["results"], ["Verification"]),
        ((), {}, ["faces"], ["Faces of the dataset"]),
        ((), {}, ["pairs"], ["Pairs"]),
        ((), {}, ["splits"], ["By nuisance"]),
    ],
)
def test_what_is_missing_is_left_out(tmp_path, verification, records, result, given, headings):
    arguments = {name: everything(verification)[name] for name in given}
    page = Page(write_report(write_run(tmp_path, records, result), **arguments))
    assert page.in_("h2") == headings


def test_a_long_run_makes_a_small_page_on_which_every_spike_is_seen(tmp_path, verification):
    records = [train_record(step, loss=5.0 + step % 7) for step in range(1, 10_001)]
    records[4321]["loss"] = 90.0
    page = Page(write_report(write_run(tmp_path, records, RESULT), **everything(verification)))
    assert len(page.html) < 300_000
    loss = page.html[page.html.index("<h3>Loss</h3>") :]
    band = re.search(r'class="band c0" d="M([^"]*)Z"', loss)[1]
    assert min(int(point.split()[1]) for point in band.split("L")) == 100  # 90 on an axis from 0 to 100
    assert all(900 <= y <= 930 for x, y in page.path("Loss", "line c0")[0] if abs(x - 432) > 10)
    rate = page.path("Learning rate", "line c0")[0]
    assert (rate[0][0], rate[-1][0]) == (0, 1000)


def test_several_sets_share_the_roc_and_have_their_own_histograms(tmp_path, verification):
    few = verify_similarities(np.array([0.9, 0.2] * 5), np.array([True, False] * 5))
    results = {name: {"task": scores_of(result)} for name, result in (("a", verification), ("b", few))}
    page = Page(write_report(write_run(tmp_path, RECORDS), results=results))
    assert len(page.path("ROC, task: true accept rate", "line c")) == 2
    assert [title for title in page.in_("h3") if "pairs" in title] == [
        "Similarity of pairs: a, task",
        "Similarity of pairs: b, task",
    ]
    rows = re.findall("<tr>(.*?)</tr>", page.html)
    assert next(row for row in rows if row.startswith("<th>TAR@FAR 0.01<")).endswith("<td>\N{EN DASH}</td>")


def test_a_second_report_replaces_the_first(tmp_path):
    run_dir = write_run(tmp_path, RECORDS)
    write_report(run_dir, config_text="first")
    page = Page(write_report(run_dir, config_text="second"))
    assert page.in_("pre") == ["second"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (None, "expected the metrics.jsonl and result.json of a run, found neither"),
        ("[1]", r"result\.json: expected a JSON object"),
        ('{"steps": 1', r"result\.json: expected a JSON object"),
        ('{"samples_per_s": "fast"}', r"result\.json: samples_per_s: expected a number, found 'fast'"),
        ('{"verification_accuracy": NaN}', r"result\.json: verification_accuracy: .* found nan"),
    ],
)
def test_a_run_that_cannot_be_reported_is_refused(tmp_path, content, complaint):
    if content is not None:
        (tmp_path / "result.json").write_text(content)
    with pytest.raises(ValueError, match=complaint):
        write_report(tmp_path)
    assert not (tmp_path / "report.html").exists()
