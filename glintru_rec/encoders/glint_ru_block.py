"""The block of GLINT-RU: its two experts, the gate that mixes them, the gated MLP, and what they keep of the past.

Shapes: T items, B sequences, L blocks, D width, H heads, d = D / H, k taps of the convolutions.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from glintru_rec.jagged import last_items
from glintru_rec.ops.dropout import Dropout
from glintru_rec.ops.gru import gru_step
from glintru_rec.ops.linear_attention import continue_attention, linear_attention
from glintru_rec.ops.selective_gru import SelectiveGate, SelectiveGRUWeights, composed, gated_crossing, selective_gru

# The published code divides a zero row (elu(0) = 0) by its norm, 0. Ours stays 0, with a gradient of at most 1 / MIN_NORM.
MIN_NORM = 1e-4


class GlintRUState(NamedTuple):
    """What GLINT-RU keeps of a user's past: its size does not depend on the history's length.

    What an expert that is left out would keep has size zero: k-1 and h's D for the GRU, H for the attention.
    """

    past_u: Tensor
    """The last k-1 inputs of the first convolution, ``[B, L, k-1, D]``."""
    h: Tensor
    """The GRU's state, ``[B, L, D]``."""
    past_gated: Tensor
    """The last k-1 inputs of the second convolution, g ⊗ Φ (Φ without the gate), ``[B, L, k-1, D]``."""
    sums: Tensor
    """Σ k̂ vᵀ of the attention, ``[B, L, H, d, d]``."""


