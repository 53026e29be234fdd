"""The stages of a scoring job: bounded, in order, and with one output whatever the threads and ranks."""

import ctypes
import dataclasses
import json
import os
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from glintru_rec import GlintRU, memory
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, export_artifact
from glintru_rec.memory import FreedMemory
from glintru_rec.scoring import ScoreConfig, score
from glintru_rec.scoring.fragments import find_inputs, open_fragments
from glintru_rec.scoring.pipeline import READ_AHEAD, map_in_order, one_thread_each, read_ahead
from glintru_rec.scoring.ranks import share_out
from glintru_rec.scoring.rows import Columns, Limits
from tests.conftest import keys_of, run_program

NUM_ITEMS, WIDTH = 300, 32


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    vocabulary = Vocabulary(pa.array(range(NUM_ITEMS)), np.ones(NUM_ITEMS, dtype=np.int64))
    options = {"max_seq_len": 50, "encoder_config": {}, "provenance": {}}
    export_artifact(GlintRU(WIDTH), "dot", torch.randn(NUM_ITEMS, WIDTH), vocabulary, folder, **options)
    return str(folder)


def write_parts(folder, sizes):
    folder.mkdir()
    for number, num_rows in enumerate(sizes):
        generator = np.random.default_rng(number)
        lengths = generator.integers(1, 60, num_rows)
        items = pa.array(generator.integers(NUM_ITEMS + 5, size=lengths.sum()))
        history = pa.ListArray.from_arrays(pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32()), items)
        users = pa.array(np.arange(num_rows), mask=generator.random(num_rows) < 0.05)
        pq.write_table(
            pa.table({"user_id": users, "history": history, "candidates": history}), folder / f"part-{number}.parquet"
        )
    return str(folder)


def outputs(folder):
    """All files that hold rows."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.parquet"))}


class TestThreads:
    @pytest.fixture(autouse=True)
    def restored(self):
        before = torch.get_num_threads()
        yield
        torch.set_num_threads(before)

    @pytest.mark.parametrize("mode", ["candidates", "top_k"])
    def test_scores_are_equal_to_the_byte_with_any_number(self, artifact, tmp_path, mode):
        """Batches are so large that torch would share an operation among its threads (from 2**15 elements on)."""
        source = write_parts(tmp_path / "in", [1501])
        written = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            output = tmp_path / f"out-{num_threads}"
            score(ScoreConfig(artifact, source, str(output), mode, top_k=20, batch_size=500))
            assert torch.get_num_threads() == num_threads
            written.append(outputs(output))
        assert "part-0.parquet" in written[0]
        assert written[0] == written[1] == written[2]

    def test_every_thread_runs_an_operation_by_itself(self):
        torch.set_num_threads(3)
        with one_thread_each("cpu") as num_threads:
            inside = list(map_in_order(lambda _: torch.get_num_threads(), iter(range(6)), num_threads))
        assert (num_threads, inside, torch.get_num_threads()) == (3, [1] * 6, 3)
        with one_thread_each("cuda:0") as num_threads:
            assert num_threads == 1


class TestQueues:
    def test_results_come_in_the_order_of_the_input(self):
        """The first item waits for the second one's end."""
        second_is_done = threading.Event()

        def work(item):
            if item == 0:
                assert second_is_done.wait(60)
            if item == 1:
                second_is_done.set()
            return item * item

        assert list(map_in_order(work, read_ahead(iter(range(50))), 2)) == [item * item for item in range(50)]

    def test_a_slow_writer_stops_the_reader(self):
        drawn = []

        def source():
            for item in range(1000):
                drawn.append(item)
                yield item

        results = map_in_order(lambda item: item, read_ahead(source()), 3)
        for written in range(100):
            assert next(results) == written
            assert len(drawn) <= written + 1 + 3 + 1 + READ_AHEAD
        results.close()
        assert len(drawn) < 110

    @pytest.mark.parametrize("where", ["source", "work"])
    def test_an_error_reaches_the_writer(self, where):
        def source():
            yield from range(5)
            if where == "source":
                raise InputError("damaged")
            yield 5

        def work(item):
            if item == 5:
                raise InputError("damaged")
            return item

        with pytest.raises(InputError, match="damaged"):
            list(map_in_order(work, read_ahead(source()), 2))


