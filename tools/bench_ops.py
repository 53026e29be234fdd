"""Operators and encoders, forward and backward: times, shares of the machine's ceilings, memory, baselines.

python tools/bench_ops.py [--width 64 128] [--only gru encoders …] [--turns 9] [--figures benchmarks.csv]

First every operator and encoder that is measured is compared with its naive truth; where one is off, that is all that is
printed (exit status 1). Contestants of one table take turns in one process; times are p20/p50/p80 of the turns. Two batches:
128 histories of 200 items, and 1,024 with the lengths of Amazon Beauty. ``of matmul``: operations of the matrix products,
forward and backward, a second, as share of a large torch.mm's; ``of copy``: the fewest bytes to move, as share of a large
copy's; ``MiB``: by how much a pass raises a fresh process's memory, gradients of the inputs among it. ``products alone`` are
the matrix products of an encoder's weights, forward and backward, each in one piece and nothing between them: what the encoder
would get of matmul if all else cost nothing.
"""

import argparse
import multiprocessing
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from bench_common import copy_ceiling, highest_during, machine, matmul_ceiling, note, percentiles, take_turns
from published_formulation import PublishedGlintRU
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from glintru_rec import GlintRU, LRURec, RecGRELA, SASRec
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.losses import full_softmax, sampled_softmax
from glintru_rec.ops.conv import conv_reference, ragged_conv1d
from glintru_rec.ops.diagonal_scan import diagonal_scan, scan_reference
from glintru_rec.ops.gru import gru_reference, ragged_gru
from glintru_rec.ops.linear_attention import attention_reference, linear_attention
from glintru_rec.ops.normalized_attention import normalized_attention, normalized_attention_reference

BEAUTY_LENGTHS = (3, 3, 4, 4, 5, 5, 6, 7, 8, 10, 14, 30)  # about the quantiles of that log
ENCODERS = {"GLINT-RU": GlintRU, "RecGRELA": RecGRELA, "LRURec": LRURec, "SASRec": SASRec}
ODD = (3, 0, 17, 1, 30)
HEADS = 4
MIB = 1 << 20

# The server imports torch once; every measurement of memory is a process that it forks.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["torch", "glintru_rec"])


class Contestant(NamedTuple):
    """Something to run, forward and backward."""

    run: Callable[..., object]
    """Of the inputs, to a tensor; without inputs it is run as it is, and makes both passes itself."""
    inputs: list[Tensor]
    operations: float = 0.0
    """Of matrix products, forward and backward."""
    numbers: float = 0.0
    """That must be read or written."""


