"""GLINT-RU as it was published: padded, bidirectional, one target per prefix. The baseline of the training benchmark.

Every position sees the whole padded sequence, future items and padding included, so only the last position may be a
training target: a history of n items becomes n - 1 padded examples. Module names follow the published code.

Shapes: B prefixes, N padded length, D width, H heads, d = D / H, V catalog. Item 0 is padding; items are 1 to V.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LAYER_NORM_EPS = 1e-12
FIXED_DROPOUT = 0.3


class LinearAttention(nn.Module):
    """Attend in O(N): normalise queries and keys per head, and sum ``k vᵀ`` over the whole sequence first."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.LayerNorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)

    def forward(self, embeddings: Tensor) -> Tensor:
        """Map ``[B, N, D]`` to ``[B, N, D]``: ``LN(dropout(a Wa + ba) + e)``."""
        query = F.normalize(F.elu(self._heads(self.query(embeddings))), dim=-1)
        key = F.normalize(F.elu(self._heads(self.key(embeddings))), dim=-1)
        value = self._heads(self.value(embeddings))
        state = key.transpose(-1, -2) @ value  # [B, H, d, d]
        context = query @ state / math.sqrt(query.size(-1))
        context = context.transpose(1, 2).flatten(2)
        return self.LayerNorm(self.dropout(self.dense(context)) + embeddings)

    def _heads(self, hidden: Tensor) -> Tensor:
        return hidden.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # [B, H, N, d]


class PublishedGlintRU(nn.Module):
    """One GLINT-RU block over a padded batch, with its own item embedding.

    Args:
        num_items: V.
        width: D.
        num_heads: H, a divisor of D.
        dropout: of the embedding and of the attention's output; the gate, the mixing and the MLP always use 0.3.
    """

    def __init__(self, num_items: int, width: int = 128, num_heads: int = 8, dropout: float = 0.3) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width {width} is not a multiple of num_heads {num_heads}")
        self.item_embedding = nn.Embedding(num_items + 1, width, padding_idx=0)
        self.emb_dropout = nn.Dropout(dropout)
        self.dense1 = nn.Linear(width, width)
        self.conv1d = nn.Conv1d(width, width, kernel_size=3, padding=1)
        self.gru_layers = nn.GRU(width, width, bias=False, batch_first=True)
        self.projection = nn.Linear(width, width)
        self.selective_gate = nn.Sequential(
            nn.Linear(width, width // 2), nn.SiLU(), nn.Linear(width // 2, width), nn.Dropout(FIXED_DROPOUT)
        )
        self.conv1dforgru = nn.Conv1d(width, width, kernel_size=3, padding=1)
        self.linearattention = LinearAttention(width, num_heads, dropout)
        self.weights = nn.Parameter(torch.ones(2))
        self.dense2 = nn.Linear(width, width)
        self.dense = nn.Linear(width, width)
        self.dense3 = nn.Linear(width, width)
        self.dense4 = nn.Linear(width, width)
        self.denseout = nn.Linear(width, width)
        self.dropout = nn.Dropout(FIXED_DROPOUT)
        self.LayerNorm = nn.LayerNorm(width, eps=LAYER_NORM_EPS)
        self.apply(_initialise)

    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """Encode right-padded prefixes and return the query at each one's last item.

        Args:
            item_seq: int64 ``[B, N]``, 0 where padded.
            item_seq_len: items of each prefix, at least 1, int64 ``[B]``.

        Returns:
            ``[B, D]``; its product with an item's embedding is that item's score.
        """
        hidden = self.encode(self.item_embedding(item_seq))
        return hidden[torch.arange(hidden.size(0), device=hidden.device), item_seq_len - 1]

    def encode(self, embeddings: Tensor) -> Tensor:
        """Run the block: ``[B, N, D]`` embeddings to the ``[B, N, D]`` outputs of every position."""
        embeddings = self.emb_dropout(embeddings)
        weights = self.weights.softmax(0)
        mixed = weights[0] * self._selective_gru(embeddings) + weights[1] * self.linearattention(embeddings)
        mixed = self.dense(F.gelu(self.dense2(embeddings)) * mixed)
        mixed = self.LayerNorm(self.dropout(mixed) + embeddings)
        product = F.gelu(self.dense4(mixed)) * self.dense3(mixed)
        return self.LayerNorm(self.dropout(self.denseout(product)) + mixed)  # the published code shares one LayerNorm

    def loss(self, item_seq: Tensor, item_seq_len: Tensor, targets: Tensor) -> Tensor:
        """Compute the mean cross-entropy of ``targets [B]`` (1 to V) over the catalog; padding is no candidate."""
        logits = self(item_seq, item_seq_len) @ self.item_embedding.weight[1:].T
        return F.cross_entropy(logits, targets - 1)

    def _selective_gru(self, embeddings: Tensor) -> Tensor:
        local = _along_time(self.conv1d, self.dense1(embeddings))
        hidden, _ = self.gru_layers(local)
        return _along_time(self.conv1dforgru, self.selective_gate(local) * self.projection(hidden))


def padded_prefix_batches(
    items: Tensor, offsets: Tensor, max_len: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield one epoch of (prefix, next item) examples, shuffled and right-padded.

    Every item but the first of each sequence is a target once. Only the targets' places are held (8 bytes each):
    the prefixes of a batch are gathered when it is asked for.

    Args:
        items: ragged histories, ids from 0 to V - 1, int64 ``[T]``.
        offsets: int64 ``[B + 1]``.
        max_len: N; a longer prefix keeps its last N items.
        batch_size: examples per batch; the last batch holds what is left.
        seed: of the shuffle.

    Yields:
        ``item_seq [batch, N]``, ``item_seq_len [batch]``, ``targets [batch]``: ids from 1 to V, 0 where padded.
    """
    starts = torch.repeat_interleave(offsets[:-1], offsets.diff(), output_size=items.numel())
    places = (torch.arange(items.numel()) > starts).nonzero().squeeze(1)
    shuffle = torch.randperm(places.numel(), generator=torch.Generator().manual_seed(seed))
    columns = torch.arange(max_len)
    for ends in places[shuffle].split(batch_size):
        if not ends.numel():  # splitting nothing gives one empty part
            return
        first = torch.maximum(starts[ends], ends - max_len)
        lengths = ends - first
        index = (first.unsqueeze(1) + columns).clamp(max=items.numel() - 1)
        item_seq = (items[index] + 1).masked_fill(columns >= lengths.unsqueeze(1), 0)
        yield item_seq, lengths, items[ends] + 1


def _along_time(convolution: nn.Conv1d, hidden: Tensor) -> Tensor:
    return convolution(hidden.transpose(1, 2)).transpose(1, 2)


def _initialise(module: nn.Module) -> None:
    """Start as the published code does, with a padding row of zeros."""
    if isinstance(module, nn.Embedding):
        nn.init.xavier_normal_(module.weight)
        with torch.no_grad():
            module.weight[module.padding_idx].zero_()
    elif isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.GRU):
        for weight in module.parameters():
            nn.init.xavier_uniform_(weight)
