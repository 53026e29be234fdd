"""SASRec: causal self-attention, the yardstick that users would reach for first.

Kang and McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018, arXiv 1808.09781. Pre-norm, learned positions. It
has no recurrent form: what it keeps of a history grows with the history.

Shapes: T items, B sequences, D width, H heads, d = D / H, W windows of at most P = max_seq_len items.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from glintru_rec.encoders.base import Encoder, check_rates, check_sizes
from glintru_rec.errors import InputError
from glintru_rec.ops.dropout import Dropout
from glintru_rec.ops.softmax_attention import softmax_attention, window_positions


class CausalSelfAttention(nn.Module):
    """softmax(q kᵀ / sqrt(d)) v of q, k, v = x W + b over the items up to each one, then a linear layer."""

    def __init__(self, width: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_key_value = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, offsets: Tensor, span: int) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]`` within the windows of ``span`` items."""
        rate = self.dropout if self.training else 0.0
        return self.out(softmax_attention(self.query_key_value(x), offsets, self.num_heads, span, rate))


class SASRecBlock(nn.Module):
    """x ← x + attention(LN(x));  x ← x + dropout(ReLU(dropout(LN'(x) W1 + b1)) W2 + b2)."""

    def __init__(self, width: int, num_heads: int, mlp_width: int, dropout: float, attention_dropout: float, norm_eps: float):
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.attention = CausalSelfAttention(width, num_heads, attention_dropout)
        self.mlp_norm = nn.LayerNorm(width, eps=norm_eps)
        self.up = nn.Linear(width, mlp_width)
        self.down = nn.Linear(mlp_width, width)
        self.dropout = Dropout(dropout)

    def forward(self, x: Tensor, offsets: Tensor, span: int) -> Tensor:
        """Map ``[T, D]`` to ``[T, D]``."""
        x = x + self.attention(self.norm(x), offsets, span)
        return x + self.dropout(self.down(functional.relu(self.dropout(self.up(self.mlp_norm(x))))))


class SASRec(Encoder):
    """SASRec over ragged sequences of item embeddings, causal.

    x = dropout(e · sqrt(D) + p), with p_n the learned vector of position n; then the blocks; then a LayerNorm.

    Attention and positions reach over ``max_seq_len`` items. A longer sequence is cut, from its end, into windows of that
    many, which do not see each other: its last ``max_seq_len`` items, all that the published code would keep, are
    encoded as if they were the whole history, and time and memory grow linearly. Appending an item to such a sequence
    moves the windows; for a history that fits, the output at a position never changes.

    Args:
        width: features D of the item embeddings and of the output.
        num_blocks: blocks, one after another.
        num_heads: heads H of the attention; divides ``width``.
        max_seq_len: positions P, and the longest history that attention spans.
        mlp_width: hidden features of each block's MLP; 4D when absent (the published code has D).
        dropout: rate on the embeddings and twice in each MLP.
        attention_dropout: rate on the attention weights; ``dropout`` when absent.
        norm_eps: ε of the LayerNorms.

    Raises:
        InputError: a size that is not positive, heads that do not divide the width, or a rate outside [0, 1).

    Example:
        >>> encoder = SASRec(64).eval()
        >>> x, offsets = torch.randn(5, 64), torch.tensor([0, 3, 5])
        >>> encoder(x, offsets).shape
        torch.Size([5, 64])
    """

    def __init__(
        self,
        width: int,
        num_blocks: int = 2,
        num_heads: int = 2,
        max_seq_len: int = 200,
        mlp_width: int | None = None,
        dropout: float = 0.2,
        attention_dropout: float | None = None,
        norm_eps: float = 1e-8,
    ):
        super().__init__()
        mlp_width = 4 * width if mlp_width is None else mlp_width
        sizes = {"num_blocks": num_blocks, "num_heads": num_heads, "max_seq_len": max_seq_len, "mlp_width": mlp_width}
        check_sizes("SASRec", width=width, **sizes)
        if width % num_heads:
            raise InputError(f"SASRec: num_heads {num_heads} does not divide width {width}")
        check_rates("SASRec", dropout=dropout, attention_dropout=attention_dropout)
        self.width = width
        self.causal = True
        self.max_seq_len = max_seq_len
        self.positions = nn.Embedding(max_seq_len, width)
        self.dropout = Dropout(dropout)
        attention_dropout = dropout if attention_dropout is None else attention_dropout
        self.blocks = nn.ModuleList(
            SASRecBlock(width, num_heads, mlp_width, dropout, attention_dropout, norm_eps) for _ in range(num_blocks)
        )
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.reset_parameters()

    @classmethod
    def published(
        cls, width: int = 50, num_blocks: int = 2, num_heads: int = 1, max_seq_len: int = 200, dropout: float = 0.2
    ) -> "SASRec":
        """Build the model of the widely used torch code pmixer/SASRec.pytorch, run with ``norm_first``.

        Copy its weights with `load_published_weights`. For a full-length sequence it computes the same; a shorter one
        that code pads on the left and numbers as if the padding were items, which nothing here does.
        """
        return cls(width, num_blocks, num_heads, max_seq_len, mlp_width=width, dropout=dropout)

    def reset_parameters(self) -> None:
        """Draw all weights: Xavier normal matrices and positions, zero biases."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.xavier_normal_(module.weight)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Encode a ragged batch: ``[T, D]`` to ``[T, D]`` (see `Encoder.forward`)."""
        place = window_positions(offsets, x.size(0), self.max_seq_len)
        hidden = self.dropout(x * math.sqrt(self.width) + self.positions(place))
        for block in self.blocks:
            hidden = block(hidden, offsets, self.max_seq_len)
        return self.norm(hidden)


