"""Which implementation of an op runs: the torch code beside it, or Triton kernels where there are some.

``ragged_gru``, ``selective_gru``, ``diagonal_scan``, ``ragged_conv1d``, ``linear_attention``, ``normalized_attention``, what
continues the latter two from a state, and the losses ``sampled_softmax`` and ``full_softmax`` take ``implementation``:
``torch``, ``triton``, or ``auto``, which is Triton on CUDA where Triton is installed and has kernels that take the input, and
torch everywhere else. ``softmax_attention`` and ``rotate`` have no such argument; they run torch code everywhere.

The kernels of op NAME live in ``triton_NAME.py``, as functions ``forward`` and ``backward`` with the arguments and results of
the op's own (see the package's table), beside ``takes``, which says of the tensors that decide it (GRU: weight;
selective GRU: u; scan: inputs; conv: x, weight; attentions: q, v; softmax: query) whether dtype and width are what they can do.
"""

import functools
import importlib
import importlib.util
from types import ModuleType

import torch
from torch import Tensor
from torch.library import CustomOpDef

from glintru_rec.errors import InputError

IMPLEMENTATIONS = ("auto", "torch", "triton")


@functools.cache
def _kernels(op: str) -> ModuleType | None:
    """The module of an op's Triton kernels, if Triton is installed and the op has some."""
    name = f"glintru_rec.ops.triton_{op}"
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec(name) is None:
        return None
    return importlib.import_module(name)


def triton_kernels(op: str, implementation: str, *deciding: Tensor) -> ModuleType | None:
    """Give the Triton kernels of ``op`` if they are to run, None for the torch code.

    Args:
        op: NAME of the module of its kernels.
        implementation: one of `IMPLEMENTATIONS`.
        deciding: the tensors that the kernels' ``takes`` looks at.

    Raises:
        InputError: no such implementation, or ``triton`` where there are no kernels. Kernels asked for by name that do not
            take the input say so themselves.
    """
    if implementation not in IMPLEMENTATIONS:
        raise InputError(f"{op}: implementation is {implementation!r}; it must be one of {', '.join(IMPLEMENTATIONS)}")
    if implementation == "torch" or (implementation == "auto" and not deciding[0].is_cuda):
        return None
    kernels = _kernels(op)
    if kernels is None and implementation == "triton":
        raise InputError(f"{op}: implementation is 'triton', but Triton is not installed or has no kernels for this op")
    if kernels is not None and implementation == "auto" and not kernels.takes(*deciding):
        return None
    if implementation == "triton" and not (deciding[0].is_cuda or _triton_interprets()):
        raise InputError(f"{op}: implementation is 'triton', but the input is on {deciding[0].device}, not on a GPU")
    return kernels


def under_autocast(op: CustomOpDef, cpu: torch.dtype, cuda: torch.dtype = torch.bfloat16) -> None:
    """Say what `torch.autocast` casts an operator's floating tensors to, on either device.

    Triton's kernels keep states and sums in fp32 whatever their inputs are. The torch code has them in its inputs' dtype, so
    what adds up along a history gets fp32 on a CPU.
    """
    op.register_autocast("cpu", cpu)
    op.register_autocast("cuda", cuda)


def _triton_interprets() -> bool:
    """Whether Triton runs kernels in its interpreter, on the CPU (its own TRITON_INTERPRET=1)."""
    return bool(importlib.import_module("triton").knobs.runtime.interpret)
