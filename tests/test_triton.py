"""Triton kernels without a GPU: their numbers in the interpreter, and what they compile to for sm_90."""

import os
import re
import subprocess
import sys

import pytest
import torch

from glintru_rec.errors import InputError
from tests.conftest import REPOSITORY, environment

pytest.importorskip("triton", reason="triton is not installed: no kernel was checked (pip install '.[triton]')")


def run(tool: str, *arguments: str, interpret: bool) -> subprocess.CompletedProcess[str]:
    """Run a tool; whether kernels are interpreted is settled when triton is imported, so in a process of its own."""
    env = {**environment(), "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    env.pop("TRITON_INTERPRET", None)
    if interpret:
        env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, str(REPOSITORY / "tools" / tool), *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=900, env=env)


@pytest.fixture(scope="module")
def parity() -> subprocess.CompletedProcess[str]:
    return run("kernel_parity.py", interpret=True)


@pytest.mark.parametrize(
    ("kernel", "num_cases", "num_tensors"),
    [
        ("gru", 2, 2 + 3),
        ("scan", 1, 2 + 3),
        ("attention", 2, 2 + 4),
        ("normalized", 2, 3 + 7),
        ("conv", 1, 1 + 3),
        ("depthwise conv", 1, 1 + 3),
        ("selective gru", 2, 2 + 14),
        ("softmax", 2, 1 + 2),
    ],
)
def test_kernels_equal_the_truth(parity, kernel, num_cases, num_tensors):
    """Results and gradients of every case, in both dtypes."""
    lines = [line for line in parity.stdout.splitlines() if re.match(rf"(ok|FAILED) +{kernel} (\w+=|\d)", line)]
    assert len(lines) == 2 * num_cases * num_tensors, parity.stdout + parity.stderr[-3000:]
    assert [line for line in lines if not line.startswith("ok")] == []


