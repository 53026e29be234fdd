"""Everything that decides a training run: the schema of ``configs/train.yaml`` and of a run directory's ``config.yaml``."""

import hashlib
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

from omegaconf import MISSING

from glintru_rec.config import check, check_at_least, one_of
from glintru_rec.data.id_map import VocabularyConfig
from glintru_rec.errors import InputError
from glintru_rec.losses.softmax import PRECISIONS
from glintru_rec.model import check_similarity
from glintru_rec.tables.config import TableConfig


@dataclass
class DataConfig:
    """What is trained on.

    Attributes:
        path: a sequence dataset, made by ``launch/prepare.py``.
        vocabulary: ``dense``: the dataset's items have a row of the item table each. ``dynamic``: items, however many, get rows
            while training goes on, and lose them, as ``vocabulary`` says (see `glintru_rec.data.id_map`); the dataset is best
            prepared with ``ids=raw``.
        max_seq_len: most items that the encoder reads, in training, evaluation and scoring: the latest ones.
        reversed_share: share of the training histories that are read backwards in the first ``reversed_epochs``: helps
            where few events are known of an item.
        reversed_epochs: after these, all are read in order.
        reader: ``memory`` (every rank holds the whole dataset) or ``row_groups`` (each rank holds ``row_groups_held`` row
            groups of the dataset's files at a time, whatever its size).
        row_groups_held: how many; they are shuffled together. `prepare` puts at most 16,384 users and about a million
            events into one.
    """

    path: str = MISSING
    vocabulary: str = "dense"
    max_seq_len: int = 200
    reversed_share: float = 0.0
    reversed_epochs: int = 0
    reader: str = "memory"
    row_groups_held: int = 8

    def __post_init__(self):
        one_of("data.vocabulary", self.vocabulary, ("dense", "dynamic"))
        check("data.max_seq_len", self.max_seq_len, self.max_seq_len >= 1, "at least 1")
        one_of("data.reader", self.reader, ("memory", "row_groups"))
        check("data.row_groups_held", self.row_groups_held, self.row_groups_held >= 1, "at least 1")
        check("data.reversed_share", self.reversed_share, 0 <= self.reversed_share <= 1, "from 0 to 1")
        check("data.reversed_epochs", self.reversed_epochs, self.reversed_epochs >= 0, "at least 0")
        both = (self.reversed_share > 0) == (self.reversed_epochs > 0)
        check(
            "data.reversed_epochs",
            self.reversed_epochs,
            both,
            f"0 as data.reversed_share is, or greater than 0 as that ({self.reversed_share})",
        )


@dataclass
class ModelConfig:
    """What is trained.

    Attributes:
        encoder: name of the encoder (`glintru_rec.encoders.ENCODERS`); or several joined by ``+``, as ``glint_ru+lru_rec``,
            each with an equal share of the width and a loss of its own, whose scores add up.
        embedding_dim: width D of item embeddings and encoder, a multiple of 4.
        similarity: ``dot``, or ``cosine`` (choose ``loss.temperature`` near 0.05 then).
        item_bias: learn a bias of each item, which is added to all its scores; needs ``similarity=dot``.
        side_features: what the encoder reads of each event besides its item: columns of the log that the dataset was prepared
            with (``side_columns`` of the program prepare). Their embeddings are added to the item's; an item to predict has
            none.
        options: further arguments of the encoder's class; of several encoders, those of all, and below a name its own.
    """

    encoder: str = "glint_ru"
    embedding_dim: int = 64
    similarity: str = "dot"
    item_bias: bool = False
    side_features: list[str] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        check("model.embedding_dim", self.embedding_dim, self.embedding_dim >= 4, "at least 4")
        side = list(self.side_features)
        check("model.side_features", side, len(set(side)) == len(side), "names of columns, each once")
        check_similarity(self.similarity, self.item_bias)
        adds_cosines = self.similarity == "cosine" or "+" not in self.encoder
        check("model.similarity", self.similarity, adds_cosines, "cosine with several encoders, whose scores add up")


