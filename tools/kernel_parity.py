"""Every Triton kernel against its naive truth in float64: results and all gradients, fp32 and bf16, at odd sizes.

python tools/kernel_parity.py                      # on a GPU
TRITON_INTERPRET=1 python tools/kernel_parity.py   # anywhere, in Triton's interpreter: small sizes, bf16 in storage only

An error is the largest difference in units of the truth's largest value. The bound is that of the naive code in the kernel's
own dtype, twice for results and five times for gradients, plus a rounding. Memory that a kernel should write is filled with
NaN before. Prints a line per tensor; the exit status is 1 if one is beyond its bound.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.ops import (
    triton_attention,
    triton_conv,
    triton_gru,
    triton_normalized,
    triton_scan,
    triton_selective_gru,
    triton_softmax,
)
from glintru_rec.ops.conv import conv_reference
from glintru_rec.ops.diagonal_scan import scan_reference
from glintru_rec.ops.gru import gru_reference
from glintru_rec.ops.selective_gru import SelectiveGate, SelectiveGRUWeights, selective_gru_reference

ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2.0**-8}
EMPTY_ROWS = [0, 3, 0, 37, 1, 0, 70, 2, 0]
TWO_TILES = [0, 5, 1, 0, 2, 4, 3, 1, 1, 2, 0, 3, 1, 2, 1, 1, 2, 0, 9]  # of sequences, for the GRU's tiles of 16
SHORT = [2, 0, 4, 1]
LARGE = [200, 0, 1, 63, 64, 65, 129, 0, 31, 32, 33, 7]
LARGE_AND_MANY = [*LARGE, *([3, 0, 50] * 8)]


class Case(NamedTuple):
    """One kernel at one size."""

    name: str
    inputs: dict[str, Tensor]
    """Float64; the gradient of each is checked."""
    reference: Callable[..., tuple[Tensor, ...]]
    """Inputs to results, by autograd."""
    forward: Callable[..., tuple[Tensor, ...]]
    """Inputs to results, and after these what `backward` takes besides."""
    backward: Callable[..., Sequence[Tensor]]
    """Gradients of the results, inputs and all that `forward` gave, to gradients of the inputs."""


class Line(NamedTuple):
    """One tensor of one case."""

    case: str
    dtype: str
    tensor: str
    error: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the error is within its bound; NaN is not."""
        return self.error <= self.bound


def cases(small: bool) -> Iterator[Case]:
    """Make every kernel's cases, ``small`` ones for the interpreter."""
    if small:  # the interpreter walks a scan element by element
        triton_scan.STEPS, triton_scan.FEATURES = 16, 8
    for lengths, width in [(TWO_TILES, 24), (SHORT, 72)] if small else [(LARGE_AND_MANY, 64), (LARGE, 128), (LARGE, 96)]:
        yield gru_case(lengths, width)
    yield scan_case(EMPTY_ROWS if small else LARGE, 11 if small else 130)
    for causal in (True, False):
        for heads, d, e in [(2, 12, 20)] if small else [(8, 16, 16), (3, 24, 40), (2, 64, 64)]:
            yield attention_case(EMPTY_ROWS if small else LARGE, heads, d, e, causal)
        yield normalized_case(EMPTY_ROWS if small else LARGE, 1 if small else 4, 12 if small else 16, causal)
    if not small:
        yield attention_case([0, 100_000, 3], 1, 16, 16, True)
    for d_in, d_out, taps in [(40, 72, 3)] if small else [(128, 128, 3), (65, 200, 4)]:
        yield conv_case(EMPTY_ROWS if small else LARGE, d_in, d_out, taps)
    yield depthwise_case(EMPTY_ROWS if small else LARGE, 40 if small else 200, 4)
    for sampled in (False, True):
        yield softmax_case(70 if small else 700, 300 if small else 5000, 24 if small else 128, sampled)
    for lengths, width, taps, rate in (
        [([0, 3, 0, 40, 1, 0], 24, 3, 0.25), (TWO_TILES, 40, 2, 0.0)]
        if small
        else [(LARGE_AND_MANY, 128, 3, 0.25), (LARGE, 96, 4, 0.0)]
    ):
        yield selective_gru_case(lengths, width, taps, rate)


