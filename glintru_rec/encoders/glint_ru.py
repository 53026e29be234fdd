"""GLINT-RU: a linear-attention expert and a dense selective GRU expert, mixed by a data-aware gate.

Zhang et al., "GLINT-RU: Gated Lightweight Intelligent Recurrent Units for Sequential Recommender Systems", KDD 2025,
arXiv 2406.10244. The published code pads, attends to future items and trains on one target per prefix; this one is
ragged and causal by default (``causal=False`` reads as the published code does).

Shapes: T items, B sequences, L blocks, D width, H heads, d = D / H, k taps of the convolutions.
"""

import torch
from torch import Tensor, nn

from glintru_rec.encoders.base import Encoder, check_rates, check_sizes
from glintru_rec.encoders.glint_ru_block import DenseSelectiveGRU, GlintRUBlock, GlintRUState
from glintru_rec.errors import InputError
from glintru_rec.ops.dropout import Dropout


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
        gru_expert: the dense selective GRU expert; without it M = A and there are no mixing weights.
        attention_expert: the linear-attention expert; without it M = Y and there are no mixing weights.
        selective_gate: the gate g of the GRU expert; without it Y = conv(Φ).
        dropout: rate on the embeddings and after the attention, and wherever no rate of its own is given.
        gate_dropout: rate on the selective gate.
        mix_dropout: rate after the mix of experts.
        mlp_dropout: rate after the gated MLP.
        norm_eps: ε of the LayerNorms.

    Raises:
        InputError: a size that is not positive, heads that do not divide the width, no expert, or a rate outside [0, 1).

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
        gru_expert: bool = True,
        attention_expert: bool = True,
        selective_gate: bool = True,
        dropout: float = 0.2,
        gate_dropout: float | None = None,
        mix_dropout: float | None = None,
        mlp_dropout: float | None = None,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_sizes("GlintRU", width=width, num_heads=num_heads, kernel_size=kernel_size, num_blocks=num_blocks)
        if width % num_heads:
            raise InputError(f"GlintRU: num_heads {num_heads} does not divide width {width}")
        if not (gru_expert or attention_expert):
            raise InputError("GlintRU: gru_expert and attention_expert are both False; a block needs one of them")
        check_rates("GlintRU", dropout=dropout, gate_dropout=gate_dropout, mix_dropout=mix_dropout, mlp_dropout=mlp_dropout)
        self.width = width
        self.causal = causal
        self.recurrent = causal
        self.head_width = width // num_heads
        # A state's sizes: an expert that is left out keeps nothing.
        self.past = kernel_size - 1 if gru_expert else 0
        self.gru_width = width if gru_expert else 0
        self.state_heads = num_heads if attention_expert else 0
        self.dropout = Dropout(dropout)
        self.embedding_norm = nn.LayerNorm(width, eps=norm_eps) if embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            GlintRUBlock(
                width,
                num_heads,
                kernel_size,
                causal,
                gated_mlp,
                share_norm,
                gru_expert,
                attention_expert,
                selective_gate,
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
            norm_eps=1e-12,
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
            elif isinstance(module, GlintRUBlock) and module.expert_weights is not None:
                nn.init.constant_(module.expert_weights, 0.5)

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Encode a ragged batch: ``[T, D]`` to ``[T, D]`` (see `Encoder.forward`)."""
        hidden = self.embedding_norm(self.dropout(x))
        for block in self.blocks:
            hidden = block(hidden, offsets)
        return hidden

    def init_state(self, batch_size: int) -> GlintRUState:
        """Give the state of ``batch_size`` sequences before their first item: zeros."""
        like, blocks, d = next(self.parameters()), len(self.blocks), self.head_width
        return GlintRUState(
            like.new_zeros(batch_size, blocks, self.past, self.width),
            like.new_zeros(batch_size, blocks, self.gru_width),
            like.new_zeros(batch_size, blocks, self.past, self.width),
            like.new_zeros(batch_size, blocks, self.state_heads, d, d),
        )

    def prefill(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, GlintRUState]:
        """Encode a ragged batch and give the state after each sequence's last item (see `Encoder.prefill`)."""
        self._check_recurrent()
        hidden = self.embedding_norm(self.dropout(x))
        states: list[GlintRUState] = []
        for block in self.blocks:
            hidden, state = block.prefill(hidden, offsets)  # type: ignore[operator]
            states.append(state)
        return hidden, _stack(states)

    def step(self, x_t: Tensor, state: GlintRUState) -> tuple[Tensor, GlintRUState]:
        """Take in one item of each sequence, ``[B, D]`` (see `Encoder.step`)."""
        self._check_recurrent()
        hidden = self.embedding_norm(self.dropout(x_t))
        states: list[GlintRUState] = []
        for i, block in enumerate(self.blocks):
            own = GlintRUState(state.past_u[:, i], state.h[:, i], state.past_gated[:, i], state.sums[:, i])
            hidden, own = block.step(hidden, own)  # type: ignore[operator]
            states.append(own)
        return hidden, _stack(states)

    def pack_state(self, state: GlintRUState) -> Tensor:
        """Lay the state of B sequences out as rows, ``[B, S]`` (see `Encoder.pack_state`)."""
        past_u, past_gated = state.past_u.flatten(1), state.past_gated.flatten(1)
        return torch.cat([past_u, past_gated, state.h.flatten(1), state.sums.flatten(1)], dim=1)

    def unpack_state(self, packed: Tensor) -> GlintRUState:
        """Give back what `pack_state` laid out."""
        sequences, blocks, d = packed.size(0), len(self.blocks), self.head_width
        window = blocks * self.past * self.width
        past_u, past_gated, h, sums = packed.split(
            [window, window, blocks * self.gru_width, blocks * self.state_heads * d * d], dim=1
        )
        return GlintRUState(
            past_u.view(sequences, blocks, self.past, self.width),
            h.view(sequences, blocks, self.gru_width),
            past_gated.view(sequences, blocks, self.past, self.width),
            sums.view(sequences, blocks, self.state_heads, d, d),
        )

    def _check_recurrent(self) -> None:
        if not self.causal:
            raise ValueError("a bidirectional encoder has no recurrent form: every new item changes all outputs")


def _stack(states: list[GlintRUState]) -> GlintRUState:
    """Join the blocks' states along dimension 1."""
    return GlintRUState(
        torch.stack([state.past_u for state in states], dim=1),
        torch.stack([state.h for state in states], dim=1),
        torch.stack([state.past_gated for state in states], dim=1),
        torch.stack([state.sums for state in states], dim=1),
    )


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