@dataclass
class LossConfig:
    """What is minimised.

    Attributes:
        name: ``sampled_softmax``, or ``full_softmax`` over the whole catalog: exact, a target costs one product per item. The
            ranks share it evenly, so each holds the vectors, and their gradients, of its part of the catalog alone.
        negatives: how ``sampled_softmax`` draws what a rank's batch shares: ``uniform``; ``log_uniform`` (Zipf's law over
            the index: `prepare` numbers items by falling count); ``popularity`` (by training count); ``in_batch`` (the
            batch's targets); ``mixed`` (``in_batch`` and ``uniform``).
        num_negatives: how many; as many as the catalog has items, or more, means all items. ``in_batch`` has as many as
            the batch has targets.
        popularity_power: of the counts in ``popularity``. An item without training events is never drawn, so it is no
            negative for anyone.
        mixed_share: at most this share of the negatives of ``mixed`` are targets of the batch, the rest are uniform.
        gather_negatives: every rank's targets meet the negatives of all ranks, W times as many on W ranks.
        logq_correction: correct for how often negatives are expected in the sample; ``in_batch`` and ``mixed`` need it.
        correct_positive: correct the target's own score likewise (the classic correction); otherwise it counts as not
            sampled, which estimates the exact softmax.
        temperature: divides the scores.
        horizon: each position is to predict this many of the items that follow it: 1, the next one; 2 or 3 help where few
            events are known of an item and their order says little.
        horizon_decay: weight of each of them in proportion to the one before.
        seen_weight: what an item weighs among the negatives of a target that it stands before in its window: 1, as any other;
            0, it is left out. Rankings leave out what the user has seen; weighing as much as others here, it teaches a model to
            score it low, and what is alike with it. For logs in which users do not come back to an item. Below 1, torch
            code on CUDA too.
        precision: of the matrix products of ``full_softmax``: ``fp32``, or ``bf16`` factors summed in fp32 (1.7 to 1.9 times as
            fast on a CPU with AMX; on one without, fp32 all the same: oneDNN has no such product for AVX512_BF16).
    """

    name: str = "sampled_softmax"
    negatives: str = "uniform"
    num_negatives: int = 1024
    popularity_power: float = 1.0
    mixed_share: float = 0.5
    gather_negatives: bool = False
    logq_correction: bool = True
    correct_positive: bool = False
    temperature: float = 1.0
    horizon: int = 1
    horizon_decay: float = 0.5
    seen_weight: float = 1.0
    precision: str = "fp32"

    def __post_init__(self):
        one_of("loss.name", self.name, ("sampled_softmax", "full_softmax"))
        check("loss.horizon", self.horizon, self.horizon >= 1, "at least 1")
        check("loss.horizon_decay", self.horizon_decay, 0 < self.horizon_decay <= 1, "greater than 0 and at most 1")
        check("loss.seen_weight", self.seen_weight, 0 <= self.seen_weight <= 1, "at least 0 and at most 1")
        one_of("loss.precision", self.precision, PRECISIONS)
        check("loss.num_negatives", self.num_negatives, self.num_negatives >= 1, "at least 1")
        one_of("loss.negatives", self.negatives, ("uniform", "log_uniform", "popularity", "in_batch", "mixed"))
        finite = 0 <= self.popularity_power < math.inf
        check("loss.popularity_power", self.popularity_power, finite, "at least 0 and finite")
        check("loss.mixed_share", self.mixed_share, 0 < self.mixed_share < 1, "greater than 0 and less than 1")
        # Popular items would be pushed down as often as they are targets: uncorrected, such training collapses.
        corrected = self.logq_correction or self.negatives not in ("in_batch", "mixed")
        check("loss.logq_correction", self.logq_correction, corrected, f"true with loss.negatives={self.negatives}")
        possible = self.logq_correction or not self.correct_positive
        check("loss.correct_positive", self.correct_positive, possible, "false with loss.logq_correction=false")
        check("loss.temperature", self.temperature, 0 < self.temperature < math.inf, "greater than 0 and finite")

    def over_whole_catalog(self, num_items: int) -> bool:
        """Whether the loss is exact: asked for so, or no fewer draws than items."""
        return self.name == "full_softmax" or (self.negatives != "in_batch" and self.num_negatives >= num_items)


