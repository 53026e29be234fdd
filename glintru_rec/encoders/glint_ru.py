"""GLINT-RU: a linear-attention expert and a dense selective GRU expert, mixed by a data-aware gate.

Zhang et al., "GLINT-RU: Gated Lightweight Intelligent Recurrent Units for Sequential Recommender Systems", KDD 2025,
arXiv 2406.10244. The published code pads, attends to future items and trains on one target per prefix; this one is
ragged and causal by default (``causal=False`` reads as the published code does).

Shapes: T items, B sequences, D width, H heads, d = D / H, k taps of the convolutions.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from glintru_rec.encoders.base import Encoder
from glintru_rec.errors import InputError
from glintru_rec.ops.conv import ragged_conv1d
from glintru_rec.ops.gru import ragged_gru
from glintru_rec.ops.linear_attention import linear_attention


class LinearAttentionExpert(nn.Module):
    """Attend with unit-length ELU features in place of a softmax.

    q̂ = q / ‖q‖ and k̂ = k / ‖k‖ of q = elu(e Wq + bq), k = elu(e Wk + bk), head by head; v = e Wv + bv;
    a_n = q̂_nᵀ (Σ_m k̂_m v_mᵀ) / sqrt(d);  A_n = LN(dropout(a_n Wa + ba) + e_n).
    """

    def __init__(self, width: int, num_heads: int, dropout: float, norm_eps: float, causal: bool):
        super().__init__()
        self.num_heads = num_heads
        self.causal = causal
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)
        self.norm = nn.LayerNorm(width, eps=norm_eps)

    def forward(self, e: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        heads = [e.size(0), self.num_heads, e.size(1) // self.num_heads]
        # The eps of normalize keeps a zero row (elu(0) = 0) at zero, where the published code divides 0 by 0.
        q = functional.normalize(functional.elu(self.query(e)).view(heads), dim=2, eps=1e-12)
        k = functional.normalize(functional.elu(self.key(e)).view(heads), dim=2, eps=1e-12)
        a = linear_attention(q, k, self.value(e).view(heads), offsets, self.causal) / math.sqrt(heads[2])
        return self.norm(self.dropout(self.out(a.reshape(e.size(0), e.size(1)))) + e)


class DenseSelectiveGRU(nn.Module):
    """A GRU between two short convolutions, its output gated by what it was given.

    c = conv(e W0 + b0);  h = GRU(c);  Φ = h W_H + b_H;  g = dropout(SiLU(c Wδ + bδ) WΩ + bΩ);  Y = conv(g ⊗ Φ).
    """

    def __init__(self, width: int, kernel_size: int, gate_dropout: float, causal: bool):
        super().__init__()
        self.causal = causal
        self.dense_in = nn.Linear(width, width)
        self.conv_in = nn.Conv1d(width, width, kernel_size)
        self.weight_ih = nn.Parameter(torch.empty(3 * width, width))
        self.weight_hh = nn.Parameter(torch.empty(3 * width, width))
        self.channel_crossing = nn.Linear(width, width)
        self.gate_down = nn.Linear(width, width // 2)
        self.gate_up = nn.Linear(width // 2, width)
        self.gate_dropout = nn.Dropout(gate_dropout)
        self.conv_out = nn.Conv1d(width, width, kernel_size)

    def forward(self, e: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        conv_in, conv_out = self.conv_in, self.conv_out
        bias_in, bias_out = conv_in.bias, conv_out.bias
        assert bias_in is not None  # for TorchScript, which reads conv.bias as optional
        assert bias_out is not None
        c = ragged_conv1d(self.dense_in(e), conv_in.weight, bias_in, offsets, self.causal)
        h, _ = ragged_gru(functional.linear(c, self.weight_ih), self.weight_hh, offsets)
        gate = self.gate_dropout(self.gate_up(functional.silu(self.gate_down(c))))
        return ragged_conv1d(gate * self.channel_crossing(h), conv_out.weight, bias_out, offsets, self.causal)


class GatedMLP(nn.Module):
    """P = GeLU(Z W4 + b4) ⊗ (Z W3 + b3);  the caller adds and normalises dropout(P Wo + bo) + Z."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.up = nn.Linear(width, width)
        self.gate = nn.Linear(width, width)
        self.down = nn.Linear(width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, z: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        return self.dropout(self.down(functional.gelu(self.gate(z)) * self.up(z)))


class GlintRUBlock(nn.Module):
    """Both experts, the data-aware gate, and the gated MLP.

    M = α_1 Y + α_2 A with α = softmax(w);  Z = LN(dropout((GeLU(e Wd + bd) ⊗ M) Wm + bm) + e);  R = LN'(MLP(Z) + Z).
    """

    def __init__(
        self,
        width: int,
        num_heads: int,
        kernel_size: int,
        causal: bool,
        gated_mlp: bool,
        share_norm: bool,
        dropout: float,
        gate_dropout: float,
        mix_dropout: float,
        mlp_dropout: float,
        norm_eps: float,
    ):
        super().__init__()
        self.attention = LinearAttentionExpert(width, num_heads, dropout, norm_eps, causal)
        self.gru = DenseSelectiveGRU(width, kernel_size, gate_dropout, causal)
        self.expert_weights = nn.Parameter(torch.full((2,), 0.5))
        self.mix_gate = nn.Linear(width, width)
        self.mix_out = nn.Linear(width, width)
        self.mix_dropout = nn.Dropout(mix_dropout)
        self.mix_norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = GatedMLP(width, mlp_dropout) if gated_mlp else None
        self.mlp_norm = None
        if gated_mlp:
            self.mlp_norm = self.mix_norm if share_norm else nn.LayerNorm(width, eps=norm_eps)

    def forward(self, e: Tensor, offsets: Tensor) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        alpha = torch.softmax(self.expert_weights, dim=0)
        mixed = alpha[0] * self.gru(e, offsets) + alpha[1] * self.attention(e, offsets)
        z = self.mix_norm(self.mix_dropout(self.mix_out(functional.gelu(self.mix_gate(e)) * mixed)) + e)
        if self.mlp is not None and self.mlp_norm is not None:
            z = self.mlp_norm(self.mlp(z) + z)
        return z


class GlintRU(Encoder):
    """GLINT-RU over ragged sequences of item embeddings (``gated_mlp=False`` is Light GLINT-RU).

    Causal by default: hidden at position n depends on items ``1 .. n``, so every position trains and the state that a
    new event needs has a fixed size.

    Args:
        width: features D of the item embeddings and of the output.
        num_heads: heads H of the attention expert; divides ``width``.
        kernel_size: taps k of both convolutions.
        num_blocks: blocks, one after another (the paper has one).
        gated_mlp: whether a block ends with the gated MLP.
        causal: whether a position sees its past only; False reads the whole sequence, as the published code does.
        embedding_norm: a LayerNorm on the embeddings before the first block (not in the paper; it trains better).
        share_norm: one LayerNorm instance for both add-and-norms of a block, as in the published code.
        dropout: rate on the embeddings and after the attention, and wherever no rate of its own is given.
        gate_dropout: rate on the selective gate.
        mix_dropout: rate after the mix of experts.
        mlp_dropout: rate after the gated MLP.
        norm_eps: ε of the LayerNorms.

    Raises:
        InputError: a size that is not positive, heads that do not divide the width, or a rate outside [0, 1).

    Example:
        >>> encoder = GlintRU(64).eval()
        >>> x, offsets = torch.randn(5, 64), torch.tensor([0, 3, 5])
        >>> alone = encoder(x[:3], offsets[:2])  # the batch changes nothing
        >>> bool(torch.allclose(encoder(x, offsets)[:3], alone, atol=1e-5))
        True
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        kernel_size: int = 3,
        num_blocks: int = 1,
        gated_mlp: bool = True,
        causal: bool = True,
        embedding_norm: bool = True,
        share_norm: bool = False,
        dropout: float = 0.2,
        gate_dropout: float | None = None,
        mix_dropout: float | None = None,
        mlp_dropout: float | None = None,
        norm_eps: float = 1e-12,
    ):
        super().__init__()
        for name, size in {
            "width": width,
            "num_heads": num_heads,
            "kernel_size": kernel_size,
            "num_blocks": num_blocks,
        }.items():
            if size < 1:
                raise InputError(f"GlintRU: {name} is {size}; it must be at least 1")
        if width % num_heads:
            raise InputError(f"GlintRU: num_heads {num_heads} does not divide width {width}")
        rates = {"dropout": dropout, "gate_dropout": gate_dropout, "mix_dropout": mix_dropout, "mlp_dropout": mlp_dropout}
        for name, rate in rates.items():
            if rate is not None and not 0 <= rate < 1:
                raise InputError(f"GlintRU: {name} is {rate}; it must be at least 0 and less than 1")
        self.width = width
        self.causal = causal
        self.dropout = nn.Dropout(dropout)
        self.embedding_norm = nn.LayerNorm(width, eps=norm_eps) if embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            GlintRUBlock(
                width,
                num_heads,
                kernel_size,
                causal,
                gated_mlp,
                share_norm,
                dropout,
                dropout if gate_dropout is None else gate_dropout,
                dropout if mix_dropout is None else mix_dropout,
                dropout if mlp_dropout is None else mlp_dropout,
                norm_eps,
            )
            for _ in range(num_blocks)
        )
        self.reset_parameters()

    @classmethod
    def published(cls, width: int = 128, num_heads: int = 8, dropout: float = 0.2) -> "GlintRU":
        """Build the model of the published code: bidirectional, one shared LayerNorm, fixed dropouts of 0.3.

        Copy its weights with `load_published_weights`.
        """
        return cls(
            width,
            num_heads,
            causal=False,
            embedding_norm=False,
            share_norm=True,
            dropout=dropout,
            gate_dropout=0.3,
            mix_dropout=0.3,
            mlp_dropout=0.3,
        )

    def reset_parameters(self) -> None:
        """Draw all weights: Xavier uniform matrices, zero biases, as the published code does."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv1d):
                module.reset_parameters()
            elif isinstance(module, DenseSelectiveGRU):
                nn.init.xavier_uniform_(module.weight_ih)
                nn.init.xavier_uniform_(module.weight_hh)
            elif isinstance(module, GlintRUBlock):
                nn.init.constant_(module.expert_weights, 0.5)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Encode a ragged batch: ``[T, D]`` to ``[T, D]`` (see `Encoder.forward`)."""
        hidden = self.embedding_norm(self.dropout(x))
        for block in self.blocks:
            hidden = block(hidden, offsets)
        return hidden


# Our module or parameter of block 0 -> its name in the published code.
PUBLISHED_NAMES = {
    "attention.query": "linearattention.query",
    "attention.key": "linearattention.key",
    "attention.value": "linearattention.value",
    "attention.out": "linearattention.dense",
    "attention.norm": "linearattention.LayerNorm",
    "gru.dense_in": "dense1",
    "gru.conv_in": "conv1d",
    "gru.weight_ih": "gru_layers.weight_ih_l0",
    "gru.weight_hh": "gru_layers.weight_hh_l0",
    "gru.channel_crossing": "projection",
    "gru.gate_down": "selective_gate.0",
    "gru.gate_up": "selective_gate.2",
    "gru.conv_out": "conv1dforgru",
    "expert_weights": "weights",
    "mix_gate": "dense2",
    "mix_out": "dense",
    "mix_norm": "LayerNorm",
    "mlp_norm": "LayerNorm",
    "mlp.up": "dense3",
    "mlp.gate": "dense4",
    "mlp.down": "denseout",
}


def load_published_weights(encoder: GlintRU, state_dict: dict[str, Tensor]) -> None:
    """Copy the weights of the published code's model into ``encoder``.

    Args:
        encoder: made by `GlintRU.published` with the same width (or with any other switches; one block).
        state_dict: ``GLINTRU.state_dict()``; its ``item_embedding`` belongs to the item table and is left alone.

    Raises:
        InputError: a weight is missing or has another shape.
    """
    with torch.no_grad():
        for name, parameter in encoder.blocks[0].named_parameters():
            owner = max((ours for ours in PUBLISHED_NAMES if name.startswith(ours)), key=len)
            published = PUBLISHED_NAMES[owner] + name[len(owner) :]
            if published not in state_dict:
                raise InputError(f"published weights hold no {published!r}, which GlintRU's {name!r} needs")
            if state_dict[published].shape != parameter.shape:
                found, wanted = list(state_dict[published].shape), list(parameter.shape)
                raise InputError(f"published weight {published!r} has shape {found}; GlintRU's {name!r} has {wanted}")
            parameter.copy_(state_dict[published])
