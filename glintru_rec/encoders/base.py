"""The contract that every encoder keeps."""

from torch import Tensor, nn


class Encoder(nn.Module):
    """Turn the item embeddings of a ragged batch into one hidden vector per position.

    An encoder takes embeddings, never ids, and knows nothing of tables, losses or TorchRec. A sequence's output never
    depends on what else is in the batch. A causal encoder's output at position n depends on items ``1 .. n`` only, so
    every position is a training example; a bidirectional one sees the whole sequence, and only its last position may be
    trained on or used as the user's vector.

    Attributes:
        width: features D of input and output.
        causal: whether every position may be used.
    """

    width: int
    causal: bool

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Encode a ragged batch.

        Args:
            x: item embeddings, ``[T, D]``.
            offsets: where each sequence starts in ``x``, int64 ``[B + 1]``, from 0 to T.

        Returns:
            hidden, ``[T, D]``; at a sequence's last position it is the query vector: score(i) = hidden · item_i.
        """
        raise NotImplementedError