def test_the_parity_check_can_fail(monkeypatch):
    """What is written holds; what is off by a thousandth, or not written, does not."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    import kernel_parity

    def verdicts(forward, backward):
        inputs = {"x": torch.randn(5, 3, dtype=torch.float64)}
        case = kernel_parity.Case("double", inputs, lambda x: (2 * x,), forward, backward)
        return [line.holds for line in kernel_parity.check(case, torch.float32, torch.device("cpu"))]

    def right(x):
        return (torch.empty_like(x).copy_(2 * x),)

    def gradient(grads, inputs, results):
        return [2 * grads[0]]

    assert verdicts(right, gradient) == [True, True]
    assert verdicts(lambda x: (torch.cat([2 * x[:4], torch.empty_like(x[4:])]),), gradient) == [False, True]
    assert verdicts(lambda x: (2.002 * x,), gradient) == [False, True]
    assert verdicts(right, lambda grads, inputs, results: [2.002 * grads[0]]) == [True, False]


def test_without_a_gpu_nothing_passes_for_checked():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    result = run("kernel_parity.py", interpret=False)
    assert (result.returncode, result.stdout) == (2, "")
    assert "no GPU" in result.stderr


def test_kernels_compile_for_sm_90():
    """One size of every kernel, both dtypes; `python tools/kernel_report.py` has all sizes."""
    result = run("kernel_report.py", "--quick", interpret=False)
    assert result.returncode == 0, result.stdout + result.stderr[-3000:]
    names = {line.split()[0] for line in result.stdout.splitlines()[1:]}
    assert names == {
        *("gru_forward", "gru_backward", "scan_forward", "scan_backward", "attention_forward", "attention_backward"),
        *("conv_dense", "conv_dense_weight", "conv_depthwise", "conv_depthwise_weight"),
        *("selective_gru_before", "selective_gru_after", "selective_gru_after_backward", "selective_gru_before_backward"),
        *("softmax_forward", "softmax_backward_query", "softmax_backward_items"),
    }


def test_kernels_refuse_what_they_do_not_take():
    from glintru_rec.ops import triton_attention, triton_conv, triton_gru, triton_scan, triton_selective_gru, triton_softmax

    offsets = torch.tensor([0, 3])

    def gru(width, dtype):
        gates, weight, initial = (torch.zeros(n, m, dtype=dtype) for n, m in ((3, 3 * width), (3 * width, width), (1, width)))
        assert not triton_gru.takes(weight)
        triton_gru.forward(gates, weight, initial, offsets, True)

    with pytest.raises(InputError, match=r"float32 up to 128, not torch\.float64 of width 8: use implementation='torch'"):
        gru(8, torch.float64)
    with pytest.raises(InputError, match=r"ragged_gru take .* not torch\.float32 of width 129"):
        gru(129, torch.float32)
    with pytest.raises(InputError, match=r"bfloat16 up to width 256 .* not torch\.bfloat16 of width 257"):
        gru(257, torch.bfloat16)
    x = torch.zeros(3, 2, 4, dtype=torch.float16)
    assert not triton_scan.takes(x)
    with pytest.raises(InputError, match="diagonal_scan"):
        triton_scan.forward(x, x[0], x[:1], offsets)
    q, v = torch.zeros(3, 1, 8), torch.zeros(3, 1, 65)
    assert triton_attention.takes(q, q)
    assert not triton_attention.takes(q, v)
    with pytest.raises(InputError, match="linear_attention"):
        triton_attention.forward(q, q, v, torch.zeros(1, 1, 8, 65), offsets, True)
    with pytest.raises(InputError, match="log_sum_exp"):
        triton_softmax.forward(torch.zeros(2, 129), torch.zeros(5, 129))
    with pytest.raises(InputError, match="ragged_conv1d"):
        triton_conv.forward(torch.zeros(3, 4).double(), torch.zeros(6, 4, 2), torch.zeros(6), offsets)
    u = torch.zeros(3, 129)
    assert triton_selective_gru.takes(u.bfloat16())
    assert not triton_selective_gru.takes(u)
    with pytest.raises(InputError, match="selective_gru take"):
        triton_selective_gru.forward(u, *selective_gru_weights(129), u[:1], offsets, None, 0.0, True)


def selective_gru_weights(width):
    from glintru_rec.ops.selective_gru import SelectiveGate, SelectiveGRUWeights

    row, three, convolution = torch.zeros(width), torch.ones(3 * width, width), torch.ones(width, width, 3)
    half = width // 2
    return (
        SelectiveGRUWeights(convolution, row, three, three, torch.ones(width, width), row, convolution, row),
        SelectiveGate(torch.ones(half, width), torch.zeros(half), torch.ones(width, half), row),
    )


def test_empty_batches_start_no_kernel():
    """No GPU is needed for nothing: gradients of weights are zero, states come back."""
    from glintru_rec.ops import triton_attention, triton_conv, triton_gru, triton_scan, triton_selective_gru, triton_softmax

    none = torch.zeros(1, dtype=torch.int64)
    weight = torch.randn(12, 4)
    hidden, last, saved = triton_gru.forward(torch.zeros(0, 12), weight, torch.zeros(0, 4), none, True)
    assert (hidden.shape, last.shape, saved.shape) == ((0, 4), (0, 4), (0, 16))
    gradients = triton_gru.backward(hidden, last, weight, last, none, hidden, saved)
    assert [tuple(g.shape) for g in gradients] == [(0, 12), (12, 4), (0, 4)]
    assert not gradients[1].any()
    states, last = triton_scan.forward(torch.zeros(0, 2, 4), torch.ones(2, 4), torch.zeros(0, 2, 4), none)
    assert not triton_scan.backward(states, last, torch.ones(2, 4), last, none, states)[1].any()
    q, state = torch.zeros(0, 2, 4), torch.zeros(0, 2, 4, 4)
    assert [tuple(y.shape) for y in triton_attention.forward(q, q, q, state, none, True)] == [(0, 2, 4), (0, 2, 4, 4)]
    x, kernel = torch.zeros(0, 4), torch.randn(6, 4, 3)
    assert triton_conv.forward(x, kernel, torch.zeros(6), none).shape == (0, 6)
    grad_x, grad_kernel, grad_bias = triton_conv.backward(torch.zeros(0, 6), x, kernel, none)
    assert grad_x.shape == (0, 4)
    assert not grad_kernel.any()
    assert not grad_bias.any()
    assert triton_softmax.forward(torch.zeros(0, 4), torch.zeros(0, 4)).shape == (0,)
    u, inputs = torch.zeros(0, 4), (*selective_gru_weights(4), torch.zeros(0, 4), none, None, 0.0)
    out, last, *saved = triton_selective_gru.forward(u, *inputs, True)
    assert (out.shape, last.shape) == ((0, 4), (0, 4))
    grad_u, grad_weights, grad_gate, grad_initial = triton_selective_gru.backward(out, last, u, *inputs, *saved)
    assert (grad_u.shape, grad_initial.shape) == ((0, 4), (0, 4))
    for found, weights in zip((grad_weights, grad_gate), inputs):
        assert [x.shape for x in found] == [x.shape for x in weights]
        assert not any(x.any() for x in found)


DISPATCHED = """
import torch
from glintru_rec.losses import full_softmax, sampled_softmax
from glintru_rec.ops import triton_attention, triton_conv, triton_gru, triton_scan, triton_selective_gru, triton_softmax
from glintru_rec.ops.conv import ragged_conv1d
from glintru_rec.ops.diagonal_scan import diagonal_scan
from glintru_rec.ops.gru import ragged_gru
from glintru_rec.ops.linear_attention import continue_attention, linear_attention
from glintru_rec.ops.normalized_attention import normalized_attention
from glintru_rec.ops.selective_gru import SelectiveGate, SelectiveGRUWeights, selective_gru