def gru_case(lengths: list[int], width: int) -> Case:
    """GRU from an initial state."""
    offsets = offsets_of(lengths)

    def backward(grads, inputs, results):
        return triton_gru.backward(*grads, inputs[1], inputs[2], offsets.to(inputs[0].device), results[0], results[2])

    return Case(
        f"gru D={width}",
        {
            "gates": draw(sum(lengths), 3 * width),
            "weight": draw(3 * width, width) / width**0.5,
            "initial": draw(len(lengths), width),
        },
        lambda gates, weight, initial: gru_reference(gates, weight, offsets, initial),
        lambda *inputs: triton_gru.forward(*inputs, offsets.to(inputs[0].device), True),
        backward,
    )


def scan_case(lengths: list[int], width: int) -> Case:
    """Complex recurrence from an initial state, |λ| from 0.8 to 0.99."""
    offsets = offsets_of(lengths)
    decay = torch.polar(torch.linspace(0.8, 0.99, width, dtype=torch.float64), torch.linspace(0, 6, width, dtype=torch.float64))

    def backward(grads, inputs, results):
        return triton_scan.backward(*grads, inputs[1], inputs[2], offsets.to(inputs[0].device), results[0])

    return Case(
        f"scan S={width}",
        {
            "inputs": draw(sum(lengths), 2, width),
            "decay": torch.stack([decay.real, decay.imag]),
            "initial": draw(len(lengths), 2, width),
        },
        lambda inputs, decay, initial: scan_reference(inputs, decay, offsets, initial),
        lambda *inputs: triton_scan.forward(*inputs, offsets.to(inputs[0].device)),
        backward,
    )


