"""A scoring job goes on: whatever kills it or damages its input, the same command again ends as if nothing had happened."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from glintru_rec import GlintRU
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import export_artifact
from glintru_rec.programs.score import score_program
from glintru_rec.scoring import ScoreConfig, score
from tests.conftest import REPOSITORY, environment, keys_of, run_program

NUM_ITEMS, WIDTH, NUM_FILES, NUM_ROWS = 40, 16, 4, 30
COUNTS = np.random.default_rng(0).permutation(NUM_ITEMS) // 2 + 2**40  # in pairs, and equal as float32


def export(folder: Path, seed: int = 0, item_bias: bool = False) -> str:
    torch.manual_seed(seed)
    vectors, vocabulary = torch.randn(NUM_ITEMS, WIDTH + item_bias), Vocabulary(pa.array(range(NUM_ITEMS)), COUNTS)
    options = {"max_seq_len": 20, "encoder_config": {}, "provenance": {}}
    export_artifact(GlintRU(WIDTH), "dot", vectors, vocabulary, folder, **options)
    return str(folder)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return export(tmp_path_factory.mktemp("artifact") / "artifact")


def write_part(folder: Path, number: int) -> Path:
    """A row without a user, one with an unknown candidate, and others."""
    generator = np.random.default_rng(number)
    histories = [generator.integers(NUM_ITEMS, size=1 + row % 9).tolist() for row in range(NUM_ROWS)]
    candidates = [generator.integers(NUM_ITEMS, size=row % 4).tolist() for row in range(NUM_ROWS - 1)]
    path = folder / f"part-{number}.parquet"
    folder.mkdir(exist_ok=True)
    users = [None, *range(1, NUM_ROWS)]
    pq.write_table(pa.table({"user_id": users, "history": histories, "candidates": [*candidates, [3, 999]]}), path)
    return path


@pytest.fixture
def parts(tmp_path):
    return [write_part(tmp_path / "in", number) for number in range(NUM_FILES)]


@pytest.fixture
def config(artifact, parts, tmp_path):
    return ScoreConfig(artifact, str(tmp_path / "in"), str(tmp_path / "out"), "candidates", top_k=5, batch_size=8)


def contents(folder: str | Path) -> dict[str, bytes]:
    """All files, less what may differ: how long it took, and where the output is."""
    read = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".json":
                fields = json.loads(content)
                fields.pop("timing", None)
                fields.get("config", {}).pop("output", None)
                content = json.dumps(fields).encode()
            read[str(path.relative_to(folder))] = content
    return read


def identities(paths) -> list[tuple[int, int]]:
    """Tell whether files were written again."""
    return [(path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]


def undisturbed(config: ScoreConfig) -> dict[str, bytes]:
    other = dataclasses.replace(config, output=config.output + "-undisturbed")
    score(other)
    return contents(other.output)


# Forks a process for every trial, so that each starts at once. It dies by SIGKILL when the function that is named is called for
# the n-th time, before or after its work.
KILLER = """
import importlib, json, os, signal, sys
from glintru_rec.scoring import ScoreConfig, score

def arrange(module, name, nth, moment):
    where = importlib.import_module("glintru_rec.scoring." + module)
    real, calls = getattr(where, name), []
    def die(*arguments):
        calls.append(arguments)
        if len(calls) == nth and moment == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        real(*arguments)
        if len(calls) == nth:
            os.kill(os.getpid(), signal.SIGKILL)
    setattr(where, name, die)

