"""What a run writes about itself: ``metrics.jsonl`` and TensorBoard events. Only rank 0 writes."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from glintru_rec.errors import InputError
from glintru_rec.files import write_text

PACKAGES = (
    "glintru_rec",
    "torch",
    "torchrec",
    "fbgemm-gpu",
    "fbgemm-gpu-cpu",
    "torchx",
    "hydra-core",
    "pyarrow",
    "duckdb",
    "numpy",
)


class RunLog:
    """Append records to ``RUN_DIR/metrics.jsonl`` and the same numbers to ``RUN_DIR/tensorboard``.

    Args:
        run_dir: the run directory.
        step: where the run goes on: later records, of a run that was killed after its last checkpoint, are dropped.
    """

    def __init__(self, run_dir: Path, step: int = 0):
        from torch.utils.tensorboard import SummaryWriter

        path = run_dir / "metrics.jsonl"
        kept = []
        if path.exists():
            # A line cut short by a kill has no newline; what it said is past the last checkpoint.
            try:
                lines = path.read_text().splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{path} is damaged ({error}); move it away to go on with the run") from error
        write_text(path, "".join(kept))
        self.file = open(path, "a", buffering=1)  # noqa: SIM115 (closed by close)
        self.board = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)

    def write(self, kind: str, step: int, epoch: int, **numbers: float) -> None:
        """Add a record; ``kind`` is ``train`` or ``valid``."""
        self.file.write(json.dumps({"kind": kind, "step": step, "epoch": epoch, **numbers}) + "\n")
        for name, value in numbers.items():
            self.board.add_scalar(f"{kind}/{name}", value, step)

    def close(self) -> None:
        """Flush and close both."""
        self.file.close()
        self.board.close()


def describe_versions() -> dict[str, str | None]:
    """Name the versions that a run depends on, and the commit of the checkout (with ``+`` when it has changes)."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    try:
        checkout = Path(__file__).parents[2]
        head = subprocess.run(["git", "describe", "--always", "--dirty=+"], cwd=checkout, capture_output=True, text=True)
        versions["commit"] = head.stdout.strip() or None
    except OSError:
        versions["commit"] = None
    return versions
