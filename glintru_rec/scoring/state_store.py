"""The store of user states: one SQLite file, ``states.sqlite``, in a folder of its own.

SQLite, because an update reads and rewrites some rows by their key, and all of it must take effect at once: that is what a
B-tree with a rollback journal does. What a killed process has written, the next one to open the file rolls back. Parquet would
have to be rewritten whole; DuckDB, which sorts the events here, is made for scans, not for replacing rows by key. SQLite
comes with Python, and any language reads it.

::

    user_state    user_id        integer or text, the key
                  last_time      of the newest event applied
                  num_events     applied so far
                  state          the model's packed state, float32, little-endian (``advance`` of the artifact)
                  seen           vocabulary indices of all items so far, each once, int64, little-endian
                  last_items     those of the events at ``last_time``
    meta          store_version, model (its fingerprint), user_type, time_unit
    last_update   what the newest update was and where its output lies, to finish what a kill interrupted

A user takes 4 S bytes for S numbers of state, and 8 bytes for each different item seen.

Shapes: B users, S numbers of a packed state.
"""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import numpy as np

from glintru_rec.errors import InputError
from glintru_rec.files import check_free, publish
from glintru_rec.scoring.rows import Ragged

STORE_VERSION = "1"
STORE_FILE = "states.sqlite"

NEVER = np.iinfo(np.int64).min
"""``last_time`` of a user without events; no event is older."""


@dataclass
class UserStates:
    """What the store knows of B users.

    Attributes:
        state: float32 ``[B, S]``.
        last_time: int64 ``[B]``.
        num_events: int64 ``[B]``.
        seen: vocabulary indices, each once for a user.
        last_items: vocabulary indices of the events at ``last_time``, each once for a user.
    """

    state: np.ndarray
    last_time: np.ndarray
    num_events: np.ndarray
    seen: Ragged
    last_items: Ragged


