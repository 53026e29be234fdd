"""Inputs and artifacts at addresses, and folders that are columns: the output is that of the same files on this machine."""

import dataclasses
import functools
import http.server
import json
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from glintru_rec import GlintRU
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import export_artifact
from glintru_rec.scoring import ScoreConfig, score, update_states
from glintru_rec.scoring.addresses import RemoteFolder
from glintru_rec.scoring.fragments import Stamp
from glintru_rec.scoring.index import IndexConfig
from glintru_rec.scoring.lease import STALE_SECONDS, Lease
from glintru_rec.scoring.ledger import Record
from glintru_rec.scoring.remote_ledger import LEASE_FILE, RemoteLedger
from tests.conftest import REPOSITORY, environment, keys_of

NUM_ITEMS, WIDTH, NUM_ROWS = 60, 16, 20


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    vocabulary = Vocabulary(pa.array(range(NUM_ITEMS)), np.ones(NUM_ITEMS, dtype=np.int64))
    options = {"max_seq_len": 20, "encoder_config": {}, "provenance": {}}
    export_artifact(GlintRU(WIDTH), "dot", torch.randn(NUM_ITEMS, WIDTH), vocabulary, folder, **options)
    return str(folder)


@pytest.fixture
def config(artifact, tmp_path):
    """A dataset in folders, with one that is no part of it."""
    generator = np.random.default_rng(0)
    for name in ("day=3/country=se/a", "day=12/country=s%C3%A3o%20tom%C3%A9/a", "day=12/country=07/b", "_temporary/day=1/a"):
        path = tmp_path / "in" / f"{name}.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        histories = [generator.integers(NUM_ITEMS, size=size) for size in generator.integers(1, 30, NUM_ROWS)]
        histories[7] = []
        group = pa.array([f"group {row % 3}" for row in range(NUM_ROWS)]).dictionary_encode()
        columns = {"user_id": range(NUM_ROWS), "history": histories, "group": group, "weight": np.arange(NUM_ROWS) / 3}
        pq.write_table(pa.table(columns), path, row_group_size=6)
    return ScoreConfig(artifact, str(tmp_path / "in"), str(tmp_path / "out"), "top_k", top_k=5, batch_size=8)


@pytest.fixture
def memory():
    system = fsspec.filesystem("memory")
    yield system
    system.rm("/", recursive=True)


