"""The benchmarks run, and print a figure for every contestant; what the figures are is no test's business."""

import csv
import re
import subprocess
import sys

import pytest

from glintru_rec.errors import InputError
from tests.conftest import REPOSITORY, environment

pytestmark = pytest.mark.programs


def run(tool: str, *arguments: str) -> str:
    command = [sys.executable, str(REPOSITORY / "tools" / tool), *arguments]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=environment())
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


def test_bench_train(dataset_dir):
    few = ["--dim", "16", "--repeats", "1", "--seconds", "0.05"]
    text = run("bench_train.py", str(dataset_dir), "model.options.num_heads=2", *few, "--batch-targets", "256")
    assert len(re.findall(r"targets/s +[\d.]+x", text)) == 2
    assert len(re.findall(r"step [\d.]+ / [\d.]+ / [\d.]+ ms  data [\d.]+%  of matmul \d+%", text)) == 2


def test_bench_ops(tmp_path):
    figures = tmp_path / "benchmarks.csv"
    few = ["--width", "12", "--turns", "1", "--lengths", "beauty", "--only", "gru", "--figures", str(figures)]
    text = run("bench_ops.py", *few)
    assert re.findall(r"^│ (ragged_gru|nn.GRU)", text, re.MULTILINE) == ["ragged_gru", "nn.GRU", "nn.GRU"]
    lines = list(csv.DictReader(figures.open()))
    assert {line["row"] for line in lines} >= {"ceilings", "ragged_gru, D=12, beauty"}
    assert all(float(line["value"]) >= 0 for line in lines)


def test_benchmarks_do_not_measure_what_is_wrong(monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import bench_ops

    everything = list(bench_ops.TABLES)
    assert bench_ops.parity(everything) == []
    right = bench_ops.ragged_gru

    def wrong(*arguments):
        hidden, last = right(*arguments)
        return hidden * 1.001, last

    monkeypatch.setattr(bench_ops, "ragged_gru", wrong)
    assert [line.split(":")[0] for line in bench_ops.parity(everything)] == ["gru 0"]
    monkeypatch.setattr("sys.argv", ["bench_ops.py", "--only", "gru"])
    assert bench_ops.main() == 1


def test_bench_checkpoint(tmp_path):
    text = run("bench_checkpoint.py", "--items", "2000", "--dim", "16", "--saves", "1", "--dir", str(tmp_path))
    assert len(re.findall(r"training waits [\d.]+ s, files take [\d.]+ s", text)) == 2


def test_bench_step():
    text = run("bench_step.py", "--width", "16", "--repeats", "1")
    assert [text.count(f"\n{name}") for name in ("GlintRU ", "RecGRELA", "LRURec")] == [6, 3, 3]


def test_bench_softmax():
    few = ["--targets", "40", "--items", "3000", "--growing", "1000", "20000", "--repeats", "1"]
    text = run("bench_softmax.py", *few)
    assert len(re.findall(r"^ +[\d,]+ +\d+ .*x  (?:in blocks, fp32|full logits)$", text, flags=re.MULTILINE)) == 4
    assert re.search(r"ms in blocks, fp32, [\d,]+ ms on full logits: [\d.]+x$", text, flags=re.MULTILINE)


def test_bench_catalog(tmp_path):
    few = ["--items", "1000", "3000", "--ranks", "1", "2", "--turns", "2", "--steps", "2", "model.options.num_heads=2"]
    text = run("bench_catalog.py", *few, "--figures", str(tmp_path / "benchmarks.csv"))
    assert re.findall(r"│ +([\d,]+) +│ +(\d) +│", text) == [("1,000", "1"), ("3,000", "1"), ("1,000", "2"), ("3,000", "2")]


def test_the_picture_of_catalogs(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import drawing
    from bench_common import note
    from draw_catalog import draw, read_figures

    figures = tmp_path / "benchmarks.csv"
    for ratio in (3.0, 1.5):  # of two runs, the last counts
        rows = [{"items": 100, "ranks": ranks, "ratio": 1.0, "peak_gib": 0.5} for ranks in (1, 2)]
        rows += [{"items": 1000, "ranks": 1, "ratio": ratio, "peak_gib": 2.0}]
        note("bench_catalog", [{"name": f"{row['items']} items, {row['ranks']} ranks", **row} for row in rows], figures)
    found = read_figures(figures)
    assert [row["ratio"] for row in found[1]] == [1.0, 1.5]
    assert list(found) == [1, 2]
    drawing.save(draw(found), tmp_path / "catalog.svg")
    assert "<svg" in (tmp_path / "catalog.svg").read_text()
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(InputError, match="no file of figures"):
        read_figures(tmp_path / "other.csv")


def test_bench_scoring():
    small = ["rows=200", "num_items=50", "dim=8", "history=3"]
    text = run("bench_scoring.py", "candidates", *small, "candidates=5", "repeats=1")
    assert re.findall(r"^(job|encode|numpy|job without encoding) .* rows/s$", text, re.MULTILINE)[:3] == [
        "job",
        "encode",
        "numpy",
    ]
    assert re.search(r"^threads=1 ratio_to_numpy=-?[\d.]+$", text, re.MULTILINE)
    text = run("bench_scoring.py", "memory", *small)
    assert re.search(r"^threads=1 ratio_of_peaks=[\d.]+$", text, re.MULTILINE)
    text = run("bench_scoring.py", "open", "num_items=300", "dim=8", "repeats=1")
    assert re.search(r"^300 items, int8, .*\nseconds_of_module=[\d.]+ seconds_with_vocabulary=[\d.]+$", text, re.MULTILINE)


def test_bench_scoring_of_processes():
    text = run("bench_scoring.py", "ranks", "rows=40", "files=2", "num_items=50", "dim=8", "history=3", "repeats=1")
    assert re.search(r"^threads=1 ratio_of_rates=[\d.]+$", text, re.MULTILINE)
    text = run("bench_scoring.py", "start", "num_items=50", "dim=8", "repeats=1")
    assert re.search(r"^threads=1 seconds_to_first_row=[\d.]+$", text, re.MULTILINE)


def test_bench_scoring_of_top_k():
    pytest.importorskip("faiss")
    text = run("bench_scoring.py", "top_k", "num_items=500", "dim=8", "k=5", "users=9", "repeats=1")
    assert re.search(r"^threads=1 precision=fp32 recall@5=1\.0000 ratio_to_faiss=[\d.]+$", text, re.MULTILINE)
    assert re.search(r"^threads=1 precision=int8 recall@5=(0\.9|1\.0)\d+ ratio_to_faiss=[\d.]+$", text, re.MULTILINE)