for config, *trial in json.load(sys.stdin):
    child = os.fork()
    if child == 0:
        try:
            arrange(*trial)
            score(ScoreConfig(**config))
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL, trial
"""

# With the number of input files that have their record by then.
MOMENTS = [
    ("ledger", "write_json", 1, "before", 0),  # the output holds a lock and nothing else
    ("ledger", "write_json", 1, "after", 0),
    ("writer", "publish", 4, "before", 1),  # files grown, none of the second fragment published
    ("writer", "publish", 5, "after", 1),  # beside the scores, which are not there
    ("ledger", "write_json", 3, "before", 1),  # all files of the second fragment, but no record
    ("ledger", "write_json", 3, "after", 2),
    ("job", "write_json", 1, "before", 4),  # no report
    ("job", "write_json", 1, "after", 4),
    ("job", "write_text", 1, "after", 4),
]


@pytest.mark.programs
def test_a_job_killed_between_any_two_steps_goes_on(config):
    configs = [dataclasses.replace(config, output=f"{config.output}-{number}") for number in range(len(MOMENTS))]
    trials = json.dumps([(keys_of(each), *moment[:4]) for each, moment in zip(configs, MOMENTS)])
    subprocess.run([sys.executable, "-c", KILLER], input=trials, text=True, check=True, cwd=REPOSITORY, env=environment())
    expected = undisturbed(config)
    for each, (*_, done) in zip(configs, MOMENTS):
        output = Path(each.output)
        kept = [path for path in output.glob("*.parquet") if (output / ".job" / f"{path.name}.json").exists()]
        before = identities(kept)
        assert len(kept) == done
        report = score(each)
        assert (report.timing.fragments_before, report.timing.fragments_now) == (done, NUM_FILES - done)
        assert identities(kept) == before
        assert contents(output) == expected


@pytest.mark.programs
def test_chaos(tmp_path):
    command = [sys.executable, "tools/chaos.py", "score", "kills=4", "seed=3", "files=4", "rows=500", f"output={tmp_path}"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "equal: " in result.stdout
    assert "; 4 kills" in result.stdout


def test_a_finished_job_run_again_does_nothing(config):
    first = score(config)
    files = [path for path in Path(config.output).rglob("*") if path.is_file() and path.name != "lock"]
    before = identities(files)
    again = score(config)
    assert identities(files) == before
    assert (again.timing.fragments_before, again.timing.fragments_now) == (NUM_FILES, 0)
    assert dataclasses.replace(again, timing=first.timing) == first
    assert first.rows_in == NUM_FILES * NUM_ROWS
    assert first.rows_set_aside == {"null_user": NUM_FILES}
    assert set(first.timing.seconds) == {"read", "score", "write"}


def test_a_file_that_was_lost_is_made_again(config):
    score(config)
    expected = contents(config.output)
    (Path(config.output) / "part-1.parquet").unlink()
    (Path(config.output) / "unknown_candidates" / "part-2.parquet").write_bytes(b"cut")
    assert score(config).timing.fragments_now == 2
    assert contents(config.output) == expected


class TestAnotherJob:
    """What an output was begun with may not change; the message names what did."""

    @pytest.fixture
    def begun(self, config):
        score(config)
        (Path(config.output) / "_SUCCESS").unlink()
        return config

    def refused(self, config, message):
        before = contents(config.output)
        with pytest.raises(InputError, match=message) as error:
            score(config)
        assert len(str(error.value).splitlines()) == 1
        assert contents(config.output) == before

    def test_config(self, begun):
        self.refused(dataclasses.replace(begun, top_k=6), "begun by another job: top_k was 5, now 6. Run that one again")
        both = dataclasses.replace(begun, mode="encode", batch_size=9)
        self.refused(both, "batch_size was 8, now 9; mode was 'candidates', now 'encode'")

    def test_artifact(self, begun, tmp_path):
        other = dataclasses.replace(begun, artifact=export(tmp_path / "other", seed=1))
        self.refused(other, r"model\.pt of the artifact was '\w+', now '\w+'")

    def test_artifact_and_input_may_lie_elsewhere(self, begun, tmp_path):
        Path(begun.input).rename(tmp_path / "moved")
        moved = dataclasses.replace(begun, input=str(tmp_path / "moved"))
        assert score(moved).timing.fragments_now == 0

    def test_input_changed(self, begun, parts):
        write_part(parts[1].parent, 7).replace(parts[1])
        self.refused(begun, r"input file '.*part-1\.parquet' was changed")

    def test_input_touched(self, begun, parts):
        os.utime(parts[2], ns=(0, 0))
        self.refused(begun, r"input file '.*part-2\.parquet' was changed")

    def test_input_gone(self, begun, parts):
        parts[3].unlink()
        self.refused(begun, r"input file 'part-3\.parquet' is gone")

    def test_input_new(self, begun, parts):
        write_part(parts[0].parent, 9)
        self.refused(begun, r"input file '.*part-9\.parquet' is new")

    def test_many_changes_are_counted(self, begun, parts):
        for part in parts:
            os.utime(part, ns=(0, 0))
        self.refused(begun, r"part-2\.parquet' was changed and 1 more\.")

    def test_anything_else_in_the_output(self, begun):
        (Path(begun.output) / "part-9.parquet").write_text("mine")
        self.refused(begun, r"holds 'part-9\.parquet', which is not of this job")


def test_an_input_file_written_while_it_is_read_fails(config, parts, monkeypatch):
    def grown(rows, *arguments):
        os.utime(parts[1], ns=(0, 0))
        return decode(rows, *arguments)

    from glintru_rec.scoring.fragments import decode

    monkeypatch.setattr("glintru_rec.scoring.fragments.decode", grown)
    report = score(config)
    assert list(report.failed) == ["part-1.parquet"]
    assert "was changed while it was read" in report.failed["part-1.parquet"]


@pytest.mark.programs
def test_two_jobs_on_one_output_refuse_each_other(config, tmp_path):
    """The first waits in its report of progress; killed, it holds nothing."""
    holding = """
import json, sys, time
from glintru_rec.scoring import ScoreConfig, score

def hold(done, total):
    print("holding", flush=True)
    time.sleep(600)

