"""Files that lie elsewhere: whatever fsspec has a file system for (``s3://bucket/folder``, ``gs://``, ``https://``, ``memory://``)."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory, mkdtemp
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from glintru_rec.errors import InputError

_LOCAL = "file://"


@contextmanager
def errors_of_systems() -> Iterator[None]:
    """Let whatever a file system raises be an `OSError`: many have errors of kinds of their own."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(str(error) or repr(error)) from error


@dataclass(frozen=True)
class RemoteFile:
    """A file of an fsspec file system.

    Attributes:
        system: an fsspec file system.
        key: the path of the file there.
    """

    system: Any
    key: str

    def __str__(self) -> str:
        return self.system.unstrip_protocol(self.key)

    @property
    def place(self) -> str:
        """Its path without what a web address asks for behind it, such as a signature."""
        return self.key.split("?")[0] if _has_query(self.key) else self.key

    def open(self) -> BinaryIO:
        """Open the file for reading."""
        return self.system.open(self.key, "rb")

    def look(self) -> tuple[int, int]:
        """Give the number of bytes, and a number that changes with the file as far as its file system can tell.

        Raises:
            OSError: the file is gone, or cannot be reached.
        """
        with errors_of_systems():
            self.system.invalidate_cache()
            num_bytes = self.system.info(self.key)["size"]
            digest = hashlib.sha256(str(self.system.ukey(self.key)).encode()).digest()
        return num_bytes, int.from_bytes(digest[:7])


class RemoteFolder:
    """A folder of an fsspec file system.

    Args:
        location: its address.

    Raises:
        InputError: there is no such file system.
    """

    def __init__(self, location: str):
        try:
            with errors_of_systems():
                self._system, self._root = fsspec.core.url_to_fs(location.rstrip("/"))
        except OSError as error:
            raise InputError(f"{location!r} is no address that fsspec knows: {error}") from error
        self._location = location

    def __str__(self) -> str:
        return self._location

    def sizes(self) -> dict[str, int]:
        """Give the bytes of all files, to the bottom, by their names in the folder; none where there is no folder.

        Raises:
            InputError: the folder cannot be listed.
        """
        try:
            with errors_of_systems():
                self._system.invalidate_cache()
                found = self._system.find(self._root, detail=True)
        except OSError as error:
            raise InputError(f"{self._location!r} cannot be listed: {error}") from error
        return {str(PurePosixPath(key).relative_to(PurePosixPath(self._root))): info["size"] for key, info in found.items()}

    def get(self, name: str, path: Path) -> None:
        """Fetch a file.

        Raises:
            InputError: it cannot be read.
        """
        try:
            with errors_of_systems():
                self._system.get_file(f"{self._root}/{name}", str(path))
        except OSError as error:
            raise InputError(f"{name!r} cannot be read from {self._location!r}: {error}") from error

    def put(self, path: Path, name: str) -> None:
        """Write a file, or write it anew; it appears whole where the file system has whole files, as object stores do.

        Raises:
            InputError: it cannot be written.
        """
        try:
            with errors_of_systems():
                self._system.makedirs(str(PurePosixPath(f"{self._root}/{name}").parent), exist_ok=True)
                self._system.put_file(str(path), f"{self._root}/{name}")
        except OSError as error:
            raise InputError(f"{name!r} cannot be written to {self._location!r}: {error}") from error

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file unless there is one of that name already; say whether it was written.

        As one act where the file system can do that: S3, Google's storage, a disk, memory. Elsewhere fsspec looks first, then
        writes.

        Raises:
            InputError: it cannot be written.
        """
        key = f"{self._root}/{name}"
        try:
            with errors_of_systems():
                self._system.makedirs(str(PurePosixPath(key).parent), exist_ok=True)
                if isinstance(self._system, LocalFileSystem):  # of which fsspec only looks, too
                    with self._system.open(key, "xb") as file:
                        file.write(content)
                else:
                    self._system.pipe_file(key, content, mode="create")
        except FileExistsError:
            return False
        except OSError as error:
            raise InputError(f"{name!r} cannot be written to {self._location!r}: {error}") from error
        return True

    def read(self, name: str) -> bytes | None:
        """Read a small file as it is now; None where there is none.

        Raises:
            OSError: it cannot be read.
        """
        with errors_of_systems():
            self._system.invalidate_cache()
            try:
                return self._system.cat_file(f"{self._root}/{name}")
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """Write a small file anew.

        Raises:
            OSError: it cannot be written.
        """
        with errors_of_systems():
            self._system.pipe_file(f"{self._root}/{name}", content)

    def remove(self, name: str) -> None:
        """Remove a file that is there.

        Raises:
            InputError: it cannot be removed.
        """
        try:
            with errors_of_systems():
                self._system.rm_file(f"{self._root}/{name}")
        except OSError as error:
            raise InputError(f"{name!r} cannot be removed from {self._location!r}: {error}") from error


def is_remote(location: str) -> bool:
    """Say whether a location is an address, not a path."""
    return "://" in location


def local_path(location: str) -> str:
    """Give the path that an address of this machine, ``file://``, names; other locations as they are."""
    return location.removeprefix(_LOCAL)


