"""The sequence tower: a history's features in, what a ranking model should know of the user out.

::

    history   item ids ──┐
              side ids … ┴─ one EmbeddingCollection ─ sum or concatenation ─ encoder ─ hidden ┬─ query: the last one seen
    candidates item ids ─────── the same item table ──────────────────────────────────────────┴─ attention of the candidate

Shapes: S histories, T events in them, B candidates (one or more for each history), D width, V rows of a table.
"""

import math
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchrec import EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor

from glintru_rec.config import check, one_of
from glintru_rec.encoders import ENCODERS
from glintru_rec.encoders.base import Encoder
from glintru_rec.errors import InputError
from glintru_rec.jagged import lengths_from_offsets, positions, sequence_index

CANDIDATE = "candidate"
COMBINATIONS = ("sum", "concat")
OUTPUTS = ("query", "attention", "both")


class SequenceTower(nn.Module):
    """Encode histories, and give each candidate its user's vector, what attention finds in the history, or both.

    Histories are a KeyedJaggedTensor with a key for each feature, item ids first, and the candidates' item ids under
    ``"candidate"``: lengths ``[S]`` for each key. A candidate sees the first ``seen`` events of its history, so the
    impressions of one user share one pass of a causal encoder. An impression log with a history for each candidate has
    candidate lengths of 1 and ``seen`` equal to the history's length.

    Args:
        features: sequence feature → rows V of its table. The first is the item.
        encoder: of width D; causal, or every candidate must see its whole history.
        combine: ``sum`` of the features' embeddings (an encoder of a retrieval run goes on with what it knows, for side
            features start small), or ``concat`` and a linear map to D.
        output: ``query``, ``attention`` or ``both``.
        num_heads: heads of the attention; divides D.
        init_std: standard deviation of the embeddings' start.
        device: of the tables; ``meta`` where they will be sharded.

    Raises:
        InputError: an unknown choice, heads that do not divide D, or a feature of a reserved name.

    Example:
        >>> tower = SequenceTower({"item": 100, "rating": 6}, GlintRU(32), output="both")
        >>> histories = KeyedJaggedTensor(  # user 1: items 7 8 9, candidates 10 11; user 2: item 5, candidate 6
        ...     ["item", "rating", "candidate"],
        ...     torch.tensor([7, 8, 9, 5, 3, 4, 5, 1, 10, 11, 6]), lengths=torch.tensor([3, 1, 3, 1, 2, 1]))
        >>> query, attended = tower(histories, seen=torch.tensor([2, 3, 1]))
        >>> query.shape
        torch.Size([3, 32])
    """

    def __init__(
        self,
        features: dict[str, int],
        encoder: Encoder,
        combine: str = "sum",
        output: str = "both",
        num_heads: int = 4,
        init_std: float = 0.02,
        device: torch.device | None = None,
    ):
        super().__init__()
        one_of("tower.combine", combine, COMBINATIONS)
        one_of("tower.output", output, OUTPUTS)
        if CANDIDATE in features:
            raise InputError(f"a sequence feature is named {CANDIDATE!r}, which is the candidates' key; rename it")
        if encoder.width % num_heads:
            raise InputError(f"tower.num_heads {num_heads} does not divide the encoder's width {encoder.width}")
        self.features, self.combine, self.output = list(features), combine, output
        item = self.features[0]
        self.embeddings = EmbeddingCollection(
            [
                EmbeddingConfig(
                    name=sequence_table(name),
                    num_embeddings=rows,
                    embedding_dim=encoder.width,
                    feature_names=[name, CANDIDATE] if name == item else [name],
                    init_fn=partial(nn.init.normal_, std=init_std),
                )
                for name, rows in features.items()
            ],
            device=device,
        )
        self.mix = nn.Linear(len(features) * encoder.width, encoder.width) if combine == "concat" else None
        self.encoder = encoder
        self.attention = TargetAttention(encoder.width, num_heads) if output != "query" else None
        self.is_frozen = False

    @property
    def num_outputs(self) -> int:
        """How many vectors `forward` gives."""
        return 2 if self.output == "both" else 1

    def freeze(self) -> None:
        """Keep the encoder and the item table as they are; side features and attention go on learning."""
        self.is_frozen = True
        self.encoder.requires_grad_(False)

    def forward(self, histories: KeyedJaggedTensor, seen: Tensor) -> list[Tensor]:
        """Encode histories and look at them from the candidates.

        Args:
            histories: sequence features and candidates, stride S.
            seen: events that each candidate may look at, the first of its history and at most all, int64 ``[B]``.

        Returns:
            One or two tensors ``[B, D]``: the query, which is 0 where nothing was seen; what the attention gives.
        """
        looked_up = self.embeddings(histories)
        history = looked_up[self.features[0]]
        items, candidates = history.values(), looked_up[CANDIDATE]
        candidate_vectors = candidates.values()
        if self.is_frozen:
            items, candidate_vectors = items.detach(), candidate_vectors.detach()
        rows = [items, *(looked_up[name].values() for name in self.features[1:])]
        x = torch.stack(rows).sum(dim=0) if self.mix is None else self.mix(torch.cat(rows, dim=1))
        offsets, candidate_offsets = history.offsets().long(), candidates.offsets().long()
        hidden = self.encoder(x, offsets)
        # A row that stands for an event nobody saw: an empty past has the vector 0.
        padded = torch.cat([hidden, hidden.new_zeros(1, hidden.size(1))])
        outputs = []
        if self.output != "attention":
            starts = offsets[:-1][sequence_index(candidate_offsets, seen.numel())]
            outputs.append(padded[torch.where(seen > 0, starts + seen - 1, hidden.size(0))])
        if self.attention is not None:
            outputs.append(self.attention(candidate_vectors, candidate_offsets, padded, offsets, seen))
        return outputs


