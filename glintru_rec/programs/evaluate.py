"""The program evaluate."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch.distributed as dist
from omegaconf import MISSING

from glintru_rec.config import check, one_of
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.dataset_files import fingerprint
from glintru_rec.data.side_features import SideVocabulary
from glintru_rec.files import check_writable, write_json
from glintru_rec.metrics import DEFAULT_KS, Protocol
from glintru_rec.programs.launcher import write_config
from glintru_rec.progress import Progress
from glintru_rec.scoring.evaluation import evaluate
from glintru_rec.training.build import load_distributed
from glintru_rec.training.processes import process_group


@dataclass
class EvaluateDataConfig:
    """What is evaluated on.

    Attributes:
        path: a sequence dataset of the vocabulary that the run was trained on; any, where that was dynamic.
    """

    path: str = MISSING


@dataclass
class EvaluateConfig:
    """An evaluation of a run's best checkpoint.

    Attributes:
        checkpoint: a run directory.
        output: file to write, as JSON.
        split: ``test`` (each user's last item) or ``valid`` (the last but one).
        candidates: ``full`` catalog, or ``uniform:N`` or ``popularity:N`` sampled negatives (as old papers did).
        exclude_seen: leave out the items of the user's history.
        ks: cut-offs.
        seed: of sampled negatives.
        batch_users: users of one rank's batch.
        device: ``auto``, ``cpu`` or ``cuda``.
    """

    checkpoint: str = MISSING
    output: str = MISSING
    data: EvaluateDataConfig = field(default_factory=EvaluateDataConfig)
    split: str = "test"
    candidates: str = "full"
    exclude_seen: bool = True
    ks: list[int] = field(default_factory=lambda: list(DEFAULT_KS))
    seed: int = 0
    batch_users: int = 512
    device: str = "auto"

    def __post_init__(self):
        one_of("split", self.split, ("valid", "test"))
        one_of("device", self.device, ("auto", "cpu", "cuda"))
        check("batch_users", self.batch_users, self.batch_users >= 1, "at least 1")
        self.protocol()

    def protocol(self) -> Protocol:
        """Collect what the figures depend on."""
        return Protocol(self.candidates, self.exclude_seen, tuple(self.ks), self.seed, self.split)


def evaluate_run(config: EvaluateConfig) -> None:
    """Write ``{"protocol": …, "metrics": …}`` of a run's best checkpoint to ``config.output``."""
    output = Path(config.output)
    check_writable(output)
    side_features = SideVocabulary.load(config.checkpoint).names
    dataset = SequenceDataset.open(config.data.path, side_features)
    protocol = config.protocol()
    with process_group(config.device) as device:
        train_config, model, seen = load_distributed(Path(config.checkpoint), dataset, device)
        is_first = dist.get_rank() == 0
        progress = Progress("evaluate", dataset.num_cases, "users", enabled=is_first)
        metrics = evaluate(
            model, seen, protocol, train_config.data.max_seq_len, config.batch_users, lambda done, _: progress.update(done)
        )
        if is_first:
            write_config(config, output.with_name(output.stem + ".config.yaml"))
            counted = {name: metrics.pop(name) for name in ("num_users", "num_targets_seen", "num_targets_unknown")}
            described = {**protocol.describe(), **counted, "max_seq_len": train_config.data.max_seq_len}
            result = {"protocol": described, "metrics": metrics, "checkpoint": str(config.checkpoint)}
            write_json(output, {**result, "vocabulary_sha256": fingerprint(dataset.manifest)})
            print(protocol)
            print_metrics(metrics, config.ks)
            print(f"written: {output}")


def print_metrics(metrics: dict[str, float], ks: Sequence[int]) -> None:
    """Print a metric a row and a cut-off a column."""
    print("        " + "".join(f"{f'@{k}':>9}" for k in ks))
    for name in ("hr", "ndcg", "mrr"):
        print(f"{name:8}" + "".join(f"{metrics[f'{name}@{k}']:9.4f}" for k in ks))
