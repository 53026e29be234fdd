"""What a finished run says of itself beside its figures: time, speed, memory, size."""

import json
import resource
import sys
from pathlib import Path

import torch

from glintru_rec.model import SequenceModel


def summarize_records(path: Path, best_step: int) -> dict[str, float | int | None]:
    """Sum up ``metrics.jsonl``, which holds every step once, however often the run was resumed.

    Args:
        path: the file, closed.
        best_step: step of the best validation.

    Returns:
        ``train_seconds`` in training steps (no validation, no checkpoint); ``targets_per_second`` over them, of all ranks;
        ``best_epoch``, the passes over the data done at the best validation; ``peak_memory_bytes`` of the first rank's
        process, and on CUDA ``peak_device_memory_bytes`` of its device; ``num_checkpoints`` written,
        ``num_failed_checkpoints`` that could not be, and ``checkpoint_stalled_seconds``, how long training waited for all of
        them. None for what the records of an older version lack.
    """
    records = [json.loads(line) for line in path.read_text().splitlines()]
    train = [record for record in records if record["kind"] == "train"]
    valid = [record for record in records if record["kind"] == "valid"]
    saves = [record for record in records if record["kind"] == "checkpoint"]
    is_timed = all("seconds" in record for record in train)
    seconds = sum(record["seconds"] for record in train) if is_timed else None
    targets = sum(record["num_targets"] for record in train) if is_timed else 0
    peaks = ["peak_memory_bytes"] + ["peak_device_memory_bytes"] * any("peak_device_memory_bytes" in record for record in valid)
    return {
        "train_seconds": seconds,
        "targets_per_second": targets / seconds if seconds else None,
        "best_epoch": next((record["epoch"] for record in valid if record["step"] == best_step), None),
        # One that is written stays; later records of its step only say more of it.
        "num_checkpoints": len({record["step"] for record in saves if not record["failed"]}) if saves else None,
        "num_failed_checkpoints": sum(record["failed"] for record in saves) if saves else None,
        "checkpoint_stalled_seconds": sum(record["stalled_seconds"] for record in saves) if saves else None,
        **{name: max((record[name] for record in valid if name in record), default=None) for name in peaks},
    }


def peak_memory(device: torch.device) -> dict[str, int]:
    """Measure the most memory that this process has held, and on CUDA the most of the device's that tensors took, in bytes."""
    peak = {"peak_memory_bytes": _peak_resident_bytes()}
    if device.type == "cuda":
        peak["peak_device_memory_bytes"] = torch.cuda.max_memory_allocated(device)
    return peak


def count_parameters(model: SequenceModel, num_items: int) -> dict[str, int]:
    """Count the trained numbers of encoder, side features and whole item table, whatever share of it this rank holds."""
    encoder = sum(parameter.numel() for parameter in model.encoder.parameters() if parameter.requires_grad)
    side = sum(parameter.numel() for parameter in model.side.parameters())
    return {"encoder": encoder, "table": num_items * model.vector_dim, **({"side": side} if side else {})}


def _peak_resident_bytes() -> int:
    # getrusage starts, after an exec, at the peak of the process that forked: a small run under a large launcher would
    # report the launcher. Linux also keeps the peak of the program itself.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
