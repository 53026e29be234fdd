"""The block of RecGRELA: rotary linear attention, the local branch beside it, the gate behind it, and its state.

Shapes: T items, B sequences, L blocks, D width, H heads, d = D / H, k taps of the convolution.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from glintru_rec.jagged import last_items, lengths_from_offsets, sequence_index
from glintru_rec.ops.conv import ragged_conv1d
from glintru_rec.ops.dropout import Dropout, dropout_scale
from glintru_rec.ops.normalized_attention import continue_normalized, normalized_attention
from glintru_rec.ops.rotary import rotate


class RecGRELAState(NamedTuple):
    """What RecGRELA keeps of a user's past: its size does not depend on the history's length."""

    memory: Tensor
    """Σ k' vᵀ, ``[B, L, H, d, d]``."""
    key_sums: Tensor
    """Σ k, ``[B, L, H, d]``."""
    recent: Tensor
    """The last k-1 values, oldest first, zeros before the first item: ``[B, L, k-1, D]``."""
    position: Tensor
    """Number of items so far, int64 ``[B]``."""


def rotation(position: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Give cosine and sine of the rotary angles n · 10000^(-j / (D/2)), ``[*, D/2]``, in float64 for any n."""
    frequency = torch.arange(width // 2, dtype=torch.float64, device=position.device) / (width // 2)
    angle = position.to(torch.float64).unsqueeze(1) * torch.pow(10000.0, -frequency)
    return torch.cos(angle), torch.sin(angle)


class RotaryLinearAttention(nn.Module):
    """Linear attention beside a short depthwise convolution, the *rank augmentation branch*.

    q = elu(t Wq + bq) + 1;  k = elu(t Wk + bk) + 1;  v = t;  q', k' = rope(q), rope(k) over the full width;  per head
    a_n = q'_nᵀ (Σ_m k'_m v_mᵀ) / (q_n · Σ_m k_m + ε);  r = SiLU(conv(v)), causal always;  the result is a + r.
    """

    def __init__(self, width: int, num_heads: int, kernel_size: int, causal: bool):
        super().__init__()
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        self.causal = causal
        self.eps = 1e-6
        self.query_key = nn.Linear(width, 2 * width)
        self.conv = nn.Conv1d(width, width, kernel_size, groups=width)

    def forward(self, t: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        q, k, q_rotary, k_rotary = self._features(t, cos, sin)
        a = normalized_attention(q, k, q_rotary, k_rotary, t.view_as(q), offsets, self.causal, self.eps)
        return a.reshape(t.shape) + self._local(t, offsets)

    def prefill(self, t: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor) -> tuple[Tensor, RecGRELAState]:
        """As `forward`, and the block's state after each sequence's last item (without the dimension L)."""
        q, k, q_rotary, k_rotary = self._features(t, cos, sin)
        a, memory, key_sums = continue_normalized(q, k, q_rotary, k_rotary, t.view_as(q), offsets, self.causal, self.eps)
        recent = last_items(t, offsets, self.kernel_size - 1)
        state = RecGRELAState(memory, key_sums, recent, lengths_from_offsets(offsets))
        return a.reshape(t.shape) + self._local(t, offsets), state

    def step(self, t: Tensor, cos: Tensor, sin: Tensor, state: RecGRELAState) -> tuple[Tensor, RecGRELAState]:
        """Take in one item of each sequence, ``[B, D]``."""
        q, k, q_rotary, k_rotary = self._features(t, cos, sin)
        memory = state.memory + k_rotary.unsqueeze(3) * t.view_as(q).unsqueeze(2)
        key_sums = state.key_sums + k
        a = torch.matmul(q_rotary.unsqueeze(2), memory).squeeze(2) / ((q * key_sums).sum(2, keepdim=True) + self.eps)
        window = torch.cat([state.recent, t.unsqueeze(1)], dim=1)
        r = functional.silu((window * self.conv.weight.squeeze(1).t()).sum(1) + self._conv_bias())
        return a.reshape(t.shape) + r, RecGRELAState(memory, key_sums, window[:, 1:], state.position + 1)

    def _features(self, t: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries and keys, plain and rotary, ``[*, H, d]`` each."""
        plain = (functional.elu(self.query_key(t)) + 1).view([t.size(0), 2, t.size(1)])
        heads = [t.size(0), self.num_heads, t.size(1) // self.num_heads]
        q, k = plain.unbind(1)
        q_rotary, k_rotary = rotate(plain, cos, sin).unbind(1)
        return q.reshape(heads), k.reshape(heads), q_rotary.reshape(heads), k_rotary.reshape(heads)

    def _local(self, v: Tensor, offsets: Tensor) -> Tensor:
        """Convolve each feature over the last k items of its sequence: ``[T, D]``."""
        return functional.silu(ragged_conv1d(v, self.conv.weight, self._conv_bias(), offsets, True))

    def _conv_bias(self) -> Tensor:
        bias = self.conv.bias
        assert bias is not None  # for TorchScript, which reads conv.bias as optional
        return bias


class MLP(nn.Module):
    """dropout(dropout(GELU(x W1 + b1)) W2 + b2): D → 4D → D."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        return self.dropout(self.down(self.dropout(functional.gelu(self.up(x)))))


class DropPath(nn.Module):
    """Drop a branch for whole sequences while training; what is kept is scaled up to the same mean."""

    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``, one draw per sequence."""
        if not self.training or self.rate == 0.0:
            return x
        scale = dropout_scale(x, [offsets.numel() - 1], self.rate)
        return x * scale[sequence_index(offsets, x.size(0))].unsqueeze(1)


class RecGRELABlock(nn.Module):
    """y = LN_1(x);  s = SiLU(y Ws + bs), the *gated rank selector*;  t = y Wi + bi;  o = ((a + r) ⊗ s) Wp + bp.

    x ← x + drop_path(o);  x ← x + MLP(LN_2(x)).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        kernel_size: int,
        causal: bool,
        attention_residual: bool,
        dropout: float,
        drop_path: float,
        norm_eps: float,
    ):
        super().__init__()
        self.attention_residual = attention_residual
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.gate = nn.Linear(width, width)
        self.dense_in = nn.Linear(width, width)
        self.attention = RotaryLinearAttention(width, num_heads, kernel_size, causal)
        self.dense_out = nn.Linear(width, width)
        self.drop_path = DropPath(drop_path)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = MLP(width, dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        y = self.norm(x)
        return self._finish(x, y, self.attention(self.dense_in(y), cos, sin, offsets), offsets)

    def prefill(self, x: Tensor, cos: Tensor, sin: Tensor, offsets: Tensor) -> tuple[Tensor, RecGRELAState]:
        """As `forward`, and the block's state after each sequence's last item (without the dimension L)."""
        y = self.norm(x)
        mixed, state = self.attention.prefill(self.dense_in(y), cos, sin, offsets)
        return self._finish(x, y, mixed, offsets), state

    def step(self, x: Tensor, cos: Tensor, sin: Tensor, state: RecGRELAState) -> tuple[Tensor, RecGRELAState]:
        """Take in one item of each sequence, ``[B, D]``."""
        y = self.norm(x)
        mixed, state = self.attention.step(self.dense_in(y), cos, sin, state)
        return self._finish(x, y, mixed, torch.arange(x.size(0) + 1, device=x.device)), state

    def _finish(self, x: Tensor, y: Tensor, mixed: Tensor, offsets: Tensor) -> Tensor:
        o = self.drop_path(self.dense_out(mixed * functional.silu(self.gate(y))), offsets)
        x = x + o if self.attention_residual else o
        return x + self.mlp(self.mlp_norm(x))