def test_lists_of_one_to_a_hundred_thousand_in_one_file(artifact, tmp_path):
    """Long lists make small batches; one that is longer than allowed is set aside."""
    lengths = np.ones(120, dtype=np.int64)
    lengths[50:80] = 100_000
    lengths[100] = 100_001
    generator = np.random.default_rng(0)
    items = generator.integers(NUM_ITEMS, size=lengths.sum())
    offsets = np.concatenate([[0], lengths.cumsum()])
    candidates = pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), pa.array(items))
    history = pa.array([[user, user + 1] for user in range(120)])
    source = tmp_path / "in.parquet"
    pq.write_table(pa.table({"user_id": range(120), "history": history, "candidates": candidates}), source)

    columns, vocabulary = Columns("user_id", "history", "candidates"), Artifact.load(artifact).vocabulary
    (file,) = find_inputs(str(source))
    batches = list(open_fragments([file], columns, vocabulary)[file.name].read(120, vocabulary, Limits(100_000, False)))
    assert [rows.num_read for rows in batches] == [60, 30, 30]

    config = ScoreConfig(artifact, str(source), str(tmp_path / "out"), "candidates", batch_size=120)
    assert score(config).rows_set_aside == {"too_many_candidates": 1}
    out = pq.read_table(tmp_path / "out" / "in.parquet", partitioning=None)
    kept = np.delete(np.arange(120), 100)
    assert out["user_id"].to_pylist() == kept.tolist()
    score(dataclasses.replace(config, mode="encode", output=str(tmp_path / "queries")))
    queries = np.array(pq.read_table(tmp_path / "queries" / "in.parquet", partitioning=None)["embedding"].to_pylist())
    vectors = Artifact.load(artifact).module.item_vectors.numpy().astype(np.float64)
    expected = np.einsum("cd,cd->c", queries[np.repeat(np.arange(120), lengths)], vectors[items])
    expected = np.delete(expected, np.arange(offsets[100], offsets[101]))
    np.testing.assert_allclose(out["scores"].combine_chunks().flatten(), expected, rtol=0, atol=1e-4)


def test_files_are_dealt_out_by_their_rows():
    sizes = {"a": 5, "b": 1, "c": 4, "d": 0, "e": 3}
    assert share_out(sizes, 1) == [["a", "b", "c", "d", "e"]]
    assert share_out(sizes, 2) == [["a", "b", "d"], ["c", "e"]]
    assert sorted(name for share in share_out(sizes, 7) for name in share) == sorted(sizes)


@pytest.mark.programs
def test_ranks_write_what_one_process_writes(artifact, tmp_path):
    """Four ranks for three files, one of which cannot be read; when it is mended, one process goes on."""
    source = write_parts(tmp_path / "in", [200, 90, 120])
    whole = (tmp_path / "in" / "part-1.parquet").read_bytes()
    (tmp_path / "in" / "part-1.parquet").write_bytes(whole[:-20])
    config = ScoreConfig(artifact, source, str(tmp_path / "four"), "top_k", top_k=7, batch_size=50)
    arguments = [f"{key}={value}" for key, value in keys_of(config).items() if value != ""]
    result = run_program("score", *arguments, nproc=4, check=False)
    assert result.returncode != 0
    assert result.stderr.count("error: 1 of 3 input file(s) could not be read") == 1
    assert not (tmp_path / "four" / "_SUCCESS").exists()
    written = json.loads((tmp_path / "four" / "report.json").read_text())
    assert (written["rows_in"], written["timing"]["fragments_now"], list(written["failed"])) == (320, 2, ["part-1.parquet"])

    (tmp_path / "in" / "part-1.parquet").write_bytes(whole)
    report = score(config)
    assert (report.timing.fragments_before, report.timing.fragments_now) == (2, 1)
    alone = dataclasses.replace(config, output=str(tmp_path / "one"))
    score(alone)
    assert outputs(tmp_path / "four") == outputs(tmp_path / "one")
    assert (tmp_path / "four" / "_SUCCESS").exists()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
def test_memory_freed_between_what_is_kept_goes_back_when_it_is_time(monkeypatch):
    """Every hundredth of many small pieces is kept, so nothing lies free at the end of the heap."""
    library = ctypes.CDLL(None)
    library.malloc.restype, library.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    pieces = [library.malloc(1 << 14) for _ in range(10_000)]
    for piece in pieces:
        ctypes.memset(piece, 1, 1 << 14)
    for number, piece in enumerate(pieces):
        if number % 100:
            library.free(piece)

    def resident():
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    give_back = FreedMemory()
    before = resident()
    give_back()
    assert before - resident() < 10 << 20
    monkeypatch.setattr(memory, "SECONDS_BETWEEN", 0.0)
    give_back()
    assert before - resident() > 100 << 20
    for piece in pieces[::100]:
        library.free(piece)
