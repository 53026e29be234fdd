"""Measure how far an exported module is from the model it was made of.

Shapes: T items of a ragged batch, B histories, Q numbers of an item vector, V catalog.
"""

from typing import Any

import torch
from torch import Tensor, nn

from glintru_rec.encoders.base import Encoder
from glintru_rec.encoders.side_embeddings import SideEmbeddings
from glintru_rec.jagged import keep_last, lengths_from_offsets, offsets_from_lengths, sequence_index
from glintru_rec.model import SequenceModel

TOLERANCE = 1e-5

_K = 100
_CANDIDATES = 16
_CATALOG_BLOCK = 1 << 16
_MAX_STEPS = 50
# TorchScript watches a graph's first call and optimises it for the second; both must agree with the model.
_CALLS = 2


class _PlainTable(nn.Module):
    """The item table as one tensor."""

    def __init__(self, item_vectors: Tensor):
        super().__init__()
        self.item_vectors = item_vectors

    def forward(self, item_ids: Tensor, more_ids: Tensor) -> tuple[Tensor, Tensor]:
        return self.item_vectors[item_ids], self.item_vectors[more_ids]


@torch.inference_mode()
def measure_parity(
    module: Any,
    encoder: Encoder,
    similarity: str,
    item_vectors: Tensor,
    max_seq_len: int,
    side: SideEmbeddings | None = None,
) -> dict[str, dict[str, float]]:
    """Compare the methods of an exported module with the eager `SequenceModel` on random histories.

    Some of the histories are empty, some longer than ``max_seq_len``.

    Args:
        module: the exported module, as loaded from its file.
        encoder: the encoder it was made of, in evaluation mode.
        similarity: ``dot`` or ``cosine``.
        item_vectors: the item table it was made of, ``[V, Q]``.
        max_seq_len: see `ScoringModule`.
        side: see `ScoringModule`; random side features go with the items.

    Returns:
        For each method ``max_abs_difference``, ``scale`` (the largest magnitude of the model's own values, but at least
        1) and ``relative``, their ratio.
    """
    item_bias = item_vectors.size(1) > encoder.width
    model = SequenceModel(_PlainTable(item_vectors), encoder, similarity, item_bias, side).eval()
    generator = torch.Generator().manual_seed(0)
    num_items = item_vectors.size(0)
    lengths = torch.tensor([0, 1, 2, max_seq_len, max_seq_len + 1, 2 * max_seq_len + 3, 0, 5])
    item_ids = torch.randint(num_items, (int(lengths.sum()),), generator=generator)
    candidate_lengths = torch.full_like(lengths, _CANDIDATES)
    candidates = torch.randint(num_items, (int(candidate_lengths.sum()),), generator=generator)

    offsets = offsets_from_lengths(lengths)
    side_ids = _random_side_ids(model.side, item_ids.numel(), generator)
    recent, recent_offsets = keep_last(item_ids, offsets, max_seq_len)
    query, candidate_vectors = model.encode(recent, recent_offsets, candidates, _recent(side_ids, offsets, max_seq_len))
    rows = sequence_index(offsets_from_lengths(candidate_lengths), candidates.numel())
    scores = (query[rows] * candidate_vectors).sum(1)
    catalog = torch.cat([query @ model.item_vectors(block).t() for block in item_vectors.split(_CATALOG_BLOCK)], dim=1)
    catalog[sequence_index(offsets, item_ids.numel()), item_ids] = -torch.inf
    best = torch.full((lengths.numel(), _K), -torch.inf)
    best[:, : min(_K, num_items)] = catalog.topk(min(_K, num_items), dim=1).values

    largest = {"encode": query, "score": scores, "top_k": best[best.isfinite()]}
    if encoder.recurrent:
        short, short_offsets = keep_last(item_ids, offsets, _MAX_STEPS)
        short_side = _recent(side_ids, offsets, _MAX_STEPS)
        largest["advance"] = largest["step"] = model.encode(short, short_offsets, short[:0], short_side)[0]
    worst = dict.fromkeys(largest, torch.zeros(()))
    for _ in range(_CALLS):
        top_ids, top_scores = module.top_k(item_ids, lengths, _K, True, *_given(side_ids))
        top_again = torch.where(top_ids < 0, -torch.inf, catalog.gather(1, top_ids.clamp(min=0)))
        differences = {
            "encode": _difference(module.encode(item_ids, lengths, *_given(side_ids)), query),
            "score": _difference(module.score(item_ids, lengths, candidates, candidate_lengths, *_given(side_ids)), scores),
            # The order of nearly equal scores may differ: compare sorted scores, and what the model gives the same ids.
            "top_k": torch.maximum(_difference(top_scores, best), _difference(top_again, best)),
        }
        if encoder.recurrent:
            differences |= _recurrent_differences(module, short, short_offsets, short_side, largest["step"])
        worst = {name: torch.maximum(worst[name], difference) for name, difference in differences.items()}
    return {name: _figures(difference, largest[name]) for name, difference in worst.items()}


def _random_side_ids(side: SideEmbeddings, num_items: int, generator: torch.Generator) -> Tensor | None:
    """Draw indices of every feature's values, ``[T, F]``; None where there is no feature."""
    columns = [torch.randint(size, (num_items,), generator=generator) for size in side.sizes]
    return torch.stack(columns, dim=1) if columns else None


def _recent(side_ids: Tensor | None, offsets: Tensor, max_length: int) -> Tensor | None:
    return None if side_ids is None else keep_last(side_ids, offsets, max_length)[0]


def _given(side_ids: Tensor | None) -> tuple[Tensor, ...]:
    """Give the argument for side features, where there is one to be given."""
    return () if side_ids is None else (side_ids,)


def _recurrent_differences(
    module: Any, item_ids: Tensor, offsets: Tensor, side_ids: Tensor | None, query: Tensor
) -> dict[str, Tensor]:
    """Take every history in event by event, all at once and the last event by itself; ``query`` is the truth."""
    lengths = lengths_from_offsets(offsets)
    start = module.init_state(lengths.numel())
    advanced, _ = module.advance(item_ids, lengths, start, *_given(side_ids))
    some = lengths > 0
    is_last = torch.zeros(item_ids.numel(), dtype=torch.bool)
    is_last[offsets[1:][some] - 1] = True
    early, last = ((), ()) if side_ids is None else ((side_ids[~is_last],), (side_ids[is_last],))
    _, before = module.advance(item_ids[~is_last], lengths - some.to(torch.int64), start, *early)
    stepped, _ = module.step(item_ids[is_last], before[some], *last)
    return {"advance": _difference(advanced, query), "step": _difference(stepped, query[some])}


def _difference(values: Tensor, truth: Tensor) -> Tensor:
    """Give the largest absolute difference; equal infinities do not differ, and NaN is not equal to itself."""
    return torch.where(values == truth, 0, (values - truth).abs()).max()


def _figures(difference: Tensor, truth: Tensor) -> dict[str, float]:
    scale = max([1.0, *truth.abs().flatten().tolist()])
    return {"max_abs_difference": difference.item(), "scale": scale, "relative": difference.item() / scale}
