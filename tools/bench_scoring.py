"""Scoring against what it could cost: top-k against faiss, candidates against numpy; memory, ranks, start, opening.

python tools/bench_scoring.py top_k [num_items=1000000] [dim=64] [k=100] [users=256] [repeats=5]
python tools/bench_scoring.py candidates [rows=400000] [candidates=100] [num_items=100000] [dim=64] [history=20] [repeats=2]
python tools/bench_scoring.py memory [rows=10000000] [num_items=100000] [dim=64] [history=4]
python tools/bench_scoring.py ranks [rows=200000] [files=8] [nproc=2] [num_items=100000] [dim=64] [history=20] [repeats=3]
python tools/bench_scoring.py start [num_items=10000] [dim=64] [repeats=3]
python tools/bench_scoring.py open [num_items=50000000] [dim=64] [bits=8] [repeats=3]

top_k: users/s of an artifact's search in fp32 and in int8, users' vectors known, and of faiss.IndexFlatIP (pip install
faiss-cpu), threads alike; and the share of faiss's items, exact in fp32, that each finds.
candidates: rows/s of a whole job, parquet to parquet, less what encoding the same histories took, and of a numpy gather and
einsum over arrays that lie in memory. memory: peak memory of a job's process with the rows, over that with a hundredth of them
(each in a process of its own). ranks: rows/s of the program score in several processes over that in one, each with one thread,
from the first row read to the last written. start: seconds from the start of that program to its first row in the output, with
a small artifact. open: seconds that a new process takes to open a large artifact of 8, 16 or 32 bits a number (in the system's
cache: it was written just before), its modules being imported. All contestants take turns; medians; threads are torch's
(OMP_NUM_THREADS) where they are not said to be one.
"""

import argparse
import json
import multiprocessing
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from glintru_rec import GlintRU
from glintru_rec.data.dataset import EvalCases
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, ScoringModule, Validation, export_artifact, replace_items
from glintru_rec.export.item_files import write_items
from glintru_rec.scoring import ScoreConfig, score
from glintru_rec.scoring.fragments import find_inputs, open_fragments
from glintru_rec.scoring.pipeline import map_in_order, one_thread_each
from glintru_rec.scoring.rows import Columns, Limits, Rows

DEFAULTS = {
    "top_k": {"num_items": 1_000_000, "dim": 64, "k": 100, "users": 256, "repeats": 5},
    "candidates": {"rows": 400_000, "candidates": 100, "num_items": 100_000, "dim": 64, "history": 20, "repeats": 2},
    "memory": {"rows": 10_000_000, "num_items": 100_000, "dim": 64, "history": 4},
    "ranks": {"rows": 200_000, "files": 8, "nproc": 2, "num_items": 100_000, "dim": 64, "history": 20, "repeats": 3},
    "start": {"num_items": 10_000, "dim": 64, "repeats": 3},
    "open": {"num_items": 50_000_000, "dim": 64, "bits": 8, "repeats": 3},
}
JOB_BATCH = 1024
PRECISIONS = {8: "int8", 16: "fp16", 32: "fp32"}
POLL_SECONDS = 0.005
REPOSITORY = Path(__file__).parents[1]


