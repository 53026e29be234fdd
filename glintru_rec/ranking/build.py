"""Make a ranking model as a config says, with the weights of a retrieval run where it asks for them."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter

from glintru_rec.encoders import Encoder, build_encoder
from glintru_rec.errors import InputError
from glintru_rec.ranking.config import RankingConfig
from glintru_rec.ranking.dataset import ITEM, RankingDataset, num_embeddings
from glintru_rec.ranking.model import RankingModel
from glintru_rec.ranking.tower import RunningMean, SequenceTower, sequence_table
from glintru_rec.tables.collections import distribute_collections, table_parameters, write_known_rows
from glintru_rec.tables.sharding import TABLE_KEY
from glintru_rec.training.build import load_run, load_unsharded
from glintru_rec.training.checkpoint import best_checkpoint, load_plain
from glintru_rec.training.processes import seed_step

ITEM_TABLE = f"tower.embeddings.embeddings.{sequence_table(ITEM)}.weight"
ENCODER = "tower.encoder."
# A step that no run reaches: the seed of what happens before the first.
NO_STEP = 2**40


def load_encoder(run_dir: str | Path) -> Encoder:
    """Make the encoder of a retrieval run, with the weights of its best checkpoint, in this process alone.

    It reads the encoder's tensors only, however large the run's item table is.

    Args:
        run_dir: what ``launch/train.py`` wrote.

    Returns:
        On the CPU, in evaluation mode.

    Raises:
        InputError: no run directory, or its parts do not belong together.
    """
    checkpoint = best_checkpoint(Path(run_dir))
    config, _ = load_run(Path(run_dir), checkpoint)
    encoder = build_encoder(config.model.encoder, config.model.embedding_dim, config.model.options)
    load_plain(checkpoint, nn.ModuleDict({"encoder": encoder}))
    return encoder.eval()


def task_weights(config: RankingConfig, manifest: dict[str, Any]) -> dict[str, float]:
    """Give the tasks to train and the weights of their losses.

    Raises:
        InputError: the dataset, whose manifest this is, has no such task.
    """
    known = manifest["tasks"]
    for name in config.data.tasks:
        if name not in known:
            raise InputError(f"data.tasks.{name}: {config.data.path} has the tasks {', '.join(known)}")
    return dict(config.data.tasks) or dict.fromkeys(known, 1.0)


def tower_features(config: RankingConfig, manifest: dict[str, Any]) -> dict[str, int]:
    """Give the table sizes of what the tower reads of each event, the item first; nothing where there is no tower.

    Raises:
        InputError: the dataset, whose manifest this is, has no such feature.
    """
    if config.tower.encoder == "none":
        return {}
    sizes = num_embeddings(manifest, "sequence")
    chosen = [ITEM, *(config.tower.features or [name for name in sizes if name != ITEM])]
    for name in chosen:
        if name not in sizes:
            raise InputError(f"tower.features has {name!r}; the sequence features of the dataset are {', '.join(sizes)}")
    return {name: sizes[name] for name in chosen}


def build_ranking_model(config: RankingConfig, manifest: dict[str, Any], device: torch.device) -> RankingModel:
    """Make a fresh model, its tables on ``device``; weights that are not on ``meta`` follow from ``config.trainer.seed``.

    Args:
        config: of the run.
        manifest: of the dataset; or what a run keeps of it (`keep_features`).
        device: of the tables.
    """
    torch.manual_seed(config.trainer.seed)
    tower, features = None, tower_features(config, manifest)
    if features:
        tower = SequenceTower(
            features,
            _build_tower_encoder(config),
            config.tower.combine,
            config.tower.output,
            config.tower.num_heads,
            config.table.init_std,
            device,
        )
    tasks, num_dense = list(task_weights(config, manifest)), len(manifest["dense"])
    sparse = num_embeddings(manifest, "sparse")
    return RankingModel(tasks, sparse, num_dense, tower, config.model, config.table.init_std, device)


def _build_tower_encoder(config: RankingConfig) -> Encoder:
    tower = config.tower
    if tower.encoder == "mean":
        return RunningMean(tower.width)
    encoder = build_encoder(tower.encoder, tower.width, tower.options, "tower")
    if tower.init_from:
        trained = load_encoder(tower.init_from)
        try:
            encoder.load_state_dict(trained.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:300]
            raise InputError(f"tower.init_from={tower.init_from} has another encoder than tower describes: {reason}") from error
    return encoder


def build_distributed_ranking(
    config: RankingConfig, dataset: RankingDataset, device: torch.device
) -> tuple[DistributedModelParallel, CombinedOptimizer]:
    """Make a fresh model on all ranks under one DistributedModelParallel, warm-started where asked for, and its optimizer.

    Groups of parameters: the encoder and the item embeddings that it reads have ``tower.learning_rate_scale`` times the
    rates of the others.
    """
    sharded = config.table.sharding != "replicated"
    model = build_ranking_model(config, dataset.manifest, torch.device("meta") if sharded else device)
    tables, scale = table_parameters(model), config.tower.learning_rate_scale
    if model.tower is not None and config.tower.frozen:
        model.tower.freeze()
        model.get_parameter(ITEM_TABLE).requires_grad_(sharded)  # a fused table gets gradients of 0 then, which change nothing
    # Each rank fills its own rows: from one seed, they would start as copies of another rank's.
    seed_step(config.trainer.seed, NO_STEP, dist.get_rank())
    distributed = distribute_collections(model.to(device) if not sharded else model, config.table, device, {ITEM_TABLE: scale})
    if config.tower.init_from:
        rows, known = retrieval_rows(Path(config.tower.init_from), dataset)
        write_known_rows(distributed, ITEM_TABLE, rows, known)

    parameters = {
        name: parameter
        for name, parameter in in_backward_optimizer_filter(distributed.named_parameters())
        if parameter.requires_grad
    }

    def factory(_: object) -> torch.optim.Optimizer:
        groups: list[dict] = []
        for is_table in (False, True):
            for is_encoder in (False, True):
                chosen = [
                    parameter
                    for name, parameter in parameters.items()
                    if (name in tables) == is_table and (name.startswith(ENCODER) or name == ITEM_TABLE) == is_encoder
                ]
                own = config.table if is_table else config.optimizer
                rate = own.learning_rate * (scale if is_encoder else 1.0)
                options = {"eps": config.table.eps} if is_table else {}
                if chosen:
                    groups.append({"params": chosen, "lr": rate, "weight_decay": own.weight_decay, **options})
        return torch.optim.AdamW(groups, fused=True)

    parts = [("dense", KeyedOptimizerWrapper(parameters, factory))]
    if sharded:
        parts.insert(0, ("tables", distributed.fused_optimizer))
    return distributed, CombinedOptimizer(parts)


def retrieval_rows(run_dir: Path, dataset: RankingDataset) -> tuple[Tensor, Tensor]:
    """Find a dataset's items in a retrieval run, by their original ids.

    The run's item table is read whole, on every rank.

    Returns:
        Embeddings for the rows of the dataset's item table, ``[V, D]``, and which of them the run has, bool ``[V]``.

    Raises:
        InputError: the run has none of the items.
    """
    run = load_unsharded(run_dir)
    places = torch.from_numpy(run.vocabulary.encode(dataset.item_ids))
    if not (places >= 0).any():
        raise InputError(f"tower.init_from={run_dir} was trained on none of the dataset's {len(places):,} items")
    table = run.model.state_dict()[TABLE_KEY]
    places = torch.cat([torch.tensor([-1]), places])  # row 0 is for unknown items
    return run.model.embeddings(table[places.clamp(min=0)]), places >= 0
