"""The part of the catalog that a job may recommend: its allow-list, less its deny-list. And that, cut into stretches.

Shapes: V catalog, n items that are left, B users, T items to leave out, Q numbers of a query.
"""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders.base import Encoder
from glintru_rec.errors import InputError
from glintru_rec.export.artifact import Artifact
from glintru_rec.export.scoring_module import MAX_BLOCK_ITEMS, ScoringModule


class _NoEncoder(Encoder):
    """Stands where queries are known."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width


class FewItems:
    """Find the best of a small part of the catalog, exactly, with the artifact's own search in a copy of these items.

    Args:
        artifact: of the whole catalog.
        items: vocabulary indices that may be found, int64 ``[n]``, ascending.
    """

    def __init__(self, artifact: Artifact, items: np.ndarray):
        module, device = artifact.module, artifact.module.item_vectors.device
        self._items = torch.from_numpy(items).to(device)
        self._places = torch.full([artifact.vocabulary.num_items], -1, dtype=torch.int64, device=device)
        self._places[self._items] = torch.arange(len(items), device=device)
        of_items = (module.item_offsets, module.score_scales, module.item_biases)
        few = (x[self._items] if x.numel() else x for x in of_items)
        self._search = _search(artifact, module.item_vectors[self._items], *few)

    def top_k_of(self, query: Tensor, seen_ids: Tensor, seen_lengths: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Do what `ScoringModule.top_k_of` does, with the catalog's own ids: ``[B, k]`` and ``[B, k]``."""
        seen = self._places[seen_ids]
        rows = torch.repeat_interleave(seen_lengths)[seen >= 0]
        lengths = torch.bincount(rows, minlength=seen_lengths.numel())
        places, scores = self._search.top_k_of(query, seen[seen >= 0], lengths, k)
        return torch.where(places >= 0, self._items[places.clamp(min=0)], places), scores


