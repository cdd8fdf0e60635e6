"""Plots and the HTML report, opened in a real browser where there is one."""

import html
import json
import re
import shutil
import struct
import subprocess
import xml.etree.ElementTree as xml
from html.parser import HTMLParser

import pytest
from importances import made

from seal_ops.evaluation.results import Evaluation
from seal_ops.experiments.comparison import Comparison
from seal_ops.experiments.quadrants import group_by_sign
from seal_ops.experiments.transfer_matrix import Transfer
from seal_ops.report import plots, writers
from seal_ops.report.html import write_report

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def evaluation(name, shift=0, task="lines", lengths=(512, 1024), cases=20):
    records = []
    for length in lengths:
        for i in range(cases):
            score = float((i * 7 + shift) % 10 < 6)
            records.append({
                "length": length, "index": i, "prompt_tokens": length, "answer": f"It is <{i}>.", "score": score,
                "output": f"It is <{i}>." if score else "<script>alert('no')</script>", "depth": (i % 5) / 4,
            })  # fmt: skip
    return Evaluation(task, name, {"lengths": list(lengths)}, records, 3.0)


def comparison():
    settings = {"task": "lines", "lengths": [512, 1024], "cases": 20, "train_length": 1024}
    training = {
        name: {"lr": 0.01, "parameters": n, "seconds": 2.0, "peak_memory": 2**28, "losses": [2.0, 1.0]}
        for name, n in (("SEAL-H", 24), ("LoRA", 49_152))
    }
    return Comparison(settings, {n: evaluation(n, i) for i, n in enumerate(("base", "SEAL-H", "LoRA"))}, training)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What a study leaves behind, in its own forms."""
    tmp_path = tmp_path_factory.mktemp("study")
    writers.write_comparison(comparison(), tmp_path)
    settings = {"measured": ["lines", "passkey"], "method": "SEAL-C", "length": 512}
    rows = {
        row: {t: evaluation(row, i, t, (512,)) for t in settings["measured"]} for i, row in enumerate(("base", "lines"))
    }
    writers.write_transfer(Transfer(settings, rows, {}), tmp_path)
    found = made(units=8)
    found.units = [[u // 4, u % 4] for u in range(8)]
    found.settings |= {"factor": 0.0, "methods": ["ablation", "gradient"]}
    found.seconds = {"ablation": 1.0}
    writers.write_head_importance(found, tmp_path)
    groups = group_by_sign(found, "accuracy", noise=0)
    writers.write_quadrants({n: evaluation(n) for n in ("base", "both")}, groups, found.units, tmp_path, "accuracy", 0)
    evaluation("base").save(tmp_path / "raw" / "base.json")
    (tmp_path / "other.csv").write_text("name,value\nalpha,1\nbeta & gamma,2\n")
    (tmp_path / "broken.json").write_text("{")
    return tmp_path


class Page(HTMLParser):
    """Tags, pictures and text of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.images, self.links, self.ids, self.text, self.open = [], [], [], set(), [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.ids.add(attrs.get("id"))
        if tag == "img":
            self.images.append(attrs["src"])
        if tag == "a":
            self.links.append(attrs["href"])
        if tag not in ("img", "meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] not in (["style"], ["script"]):
            self.text.append(data)


def test_report_is_one_whole_file(folder):
    page = Page(open(write_report(folder, title="A & B"), encoding="utf-8").read())
    assert page.open == [], "every tag is closed"
    text = " ".join(page.text)
    for heading in (
        "A & B",
        "Comparison of methods",
        "Transfer",
        "Head importance",
        "Quadrant experiment",
        "Evaluations",
    ):
        assert heading in text
    assert "beta & gamma" in text and "exact McNemar" in text and "<script>alert('no')</script>" in text
    assert len(page.images) == 6 and all(source.startswith("data:image/svg+xml;base64,") for source in page.images)
    assert page.tags.count("script") == 1, "what a model wrote is text"
    assert all(link[0] == "#" and link[1:] in page.ids for link in page.links)
    assert not re.search(r'(src|href)="(?!data:|#)', open(folder / "report.html").read()), (
        "needs nothing from elsewhere"
    )


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on PATH; the page is parsed by the test above instead")
def test_report_opens_in_a_browser(folder, tmp_path):
    write_report(folder)
    # What the page says of itself once it is loaded and a heading was clicked.
    probe = """<script>addEventListener("load", () => {
      const images = [...document.images], head = document.querySelector("#s0 table th");
      head.click(); head.click();
      const first = head.closest("table").tBodies[0].rows[0].cells[0].textContent;
      document.body.dataset.probe = JSON.stringify({images: images.length,
        drawn: images.filter(i => i.naturalWidth > 99).length,
        wide: Math.max(...images.map(i => i.getBoundingClientRect().width)), window: innerWidth, first,
        tables: document.querySelectorAll("table").length});
    });</script></body>"""
    text = (folder / "report.html").read_text(encoding="utf-8").replace("</body>", probe)
    (tmp_path / "probed.html").write_text(text, encoding="utf-8")
    done = subprocess.run(
        [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", f"--user-data-dir={tmp_path}/p",  # noqa: E501
         "--virtual-time-budget=4000", "--window-size=1000,800", "--dump-dom", (tmp_path / "probed.html").as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    found = re.search(r'data-probe="([^"]+)"', done.stdout)
    assert found, f"the page did not load: {done.stderr[-500:]}"
    seen = json.loads(html.unescape(found[1]))
    assert seen["images"] == seen["drawn"] == 6 and seen["wide"] <= seen["window"]
    assert seen["tables"] > 8 and seen["first"] == "SEAL-H", "the second click sorts downwards"


def test_report_without_results(tmp_path):
    with pytest.raises(ValueError, match="folder must hold results .* got none"):
        write_report(tmp_path)
    with pytest.raises(FileNotFoundError, match="folder must exist"):
        write_report(tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_plots_are_png_and_svg_with_text(folder):
    for stem in ("comparison", "cost", "transfer", "heads", "heads-agreement", "quadrants"):
        data = (folder / f"{stem}.png").read_bytes()
        width, height = struct.unpack(">II", data[16:24])
        assert data[:8] == b"\x89PNG\r\n\x1a\n" and 500 < width < 4000 and 300 < height < 4000
        assert xml.parse(folder / f"{stem}.svg").getroot().tag.endswith("svg")


def test_depth_by_length(tmp_path):
    plots.depth_by_length(evaluation("base"), [tmp_path / "grid.png", tmp_path / "grid.svg"])
    scattered = evaluation("base")
    for i, record in enumerate(scattered.records):
        record["depth"] = i / len(scattered.records)
    plots.depth_by_length(scattered, tmp_path / "bins.svg")
    assert "20% to 40%" in (tmp_path / "bins.svg").read_text() and "75%" in (tmp_path / "grid.svg").read_text()
    for record in scattered.records:
        del record["depth"]
    with pytest.raises(ValueError, match="must have a depth for every case, lines has none"):
        plots.depth_by_length(scattered, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
    with pytest.raises(ValueError, match="path must end with one of"):
        plots.depth_by_length(evaluation("base"), tmp_path / "a.jpg")


def test_head_importance_of_a_large_model_stays_legible(tmp_path):
    grid = [[(layer - 20) * (head - 30) / 100 for head in range(64)] for layer in range(40)]
    plots.head_importance({"512": grid, "2048": grid}, tmp_path / "heads.png", label="nats", title="large")
    width, height = struct.unpack(">II", (tmp_path / "heads.png").read_bytes()[16:24])
    assert width < 5000 and height > 800
