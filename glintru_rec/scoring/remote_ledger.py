"""The ledger of an output at an address: files are made on this machine, and taken there when they are whole.

Object stores know no rename and no lock. So a fragment's files are written there first, its record last: without the record the
fragment counts as missing, and is written again, with the same bytes. And what keeps a second job out is a file that the first
one renews (see `lease`).
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glintru_rec.errors import InputError
from glintru_rec.scoring.addresses import RemoteFolder
from glintru_rec.scoring.fragments import InputFile
from glintru_rec.scoring.lease import Lease
from glintru_rec.scoring.ledger import BEGUN_FILE, BESIDE, JOB_FOLDER, Ledger, Record
from glintru_rec.scoring.report import SUCCESS_FILE

LEASE_FILE = f"{JOB_FOLDER}/lease"


class RemoteLedger(Ledger):
    """What has been done in an output folder at an address; see `Ledger`.

    Args:
        remote: the output.
        output: an empty folder of this machine, in which the files are made.
        terms: see `Ledger`.
        files: of the input.
    """

    def __init__(self, remote: RemoteFolder, output: Path, terms: dict[str, Any], files: list[InputFile]):
        super().__init__(output, terms, files)
        self._remote = remote
        self._place = str(remote)
        self._sizes: dict[str, int] = {}
        self._lease = Lease(remote, LEASE_FILE)
        self._folder.mkdir()  # every rank has a folder of its own, and writes its records there first

    def check(self) -> None:
        """Read what is there, which the first rank alone needs to know, and do what `Ledger.check` does."""
        known, self._sizes = self._sizes, self._remote.sizes()
        self._sizes.pop(LEASE_FILE, None)
        for name, size in self._sizes.items():
            is_record = name.startswith(f"{JOB_FOLDER}/") and name.endswith(".json")
            if (is_record or name == SUCCESS_FILE) and known.get(name) != size:
                self._remote.get(name, self._output / name)
        super().check()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the output, alone, and begin it or go on with it."""
        with self._lease.held(), super().locked():
            self.publish(f"{JOB_FOLDER}/{BEGUN_FILE}")
            yield

    def write(self, name: str, record: Record) -> None:
        """Take the files of a fragment to their place, and then its record."""
        super().write(name, record)
        for file in record.files:
            self.publish(file)
            (self._output / file).unlink()
        self.publish(f"{JOB_FOLDER}/{name}.json")

    def remove_leftovers(self, names: Collection[str]) -> None:
        """Remove what killed jobs left: files of fragments that have no record yet."""
        for name in names:
            for file in (name, *(f"{folder}/{name}" for folder in BESIDE)):
                self.remove(file)

    def remove(self, name: str) -> None:
        """Remove a file of the output, if it is there."""
        super().remove(name)
        if self._sizes.pop(name, None) is not None:
            self._remote.remove(name)

    def publish(self, name: str) -> None:
        """Take a file of the output to its place.

        Raises:
            InputError: it cannot be written, or another job has taken the output over.
        """
        self._lease.check()
        self._remote.put(self._output / name, name)

    def _check_free(self) -> None:
        if self._sizes:
            raise InputError(f"output {self._place!r} is not empty; remove what is there or name another")

    def _names(self) -> list[str]:
        return list({name.split("/")[0] for name in self._sizes})

    def _is_whole(self, record: Record) -> bool:
        return all(self._sizes.get(name) == size for name, size in record.files.items())