score(ScoreConfig(**json.loads(sys.argv[1])), hold)
"""
    command = [sys.executable, "-c", holding, json.dumps(keys_of(config))]
    first = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, text=True)
    try:
        assert first.stdout.readline() == "holding\n"
        with pytest.raises(InputError, match="is being written by another job"):
            score(config)
    finally:
        first.kill()
        first.wait()
    assert score(config).timing.fragments_now == NUM_FILES
    assert contents(config.output) == undisturbed(config)


def damage(part: Path, how: str) -> None:
    content = part.read_bytes()
    if how == "truncated":
        part.write_bytes(content[: len(content) // 2])
    elif how == "not parquet":
        part.write_text("user_id,history\n")
    elif how == "wrong columns":
        pq.write_table(pa.table({"user_id": [1]}), part)
    else:  # its footer is whole: found out when the rows are read
        part.write_bytes(content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :])


@pytest.mark.parametrize("how", ["truncated", "not parquet", "wrong columns", "damaged inside"])
def test_the_other_files_are_finished_and_the_mended_one_is_done_alone(config, parts, how):
    damage(parts[1], how)
    output = Path(config.output)
    for call in range(2):  # it stays so until it is mended
        report = score(config)
        assert report.timing.fragments_now == (NUM_FILES - 1 if call == 0 else 0)
        assert (report.rows_in, report.fragments) == ((NUM_FILES - 1) * NUM_ROWS, NUM_FILES)
        assert str(parts[1]) in report.failed["part-1.parquet"]
        assert json.loads((output / "report.json").read_text())["failed"] == report.failed
        names = {path.name for path in output.iterdir()}
        assert names == {
            ".job",
            *(part.name for part in parts if part != parts[1]),
            "rejects",
            "report.json",
            "unknown_candidates",
        }
        assert not list(output.rglob("*/part-1.parquet"))
        assert not list(output.rglob(".partial*"))
    write_part(parts[1].parent, 1)
    report = score(config)
    assert (report.timing.fragments_before, report.timing.fragments_now) == (NUM_FILES - 1, 1)
    assert report.failed == {}
    ours, theirs = contents(config.output), undisturbed(config)
    for each in (ours, theirs):
        del each[".job/begun.json"]  # it knows the file as it was
    assert ours == theirs


@pytest.mark.programs
def test_the_exit_status_tells_of_unreadable_files(config, parts):
    damage(parts[1], "truncated")
    arguments = [f"{key}={getattr(config, key)}" for key in ("artifact", "input", "output", "mode")]
    result = run_program("score", *arguments, check=False)
    assert result.returncode == 3
    assert f"error: '{parts[1]}' is not readable parquet" in result.stderr
    assert "error: 1 of 4 input file(s) could not be read" in result.stderr


def test_the_program_says_what_was_left_to_do(config, parts, capsys):
    damage(parts[1], "truncated")
    assert score_program(config) == 3
    write_part(parts[1].parent, 1)
    assert score_program(config) == 0
    assert "files done before 3, now 1" in capsys.readouterr().out
    assert score_program(config) == 0
    assert "nothing was left to score" in capsys.readouterr().out


class TestEmptyHistories:
    """Without a known item in the history, popularity is what is left."""

    HISTORIES = ([], [1, 2], [999], None)

    def run(self, tmp_path, artifact, mode, **options):
        source = tmp_path / "in.parquet"
        lists = pa.array(self.HISTORIES, pa.list_(pa.int64()))
        pq.write_table(pa.table({"user_id": range(4), "history": lists, "candidates": [[3, 4], [5], [7, 999], [1]]}), source)
        config = ScoreConfig(artifact, str(source), str(tmp_path / "out"), mode, top_k=6, empty_history="popular", **options)
        report = score(config)
        assert (report.rows_scored, report.fallback, report.rows_set_aside) == (3, 2, {"null_history": 1})
        assert report.unknown_history_items == 1
        return pq.read_table(tmp_path / "out" / "in.parquet", partitioning=None).to_pylist()

    def test_counts_rank_the_catalog(self, artifact, tmp_path):
        best = np.argsort(-COUNTS, kind="stable")[:6]
        rows = self.run(tmp_path, artifact, "top_k")
        for row in (rows[0], rows[2]):
            assert row["item_ids"] == best.tolist()
            assert row["scores"] == COUNTS[best].astype(np.float32).tolist()
        assert rows[1]["item_ids"] != best.tolist()

    def test_counts_score_the_candidates(self, artifact, tmp_path):
        rows = self.run(tmp_path, artifact, "candidates")
        assert [row["item_ids"] for row in rows] == [[3, 4], [5], [7]]
        assert rows[0]["scores"] == COUNTS[[3, 4]].astype(np.float32).tolist()
        assert rows[2]["scores"] == COUNTS[[7]].astype(np.float32).tolist()
        assert abs(rows[1]["scores"][0]) < 1000

    def test_biases_are_the_better_popularity(self, tmp_path):
        with_bias = export(tmp_path / "artifact", item_bias=True)
        bias = torch.from_numpy(np.load(f"{with_bias}/item_vectors.npy"))[:, WIDTH]
        rows = self.run(tmp_path, with_bias, "top_k")
        for row in (rows[0], rows[2]):
            assert row["item_ids"] == bias.argsort(descending=True)[:6].tolist()
            assert row["scores"] == bias.sort(descending=True).values[:6].tolist()
