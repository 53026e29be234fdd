"""What a scoring job says it did: of one fragment, and of them all."""

from collections import Counter
from dataclasses import dataclass, field

from glintru_rec.scoring.index import IndexReport

REPORT_FILE = "report.json"
SUCCESS_FILE = "_SUCCESS"
STAGES = ("read", "score", "write")


@dataclass(frozen=True)
class Counts:
    """What became of rows: ``rows_in`` is ``rows_scored`` and the sum of ``rows_set_aside``.

    Attributes:
        rows_in: rows read.
        rows_scored: rows of the output.
        rows_set_aside: the others, by `Reason`.
        fallback: rows scored by popularity, for want of a history.
        unknown_history_items: items of histories that the vocabulary lacks, each time they occur.
        unknown_candidates: candidates that the vocabulary lacks, each time they occur.
    """

    rows_in: int = 0
    rows_scored: int = 0
    rows_set_aside: dict[str, int] = field(default_factory=dict)
    fallback: int = 0
    unknown_history_items: int = 0
    unknown_candidates: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        """Count the rows of both."""
        set_aside = Counter(self.rows_set_aside) + Counter(other.rows_set_aside)
        return Counts(
            rows_in=self.rows_in + other.rows_in,
            rows_scored=self.rows_scored + other.rows_scored,
            rows_set_aside=dict(sorted(set_aside.items())),
            fallback=self.fallback + other.fallback,
            unknown_history_items=self.unknown_history_items + other.unknown_history_items,
            unknown_candidates=self.unknown_candidates + other.unknown_candidates,
        )


@dataclass(frozen=True)
class Timing:
    """How long it took. It differs from call to call; all else that a job writes does not.

    Attributes:
        seconds: that each of the `STAGES` was at work, of all fragments in the output, whichever call wrote them. Stages work
            at the same time, and ``score`` in several threads, so their sum is more than the job took.
        elapsed: seconds from the first row that was read by this call to the last that was written.
        rows_per_second: rows read by this call over ``elapsed``; 0 where nothing was left to do.
        fragments_before: written by earlier calls.
        fragments_now: written by this call.
    """

    seconds: dict[str, float]
    elapsed: float
    rows_per_second: float
    fragments_before: int
    fragments_now: int


@dataclass(frozen=True, kw_only=True)
class ScoreReport(Counts):
    """What became of the rows of all fragments that could be read.

    Attributes:
        unknown_listed_items: items of the files ``allow`` and ``deny`` that the vocabulary lacks.
        fragments: files of the input.
        failed: those that could not be read, each with why; their rows are in no other figure.
        timing: see `Timing`.
        index: what an approximate search is worth; None where the search is exact.
    """

    unknown_listed_items: int
    fragments: int
    failed: dict[str, str]
    timing: Timing
    index: IndexReport | None
