"""The parts of tools/gpu_check.py, each run as ``python tools/gpu_check_parts.py PART [DATASET]`` on a GPU."""

import itertools
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from glintru_rec import GlintRU, LRURec, RecGRELA
from glintru_rec.jagged import offsets_from_lengths

GIB = 1 << 30
BEAUTY_LENGTHS = (3, 3, 4, 4, 5, 5, 6, 7, 8, 10, 14, 30)  # about the quantiles of that log
CATALOGS = {
    "catalog": (100_000_000, 64, "fp32"),
    "billion": (1_000_000_000, 32, "fp16"),
    "wide": (1_000_000_000, 64, "fp16"),  # 123 GiB with its optimizer
}


class Part(NamedTuple):
    """What is checked, and the seconds that it may take."""

    run: Callable[[str], None]
    """Takes the path of a dataset, or an empty string."""
    at_least: int
    at_most: int


def milliseconds(call: Callable[[], object], repeats: int = 20) -> float:
    """Time a call on the GPU: the median of some, after three that warm up."""
    for _ in range(3):
        call()
    times = []
    for _ in range(repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def copy_ceiling() -> float:
    """Measure bytes per second, read and written, of a copy far larger than the caches."""
    source = torch.empty(2 * GIB, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / (milliseconds(lambda: target.copy_(source)) / 1e3)


def matmul_ceiling(dtype: torch.dtype, size: int = 8192) -> float:
    """Measure operations per second of a large square matmul of random numbers."""
    a, b = torch.randn(2, size, size, device="cuda", dtype=dtype)
    return 2 * size**3 / (milliseconds(lambda: a @ b) / 1e3)


def machine(_: str) -> None:
    """Name the machine and measure its two ceilings."""
    import triton

    device = torch.cuda.get_device_properties(0)
    print(f"{device.name}, {device.total_memory / GIB:.0f} GiB, sm_{device.major}{device.minor}")
    print(f"Python {platform.python_version()}, torch {torch.__version__}, triton {triton.__version__}")
    print(f"copy        {copy_ceiling() / 1e12:8.2f} TB/s")
    for dtype in (torch.bfloat16, torch.float32):
        print(f"matmul {str(dtype).removeprefix('torch.'):9}{matmul_ceiling(dtype) / 1e12:8.1f} TFLOP/s")


def sharded(_: str) -> None:
    """Import TorchRec and take one step with a sharded table; its loss must be finite and its rows must change."""
    import fbgemm_gpu
    import torchrec

    print(f"torchrec {torchrec.__version__}, fbgemm_gpu {fbgemm_gpu.__version__}")
    with training(random_sequences(200, 1000, 20), 1000, ["table=row_wise"]) as run:
        from glintru_rec.tables.sharding import local_rows

        before = local_rows(run.trainer.model)[0].clone()
        run.steps(1)
        changed = int((local_rows(run.trainer.model)[0] != before).any(1).sum())
        loss = run.loss()
        print(f"one step on {run.trainer.device}: loss {loss:.4f} (log V is {np.log(1000):.4f}), {changed} rows changed")
        if not (np.isfinite(loss) and changed > 0):
            raise SystemExit("the step did not train")


def parity(_: str) -> None:
    """Compare every kernel with float64."""
    import kernel_parity

    if status := kernel_parity.main():
        raise SystemExit(status)


def gru(_: str) -> None:
    """Time the GRU, input product included, against cuDNN on a PackedSequence: forward and backward, bf16."""
    from glintru_rec.ops import triton_gru

    peak = matmul_ceiling(torch.bfloat16)
    print(f"{'GRU, bf16':40}{'ours, ms':>10}{'cuDNN, ms':>11}{'ratio':>7}{'of matmul ceiling':>19}")
    beauty = torch.tensor(BEAUTY_LENGTHS).repeat(128 // len(BEAUTY_LENGTHS) + 1)
    batches = {"128 x 200": torch.full((128,), 200), "128, beauty": beauty[:128], "2048 x 200": torch.full((2048,), 200)}
    for width in (64, 128, 256):
        for name, lengths in batches.items():
            offsets, items = offsets_from_lengths(lengths).cuda(), int(lengths.sum())
            x, grad = torch.randn(2, items, width, device="cuda", dtype=torch.bfloat16)
            torch_gru = nn.GRU(width, width, bias=False).cuda().bfloat16()
            w_in, w = torch_gru.weight_ih_l0.detach(), torch_gru.weight_hh_l0.detach()
            initial = x.new_zeros(lengths.numel(), width)

            def ours(x=x, grad=grad, w_in=w_in, w=w, initial=initial, offsets=offsets):
                hidden, _, saved = triton_gru.forward(x @ w_in.t(), w, initial, offsets, True)
                grad_gates, _, _ = triton_gru.backward(grad, initial, w, initial, offsets, hidden, saved)
                return hidden, grad_gates @ w_in, grad_gates.t() @ x

            packed = nn.utils.rnn.pack_sequence(list(x.split(lengths.tolist())), enforce_sorted=False)
            leaf = packed.data.detach().requires_grad_()

            def cudnn(packed=packed, leaf=leaf, grad=grad, torch_gru=torch_gru):
                hidden = torch_gru(packed._replace(data=leaf))[0].data
                return hidden, *torch.autograd.grad(hidden, [leaf, *torch_gru.parameters()], grad)

            packed_rows = nn.utils.rnn.pack_sequence(
                list(torch.arange(items, device="cuda").split(lengths.tolist())), enforce_sorted=False
            ).data
            distance = (ours()[0][packed_rows].float() - cudnn()[0].float()).abs().max().item()
            if not distance < 0.05:  # states are at most 1; both are bf16, whose step there is 0.004
                raise SystemExit(f"D={width} {name}: {distance} away from cuDNN")
            mine, theirs = milliseconds(ours), milliseconds(cudnn)
            share = 36 * items * width**2 / (mine / 1e3) / peak
            print(f"{f'D={width}, {name}':40}{mine:10.3f}{theirs:11.3f}{theirs / mine:7.2f}{share:19.1%}")


def ops(_: str) -> None:
    """Time the other kernels forward and backward, bf16, and set the bytes that they must move beside the copy ceiling."""
    from glintru_rec.ops import triton_attention, triton_conv, triton_normalized, triton_scan, triton_softmax
    from glintru_rec.ops.selective_gru import composed, selective_gru

    bandwidth, peak = copy_ceiling(), matmul_ceiling(torch.bfloat16)
    offsets = offsets_from_lengths(torch.full((512,), 200)).cuda()
    items, sequences = int(offsets[-1]), offsets.numel() - 1

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

    print(f"{'op, 512 x 200 items, bf16':40}{'ms':>9}{'TB/s':>7}{'of copy':>9}")

    def show(name: str, call: Callable[[], object], numbers: int) -> None:
        took = milliseconds(call) / 1e3
        rate = 2 * numbers / took
        print(f"{name:40}{1e3 * took:9.3f}{rate / 1e12:7.2f}{rate / bandwidth:9.1%}", flush=True)

    for heads, d in ((4, 16), (4, 32), (4, 64)):
        q, k, v, da = (draw(items, heads, d) for _ in range(4))
        positive_q, positive_k = q.abs() + 0.1, k.abs() + 0.1
        state, sums = draw(sequences, heads, d, d), draw(sequences, heads, d).abs()

        def attention(q=q, k=k, v=v, da=da, state=state):
            triton_attention.forward(q, k, v, state, offsets, True)
            triton_attention.backward(da, state, q, k, v, state, offsets, True)

        def normalized(q=q, k=k, v=v, da=da, state=state, sums=sums, positive_q=positive_q, positive_k=positive_k):
            inputs = (positive_q, positive_k, q, k, v, state, sums)
            out, _, _, weights = triton_normalized.forward(*inputs, offsets, True, 1e-6)
            triton_normalized.backward(da, state, sums, *inputs, offsets, out, weights, True)

        show(f"linear attention, H={heads} d={d}", attention, 11 * items * heads * d)
        show(f"normalised attention, H={heads} d={d}", normalized, 18 * items * heads * d)
    for width in (128, 256):
        x, decay, initial = draw(items, 2, width), draw(2, width) / 3, draw(sequences, 2, width)

        def scan(x=x, decay=decay, initial=initial):
            states, _ = triton_scan.forward(x, decay, initial, offsets)
            triton_scan.backward(x, initial, decay, initial, offsets, states)

        show(f"complex recurrence, S={width}", scan, 5 * 2 * items * width)
        x, bias = draw(items, width), draw(width)
        for name, weight in (("dense", draw(width, width, 3) / 16), ("depthwise", draw(width, 1, 4))):

            def conv(x=x, weight=weight, bias=bias):
                triton_conv.forward(x, weight, bias, offsets)
                triton_conv.backward(x, x, weight, offsets)

            show(f"{name} convolution, D={width}", conv, 5 * items * width)
    for width in (128, 256):
        expert = GlintRU(width).blocks[0].gru.cuda().bfloat16()
        weights, gate, u = expert._weights(), expert._gate(), draw(items, width).requires_grad_()
        leaves, grad = [u, *weights, *gate], draw(items, width)
        # Dropout as in training; what the fused form reads and writes stands for both.
        forms = {
            "fused": lambda: selective_gru(u, weights, gate, offsets, rate=0.2, implementation="triton"),  # noqa: B023
            "composed": lambda: composed(u, weights, gate, offsets, None, True, 0.2),  # noqa: B023
        }
        for form, run in forms.items():

            def selective(run=run, leaves=leaves, grad=grad):
                torch.autograd.grad(run()[0], leaves, grad)

            show(f"dense selective GRU, D={width}, {form}", selective, 68 * items * width)
    query, catalog = draw(16384, 128) / 4, draw(100_000, 128) / 4
    grad = torch.full((16384,), 1 / 16384, device="cuda")

    def softmax():
        triton_softmax.backward(grad, query, catalog, triton_softmax.forward(query, catalog))

    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    took = milliseconds(softmax, 5) / 1e3
    extra = (torch.cuda.max_memory_allocated() - before) / GIB
    share = 10 * 16384 * 100_000 * 128 / took / peak
    figures = f"{1e3 * took:.2f} ms, {share:.1%} of the matmul ceiling, {extra:.2f} GiB more"
    print(f"exact softmax, T=16384 V=100,000 D=128: {figures}")


def encoders(_: str) -> None:
    """Time the encoders forward and backward in bf16 as share of the matmul ceiling; eager and compiled."""
    peak, offsets = matmul_ceiling(torch.bfloat16), offsets_from_lengths(torch.full((512,), 200)).cuda()
    print(f"{'encoder, 512 x 200 items, bf16':40}{'ms':>9}{'of matmul ceiling':>19}")
    failed = 0
    for kind, width in ((GlintRU, 256), (GlintRU, 128), (RecGRELA, 128), (LRURec, 128)):
        encoder = kind(width).cuda().bfloat16()
        x = torch.randn(int(offsets[-1]), width, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        operations = 6 * x.size(0) * sum(p.numel() for p in encoder.parameters() if p.dim() > 1)
        for form in ("eager", "compiled"):
            try:
                run = torch.compile(encoder, fullgraph=True, dynamic=True) if form == "compiled" else encoder
                took = milliseconds(lambda: run(x, offsets).sum().backward(), 5) / 1e3  # noqa: B023
                print(f"{f'{kind.__name__} D={width}, {form}':40}{1e3 * took:9.2f}{operations / took / peak:19.1%}", flush=True)
            except Exception as error:  # an encoder that fails must not hide the others
                failed += 1
                print(f"{f'{kind.__name__} D={width}, {form}':40}failed: {str(error).strip().splitlines()[0]}", flush=True)
    if failed:
        raise SystemExit(f"{failed} failed")


def ml1m(data: str) -> None:
    """Train on MovieLens-1M, or on a log of its shape: targets per second."""
    from glintru_rec.data.dataset import SequenceDataset

    if data:
        dataset = SequenceDataset.open(data)
        sequences, num_items = (dataset.items, dataset.offsets), dataset.num_items
        print(f"{data}: {dataset.num_users:,} users, {num_items:,} items, {sequences[0].size:,} events")
    else:
        sequences, num_items = random_sequences(6040, 3416, 165), 3416
        print(f"a random log of MovieLens-1M's shape: {sequences[0].size:,} events")
    eager = [(model, False, "fp32") for model in ("glint_ru", "rec_grela", "lru_rec")]
    compiled = [(model, True, precision) for precision in ("fp32", "bf16") for model in ("glint_ru", "rec_grela")]
    for model, is_compiled, precision in (*eager, *compiled):
        overrides = [f"model={model}", "trainer.batch_targets=16384", f"trainer.precision={precision}"]
        with training(sequences, num_items, [*overrides, f"trainer.compile={str(is_compiled).lower()}"]) as run:
            run.show(f"{model}, {precision}{', compiled' if is_compiled else ''}")


def catalog(name: str) -> None:
    """Train with a table of very many items: targets per second and memory."""
    num_items, width, dtype = CATALOGS[name]
    sequences = random_sequences(50_000, num_items, 40)
    overrides = ["table=row_wise", f"table.dtype={dtype}", f"model.embedding_dim={width}", "trainer.batch_targets=16384"]
    with training(sequences, num_items, overrides) as run:
        run.show(f"{num_items:,} items of {width} {dtype} numbers")


def random_sequences(num_users: int, num_items: int, mean_length: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw items and offsets: lengths as uneven as those of logs, items uniform."""
    rng = np.random.default_rng(0)
    lengths = np.clip(rng.lognormal(np.log(mean_length) - 0.5, 1.0, num_users), 3, 20 * mean_length).astype(np.int64)
    return rng.integers(num_items, size=lengths.sum()), np.concatenate([[0], lengths.cumsum()])


class training:
    """A `Trainer` over sequences in memory, for some steps.

    Args:
        sequences: items and offsets.
        num_items: size of the catalog.
        overrides: of the training config.
        device: ``cuda``, or ``cpu``.
    """

    def __init__(self, sequences: tuple[np.ndarray, np.ndarray], num_items: int, overrides: list[str], device: str = "cuda"):
        self.sequences, self.num_items, self.device = sequences, num_items, device
        self.overrides = ["data.path=.", "output=" + tempfile.mkdtemp(), *overrides]

    def __enter__(self) -> "training":
        import pyarrow as pa

        from glintru_rec.config import compose
        from glintru_rec.data.dataset import SequenceDataset
        from glintru_rec.data.vocabulary import Vocabulary
        from glintru_rec.training.config import TrainConfig
        from glintru_rec.training.processes import process_group
        from glintru_rec.training.trainer import Trainer

        # Items are their own indices: there is no vocabulary to hold.
        nothing = Vocabulary(pa.array([], pa.int64()), np.zeros(0, np.int64))
        in_memory: Any = type("InMemory", (SequenceDataset,), {"num_items": self.num_items})
        self.group = process_group(self.device)
        device = self.group.__enter__()
        dataset = in_memory({"vocabulary_sha256": ""}, nothing, None, *self.sequences)
        self.trainer = Trainer(compose("train", TrainConfig, self.overrides), dataset, device)
        self.trainer.begin_epoch()
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=device)
        self.batches = itertools.chain.from_iterable(self.trainer.batches.epoch(epoch) for epoch in itertools.count())
        return self

    def __exit__(self, *error: object) -> None:
        self.group.__exit__(None, None, None)

    def steps(self, count: int) -> None:
        """Take steps."""
        from glintru_rec.data.batches import Batch

        for batch in (next(self.batches) for _ in range(count)):
            on_device = Batch(batch.item_ids.to(self.trainer.device), batch.offsets.to(self.trainer.device))
            self.loss_sum += self.trainer.train_step(on_device)
            self.trainer.state.step += 1

    def loss(self) -> float:
        """Give the mean loss of the steps so far."""
        total, count = self.loss_sum.tolist()
        return total / count

    def show(self, name: str) -> None:
        """Train and print: targets per second, milliseconds per step, loss, peak memory."""
        self.steps(5)
        torch.cuda.synchronize()
        before, start = self.loss_sum[1].item(), time.perf_counter()
        self.steps(30)
        torch.cuda.synchronize()
        seconds = time.perf_counter() - start
        rate = (self.loss_sum[1].item() - before) / seconds
        figures = f"{rate:12,.0f} targets/s {1e3 * seconds / 30:8.1f} ms a step"
        print(f"{figures}  loss {self.loss():.4f}  peak {torch.cuda.max_memory_allocated() / GIB:.1f} GiB  {name}", flush=True)
        if not np.isfinite(self.loss()):
            raise SystemExit("the loss is not finite")


PARTS = {
    "machine": Part(machine, 15, 60),
    "sharded": Part(sharded, 20, 60),
    "parity": Part(parity, 60, 180),
    "gru": Part(gru, 20, 60),
    "ops": Part(ops, 30, 90),
    "ml1m": Part(ml1m, 30, 240),
    "catalog": Part(lambda _: catalog("catalog"), 20, 60),
    "billion": Part(lambda _: catalog("billion"), 25, 60),
    "wide": Part(lambda _: catalog("wide"), 30, 90),
    "encoders": Part(encoders, 30, 240),
}


if __name__ == "__main__":
    PARTS[sys.argv[1]].run(sys.argv[2] if len(sys.argv) > 2 else "")