def batch_lengths(name: str) -> Tensor:
    """Make the lengths of a batch."""
    if name == "200":
        return torch.full((128,), 200)
    return torch.tensor(BEAUTY_LENGTHS).repeat(1024 // len(BEAUTY_LENGTHS) + 1)[:1024]


def draw(*shape: int) -> Tensor:
    """Draw normal numbers."""
    return torch.randn(*shape)


def gru(lengths: Tensor, width: int) -> dict[str, Contestant]:
    """Our scan against nn.GRU, input products included in both."""
    offsets, items = offsets_from_lengths(lengths), int(lengths.sum())
    theirs = nn.GRU(width, width, bias=False)
    x, weights = draw(items, width), [theirs.weight_ih_l0, theirs.weight_hh_l0]
    rows = torch.arange(items).split(lengths.tolist())
    packing = nn.utils.rnn.pack_sequence(list(rows), enforce_sorted=False)

    def ours(x: Tensor, weight_in: Tensor, weight: Tensor) -> Tensor:
        return ragged_gru(x @ weight_in.t(), weight, offsets)[0]

    def packed(x: Tensor, *_: Tensor) -> Tensor:
        return theirs(packing._replace(data=x))[0].data

    def padded(x: Tensor, *_: Tensor) -> Tensor:
        return theirs(x)[0]

    work = {"operations": 36 * items * width**2, "numbers": 12 * items * width}
    return {
        "ragged_gru": Contestant(ours, [x, *weights], **work),
        "nn.GRU, packed before": Contestant(packed, [x[packing.data], *weights], **work),
        "nn.GRU, padded before": Contestant(padded, [nn.utils.rnn.pad_sequence([x[row] for row in rows]), *weights], **work),
    }


def attention(lengths: Tensor, width: int) -> dict[str, Contestant]:
    """Linear attention and its normalised form."""
    offsets, items = offsets_from_lengths(lengths), int(lengths.sum())
    q, k, v = draw(3, items, HEADS, width // HEADS)
    work = {"operations": 12 * items * width * width // HEADS, "numbers": 8 * items * width}
    return {
        "linear_attention": Contestant(lambda *x: linear_attention(*x, offsets, True), [q, k, v], **work),
        "normalized_attention": Contestant(
            lambda q, k, v: normalized_attention(q.exp(), k.exp(), q, k, v, offsets, True, 1e-6), [q, k, v], **work
        ),
    }


def scan(lengths: Tensor, width: int) -> dict[str, Contestant]:
    """The complex diagonal recurrence, of twice the width as LRURec has it."""
    offsets, items = offsets_from_lengths(lengths), int(lengths.sum())
    inputs, decay = draw(items, 2, 2 * width), draw(2, 2 * width) / 3
    run = Contestant(lambda *x: diagonal_scan(*x, offsets)[0], [inputs, decay], numbers=5 * inputs.numel())
    return {"diagonal_scan": run}


def conv(lengths: Tensor, width: int) -> dict[str, Contestant]:
    """The dense convolution of GLINT-RU and the depthwise one of RecGRELA, against nn.Conv1d on a padded batch."""
    offsets, items = offsets_from_lengths(lengths), int(lengths.sum())
    x, dense, depthwise, bias = draw(items, width), draw(width, width, 3) / width, draw(width, 1, 4), draw(width)

    def padded(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return nn.functional.conv1d(nn.functional.pad(x, [2, 0]), weight, bias)

    def ours(*inputs: Tensor) -> Tensor:
        return ragged_conv1d(*inputs, offsets, True)

    batch = nn.utils.rnn.pad_sequence(list(x.split(lengths.tolist())), batch_first=True).transpose(1, 2).contiguous()
    work = {"operations": 18 * items * width**2, "numbers": 5 * items * width}
    return {
        "ragged_conv1d, dense k=3": Contestant(ours, [x, dense, bias], **work),
        "nn.Conv1d, padded before": Contestant(padded, [batch, dense, bias], **work),
        "ragged_conv1d, depthwise k=4": Contestant(ours, [x, depthwise, bias], numbers=work["numbers"]),
    }


def softmax(lengths: Tensor, width: int) -> dict[str, Contestant]:
    """The losses of 512 targets: against 1,024 negatives, and exact over 100,000 items."""
    targets, negatives, catalog = 512, draw(1024, width), draw(100_000, width)
    ids, query, aim = torch.arange(targets), draw(targets, width), draw(targets, width)

    def sampled(query: Tensor, aim: Tensor, negatives: Tensor) -> Tensor:
        return sampled_softmax(query, aim, negatives, ids, targets + torch.arange(1024), 0.0)

    return {
        "sampled_softmax, K=1,024": Contestant(sampled, [query, aim, negatives], operations=6 * targets * 1024 * width),
        "full_softmax, V=100,000": Contestant(
            lambda *x: full_softmax(*x), [query, aim, catalog], operations=6 * targets * 100_000 * width
        ),
    }


def encoders(lengths: Tensor, width: int) -> dict[str, Contestant]:
    """Every encoder, eager and compiled; GLINT-RU's baselines: itself on padded batches, and the published formulation."""
    offsets, items = offsets_from_lengths(lengths), int(lengths.sum())
    x, longest = draw(items, width), int(lengths.max())
    contestants = {}
    for name, kind in ENCODERS.items():
        encoder = kind(width)
        work = {"operations": 6 * items * matrix_numbers(encoder)}
        for form in ("eager", "compiled"):
            run = torch.compile(encoder, fullgraph=True, dynamic=True) if form == "compiled" else encoder
            contestants[f"{name}, {form}"] = Contestant(lambda x, run=run: run(x, offsets), [x], **work)
        contestants[f"{name}, products alone"] = Contestant(products(encoder, items), [], **work)
    glint_ru, published = GlintRU(width), PublishedGlintRU(1, width)
    places = offsets_from_lengths(torch.full_like(lengths, longest))
    padded = nn.utils.rnn.pad_sequence(list(x.split(lengths.tolist())), batch_first=True)
    work = {"operations": 6 * items * matrix_numbers(glint_ru)}
    contestants["GLINT-RU, padded batch"] = Contestant(lambda x: glint_ru(x, places), [padded.flatten(0, 1)], **work)
    contestants["published GLINT-RU, padded"] = Contestant(published.encode, [padded], **work)
    return contestants


def products(module: nn.Module, items: int) -> Callable[[], None]:
    """Make the call of all products with a module's weights, forward and backward, and of nothing else."""
    weights = [parameter.detach().flatten(1) for parameter in module.parameters() if parameter.dim() > 1]
    inputs = [(draw(items, weight.size(1)), weight, draw(items, weight.size(0))) for weight in weights]

    def call() -> None:
        for x, weight, gradient in inputs:
            torch.mm(x, weight.t())
            torch.mm(gradient, weight)
            torch.mm(gradient.t(), x)

    return call


def matrix_numbers(module: nn.Module) -> int:
    """Count the weights that each item is multiplied with."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)


TABLES = {"gru": gru, "attention": attention, "scan": scan, "conv": conv, "softmax": softmax, "encoders": encoders}


def parity(only: list[str]) -> list[str]:
    """Compare what is to be measured with its truth in float64, on an odd batch; name what is off, result or gradient."""
    torch.manual_seed(0)
    offsets, items, width = offsets_from_lengths(torch.tensor(ODD)), sum(ODD), 12
    x, gates, inputs = draw(items, width), draw(items, 3 * width), draw(items, 2, width)
    weight, decay = draw(3 * width, width) / 3, draw(2, width) / 3
    (q, k, v), initial = draw(3, items, 2, 6), torch.zeros(len(ODD), width, dtype=torch.float64)
    kernels = draw(width, width, 3) / 3, draw(width, 1, 4)
    bias, state = draw(width), torch.zeros(len(ODD), 2, width, dtype=torch.float64)
    catalog, ids = draw(70, width), torch.arange(items)

    def exact(query: Tensor, aim: Tensor, items: Tensor) -> Tensor:
        return (query @ items.t()).logsumexp(1) - (query * aim).sum(1)

    def sampled(query: Tensor, aim: Tensor, items: Tensor) -> Tensor:
        own = (query * aim).sum(1, keepdim=True)
        return torch.cat([own, query @ items.t()], 1).logsumexp(1) - own.squeeze(1)

    def normalized(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda q, k, v: run(q.exp(), k.exp(), q, k, v, offsets, True, 1e-6)

    checks: dict[str, list[tuple[Callable[..., Tensor], Callable[..., Tensor], list[Tensor]]]] = {
        "gru": [(lambda *x: ragged_gru(*x, offsets)[0], lambda *x: gru_reference(*x, offsets, initial)[0], [gates, weight])],
        "scan": [(lambda *x: diagonal_scan(*x, offsets)[0], lambda *x: scan_reference(*x, offsets, state)[0], [inputs, decay])],
        "attention": [
            (lambda *x: linear_attention(*x, offsets, True), lambda *x: attention_reference(*x, offsets, True), [q, k, v]),
            (normalized(normalized_attention), normalized(normalized_attention_reference), [q, k, v]),
        ],
        "conv": [
            (lambda *x: ragged_conv1d(*x, offsets, True), lambda *x: conv_reference(*x, offsets, True), [x, kernel, bias])
            for kernel in kernels
        ],
        "softmax": [
            (lambda *x: full_softmax(*x), exact, [x, x.flip(0), catalog]),
            (lambda *x: sampled_softmax(*x, ids, items + torch.arange(70), 0.0), sampled, [x, x.flip(0), catalog]),
        ],
        "encoders": [],
    }
    for kind in ENCODERS.values() if "encoders" in only else []:
        encoder, exactly = kind(width, dropout=0.0).eval(), kind(width, dropout=0.0).double().eval()
        exactly.load_state_dict(encoder.state_dict())

        def alone(x: Tensor, exactly: nn.Module = exactly) -> Tensor:  # one sequence after another: the ragged law
            return torch.cat([exactly(part, torch.tensor([0, len(part)])) for part in x.split(ODD)])

        checks["encoders"].append((lambda x, encoder=encoder: encoder(x, offsets), alone, [x]))
    wrong = []
    for name in only:
        for number, (run, truth, leaves) in enumerate(checks[name]):
            found, expected = results(run, leaves), results(truth, [leaf.double() for leaf in leaves])
            scale = [max(1.0, float(y.detach().abs().max())) for y in expected]
            distance = max(float((y - z).detach().abs().max()) / s for y, z, s in zip(found, expected, scale))
            if not distance < 1e-4:
                wrong.append(f"{name} {number}: {distance:.1e} from its truth")
    return wrong


def results(run: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Give a result, and the gradients of its inputs."""
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    y = run(*leaves)
    weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y.dtype)
    return [y, *torch.autograd.grad((y * weight).sum(), leaves)]


def step(contestant: Contestant) -> Callable[[], object]:
    """Make the call that is timed: forward and backward, with a gradient that is there before."""
    if not contestant.inputs:
        return contestant.run
    leaves = [leaf.detach().clone().requires_grad_() for leaf in contestant.inputs]
    gradient = torch.randn_like(contestant.run(*leaves))

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        contestant.run(*leaves).backward(gradient)

    return call


def memory(name: str, lengths_name: str, width: int, title: str) -> float:
    """Say by how many MiB a pass raises this process's memory at its highest, gradients of the inputs among them."""
    call = step(TABLES[name](batch_lengths(lengths_name), width)[title])
    return highest_during(call) / MIB


def measure(name: str, lengths_name: str, width: int, turns: int, ceilings: tuple[float, float]) -> list[dict[str, object]]:
    """Measure one table on one batch, print it; give its rows."""
    contestants = TABLES[name](batch_lengths(lengths_name), width)
    calls = {title: step(contestant) for title, contestant in contestants.items()}
    took = take_turns(calls, turns)
    first = percentiles(took[next(iter(took))])[1]
    items = int(batch_lengths(lengths_name).sum())
    with processes.Pool(1, maxtasksperchild=1) as pool:  # in fresh ones: what a process has freed it may keep
        mib = [None if "compiled" in t else pool.apply(memory, (name, lengths_name, width, t)) for t in contestants]
    table = Table(
        f"{name}, D={width}, {items:,} items", "p20", "p50", "p80, ms", "against the first", "of matmul", "of copy", "MiB"
    )
    rows: list[dict[str, object]] = []
    for (title, contestant), needed in zip(contestants.items(), mib):
        p20, p50, p80 = percentiles(took[title])
        matmul, copy = contestant.operations / p50 / ceilings[0], 4 * contestant.numbers / p50 / ceilings[1]
        shares = [f"{share:.1%}" if share else "" for share in (matmul, copy)]
        memory_there = "" if needed is None else f"{needed:.0f}"
        table.add_row(title, *(f"{1e3 * p:.2f}" for p in (p20, p50, p80)), f"{p50 / first:.2f}", *shares, memory_there)
        times = {"p20_ms": 1e3 * p20, "p50_ms": 1e3 * p50, "p80_ms": 1e3 * p80, "items_per_second": items / p50}
        name_there = f"{title}, D={width}, {lengths_name}"
        rows.append({"name": name_there, **times, "of_matmul": matmul, "of_copy": copy, "mib": needed})
    Console(width=128).print(table)
    return rows


def main() -> int:
    """Read the command line, check, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, nargs="+", default=[64, 128])
    parser.add_argument("--only", nargs="+", choices=list(TABLES), default=list(TABLES))
    parser.add_argument("--lengths", nargs="+", choices=["200", "beauty"], default=["200", "beauty"])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--figures", type=Path, help="csv file to add the figures to")
    arguments = parser.parse_args()
    if wrong := parity(arguments.only):
        print("nothing was measured, for results are wrong:", *wrong, sep="\n  ", file=sys.stderr)
        return 1
    ceilings = matmul_ceiling(), copy_ceiling()
    print(f"{machine()['cpu']}, {torch.get_num_threads()} threads, fp32; {arguments.turns} turns")
    print(f"ceilings: torch.mm {ceilings[0] / 1e9:,.0f} GFLOP/s, copy {ceilings[1] / 1e9:,.1f} GB/s")
    rows: list[dict[str, object]] = [{"name": "ceilings", "matmul_flops": ceilings[0], "copy_bytes": ceilings[1]}]
    for name in arguments.only:
        for lengths_name in ["200"] if name == "softmax" else arguments.lengths:
            for width in arguments.width:
                rows += measure(name, lengths_name, width, arguments.turns, ceilings)
    note("bench_ops", rows, arguments.figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