def find_remote(location: str) -> list[RemoteFile]:
    """Give the files that an address (of a file, a folder or a glob) names, as `glintru_rec.data.formats.find_files` does.

    One of the web with a query, ``https://host/file?sig=…``, names that file, whatever signs are in it.

    Raises:
        InputError: there is none, or no such file system.
    """
    try:
        with errors_of_systems():
            system, key = fsspec.core.url_to_fs(location)
            if _has_query(location):
                keys = [key] if system.isfile(key) else []
            elif any(sign in key for sign in "*?["):
                keys = [match for match in system.glob(key) if system.isfile(match)]
            elif system.isdir(key):
                inside = {each: PurePosixPath(each).relative_to(PurePosixPath(key)).parts for each in system.find(key)}
                keys = [each for each, parts in inside.items() if parts and not any(part[0] in "._" for part in parts)]
            else:
                keys = [key] if system.isfile(key) else []
    except OSError as error:
        raise InputError(f"input {location!r} cannot be listed: {error}") from error
    if not keys:
        raise InputError(f"input {location!r} matches no file; give a file, a folder that holds files, or a glob pattern")
    return [RemoteFile(system, each) for each in sorted(keys)]


def _has_query(location: str) -> bool:
    return location.startswith(("http://", "https://")) and "?" in location


@contextmanager
def fetched_files(location: str) -> Iterator[tuple[str, dict[str, str]]]:
    """Lend local copies of the files that an input names; of what is local already, itself.

    Yields:
        Where they are, a folder that has their folders inside, and the address of each copy by its path.

    Raises:
        InputError: there is none, or one cannot be fetched.
    """
    if not is_remote(location):
        yield location, {}
        return
    files = find_remote(location)
    common = os.path.commonpath([PurePosixPath(file.place).parent for file in files])
    with TemporaryDirectory(prefix="glintru_rec-") as folder:
        addresses = {}
        for file in files:
            copy = Path(folder, PurePosixPath(file.place).relative_to(common))
            copy.parent.mkdir(parents=True, exist_ok=True)
            try:
                with errors_of_systems():
                    file.system.get_file(file.key, str(copy))
            except OSError as error:
                raise InputError(f"input {str(file)!r} cannot be fetched: {error}") from error
            addresses[str(copy)] = str(file)
        yield folder, addresses


@contextmanager
def fetched(key: str, location: str) -> Iterator[str]:
    """Lend a local copy of a file or folder; of what is local already, itself.

    Args:
        key: of the config, for messages.
        location: a path or an address; empty gives empty.

    Raises:
        InputError: it cannot be fetched.
    """
    if not is_remote(location):
        yield location
        return
    folder = Path(mkdtemp(prefix="glintru_rec-"))
    try:
        try:
            with errors_of_systems():
                system, path = fsspec.core.url_to_fs(location)
                copy = folder / PurePosixPath(path.split("?")[0] if _has_query(location) else path).name
                if not _has_query(location) and system.isdir(path):
                    system.get(path.rstrip("/"), str(copy), recursive=True)
                else:
                    system.get_file(path, str(copy))
        except OSError as error:
            raise InputError(f"{key} {location!r} cannot be fetched: {error}") from error
        yield str(copy)
    finally:
        shutil.rmtree(folder)