@dataclass
class OptimizerConfig:
    """AdamW, for everything but a sharded table.

    Attributes:
        learning_rate: of the dense parameters.
        weight_decay: of the dense parameters.
        warmup_steps: steps over which all learning rates, the table's too, rise from 0.
        schedule: what they do then: ``constant``, or fall to 0 along a ``linear`` or ``cosine`` line, which ends with
            ``trainer.max_epochs`` (or ``trainer.max_steps``).
        max_grad_norm: the dense gradients are scaled down to this norm; 0 leaves them.
        ema_decay: validate, save and use an exponential moving average of the weights, over about 1 / (1 - decay) steps;
            0: the weights themselves. Needs ``table.sharding=replicated``.
    """

    learning_rate: float = 1e-3
    weight_decay: float = 0.0
    warmup_steps: int = 0
    schedule: str = "constant"
    max_grad_norm: float = 0.0
    ema_decay: float = 0.0

    def __post_init__(self):
        check("optimizer.learning_rate", self.learning_rate, 0 < self.learning_rate < math.inf, "greater than 0 and finite")
        check("optimizer.weight_decay", self.weight_decay, self.weight_decay >= 0, "at least 0")
        check("optimizer.warmup_steps", self.warmup_steps, self.warmup_steps >= 0, "at least 0")
        check("optimizer.max_grad_norm", self.max_grad_norm, self.max_grad_norm >= 0, "at least 0 (0: off)")
        check("optimizer.ema_decay", self.ema_decay, 0 <= self.ema_decay < 1, "at least 0 (off) and less than 1")
        one_of("optimizer.schedule", self.schedule, ("constant", "linear", "cosine"))


@dataclass
class TrainerConfig:
    """How long, how much at a time, and what is kept.

    Attributes:
        max_epochs: passes over the training targets.
        max_steps: stop after this many steps; 0: no limit.
        batch_targets: most targets in one rank's batch. A target weighs 1 / batch_targets, whatever batch it is in.
        seed: of weights, shuffling, dropout and negatives.
        patience: validations without a better NDCG@10 before training stops; 0: never. Those of the first
            ``data.reversed_epochs`` do not count.
        validate_every_epochs: epochs between validations.
        eval_batch_users: users of one rank's batch in validation.
        checkpoint_every_steps: steps between checkpoints, besides those at validations; 0: none.
        checkpoint_in_background: training goes on while a checkpoint's files are written, from a copy, which takes as much
            memory as weights and optimizer state do; false: training waits for the files.
        keep_last: latest checkpoints kept, besides the best.
        keep_best: checkpoints kept with the best validation, NDCG@10.
        log_every_steps: steps between lines of ``metrics.jsonl``, and between checks of the loss.
        max_loss: a rank's batch whose mean loss is above it stops the run, as one that is not finite always does; 0: no limit.
        timeout_seconds: how long a rank waits for another in a step, a validation or a checkpoint before it takes it for hung,
            and the run fails (torchelastic's ``--max_restarts`` then starts all ranks anew).
        init_from: a run directory with whose best weights training starts; empty: random weights. The encoder must have
            the same parameters and the dataset the same vocabulary, or one grown from it (``prepare base=…``), whose new items
            start at random; optimizers start anew. With ``data.vocabulary=dynamic`` the dataset may be any: items that the run
            knew start with their rows.
        resume: go on from the newest checkpoint in ``output``; a directory with a run in it is refused otherwise.
        device: ``auto`` (CUDA where there is one), ``cpu`` or ``cuda``.
        compile: train with encoder and sampled softmax compiled by torch.compile: the same losses, up to rounding. On a CPU it
            needs a C++ compiler; the first step of a process then takes a minute or so. Validation runs uncompiled.
        precision: of the encoder in training: ``fp32``, or ``bf16`` (mixed, by torch.autocast): products of bf16 factors, fp32
            weights, optimizer, recurrent states, table and loss. Measured on CPUs with AMX alone.
    """

    max_epochs: int = 20
    max_steps: int = 0
    batch_targets: int = 512
    seed: int = 0
    patience: int = 5
    validate_every_epochs: int = 1
    eval_batch_users: int = 512
    checkpoint_every_steps: int = 0
    checkpoint_in_background: bool = True
    keep_last: int = 1
    keep_best: int = 1
    log_every_steps: int = 50
    max_loss: float = 0.0
    timeout_seconds: float = 600.0
    init_from: str = ""
    resume: bool = False
    device: str = "auto"
    compile: bool = False
    precision: str = "fp32"

    def __post_init__(self):
        counts = ("max_epochs", "batch_targets", "validate_every_epochs", "eval_batch_users", "log_every_steps")
        check_at_least(1, "trainer.", self, (*counts, "keep_last", "keep_best"))
        check_at_least(0, "trainer.", self, ("max_steps", "seed", "patience", "checkpoint_every_steps"))
        check("trainer.seed", self.seed, self.seed < 2**63, "less than 2**63")
        check("trainer.max_loss", self.max_loss, 0 <= self.max_loss < math.inf, "at least 0 (0: no limit) and finite")
        possible = 0 < self.timeout_seconds <= 1e7  # more than timedelta and gloo could count
        check("trainer.timeout_seconds", self.timeout_seconds, possible, "greater than 0 and at most 1e7")
        one_of("trainer.device", self.device, ("auto", "cpu", "cuda"))
        one_of("trainer.precision", self.precision, PRECISIONS)


