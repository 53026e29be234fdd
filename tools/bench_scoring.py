"""Scoring against what it could cost at best: exact top-k against faiss, a job of candidates against bare numpy, memory.

python tools/bench_scoring.py top_k [num_items=1000000] [dim=64] [k=100] [users=256] [repeats=5]
python tools/bench_scoring.py candidates [rows=50000] [candidates=100] [num_items=100000] [dim=64] [history=20] [repeats=3]
python tools/bench_scoring.py memory [rows=1000000] [num_items=100000] [dim=64] [history=20]

top_k: users/s of the artifact's search, their vectors known, and of faiss.IndexFlatIP (pip install faiss-cpu), threads alike.
candidates: rows/s of a whole job, parquet to parquet, less what encoding the same histories took, and of a numpy gather and
einsum over arrays that lie in memory. memory: peak memory of a job's process with the rows, over that with a hundredth of them
(each in a process of its own). All contestants take turns; medians; threads are torch's (OMP_NUM_THREADS).
"""

import argparse
import multiprocessing
import resource
import statistics
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
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import ScoringModule, export_artifact
from glintru_rec.scoring import ScoreConfig, score
from glintru_rec.scoring.fragments import find_inputs, open_fragments
from glintru_rec.scoring.pipeline import map_in_order, one_thread_each
from glintru_rec.scoring.rows import Columns, Limits, Rows

DEFAULTS = {
    "top_k": {"num_items": 1_000_000, "dim": 64, "k": 100, "users": 256, "repeats": 5},
    "candidates": {"rows": 50_000, "candidates": 100, "num_items": 100_000, "dim": 64, "history": 20, "repeats": 3},
    "memory": {"rows": 1_000_000, "num_items": 100_000, "dim": 64, "history": 20},
}
JOB_BATCH = 1024


def medians(repeats: int, **contestants: Callable[[], object]) -> dict[str, float]:
    """Give the median seconds of each contestant, taking turns, after one turn to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(repeats + 1):
        for name, run in contestants.items():
            start = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times[1:]) for name, times in seconds.items()}


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
    search = torch.jit.script(ScoringModule(GlintRU(dim, num_heads=1), vectors, "dot", 50).eval())
    nothing = torch.zeros(0, dtype=torch.int64)

    def ours() -> torch.Tensor:
        def find(part: torch.Tensor) -> torch.Tensor:
            with torch.inference_mode():
                return search.top_k_of(part, nothing, torch.zeros(len(part), dtype=torch.int64), k)[0]

        with one_thread_each("cpu") as threads:
            return torch.cat(list(map_in_order(find, iter(query.split(-(-users // threads))), threads)))

    same = np.mean([len(np.intersect1d(*pair)) / k for pair in zip(ours().numpy(), index.search(query.numpy(), k)[1])])
    seconds = medians(repeats, ours=ours, faiss=lambda: index.search(query.numpy(), k))
    for name, value in seconds.items():
        print(f"{name:8}{users / value:12,.1f} users/s")
    print(f"threads={num_threads} items_equal={same:.4f} ratio_to_faiss={seconds['faiss'] / seconds['ours']:.2f}")


def make_up(folder: Path, num_rows: int, num_candidates: int, num_items: int, dim: int, history: int) -> ScoreConfig:
    """Write an untrained artifact, if there is none yet, and an input of one file."""
    torch.manual_seed(0)
    generator = np.random.default_rng(0)
    if not (folder / "artifact").exists():
        vocabulary = Vocabulary(pa.array(np.arange(num_items)), np.ones(num_items, dtype=np.int64))
        options = {"max_seq_len": 50, "encoder_config": {}, "provenance": {}}
        export_artifact(GlintRU(dim), "dot", torch.randn(num_items, dim), vocabulary, folder / "artifact", **options)
    source = folder / f"{num_rows}.parquet"
    schema = pa.schema([("user_id", pa.int64()), ("history", pa.list_(pa.int64())), ("candidates", pa.list_(pa.int64()))])
    with pq.ParquetWriter(source, schema) as writer:
        for start in range(0, num_rows, 100_000):
            size = min(100_000, num_rows - start)
            lists = [
                pa.ListArray.from_arrays(
                    pa.array(np.arange(size + 1) * length, pa.int32()),
                    pa.array(generator.integers(num_items, size=size * length)),
                )
                for length in (history, num_candidates)
            ]
            writer.write_table(pa.table([pa.array(np.arange(start, start + size)), *lists], schema=schema))
    mode = "candidates" if num_candidates else "encode"
    return ScoreConfig(str(folder / "artifact"), str(source), str(folder / "out"), mode, batch_size=JOB_BATCH)


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

        seconds = medians(repeats, job=job, encode=encode_all, numpy=bare)
    seconds["job without encoding"] = seconds["job"] - seconds["encode"]
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
    benches: dict[str, Callable[..., None]] = {"top_k": bench_top_k, "candidates": bench_candidates, "memory": bench_memory}
    try:
        benches[arguments.what](**sizes)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
