"""What a killed job goes on by: the folder ``.job`` of its output.

::

    lock                       held while a job runs; the kernel lets go of it when the job dies (at an address: lease)
    begun.json                 what the output is made of: config, artifact, input files. Written first, never changed
    part-00000.parquet.json    one record per fragment, written after all its files: they are there, or why they cannot be
"""

import fcntl
import json
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from glintru_rec.errors import InputError
from glintru_rec.files import check_free, remove_asides, write_json
from glintru_rec.scoring.fragments import InputFile, Stamp
from glintru_rec.scoring.report import REPORT_FILE, Counts
from glintru_rec.scoring.writer import REJECTS_FOLDER, UNKNOWN_CANDIDATES_FOLDER

JOB_FOLDER = ".job"
BEGUN_FILE = "begun.json"
BESIDE = (REJECTS_FOLDER, UNKNOWN_CANDIDATES_FOLDER)
_NUM_NAMED = 3


@dataclass(frozen=True)
class Record:
    """What became of one fragment.

    Attributes:
        stamp: of the input file that was read.
        error: why it could not be, else empty; then there are no files.
        files: the bytes of each file written, by its name in the output.
        counts: of its rows.
        timing: seconds that each stage was at work.
    """

    stamp: Stamp
    error: str = ""
    files: dict[str, int] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)
    timing: dict[str, float] = field(default_factory=dict)


class Ledger:
    """What has been done in an output folder.

    Args:
        output: of the job; made when it is locked.
        terms: all else that the output depends on, besides the input: names and values that JSON can hold.
        files: of the input.
    """

    def __init__(self, output: Path, terms: dict[str, Any], files: list[InputFile]):
        self._output = output
        self._place = str(output)
        self._folder = output / JOB_FOLDER
        self._terms = terms
        self._files = files

    def check(self) -> None:
        """Raise an `InputError` unless the output is free, or was begun by the very same job and holds nothing else."""
        begun = self._begun()
        if begun is None:
            self._check_free()
            return
        differing = [*_differences(begun["terms"], self._terms), *self._changed_files(begun["input"])]
        if differing:
            more = f" and {len(differing) - _NUM_NAMED} more" if len(differing) > _NUM_NAMED else ""
            raise InputError(
                f"output {self._place!r} was begun by another job: {'; '.join(differing[:_NUM_NAMED])}{more}. "
                f"Run that one again, or name another output"
            )
        own = {*(file.name for file in self._files), *BESIDE, REPORT_FILE, "config.yaml"}
        others = [name for name in sorted(self._names()) if name[0] not in "._" and name not in own]
        if others:
            raise InputError(f"output {self._place!r} holds {others[0]!r}, which is not of this job; move it elsewhere")

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output, alone, and begin it or go on with it.

        Raises:
            InputError: it cannot be written, another job holds it, or see `check`.
        """
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            lock = (self._folder / "lock").open("w")
        except OSError as error:
            raise InputError(f"output {str(self._output)!r} cannot be written: {error.strerror}") from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"output {str(self._output)!r} is being written by another job; wait for its end") from error
            except OSError as error:
                raise InputError(f"output {str(self._output)!r} cannot be locked: {error.strerror}") from error
            self.check()
            if self._begun() is None:
                stamps = {file.name: file.stamp for file in self._files}
                write_json(self._folder / BEGUN_FILE, {"terms": self._terms, "input": stamps})
            yield

    def done(self) -> dict[str, Record]:
        """Give the records of the fragments whose files are all there."""
        records = {file.name: self._record(file.name) for file in self._files}
        return {name: record for name, record in records.items() if record and not record.error and self._is_whole(record)}

    def write(self, name: str, record: Record) -> None:
        """Note what became of a fragment; its files must have their names by now."""
        write_json(self._folder / f"{name}.json", asdict(record))

    def remove_leftovers(self, names: Collection[str]) -> None:
        """Remove what killed jobs left: unpublished files, and files of fragments that have no record yet."""
        folders = [self._output, *(self._output / folder for folder in BESIDE)]
        for folder in [*folders, self._folder]:
            remove_asides(folder)
        for name in names:
            for folder in folders:
                (folder / name).unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Remove a file of the output, if it is there."""
        (self._output / name).unlink(missing_ok=True)

    def publish(self, name: str) -> None:
        """Say that a file of the output, besides those of records, has been written whole."""

    def _check_free(self) -> None:
        """Raise an `InputError` unless nothing has been written."""
        if not self._folder.is_dir() or len(self._names()) > 1:  # else killed before it began
            check_free("output", self._output)

    def _names(self) -> list[str]:
        """Give the names of what lies in the output."""
        return [path.name for path in self._output.iterdir()] if self._output.is_dir() else []

    def _begun(self) -> dict[str, Any] | None:
        path = self._folder / BEGUN_FILE
        try:
            return json.loads(path.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _record(self, name: str) -> Record | None:
        try:
            fields = json.loads((self._folder / f"{name}.json").read_text())
        except FileNotFoundError:
            return None
        return Record(**fields | {"stamp": Stamp(*fields["stamp"]), "counts": Counts(**fields["counts"])})

    def _is_whole(self, record: Record) -> bool:
        paths = {self._output / name: size for name, size in record.files.items()}
        return all(path.is_file() and path.stat().st_size == size for path, size in paths.items())

    def _changed_files(self, begun: dict[str, Any]) -> Iterator[str]:
        now = {file.name: file for file in self._files}
        for name in sorted(begun.keys() - now.keys()):
            yield f"input file {name!r} is gone"
        for name, file in now.items():
            if name not in begun:
                yield f"input file {str(file.path)!r} is new"
                continue
            record = self._record(name)
            if record is not None and record.error:  # to be mended, so it may change
                continue
            if file.stamp != (record.stamp if record else Stamp(*begun[name])):
                yield f"input file {str(file.path)!r} was changed"


def _differences(begun: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    for key in sorted(begun.keys() | now.keys()):
        if begun.get(key) != now.get(key):
            yield f"{key} was {begun.get(key)!r}, now {now.get(key)!r}"
