"""The only right to write an output at an address, where no kernel keeps a lock: a file that says who is writing.

A job makes the file ``.job/lease`` by `RemoteFolder.create`, which only one of several does, renews it every `RENEW_SECONDS`,
and removes it at its end. While the file is there, other jobs are refused, unless it is stale: its job was killed. That is so

* at once, where it was a process of this machine that is there no longer;
* otherwise once it has not been renewed for `STALE_SECONDS`, by the clocks of both machines.

Whoever finds it stale replaces it. A job that finds its own file replaced or gone, because it hung for so long or the clock of
its machine is wrong, stops before it writes anything else. Should two jobs for a moment both write: only the very same job may
go on with an output (see `ledger`), so they write the same files.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from glintru_rec.errors import InputError
from glintru_rec.scoring.addresses import RemoteFolder

RENEW_SECONDS = 60.0
STALE_SECONDS = 600.0
# A file that is being written may be read in part.
_SECONDS_TO_WRITE = 1.0


class Lease:
    """Hold an output at an address, alone.

    Args:
        remote: the output.
        name: of the file in it.
    """

    def __init__(self, remote: RemoteFolder, name: str):
        self._remote, self._name = remote, name
        self._own: dict[str, Any] = {"job": secrets.token_hex(8), **_identity(os.getpid())}
        self._over = threading.Event()
        self._lost = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Take the lease, renew it, and give it back.

        Raises:
            InputError: another job holds it, or it cannot be written.
        """
        self._take()
        renewing = threading.Thread(target=self._renew, name="lease", daemon=True)
        renewing.start()
        try:
            yield
        finally:
            self._over.set()
            renewing.join()
            self._give_back()

    def check(self) -> None:
        """Raise an `InputError` if another job has taken the lease meanwhile."""
        if self._lost:
            raise InputError(f"output {str(self._remote)!r} was taken over by another job, as this one hung; leave it to that")

    def _take(self) -> None:
        if self._remote.create(self._name, self._content()):
            return
        holder = self._holder()
        idle = time.time() - float(holder.get("renewed", 0)) if holder else STALE_SECONDS
        if holder and not _is_dead(holder) and idle < STALE_SECONDS:
            raise InputError(
                f"output {str(self._remote)!r} is being written by another job (process {holder.get('process')} on "
                f"{holder.get('host')}, last heard of {max(0, idle):.0f} s ago); wait for its end. Of a job that was killed on "
                f"another machine, the output is free again {STALE_SECONDS / 60:.0f} minutes later"
            )
        if holder == self._holder():  # nobody has replaced it meanwhile
            self._give_back(holder)
        if not self._remote.create(self._name, self._content()):
            raise InputError(f"output {str(self._remote)!r} is being written by another job, which began just now")

    def _holder(self) -> dict[str, Any]:
        """Read who holds the lease; nothing where it is gone, or is no such file, as a job killed at once leaves it."""
        for _ in range(2):
            try:
                found = json.loads(self._remote.read(self._name) or b"{}")
                if isinstance(found, dict) and found:
                    return found
            except ValueError:
                pass
            except OSError as error:
                raise InputError(f"{self._name!r} cannot be read from {str(self._remote)!r}: {error}") from error
            time.sleep(_SECONDS_TO_WRITE)
        return {}

    def _renew(self) -> None:
        while not self._over.wait(RENEW_SECONDS):
            try:
                if self._holder().get("job") != self._own["job"]:
                    self._lost = True
                    return
                self._remote.write(self._name, self._content())
            except (InputError, OSError):
                continue  # the network may be back next time; a job that never gets through cannot write its files either

    def _give_back(self, holder: dict[str, Any] | None = None) -> None:
        """Remove the file, if ``holder`` (this job) still has it."""
        try:
            if holder is not None or self._holder().get("job") == self._own["job"]:
                self._remote.remove(self._name)
        except InputError:
            pass  # it is gone, or becomes stale by itself

    def _content(self) -> bytes:
        return json.dumps({**self._own, "renewed": time.time()}).encode()


def _identity(process: int) -> dict[str, Any]:
    """Say which process of which machine this is, and when both began: numbers of processes are given again."""
    return {"host": socket.gethostname(), "boot": _text("/proc/sys/kernel/random/boot_id"), **_process(process)}


def _process(process: int) -> dict[str, Any]:
    words = _text(f"/proc/{process}/stat").rpartition(")")[2].split()
    return {"process": process, "began": words[19] if words else ""}


def _text(path: str) -> str:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return ""


def _is_dead(holder: dict[str, Any]) -> bool:
    """Whether it was a process of this machine, since it was started, that is there no longer."""
    process = holder.get("process")
    here = _identity(process) if isinstance(process, int) else {}
    return (
        bool(here.get("boot"))
        and (here["host"], here["boot"]) == (holder.get("host"), holder.get("boot"))
        and (here["began"] != holder.get("began"))
    )
