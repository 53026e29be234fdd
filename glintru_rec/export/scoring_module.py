"""What an artifact runs: a model behind methods that take and give tensors only. It needs torch alone.

Everything here is compiled by TorchScript, so the file it is saved to loads where this package is not installed.

Shapes: T items of a ragged batch, B histories, C candidates of a ragged batch, D width of the encoder, Q numbers of a query or
item vector (D, or D + 1 where items have a bias), W columns of the item table as stored (Q; int8 D), V catalog, n items,
F side features of an event.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

from glintru_rec.encoders.base import Encoder
from glintru_rec.encoders.side_embeddings import SideEmbeddings
from glintru_rec.export.item_files import inverse_norms
from glintru_rec.export.mapped_array import map_array
from glintru_rec.jagged import keep_last, last_of_each, offsets_from_lengths, sequence_index

MAX_BLOCK_CELLS = 1 << 24  # 64 MiB of float32
MAX_CACHED_CELLS = 1 << 22  # 16 MiB: scores that a processor can still find in its cache when it looks for the best
MAX_BLOCK_ITEMS = 1 << 16


class ScoringModule(nn.Module):
    """Encode histories, score candidates and find the best items of the catalog.

    Item ids are rows of the item table. Batches and histories may have any length, 0 included; a history's result does
    not depend on the rest of the batch. An empty history has the hidden vector 0, so every item scores 0, or its bias where
    items have one: a ranking by learnt popularity.

    The item table is no part of the module's file: `open_items` maps it from the files beside.

    Where the model reads side features of events, every method that takes a history takes ``side_ids`` too: a column for each
    feature, int64 ``[T, F]``, row by row those of ``item_ids``. Otherwise they are left out. Candidates have none.

    Args:
        encoder: turns item vectors into hidden vectors.
        item_vectors: the item table as trained, float32 ``[V, D]``, or ``[V, D + 1]`` with each item's bias last (``dot``
            only). Kept as it is, not copied. V may be 0 until `open_items` is called.
        similarity: ``dot``, or ``cosine`` (both sides scaled to length 1).
        max_seq_len: the encoder sees each history's last ``max_seq_len`` items.
        max_block_cells: largest number of scores or features that `score` and `top_k_of` compute at once.
        precision: of the files that `open_items` is to map: ``fp32``, ``fp16`` or ``int8``.
        side: adds side features of events to their items; None for none.

    Attributes:
        item_vectors: the table as stored, ``[V, W]``.
        item_offsets: int8: what is to be added to its rows' numbers, ``[V]``; otherwise empty.
        item_scales: int8: what the sums are to be multiplied by, ``[V]``; otherwise empty.
        item_biases: biases of the items, ``[V]``; empty where there are none, or the table has them.
        score_scales: what products of query and stored row, offset included, are to be multiplied by, ``[V]``, or empty.
    """

    item_vectors: Tensor
    item_offsets: Tensor
    item_scales: Tensor
    item_biases: Tensor
    score_scales: Tensor

    def __init__(
        self,
        encoder: Encoder,
        item_vectors: Tensor,
        similarity: str,
        max_seq_len: int,
        max_block_cells: int = MAX_BLOCK_CELLS,
        precision: str = "fp32",
        side: SideEmbeddings | None = None,
    ):
        super().__init__()
        self.encoder = encoder
        self.side = side if side is not None else SideEmbeddings([], encoder.width)
        self.cosine = similarity == "cosine"
        self.is_int8 = precision == "int8"
        self.item_bias = item_vectors.size(1) > encoder.width
        self.max_seq_len = max_seq_len
        self.max_block_cells = max_block_cells
        self.max_cached_cells = MAX_CACHED_CELLS
        self.register_buffer("item_vectors", item_vectors)
        self.register_buffer("item_offsets", item_vectors.new_ones(0))
        self.register_buffer("item_scales", item_vectors.new_ones(0))
        self.register_buffer("item_biases", item_vectors.new_ones(0))
        # One number an item instead of a second, normalised table.
        self.register_buffer("score_scales", inverse_norms(item_vectors) if self.cosine else item_vectors.new_ones(0))

    def forward(self, item_ids: Tensor, lengths: Tensor, side_ids: Tensor | None = None) -> Tensor:
        """Do what `encode` does."""
        return self.encode(item_ids, lengths, side_ids)

    @torch.jit.export
    def open_items(self, folder: str) -> None:
        """Map the item table of an artifact into memory; it is read where and when it is needed (see `map_array`).

        On another device than the CPU it is copied there, whole.

        Args:
            folder: of the artifact.

        Raises:
            RuntimeError: a file is missing or is no item table.
        """
        device = self.item_vectors.device
        self.item_vectors = map_array(folder + "/item_vectors.npy").to(device)
        if self.is_int8:
            self.item_offsets = map_array(folder + "/item_offsets.npy").to(device)
            self.item_scales = map_array(folder + "/item_scales.npy").to(device)
            self.score_scales = self.item_scales
            if self.item_bias:
                self.item_biases = map_array(folder + "/item_biases.npy").to(device)
        if self.cosine:
            self.score_scales = map_array(folder + "/inverse_norms.npy").to(device)

    @torch.jit.export
    def vectors_of(self, item_ids: Tensor) -> Tensor:
        """Give the vectors of items: the score of an item is their dot product with the query.

        Args:
            item_ids: int64 ``[n]``.

        Returns:
            float32 ``[n, Q]``; of length 1 with ``cosine``.
        """
        vectors = self._stored(item_ids)
        if self.score_scales.numel() > 0:
            vectors = vectors * self.score_scales.index_select(0, item_ids).unsqueeze(1)
        if self.item_biases.numel() > 0:
            vectors = torch.cat([vectors, self.item_biases.index_select(0, item_ids).unsqueeze(1)], dim=1)
        return vectors

    @torch.jit.export
    def encode(self, item_ids: Tensor, lengths: Tensor, side_ids: Tensor | None = None) -> Tensor:
        """Encode histories.

        Args:
            item_ids: the histories, oldest item first, one after the other, int64 ``[T]``.
            lengths: items of each history, int64 ``[B]``, T in all.
            side_ids: int64 ``[T, F]``, where the model has side features.

        Returns:
            query, float32 ``[B, Q]``: an item's score is its dot product with what `vectors_of` gives. Where items have a
            bias the query ends with 1; with ``cosine`` it has length 1.

        Raises:
            ValueError: ``lengths`` do not add up to T.
        """
        all_offsets = checked_offsets(lengths, item_ids)
        recent, offsets = keep_last(item_ids, all_offsets, self.max_seq_len)
        if side_ids is not None and side_ids.size(0) == item_ids.size(0):  # where they do not fit, _embeddings says so
            side_ids = keep_last(side_ids, all_offsets, self.max_seq_len)[0]
        return self._query(last_of_each(self.encoder(self._embeddings(recent, side_ids), offsets), offsets))

    @torch.jit.export
    def score(
        self,
        item_ids: Tensor,
        lengths: Tensor,
        candidates: Tensor,
        candidate_lengths: Tensor,
        side_ids: Tensor | None = None,
    ) -> Tensor:
        """Score each history's own candidates.

        Args:
            item_ids: int64 ``[T]``, see `encode`.
            lengths: int64 ``[B]``.
            candidates: items to score, history after history, int64 ``[C]``.
            candidate_lengths: candidates of each history, int64 ``[B]``, C in all.
            side_ids: see `encode`.

        Returns:
            scores, float32 ``[C]``, in the order of ``candidates``.

        Raises:
            ValueError: lengths do not add up, there are candidates for more or fewer than B histories, or a candidate is no
                item of the table.
        """
        if candidate_lengths.numel() != lengths.numel():
            raise ValueError(f"{candidate_lengths.numel()} candidate lengths were given for {lengths.numel()} histories")
        offsets = checked_offsets(candidate_lengths, candidates)
        self._check_items("candidates", candidates)
        query = self.encode(item_ids, lengths, side_ids)[:, : self.item_vectors.size(1)].contiguous()
        num_items = self.item_vectors.size(0)
        is_plain = self.item_vectors.dtype == torch.float32 and not self.item_vectors.is_cuda
        # torch takes no sparse matrix for one that holds more numbers than it has places, as lists may that repeat items.
        if is_plain and candidates.size(0) <= query.size(0) * num_items:
            # As a sparse matrix of the wanted products, [B, V]: each is summed up without a copy of its two vectors.
            wanted = torch.sparse_csr_tensor(
                offsets, candidates, query.new_zeros(candidates.size(0)), [query.size(0), num_items]
            )
            scores = torch.ops.aten.sparse_sampled_addmm(wanted, query, self.item_vectors.t(), beta=0.0).values()
        else:
            scores = self._products(query, candidates, sequence_index(offsets, candidates.size(0)))
        if self.score_scales.numel() > 0:
            scores = scores * self.score_scales.index_select(0, candidates)
        if self.item_biases.numel() > 0:
            scores = scores + self.item_biases.index_select(0, candidates)
        return scores

    @torch.jit.export
    def top_k(
        self, item_ids: Tensor, lengths: Tensor, k: int, exclude_seen: bool = True, side_ids: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Find each history's best items among the whole catalog, exactly.

        Args:
            item_ids: int64 ``[T]``, see `encode`. Give whole histories: what lies before the last ``max_seq_len`` items
                does not reach the encoder, but it was seen.
            lengths: int64 ``[B]``.
            k: items to find, at least 1.
            exclude_seen: leave out the items of the history.
            side_ids: see `encode`.

        Returns:
            ids, int64 ``[B, k]``, and scores, float32 ``[B, k]``, best first; of equal scores the lower id comes first.
            Where fewer than k items are left, the tail has id -1 and score -inf.

        Raises:
            ValueError: k is not positive, or ``lengths`` do not add up to T.
        """
        query = self.encode(item_ids, lengths, side_ids)
        if exclude_seen:
            return self.top_k_of(query, item_ids, lengths, k)
        return self.top_k_of(query, item_ids[:0], torch.zeros_like(lengths), k)

    @torch.jit.export
    def top_k_of(self, query: Tensor, seen_ids: Tensor, seen_lengths: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Find the best items of the catalog for users whose query is known, exactly.

        Args:
            query: as `encode` gives it, float32 ``[B, Q]``.
            seen_ids: items to leave out, user after user, int64 ``[T]``; repeated ones do no harm.
            seen_lengths: items to leave out for each user, int64 ``[B]``, T in all.
            k: items to find, at least 1.

        Returns:
            ids and scores, see `top_k`.

        Raises:
            ValueError: k is not positive, or there are not B ``seen_lengths`` that add up to T.
        """
        if k < 1:
            raise ValueError(f"k is {k}; it must be at least 1")
        if seen_lengths.numel() != query.size(0):
            raise ValueError(f"{seen_lengths.numel()} seen lengths were given for {query.size(0)} queries")
        # Seen items in the order of the catalog: those of a block lie next to each other.
        seen, order = torch.sort(seen_ids)
        seen_rows = sequence_index(checked_offsets(seen_lengths, seen_ids), seen_ids.size(0))[order]
        best_ids = torch.full([query.size(0), k], -1, dtype=torch.int64, device=query.device)
        best_scores = torch.full([query.size(0), k], float("-inf"), dtype=query.dtype, device=query.device)
        self._check_opened()
        num_items, columns = self.item_vectors.size(0), self.item_vectors.size(1)
        cells = self.max_block_cells if query.is_cuda else min(self.max_block_cells, self.max_cached_cells)
        block = block_items(cells, query.size(0), columns)
        starts = torch.arange(0, num_items + block, block, device=query.device)
        seen_before: list[int] = torch.searchsorted(seen, starts).tolist()
        for i, start in enumerate(range(0, num_items, block)):
            rows = self.item_vectors[start : start + block].to(query.dtype)
            if self.item_offsets.numel() > 0:
                rows.add_(self.item_offsets[start : start + block].unsqueeze(1))  # int8: rows are a copy
            scores = torch.mm(query[:, :columns], rows.t())
            if self.score_scales.numel() > 0:
                scores.mul_(self.score_scales[start : start + block])
            if self.item_biases.numel() > 0:
                scores.add_(self.item_biases[start : start + block])
            here, there = seen_before[i], seen_before[i + 1]
            scores[seen_rows[here:there], seen[here:there] - start] = float("-inf")
            places = _best_places(scores, k, best_scores[:, k - 1])
            if places.size(1) == 0:
                continue
            best_ids = torch.cat([best_ids, places + start], dim=1)
            best_scores = torch.cat([best_scores, scores.gather(1, places)], dim=1)
            # Stable, and earlier blocks come first: of equal scores the lower id wins, and -1 wins over a seen item.
            order = torch.sort(best_scores, dim=1, descending=True, stable=True)[1][:, :k]
            best_ids = best_ids.gather(1, order)
            best_scores = best_scores.gather(1, order)
        return best_ids, best_scores

    def _products(self, query: Tensor, items: Tensor, rows: Tensor) -> Tensor:
        """Multiply stored rows of items with the queries of their rows, ``[C]``."""
        block = max(1, min(self.max_block_cells, 1 << 17) // query.size(1))  # 512 KiB, which stay in the processor's cache
        products = query.new_empty(items.size(0))
        for start in range(0, items.size(0), block):
            stored = self._stored(items[start : start + block])
            products[start : start + block] = (query.index_select(0, rows[start : start + block]) * stored).sum(1)
        return products

    def _embeddings(self, item_ids: Tensor, side_ids: Tensor | None) -> Tensor:
        """Look up what the encoder reads of events, ``[T, D]``."""
        rows = self._stored(item_ids)[:, : self.encoder.width]
        if self.item_scales.numel() > 0:
            rows = rows * self.item_scales.index_select(0, item_ids).unsqueeze(1)
        return self.side(rows, side_ids)

    def _stored(self, item_ids: Tensor) -> Tensor:
        """Look up rows of the table as float32, int8 with their offsets, ``[n, W]``."""
        self._check_opened()
        rows = self.item_vectors.index_select(0, item_ids).to(torch.float32)
        if self.item_offsets.numel() > 0:
            rows.add_(self.item_offsets.index_select(0, item_ids).unsqueeze(1))
        return rows

    def _check_items(self, what: str, item_ids: Tensor) -> None:
        self._check_opened()
        if item_ids.numel() > 0:
            least, largest = torch.aminmax(item_ids)
            if int(least) < 0 or int(largest) >= self.item_vectors.size(0):
                raise ValueError(
                    f"{what} are from {int(least)} to {int(largest)}; there are {self.item_vectors.size(0)} items, from 0"
                )

    def _check_opened(self) -> None:
        if self.item_vectors.size(0) == 0:
            raise ValueError("there are no items yet; call open_items with the folder of the artifact")

    def _query(self, hidden: Tensor) -> Tensor:
        """Make queries ``[B, Q]`` of hidden vectors ``[B, D]``, as `glintru_rec.model.SequenceModel` does."""
        if self.cosine:
            return functional.normalize(hidden, dim=1)
        if self.item_bias:
            return functional.pad(hidden, [0, 1], value=1.0)
        return hidden


def block_items(max_block_cells: int, batch_size: int, columns: int, max_block_items: int = MAX_BLOCK_ITEMS) -> int:
    """Give the number of items that `ScoringModule.top_k_of` searches at once, a power of 2.

    So the blocks of any batch begin where those of a larger one do, and a catalog that is cut at a multiple of the largest,
    `MAX_BLOCK_ITEMS`, is cut between blocks: its parts, searched one by one, are multiplied as the whole is, with equal bits.
    """
    most = max_block_cells // max(1, batch_size, columns)
    block = 1
    while 2 * block <= min(most, max_block_items):
        block *= 2
    return block


def checked_offsets(lengths: Tensor, values: Tensor) -> Tensor:
    """Turn lengths into offsets, after a check that they cut ``values`` without rest."""
    offsets = offsets_from_lengths(lengths)
    total = int(offsets[-1].item())
    if total != values.size(0) or bool((lengths < 0).any()):
        raise ValueError(f"lengths must not be negative and must add up to {values.size(0)} items; they add up to {total}")
    return offsets


def _best_places(scores: Tensor, k: int, least: Tensor) -> Tensor:
    """Give the columns of each row's k best scores in ascending order, the lower columns where scores are equal.

    Those that are not above ``least`` may be left out, or others be there in their place.

    Args:
        scores: ``[B, n]``.
        k: at least 1.
        least: ``[B]``.

    Returns:
        int64 ``[B, at most k]``.
    """
    num_items, group = scores.size(1), 16
    columns = torch.arange(num_items, device=scores.device)
    if k >= num_items or scores.size(0) == 0:
        return columns[:k].expand(scores.size(0), -1)
    # Columns that are a multiple of width apart are a group. The k + 1 best scores lie in as many groups at most, those of
    # the largest heads: were one of them elsewhere, that group's head, and so k + 1 others, would be better than it.
    width = num_items // group
    heads = scores[:, : group * width].unflatten(1, [group, width]).amax(1)
    num_groups = min(k + 1, int((~(heads <= least.unsqueeze(1))).sum(1).max()))  # those of NaN, too
    candidates, columns = scores, columns.expand(scores.size(0), -1)
    if 2 * group * num_groups < num_items:
        groups = torch.topk(heads, num_groups, dim=1)[1]
        members = (groups.unsqueeze(1) + width * torch.arange(group, device=scores.device).unsqueeze(1)).flatten(1)
        columns = torch.cat([members, columns[:, group * width :]], dim=1)
        candidates = scores.gather(1, columns)
    if columns.size(1) > k:
        best, order = torch.topk(candidates, k + 1, dim=1)
        columns = columns.gather(1, order[:, :k])
        # topk takes any of several equal scores; where that decides who is in, which is rare, sort the row in full.
        tied = (best[:, k - 1] == best[:, k]) & (best[:, k] > least)
        if bool(tied.any()):
            columns[tied] = torch.sort(scores[tied], dim=1, descending=True, stable=True)[1][:, :k]
    return torch.sort(columns, dim=1)[0]
