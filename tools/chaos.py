"""Kill jobs at random moments and compare what they end with with what undisturbed ones end with.

python tools/chaos.py train output=DIR [kills=30] [stop_every=5] [nproc=2] [seed=0] [key=value ...]

Workers (ranks) of a training job under torchelastic are killed (SIGKILL), and every fifth stopped (SIGSTOP), so that it hangs;
0: none is stopped. Further key=value are those of launch/train.py; without data.path a small dataset is made up. Moments are
drawn evenly from the time that the undisturbed job took, from when all ranks were started, anew or first. A job that ends is
compared and another one begun, until there were enough blows. All losses, metrics, the best weights, and where the last
checkpoints stood must be equal to the bit.

python tools/chaos.py score output=DIR [kills=30] [seed=0] [key=value ...]

A scoring job is killed, and run again each time.

Further key=value are those of launch/score.py: artifact=, input=, mode=, ... Without artifact and input both are made up, with
files=8 of rows=3000 each, for every mode (default: candidates). DIR must not exist, or be empty; it gets undisturbed/ and
scores/, the last killed job's. Kills are SIGKILL, at moments drawn evenly from the time that the undisturbed job took. A job
that ends before its moment is compared and begun anew, until there were enough kills. All files must be equal to the byte,
except for "timing" in JSON. The undisturbed job has one thread, the others one, two and three in
turns. Exit status: 0 if all were equal, every time; 1 if not, or if a job failed; 2 for bad input.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from chaos_train import chaos_train

from glintru_rec import GlintRU
from glintru_rec.config import compose
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import export_artifact
from glintru_rec.files import check_free
from glintru_rec.programs.launcher import run
from glintru_rec.programs.score import ScoreConfig, score_program
from glintru_rec.scoring.ledger import JOB_FOLDER

NUM_ITEMS, WIDTH = 2000, 32

# The server imports everything once; a job that it forks is a process of its own, and at work at once.
processes: Any = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["glintru_rec.programs.score", "glintru_rec.programs.launcher"])


def chaos(program: str, overrides: list[str]) -> int:
    """Do what the command line says; give the exit status."""
    own = {"kills": 30, "seed": 0, **({"nproc": 2, "stop_every": 5} if program == "train" else {"files": 8, "rows": 3000})}
    output, arguments = "", []
    for override in overrides:
        key, is_pair, value = override.partition("=")
        if key == "output" and is_pair:
            output = value
        elif key in own and is_pair:
            own[key] = _count(key, value)
        else:
            arguments.append(override)
    if not output:
        raise InputError("missing value: give output=…")
    folder = Path(output)
    check_free("output", folder)
    folder.mkdir(parents=True, exist_ok=True)
    return (chaos_train if program == "train" else chaos_score)(folder, arguments, **own)


def chaos_score(folder: Path, arguments: list[str], kills: int, seed: int, files: int, rows: int) -> int:
    """Do what is said above of ``score``; give the exit status."""
    given = {argument.partition("=")[0] for argument in arguments}
    if not given & {"artifact", "input"}:
        arguments += make_up(folder, files, rows, seed) + ([] if "mode" in given else ["mode=candidates"])
    scores, undisturbed = folder / "scores", folder / "undisturbed"
    arguments.append(f"output={scores}")  # both write to one place: the config is in the output
    compose("score", ScoreConfig, arguments)

    for _ in range(2):  # the first warms the machine's caches up
        shutil.rmtree(scores, ignore_errors=True)
        start = time.monotonic()
        status = killed_after(arguments, None)
        duration = time.monotonic() - start
        if status != 0:
            print(f"error: the undisturbed job ended with exit status {status}", file=sys.stderr)
            return 1
    scores.rename(undisturbed)
    expected = contents(undisturbed)
    num_files = num_done(undisturbed)
    print(f"undisturbed: {duration:.2f} s, {num_files} input files", flush=True)

    moments, num_killed, num_ended, amid = random.Random(seed), 0, 0, 0
    threads = itertools.cycle((1, 2, 3))
    while True:
        moment = moments.uniform(0, duration) if num_killed < kills else None
        status = killed_after(arguments, moment, next(threads))
        if status == -signal.SIGKILL:
            num_killed += 1
            done = num_done(scores)
            amid += 0 < done < num_files
            print(f"kill {num_killed}/{kills} after {moment:.2f} s: {done} of {num_files} files done", flush=True)
        elif status != 0:
            print(f"error: a job that was run again ended with exit status {status}", file=sys.stderr)
            return 1
        else:
            written = contents(scores)
            differing = [name for name in sorted(expected | written) if expected.get(name) != written.get(name)]
            if differing:
                print(f"error: {scores} and {undisturbed} differ in {', '.join(differing)}", file=sys.stderr)
                return 1
            num_ended += 1
            if num_killed >= kills:
                break
            shutil.rmtree(scores)
    size = sum(map(len, expected.values()))
    print(f"equal: {num_ended} outputs of {len(expected)} files, {size:,} bytes; {num_killed} kills, {amid} between two files")
    return 0


def killed_after(arguments: list[str], seconds: float | None, num_threads: int = 1) -> int:
    """Run the job; kill it if it takes longer. Give its exit status, negative for a signal."""
    process = processes.Process(target=score_job, args=(arguments, num_threads))
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    assert process.exitcode is not None
    return process.exitcode


def score_job(arguments: list[str], num_threads: int) -> None:
    """Run what ``python -m launch.score`` does, without its lines."""
    torch.set_num_threads(num_threads)
    with open(os.devnull, "w") as nowhere:
        sys.argv, sys.stdout = ["score", *arguments], nowhere
        run("score", ScoreConfig, score_program)


def contents(folder: Path) -> dict[str, bytes]:
    """Read all files, hidden ones too, without the timing."""
    read = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            content = path.read_bytes()
            if path.suffix == ".json":
                content = json.dumps({key: value for key, value in json.loads(content).items() if key != "timing"}).encode()
            read[str(path.relative_to(folder))] = content
    return read


def num_done(output: Path) -> int:
    """Count the input files that an output has a record of."""
    return len(list((output / JOB_FOLDER).glob("*.parquet.json")))


def make_up(folder: Path, num_files: int, num_rows: int, seed: int) -> list[str]:
    """Write an untrained artifact, and an input some rows of which are set aside; give the arguments that name them."""
    torch.manual_seed(seed)
    generator = np.random.default_rng(seed)
    item_ids = pa.array(np.arange(NUM_ITEMS) + 2**60)
    vocabulary = Vocabulary(item_ids, generator.integers(1, 100, NUM_ITEMS))
    export_artifact(
        GlintRU(WIDTH),
        "dot",
        torch.randn(NUM_ITEMS, WIDTH),
        vocabulary,
        folder / "artifact",
        max_seq_len=50,
        encoder_config={"encoder": "glint_ru"},
        provenance={"made up": seed},
    )
    (folder / "input").mkdir()

    def lists(longest: int) -> pa.Array:
        lengths = generator.integers(0, longest + 1, num_rows)
        items = generator.integers(NUM_ITEMS + 20, size=lengths.sum()) + 2**60  # the last 20 are unknown
        return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], lengths.cumsum()]), pa.int32()), pa.array(items))

    for number in range(num_files):
        users = pa.array(np.arange(num_rows) + number * num_rows, mask=generator.random(num_rows) < 0.01)
        table = pa.table({"user_id": users, "history": lists(60), "candidates": lists(20)})
        pq.write_table(table, folder / "input" / f"part-{number:05d}.parquet")
    return [f"artifact={folder / 'artifact'}", f"input={folder / 'input'}"]


def main() -> int:
    """Read the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=("train", "score"))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    try:
        return chaos(arguments.program, arguments.overrides)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2


def _count(key: str, text: str) -> int:
    if not text.isdecimal():
        raise InputError(f"{key} is {text!r}; it must be a whole number of at least 0")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