class LinearAttentionExpert(nn.Module):
    """Attend with unit-length ELU features in place of a softmax.

    q̂ = q / ‖q‖ and k̂ = k / ‖k‖ of q = elu(e Wq + bq), k = elu(e Wk + bk), head by head; v = e Wv + bv;
    a_n = q̂_nᵀ (Σ_m k̂_m v_mᵀ) / sqrt(d);  A_n = LN(dropout(a_n Wa + ba) + e_n).
    """

    def __init__(self, width: int, num_heads: int, dropout: float, norm_eps: float, causal: bool):
        super().__init__()
        self.num_heads = num_heads
        self.min_norm = MIN_NORM
        self.causal = causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, e: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        q, k, v = self._features(e)
        return self._finish(linear_attention(q, k, v, offsets, self.causal), e)

    def prefill(self, e: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and Σ k̂ vᵀ after each sequence's last item, ``[B, H, d, d]``."""
        q, k, v = self._features(e)
        a, state = continue_attention(q, k, v, offsets)
        return self._finish(a, e), state

    def step(self, e: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one item of each sequence, ``[B, D]``."""
        q, k, v = self._features(e)
        state = state + k.unsqueeze(3) * v.unsqueeze(2)
        return self._finish(torch.matmul(q.unsqueeze(2), state).squeeze(2), e), state

    def _features(self, e: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        heads = [e.size(0), self.num_heads, e.size(1) // self.num_heads]
        q = functional.normalize(functional.elu(self.query(e)).view(heads), dim=2, eps=self.min_norm)
        k = functional.normalize(functional.elu(self.key(e)).view(heads), dim=2, eps=self.min_norm)
        return q, k, self.value(e).view(heads)

    def _finish(self, a: Tensor, e: Tensor) -> Tensor:
        return self.norm(self.dropout(self.out(a.reshape(e.shape) / math.sqrt(a.size(2)))) + e)


class DenseSelectiveGRU(nn.Module):
    """A GRU between two short convolutions, its output gated by what it was given.

    c = conv(e W0 + b0);  h = GRU(c);  Φ = h W_H + b_H;  g = dropout(SiLU(c Wδ + bδ) WΩ + bΩ);  Y = conv(g ⊗ Φ).
    Without the selective gate Y = conv(Φ).
    """

    def __init__(self, width: int, kernel_size: int, selective_gate: bool, gate_dropout: float, causal: bool):
        super().__init__()
        self.causal = causal
        self.kernel_size = kernel_size
        self.dense_in = nn.Linear(width, width)
        self.conv_in = nn.Conv1d(width, width, kernel_size)
        self.weight_ih = nn.Parameter(torch.empty(3 * width, width))
        self.weight_hh = nn.Parameter(torch.empty(3 * width, width))
        self.channel_crossing = nn.Linear(width, width)
        self.gate_down = nn.Linear(width, width // 2) if selective_gate else None
        self.gate_up = nn.Linear(width // 2, width) if selective_gate else None
        self.gate_dropout = Dropout(gate_dropout) if selective_gate else None
        self.conv_out = nn.Conv1d(width, width, kernel_size)

    def forward(self, e: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        return selective_gru(
            self.dense_in(e), self._weights(), self._gate(), offsets, causal=self.causal, rate=self._gate_rate()
        )[0]

    def prefill(self, e: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As `forward`, and after each sequence's last item: the last k-1 u, h, and the last k-1 g ⊗ Φ."""
        u, past = self.dense_in(e), self.kernel_size - 1
        y, last, gated = composed(u, self._weights(), self._gate(), offsets, None, self.causal, self._gate_rate())
        return y, last_items(u, offsets, past), last, last_items(gated, offsets, past)

    def step(self, e: Tensor, past_u: Tensor, h: Tensor, past_gated: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Take in one item of each sequence, ``[B, D]``; the states are ``[B, k-1, D]``, ``[B, D]``, ``[B, k-1, D]``."""
        window_u = torch.cat([past_u, self.dense_in(e).unsqueeze(1)], dim=1)
        c = self.conv_in(window_u.transpose(1, 2)).squeeze(2)
        h = gru_step(functional.linear(c, self.weight_ih), self.weight_hh.t(), h)
        gated = gated_crossing(c, h, self._weights(), self._gate(), self._gate_rate())
        window_gated = torch.cat([past_gated, gated.unsqueeze(1)], dim=1)
        return self.conv_out(window_gated.transpose(1, 2)).squeeze(2), window_u[:, 1:], h, window_gated[:, 1:]

    def _weights(self) -> SelectiveGRUWeights:
        bias_in, bias_out = self.conv_in.bias, self.conv_out.bias
        assert bias_in is not None  # for TorchScript, which reads conv.bias as optional
        assert bias_out is not None
        return SelectiveGRUWeights(
            self.conv_in.weight,
            bias_in,
            self.weight_ih,
            self.weight_hh,
            self.channel_crossing.weight,
            self.channel_crossing.bias,
            self.conv_out.weight,
            bias_out,
        )

    def _gate(self) -> SelectiveGate | None:
        down, up = self.gate_down, self.gate_up
        if down is not None and up is not None:
            return SelectiveGate(down.weight, down.bias, up.weight, up.bias)
        return None

    def _gate_rate(self) -> float:
        return self.gate_dropout.p if self.training and self.gate_dropout is not None else 0.0


class GatedMLP(nn.Module):
    """P = GeLU(Z W4 + b4) ⊗ (Z W3 + b3);  the caller adds and normalises dropout(P Wo + bo) + Z."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.up = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.dropout = Dropout(dropout)

    def forward(self, z: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        return self.dropout(self.down(functional.gelu(self.gate(z)) * self.up(z)))


class GlintRUBlock(nn.Module):
    """Both experts, the data-aware gate, and the gated MLP.

    M = α_1 Y + α_2 A with α = softmax(w);  Z = LN(dropout((GeLU(e Wd + bd) ⊗ M) Wm + bm) + e);  R = LN'(MLP(Z) + Z).
    Without the GRU expert M = A, without the attention expert M = Y: there is no α.
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        kernel_size: int,
        causal: bool,
        gated_mlp: bool,
        share_norm: bool,
        gru_expert: bool,
        attention_expert: bool,
        selective_gate: bool,
        dropout: float,
        gate_dropout: float,
        mix_dropout: float,
        mlp_dropout: float,
        norm_eps: float,
    ):
        super().__init__()
        self.head_width = width // num_heads
        self.attention = LinearAttentionExpert(width, num_heads, dropout, norm_eps, causal) if attention_expert else None
        self.gru = DenseSelectiveGRU(width, kernel_size, selective_gate, gate_dropout, causal) if gru_expert else None
        self.expert_weights = nn.Parameter(torch.full((2,), 0.5)) if gru_expert and attention_expert else None
        self.mix_gate = nn.Linear(width, width)
        self.mix_out = nn.Linear(width, width)
        self.mix_dropout = Dropout(mix_dropout)
        self.mix_norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = GatedMLP(width, mlp_dropout) if gated_mlp else None
        self.mlp_norm = None
        if gated_mlp:
            self.mlp_norm = self.mix_norm if share_norm else nn.LayerNorm(width, eps=norm_eps)

    def forward(self, e: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        experts: list[Tensor] = []
        if self.gru is not None:
            experts.append(self.gru(e, offsets))
        if self.attention is not None:
            experts.append(self.attention(e, offsets))
        return self._mix(e, experts)

    def prefill(self, e: Tensor, offsets: Tensor) -> tuple[Tensor, GlintRUState]:
        """As `forward`, and the block's state after each sequence's last item (without the dimension L)."""
        sequences, width, d = offsets.numel() - 1, e.size(1), self.head_width
        past_u, past_gated = e.new_zeros(sequences, 0, width), e.new_zeros(sequences, 0, width)
        h, sums = e.new_zeros(sequences, 0), e.new_zeros(sequences, 0, d, d)
        experts: list[Tensor] = []
        if self.gru is not None:
            y, past_u, h, past_gated = self.gru.prefill(e, offsets)
            experts.append(y)
        if self.attention is not None:
            a, sums = self.attention.prefill(e, offsets)
            experts.append(a)
        return self._mix(e, experts), GlintRUState(past_u, h, past_gated, sums)

    def step(self, e: Tensor, state: GlintRUState) -> tuple[Tensor, GlintRUState]:
        """Take in one item of each sequence, ``[B, D]``."""
        past_u, h, past_gated, sums = state.past_u, state.h, state.past_gated, state.sums
        experts: list[Tensor] = []
        if self.gru is not None:
            y, past_u, h, past_gated = self.gru.step(e, past_u, h, past_gated)
            experts.append(y)
        if self.attention is not None:
            a, sums = self.attention.step(e, sums)
            experts.append(a)
        return self._mix(e, experts), GlintRUState(past_u, h, past_gated, sums)

    def _mix(self, e: Tensor, experts: list[Tensor]) -> Tensor:
        mixed = experts[0]
        if self.expert_weights is not None:
            alpha = torch.softmax(self.expert_weights, dim=0)
            mixed = alpha[0] * experts[0] + alpha[1] * experts[1]
        z = self.mix_norm(self.mix_dropout(self.mix_out(functional.gelu(self.mix_gate(e)) * mixed)) + e)
        if self.mlp is not None and self.mlp_norm is not None:
            z = self.mlp_norm(self.mlp(z) + z)
        return z