@dataclass
class LoggingConfig:
    """Where figures go besides ``metrics.jsonl`` and ``tensorboard/``, which every run has.

    Attributes:
        mlflow: tracking URI of MLflow: ``https://HOST``, ``sqlite:///FILE``, …; empty: none. Needs ``glintru_rec[mlflow]``.
        experiment: of MLflow; made where it is missing.
        run_name: MLflow's name of the run; empty: the name of the run directory.
    """

    mlflow: str = ""
    experiment: str = "glintru_rec"
    run_name: str = ""


@dataclass
class TrainConfig:
    """A training run.

    Attributes:
        output: the run directory.
        task: ``retrieval``; with ``ranking``, the keys are other ones (``task=ranking --help``).
    """

    output: str = MISSING
    task: str = "retrieval"
    data: DataConfig = field(default_factory=DataConfig)
    vocabulary: VocabularyConfig = field(default_factory=VocabularyConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    table: TableConfig = field(default_factory=TableConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def __post_init__(self):
        one_of("task", self.task, ("retrieval",))
        if self.model.options.get("causal", True) and self.trainer.batch_targets < self.data.max_seq_len:
            raise InputError(
                f"trainer.batch_targets is {self.trainer.batch_targets}, less than data.max_seq_len "
                f"{self.data.max_seq_len}: the targets of one history must fit into a batch"
            )
        if self.loss.horizon > 1 and not self.model.options.get("causal", True):
            raise InputError(
                f"loss.horizon is {self.loss.horizon}, but model.options.causal is false: such an encoder trains on the "
                "last item of a history alone, which nothing follows"
            )
        if self.optimizer.ema_decay > 0 and self.table.sharding != "replicated":
            raise InputError(
                f"optimizer.ema_decay={self.optimizer.ema_decay} needs table.sharding=replicated: averaging a "
                f"{self.table.sharding} table would touch all of its rows at every step"
            )
        if self.dynamic:
            self._check_dynamic()
        elif self.vocabulary != VocabularyConfig():
            raise InputError("vocabulary.* has no effect with data.vocabulary=dense: give data.vocabulary=dynamic, or leave it")

    @property
    def dynamic(self) -> bool:
        """Whether items get their rows while training goes on."""
        return self.data.vocabulary == "dynamic"

    def num_rows(self, num_items: int) -> int:
        """Give the rows of the item table for a dataset of so many items."""
        return self.vocabulary.capacity if self.dynamic else num_items

    def _check_dynamic(self) -> None:
        if not self.vocabulary.capacity:
            raise InputError("data.vocabulary=dynamic needs vocabulary.capacity, the rows of the item table: give it")
        if self.loss.name == "sampled_softmax" and self.loss.negatives != "uniform":
            raise InputError(
                f"loss.negatives={self.loss.negatives} needs how often each item is a target, which nobody knows while "
                "data.vocabulary=dynamic admits items: use uniform, or loss=full_softmax"
            )
        if self.model.side_features:
            raise InputError(
                f"model.side_features={self.model.side_features}: data.vocabulary=dynamic is of items alone; leave them"
            )
        if self.optimizer.ema_decay > 0:
            raise InputError(
                f"optimizer.ema_decay={self.optimizer.ema_decay}: an average of the weights would mix rows of evicted items "
                "with their successors' (data.vocabulary=dynamic); use 0"
            )
        if self.table.kernel != "fused":
            raise InputError(
                f"table.kernel={self.table.kernel}: rows that data.vocabulary=dynamic draws anew would be overwritten from "
                "the cache; use fused"
            )

    def model_fingerprint(self) -> str:
        """Hash what a checkpoint's tensors depend on: the model's config, not how it is trained."""
        model = asdict(self.model)
        for option in ("item_bias", "side_features"):
            if not model[option]:
                del model[option]  # checkpoints older than the option are of this model
        described = {"model": model, "max_seq_len": self.data.max_seq_len}
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]