class Stretch:
    """Find the best of some neighbouring items, exactly, in the rows that a search has, without a copy.

    Args:
        artifact: of the whole catalog.
        search: of the whole catalog: the artifact's module, or what `most_items` gives.
        start: the first item.
        end: the one after the last.
    """

    def __init__(self, artifact: Artifact, search: Any, start: int, end: int):
        self._start, self._end = start, end
        of_items = (search.item_vectors, search.item_offsets, search.score_scales, search.item_biases)
        self._search = _search(artifact, *(x[start:end] for x in of_items))

    def top_k_of(self, query: Tensor, seen_ids: Tensor, seen_lengths: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Do what `ScoringModule.top_k_of` does, with the catalog's own ids: ``[B, k]`` and ``[B, k]``."""
        inside = (seen_ids >= self._start) & (seen_ids < self._end)
        lengths = torch.bincount(torch.repeat_interleave(seen_lengths)[inside], minlength=seen_lengths.numel())
        places, scores = self._search.top_k_of(query, seen_ids[inside] - self._start, lengths, k)
        return torch.where(places >= 0, places + self._start, places), scores


def most_items(artifact: Artifact, items: np.ndarray) -> ScoringModule:
    """Give a search, exact and the artifact's own, that finds most items of the catalog, and never the others.

    It reads the artifact's table, which the processes of a machine share, and has one number of its own for each item.

    Args:
        artifact: of the whole catalog.
        items: vocabulary indices that may be found, int64 ``[n]``.
    """
    module = artifact.module
    biases = torch.full([artifact.vocabulary.num_items], float("-inf"), device=module.item_vectors.device)
    kept = torch.from_numpy(items).to(biases.device)
    biases[kept] = module.item_biases[kept] if module.item_biases.numel() else 0.0
    return _search(artifact, module.item_vectors, module.item_offsets, module.score_scales, biases)


def _search(artifact: Artifact, vectors: Tensor, offsets: Tensor, scales: Tensor, biases: Tensor) -> ScoringModule:
    """Give a module for its ``top_k_of`` alone, on rows as the artifact stores them."""
    search = ScoringModule(_NoEncoder(vectors.size(1)), vectors, "dot", artifact.manifest["max_seq_len"])
    search.item_offsets, search.score_scales, search.item_biases = offsets, scales, biases
    return search


def catalog_of(artifact: Artifact, items: np.ndarray | None) -> Any:
    """Give a ``top_k_of`` that finds some items of the catalog only: in a copy of few, among all where these are most.

    Args:
        artifact: of the whole catalog.
        items: vocabulary indices that may be found, int64 ``[n]``, ascending; None: all.
    """
    if items is None:
        return artifact.module
    return FewItems(artifact, items) if _are_few(artifact, items) else most_items(artifact, items)


def stretches_of(artifact: Artifact, items: np.ndarray | None, share: int, num_shares: int, num_stretches: int) -> list[Any]:
    """Cut what `catalog_of` searches into even shares, and one of them into stretches, each with a ``top_k_of``.

    Every cut is a multiple of `MAX_BLOCK_ITEMS`, so the best of all stretches are those of `catalog_of`, to the bit of their
    scores.

    Args:
        artifact: of the whole catalog.
        items: see `catalog_of`.
        share: which, from 0.
        num_shares: how many there are.
        num_stretches: of the share; those that would be empty are left out.
    """
    few = items is not None and _are_few(artifact, items)
    num_rows = len(items) if few and items is not None else artifact.vocabulary.num_items
    num_blocks = -(-num_rows // MAX_BLOCK_ITEMS)
    first, last = (num_blocks * edge // num_shares for edge in (share, share + 1))
    edges = [first + (last - first) * edge // num_stretches for edge in range(num_stretches + 1)]
    cuts = [min(edge * MAX_BLOCK_ITEMS, num_rows) for edge in edges]
    pairs = [(start, end) for start, end in pairwise(cuts) if end > start]
    if few and items is not None:
        return [FewItems(artifact, items[start:end]) for start, end in pairs]
    search = catalog_of(artifact, items)
    return [Stretch(artifact, search, start, end) for start, end in pairs]


def _are_few(artifact: Artifact, items: np.ndarray) -> bool:
    return 2 * len(items) < artifact.vocabulary.num_items


def read_items(key: str, path: str, column: str, vocabulary: Vocabulary) -> tuple[np.ndarray, int]:
    """Read a list of items.

    Args:
        key: of the config, for messages.
        path: a parquet file.
        column: with the original item ids.
        vocabulary: gives the indices.

    Returns:
        The indices of the known items, int64, ascending, each once, and the number of rows whose item is unknown.

    Raises:
        InputError: the file cannot be read, lacks the column, has several of that name, or holds a null or ids of another type.
    """
    try:
        if not Path(path).is_file():
            raise FileNotFoundError(f"there is no file {path!r}")
        with pq.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise InputError(f"{key} {path!r} has no column {column!r}; it has {', '.join(names)}")
            if names.count(column) > 1:
                raise InputError(f"{key} {path!r} has {names.count(column)} columns called {column!r}; rename all but one")
            ids = file.read([column])[column]
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"{key} {path!r} is not readable parquet: {error}") from error
    if ids.null_count:
        raise InputError(f"{key} {path!r} holds {ids.null_count} null(s) in column {column!r}; remove them")
    try:
        indices = vocabulary.encode(ids)
    except InputError as error:
        raise InputError(f"{key} {path!r}: {error}") from error
    return np.unique(indices[indices >= 0]), int((indices < 0).sum())


def items_left(allow: str, deny: str, column: str, vocabulary: Vocabulary) -> tuple[np.ndarray, int]:
    """Apply a job's lists to the catalog.

    Args:
        allow: a file of the only items that may be found, or empty: all.
        deny: a file of items that may not be found, or empty: none.
        column: with the item ids in both.
        vocabulary: of the catalog.

    Returns:
        The indices that are left, int64 ``[n]``, ascending, and the number of rows of both files whose item is unknown.

    Raises:
        InputError: see `read_items`; or no item is left.
    """
    left, unknown = np.arange(vocabulary.num_items), 0
    if allow:
        left, unknown = read_items("allow", allow, column, vocabulary)
    if deny:
        denied, more = read_items("deny", deny, column, vocabulary)
        left, unknown = np.setdiff1d(left, denied, assume_unique=True), unknown + more
    if not len(left):
        raise InputError(f"allow={allow!r} and deny={deny!r} leave no item of the catalog; mend the lists")
    return left, unknown