def turns(repeats: int, **contestants: Callable[[], object]) -> dict[str, list[float]]:
    """Give the seconds of each contestant in every turn, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: times[1:] for name, times in seconds.items()}


@torch.inference_mode()
def bench_top_k(num_items: int, dim: int, k: int, users: int, repeats: int) -> None:
    """Search a catalog for users whose vectors are known."""
    try:
        import faiss
    except ImportError as error:
        raise InputError("top_k is measured against faiss, which is not installed: pip install faiss-cpu") from error
    torch.manual_seed(0)
    vectors, query = torch.randn(num_items, dim), torch.randn(users, dim)
    num_threads = torch.get_num_threads()
    faiss.omp_set_num_threads(num_threads)
    index = faiss.IndexFlatIP(dim)
    index.add(vectors.numpy())
    nothing = torch.zeros(0, dtype=torch.int64)

    def search(precision: str) -> torch.Tensor:
        module = modules[precision]

        def find(part: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return module.top_k_of(part, nothing, torch.zeros(len(part), dtype=torch.int64), k)[0]

        with one_thread_each("cpu") as threads:
            return torch.cat(list(map_in_order(find, iter(query.split(-(-users // threads))), threads)))

    with TemporaryDirectory() as folder:
        modules = {}
        for precision in ("fp32", "int8"):
            path = Path(folder, precision)
            path.mkdir()
            write_items(vectors, dim, False, precision, path)
            module = ScoringModule(GlintRU(dim, num_heads=1), vectors[:0], "dot", 50, precision=precision)
            modules[precision] = torch.jit.script(module.eval())
            modules[precision].open_items(str(path))
        exact = index.search(query.numpy(), k)[1]
        recall = {
            precision: np.mean([len(np.intersect1d(*pair)) / k for pair in zip(search(precision).numpy(), exact)])
            for precision in modules
        }
        measured = turns(
            repeats,
            fp32=lambda: search("fp32"),
            int8=lambda: search("int8"),
            faiss=lambda: index.search(query.numpy(), k),
        )
    seconds = {name: statistics.median(times) for name, times in measured.items()}
    for name, value in seconds.items():
        print(f"{name:8}{users / value:12,.1f} users/s")
    for name, share in recall.items():
        ratio = seconds["faiss"] / seconds[name]
        print(f"threads={num_threads} precision={name} recall@{k}={share:.4f} ratio_to_faiss={ratio:.2f}")


def vocabulary_of(num_items: int) -> Vocabulary:
    """Number items from 0."""
    return Vocabulary(pa.array(np.arange(num_items)), np.ones(num_items, dtype=np.int64))


def make_up(
    folder: Path, num_rows: int, num_candidates: int, num_items: int, dim: int, history: int, num_files: int = 1
) -> ScoreConfig:
    """Write an untrained artifact, if there is none yet, and an input of files of nearly equal size."""
    torch.manual_seed(0)
    if not (folder / "artifact").exists():
        options = {"max_seq_len": 50, "encoder_config": {}, "provenance": {}}
        vectors = torch.randn(num_items, dim)
        export_artifact(GlintRU(dim), "dot", vectors, vocabulary_of(num_items), folder / "artifact", **options)
    source = folder / f"{num_rows}"
    source.mkdir()
    for number in range(num_files):
        size = num_rows // num_files + (number < num_rows % num_files)
        write_rows(source / f"part-{number:05}.parquet", size, (history, num_candidates), num_items, number)
    mode = "candidates" if num_candidates else "encode"
    return ScoreConfig(str(folder / "artifact"), str(source), str(folder / "out"), mode, batch_size=JOB_BATCH)


def write_rows(path: Path, num_rows: int, lengths: tuple[int, int], num_items: int, seed: int) -> None:
    """Write users with lists, history and candidates, of any items."""
    generator = np.random.default_rng(seed)
    schema = pa.schema([("user_id", pa.int64()), ("history", pa.list_(pa.int64())), ("candidates", pa.list_(pa.int64()))])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, num_rows, 100_000):
            size = min(100_000, num_rows - start)
            lists = [
                pa.ListArray.from_arrays(
                    pa.array(np.arange(size + 1) * length, pa.int32()),
                    pa.array(generator.integers(num_items, size=size * length)),
                )
                for length in lengths
            ]
            writer.write_table(pa.table([pa.array(np.arange(start, start + size)), *lists], schema=schema))


def bench_candidates(rows: int, candidates: int, num_items: int, dim: int, history: int, repeats: int) -> None:
    """Score every row's own candidates."""
    with TemporaryDirectory() as name:
        config = make_up(Path(name), rows, candidates, num_items, dim, history)
        module = torch.jit.load(f"{config.artifact}/model.pt")
        module.open_items(config.artifact)
        vocabulary = Vocabulary.load(f"{config.artifact}/vocabulary/items.parquet")
        columns = Columns(config.user_column, config.history_column, config.candidates_column)
        (file,) = find_inputs(config.input)
        fragment = open_fragments([file], columns, vocabulary)[file.name]
        assert not isinstance(fragment, InputError)
        batches = list(fragment.read(JOB_BATCH, vocabulary, Limits(candidates, keep_empty=False)))
        ids = np.concatenate([batch.candidates.indices for batch in batches]).reshape(rows, candidates)

        def encode(batch: Rows) -> torch.Tensor:
            with torch.inference_mode():
                return module.encode(*(torch.from_numpy(array) for array in batch.history))

        def encode_all() -> np.ndarray:
            with one_thread_each("cpu") as threads:
                return torch.cat(list(map_in_order(encode, iter(batches), threads))).numpy()

        query, vectors = encode_all(), module.item_vectors.numpy()

        def bare() -> None:
            for start in range(0, rows, JOB_BATCH):
                part = slice(start, start + JOB_BATCH)
                np.einsum("rd,rcd->rc", query[part], vectors[ids[part]])

        outputs = iter(range(1_000_000))

        def job() -> None:
            config.output = f"{name}/out-{next(outputs)}"
            score(config)

        measured = turns(repeats, job=job, encode=encode_all, numpy=bare)
    # Turn by turn, as a machine's speed changes more from one turn to another than within it.
    measured["job without encoding"] = [whole - part for whole, part in zip(measured["job"], measured["encode"])]
    seconds = {name: statistics.median(times) for name, times in measured.items()}
    for what, value in seconds.items():
        print(f"{what:22}{rows / value:14,.0f} rows/s")
    ratio = seconds["numpy"] / seconds["job without encoding"]
    print(f"threads={torch.get_num_threads()} ratio_to_numpy={ratio:.2f}")


