"""The page of a run: of a real one, with all that a page can show; and what it says of files that are none."""

import json
import re
import shutil
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.programs.evaluate import EvaluateConfig, EvaluateDataConfig, evaluate_run
from glintru_rec.programs.export import ExportConfig, export_run
from glintru_rec.scoring import ScoreConfig, score
from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "tools"))
from report import main

VOID = ("meta", "link")
BOARD = {
    "title": "Small & quick",
    "rows": [
        {
            "name": "GLINT-RU <small>",
            "group": "ours",
            "note": "",
            "seeds": [0, 1],
            "figures": {"hr@10": {"mean": 0.25, "std": 0.01, "n": 2}, "ndcg@10": {"mean": 0.125, "std": None, "n": 1}},
        }
    ],
    "missing": ["SASRec seed 1"],
}


class Page(HTMLParser):
    """Checks that tags are closed in their order; keeps texts, tags' attributes and figures."""

    def __init__(self, html):
        super().__init__()
        self.open, self.texts, self.attributes = [], [], []
        self.feed(html)
        assert self.open == []
        self.charts = [ElementTree.fromstring(svg) for svg in re.findall("<svg.*?</svg>", html, re.DOTALL)]

    def handle_starttag(self, tag, attrs):
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data.strip())


@pytest.fixture
def report(capsys):
    def run(*arguments, status=0):
        assert main([*map(str, arguments)]) == status
        return capsys.readouterr().err

    return run


@pytest.mark.programs
def test_a_page_says_what_the_run_has(report, run_dir, dataset_dir, tmp_path):
    artifact, scores, evaluation = (str(tmp_path / name) for name in ("artifact", "scores", "evaluation.json"))
    evaluate_run(EvaluateConfig(checkpoint=str(run_dir), output=evaluation, data=EvaluateDataConfig(path=str(dataset_dir))))
    export_run(ExportConfig(checkpoint=str(run_dir), output=artifact))
    SequenceDataset.open(dataset_dir).write_histories(tmp_path / "histories.parquet", "test")
    score(ScoreConfig(artifact, str(tmp_path / "histories.parquet"), scores, "top_k"))
    (tmp_path / "leaderboard.json").write_text(json.dumps(BOARD))
    given = [f"evaluation={evaluation}", f"scores={scores}", f"leaderboard={tmp_path}", f"output={tmp_path / 'page.html'}"]
    report(run_dir, *given)

    html = (tmp_path / "page.html").read_text()
    page = Page(html)
    assert not any(name in ("src", "href") for name, _ in page.attributes)  # nothing beside the page
    headings = {"Training", "Evaluation on test", "Small & quick", "Balance of the item table", "Scoring", "Versions", "Config"}
    assert headings <= set(page.texts)
    metrics = json.loads((tmp_path / "evaluation.json").read_text())["metrics"]
    written = json.loads((tmp_path / "scores" / "report.json").read_text())
    wanted = [f"{metrics['ndcg@10']:.4f}", f"{written['rows_scored']:,}", "0.2500 ± 0.0100", "0.1250", "GLINT-RU <small>"]
    assert set(wanted) <= set(page.texts)

    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    counts = {kind: sum(record["kind"] == kind for record in records) for kind in ("train", "valid")}
    lines = [[len(line.get("points").split()) for line in chart.iter("polyline")] for chart in page.charts]
    assert lines == [[counts["train"]], [counts["valid"]] * 2, [counts["train"]]]


@pytest.mark.programs
def test_a_run_that_goes_on_has_a_page_and_bad_input_a_message(report, run_dir, tmp_path):
    going = tmp_path / "going"
    going.mkdir()
    shutil.copy(run_dir / "metrics.jsonl", going)
    with (going / "metrics.jsonl").open("a") as log:
        log.write('{"kind": "train", "step": 10_000, "lo')
    report(going, f"output={tmp_path / 'page.html'}")
    page = Page((tmp_path / "page.html").read_text())
    assert "not finished" in page.texts
    assert len(page.charts) == 3
    assert "metrics.jsonl' cannot be read" in report(tmp_path, f"output={tmp_path / 'none.html'}", status=2)
    other = report(going, f"evaluation={run_dir / 'finished.json'}", f"output={tmp_path / 'none.html'}", status=2)
    assert "is not what evaluation should be" in other
    (tmp_path / "metrics.jsonl").write_text('{"loss": 1}\n')
    assert "is not what the log of a run should be: KeyError('kind')" in report(tmp_path, "output=x", status=2)
    assert "python tools/report.py RUN_DIR" in report(going, "colour=red", "output=x", status=2)
    assert not (tmp_path / "none.html").exists()