# Our module -> its name in the published code, with <i> the block.
PUBLISHED_NAMES = {
    "norm": "last_layernorm",
    "positions": "pos_emb",
    "blocks.<i>.norm": "attention_layernorms.<i>",
    "blocks.<i>.attention.query_key_value": "attention_layers.<i>.in_proj",
    "blocks.<i>.attention.out": "attention_layers.<i>.out_proj",
    "blocks.<i>.mlp_norm": "forward_layernorms.<i>",
    "blocks.<i>.up": "forward_layers.<i>.conv1",
    "blocks.<i>.down": "forward_layers.<i>.conv2",
}


def load_published_weights(encoder: SASRec, state_dict: dict[str, Tensor]) -> None:
    """Copy the weights of the published code's model into ``encoder``.

    Args:
        encoder: made by `SASRec.published` with the same sizes.
        state_dict: ``SASRec.state_dict()`` of a model with ``norm_first``; its ``item_emb`` belongs to the item table and
            is left alone, and so is row 0 of ``pos_emb``, the position of padding.

    Raises:
        InputError: a weight is missing or has another shape.
    """
    with torch.no_grad():
        for name, parameter in encoder.named_parameters():
            owner, kind = name.rsplit(".", 1)
            block = owner.split(".")[1] if owner.startswith("blocks.") else ""
            published = PUBLISHED_NAMES[owner.replace(f"blocks.{block}.", "blocks.<i>.")].replace("<i>", block)
            published += f"_{kind}" if published.endswith("in_proj") else f".{kind}"
            if published not in state_dict:
                raise InputError(f"published weights hold no {published!r}, which SASRec's {name!r} needs")
            weight = state_dict[published]
            if name == "positions.weight":
                weight = weight[1:]
            elif weight.dim() == 3:  # a convolution over one item
                weight = weight.squeeze(2)
            if weight.shape != parameter.shape:
                found, wanted = list(weight.shape), list(parameter.shape)
                raise InputError(f"published weight {published!r} has shape {found}; SASRec's {name!r} has {wanted}")
            parameter.copy_(weight)
