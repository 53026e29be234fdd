"""Progress of long work as plain lines that read well on a terminal and in a job's log."""

import sys
import time


class Progress:
    """Print ``label 1200/5000 steps  24 %  ETA 0:42  …`` at most every few seconds.

    Args:
        label: what is going on.
        total: when it is done.
        unit: what is counted.
        interval: seconds between lines.
        enabled: False prints nothing (ranks other than the first).
    """

    def __init__(self, label: str, total: int, unit: str, interval: float = 5.0, enabled: bool = True):
        self.label, self.total, self.unit, self.interval, self.enabled = label, total, unit, interval, enabled
        self.start = self.printed = time.monotonic()
        self.first: int | None = None

    def update(self, done: int, note: str = "") -> None:
        """Say that ``done`` of ``total`` are done; prints when a line is due."""
        now = time.monotonic()
        if self.first is None:  # a resumed run does not count what was done before
            self.first, self.start = done, now
        if not self.enabled or now - self.printed < self.interval:
            return
        self.printed = now
        rate = (done - self.first) / max(now - self.start, 1e-9)
        left = f"ETA {format_seconds((self.total - done) / rate)}" if rate > 0 else ""
        share = f"{100 * done / max(self.total, 1):.0f} %"
        print(f"{self.label} {done}/{self.total} {self.unit}  {share}  {left}  {note}".rstrip(), file=sys.stderr, flush=True)


def format_seconds(seconds: float) -> str:
    """Write a duration as ``h:mm:ss`` or ``m:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
