"""What benchmarks share: turns, percentiles, the machine's two ceilings, memory, and the file of all figures."""

import csv
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

REPOSITORY = Path(__file__).parents[1]


def seconds(call: Callable[[], object]) -> float:
    """Time one call, on a GPU until it is done."""
    start = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def take_turns(calls: dict[str, Callable[[], object]], turns: int, at_least: float = 0.02) -> dict[str, list[float]]:
    """Let the contestants run in turn, each for ``at_least`` seconds a turn; give seconds a call, turn by turn.

    What slows the machine down for a while then slows all of them. The first turn warms up, and is not counted.
    """
    took: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(turns + 1):
        for name, call in calls.items():
            count, spent = 0, 0.0
            while spent < at_least or count == 0:
                spent, count = spent + seconds(call), count + 1
            if turn > 0:
                took[name].append(spent / count)
    return took


def percentiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Give p20, p50 and p80."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def matmul_ceiling(dtype: torch.dtype = torch.float32, device: str = "cpu", size: int = 1024) -> float:
    """Measure operations per second of a square torch.mm, with the threads there are: the best of some."""
    a, b = torch.randn(2, size, size, device=device).to(dtype)
    return 2 * size**3 / min(seconds(lambda: torch.mm(a, b)) for _ in range(8))


def copy_ceiling(device: str = "cpu", num_bytes: int = 1 << 28) -> float:
    """Measure bytes per second, read and written, of a copy far larger than the caches: the best of some."""
    source = torch.ones(num_bytes // 4, device=device)
    target = torch.empty_like(source)
    return 2 * num_bytes / min(seconds(lambda: target.copy_(source)) for _ in range(6))


def resident_bytes(name: str) -> int:
    """Read what Linux says of this process's memory: ``VmRSS``, or its highest, ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))


def highest_during(call: Callable[[], object]) -> int:
    """Say by how many bytes a call raises the process's memory at its highest (Linux)."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the highest so far is what there is now
    call()
    return resident_bytes("VmHWM") - before


def note(benchmark: str, rows: list[dict[str, object]], path: Path | None) -> None:
    """Add a line for every figure to the file of all figures, with date, commit and machine.

    Args:
        benchmark: the tool.
        rows: the figures; the same keys in each.
        path: a csv file, made if it is not there; None: nothing is written.
    """
    if path is None or not rows:
        return
    fixed = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "benchmark": benchmark, "commit": commit(), **machine()}
    lines = [
        {**fixed, "row": row["name"], "figure": key, "value": value}
        for row in rows
        for key, value in row.items()
        if key != "name" and value is not None
    ]
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, list(lines[0]))
        if new:
            writer.writeheader()
        writer.writerows(lines)
    print(f"{len(lines)} figures added to {path}")


def commit() -> str:
    """Name the commit that is checked out; ``+`` where files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")


def machine() -> dict[str, object]:
    """Name the processor, the GPU, and the threads in use."""
    info = Path("/proc/cpuinfo")
    names = [line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    versions = f"{platform.python_version()}, torch {torch.__version__}"
    return {
        "cpu": names[0] if names else platform.machine(),
        "gpu": gpu,
        "threads": torch.get_num_threads(),
        "python": versions,
    }
