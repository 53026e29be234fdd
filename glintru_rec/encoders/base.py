"""The contract that every encoder keeps."""

from typing import Any

import torch
from torch import Tensor, nn

from glintru_rec.errors import InputError


class Encoder(nn.Module):
    """Turn the item embeddings of a ragged batch into one hidden vector per position.

    An encoder takes embeddings, never ids, and knows nothing of tables, losses or TorchRec. A sequence's output never
    depends on what else is in the batch. A causal encoder's output at position n depends on items ``1 .. n`` only, so
    every position is a training example; a bidirectional one sees the whole sequence, and only its last position may be
    trained on or used as the user's vector.

    A recurrent encoder also goes on from where it was, at a cost that does not depend on the history's length::

        hidden, state = encoder.prefill(x, offsets)   # as forward, and the state after each sequence's last item
        out, state = encoder.step(x_t, state)         # one more item each: what forward would give at that position
        state = encoder.init_state(batch_size)        # before the first item

    A state is a NamedTuple of tensors with the sequences as leading dimension. To be kept somewhere it becomes one row of
    S numbers for each sequence, and comes back exactly::

        packed = encoder.pack_state(state)            # [B, S], of the parameters' dtype: float32 in an artifact
        state = encoder.unpack_state(packed)          # S = encoder.state_size

    Attributes:
        width: features D of input and output.
        causal: whether every position may be used.
        recurrent: whether the encoder has the recurrent form.
        members: encoders that this one is made of, each with ``width / members`` columns of its own; 1 but for an `Ensemble`.
    """

    width: int
    causal: bool
    recurrent: bool = False
    members: int = 1

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Encode a ragged batch.

        Args:
            x: item embeddings, ``[T, D]``.
            offsets: where each sequence starts in ``x``, int64 ``[B + 1]``, from 0 to T.

        Returns:
            hidden, ``[T, D]``; at a sequence's last position it is the query vector: score(i) = hidden · item_i.
        """
        raise NotImplementedError

    def init_state(self, batch_size: int) -> Any:
        """Give the state of ``batch_size`` sequences before their first item."""
        raise NotImplementedError(f"{type(self).__name__} has no recurrent form")

    def prefill(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Any]:
        """Encode a ragged batch (see `forward`) and give the state after each sequence's last item."""
        raise NotImplementedError(f"{type(self).__name__} has no recurrent form")

    def step(self, x_t: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Take in one item of each sequence.

        Args:
            x_t: embeddings, ``[B, D]``.
            state: of B sequences.

        Returns:
            What `forward` gives at that position, ``[B, D]``, and the state after it.
        """
        raise NotImplementedError(f"{type(self).__name__} has no recurrent form")

    @property
    @torch.jit.unused
    def state_size(self) -> int:
        """Numbers S that a packed state has for each sequence, whatever the history's length; 0 where there is no state."""
        return self.pack_state(self.init_state(1)).size(1) if self.recurrent else 0

    def pack_state(self, state: Any) -> Tensor:
        """Lay the state of B sequences out as rows, ``[B, S]``."""
        raise NotImplementedError(f"{type(self).__name__} has no recurrent form")

    def unpack_state(self, packed: Tensor) -> Any:
        """Give back what `pack_state` laid out, to the last bit.

        Args:
            packed: ``[B, S]``.
        """
        raise NotImplementedError(f"{type(self).__name__} has no recurrent form")


def check_sizes(encoder: str, **sizes: int) -> None:
    """Raise an `InputError` for a size that is not positive."""
    for name, size in sizes.items():
        if size < 1:
            raise InputError(f"{encoder}: {name} is {size}; it must be at least 1")


def check_rates(encoder: str, **rates: float | None) -> None:
    """Raise an `InputError` for a dropout rate outside [0, 1)."""
    for name, rate in rates.items():
        if rate is not None and not 0 <= rate < 1:
            raise InputError(f"{encoder}: {name} is {rate}; it must be at least 0 and less than 1")
