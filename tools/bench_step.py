"""One new event: a step from the state, against encoding the whole history again.

python tools/bench_step.py [--width 64] [--users 1] [--repeats 20]

Every encoder with a recurrent form, in one process; medians of alternating runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from glintru_rec import GlintRU, LRURec, RecGRELA
from glintru_rec.jagged import offsets_from_lengths

HISTORIES = (200, 2_000, 20_000)


def milliseconds(call: Callable[[], object]) -> float:
    """Time one call."""
    start = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - start)


@torch.inference_mode()
def main() -> None:
    """Read the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--users", type=int, default=1, help="users who act at once")
    parser.add_argument("--repeats", type=int, default=20)
    arguments = parser.parse_args()
    width, users = arguments.width, arguments.users
    print(f"width {width}, {users} user(s), {torch.get_num_threads()} threads; median of {arguments.repeats}")
    print(f"{'encoder':22}{'state, floats':>14}{'history':>10}{'again, ms':>12}{'step, ms':>10}{'ratio':>9}")
    encoders = {"GlintRU": GlintRU(width), "GlintRU light": GlintRU(width, gated_mlp=False)}
    encoders |= {"RecGRELA": RecGRELA(width), "LRURec": LRURec(width)}
    for name, encoder in encoders.items():
        encoder.eval()
        event = torch.randn(users, width)
        for length in HISTORIES:
            x, offsets = torch.randn(users * length, width), offsets_from_lengths(torch.full((users,), length))
            _, state = encoder.prefill(x, offsets)
            again, step = [], []
            for repeat in range(arguments.repeats + 2):
                pair = milliseconds(lambda: encoder(x, offsets)), milliseconds(lambda: encoder.step(event, state))  # noqa: B023
                if repeat >= 2:  # the first warm up
                    again.append(pair[0])
                    step.append(pair[1])
            size = sum(tensor[0].numel() for tensor in state)
            slow, fast = statistics.median(again), statistics.median(step)
            print(f"{name:22}{size:14,}{length:10,}{slow:12.2f}{fast:10.3f}{slow / fast:8.0f}x")


if __name__ == "__main__":
    main()
