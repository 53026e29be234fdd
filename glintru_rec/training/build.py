"""Make a model as a config says: fresh for training, sharded with a checkpoint's weights, or plain in one process."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torchrec.distributed.model_parallel import DistributedModelParallel

from glintru_rec.config import from_yaml
from glintru_rec.data.admitted import AdmittedDataset
from glintru_rec.data.batches import TrainingBatches
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.dataset_files import VOCABULARY_FILE, fingerprint, is_raw
from glintru_rec.data.id_map import ID_MAP_FILE, IdMap, read_admitted
from glintru_rec.data.reader import Ranks, RowGroupBatches
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.data.side_features import SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders import build_encoder
from glintru_rec.encoders.side_embeddings import SideEmbeddings
from glintru_rec.errors import InputError
from glintru_rec.losses import LogUniform, NegativeSampler, Popularity, Uniform
from glintru_rec.model import SequenceModel
from glintru_rec.tables.sharding import build_table, distribute
from glintru_rec.training.checkpoint import RunState, best_checkpoint, from_first_rank, load_checkpoint, load_plain, read_state
from glintru_rec.training.config import LossConfig, TrainConfig
from glintru_rec.training.processes import gather_arrays, join_ids, sum_counts


def build_model(config: TrainConfig, num_items: int, device: torch.device, side_sizes: Sequence[int] = ()) -> SequenceModel:
    """Make a fresh model; the weights follow from ``config.trainer.seed``.

    Args:
        config: of the run.
        num_items: of the catalog.
        device: of everything but a table that will be sharded.
        side_sizes: rows of the tables of ``config.model.side_features`` (see `SideVocabulary.sizes`).
    """
    torch.manual_seed(config.trainer.seed)
    encoder = build_encoder(config.model.encoder, config.model.embedding_dim, config.model.options).to(device)
    item_bias = config.model.item_bias
    table = build_table(num_items, config.model.embedding_dim, config.table, device, item_bias)
    # Drawn last: the other weights are those of a model without side features.
    side = SideEmbeddings(side_sizes, config.model.embedding_dim, config.table.init_std).to(device)
    return SequenceModel(table, encoder, config.model.similarity, item_bias, side)


def build_distributed(
    config: TrainConfig, num_items: int, device: torch.device, side_sizes: Sequence[int] = ()
) -> DistributedModelParallel:
    """Make a fresh model (see `build_model`) on all ranks, its table sharded or replicated as ``config.table`` says."""
    return distribute(build_model(config, num_items, device, side_sizes), config.table, device, config.trainer.seed)


def open_dataset(config: TrainConfig) -> SequenceDataset | RowGroupDataset:
    """Open ``data.path``, in memory or on the disk as ``data.reader`` says, with the side features that the model reads.

    Raises:
        InputError: it cannot be read, or has raw ids, of which nobody knows which rows are theirs.
    """
    data, side_features = config.data, config.model.side_features
    dataset: SequenceDataset | RowGroupDataset
    if data.reader == "memory":
        dataset = SequenceDataset.open(data.path, side_features)
    else:
        dataset = RowGroupDataset.open(data.path, data.row_groups_held, side_features)
    if is_raw(dataset.manifest) and not config.dynamic:
        raise InputError(
            f"data.path={data.path} was prepared with ids=raw, so its items have no indices: give data.vocabulary=dynamic and "
            f"vocabulary.capacity, or prepare it with ids=dense"
        )
    return dataset


def build_batches(
    config: TrainConfig, dataset: SequenceDataset | RowGroupDataset, causal: bool
) -> TrainingBatches | RowGroupBatches:
    """Make this rank's training batches; ``causal`` says whether the encoder has a target at every position."""
    data, trainer = config.data, config.trainer
    rank, world_size = dist.get_rank(), dist.get_world_size()
    sizes = (data.max_seq_len, trainer.batch_targets, trainer.seed)
    if isinstance(dataset, RowGroupDataset):
        ranks = Ranks(rank, world_size, gather_arrays, sum_counts)
        return RowGroupBatches(dataset, *sizes, ranks, causal, data.reversed_share, data.reversed_epochs)
    return TrainingBatches(
        *dataset.train_sequences(),
        *sizes,
        rank,
        world_size,
        causal,
        data.reversed_share,
        data.reversed_epochs,
        side_ids=dataset.train_side_ids(),
        ids=dataset.vocabulary.item_ids,
    )