class TargetAttention(nn.Module):
    """Attention of a candidate over the hidden states that it may see (as DIN looks at embeddings, arXiv 1706.06978).

    Multi-head attention with one more key and value of zeros, so that a candidate may find nothing, and one with an empty
    past has something to look at. Padding is masked: no candidate's result depends on the rest of the batch.

    Args:
        width: features D.
        num_heads: divides ``width``.
    """

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.heads = nn.MultiheadAttention(width, num_heads, batch_first=True, add_zero_attn=True)

    def forward(self, candidates: Tensor, candidate_offsets: Tensor, padded: Tensor, offsets: Tensor, seen: Tensor) -> Tensor:
        """Look at the history from each candidate.

        Args:
            candidates: ``[B, D]``.
            candidate_offsets: int64 ``[S + 1]``.
            padded: hidden states and a row of zeros behind them, ``[T + 1, D]``.
            offsets: of the histories, int64 ``[S + 1]``.
            seen: int64 ``[B]``.

        Returns:
            ``[B, D]``.
        """
        last = padded.size(0) - 1
        events, asked = _grid(offsets, last), _grid(candidate_offsets, candidates.size(0))
        queries = torch.cat([candidates, candidates.new_zeros(1, candidates.size(1))])[asked]
        limit = torch.cat([seen, seen.new_zeros(1)])[asked]
        hides = torch.arange(events.size(1), device=seen.device) >= limit.unsqueeze(2)
        keys = padded[events]
        attended, _ = self.heads(
            queries, keys, keys, attn_mask=hides.repeat_interleave(self.num_heads, dim=0), need_weights=False
        )
        owner = sequence_index(candidate_offsets, candidates.size(0))
        return attended[owner, positions(candidate_offsets, candidates.size(0))]


def _grid(offsets: Tensor, filler: int) -> Tensor:
    """Give the rows of ragged sequences as a rectangle ``[S, N]``, ``filler`` behind a sequence's end."""
    lengths = lengths_from_offsets(offsets)
    columns = torch.arange(int(lengths.max()) if lengths.numel() else 0, device=offsets.device)
    rows = offsets[:-1].unsqueeze(1) + columns
    return torch.where(columns < lengths.unsqueeze(1), rows, filler)


class RunningMean(Encoder):
    """Mean pooling as an encoder: hidden at position n is the mean of ``x_1 … x_n``.

    Args:
        width: features D.
    """

    def __init__(self, width: int):
        super().__init__()
        self.width, self.causal, self.recurrent = width, True, False

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Average each prefix: ``[T, D]`` to ``[T, D]`` (see `Encoder.forward`)."""
        # One running sum over the whole batch: in float64, so that what came before a sequence leaves no trace in it.
        sums = torch.cat([x.new_zeros(1, x.size(1)), x]).double().cumsum(dim=0)
        starts = offsets[:-1][sequence_index(offsets, x.size(0))]
        means = (sums[1:] - sums[starts]) / (positions(offsets, x.size(0)) + 1).unsqueeze(1)
        return means.to(x.dtype)


def sequence_table(feature: str) -> str:
    """Name the table of a sequence feature (a ModuleDict refuses names such as ``items``)."""
    return f"t_{feature}"


@dataclass
class TowerConfig:
    """The sequence tower.

    Attributes:
        encoder: name of an encoder (`glintru_rec.encoders.ENCODERS`), ``mean`` for mean pooling, or ``none`` for no tower.
        width: D of the sequence embeddings and the encoder, a multiple of 4.
        options: further arguments of the encoder's class.
        features: sequence features besides the item; empty: all that the dataset has.
        combine: ``sum`` of their embeddings, or ``concat`` and a linear map.
        output: ``query`` (the user's vector), ``attention`` of the candidate over the hidden states, or ``both``.
        num_heads: of the attention.
        init_from: run directory of a retrieval training, whose encoder and item embeddings the tower starts with; empty: none.
        frozen: keep those as they are.
        learning_rate_scale: of the learning rates of encoder and item embeddings, against all others.
    """

    encoder: str = "glint_ru"
    width: int = 64
    options: dict[str, Any] = field(default_factory=dict)
    features: list[str] = field(default_factory=list)
    combine: str = "sum"
    output: str = "both"
    num_heads: int = 4
    init_from: str = ""
    frozen: bool = False
    learning_rate_scale: float = 1.0

    def __post_init__(self):
        one_of("tower.encoder", self.encoder, ("none", "mean", *ENCODERS))
        one_of("tower.combine", self.combine, COMBINATIONS)
        one_of("tower.output", self.output, OUTPUTS)
        check("tower.width", self.width, self.width >= 4 and self.width % 4 == 0, "a multiple of 4, at least 4")
        check("tower.num_heads", self.num_heads, self.num_heads >= 1, "at least 1")
        scale = self.learning_rate_scale
        check("tower.learning_rate_scale", scale, 0 < scale < math.inf, "greater than 0 and finite (tower.frozen: no learning)")
        if not self.options.get("causal", True):
            raise InputError("tower.options.causal is false: examples of a user share a pass, which must not see the future")
        if self.frozen and not self.init_from:
            raise InputError("tower.frozen=true needs tower.init_from: a random encoder that never learns is of no use")
        if self.init_from and (self.encoder in ("none", "mean") or self.combine != "sum"):
            raise InputError(
                f"tower.init_from needs an encoder and tower.combine=sum, so that the encoder reads what it was trained on; "
                f"these are {self.encoder} and {self.combine}"
            )
