"""LRURec: blocks of a linear recurrence over complex numbers and a position-wise MLP.

Yue et al., "Linear Recurrent Units for Sequential Recommendation", WSDM 2024, arXiv 2310.02367. It is causal by nature:
training is a scan over the sequence, inference a step.

The published model adds a learned bias per item to its scores. That belongs to whatever holds the items, and an encoder
knows none: it is an option of the model, ``model.item_bias``, which ``configs/model/lru_rec.yaml`` sets.

Shapes: T items, B sequences, L blocks, D width, S complex recurrent features.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from glintru_rec.encoders.base import Encoder, check_rates, check_sizes
from glintru_rec.errors import InputError
from glintru_rec.ops.diagonal_scan import diagonal_scan, diagonal_step
from glintru_rec.ops.dropout import Dropout


class LRURecState(NamedTuple):
    """What LRURec keeps of a user's past: its size does not depend on the history's length."""

    h: Tensor
    """The recurrences' states, real parts then imaginary, ``[B, L, 2, S]``."""


class DiagonalRecurrence(nn.Module):
    """λ = exp(-exp(ν) + i exp(θ));  γ = exp(γ_log);  h_n = λ ⊗ h_{n-1} + γ ⊗ (x_n W_in + b_in);  out = Re(h W_out + b_out).

    Complex weights are real ones on pairs: ``dense_in`` gives real parts, then imaginary; ``dense_out`` holds
    Re W_out beside -Im W_out, and the real part of b_out (its imaginary part never counts). |λ| < 1 for every ν, so no
    history is too long.
    """

    def __init__(self, width: int, state_width: int, min_radius: float, max_radius: float):
        super().__init__()
        self.min_radius = min_radius
        self.max_radius = max_radius
        self.nu = nn.Parameter(torch.empty(state_width))
        self.theta = nn.Parameter(torch.empty(state_width))
        self.gamma_log = nn.Parameter(torch.empty(state_width))
        self.dense_in = nn.Linear(width, 2 * state_width)
        self.dense_out = nn.Linear(2 * state_width, width)

    def reset_decay(self) -> None:
        """Draw λ uniformly from the ring min_radius ≤ |λ| ≤ max_radius, and set γ = sqrt(1 - |λ|²)."""
        with torch.no_grad():
            low, high = self.min_radius**2, self.max_radius**2
            squared = torch.rand_like(self.nu) * (high - low) + low
            self.nu.copy_(torch.log(-0.5 * torch.log(squared)))
            # Away from an angle of 0, whose logarithm no gradient would ever bring back.
            self.theta.copy_(torch.log(2 * math.pi * torch.rand_like(self.theta).clamp(min=1e-4)))
            self.gamma_log.copy_(0.5 * torch.log(1 - squared))

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        return self.prefill(x, offsets)[0]

    def prefill(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the state after each sequence's last item, ``[B, 2, S]``."""
        h, last = diagonal_scan(self._inputs(x), self._decay(), offsets)
        return self.dense_out(h.flatten(1)), last

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one item of each sequence, ``[B, D]``."""
        h = diagonal_step(self._inputs(x), self._decay(), h)
        return self.dense_out(h.flatten(1)), h

    def _inputs(self, x: Tensor) -> Tensor:
        return self.dense_in(x).view(x.size(0), 2, self.nu.size(0)) * torch.exp(self.gamma_log)

    def _decay(self) -> Tensor:
        modulus, angle = torch.exp(-torch.exp(self.nu)), torch.exp(self.theta)
        return torch.stack([modulus * torch.cos(angle), modulus * torch.sin(angle)])


class LRURecBlock(nn.Module):
    """y = LN(dropout(LRU(x)) + x);  x ← LN'(dropout(W2 dropout(GELU(W1 y + b1)) + b2) + y): D → 4D → D."""

    def __init__(
        self,
        width: int,
        state_width: int,
        min_radius: float,
        max_radius: float,
        dropout: float,
        recurrent_dropout: float,
        norm_eps: float,
    ):
        super().__init__()
        self.recurrence = DiagonalRecurrence(width, state_width, min_radius, max_radius)
        self.recurrent_dropout = Dropout(recurrent_dropout)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = Dropout(dropout)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        return self._finish(x, self.recurrence(x, offsets))

    def prefill(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the state after each sequence's last item, ``[B, 2, S]``."""
        out, last = self.recurrence.prefill(x, offsets)
        return self._finish(x, out), last

    def step(self, x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one item of each sequence, ``[B, D]``."""
        out, h = self.recurrence.step(x, h)
        return self._finish(x, out), h

    def _finish(self, x: Tensor, out: Tensor) -> Tensor:
        y = self.norm(self.recurrent_dropout(out) + x)
        return self.mlp_norm(self.dropout(self.down(self.dropout(functional.gelu(self.up(y))))) + y)


class LRURec(Encoder):
    """LRURec over ragged sequences of item embeddings, causal.

    Args:
        width: features D of the item embeddings and of the output.
        num_blocks: blocks, one after another.
        state_width: complex features S of each recurrence; 2D when absent.
        embedding_norm: the LayerNorm on the embeddings before the first block.
        dropout: rate on the embeddings and twice in each MLP.
        recurrent_dropout: rate after each recurrence; ``dropout`` when absent.
        min_radius: smallest modulus of λ at the start.
        max_radius: largest modulus of λ at the start; 0.99 remembers about a hundred items.
        norm_eps: ε of the LayerNorms.

    Raises:
        InputError: a size that is not positive, a rate outside [0, 1), or radii that are not 0 < min ≤ max < 1.

    Example:
        >>> encoder = LRURec(64).eval()
        >>> x, offsets = torch.randn(5, 64), torch.tensor([0, 3, 5])
        >>> hidden, state = encoder.prefill(x, offsets)
        >>> out, state = encoder.step(torch.randn(2, 64), state)  # one more item of both sequences
    """

    def __init__(
        self,
        width: int,
        num_blocks: int = 2,
        state_width: int | None = None,
        embedding_norm: bool = True,
        dropout: float = 0.2,
        recurrent_dropout: float | None = None,
        min_radius: float = 0.8,
        max_radius: float = 0.99,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        state_width = 2 * width if state_width is None else state_width
        check_sizes("LRURec", width=width, num_blocks=num_blocks, state_width=state_width)
        check_rates("LRURec", dropout=dropout, recurrent_dropout=recurrent_dropout)
        if not 0 < min_radius <= max_radius < 1:
            raise InputError(f"LRURec: min_radius {min_radius}, max_radius {max_radius}; it must be 0 < min <= max < 1")
        self.width = width
        self.causal = True
        self.recurrent = True
        self.state_width = state_width
        self.dropout = Dropout(dropout)
        self.embedding_norm = nn.LayerNorm(width, eps=norm_eps) if embedding_norm else nn.Identity()
        recurrent_dropout = dropout if recurrent_dropout is None else recurrent_dropout
        self.blocks = nn.ModuleList(
            LRURecBlock(width, state_width, min_radius, max_radius, dropout, recurrent_dropout, norm_eps)
            for _ in range(num_blocks)
        )
        self.reset_parameters()

    @classmethod
    def published(cls, width: int = 64, num_blocks: int = 2, dropout: float = 0.2) -> "LRURec":
        """Build the encoder of the published code; see `load_published_weights`, also for the items' biases."""
        return cls(width, num_blocks, dropout=dropout)

    def reset_parameters(self) -> None:
        """Draw all weights: matrices and biases from a normal of std 0.02 cut at two standard deviations, λ in its ring."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                for parameter in module.parameters():
                    nn.init.trunc_normal_(parameter, std=0.02, a=-0.04, b=0.04)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            elif isinstance(module, DiagonalRecurrence):
                module.reset_decay()

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Encode a ragged batch: ``[T, D]`` to ``[T, D]`` (see `Encoder.forward`)."""
        hidden = self.embedding_norm(self.dropout(x))
        for block in self.blocks:
            hidden = block(hidden, offsets)
        return hidden

    def init_state(self, batch_size: int) -> LRURecState:
        """Give the state of ``batch_size`` sequences before their first item: zeros."""
        return LRURecState(next(self.parameters()).new_zeros(batch_size, len(self.blocks), 2, self.state_width))

    def prefill(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, LRURecState]:
        """Encode a ragged batch and give the state after each sequence's last item (see `Encoder.prefill`)."""
        hidden = self.embedding_norm(self.dropout(x))
        states: list[Tensor] = []
        for block in self.blocks:
            hidden, h = block.prefill(hidden, offsets)  # type: ignore[operator]
            states.append(h)
        return hidden, LRURecState(torch.stack(states, dim=1))

    def step(self, x_t: Tensor, state: LRURecState) -> tuple[Tensor, LRURecState]:
        """Take in one item of each sequence, ``[B, D]`` (see `Encoder.step`)."""
        hidden = self.embedding_norm(self.dropout(x_t))
        states: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            hidden, h = block.step(hidden, state.h[:, i])  # type: ignore[operator]
            states.append(h)
        return hidden, LRURecState(torch.stack(states, dim=1))

    def pack_state(self, state: LRURecState) -> Tensor:
        """Lay the state of B sequences out as rows, ``[B, S]`` (see `Encoder.pack_state`)."""
        return state.h.flatten(1)

    def unpack_state(self, packed: Tensor) -> LRURecState:
        """Give back what `pack_state` laid out."""
        return LRURecState(packed.view(packed.size(0), len(self.blocks), 2, self.state_width))


# Our module or parameter of a block -> its name in the published code's ``model.lru_blocks.<i>``; there, ν, θ and γ_log are
# the rows of one matrix, and both projections are complex.
PUBLISHED_NAMES = {
    "recurrence.nu": "lru_layer.params_log",
    "recurrence.theta": "lru_layer.params_log",
    "recurrence.gamma_log": "lru_layer.params_log",
    "recurrence.dense_in": "lru_layer.in_proj",
    "recurrence.dense_out": "lru_layer.out_proj",
    "norm": "lru_layer.layer_norm",
    "up": "feed_forward.w_1",
    "down": "feed_forward.w_2",
    "mlp_norm": "feed_forward.layer_norm",
}


def load_published_weights(encoder: LRURec, state_dict: dict[str, Tensor]) -> None:
    """Copy the weights of the published code's model into ``encoder``.

    Args:
        encoder: made by `LRURec.published` with the same sizes (or with other switches of the same sizes).
        state_dict: ``LRU.state_dict()``. Its ``embedding.token.weight`` and ``model.bias`` are left alone: they belong to
            the item table (`glintru_rec.tables.item_table`), whose row of item i, with ``model.item_bias``, takes
            ``token.weight[i + 1]``, then ``bias[i + 1]``, then zeros; row 0 there is padding.

    Raises:
        InputError: a weight is missing or has another shape.
    """
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            published = name.replace("embedding_norm.", "embedding.layer_norm.")
            if name.startswith("blocks."):
                _, block, rest = name.split(".", 2)
                owner = max((ours for ours in PUBLISHED_NAMES if rest.startswith(ours)), key=len)
                published = f"model.lru_blocks.{block}.{PUBLISHED_NAMES[owner]}{rest[len(owner) :]}"
            if published not in state_dict:
                raise InputError(f"published weights hold no {published!r}, which LRURec's {name!r} needs")
            weight = _as_pairs(name, state_dict[published])
            if weight.shape != parameter.shape:
                found, wanted = list(weight.shape), list(parameter.shape)
                raise InputError(f"published weight {published!r} has shape {found}; LRURec's {name!r} has {wanted}")
            parameter.copy_(weight)


def _as_pairs(name: str, weight: Tensor) -> Tensor:
    """Give a published weight the real form of our parameter ``name``."""
    owner, kind = name.rsplit(".", 1)
    if kind in ("nu", "theta", "gamma_log"):
        return weight[("nu", "theta", "gamma_log").index(kind)]
    if owner.endswith("dense_in"):
        return torch.cat([weight.real, weight.imag])
    if owner.endswith("dense_out"):
        return torch.cat([weight.real, -weight.imag], dim=1) if kind == "weight" else weight.real
    return weight
