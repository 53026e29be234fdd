"""RecGRELA: rotary-enhanced linear attention with a local branch beside it and a gate behind it.

"Gated Rotary-Enhanced Linear Attention for Long-term Sequential Recommendation", arXiv 2506.13315. The published code
attends to future items and to padding and trains on one target per prefix; this one is ragged and causal by default
(``causal=False`` reads as the published code does).

Shapes: T items, B sequences, L blocks, D width, H heads, d = D / H, k taps of the convolution.
"""

import torch
from torch import Tensor, nn

from glintru_rec.encoders.base import Encoder, check_rates, check_sizes
from glintru_rec.encoders.rec_grela_block import RecGRELABlock, RecGRELAState, rotation
from glintru_rec.errors import InputError
from glintru_rec.jagged import positions
from glintru_rec.ops.dropout import Dropout


class RecGRELA(Encoder):
    """RecGRELA over ragged sequences of item embeddings.

    Causal by default: hidden at position n depends on items ``1 .. n``, so every position trains and the state that a
    new event needs has a fixed size.

    Args:
        width: features D of the item embeddings and of the output; even.
        num_blocks: blocks, one after another.
        num_heads: heads H of the attention; divides ``width``.
        kernel_size: taps k of the depthwise convolution.
        causal: whether a position attends to its past only; False reads the whole sequence, as the published code does.
        embedding_norm: the LayerNorm on the embeddings before the first block.
        attention_residual: x + drop_path(o) after the attention, or drop_path(o) alone, as in the published code when
            it has a single block (its MLP keeps its residual).
        dropout: rate on the embeddings and twice in each MLP.
        drop_path: rate at which the attention branch of a block is dropped for a whole sequence.
        norm_eps: ε of the LayerNorms.

    Raises:
        InputError: a size that is not positive, an odd width, heads that do not divide it, or a rate outside [0, 1).

    Example:
        >>> encoder = RecGRELA(64).eval()
        >>> x, offsets = torch.randn(5, 64), torch.tensor([0, 3, 5])
        >>> hidden, state = encoder.prefill(x, offsets)
        >>> out, state = encoder.step(torch.randn(2, 64), state)  # one more item of both sequences
    """

    def __init__(
        self,
        width: int,
        num_blocks: int = 4,
        num_heads: int = 4,
        kernel_size: int = 4,
        causal: bool = True,
        embedding_norm: bool = True,
        attention_residual: bool = True,
        dropout: float = 0.2,
        drop_path: float = 0.1,
        norm_eps: float = 1e-5,
    ):
        super().__init__()
        check_sizes("RecGRELA", width=width, num_blocks=num_blocks, num_heads=num_heads, kernel_size=kernel_size)
        if width % 2:
            raise InputError(f"RecGRELA: width is {width}; it must be even, for rotary pairs")
        if width % num_heads:
            raise InputError(f"RecGRELA: num_heads {num_heads} does not divide width {width}")
        check_rates("RecGRELA", dropout=dropout, drop_path=drop_path)
        self.width = width
        self.causal = causal
        self.recurrent = causal
        self.num_heads = num_heads
        self.kernel_size = kernel_size
        # A packed state holds the position as two digits that float32 has exactly: up to 2**48 items.
        self.position_digit = 1 << 24
        self.dropout = Dropout(dropout)
        self.embedding_norm = nn.LayerNorm(width, eps=norm_eps) if embedding_norm else nn.Identity()
        self.blocks = nn.ModuleList(
            RecGRELABlock(width, num_heads, kernel_size, causal, attention_residual, dropout, drop_path, norm_eps)
            for _ in range(num_blocks)
        )
        self.reset_parameters()

    @classmethod
    def published(
        cls, width: int = 64, num_blocks: int = 4, num_heads: int = 4, dropout: float = 0.1, drop_path: float = 0.1
    ) -> "RecGRELA":
        """Build the model of the published code: bidirectional; copy its weights with `load_published_weights`."""
        return cls(
            width,
            num_blocks,
            num_heads,
            causal=False,
            attention_residual=num_blocks > 1,
            dropout=dropout,
            drop_path=drop_path,
            norm_eps=1e-12,
        )

    def reset_parameters(self) -> None:
        """Draw all weights: normal matrices of std 0.02, zero biases, torch's own convolution, as the published code."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm | nn.Conv1d):
                module.reset_parameters()

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Encode a ragged batch: ``[T, D]`` to ``[T, D]`` (see `Encoder.forward`)."""
        cos, sin = self._rotation(x, offsets)
        hidden = self.embedding_norm(self.dropout(x))
        for block in self.blocks:
            hidden = block(hidden, cos, sin, offsets)
        return hidden

    def init_state(self, batch_size: int) -> RecGRELAState:
        """Give the state of ``batch_size`` sequences before their first item: zeros."""
        like, blocks, d = next(self.parameters()), len(self.blocks), self.width // self.num_heads
        return RecGRELAState(
            like.new_zeros(batch_size, blocks, self.num_heads, d, d),
            like.new_zeros(batch_size, blocks, self.num_heads, d),
            like.new_zeros(batch_size, blocks, self.kernel_size - 1, self.width),
            torch.zeros(batch_size, dtype=torch.int64, device=like.device),
        )

    def prefill(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, RecGRELAState]:
        """Encode a ragged batch and give the state after each sequence's last item (see `Encoder.prefill`)."""
        self._check_recurrent()
        cos, sin = self._rotation(x, offsets)
        hidden = self.embedding_norm(self.dropout(x))
        states: list[RecGRELAState] = []
        for block in self.blocks:
            hidden, state = block.prefill(hidden, cos, sin, offsets)  # type: ignore[operator]
            states.append(state)
        return hidden, _stack(states)

    def step(self, x_t: Tensor, state: RecGRELAState) -> tuple[Tensor, RecGRELAState]:
        """Take in one item of each sequence, ``[B, D]`` (see `Encoder.step`)."""
        self._check_recurrent()
        cos, sin = rotation(state.position, self.width)
        cos, sin = cos.to(x_t.dtype), sin.to(x_t.dtype)
        hidden = self.embedding_norm(self.dropout(x_t))
        states: list[RecGRELAState] = []
        for i, block in enumerate(self.blocks):
            own = RecGRELAState(state.memory[:, i], state.key_sums[:, i], state.recent[:, i], state.position)
            hidden, own = block.step(hidden, cos, sin, own)  # type: ignore[operator]
            states.append(own)
        return hidden, _stack(states)

    def pack_state(self, state: RecGRELAState) -> Tensor:
        """Lay the state of B sequences out as rows, ``[B, S]`` (see `Encoder.pack_state`)."""
        position = torch.stack([state.position // self.position_digit, state.position % self.position_digit], dim=1)
        memory, key_sums, recent = state.memory.flatten(1), state.key_sums.flatten(1), state.recent.flatten(1)
        return torch.cat([memory, key_sums, recent, position.to(memory.dtype)], dim=1)

    def unpack_state(self, packed: Tensor) -> RecGRELAState:
        """Give back what `pack_state` laid out."""
        sequences, blocks, past = packed.size(0), len(self.blocks), self.kernel_size - 1
        d = self.width // self.num_heads
        memory, key_sums, recent, position = packed.split(
            [blocks * self.width * d, blocks * self.width, blocks * past * self.width, 2], dim=1
        )
        digits = position.to(torch.int64)
        return RecGRELAState(
            memory.view(sequences, blocks, self.num_heads, d, d),
            key_sums.view(sequences, blocks, self.num_heads, d),
            recent.view(sequences, blocks, past, self.width),
            digits[:, 0] * self.position_digit + digits[:, 1],
        )

    def _check_recurrent(self) -> None:
        if not self.causal:
            raise ValueError("a bidirectional encoder has no recurrent form: every new item changes all outputs")

    def _rotation(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Rotary cosine and sine of every item, ``[T, D/2]``: of each position once, then copied to its items."""
        position = positions(offsets, x.size(0))
        longest = 0
        if x.size(0) > 0:
            longest = int(position.max().item()) + 1
        cos, sin = rotation(torch.arange(longest, device=x.device), self.width)
        return cos.to(x.dtype)[position], sin.to(x.dtype)[position]


def _stack(states: list[RecGRELAState]) -> RecGRELAState:
    """Join the blocks' states along dimension 1; they agree on the position."""
    return RecGRELAState(
        torch.stack([state.memory for state in states], dim=1),
        torch.stack([state.key_sums for state in states], dim=1),
        torch.stack([state.recent for state in states], dim=1),
        states[0].position,
    )


# Our module of a block -> its name in the published code's ``GRELA_block.<i>`` (``GLARE_block.<i>`` in an older version).
PUBLISHED_NAMES = {
    "norm": "LayerNorm1",
    "gate": "act_proj",
    "dense_in": "in_proj",
    "attention.query_key": "attn.qk",
    "attention.conv": "attn.conv1d",
    "dense_out": "out_proj",
    "mlp_norm": "LayerNorm2",
    "mlp.up": "mlp.fc1",
    "mlp.down": "mlp.fc2",
}


def load_published_weights(encoder: RecGRELA, state_dict: dict[str, Tensor]) -> None:
    """Copy the weights of the published code's model into ``encoder``.

    Args:
        encoder: made by `RecGRELA.published` with the same sizes (or with other switches of the same sizes).
        state_dict: ``RecGRELA.state_dict()``; its ``item_embedding`` belongs to the item table and is left alone.

    Raises:
        InputError: a weight is missing or has another shape.
    """
    blocks = "GLARE_block" if any(name.startswith("GLARE_block.") for name in state_dict) else "GRELA_block"
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            published = name.replace("embedding_norm.", "LayerNorm.")
            if name.startswith("blocks."):
                _, block, rest = name.split(".", 2)
                owner, kind = rest.rsplit(".", 1)
                published = f"{blocks}.{block}.{PUBLISHED_NAMES[owner]}.{kind}"
            if published not in state_dict:
                raise InputError(f"published weights hold no {published!r}, which RecGRELA's {name!r} needs")
            if state_dict[published].shape != parameter.shape:
                found, wanted = list(state_dict[published].shape), list(parameter.shape)
                raise InputError(f"published weight {published!r} has shape {found}; RecGRELA's {name!r} has {wanted}")
            parameter.copy_(state_dict[published])