def peak_of_job(config: ScoreConfig) -> float:
    """Run a job; give the peak memory of this process, MiB."""
    score(config)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_memory(rows: int, num_items: int, dim: int, history: int) -> None:
    """Give user vectors to few rows and to many."""
    peaks = []
    with TemporaryDirectory() as name:
        for num_rows in (max(1, rows // 100), rows):
            config = make_up(Path(name), num_rows, 0, num_items, dim, history)
            config.output = f"{name}/out-{num_rows}"
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks.append(pool.apply(peak_of_job, (config,)))
            print(f"{num_rows:12,} rows{peaks[-1]:12,.0f} MiB", flush=True)
    print(f"threads={torch.get_num_threads()} ratio_of_peaks={peaks[1] / peaks[0]:.2f}")


def program(config: ScoreConfig, nproc: int) -> list[str]:
    """Give the command of the program score."""
    many = ["torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m"] if nproc > 1 else []
    keys = {key: getattr(config, key) for key in ("artifact", "input", "output", "mode", "batch_size")}
    return [sys.executable, "-m", *many, "launch.score", *(f"{key}={value}" for key, value in keys.items())]


def one_thread() -> dict[str, str]:
    """Give the environment of a process with one thread for torch."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def bench_ranks(rows: int, files: int, nproc: int, num_items: int, dim: int, history: int, repeats: int) -> None:
    """Give user vectors in one process and in several."""
    rates: dict[int, list[float]] = {1: [], nproc: []}
    with TemporaryDirectory() as name:
        config = make_up(Path(name), rows, 0, num_items, dim, history, files)
        for turn in range(repeats):
            for size in rates:
                config.output = f"{name}/out-{size}-{turn}"
                subprocess.run(program(config, size), cwd=REPOSITORY, env=one_thread(), check=True, capture_output=True)
                report = json.loads((Path(config.output) / "report.json").read_text())
                rates[size].append(report["timing"]["rows_per_second"])
    for size, measured in rates.items():
        print(f"{size:4} process(es){statistics.median(measured):12,.0f} rows/s")
    print(f"threads=1 ratio_of_rates={statistics.median(rates[nproc]) / statistics.median(rates[1]):.2f}")


def bench_start(num_items: int, dim: int, repeats: int) -> None:
    """Encode one user, from nothing."""
    seconds = []
    with TemporaryDirectory() as name:
        config = make_up(Path(name), 1, 0, num_items, dim, history=20)
        for turn in range(repeats):
            config.output = f"{name}/out-{turn}"
            start = time.perf_counter()
            process = subprocess.Popen(program(config, 1), cwd=REPOSITORY, env=one_thread(), stdout=subprocess.DEVNULL)
            while not (Path(config.output) / "part-00000.parquet").exists():
                if process.poll():
                    raise subprocess.CalledProcessError(process.returncode, process.args)
                time.sleep(POLL_SECONDS)
            seconds.append(time.perf_counter() - start)
            process.wait()
    print(f"threads=1 seconds_to_first_row={statistics.median(seconds):.2f}")


def opening(path: str) -> tuple[float, float, float]:
    """Open an artifact; give the seconds of its module alone, of the whole, and the most memory of this process, MiB."""
    start = time.perf_counter()
    torch.jit.load(f"{path}/model.pt").open_items(path)
    alone = time.perf_counter() - start
    start = time.perf_counter()
    Artifact.load(path, verify_items=False)
    return alone, time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def bench_open(num_items: int, dim: int, bits: int, repeats: int) -> None:
    """Open a catalog that took the place of a small artifact's own."""
    if bits not in PRECISIONS:
        raise InputError(f"bits is {bits}; it must be one of {', '.join(map(str, PRECISIONS))}")
    torch.manual_seed(0)
    cases = EvalCases(np.arange(100), np.arange(101), np.arange(100), np.arange(100))
    with TemporaryDirectory() as name:
        export_artifact(
            GlintRU(dim),
            "dot",
            torch.randn(100, dim),
            vocabulary_of(100),
            f"{name}/small",
            max_seq_len=50,
            encoder_config={},
            provenance={},
            precision=PRECISIONS[bits],
            validation=Validation(cases, max_ndcg_loss=1.0),
        )
        # Rows that overlap: as many as are wanted, of no more memory than a number each.
        vectors = torch.randn(num_items + dim).as_strided((num_items, dim), (1, 1))
        replace_items(f"{name}/small", vectors, vocabulary_of(num_items), f"{name}/large", {"made": "by chance"})
        size = sum(file.stat().st_size for file in Path(name, "large").rglob("*") if file.is_file())
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            measured = [pool.apply(opening, (f"{name}/large",)) for _ in range(repeats)]
    alone, whole, peak = (statistics.median(each) for each in zip(*measured))
    print(f"{num_items:,} items, {PRECISIONS[bits]}, {size / 2**20:,.0f} MiB; most memory of a process {peak:,.0f} MiB")
    print(f"seconds_of_module={alone:.2f} seconds_with_vocabulary={whole:.2f}")


def main() -> int:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=tuple(DEFAULTS))
    parser.add_argument("sizes", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    sizes = dict(DEFAULTS[arguments.what])
    for override in arguments.sizes:
        key, _, value = override.partition("=")
        if key not in sizes or not value.isdecimal() or int(value) < 1:
            parser.error(f"{override!r}: give one of {', '.join(sizes)} as key=N, N at least 1")
        sizes[key] = int(value)
    benches: dict[str, Callable[..., None]] = {
        "top_k": bench_top_k,
        "candidates": bench_candidates,
        "memory": bench_memory,
        "ranks": bench_ranks,
        "start": bench_start,
        "open": bench_open,
    }
    try:
        benches[arguments.what](**sizes)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
