"""Leave-one-out evaluation over the whole catalog, in blocks, sharded over the ranks; and the sampled protocols.

Each rank encodes its own users; their queries then visit every rank's share of the catalog, which counts how many items
score above the target and how many tie with it. Only counts travel back.

Shapes: B users of a rank's batch, G = B x ranks, n items of a rank's share, Q numbers of a query or item vector.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torchrec.distributed.model_parallel import DistributedModelParallel

from glintru_rec.candidates import sample_candidates
from glintru_rec.data.admitted import AdmittedDataset
from glintru_rec.data.dataset import EvalCases, SequenceDataset
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.errors import InputError
from glintru_rec.jagged import keep_last, offsets_from_lengths
from glintru_rec.metrics import UNRANKED, Protocol, RankingMetrics, target_ranks
from glintru_rec.model import SequenceModel
from glintru_rec.tables.sharding import local_rows

# Scores held at one time, G x items of a block, and at most as many numbers of the items' vectors: 32 MiB each.
BLOCK_SCORES = 1 << 23
# Scores compared at one time: on a CPU what counts them copies the truth values into int64.
COMPARED_SCORES = 1 << 20


@torch.no_grad()
def evaluate(
    model: DistributedModelParallel,
    dataset: SequenceDataset | RowGroupDataset | AdmittedDataset,
    protocol: Protocol,
    max_seq_len: int,
    batch_users: int,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, float]:
    """Rank every user's held-out item.

    Args:
        model: made by `glintru_rec.tables.sharding.distribute`; left in the mode it came in.
        dataset: its ``protocol.split`` gives histories and targets; items are the first ``num_items`` rows of the table. One
            on the disk is read by every rank, a few row groups at a time.
        protocol: what the target is ranked against.
        max_seq_len: latest items of a history that the encoder reads; seen items are left out of the whole history.
        batch_users: users of one rank's batch.
        progress: called with (users done, users in all).

    Returns:
        The metrics of `RankingMetrics.compute`, ``num_users``, ``num_targets_seen``: targets that the user's own history
        holds, which count as misses when seen items are left out, and ``num_targets_unknown``: those that a dynamic vocabulary
        lacks, misses always. The same on every rank.
    """
    was_training = model.training
    model.eval()
    module: SequenceModel = model.module
    device = model.device
    num_users = check_has_cases(dataset.num_cases, protocol.split)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    rows, first_item = local_rows(model)
    rows = rows[: max(0, dataset.num_items - first_item)]  # those behind are no item's
    counts = torch.from_numpy(dataset.train_counts()).to(device) if protocol.kind == "popularity" else None
    metrics = RankingMetrics(protocol.ks, device)
    counted = torch.zeros(2, dtype=torch.int64, device=device)  # targets seen, targets unknown
    num_done = 0
    for cases, start, stop in _groups(dataset, protocol.split, batch_users * world_size):
        shares = [(start + r * batch_users, min(start + (r + 1) * batch_users, stop)) for r in range(world_size)]
        group = [_Users(cases, *share, device) for share in shares]
        own = group[rank]
        item_ids, offsets = keep_last(own.history, own.offsets, max_seq_len)
        side_ids = None if own.side_ids is None else keep_last(own.side_ids, own.offsets, max_seq_len)[0]
        if protocol.kind == "full":
            query, _ = module.encode(item_ids, offsets, item_ids[:0], side_ids)
            everyone = _Users(cases, start, stop, device)
            queries = _gather(query, [users.targets.numel() for users in group])
            above, tied = _count_above(module, queries, rows, first_item, everyone, protocol.exclude_seen)
        else:
            everyone = own
            above, tied = _count_above_sampled(module, own, item_ids, offsets, side_ids, protocol, dataset.num_items, counts)
        ranks = target_ranks(above, tied)
        seen = everyone.target_is_seen()
        is_unknown = everyone.targets < 0
        counted += torch.stack([seen.sum(), is_unknown.sum()])
        if protocol.exclude_seen:
            ranks = ranks.masked_fill(seen, UNRANKED)
        ranks = ranks.masked_fill(is_unknown, UNRANKED)
        metrics.update(ranks)
        num_done += stop - start
        if progress is not None:
            progress(num_done, num_users)
    if protocol.kind != "full":  # each rank has ranked its own users
        totals = metrics.state()
        dist.all_reduce(totals)
        dist.all_reduce(counted)
        metrics.load_state(totals)
    model.train(was_training)
    named = dict(zip(("num_targets_seen", "num_targets_unknown"), counted.tolist()))
    return {**metrics.compute(), "num_users": num_users, **named}


def check_has_cases(num_cases: int, split: str) -> int:
    """Give the number of users of a split; raise an `InputError` when there is none."""
    if not num_cases:
        raise InputError(f"the dataset has no user with three events or more: nothing to evaluate in split={split}")
    return num_cases


def _groups(
    dataset: SequenceDataset | RowGroupDataset | AdmittedDataset, split: str, size: int
) -> Iterator[tuple[EvalCases, int, int]]:
    """Cut the cases of a split into groups of at most ``size``: the cases in memory, where it begins and ends there."""
    for cases in dataset.case_blocks(split):
        num_cases = cases.targets.size
        for start in range(0, num_cases, size):
            yield cases, start, min(start + size, num_cases)


class _Users:
    """Histories and targets of the users ``start .. stop-1``, on the device."""

    def __init__(self, cases: EvalCases, start: int, stop: int, device: torch.device):
        stop = max(start, stop)
        start, stop = min(start, cases.targets.size), min(stop, cases.targets.size)
        bounds = cases.history_offsets[start : stop + 1]
        self.history = torch.from_numpy(cases.history_items[bounds[0] : bounds[-1]]).to(device)
        self.offsets = torch.from_numpy(bounds - bounds[0]).to(device)
        self.side_ids = None
        if cases.history_side is not None:
            self.side_ids = torch.from_numpy(cases.history_side[bounds[0] : bounds[-1]].astype(np.int64)).to(device)
        self.targets = torch.from_numpy(cases.targets[start:stop]).to(device)
        self.user_index = torch.from_numpy(np.asarray(cases.user_index[start:stop])).to(device)
        self.row_of_history = torch.repeat_interleave(torch.arange(stop - start, device=device), self.offsets.diff())

    def target_is_seen(self) -> Tensor:
        """Whether the target is an item of the history: bool ``[B]``."""
        hits = self.history == self.targets[self.row_of_history]
        return torch.zeros(self.targets.numel(), device=hits.device).index_add_(0, self.row_of_history, hits.float()) > 0


def _gather(query: Tensor, sizes: list[int]) -> Tensor:
    """Bring the queries of all ranks together, in the order of ranks: ``[G, Q]``."""
    if len(sizes) == 1:
        return query
    padded = query.new_zeros(max(sizes), query.size(1))
    padded[: query.size(0)] = query
    received = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(received, padded)
    return torch.cat([part[:size] for part, size in zip(received, sizes)])


def _count_above(
    module: SequenceModel, queries: Tensor, rows: Tensor, first_item: int, users: _Users, exclude_seen: bool
) -> tuple[Tensor, Tensor]:
    """Count the catalog items that score above, and equal to, each user's target: two int64 ``[G]``."""
    user = torch.arange(queries.size(0), device=queries.device)
    local_target = users.targets - first_item
    is_here = (local_target >= 0) & (local_target < rows.size(0))
    size = max(1, BLOCK_SCORES // max(1, *queries.shape))
    begins = range(0, rows.size(0), size)

    def score(begin: int) -> Tensor:
        # Item vectors are made a block at a time: rows may be fp16, and too many to be held a second time.
        return queries @ module.item_vectors(rows[begin : begin + size].to(queries)).t()

    # The target's score is read out of the very product that its rivals' scores come from: computed in another way it
    # could differ in the last bit, and equal items would not tie.
    target_score = torch.zeros(queries.size(0), device=queries.device)
    scores = torch.empty(0)
    for begin in begins:
        scores = score(begin)
        mine = is_here & (local_target >= begin) & (local_target < begin + scores.size(1))
        target_score[mine] = scores[user[mine], local_target[mine] - begin]
    dist.all_reduce(target_score)
    above, tied = torch.zeros_like(user), torch.zeros_like(user)
    for begin in begins:
        if len(begins) > 1:
            scores = score(begin)
        mine = is_here & (local_target >= begin) & (local_target < begin + scores.size(1))
        scores[user[mine], local_target[mine] - begin] = -torch.inf  # the target is no rival of its own
        if exclude_seen:
            local_seen = users.history - first_item - begin
            inside = (local_seen >= 0) & (local_seen < scores.size(1))
            scores[users.row_of_history[inside], local_seen[inside]] = -torch.inf
        for some in user.split(max(1, COMPARED_SCORES // scores.size(1))):
            rivals, target = scores[some[0] : some[-1] + 1], target_score[some].unsqueeze(1)
            above[some] += (~(rivals <= target)).sum(1)  # NaN counts as above: a diverged model is no perfect one
            tied[some] += (rivals == target).sum(1)
    both = torch.stack([above, tied])
    dist.all_reduce(both)
    return both[0], both[1]


def _count_above_sampled(
    module: SequenceModel,
    users: _Users,
    item_ids: Tensor,
    offsets: Tensor,
    side_ids: Tensor | None,
    protocol: Protocol,
    num_items: int,
    counts: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Count the sampled candidates that score above, and equal to, each user's target: two int64 ``[B]``."""
    assert protocol.num_candidates is not None
    seen, seen_offsets = users.history, users.offsets
    targets = users.targets.clamp(min=0)  # any item will do for a target that is not known: it is a miss
    if not protocol.exclude_seen:
        seen, seen_offsets = seen[:0], offsets_from_lengths(torch.zeros_like(users.targets))
    negatives = sample_candidates(
        protocol.kind,
        protocol.num_candidates,
        users.user_index,
        targets,
        seen,
        seen_offsets,
        num_items,
        counts,
        protocol.seed,
    )
    candidates = torch.cat([targets.unsqueeze(1), negatives], dim=1)
    query, vectors = module.encode(item_ids, offsets, candidates.reshape(-1), side_ids)
    scores = (vectors.view(*candidates.shape, query.size(1)) @ query.unsqueeze(2)).squeeze(2)
    rivals, target = scores[:, 1:], scores[:, :1]
    return (~(rivals <= target)).sum(1), (rivals == target).sum(1)
