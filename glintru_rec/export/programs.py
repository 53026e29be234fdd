"""What ``format=pt2`` and ``format=aoti`` hold: a program for each method, which knows its shapes' letters but not its sizes.

`torch.export` follows no loop whose length is data. So histories are taken in by the encoder's recurrent form, one item
of all histories at a time, in a ``while_loop`` that is part of the program: any number of histories of any length, 0
included, by one program, at a state's memory. Encoders without a recurrent form cannot be held.

The item table is an argument of every program, so it stays beside them, as it does beside TorchScript.

Shapes: T items of a ragged batch, B histories, C candidates, E seen items, D width of the encoder, Q numbers of a query or
item vector, K places of a list, S numbers of a state, V catalog, n items of a block.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops import while_loop
from torch.nn import functional

from glintru_rec.encoders.base import Encoder
from glintru_rec.errors import InputError
from glintru_rec.export.signature import TOP_K

_BLOCK_ITEMS = 1 << 14


class _Program(nn.Module):
    """What all programs share: the encoder's steps, queries and item vectors, as in `ScoringModule`."""

    def __init__(self, encoder: Encoder, similarity: str, item_bias: bool, max_seq_len: int):
        super().__init__()
        self.encoder = encoder
        self.cosine = similarity == "cosine"
        self.item_bias = item_bias
        self.max_seq_len = max_seq_len

    def query(self, hidden: Tensor) -> Tensor:
        if self.cosine:
            return functional.normalize(hidden, dim=1)
        return functional.pad(hidden, [0, 1], value=1.0) if self.item_bias else hidden

    def vectors(self, item_vectors: Tensor, item_ids: Tensor) -> Tensor:
        rows = item_vectors.index_select(0, item_ids).to(torch.float32)
        return functional.normalize(rows, dim=1) if self.cosine else rows

    def take(self, item_vectors: Tensor, item_ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one item of each history: hidden ``[B, D]`` and the state after it ``[B, S]``."""
        x = item_vectors.index_select(0, item_ids)[:, : self.encoder.width].to(torch.float32)
        hidden, after = self.encoder.step(x, self.encoder.unpack_state(state))
        return hidden, self.encoder.pack_state(after)

    def take_all(self, item_vectors: Tensor, item_ids: Tensor, first: Tensor, lengths: Tensor, state: Tensor) -> list[Tensor]:
        """Take in ``lengths`` items of each history, from place ``first`` of ``item_ids`` on: hidden and state."""
        num_items = item_ids.size(0)
        padded = torch.cat([item_ids, item_ids.new_zeros(1)])  # an item to point at where a history has ended
        num_steps = torch.cat([lengths, lengths.new_zeros(1)]).max()

        def goes_on(t: Tensor, hidden: Tensor, state: Tensor) -> Tensor:
            return t < num_steps

        def body(t: Tensor, hidden: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            is_alive = t < lengths
            items = padded.index_select(0, torch.where(is_alive, first + t, num_items))
            new, after = self.take(item_vectors, items, state)
            alive = is_alive.unsqueeze(1)
            return t + 1, torch.where(alive, new, hidden), torch.where(alive, after, state)

        hidden = state.new_zeros(lengths.size(0), self.encoder.width)
        _, hidden, state = while_loop(goes_on, body, (torch.zeros((), dtype=torch.int64), hidden, state))
        return [hidden, state]

    def encode(self, item_vectors: Tensor, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """Give the query of each history's last ``max_seq_len`` items."""
        kept = lengths.clamp(max=self.max_seq_len)
        state = self.encoder.pack_state(self.encoder.init_state(1)).repeat(lengths.size(0), 1)
        return self.query(self.take_all(item_vectors, item_ids, lengths.cumsum(0) - kept, kept, state)[0])


class _Encode(_Program):
    def forward(self, item_vectors: Tensor, item_ids: Tensor, lengths: Tensor) -> Tensor:
        return self.encode(item_vectors, item_ids, lengths)


class _Score(_Program):
    def forward(
        self, item_vectors: Tensor, item_ids: Tensor, lengths: Tensor, candidates: Tensor, candidate_lengths: Tensor
    ) -> Tensor:
        rows = _rows_of(candidates, candidate_lengths)
        query = self.encode(item_vectors, item_ids, lengths).index_select(0, rows)
        return (query * self.vectors(item_vectors, candidates)).sum(1)


class _TopK(_Program):
    def forward(
        self, item_vectors: Tensor, item_ids: Tensor, lengths: Tensor, seen_ids: Tensor, seen_lengths: Tensor
    ) -> tuple[Tensor, Tensor]:
        query = self.encode(item_vectors, item_ids, lengths)
        num_items = item_vectors.size(0)
        columns = torch.arange(_BLOCK_ITEMS, device=query.device)
        seen_rows = _rows_of(seen_ids, seen_lengths)

        def goes_on(start: Tensor, ids: Tensor, scores: Tensor) -> Tensor:
            return start < num_items

        def body(start: Tensor, ids: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            items = start + columns
            block = torch.mm(query, self.vectors(item_vectors, items.clamp(max=num_items - 1)).t())
            is_here = (seen_ids >= start) & (seen_ids < start + _BLOCK_ITEMS)
            # One more column, which takes the seen items of other blocks.
            places = torch.where(is_here, seen_ids - start, _BLOCK_ITEMS)
            block = functional.pad(block, [0, 1]).index_put((seen_rows, places), block.new_full((), -torch.inf))
            block = block[:, :_BLOCK_ITEMS].masked_fill(items >= num_items, -torch.inf)
            best, order = torch.cat([scores, block], dim=1).topk(TOP_K, dim=1)
            all_ids = torch.cat([ids, items.unsqueeze(0).expand(query.size(0), _BLOCK_ITEMS)], dim=1)
            return start + _BLOCK_ITEMS, all_ids.gather(1, order).masked_fill(best.isinf(), -1), best

        ids = torch.full([query.size(0), TOP_K], -1, dtype=torch.int64, device=query.device)
        scores = torch.full([query.size(0), TOP_K], -torch.inf, device=query.device)
        _, ids, scores = while_loop(goes_on, body, (torch.zeros((), dtype=torch.int64), ids, scores))
        return ids, scores


class _Step(_Program):
    def forward(self, item_vectors: Tensor, item_ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, after = self.take(item_vectors, item_ids, state)
        return self.query(hidden), after


class _Advance(_Program):
    def forward(self, item_vectors: Tensor, item_ids: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        hidden, after = self.take_all(item_vectors, item_ids, lengths.cumsum(0) - lengths, lengths, state)
        return self.query(hidden), after


_PROGRAMS: dict[str, type[_Program]] = {
    "encode": _Encode,
    "score": _Score,
    "top_k": _TopK,
    "step": _Step,
    "advance": _Advance,
}


def program_file(method: str) -> str:
    """Name the file of a method's program."""
    return f"{method}.pt2"


def check_exportable(format: str, encoder: Encoder, precision: str, side_features: Sequence[str] = ()) -> None:
    """Raise an `InputError` for what programs cannot hold."""
    if side_features:
        raise InputError(
            f"format={format} has no place for side features, and the model reads {', '.join(side_features)}; "
            f"export format=torchscript"
        )
    if not encoder.recurrent:
        raise InputError(
            f"format={format} cannot hold {type(encoder).__name__} (causal={encoder.causal}): torch.export needs a form whose "
            f"shapes do not depend on the lengths of histories, which is the recurrent one, and it has none; "
            f"export format=torchscript"
        )
    if precision == "int8":
        raise InputError(f"format={format} has no place for the scales of precision=int8; export fp16, or format=torchscript")


def write_programs(
    format: str,
    encoder: Encoder,
    similarity: str,
    item_vectors: Tensor,
    max_seq_len: int,
    folder: Path,
) -> "Programs":
    """Export every method.

    Args:
        format: ``pt2`` (`torch.export.save`) or ``aoti`` (compiled by AOTInductor for this machine's kind).
        encoder: in evaluation mode.
        similarity: ``dot`` or ``cosine``.
        item_vectors: the table as stored, ``[V, Q]``, float32 or float16; V and its values are not part of the programs.
        max_seq_len: see `ScoringModule`.
        folder: where the files go.

    Returns:
        The programs, read back from their files.
    """
    item_bias = item_vectors.size(1) > encoder.width
    state_size = encoder.state_size
    size = torch.export.Dim.DYNAMIC
    for method, program in _PROGRAMS.items():
        inputs = _example(method, item_vectors, state_size)
        shapes = tuple({0: size} for _ in inputs)
        module = program(encoder, similarity, item_bias, max_seq_len).eval()
        with torch.no_grad():
            exported = torch.export.export(module, inputs, dynamic_shapes=shapes, strict=False)
            path = str(folder / program_file(method))
            if format == "pt2":
                torch.export.save(exported, path)
            else:
                torch._inductor.aoti_compile_and_package(exported, package_path=path)
    return Programs(format, folder, item_vectors, state_size)


class Programs:
    """The programs of an artifact behind the methods of `RecurrentScoringModule`, with a list of `TOP_K` places at most.

    Args:
        format: ``pt2`` or ``aoti``.
        folder: of the artifact.
        item_vectors: the table as stored, ``[V, Q]``.
        state_size: numbers of a state.
    """

    def __init__(self, format: str, folder: Path, item_vectors: Tensor, state_size: int):
        self._run = {method: _load(format, folder / program_file(method)) for method in _PROGRAMS}
        self._items = item_vectors
        self._state_size = state_size

    def encode(self, item_ids: Tensor, lengths: Tensor) -> Tensor:
        """See `ScoringModule.encode`."""
        return self._run["encode"](self._items, item_ids, lengths)

    def score(self, item_ids: Tensor, lengths: Tensor, candidates: Tensor, candidate_lengths: Tensor) -> Tensor:
        """See `ScoringModule.score`."""
        return self._run["score"](self._items, item_ids, lengths, candidates, candidate_lengths)

    def top_k(self, item_ids: Tensor, lengths: Tensor, k: int, exclude_seen: bool = True) -> tuple[Tensor, Tensor]:
        """See `ScoringModule.top_k`; equal scores come in any order."""
        seen = (item_ids, lengths) if exclude_seen else (item_ids[:0], torch.zeros_like(lengths))
        ids, scores = self._run["top_k"](self._items, item_ids, lengths, *seen)
        return ids[:, :k], scores[:, :k]

    def init_state(self, batch_size: int) -> Tensor:
        """See `RecurrentScoringModule.init_state`; every encoder's first state is zeros."""
        return torch.zeros(batch_size, self._state_size)

    def step(self, item_ids: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `RecurrentScoringModule.step`."""
        return self._run["step"](self._items, item_ids, state)

    def advance(self, item_ids: Tensor, lengths: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """See `RecurrentScoringModule.advance`."""
        return self._run["advance"](self._items, item_ids, lengths, state)


def _load(format: str, path: Path) -> Callable[..., Any]:
    return torch.export.load(str(path)).module() if format == "pt2" else torch._inductor.aoti_load_package(str(path))


def _rows_of(values: Tensor, lengths: Tensor) -> Tensor:
    """Give the row of every value of a ragged batch."""
    return torch.searchsorted(lengths.cumsum(0), torch.arange(values.size(0), device=values.device), right=True)


def _example(method: str, item_vectors: Tensor, state_size: int) -> tuple[Tensor, ...]:
    """Give inputs of sizes that are all different and neither 0 nor 1, which torch.export would take for constants."""
    table = torch.zeros(11, item_vectors.size(1), dtype=item_vectors.dtype)
    ids, lengths = torch.arange(7), torch.tensor([4, 2, 1])
    candidates, candidate_lengths = torch.arange(5), torch.tensor([2, 0, 3])
    examples = {
        "encode": (ids, lengths),
        "score": (ids, lengths, candidates, candidate_lengths),
        "top_k": (ids, lengths, candidates, candidate_lengths),
        "step": (torch.arange(3), torch.zeros(3, state_size)),
        "advance": (ids, lengths, torch.zeros(3, state_size)),
    }
    return (table, *examples[method])