class StateStore:
    """The states of all users of one model; used as a context that holds the only right to change them.

    All changes are one transaction: `commit` makes them last, and without it, be it by an error or by a kill, there were
    none.

    Args:
        folder: made when missing.
        model: fingerprint of the model whose states these are.

    Raises:
        InputError: the folder holds states of another model, or no store of this version, or is being updated, or cannot
            be written.
    """

    def __init__(self, folder: Path, model: str):
        self._folder = folder
        self._model = model
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(folder / STORE_FILE, isolation_level=None, timeout=0)
        except (OSError, sqlite3.Error) as error:
            raise InputError(f"state {str(folder)!r} cannot be written: {error}") from error
        try:
            # A commit outlasts a power cut too.
            self._db.execute("PRAGMA synchronous = EXTRA")
            self._db.execute("BEGIN IMMEDIATE")  # refuses a second update at once, and a reader delays the commit only
            self._db.execute("PRAGMA busy_timeout = 60000")
            self._check_model()
        except sqlite3.Error as error:
            self._db.close()
            busy = getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_BUSY
            what = "is being updated by another process; wait for it" if busy else f"cannot be used: {error}"
            raise InputError(f"state {str(folder)!r} {what}") from error
        except InputError:
            self._db.close()
            raise

    def __enter__(self) -> "StateStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        self._db.close()

    def finish_last_update(self) -> tuple[str, Path] | None:
        """Give the output of the newest update its name, if a kill came between the commit and that.

        Returns:
            The newest update's identity and output; None where there was none.

        Raises:
            InputError: the name was taken meanwhile.
        """
        last = self._last_update()
        if last is None:
            return None
        identity, output, aside = last
        if aside.exists():
            check_free(
                f"the last update of state {str(self._folder)!r} left its output in {str(aside)!r}, but its place", output
            )
            publish(aside, output)
        return identity, output

    def use(self, user_type: str, time_unit: str) -> None:
        """Make the tables where there are none, or check that new events fit to those applied so far.

        Args:
            user_type: ``int64`` or ``string``.
            time_unit: ``as_given`` or ``microseconds``.

        Raises:
            InputError: the store has users of the other type, or times in the other unit.
        """
        if not self._has_tables():
            key = "INTEGER" if user_type == "int64" else "TEXT"
            self._db.execute("CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL)")
            self._db.execute(f"""
                CREATE TABLE user_state (user_id {key} PRIMARY KEY, last_time INTEGER NOT NULL, num_events INTEGER NOT NULL,
                    state BLOB NOT NULL, seen BLOB NOT NULL, last_items BLOB NOT NULL)""")
            self._db.execute("CREATE TABLE last_update (identity TEXT, output TEXT, aside TEXT)")
            meta = {"store_version": STORE_VERSION, "model": self._model, "user_type": user_type, "time_unit": time_unit}
            self._db.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        for key, what, value in (("user_type", "users", user_type), ("time_unit", "times", time_unit)):
            if self._meta(key) != value:
                raise InputError(
                    f"the input's {what} are {value}, those of state {str(self._folder)!r} are {self._meta(key)}; "
                    f"write the events as those before"
                )

    def read(self, users: Sequence[int | str], first_state: np.ndarray) -> UserStates:
        """Look users up.

        Args:
            users: ``[B]``.
            first_state: of a user without events, float32 ``[S]``.
        """
        found = [
            self._db.execute(
                "SELECT state, last_time, num_events, seen, last_items FROM user_state WHERE user_id = ?", (user,)
            ).fetchone()
            or (first_state.tobytes(), NEVER, 0, b"", b"")
            for user in users
        ]
        state, last_time, num_events, seen, last_items = zip(*found)
        return UserStates(
            np.frombuffer(b"".join(state), "<f4").reshape(len(found), len(first_state)).copy(),
            np.array(last_time, np.int64),
            np.array(num_events, np.int64),
            _ragged(seen),
            _ragged(last_items),
        )

    def write(self, users: Sequence[int | str], states: UserStates) -> None:
        """Replace what is known of users, ``[B]``; none of them twice."""
        blobs = [states.state[row].astype("<f4").tobytes() for row in range(len(users))]
        rows = zip(
            users,
            states.last_time.tolist(),
            states.num_events.tolist(),
            blobs,
            _blobs(states.seen),
            _blobs(states.last_items),
            strict=True,
        )
        self._db.executemany(
            """INSERT INTO user_state VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (user_id) DO UPDATE SET
                last_time = excluded.last_time, num_events = excluded.num_events, state = excluded.state,
                seen = excluded.seen, last_items = excluded.last_items""",
            rows,
        )

    def num_users(self) -> int:
        """Count the users."""
        return self._db.execute("SELECT count(*) FROM user_state").fetchone()[0]

    def commit(self, identity: str, output: Path, aside: Path) -> None:
        """Make all changes last, at once.

        Args:
            identity: what the update was.
            output: where its output belongs.
            aside: where its output lies, complete and on the disk.
        """
        self._db.execute("DELETE FROM last_update")
        self._db.execute("INSERT INTO last_update VALUES (?, ?, ?)", (identity, str(output), str(aside)))
        self._db.execute("COMMIT")

    def undo(self, aside: Path) -> bool:
        """Take all changes back, unless they were committed.

        Args:
            aside: where the update's output lies.

        Returns:
            Whether there are no changes, so that nobody needs the output.
        """
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        last = self._last_update()
        return last is None or last[2] != aside

    def _last_update(self) -> tuple[str, Path, Path] | None:
        row = self._db.execute("SELECT identity, output, aside FROM last_update").fetchone() if self._has_tables() else None
        return None if row is None else (row[0], Path(row[1]), Path(row[2]))

    def _check_model(self) -> None:
        if not self._has_tables():
            return
        if self._meta("store_version") != STORE_VERSION:
            raise InputError(
                f"state {str(self._folder)!r} has store_version {self._meta('store_version')}, this program reads "
                f"{STORE_VERSION}; make a new store from the whole histories"
            )
        if self._meta("model") != self._model:
            raise InputError(
                f"state {str(self._folder)!r} holds states of another model ({self._meta('model')[:12]}…) than the artifact's "
                f"({self._model[:12]}…), which mean nothing to it; make a new store from the whole histories"
            )

    def _has_tables(self) -> bool:
        return self._db.execute("SELECT count(*) FROM sqlite_master WHERE name = 'meta'").fetchone()[0] > 0

    def _meta(self, key: str) -> str:
        return self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0]


def _ragged(blobs: Sequence[bytes]) -> Ragged:
    lengths = np.array([len(blob) // 8 for blob in blobs], np.int64)
    return Ragged(np.frombuffer(b"".join(blobs), "<i8").astype(np.int64), lengths)


def _blobs(ragged: Ragged) -> list[bytes]:
    ends = np.cumsum(ragged.lengths)
    return [ragged.indices[end - length : end].astype("<i8").tobytes() for end, length in zip(ends, ragged.lengths)]
