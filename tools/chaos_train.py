"""Kill and stop the workers of training jobs at random moments, and compare what the jobs end with: `tools/chaos.py train`."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from glintru_rec.config import compose
from glintru_rec.data.prepare import PrepareConfig, prepare
from glintru_rec.errors import InputError
from glintru_rec.training.build import load_unsharded
from glintru_rec.training.checkpoint import list_checkpoints, read_state
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import quiet_dependencies

REPOSITORY = Path(__file__).resolve().parents[1]
# Small, quick, and with a checkpoint or a validation under way at many moments. What the command line says comes after.
SMALL = (
    "model.embedding_dim=16",
    "data.max_seq_len=20",
    "trainer.batch_targets=128",
    "trainer.max_epochs=15",
    "trainer.patience=0",
    "trainer.checkpoint_every_steps=5",
    "trainer.log_every_steps=1",
    "trainer.timeout_seconds=20",
)
# Torchelastic gives a worker that has failed, or another failed beside, this long before it kills it.
GRACE_SECONDS = 30
# What differs between two runs of the same.
TIMING = ("seconds", "targets_per_second", "memory_bytes")


def chaos_train(folder: Path, arguments: list[str], kills: int, stop_every: int, nproc: int, seed: int) -> int:
    """Do what `tools/chaos.py` says of ``train``; give the exit status."""
    if nproc < 2 and stop_every:
        raise InputError(
            f"nproc is {nproc}: a worker that was stopped is noticed by another one; give nproc=2, or stop_every=0"
        )
    if not any(argument.startswith("data.path=") for argument in arguments):
        arguments = [f"data.path={make_up_dataset(folder, seed)}", *arguments]
    run_dir, undisturbed = folder / "run", folder / "undisturbed"
    arguments = [*SMALL, *arguments, f"output={run_dir}"]
    quiet_dependencies()
    timeout = compose("train", TrainConfig, arguments).trainer.timeout_seconds

    start = time.monotonic()
    if Job(folder, arguments, nproc, 0).wait() != 0:
        return failed(folder, "the undisturbed job failed")
    duration = time.monotonic() - start
    run_dir.rename(undisturbed)
    expected = outcome(undisturbed)
    print(f"undisturbed: {duration:.1f} s, {expected['finished.json']['steps']} steps on {nproc} ranks", flush=True)

    moments, struck, ended, worst = random.Random(seed), 0, 0, 0.0
    while True:
        job, struck_before, start = Job(folder, arguments, nproc, kills - struck), struck, time.monotonic()
        while struck < kills and (workers := job.sleep(moments.uniform(0, duration))):
            is_stop = stop_every > 0 and struck % stop_every == stop_every - 1
            rank = moments.randrange(nproc)
            seconds = job.strike(
                workers, rank, is_stop, limit=2 * timeout + GRACE_SECONDS + 120, is_done=run_dir / "finished.json"
            )
            if seconds is None:
                return failed(folder, f"rank {rank} was {'stopped' if is_stop else 'killed'}, and the job did not go on")
            struck, worst = struck + 1, max(worst, seconds)
            checkpoints = list_checkpoints(run_dir)
            newest = checkpoints[-1].name if checkpoints else "no checkpoint"
            print(
                f"{'stop' if is_stop else 'kill'} {struck}/{kills} of rank {rank}: all ranks anew, or the job over, "
                f"after {seconds:.1f} s; {newest}",
                flush=True,
            )
        if job.wait() != 0:
            return failed(folder, "a job that lost workers failed")
        ended += 1
        found = outcome(run_dir)
        differing = [name for name in expected if found[name] != expected[name]]
        if differing:
            return failed(folder, f"{run_dir} and {undisturbed} differ in {', '.join(differing)}")
        print(f"equal after {struck - struck_before} blows", flush=True)
        if struck == struck_before:  # over before its moment, perhaps for the machine is quicker by now
            duration = min(duration, time.monotonic() - start)
        if struck >= kills:
            break
        shutil.rmtree(run_dir)
    print(f"equal: {ended} jobs, {struck} blows; at worst {worst:.1f} s until all ranks were anew")
    return 0


class Job:
    """A training job of several ranks under torchelastic; what it prints is in ``train.log``."""

    def __init__(self, folder: Path, arguments: list[str], nproc: int, max_restarts: int):
        self.nproc = nproc
        elastic = ["--standalone", f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}", "--monitor-interval=0.1"]
        command = [sys.executable, "-m", "torch.distributed.run", *elastic, "-m", "launch.train", *arguments]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        with (folder / "train.log").open("a") as log:
            self.agent = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=log, stderr=subprocess.STDOUT)

    def wait(self) -> int:
        """Wait for the job's end; give its exit status."""
        return self.agent.wait()

    def sleep(self, seconds: float) -> list[int]:
        """Let it work until ``seconds`` after all of its ranks are there; give their process ids, or none: it is ending."""
        while self.agent.poll() is None and len(self._workers()) < self.nproc:
            time.sleep(0.02)
        try:
            self.agent.wait(seconds)
        except subprocess.TimeoutExpired:
            workers = self._workers()
            return workers if len(workers) == self.nproc else []
        return []

    def strike(self, workers: list[int], rank: int, is_stop: bool, limit: float, is_done: Path) -> float | None:
        """Kill or stop a worker; give the seconds until all are new ones, or the job is over; None: neither by the limit.

        A worker that is stopped after its last exchange with the others, when the run is done, hangs nobody up but the
        agent: it is killed then.
        """
        start = time.monotonic()
        os.kill(workers[rank], signal.SIGSTOP if is_stop else signal.SIGKILL)
        while self.agent.poll() is None:
            present = self._workers()
            if len(present) == self.nproc and not set(present) & set(workers):
                break
            if time.monotonic() - start > limit:
                if not (is_stop and is_done.exists()):
                    return None
                os.kill(workers[rank], signal.SIGKILL)
                is_stop = False
                start = time.monotonic()
            time.sleep(0.02)
        return time.monotonic() - start

    def _workers(self) -> list[int]:
        """Process ids of the ranks that are alive, by rank."""
        pids = []
        try:
            for pid in Path(f"/proc/{self.agent.pid}/task/{self.agent.pid}/children").read_text().split():
                if b"launch.train" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    pids.append(int(pid))
        except OSError:  # ended while it was looked at
            return []
        return sorted(pids)