@pytest.fixture
def server(tmp_path):
    """The test's folder at an http address; parts of a file called busy are refused."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            if "busy" in self.path and "Range" in self.headers:
                self.send_error(503)
            else:
                super().do_GET()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(tmp_path)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def outputs(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(Path(folder).rglob("*.parquet"))}


def test_an_address_gives_what_the_folder_gives(config, tmp_path, memory):
    local = dataclasses.replace(config, keep_columns=["day", "country"])
    expected = score(local)
    memory.put(f"{config.input}/", "/data/in/", recursive=True)
    memory.put(f"{config.artifact}/", "/models/artifact/", recursive=True)
    elsewhere = {
        "folder": {"input": "memory://data/in", "artifact": "memory://models/artifact"},
        "glob": {"input": "memory://data/in/day=*/*/*.parquet"},
        "file": {"input": f"file://{config.input}", "artifact": f"file://{config.artifact}"},
    }
    for name, changes in elsewhere.items():
        report = score(dataclasses.replace(local, output=str(tmp_path / name), **changes))
        assert (report.rows_in, report.rows_scored) == (expected.rows_in, expected.rows_scored) == (60, 57)
        assert outputs(tmp_path / name) == outputs(config.output)
    assert len(outputs(config.output)) == 3 + 3  # rows without a history are in rejects/
    one = dataclasses.replace(config, input="memory://data/in/day=3/country=se/a.parquet", output=str(tmp_path / "one"))
    assert score(one).rows_in == NUM_ROWS


def test_an_output_elsewhere_is_that_of_this_machine(config, tmp_path, memory, monkeypatch):
    """A job that dies before its last record goes on there; another job is refused."""
    expected = score(config)
    elsewhere = dataclasses.replace(config, output="memory://results/best")
    monkeypatch.setattr("glintru_rec.scoring.addresses.RemoteFolder.put", dies_at(6))
    with pytest.raises(KeyboardInterrupt):
        score(elsewhere)
    monkeypatch.undo()
    # begun.json, two files and the record of the first fragment, and the files of the second
    assert sum(name.endswith(".parquet") for name in memory.find("/results/best")) == 4
    report = score(elsewhere)
    assert (report.timing.fragments_before, report.timing.fragments_now) == (1, 2)
    assert dataclasses.replace(report, timing=expected.timing) == expected
    memory.get("/results/best", str(tmp_path / "copy"), recursive=True)
    assert outputs(tmp_path / "copy") == outputs(config.output)
    names = {path.name for path in (tmp_path / "copy").iterdir()}
    assert {"_SUCCESS", "report.json", ".job", "rejects"} <= names
    assert score(elsewhere).timing.fragments_now == 0

    (lost,) = memory.glob("/results/best/day=3*.parquet")
    memory.rm(lost)
    assert score(elsewhere).timing.fragments_now == 1
    assert memory.cat(lost) == (tmp_path / "copy" / Path(lost).name).read_bytes()
    with pytest.raises(InputError, match="output 'memory://results/best' was begun by another job: top_k was 5, now 6"):
        score(dataclasses.replace(elsewhere, top_k=6))
    with pytest.raises(InputError, match="output 'memory://results' is not empty"):
        score(dataclasses.replace(elsewhere, output="memory://results"))


def test_lists_and_events_elsewhere(config, tmp_path, memory, server):
    """What is copied gives what it gives where it lies, and is named as it lies there."""
    pq.write_table(pa.table({"item_id": range(0, NUM_ITEMS, 2)}), tmp_path / "allow.parquet")
    pq.write_table(pa.table({"item_id": range(9)}), tmp_path / "deny.parquet")
    memory.put(str(tmp_path / "allow.parquet"), "/lists/allow.parquet")
    score(dataclasses.replace(config, allow=str(tmp_path / "allow.parquet"), deny=str(tmp_path / "deny.parquet")))
    elsewhere = {"allow": "memory://lists/allow.parquet", "deny": f"{server}/deny.parquet?sig=1"}
    score(dataclasses.replace(config, **elsewhere, output=str(tmp_path / "listed")))
    assert outputs(tmp_path / "listed") == outputs(config.output)

    for day in (1, 2):
        items = pa.array([3 * day, None, 5])
        events = {"user_id": [1, 2, day], "item_id": items, "timestamp": [10 * day, 10 * day, 10 * day + 1]}
        path = tmp_path / "events" / f"day={day}" / "a.parquet"
        path.parent.mkdir(parents=True)
        pq.write_table(pa.table(events), path)
    memory.put(f"{tmp_path}/events/", "/events/", recursive=True)
    memory.put(f"{config.artifact}/", "/models/artifact/", recursive=True)
    update = ScoreConfig(
        config.artifact, str(tmp_path / "events"), str(tmp_path / "updated"), "update", state=str(tmp_path / "states")
    )
    expected = update_states(update)
    places = {"input": "memory://events", "artifact": "memory://models/artifact"}
    others = {"output": str(tmp_path / "far"), "state": str(tmp_path / "far-states")}
    report = update_states(dataclasses.replace(update, **places, **others))
    figures = {"seconds": 0.0, "rows_per_second": 0.0}
    assert dataclasses.replace(report, **figures) == dataclasses.replace(expected, **figures)
    assert (report.events_applied, report.rows_in) == (4, 6)
    written, wanted = (
        {name: pq.read_table(tmp_path / folder / name) for name in outputs(tmp_path / folder)} for folder in ("far", "updated")
    )
    assert written["part-00000.parquet"] == wanted["part-00000.parquet"]
    (rejects,) = (table for name, table in written.items() if name.startswith("rejects/"))
    assert rejects["fragment"].to_pylist() == [f"memory:///events/day={day}/a.parquet" for day in (1, 2)]
    assert update_states(dataclasses.replace(update, **places, **others)) == report  # the same again changes nothing


def test_two_jobs_on_one_output_elsewhere(config, tmp_path):
    """The first one is a process of its own, stopped while it writes, and killed."""
    for number in range(60):
        shutil.copy(f"{config.input}/day=3/country=se/a.parquet", tmp_path / "in" / f"{number}.parquet")
    score(config)
    elsewhere = dataclasses.replace(config, output=f"local://{tmp_path}/far")
    arguments = [
        f"{key}={value}" for key, value in keys_of(elsewhere).items() if key in ("artifact", "input", "output", "mode")
    ]
    command = [sys.executable, "-m", "launch.score", *arguments, "top_k=5", "batch_size=8"]
    first = subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL)
    lease = tmp_path / "far" / LEASE_FILE
    try:
        while not (tmp_path / "far" / ".job" / "0.parquet.json").exists():
            assert first.poll() is None
            time.sleep(0.005)
        first.send_signal(signal.SIGSTOP)
        assert not (tmp_path / "far" / "_SUCCESS").exists()
        with pytest.raises(InputError, match=rf"is being written by another job \(process {first.pid} on .*wait for its end"):
            score(elsewhere)
        assert json.loads(lease.read_text())["process"] == first.pid
    finally:
        first.kill()
        first.wait()
    report = score(elsewhere)
    assert report.timing.fragments_before >= 1
    assert report.timing.fragments_now >= 1
    assert outputs(tmp_path / "far") == outputs(config.output)
    assert not lease.exists()


def test_a_lease_of_another_machine_is_stale_once_it_is_old(config, memory, monkeypatch):
    monkeypatch.setattr("glintru_rec.scoring.lease._SECONDS_TO_WRITE", 0.01)
    elsewhere = dataclasses.replace(config, output="memory://results")
    place = f"/results/{LEASE_FILE}"

    def left_by(seconds_ago):
        memory.pipe(place, json.dumps({"job": "1", "host": "far", "process": 7, "renewed": time.time() - seconds_ago}).encode())

    left_by(STALE_SECONDS - 30)
    with pytest.raises(InputError, match=r"process 7 on far, last heard of 57\d s ago.*free again 10 minutes later"):
        score(elsewhere)
    assert memory.find("/results") == [place]
    left_by(STALE_SECONDS + 1)
    assert score(elsewhere).timing.fragments_now == 3
    assert not memory.exists(place)
    memory.pipe(place, b"")  # killed while it made the file
    assert score(elsewhere).timing.fragments_now == 0


def test_a_job_whose_lease_is_taken_stops(memory, monkeypatch):
    monkeypatch.setattr("glintru_rec.scoring.lease.RENEW_SECONDS", 0.01)
    remote = RemoteFolder("memory://results")
    lease = Lease(remote, LEASE_FILE)
    with lease.held():
        first = json.loads(remote.read(LEASE_FILE))
        while json.loads(remote.read(LEASE_FILE))["renewed"] == first["renewed"]:
            time.sleep(0.01)
        lease.check()
        remote.write(LEASE_FILE, b'{"job": "other"}')

        def write_on():
            while True:
                lease.check()
                time.sleep(0.01)

        with pytest.raises(InputError, match="was taken over by another job"):
            write_on()
    assert json.loads(remote.read(LEASE_FILE)) == {"job": "other"}


def test_a_rank_that_is_not_the_first_reads_nothing_of_an_output(config, tmp_path, memory, monkeypatch):
    """The first one may be changing it by then."""
    score(dataclasses.replace(config, output="memory://results"))
    monkeypatch.delattr(RemoteFolder, "get")
    (tmp_path / "rank-1").mkdir()
    ledger = RemoteLedger(RemoteFolder("memory://results"), tmp_path / "rank-1", {}, [])
    ledger.write("a.parquet", Record(Stamp(1, 2), error="damaged"))
    assert json.loads(memory.cat("/results/.job/a.parquet.json"))["error"] == "damaged"


def dies_at(nth):
    """Give a `RemoteFolder.put` that is interrupted instead of its n-th call."""
    real, calls = RemoteFolder.put, []

    def put(*arguments):
        calls.append(arguments)
        if len(calls) == nth + 1:
            raise KeyboardInterrupt
        real(*arguments)

    return put


def test_a_changed_file_is_another_input(config, tmp_path, memory):
    memory.put(f"{config.input}/day=3/country=se/a.parquet", "/data/a.parquet")
    remote = dataclasses.replace(config, input="memory://data")
    score(remote)
    assert score(remote).timing.fragments_now == 0
    memory.put(f"{config.input}/_temporary/day=1/a.parquet", "/data/a.parquet")
    with pytest.raises(InputError, match=r"was begun by another job: input file 'memory:///data/a.parquet' was changed"):
        score(remote)


def test_files_of_a_web_server(config, tmp_path, server):
    """What cannot be read is named, and the rest scored."""
    path = f"{config.input}/day=12/country=07/b.parquet"
    score(dataclasses.replace(config, input=path))
    address = f"{server}/in/day=12/country=07/b.parquet"
    score(dataclasses.replace(config, input=address, output=str(tmp_path / "web")))
    assert outputs(tmp_path / "web") == outputs(config.output)
    refused = dataclasses.replace(config, input=f"{server}/in/none.parquet", output=str(tmp_path / "none"))
    with pytest.raises(InputError, match=r"input 'http://.*none.parquet' matches no file"):
        score(refused)
    signed = dataclasses.replace(config, input=f"{address}?sig=a*b[c]/d", output=str(tmp_path / "signed"))
    score(signed)
    assert outputs(tmp_path / "signed") == outputs(config.output)
    shutil.copy(path, tmp_path / "busy.parquet")
    with pytest.raises(InputError, match=r"'http://.*busy.parquet' is not readable parquet: 503"):
        score(dataclasses.replace(refused, input=f"{server}/busy.parquet"))
    with pytest.raises(InputError, match=r"'.job/lease' cannot be written to 'http://.*other': 501"):
        score(dataclasses.replace(config, output=f"{server}/other"))


def test_columns_to_keep_and_folders(config, tmp_path):
    """Rows keep what is theirs; `day` is an integer, `country` is not, though one country is."""
    score(dataclasses.replace(config, keep_columns=["weight", "country", "group", "day"]))
    files = {path.name: pq.read_table(path, partitioning=None) for path in sorted((tmp_path / "out").glob("*.parquet"))}
    names = ["day=12__country=07__b", "day=12__country=s%C3%A3o%20tom%C3%A9__a", "day=3__country=se__a"]
    assert list(files) == [f"{name}.parquet" for name in names]
    kept = [row for row in range(NUM_ROWS) if row != 7]
    for (day, country), table in zip([(12, "07"), (12, "são tomé"), (3, "se")], files.values()):
        assert table.column_names == ["user_id", "item_ids", "scores", "weight", "country", "group", "day"]
        assert [table.schema.field(name).type for name in ("country", "group", "day")] == [pa.string(), pa.string(), pa.int64()]
        assert table["user_id"].to_pylist() == kept
        assert table["weight"].to_pylist() == [row / 3 for row in kept]
        assert table["group"].to_pylist() == [f"group {row % 3}" for row in kept]
        assert set(table["country"].to_pylist()) == {country}
        assert set(table["day"].to_pylist()) == {day}


def test_a_folder_can_be_the_user(config, tmp_path):
    score(dataclasses.replace(config, user_column="country", mode="encode"))
    table = pq.read_table(tmp_path / "out" / "day=3__country=se__a.parquet", partitioning=None)
    assert table["user_id"].to_pylist() == ["se"] * (NUM_ROWS - 1)


def test_a_folder_without_a_value_is_null(config, tmp_path):
    path = tmp_path / "more" / "day=__HIVE_DEFAULT_PARTITION__" / "a.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(pq.read_table(f"{config.input}/day=3/country=se/a.parquet", partitioning=None), path)
    score(dataclasses.replace(config, input=str(path), keep_columns=["day"]))
    days = pq.read_table(tmp_path / "out" / "a.parquet", partitioning=None)["day"]
    assert (days.null_count, len(days)) == (NUM_ROWS - 1, NUM_ROWS - 1)


def test_what_cannot_be_used(config, tmp_path, memory):
    def refused(message, **changes):
        with pytest.raises(InputError, match=message):
            score(dataclasses.replace(config, **changes))
        assert not (tmp_path / "out").exists()

    refused("input 'memory://none' matches no file", input="memory://none")
    refused("input 'gopher://x' cannot be listed: Protocol not known: gopher", input="gopher://x")
    refused("artifact 'memory://none' cannot be fetched", artifact="memory://none")
    with pytest.raises(InputError, match="input 'memory://none' matches no file"):
        update_states(dataclasses.replace(config, input="memory://none", mode="update", state=str(tmp_path / "states")))
    refused("'gopher://x' is no address that fsspec knows: Protocol not known: gopher", output="gopher://x")
    refused("output is 'memory://o'; it must be a path of this machine in", output="memory://o", mode="update", state="s")
    refused("state is 'memory://s'; it must be a path of this machine, as states", mode="update", state="memory://s")
    refused("deny 'memory://none' cannot be fetched", deny="memory://none")
    refused("index.folder is ''; it must be a folder of this machine", artifact="memory://m", index=IndexConfig("ivf"))
    refused("has no column 'month'; it has .*'day', 'country'", keep_columns=["day", "month", "country"])
    refused("keep_columns is .'scores'.; it must be without scores", keep_columns=["scores"])
    refused("keep_columns is .'a', 'A'.; it must be different names", keep_columns=["a", "A"])
    refused("keep_columns is .'a'.; it must be left out, as mode is 'items'", keep_columns=["a"], mode="items", input="")
    memory.pipe("/bad/a.parquet", b"PAR1 and no more")
    refused("'memory:///bad/a.parquet' is not readable parquet", input="memory://bad")
