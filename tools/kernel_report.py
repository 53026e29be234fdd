"""Compile every Triton kernel for an H100 or H200 without a GPU: registers, spills and shared memory, as ptxas counts them.

python tools/kernel_report.py [--quick]    # one size of every kernel

The kernels are launched as the operators launch them, on tensors in ordinary memory, with a driver that compiles and never
runs. Needs ``triton``, and TRITON_INTERPRET not set. One line a kernel: registers of a thread, bytes that a thread spills
(stored and loaded), bytes of shared memory of a program, threads of a program.

The exit status is 1 where a kernel spills more than `MOST_SPILLED` bytes or asks for more shared memory than there is.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from glintru_rec.ops import triton_attention, triton_conv, triton_gru, triton_scan, triton_selective_gru, triton_softmax
from glintru_rec.ops.selective_gru import SelectiveGate, SelectiveGRUWeights

TARGET = GPUTarget("cuda", 90, 32)
SHARED_MEMORY = 227 << 10  # of a program, on sm_90
MOST_SPILLED = 128


class Line(NamedTuple):
    """One compiled kernel."""

    kernel: str
    registers: int
    spilled: int
    shared: int
    threads: int


class CompileOnly:
    """As much of a Triton driver as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        """Name the machine that is compiled for."""
        return TARGET

    def get_current_device(self) -> int:
        """Name the only device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """Name its only stream."""
        return 0


def compiled(launch: Callable[[], object]) -> list[Line]:
    """Call ``launch`` and give a line for every kernel that it would have run."""
    lines: list[Line] = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        lines.append(report(self.fn.__module__.split(".")[-1].removeprefix("triton_") + self.fn.__name__, kernel))

    driver.set_active(CompileOnly())
    JITFunction.run = compile_only
    try:
        launch()
    finally:
        JITFunction.run = run
    return lines


def report(name: str, kernel) -> Line:
    """Ask ptxas what it made of a kernel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(kernel.asm["ptx"])
        ptxas = triton.knobs.nvidia.ptxas.path
        command = [ptxas, "-v", "--gpu-name=sm_90a", str(source), "-o", str(Path(folder, "kernel.cubin"))]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = int(re.search(r"Used (\d+) registers", said).group(1))
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    return Line(
        name, registers, int(spills.group(1)) + int(spills.group(2)), kernel.metadata.shared, 32 * kernel.metadata.num_warps
    )


def launches(dtype: torch.dtype, quick: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Launch every kernel forward and backward, at the widths that encoders have (``quick``: one); the data do not matter."""
    offsets = torch.tensor([0, 20, 40])
    items = int(offsets[-1])

    def empty(*shape: int) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    def gru(width):
        gates, weight, initial = empty(items, 3 * width), empty(3 * width, width), empty(2, width)
        hidden, saved = empty(items, width), empty(items, 4 * width)
        triton_gru.forward(gates, weight, initial, offsets, True)
        triton_gru.backward(hidden, initial, weight, initial, offsets, hidden, saved)

    def scan(width):
        x, decay, initial = empty(items, 2, width), empty(2, width), empty(2, 2, width)
        triton_scan.forward(x, decay, initial, offsets)
        triton_scan.backward(x, initial, decay, initial, offsets, x)

    def attention(heads, width, causal):
        q, initial = empty(items, heads, width), empty(2, heads, width, width)
        triton_attention.forward(q, q, q, initial, offsets, causal)
        triton_attention.backward(q, initial, q, q, q, initial, offsets, causal)

    def conv(width, taps, depthwise):
        x, bias = empty(items, width), empty(width)
        weight = empty(width, 1 if depthwise else width, taps)
        triton_conv.forward(x, weight, bias, offsets)
        triton_conv.backward(x, x, weight, offsets)

    def selective_gru(width):
        row, half, matrix, three = empty(width), empty(width // 2), empty(width, width), empty(3 * width, width)
        convolution, u, initial = empty(width, width, 3), empty(items, width), empty(2, width)
        weights = SelectiveGRUWeights(convolution, row, three, three, matrix, row, convolution, row)
        gate = SelectiveGate(empty(width // 2, width), half, empty(width, width // 2), row)
        inputs = (u, weights, gate, initial, offsets, torch.empty(items, width, dtype=torch.bool), 0.1)
        _, _, *saved = triton_selective_gru.forward(*inputs, True)
        triton_selective_gru.backward(u, initial, *inputs, *saved)

    def softmax(width, sampled):
        query, catalog, log_sum = empty(items, width), empty(1000, width), torch.empty(items)
        ids = (torch.empty(1000), torch.zeros(items, dtype=torch.int64), torch.zeros(1000, dtype=torch.int64))
        extra = ids if sampled else ()
        triton_softmax.forward(query, catalog, *extra)
        triton_softmax.backward(log_sum, query, catalog, log_sum, *extra)

    wide = dtype == torch.bfloat16
    for width in (128,) if quick else (32, 64, 128, 256) if wide else (32, 64, 128):
        yield f"D={width}", partial(gru, width)
        yield f"D={width}", partial(selective_gru, width)
    yield "S=128", partial(scan, 128)
    heads_and_widths = ((4, 32),) if quick else ((4, 16), (4, 32), (2, 64), (1, 128))[: 4 if wide else 3]
    for heads, width in heads_and_widths:
        for causal in (True,) if quick else (True, False):
            yield f"d={width} {'causal' if causal else 'bidirectional'}", partial(attention, heads, width, causal)
    for width in (64,) if quick else (64, 128):
        yield f"D={width}", partial(conv, width, 3, depthwise=False)
        yield f"D={width}", partial(conv, width, 4, depthwise=True)
    for width in (128,) if quick else (64, 128, 256) if wide else (64, 128):
        for sampled in (True,) if quick else (False, True):
            yield f"D={width} {'sampled' if sampled else 'exact'}", partial(softmax, width, sampled)


def main() -> int:
    """Compile everything, print, give the exit status."""
    failed, quick = 0, "--quick" in sys.argv[1:]
    print(f"{'kernel':34}{'size':20}{'dtype':10}{'registers':>10}{'spilled':>9}{'shared':>9}{'threads':>9}")
    for dtype in (torch.bfloat16, torch.float32):
        for size, launch in launches(dtype, quick):
            for line in dict.fromkeys(compiled(launch)):  # an op may run a kernel twice
                fits = line.spilled <= MOST_SPILLED and line.shared <= SHARED_MEMORY
                failed += not fits
                figures = f"{line.registers:10}{line.spilled:9}{line.shared:9}{line.threads:9}"
                name = str(dtype).removeprefix("torch.")
                print(f"{line.kernel:34}{size:20}{name:10}{figures}{'' if fits else '  TOO MUCH'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
