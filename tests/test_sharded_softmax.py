"""The exact softmax over a catalog that ranks share, on real gloo ranks, against the unsharded formula in float64."""

import copy
import itertools
import multiprocessing
import os
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.testing import assert_close

from glintru_rec.config import compose
from glintru_rec.data.batches import Batch
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.losses import Seen, full_softmax, softmax
from glintru_rec.model import SequenceModel
from glintru_rec.tables.sharding import answered_ids, local_rows
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import quiet_dependencies
from glintru_rec.training.trainer import Trainer
from tests.conftest import SMALL

pytestmark = pytest.mark.programs

# The server imports everything once; the ranks that it forks are processes of their own.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload([__name__])

WORLD_SIZES = (1, 2, 4)


def run_ranks(function, world_size, folder, *arguments):
    """Call ``function(folder, *arguments)`` in gloo ranks, each of which may save tensors as ``{rank}-of-{world_size}.pt``."""
    ranks = [
        processes.Process(target=be_rank, args=(rank, world_size, folder, function, arguments)) for rank in range(world_size)
    ]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(120)
        rank.kill()
    assert [rank.exitcode for rank in ranks] == [0] * world_size
    return [torch.load(folder / f"{rank}-of-{world_size}.pt") for rank in range(world_size)]


def be_rank(rank, world_size, folder, function, arguments):
    torch.set_num_threads(1)
    quiet_dependencies()
    os.environ["LOCAL_WORLD_SIZE"] = str(world_size)
    store = dist.FileStore(str(folder / f"store-{world_size}"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    torch.save(function(*arguments), folder / f"{rank}-of-{world_size}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_answered_ids_cover_the_catalog(monkeypatch):
    for num_items, world_size in itertools.product((1, 2, 5, 8, 60, 1001), (1, 2, 3, 4, 7)):
        monkeypatch.setattr(dist, "get_world_size", lambda: world_size)  # noqa: B023
        parts = []
        for rank in range(world_size):
            monkeypatch.setattr(dist, "get_rank", lambda: rank)  # noqa: B023
            parts.append(answered_ids(num_items))
        assert [item for part in parts for item in part] == list(range(num_items))
        assert max(map(len, parts)) == -(-num_items // world_size)


# --- the loss alone

NUM_ITEMS, WIDTH = 23, 5
# Targets and items of four ranks, some without any; of fewer ranks, each has those of several.
CASES = {
    "even": ((3, 3, 3, 3), (6, 6, 6, 5)),
    "uneven": ((4, 1, 9, 2), (1, 14, 3, 5)),
    "an empty batch": ((4, 0, 7, 5), (6, 6, 6, 5)),
    "only one batch": ((0, 0, 5, 0), (6, 6, 6, 5)),
    "no items": ((4, 3, 2, 1), (0, 11, 12, 0)),
    "nothing at all": ((0, 0, 0, 0), (6, 6, 6, 5)),
}
TEMPERATURES = (1.0, 0.3)
ALL_CASES = list(itertools.product(CASES.values(), TEMPERATURES, (False, True)))  # the last: what is seen left out


def inputs(num_targets):
    """Queries, vectors to aim at, items and a weight for each loss."""
    generator = torch.Generator().manual_seed(num_targets)
    sizes = ((num_targets, WIDTH), (num_targets, WIDTH), (NUM_ITEMS, WIDTH), (num_targets,))
    return [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]


def share_of(parts, rank, world_size):
    """What rank ``rank`` has when ``world_size`` ranks divide what four have: a slice."""
    bounds = [0, *itertools.accumulate(parts)]
    step = 4 // world_size
    return slice(bounds[rank * step], bounds[(rank + 1) * step])


def seen_of(targets):
    """What some targets, numbered, have seen: slices of 0 to 3 items drawn for each, less the one that is aimed at."""
    drawn = torch.randint(NUM_ITEMS, (40, 3), generator=torch.Generator().manual_seed(9))[targets]
    begins = 3 * torch.arange(targets.numel())
    aims = torch.where(targets % 3 == 0, drawn[:, 0], 5).unsqueeze(1)
    return Seen(drawn.flatten(), begins, begins + targets % 4, aims, -torch.inf)


def loss_on_ranks():
    """Loss and gradients of this rank, for every case, temperature and size of blocks."""
    rank, world_size, results = dist.get_rank(), dist.get_world_size(), []
    for rows, columns in ((256, 1024), (3, 4)):
        softmax.ROWS, softmax.COLUMNS = rows, columns
        for (num_targets, num_items), temperature, leaves_out in ALL_CASES:
            query, aim, items, weights = inputs(sum(num_targets))
            mine, own = share_of(num_targets, rank, world_size), share_of(num_items, rank, world_size)
            leaves = [part.requires_grad_() for part in (query[mine], aim[mine], items[own])]
            seen = seen_of(torch.arange(sum(num_targets))[mine]) if leaves_out else None
            loss = full_softmax(*leaves, temperature, group=dist.group.WORLD, seen=seen, first_item=own.start)
            results.append([loss.detach(), *torch.autograd.grad((loss * weights[mine]).sum(), leaves)])
    return results


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_compute_the_whole_softmax(world_size, tmp_path):
    ranks = run_ranks(loss_on_ranks, world_size, tmp_path)
    assert [len(results) for results in ranks] == [2 * len(ALL_CASES)] * world_size
    for number, ((num_targets, _), temperature, leaves_out) in enumerate(ALL_CASES * 2):
        query, aim, items, weights = inputs(sum(num_targets))
        leaves = [query.requires_grad_(), aim.requires_grad_(), items.requires_grad_()]
        scores = query @ items.T / temperature
        if leaves_out:
            seen = seen_of(torch.arange(sum(num_targets)))
            for t, (begin, end) in enumerate(zip(seen.begins, seen.ends)):
                hidden = set(seen.item_ids[begin:end].tolist()) - set(seen.aims[t].tolist())
                scores.data[t, sorted(hidden)] = -torch.inf
        loss = scores.exp().sum(1).log() - (query * aim).sum(1) / temperature
        expected = [loss.detach(), *torch.autograd.grad((loss * weights).sum(), leaves)]
        ours = [torch.cat(parts) for parts in zip(*(results[number] for results in ranks))]
        assert_close(ours, expected, rtol=1e-11, atol=1e-11)


# --- training steps

STEPS = {
    "row_wise": ["table=row_wise", "table.optimizer=sgd", "table.learning_rate=1"],
    "adagrad": ["table=row_wise", "model.item_bias=true", "loss.horizon=3"],
    "replicated": ["table=replicated", "model.similarity=cosine", "loss.temperature=0.1"],
    "seen left out": ["table=row_wise", "table.optimizer=sgd", "table.learning_rate=1", "loss.seen_weight=0"],
    "replicated, seen left out": ["table=replicated", "loss.horizon=3", "loss.seen_weight=0.3"],
    "replicated with biases": ["table=replicated", "model.item_bias=true", "loss.precision=fp32"],
}
LENGTHS = (5, 9, 2)  # of the sequences: the last of four ranks has none
SEQUENCES = torch.randint(60, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1)).split(LENGTHS)


def make_trainer(dataset_dir, overrides):
    """A trainer on which the loss is the same for any number of ranks, and the batch of this rank."""
    rank, world_size = dist.get_rank(), dist.get_world_size()
    arguments = [f"data.path={dataset_dir}", "output=none", *SMALL, "model.options.dropout=0", "loss=full_softmax", *overrides]
    trainer = Trainer(compose("train", TrainConfig, arguments), SequenceDataset.open(dataset_dir), torch.device("cpu"))
    trainer.config.trainer.batch_targets = 32 // world_size  # of one rank: the mean over ranks is that of the sum
    trainer.model.train()
    rows, first = local_rows(trainer.model)
    table = torch.randn(60, rows.size(1), generator=torch.Generator().manual_seed(2)) / 2
    table[:, 17:] = 0
    rows.copy_(table[first : first + rows.size(0)])  # in place: these are the model's own
    if trainer.config.table.sharding == "replicated":
        trainer.model.module.table.embeddings.embeddings["t_item"].weight.data.copy_(table)
    mine = SEQUENCES[rank::world_size]
    batch = Batch(
        torch.cat([SEQUENCES[0][:0], *mine]),
        offsets_from_lengths(torch.tensor([len(sequence) for sequence in mine], dtype=torch.int64)),
    )
    return trainer, batch, table


def step_on_ranks(dataset_dir):
    """What a training step of this rank gives: its loss, the dense gradients, and the table's rows or gradient."""
    results = {}
    for name, overrides in STEPS.items():
        trainer, batch, _ = make_trainer(dataset_dir, overrides)
        loss = trainer.train_step(batch)[0]
        gradients = {key: value.grad for key, value in trainer.model.module.encoder.named_parameters()}
        if "replicated" in name:
            table = trainer.model.module.table.embeddings.embeddings["t_item"].weight.grad
        else:
            table = local_rows(trainer.model)[0].clone()
        results[name] = (loss, gradients, table)
    return results


class PlainTable(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.weight = nn.Parameter(rows)

    def forward(self, item_ids, more_ids):
        return self.weight[item_ids], self.weight[more_ids]


def lower_seen(scores, horizon, weight):
    """Before a target in its sequence, and not what its position aims at: rows are targets."""
    row = 0
    for sequence in SEQUENCES:
        for n in range(1, len(sequence)):
            seen = set(sequence[:n].tolist()) - set(sequence[n : n + horizon].tolist())
            scores.data[row, sorted(seen)] += torch.tensor(weight, dtype=scores.dtype).log()
            row += 1
    assert row == scores.size(0)


def true_step(dataset_dir):
    """The same from the formula, in float64, with the sequences in the order of one rank.

    Beside a gradient stands the most that its targets add to an element in absolute value: where their shares cancel (those
    of ``expert_weights`` to 1 %), it is this that rounding is in proportion to.
    """
    results = {}
    for name, overrides in STEPS.items():
        trainer, _, table = make_trainer(dataset_dir, overrides)
        trained, loss = trainer.model.module, trainer.config.loss
        encoder, plain = copy.deepcopy(trained.encoder).double(), PlainTable(table.double())
        model = SequenceModel(plain, encoder, trained.similarity, trained.item_bias)
        offsets = offsets_from_lengths(torch.tensor(LENGTHS))
        output = model(torch.cat(SEQUENCES), offsets, torch.arange(60), loss.horizon, loss.horizon_decay)
        scores = output.query @ output.negatives.T / loss.temperature
        if loss.seen_weight < 1:
            lower_seen(scores, loss.horizon, loss.seen_weight)
        losses = scores.exp().sum(1).log() - (output.query * output.aim).sum(1) / loss.temperature
        sizes = {key: torch.zeros_like(value) for key, value in encoder.named_parameters()}
        for target_loss in losses:
            shares = torch.autograd.grad(target_loss / 32, list(encoder.parameters()), retain_graph=True)
            for size, share in zip(sizes.values(), shares):
                size += share.abs()
        (losses.sum() / 32).backward()
        gradients = {key: (value.grad, sizes[key].max()) for key, value in encoder.named_parameters()}
        gradient, rows = plain.weight.grad, plain.weight.detach()
        if name in ("row_wise", "seen left out"):
            rows = rows - gradient
        elif name == "adagrad":
            rows = rows - 0.05 * gradient / (gradient.square().mean(1, keepdim=True).sqrt() + 1e-8)
        else:
            rows = gradient
        results[name] = (losses.sum().detach(), gradients, rows)
    return results


@pytest.fixture(scope="module")
def truth(dataset_dir, tmp_path_factory) -> dict:
    return run_ranks(true_step, 1, tmp_path_factory.mktemp("truth"), dataset_dir)[0]


@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_ranks_train_as_one(world_size, dataset_dir: Path, truth, tmp_path):
    """Losses, dense gradients, and the table after a step of a fused optimizer, or its gradient where DDP averages it."""
    ranks = run_ranks(step_on_ranks, world_size, tmp_path, dataset_dir)
    for name, (loss, gradients, table) in truth.items():
        ours = [results[name] for results in ranks]
        assert_close(sum(each[0] for each in ours), loss, rtol=1e-5, atol=0)
        for _, averaged, _ in ours:
            assert averaged.keys() == gradients.keys()
            for key, (gradient, size) in gradients.items():
                assert (averaged[key] - gradient).abs().max() <= 4e-6 * size, (name, key)
        tables = [each[2] for each in ours]
        for whole in tables if "replicated" in name else [torch.cat(tables)]:
            assert whole.shape == table.shape
            assert (whole - table).abs().max() <= 2e-5 * table.abs().max(), name