def build_uniform(loss: LossConfig, num_items: int) -> NegativeSampler:
    """Make the sampler of this rank's negatives for ``loss.negatives=uniform``."""
    return NegativeSampler(Uniform(num_items), loss.num_negatives, join=join_ids if loss.gather_negatives else None)


def build_negatives(
    loss: LossConfig,
    dataset: SequenceDataset | RowGroupDataset,
    batches: TrainingBatches | RowGroupBatches,
    epoch: int,
) -> NegativeSampler:
    """Make the sampler of this rank's negatives in an epoch, as ``loss`` says; all ranks do at once."""
    num_items, num_draws = dataset.num_items, loss.num_negatives
    join = join_ids if loss.gather_negatives else None
    if loss.negatives == "uniform":
        return build_uniform(loss, num_items)
    if loss.negatives == "log_uniform":
        return NegativeSampler(LogUniform(num_items), num_draws, join=join)
    if loss.negatives == "popularity":
        counts = torch.from_numpy(batches.event_counts(num_items))
        return NegativeSampler(Popularity(counts, loss.popularity_power), num_draws, join=join)
    targets = Popularity(torch.from_numpy(batches.target_counts(num_items, epoch)))
    if loss.negatives == "in_batch":
        return NegativeSampler(targets=targets, join=join)
    from_batch = round(loss.mixed_share * num_draws)
    return NegativeSampler(Uniform(num_items), num_draws - from_batch, targets, from_batch, join)


def load_run(run_dir: Path, checkpoint: Path) -> tuple[TrainConfig, RunState]:
    """Read a run directory: its config, and where the run stood at a checkpoint."""
    config = from_yaml(run_dir / "config.yaml", TrainConfig)
    state = read_state(checkpoint)
    if state.model_fingerprint != config.model_fingerprint():
        raise InputError(f"{checkpoint} was written by another model than {run_dir / 'config.yaml'} describes")
    return config, state


def check_kind(dynamic: bool, state: RunState, run_dir: Path) -> None:
    """Raise an `InputError` unless a run's vocabulary is of the kind that is asked for."""
    if dynamic != state.dynamic:
        kinds = [f"data.vocabulary={'dynamic' if kind else 'dense'}" for kind in (state.dynamic, dynamic)]
        raise InputError(f"{run_dir} was trained with {kinds[0]}, this run has {kinds[1]}: its item table has other rows")


def check_vocabulary(dataset: SequenceDataset | RowGroupDataset, state: RunState, run_dir: Path) -> None:
    """Raise an `InputError` unless a run was trained on the dataset's vocabularies, or where it is dynamic on the dataset."""
    found = fingerprint(dataset.manifest)
    if found != state.vocabulary_sha256:
        if state.dynamic:
            raise InputError(f"{run_dir} was begun with other data; new data begin a new run, by trainer.init_from={run_dir}")
        raise InputError(
            f"{run_dir} was trained on another vocabulary (sha256 {state.vocabulary_sha256[:12]}…) than the dataset's "
            f"({found[:12]}…): its item table does not belong to these items"
        )
    _check_side_vocabulary(dataset, run_dir)


def check_grown_vocabulary(dataset: SequenceDataset | RowGroupDataset, state: RunState, run_dir: Path) -> None:
    """Raise an `InputError` unless the dataset begins with all items of a run's, and has its values of side features."""
    num_known = Vocabulary.load(run_dir / VOCABULARY_FILE).num_items
    if dataset.vocabulary.first(num_known).sha256 != state.vocabulary_sha256:
        check_vocabulary(dataset, state, run_dir)
    _check_side_vocabulary(dataset, run_dir)


def _check_side_vocabulary(dataset: SequenceDataset | RowGroupDataset, run_dir: Path) -> None:
    trained = SideVocabulary.load(run_dir).values
    for name, values in dataset.side.values.items():
        if trained.get(name, values) != values:
            raise InputError(
                f"{run_dir} was trained with {len(trained[name])} values of side feature {name!r}, and they are not the "
                f"{len(values)} of the dataset: its table does not belong to these"
            )