def outcome(run_dir: Path) -> dict[str, dict]:
    """Read all that a run ended with and that follows from its config: losses, metrics, weights, where it stood."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    weights = load_unsharded(run_dir).model.state_dict()
    return {
        "metrics.jsonl": {
            (record["kind"], record["step"]): untimed(record) for record in records if record["kind"] != "checkpoint"
        },
        "finished.json": untimed(json.loads((run_dir / "finished.json").read_text())),
        "best weights": {name: weight.numpy().tobytes() for name, weight in weights.items()},
        "checkpoints": {checkpoint.name: read_state(checkpoint) for checkpoint in list_checkpoints(run_dir)},
    }


def untimed(record: dict) -> dict:
    """Leave out what no two runs have in common."""
    return {key: value for key, value in record.items() if not key.endswith(TIMING) and "checkpoint" not in key}


def failed(folder: Path, what: str) -> int:
    """Say what went wrong and where to look."""
    print(f"error: {what}; see {folder / 'train.log'}", file=sys.stderr)
    return 1


def make_up_dataset(folder: Path, seed: int) -> Path:
    """Prepare a dataset of random walks over the items."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(6, 40, 240)
    starts = np.repeat(generator.integers(60, size=lengths.size), lengths)
    steps = generator.choice([1, 2, 3, 17], lengths.sum(), p=[0.7, 0.15, 0.1, 0.05])
    log = {
        "user_id": np.repeat(np.arange(lengths.size), lengths),
        "item_id": (starts + np.cumsum(steps)) % 60,
        "timestamp": np.arange(lengths.sum()),
    }
    pq.write_table(pa.table(log), folder / "log.parquet")
    prepare(PrepareConfig(str(folder / "log.parquet"), str(folder / "dataset")))
    return folder / "dataset"
