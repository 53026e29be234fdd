"""A run's records in MLflow, beside ``metrics.jsonl`` and TensorBoard: ``logging.mlflow=URI``. Only rank 0 writes."""

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glintru_rec.errors import InputError
from glintru_rec.files import write_json
from glintru_rec.training.checkpoint import from_first_rank
from glintru_rec.training.config import LoggingConfig

# Which run of MLflow's the run directory is, so that a resumed run goes on there.
MLFLOW_FILE = "mlflow.json"
PARAMETERS_AT_ONCE = 100  # what MLflow takes in a call


def check_loggers(logging: LoggingConfig) -> None:
    """Raise an `InputError` if what the config logs to is not installed; call it on all ranks before they meet.

    `check_reachable` looks whether it is there.
    """
    if logging.mlflow and importlib.util.find_spec("mlflow") is None:
        raise InputError(f"logging.mlflow={logging.mlflow} needs MLflow: pip install 'glintru_rec[mlflow]', or leave it empty")


def check_reachable(logging: LoggingConfig) -> None:
    """Raise an `InputError` on all ranks if what the config logs to cannot be used; the first rank looks.

    Nothing has been written to it afterwards, save that a database that did not exist was made.
    """

    def look() -> None:
        if not logging.mlflow:
            return
        from mlflow import MlflowClient

        with _errors_of(logging.mlflow):
            MlflowClient(tracking_uri=logging.mlflow).get_experiment_by_name(logging.experiment)

    from_first_rank(look)


@contextmanager
def _errors_of(uri: str) -> Iterator[None]:
    """Turn what MLflow raises at its first calls into an `InputError`."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError, ValueError, KeyError) as error:
        raise InputError(f"logging.mlflow={uri} cannot be used: {_first_line(error)}") from error


class MlflowLog:
    """Send records to an MLflow tracking server, or database, from a thread: training never waits for it.

    A server that fails later on gets no more records, and stops neither training nor the other logs.

    Args:
        run_dir: its ``mlflow.json`` says which MLflow run to go on with; it is written by the first call.
        logging: where to.
        config: the whole resolved config: its keys become MLflow's parameters.

    Raises:
        InputError: MLflow cannot be reached, or refuses the run.
    """

    def __init__(self, run_dir: Path, logging: LoggingConfig, config: Mapping[str, Any]):
        from mlflow import MlflowClient

        known = run_dir / MLFLOW_FILE
        with _errors_of(logging.mlflow):
            self.client = MlflowClient(tracking_uri=logging.mlflow)
            if known.is_file() and (there := json.loads(known.read_text()))["uri"] == logging.mlflow:
                self.run_id: str = there["run_id"]
                self.client.update_run(self.run_id, status="RUNNING")
            else:
                self.run_id = self._begin(logging.experiment, logging.run_name or run_dir.name, config)
                write_json(known, {"uri": logging.mlflow, "run_id": self.run_id})
        self.sender = ThreadPoolExecutor(1, thread_name_prefix="mlflow")
        self.failed = False

    def _begin(self, experiment: str, name: str, config: Mapping[str, Any]) -> str:
        from mlflow.entities import Param

        found = self.client.get_experiment_by_name(experiment)
        run = self.client.create_run(found.experiment_id if found else self.client.create_experiment(experiment), run_name=name)
        parameters = [Param(key, str(value)) for key, value in flatten(config)]
        for start in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self.client.log_batch(run.info.run_id, params=parameters[start : start + PARAMETERS_AT_ONCE])
        return run.info.run_id

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """Send figures of a step; names get ``_at_`` for ``@``, which MLflow does not take."""
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        metrics = [Metric(name.replace("@", "_at_"), float(value), now, step) for name, value in numbers.items()]
        self.sender.submit(self._send, lambda: self.client.log_batch(self.run_id, metrics=metrics))

    def close(self) -> None:
        """Wait for what is under way, and end the MLflow run."""
        self.sender.submit(self._send, lambda: self.client.set_terminated(self.run_id))
        self.sender.shutdown()

    def _send(self, call: Callable[[], object]) -> None:
        if self.failed:
            return
        try:
            call()
        except Exception as error:  # whatever the store's library raises
            self.failed = True
            print(
                f"warning: MLflow gets no more records ({_first_line(error)}); metrics.jsonl has all",
                file=sys.stderr,
                flush=True,
            )


def flatten(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """List a nested config as ``group.key`` and value."""
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
