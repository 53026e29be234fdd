"""One visit to a GPU machine: is everything right there, and how fast is it? At most 9 minutes.

python tools/gpu_check.py [--data DATASET] [--output FILE] [--minutes 9]

DATASET is a prepared ml-1m; without it a log of its shape is drawn. The parts run one after the other, each in a process of its
own with a time limit, so that one that fails, hangs or spoils its GPU is reported and the others go on; correctness comes
first, and speeds stand beside the two ceilings of the same machine, copy bandwidth and bf16 matmul. What is printed goes to
FILE too.

The exit status is 0 if every part did its work, 1 if one failed or had no time left, 2 where there is no GPU to check.
"""

import argparse
import subprocess
import sys
import time
from pathlib import Path

import torch
from gpu_check_parts import PARTS

NO_GPU = 2


def run_part(name: str, data: str, seconds: float) -> tuple[str, str]:
    """Run one part in a process of its own; give a verdict of one line, and what it printed."""
    command = [sys.executable, str(Path(__file__).with_name("gpu_check_parts.py")), name, *([data] if data else [])]
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds)
    except subprocess.TimeoutExpired as expired:
        # What comes with the exception is bytes, whatever was asked for.
        printed = expired.stdout.decode(errors="replace") if isinstance(expired.stdout, bytes) else expired.stdout or ""
        return f"failed: not done after {seconds:.0f} s", printed
    if result.returncode:
        return f"failed: exit status {result.returncode}", result.stdout
    return "ok", result.stdout


def check(data: str, minutes: float) -> tuple[list[tuple[str, str, float]], list[str]]:
    """Run all parts within the time; give verdicts (part, verdict, seconds) and everything that was printed."""
    start, verdicts, printed = time.monotonic(), [], []
    for name, part in PARTS.items():
        left = 60 * minutes - (time.monotonic() - start)
        begun = time.monotonic()
        if left < part.at_least:
            verdict, text = f"failed: {left:.0f} s left, it needs {part.at_least}", ""
        else:
            verdict, text = run_part(name, data, min(left, part.at_most))
        seconds = time.monotonic() - begun
        block = f"## {name}: {verdict} ({seconds:.0f} s)\n\n{text}"
        print(block, flush=True)
        verdicts.append((name, verdict, seconds))
        printed.append(block)
    return verdicts, printed


def main() -> int:
    """Read the command line, check, print a table, give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="", help="a prepared dataset")
    parser.add_argument("--output", type=Path, help="a file for all that is printed")
    parser.add_argument("--minutes", type=float, default=9.0)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print(f"no GPU here (torch {torch.__version__}): nothing was checked; exit status {NO_GPU}", file=sys.stderr)
        return NO_GPU
    verdicts, printed = check(arguments.data, arguments.minutes)
    table = "\n".join(f"{name:12}{seconds:6.0f} s  {verdict}" for name, verdict, seconds in verdicts)
    print(table)
    if arguments.output is not None:
        arguments.output.write_text("\n".join([*printed, table, ""]))
    return int(any(verdict != "ok" for _, verdict, _ in verdicts))


if __name__ == "__main__":
    sys.exit(main())