triton_scan.STEPS = triton_scan.FEATURES = 8
launched = []
for kernels in (triton_attention, triton_conv, triton_gru, triton_scan, triton_selective_gru, triton_softmax):
    for name in ("forward", "backward"):
        def counted(*arguments, function=getattr(kernels, name), name=name):
            launched.append(name)
            return function(*arguments)
        setattr(kernels, name, counted)

offsets, draw = torch.tensor([0, 3, 3, 40]), torch.randn
ops = [
    (lambda *x, **how: ragged_gru(*x[:2], offsets, x[2], **how), draw(40, 24), draw(24, 8) / 3, draw(3, 8)),
    (lambda *x, **how: diagonal_scan(*x[:2], offsets, x[2], **how), draw(40, 2, 5), draw(2, 5) / 3, draw(3, 2, 5)),
    (lambda *x, **how: continue_attention(*x[:3], offsets, x[3], **how), *draw(3, 40, 2, 4), draw(3, 2, 4, 4)),
]
for channels in (8, 1):
    ops.append((lambda *x, **how: ragged_conv1d(*x, offsets, True, **how), draw(40, 8), draw(8, channels, 3), draw(8)))
layers = draw(8, 8, 3) / 5, draw(8), draw(24, 8) / 3, draw(24, 8) / 3, draw(8, 8) / 3, draw(8), draw(8, 8, 3) / 5, draw(8)
gate = draw(4, 8) / 3, draw(4), draw(8, 4) / 2, draw(8)
ops.append((
    lambda u, h, *x, **how: selective_gru(u, SelectiveGRUWeights(*x[:8]), SelectiveGate(*x[8:]), offsets, h, **how),
    *(draw(40, 8), draw(3, 8), *layers, *gate),
))
ids = torch.tensor([0, 1, 2, 3, 4, 5, 6]), torch.tensor([2, 2, 9, *range(10, 60)])


def sampled(query, positive, items, **how):
    return sampled_softmax(query, positive, items[:53], *ids, torch.arange(53.0) / 50, 0.5, **how)


ops.append((sampled, draw(7, 8), draw(7, 8), draw(70, 8)))
ops.append((lambda *x, **how: full_softmax(*x, 0.5, **how), draw(7, 8), draw(7, 8), draw(70, 8)))
for causal in (True, False):
    ops.append((lambda *x, causal=causal, **how: linear_attention(*x, offsets, causal, **how), *draw(3, 40, 2, 4)))
    inputs = [*draw(2, 40, 2, 4).abs(), *draw(3, 40, 2, 4)]
    ops.append((lambda *x, causal=causal, **how: normalized_attention(*x, offsets, causal, 1e-6, **how), *inputs))
