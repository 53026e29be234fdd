"""Everything that decides a ranking run: the schema of ``configs/train_ranking.yaml`` and of its run directories."""

import hashlib
import inspect
import json
import math
from dataclasses import asdict, dataclass, field

from omegaconf import MISSING

from glintru_rec.config import check, check_at_least, one_of
from glintru_rec.encoders import SASRec
from glintru_rec.ranking.model import RankingModelConfig
from glintru_rec.ranking.tower import TowerConfig
from glintru_rec.tables.config import TableConfig
from glintru_rec.training.config import LoggingConfig


@dataclass
class RankingDataConfig:
    """What is trained on.

    Attributes:
        path: a ranking dataset, made by ``launch/prepare.py task=ranking``.
        max_seq_len: every example sees at least so many of its user's latest events, where there are so many.
        block_examples: most examples of a user, one after the other, that share a pass of the encoder; 1 mixes best, more
            costs less.
        tasks: task → weight of its loss; empty: all tasks of the dataset, with weight 1.
    """

    path: str = MISSING
    max_seq_len: int = 100
    block_examples: int = 50
    tasks: dict[str, float] = field(default_factory=dict)

    def __post_init__(self):
        check_at_least(1, "data.", self, ("max_seq_len", "block_examples"))
        for name, weight in self.tasks.items():
            check(f"data.tasks.{name}", weight, 0 < weight < math.inf, "greater than 0 and finite")


@dataclass
class RankingOptimizerConfig:
    """AdamW, for everything but sharded tables.

    Attributes:
        learning_rate: of the dense parameters.
        weight_decay: of the dense parameters.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0

    def __post_init__(self):
        check("optimizer.learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "greater than 0 and finite")
        check("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")


@dataclass
class RankingTrainerConfig:
    """How long, how much at a time, and what is kept.

    Attributes:
        max_epochs: passes over the training examples.
        batch_examples: examples in one rank's batch, about: blocks stay whole. An example weighs 1 / batch_examples.
        seed: of weights, shuffling and dropout.
        patience: validations without a better figure before training stops; 0: never. The figure is the AUC of the first
            task, or minus its root mean squared error if it is a number.
        keep_last: latest checkpoints kept, besides the best.
        timeout_seconds: how long a rank waits for another before it takes it for hung, and fails.
        log_every_steps: steps between lines of ``metrics.jsonl``.
        resume: go on from the newest checkpoint in ``output``; a directory with a run in it is refused otherwise.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
    """

    max_epochs: int = 20
    batch_examples: int = 512
    seed: int = 0
    patience: int = 3
    keep_last: int = 1
    timeout_seconds: float = 600.0
    log_every_steps: int = 50
    resume: bool = False
    device: str = "auto"

    def __post_init__(self):
        check_at_least(1, "trainer.", self, ("max_epochs", "batch_examples", "keep_last", "log_every_steps"))
        check_at_least(0, "trainer.", self, ("seed", "patience"))
        possible = 0 < self.timeout_seconds <= 1e7
        check("trainer.timeout_seconds", self.timeout_seconds, possible, "greater than 0 and at most 1e7")
        one_of("trainer.device", self.device, ("auto", "cpu", "cuda"))


@dataclass
class RankingConfig:
    """A training of a ranking model.

    Attributes:
        output: the run directory.
        task: ``ranking``.
    """

    output: str = MISSING
    task: str = "ranking"
    data: RankingDataConfig = field(default_factory=RankingDataConfig)
    tower: TowerConfig = field(default_factory=TowerConfig)
    model: RankingModelConfig = field(default_factory=RankingModelConfig)
    table: TableConfig = field(default_factory=TableConfig)
    optimizer: RankingOptimizerConfig = field(default_factory=RankingOptimizerConfig)
    trainer: RankingTrainerConfig = field(default_factory=RankingTrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self):
        check("task", self.task, self.task == "ranking", "ranking here")
        known = (("sharding", ("row_wise", "replicated")), ("dtype", ("fp32",)), ("kernel", ("fused",)))
        for key, choices in known:
            value = getattr(self.table, key)
            check(f"table.{key}", value, value in choices, f"{' or '.join(choices)} with task=ranking")
        default, share = TableConfig(), self.table.cache_load_factor
        check("table.cache_load_factor", share, share == default.cache_load_factor, "left as it is: task=ranking has no cache")
        topology = asdict(self.table.topology)
        check("table.topology", topology, topology == asdict(default.topology), "left as it is: task=ranking has no planner")
        longest, span = self.data.max_seq_len + self.data.block_examples, self.encoder_span
        allowed = f"at least data.max_seq_len + data.block_examples = {longest}: a longer shared history would be cut"
        check("tower.options.max_seq_len", span, span is None or (isinstance(span, int) and span >= longest), allowed)

    @property
    def encoder_span(self) -> int | None:
        """Most events of a history that the tower's encoder encodes as one; None: any number."""
        if self.tower.encoder != "sasrec":
            return None
        return self.tower.options.get("max_seq_len", inspect.signature(SASRec).parameters["max_seq_len"].default)

    def model_fingerprint(self) -> str:
        """Hash what a checkpoint's tensors depend on."""
        tower = {
            key: value for key, value in asdict(self.tower).items() if key not in ("init_from", "frozen", "learning_rate_scale")
        }
        described = {"model": asdict(self.model), "tower": tower, "tasks": list(self.data.tasks)}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
