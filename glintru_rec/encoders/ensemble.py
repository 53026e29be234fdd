"""Several encoders side by side, each with columns of its own: their scores add up.

Encoders of different kinds err differently: on Amazon Beauty GLINT-RU beside LRURec ranks better than either (docs/log.md).
They learn apart: each has its share of every item's embedding, is scored against that share alone, and is trained by a loss of
its own (`glintru_rec.training.batch_loss`). To everyone else this is one encoder, one table and one dot product::

    x = [x_1, ..., x_M]    hidden = [f_1(x_1) / |f_1(x_1)|, ..., f_M(x_M) / |f_M(x_M)|]    score = Σ_m hidden_m · item_m

Shapes: T items, B sequences, D width of them all, M members, S numbers of a packed state.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from glintru_rec.encoders.base import Encoder
from glintru_rec.errors import InputError


class EnsembleState(NamedTuple):
    """What all members keep of a user's past."""

    packed: Tensor
    """Their packed states, one after another, ``[B, S]``."""


class Member(nn.Module):
    """An encoder whose state is a row of numbers, so that all members' states are of one type (for TorchScript)."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.encoder = encoder

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Encode a ragged batch, each position to length 1."""
        return functional.normalize(self.encoder(x, offsets), dim=1)


class RecurrentMember(Member):
    """And the same for an encoder that has the recurrent form."""

    def init_state(self, batch_size: int) -> Tensor:
        """Give the packed state before the first item, ``[B, S_m]``."""
        return self.encoder.pack_state(self.encoder.init_state(batch_size))

    def prefill(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """As `forward`, and the packed state after each sequence's last item."""
        hidden, state = self.encoder.prefill(x, offsets)
        return functional.normalize(hidden, dim=1), self.encoder.pack_state(state)

    def step(self, x_t: Tensor, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Take in one item of each sequence."""
        hidden, state = self.encoder.step(x_t, self.encoder.unpack_state(packed))
        return functional.normalize(hidden, dim=1), self.encoder.pack_state(state)


class Ensemble(Encoder):
    """Encoders side by side over ragged sequences of item embeddings.

    Args:
        encoders: the members, of one width D / M; all causal, or none.

    Attributes:
        members: M.

    Raises:
        InputError: fewer than two members, of different widths, or some causal and some not.

    Example:
        >>> from glintru_rec.encoders import GlintRU, LRURec
        >>> encoder = Ensemble([GlintRU(32), LRURec(32)]).eval()
        >>> hidden = encoder(torch.randn(5, 64), torch.tensor([0, 3, 5]))
        >>> hidden.shape, bool(torch.allclose(hidden[:, :32].norm(dim=1), torch.ones(5)))
        (torch.Size([5, 64]), True)
    """

    def __init__(self, encoders: Sequence[Encoder]):
        super().__init__()
        widths, causal = [encoder.width for encoder in encoders], [encoder.causal for encoder in encoders]
        if len(encoders) < 2 or len(set(widths)) > 1:
            raise InputError(f"Ensemble: the members' widths are {widths}; there must be two or more, all equal")
        if len(set(causal)) > 1:
            raise InputError(f"Ensemble: the members' causal is {causal}; all must be causal, or none")
        self.member_width = widths[0]
        self.members = len(encoders)
        self.width = sum(widths)
        self.causal = causal[0]
        self.recurrent = all(encoder.recurrent for encoder in encoders)
        kind = RecurrentMember if self.recurrent else Member
        self.each = nn.ModuleList(kind(encoder) for encoder in encoders)
        self.state_sizes = [encoder.state_size for encoder in encoders]

    def forward(self, x: Tensor, offsets: Tensor) -> Tensor:
        """Encode a ragged batch: ``[T, D]`` to ``[T, D]``, each member's part of length 1 (see `Encoder.forward`)."""
        parts = x.split(self.member_width, dim=1)
        hidden: list[Tensor] = []
        for m, member in enumerate(self.each):
            hidden.append(member(parts[m].contiguous(), offsets))
        return torch.cat(hidden, dim=1)

    def init_state(self, batch_size: int) -> EnsembleState:
        """Give the state of ``batch_size`` sequences before their first item."""
        self._check_recurrent()
        packed = [member.init_state(batch_size) for member in self.each]  # type: ignore[operator]
        return EnsembleState(torch.cat(packed, dim=1))

    def prefill(self, x: Tensor, offsets: Tensor) -> tuple[Tensor, EnsembleState]:
        """Encode a ragged batch and give the state after each sequence's last item (see `Encoder.prefill`)."""
        self._check_recurrent()
        parts = x.split(self.member_width, dim=1)
        hidden: list[Tensor] = []
        packed: list[Tensor] = []
        for m, member in enumerate(self.each):
            out, state = member.prefill(parts[m].contiguous(), offsets)  # type: ignore[operator]
            hidden.append(out)
            packed.append(state)
        return torch.cat(hidden, dim=1), EnsembleState(torch.cat(packed, dim=1))

    def step(self, x_t: Tensor, state: EnsembleState) -> tuple[Tensor, EnsembleState]:
        """Take in one item of each sequence, ``[B, D]`` (see `Encoder.step`)."""
        self._check_recurrent()
        parts, states = x_t.split(self.member_width, dim=1), state.packed.split(self.state_sizes, dim=1)
        hidden: list[Tensor] = []
        packed: list[Tensor] = []
        for m, member in enumerate(self.each):
            out, after = member.step(parts[m].contiguous(), states[m].contiguous())  # type: ignore[operator]
            hidden.append(out)
            packed.append(after)
        return torch.cat(hidden, dim=1), EnsembleState(torch.cat(packed, dim=1))

    def pack_state(self, state: EnsembleState) -> Tensor:
        """Lay the state of B sequences out as rows, ``[B, S]`` (see `Encoder.pack_state`)."""
        return state.packed

    def unpack_state(self, packed: Tensor) -> EnsembleState:
        """Give back what `pack_state` laid out."""
        return EnsembleState(packed)

    def _check_recurrent(self) -> None:
        if not self.recurrent:
            raise ValueError("an ensemble has the recurrent form only if all of its members have it")