def load_distributed(
    run_dir: Path, dataset: SequenceDataset, device: torch.device
) -> tuple[TrainConfig, DistributedModelParallel, SequenceDataset | AdmittedDataset]:
    """Make the model of a run on all ranks, with the weights of its best checkpoint; give the dataset as it sees it.

    The dataset was opened with the run's side features.
    """
    checkpoint = _agreed_best(run_dir)
    config, state = load_run(run_dir, checkpoint)
    seen = dataset_seen_by(config, state, checkpoint, dataset, run_dir)
    if device.type == "cpu":  # a run that kept rows in main memory beside a GPU has them there
        config = replace(config, table=replace(config.table, kernel="fused"))
    model = build_distributed(config, config.num_rows(dataset.num_items), device, dataset.side.sizes)
    load_checkpoint(checkpoint, model)
    return config, model, seen


def dataset_seen_by(
    config: TrainConfig, state: RunState, checkpoint: Path, dataset: SequenceDataset, run_dir: Path
) -> SequenceDataset | AdmittedDataset:
    """Give a dataset as the model of a checkpoint sees it: as it is, or where the vocabulary is dynamic in rows of the table.

    Raises:
        InputError: the item table does not belong to the dataset's items.
    """
    if not config.dynamic:
        check_vocabulary(dataset, state, run_dir)
        return dataset
    id_map = IdMap(dataset.vocabulary.id_type, config.vocabulary)
    id_map.load(checkpoint / ID_MAP_FILE)
    return AdmittedDataset(dataset, id_map)


def warm_start(
    model: DistributedModelParallel, run_dir: Path, dataset: SequenceDataset | RowGroupDataset, id_map: IdMap | None = None
) -> None:
    """Fill a fresh model on all ranks with the weights of another run's best checkpoint.

    What has no weights may differ: dropout, ``causal``, the sharding of the table. A dataset that has grown
    (``prepare base=…``) starts with the run's items: they get their rows, those that came later keep their random ones. With
    an id map the dataset may be any: the map goes on where the other run's was, so that every item which that one knew keeps
    its row.

    Raises:
        InputError: no run directory, of a vocabulary that the dataset's does not begin with, or with tensors of other names or
            shapes.
    """
    checkpoint = _agreed_best(run_dir)
    state = read_state(checkpoint)
    check_kind(id_map is not None, state, run_dir)
    if id_map is None:
        check_grown_vocabulary(dataset, state, run_dir)
        load_checkpoint(checkpoint, model, may_grow=True)
    else:
        id_map.load(checkpoint / ID_MAP_FILE)
        id_map.begin_run()
        load_checkpoint(checkpoint, model)


def _agreed_best(run_dir: Path) -> Path:
    checkpoint = from_first_rank(lambda: best_checkpoint(run_dir))
    assert checkpoint is not None
    return checkpoint


class PlainRun(NamedTuple):
    """A run read into one process."""

    config: TrainConfig
    state: RunState
    """Where the run stood at its best checkpoint."""
    vocabulary: Vocabulary
    """Of the item table: row i is item i's. A dynamic one's table may have more rows, which are no item's."""
    model: SequenceModel
    """Whole, on the CPU, in evaluation mode, with the weights of the best checkpoint."""
    checkpoint: Path
    """That they are of."""


def load_unsharded(run_dir: Path) -> PlainRun:
    """Read a run whole into this process, with no process group.

    Raises:
        InputError: no run directory, or its parts do not belong together.
    """
    checkpoint = best_checkpoint(run_dir)
    config, state = load_run(run_dir, checkpoint)
    if config.dynamic:
        vocabulary = read_admitted(checkpoint / ID_MAP_FILE, config.vocabulary.capacity)
    else:
        vocabulary = Vocabulary.load(run_dir / VOCABULARY_FILE)
        if vocabulary.sha256 != state.vocabulary_sha256:
            raise InputError(f"{run_dir / VOCABULARY_FILE} is not the vocabulary that the run was trained on")
    table = replace(config.table, sharding="replicated", optimizer="adamw", dtype="fp32", kernel="fused")
    plain = replace(config, table=table)
    side = SideVocabulary.load(run_dir).choose(config.model.side_features)
    model = build_model(plain, config.num_rows(vocabulary.num_items), torch.device("cpu"), side.sizes)
    load_plain(checkpoint, model)
    return PlainRun(config, state, vocabulary, model.eval(), checkpoint)