def attend(q: Tensor, k: Tensor, v: Tensor, initial: Tensor, offsets: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
    """The truth of linear attention from a state: q_nᵀ (S_0 + Σ k vᵀ), one sequence after another."""
    out, last = [v[:0]], []
    for b in range(offsets.numel() - 1):
        here = slice(int(offsets[b]), int(offsets[b + 1]))
        terms = torch.einsum("nhi,nhj->nhij", k[here], v[here])
        sums = initial[b] + (terms.cumsum(0) if causal else terms.sum(0))
        out.append(torch.einsum("nhi,nhij->nhj" if causal else "nhi,hij->nhj", q[here], sums))
        last.append(initial[b] + terms.sum(0))
    return torch.cat(out), torch.stack(last)


def attention_case(lengths: list[int], heads: int, d: int, e: int, causal: bool) -> Case:
    """Linear attention from an initial sum."""
    offsets, items = offsets_of(lengths), sum(lengths)
    return Case(
        f"attention H={heads} d={d} e={e} {'causal' if causal else 'bidirectional'}",
        {
            "q": draw(items, heads, d),
            "k": draw(items, heads, d),
            "v": draw(items, heads, e),
            "initial": draw(len(lengths), heads, d, e),
        },
        lambda q, k, v, initial: attend(q, k, v, initial, offsets, causal),
        lambda *inputs: triton_attention.forward(*inputs, offsets.to(inputs[0].device), causal),
        lambda grads, inputs, _: triton_attention.backward(*grads, *inputs, offsets.to(inputs[0].device), causal),
    )


def normalized_case(lengths: list[int], heads: int, d: int, causal: bool) -> Case:
    """Normalised attention from initial sums; positive queries and keys of the divisor."""
    offsets, items, eps = offsets_of(lengths), sum(lengths), 1e-6

    def reference(q, k, q_rotary, k_rotary, v, memory, key_sums):
        numerator, last_memory = attend(q_rotary, k_rotary, v, memory, offsets, causal)
        divisor, last_sums = attend(q, k, torch.ones_like(v[:, :, :1]), key_sums.unsqueeze(3), offsets, causal)
        counts = torch.tensor([1.0 if causal else n for n in lengths for _ in range(n)], dtype=v.dtype).view(-1, 1, 1)
        return numerator / (divisor + eps * counts), last_memory, last_sums.squeeze(3)

    def backward(grads, inputs, results):
        return triton_normalized.backward(
            *grads, *inputs, offsets.to(inputs[0].device), results[0].clone(), results[3].clone(), causal
        )

    names = ["q", "k", "q_rotary", "k_rotary", "v"]
    positive = {name: draw(items, heads, d).abs() + 0.1 for name in names[:2]}
    return Case(
        f"normalized H={heads} d={d} {'causal' if causal else 'bidirectional'}",
        {
            **positive,
            **{name: draw(items, heads, d) for name in names[2:]},
            "memory": draw(len(lengths), heads, d, d),
            "key_sums": draw(len(lengths), heads, d).abs(),
        },
        reference,
        lambda *inputs: triton_normalized.forward(*inputs, offsets.to(inputs[0].device), causal, eps),
        backward,
    )


def conv_case(lengths: list[int], d_in: int, d_out: int, taps: int) -> Case:
    """Dense causal convolution."""
    offsets = offsets_of(lengths)
    return Case(
        f"conv {d_in}->{d_out} k={taps}",
        {
            "x": draw(sum(lengths), d_in),
            "weight": draw(d_out, d_in, taps) / (d_in * taps) ** 0.5,
            "bias": draw(d_out),
        },
        lambda x, weight, bias: (conv_reference(x, weight, bias, offsets, True),),
        lambda *inputs: (triton_conv.forward(*inputs, offsets.to(inputs[0].device)),),
        lambda grads, inputs, _: triton_conv.backward(*grads, *inputs[:2], offsets.to(inputs[0].device)),
    )


def depthwise_case(lengths: list[int], width: int, taps: int) -> Case:
    """Depthwise causal convolution: a dense one with a diagonal weight."""
    offsets = offsets_of(lengths)

    def reference(x, weight, bias):
        return (conv_reference(x, torch.eye(width, dtype=x.dtype).unsqueeze(2) * weight, bias, offsets, True),)

    return Case(
        f"depthwise conv D={width} k={taps}",
        {"x": draw(sum(lengths), width), "weight": draw(width, 1, taps), "bias": draw(width)},
        reference,
        lambda *inputs: (triton_conv.forward(*inputs, offsets.to(inputs[0].device)),),
        lambda grads, inputs, _: triton_conv.backward(*grads, *inputs[:2], offsets.to(inputs[0].device)),
    )


def selective_gru_case(lengths: list[int], width: int, taps: int, rate: float) -> Case:
    """Dense selective GRU from an initial state, numbers of its gate dropped."""
    offsets, items = offsets_of(lengths), sum(lengths)
    kept = torch.rand(items, width, generator=GENERATOR) >= rate if rate > 0 else None
    scale = kept.double() / (1 - rate) if kept is not None else torch.ones(items, width)

    def matrix(rows: int, columns: int) -> Tensor:
        return draw(rows, columns) / columns**0.5

    def convolution() -> Tensor:
        return draw(width, width, taps) / (width * taps) ** 0.5

    names = [*SelectiveGRUWeights._fields, *(f"gate's {name}" for name in SelectiveGate._fields)]
    layers = (convolution(), draw(width), matrix(3 * width, width), matrix(3 * width, width), matrix(width, width), draw(width))
    gate = (matrix(width // 2, width), draw(width // 2), matrix(width, width // 2), draw(width))
    weights = (*layers, convolution(), draw(width), *gate)

    def arguments(inputs: Sequence[Tensor]) -> tuple:
        u, initial, *weights = inputs
        device = u.device
        mask = kept.to(device) if kept is not None else None
        return u, SelectiveGRUWeights(*weights[:8]), SelectiveGate(*weights[8:]), initial, offsets.to(device), mask, rate

    def reference(u, initial, *weights):
        named = SelectiveGRUWeights(*weights[:8]), SelectiveGate(*weights[8:])
        return selective_gru_reference(u, *named, offsets, initial, scale.to(u.dtype))

    def backward(grads, inputs, results):
        grad_u, grad_weights, grad_gate, grad_initial = triton_selective_gru.backward(*grads, *arguments(inputs), *results[2:])
        return grad_u, grad_initial, *grad_weights, *grad_gate

    return Case(
        f"selective gru D={width} k={taps}",
        {"u": draw(items, width), "initial": draw(len(lengths), width), **dict(zip(names, weights))},
        reference,
        lambda *inputs: triton_selective_gru.forward(*arguments(inputs), True),
        backward,
    )


def softmax_case(num_targets: int, num_items: int, width: int, sampled: bool) -> Case:
    """Log-sum-exp over all items, or over corrected ones without accidental hits."""
    extra: tuple[Tensor, ...] = ()
    if sampled:
        ids = torch.randint(0, 50, (num_targets,), generator=GENERATOR), torch.randint(0, 50, (num_items,), generator=GENERATOR)
        extra = (torch.rand(num_items, generator=GENERATOR), *ids)

    def reference(query, items):
        scores = query @ items.t()
        if sampled:
            scores = (scores - extra[0].to(scores.dtype)).masked_fill(extra[1].unsqueeze(1) == extra[2], -torch.inf)
        return (scores.logsumexp(1),)

    def forward(query, items):
        return (triton_softmax.forward(query, items, *(x.to(query.device) for x in extra)),)

    def backward(grads, inputs, results):
        here = (x.to(inputs[0].device) for x in extra)
        return triton_softmax.backward(grads[0].float(), *inputs, results[0], *here)

    name = f"softmax T={num_targets} V={num_items} D={width} {'sampled' if sampled else 'exact'}"
    return Case(name, {"query": draw(num_targets, width), "items": draw(num_items, width)}, reference, forward, backward)


GENERATOR = torch.Generator().manual_seed(0)


def draw(*shape: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(*shape, generator=GENERATOR, dtype=torch.float64)


def offsets_of(lengths: list[int]) -> Tensor:
    """Turn lengths into offsets."""
    return offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))


@contextmanager
def poisoned() -> Iterator[None]:
    """Let memory that is allocated and not written hold NaN."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the operations that have no deterministic form: that is not asked for
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            assert bool(torch.empty(4).isnan().all())
            yield
        finally:
            torch.use_deterministic_algorithms(False)


def check(case: Case, dtype: torch.dtype, device: torch.device) -> list[Line]:
    """Compare a kernel with its truth."""
    rounded = [x.to(dtype) for x in case.inputs.values()]
    results, gradients = by_autograd(case, [x.double() for x in rounded])
    naive_results, naive_gradients = by_autograd(case, rounded)
    inputs = [x.to(device) for x in rounded]
    with poisoned():
        given = case.forward(*inputs)
        weights = [output_weight(y, number).to(device, y.dtype) for number, y in enumerate(given[: len(results)])]
        found = case.backward(weights, inputs, given)
    lines = []
    rounding = ROUNDING[dtype]
    names = [f"result {number}" for number in range(len(results))]
    for name, mine, naive, truth in zip(names, given, naive_results, results):
        lines.append(compare(case.name, dtype, name, mine, truth, 2 * error(naive, truth) + rounding))
    for name, mine, naive, truth in zip(case.inputs, found, naive_gradients, gradients, strict=True):
        lines.append(compare(case.name, dtype, f"grad of {name}", mine, truth, 5 * error(naive, truth) + rounding))
    return lines


def by_autograd(case: Case, inputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients of the naive code, in the inputs' dtype."""
    leaves = [x.clone().requires_grad_() for x in inputs]
    results = case.reference(*leaves)
    total = sum((y * output_weight(y, number).to(y.dtype)).sum() for number, y in enumerate(results))
    return [y.detach() for y in results], list(torch.autograd.grad(total, leaves))


def output_weight(y: Tensor, number: int) -> Tensor:
    """The gradient of a result: the same for the kernel and for the truth."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(y.shape, generator=generator, dtype=torch.float64).bfloat16()  # exact in every dtype


def compare(case: str, dtype: torch.dtype, tensor: str, mine: Tensor, truth: Tensor, bound: float) -> Line:
    """Make a line."""
    assert mine.shape == truth.shape, (case, tensor, mine.shape, truth.shape)
    return Line(case, str(dtype).removeprefix("torch."), tensor, error(mine, truth), bound)


def error(x: Tensor, truth: Tensor) -> float:
    """Largest difference, in units of the truth's largest value."""
    if truth.numel() == 0:
        return 0.0
    return ((x.double().cpu() - truth).abs().max() / truth.abs().max()).item()


def main() -> int:
    """Check everything, print, give the exit status."""
    interpreted = bool(triton.knobs.runtime.interpret)
    if not interpreted and not torch.cuda.is_available():
        print("no GPU, and TRITON_INTERPRET is not set: nothing to run the kernels on", file=sys.stderr)
        return 2
    device = torch.device("cpu" if interpreted else "cuda")
    failed = 0
    for case in cases(small=interpreted):
        for dtype in ROUNDING:
            for line in check(case, dtype, device):
                failed += not line.holds
                verdict = "ok" if line.holds else "FAILED"
                print(f"{verdict:7}{line.case:42}{line.dtype:10}{line.tensor:18}{line.error:10.2e} of {line.bound:.2e}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
