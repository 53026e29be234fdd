"""What a run writes about itself: ``metrics.jsonl``, TensorBoard events, MLflow where asked. Only rank 0 writes."""

import json
import platform
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from glintru_rec.errors import InputError
from glintru_rec.files import write_text
from glintru_rec.training.mlflow_log import MlflowLog

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

    A full disk stops neither training nor the log: records wait in memory until there is room, TensorBoard's events end.

    Args:
        run_dir: the run directory.
        step: where the run goes on: later records, of a run that was killed after its last checkpoint, are dropped.
        validated_step: step of the last validation that the checkpoint knows of; later ones are done again.
        config: the whole run's, with ``logging``; None: no MLflow.

    Raises:
        InputError: ``metrics.jsonl`` is damaged, or MLflow cannot be reached.
    """

    def __init__(self, run_dir: Path, step: int = 0, validated_step: int = -1, config: Any = None):
        from torch.utils.tensorboard import SummaryWriter

        self.path = run_dir / "metrics.jsonl"
        kept = []
        if self.path.exists():

            def is_known(record: dict) -> bool:
                return record["step"] <= (validated_step if record["kind"] == "valid" else step)

            # A line cut short by a kill has no newline; what it said is past the last checkpoint.
            try:
                lines = self.path.read_text().splitlines(keepends=True)
                kept = [line for line in lines if line.endswith("\n") and is_known(json.loads(line))]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"{self.path} is damaged ({error}); move it away to go on with the run") from error
        write_text(self.path, "".join(kept))
        self.file = open(self.path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        self.unwritten = b""
        self.board: SummaryWriter | None = SummaryWriter(str(run_dir / "tensorboard"), purge_step=step + 1)
        asked = config is not None and config.logging.mlflow
        self.mlflow = MlflowLog(run_dir, config.logging, asdict(config)) if asked else None

    def write(self, kind: str, step: int, epoch: int, **numbers: float | list[float]) -> None:
        """Add a record; ``kind`` is ``train``, ``valid`` or ``checkpoint``; a list has a number for each rank."""
        was_waiting = bool(self.unwritten)
        self.unwritten += (json.dumps({"kind": kind, "step": step, "epoch": epoch, **numbers}) + "\n").encode()
        try:
            self._write_out()
        except OSError as error:
            if not was_waiting:
                _warn(f"{self.path} cannot be written ({error}): its lines wait in memory")
        scalars: dict[str, float] = {}
        for name, value in numbers.items():
            parts = {f"/{rank}": each for rank, each in enumerate(value)} if isinstance(value, list) else {"": value}
            scalars |= {f"{kind}/{name}{suffix}": part for suffix, part in parts.items()}
        if self.mlflow is not None:
            self.mlflow.write(scalars, step)
        if self.board is None:
            return
        try:
            for name, value in scalars.items():
                self.board.add_scalar(name, value, step)
        except OSError as error:  # of an earlier event: a thread writes them
            _warn(f"TensorBoard's events cannot be written ({error}): they end before step {step}")
            self.board = None

    def close(self) -> None:
        """Flush and close all.

        Raises:
            InputError: there is no room for the records that wait.
        """
        if self.mlflow is not None:
            self.mlflow.close()
        try:
            self._write_out()
        except OSError as error:
            raise InputError(f"{self.path} cannot be written ({error}): make room, and go on by trainer.resume=true") from error
        self.file.close()
        if self.board is not None:
            self.board.close()

    def _write_out(self) -> None:
        while self.unwritten:  # a write may take a part
            self.unwritten = self.unwritten[self.file.write(self.unwritten) or 0 :]


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


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
