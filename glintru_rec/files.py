"""Write files and folders whole or not at all: grow aside, sync, take the name by one rename."""

import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glintru_rec.errors import InputError

_ASIDE = ".partial-"


def aside_of(path: Path) -> Path:
    """Name a hidden neighbour of ``path`` to write into.

    Random, because in a container every process may have the same id: an id alone would collide with what a killed run left.
    """
    return path.with_name(f"{_ASIDE}{path.name}-{secrets.token_hex(4)}")


def remove_asides(folder: Path) -> None:
    """Remove the files that killed processes left in a folder, unpublished; none may be writing there now."""
    for path in folder.glob(f"{_ASIDE}*"):
        path.unlink()


def publish(aside: Path, path: Path) -> None:
    """Give what was written aside, a file or a folder, its name; both are on the disk afterwards.

    A file replaces one of that name; a folder takes the place of an empty one only.
    """
    sync(aside)
    aside.replace(path)
    _sync(path.parent)


def sync(path: Path) -> None:
    """Bring a file, or a folder with all it holds, to the disk."""
    for part in [*sorted(path.rglob("*")), path]:
        _sync(part)


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    aside = aside_of(path)
    try:
        aside.write_text(text)
        publish(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def check_free(key: str, output: Path) -> None:
    """Raise an `InputError` unless ``output`` does not exist or is an empty folder."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"{key} {str(output)!r} exists and is not an empty folder; remove it or name another")


def check_writable(output: Path) -> None:
    """See to it, before the work for a file begins, that it can be written in the end; its folder is made.

    Raises:
        InputError: a folder has its name, or its own folder cannot be made or takes no file.
    """
    if output.is_dir():
        raise InputError(f"output={output} is a directory; give a file to write, such as {output / 'NAME'}")
    aside = aside_of(output)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        aside.touch()
        aside.unlink()
    except OSError as error:
        raise InputError(f"output={output} cannot be written: {error.strerror} ({error.filename})") from error


def sha256_of(path: Path) -> str:
    """Give the checksum of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def make_aside(output: Path) -> Path:
    """Make a hidden folder beside ``output``, to write into.

    Raises:
        InputError: it cannot be made.
    """
    aside = aside_of(output)
    try:
        aside.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"output {str(output)!r} cannot be written: {error.strerror} ({str(aside)!r})") from error
    return aside


@contextmanager
def folder_aside(output: Path) -> Iterator[Path]:
    """Lend a folder beside ``output`` that takes its place at the end, whole, or vanishes on an error.

    Raises:
        InputError: it cannot be made.
    """
    output = output.absolute()
    aside = make_aside(output)
    try:
        yield aside
        publish(aside, output)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