for op, *inputs in ops:
    found = {}
    for implementation in ("auto", "torch", "triton"):
        launched.clear()
        leaves = [x.clone().requires_grad_() for x in inputs]
        results = op(*leaves, implementation=implementation)
        results = results if isinstance(results, tuple) else (results,)
        gradients = torch.autograd.grad(sum((y * (y.detach() + 1)).sum() for y in results), leaves)
        assert set(launched) == ({"forward", "backward"} if implementation == "triton" else set()), (implementation, launched)
        found[implementation] = [*results, *gradients]
    for x, y in zip(found["torch"], found["triton"]):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-4 * float(x.abs().max()))

# bf16 factors: as the exact loss of rounded vectors, but for the aim's score, which is no product of the kernels.
query, aim, items = (draw(n, 8, requires_grad=True) for n in (7, 7, 70))
rounded = full_softmax(query.bfloat16().float(), aim, items.bfloat16().float(), implementation="torch")
rounded = rounded + ((query.bfloat16().float() - query) * aim).sum(1)
found = full_softmax(query, aim, items, precision="bf16", implementation="triton")
torch.testing.assert_close(found, rounded, rtol=1e-5, atol=1e-5)
assert not torch.equal(found, full_softmax(query, aim, items, implementation="triton"))
for x, y in zip(*(torch.autograd.grad(loss.sum(), [query, aim, items]) for loss in (found, rounded))):
    assert x.dtype == torch.float32
    torch.testing.assert_close(x, y, rtol=2**-7, atol=2**-7 * float(y.abs().max()))
"""


COMPILED = """
import functools
import torch
from torch._dynamo.utils import counters
from glintru_rec import GlintRU
from glintru_rec.encoders import glint_ru_block
from glintru_rec.ops.selective_gru import selective_gru

torch.manual_seed(0)
expert = GlintRU(8, num_heads=2, dropout=0.0).blocks[0].gru


def run(function, lengths):
    torch.manual_seed(sum(lengths))
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    x = torch.randn(int(offsets[-1]), 8, requires_grad=True)
    y = function(x, offsets)
    return y, *torch.autograd.grad(y.square().sum(), [x, *expert.parameters()])


composed = run(expert, [5, 0, 9])
glint_ru_block.selective_gru = functools.partial(selective_gru, implementation="triton")
torch.testing.assert_close(run(expert, [5, 0, 9]), composed, rtol=1e-4, atol=1e-5)

expert.gate_dropout.p = 0.3
compiled = torch.compile(expert, fullgraph=True, dynamic=True, backend="aot_eager")
for lengths in ([5, 0, 9], [7, 2, 20, 4]):
    torch.testing.assert_close(run(compiled, lengths), run(expert, lengths), rtol=1e-4, atol=1e-5)
assert counters["stats"]["unique_graphs"] <= 2 and not counters["graph_break"], counters

offsets = torch.tensor([0, 3, 3, 7])
checks = ("test_schema", "test_faketensor", "test_autograd_registration")
for dtype, kept in ((torch.float32, None), (torch.bfloat16, torch.rand(7, 8) > 0.3)):
    weights = [x.detach().to(dtype).requires_grad_() for x in (*expert._weights(), *expert._gate())]
    u, initial = torch.randn(7, 8, dtype=dtype, requires_grad=True), torch.randn(3, 8, dtype=dtype, requires_grad=True)
    arguments = (u, weights, initial, offsets, kept, 0.3, True)
    torch.library.opcheck(torch.ops.glintru_rec.selective_gru_forward.default, arguments, test_utils=checks)
"""


def test_operators_run_their_kernels():
    """Forward and backward, in the registered operators.

    ``triton`` runs kernels, ``auto`` and ``torch`` do not on a CPU. The kernels of the selective GRU also in the encoder's
    expert, compiled whole, and under the checks of torch.library.
    """
    env = {**environment(), "PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    env["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-c", DISPATCHED + COMPILED]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
