"""The queries that turn a raw log into clean events, inside one DuckDB database.

::

    files --stage--> log (position, *_raw) --clean--> event (position, user_id, item_id, time, reason)
                                                        | reason IS NULL
                                                        +--drop_rare--> kept (position, user_key, item_key, time)

``position`` numbers the rows of the log, over all its files. It is a row's name everywhere below, and what breaks ties in time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from glintru_rec.data.formats import Format, LogColumns, LogFile
from glintru_rec.data.side_features import CATEGORICAL
from glintru_rec.errors import InputError

# No leading zeros: '007' and '7' may be two products, so a column with such ids is text.
_INTEGER = "0|-?[1-9][0-9]*"
_NUMBER = r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?"
_NARROW_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}
# Largest number of seconds whose microseconds fit in int64.
_MAX_SECONDS = 2**63 // 10**6


@dataclass(frozen=True)
class RawColumn:
    """How one column of the log is staged.

    Attributes:
        kind: ``integer``, ``float``, ``timestamp`` or ``text``.
        sql_type: the DuckDB type that holds all its values exactly.
    """

    kind: str
    sql_type: str


@dataclass(frozen=True)
class Cleaned:
    """What cleaning found out about the columns.

    Attributes:
        user_type: ``int64`` or ``string``.
        item_type: ``int64`` or ``string``.
        time_unit: ``as_given`` (the log's own whole numbers) or ``microseconds``.
    """

    user_type: str
    item_type: str
    time_unit: str


def stage(db: duckdb.DuckDBPyConnection, files: Sequence[LogFile], names: LogColumns) -> tuple[RawColumn, RawColumn, RawColumn]:
    """Read the files into the table ``log``, in the log's order, every value still as it was written; side columns as text.

    Returns:
        How the user, item and time columns are staged.

    Raises:
        InputError: a file is corrupt, a column has a type that cannot be used, or its type changes between files.
    """
    queries = [file.query(names) for file in files]
    described = [_read(db, file, f"DESCRIBE {query}", parameters) for file, (query, parameters) in zip(files, queries)]
    # The first row of a description is the row number's.
    columns = [
        _common_column(name, role < 3, [(file, str(description[role][1])) for file, description in zip(files, described)])
        for role, name in enumerate((names.user, names.item, names.time), start=1)
    ]
    for place, name in enumerate(names.side):
        for file, description in zip(files, described):
            _check_side(name, file, str(description[4 + place][1]))
    side = [f"side_{place}" for place in range(len(names.side))]
    user, item, time = (column.sql_type for column in columns)
    db.execute("CREATE TABLE file (path VARCHAR, first BIGINT, num_rows BIGINT)")
    more = "".join(f", {column} VARCHAR" for column in side)
    db.execute(f"CREATE TABLE log (position BIGINT, user_raw {user}, item_raw {item}, time_raw {time}{more})")
    # A zoned or nanosecond timestamp becomes microseconds since 1970 in UTC.
    time_raw = "epoch_us(time_raw)" if columns[2].kind == "timestamp" else "time_raw"
    first = 0
    for file, (query, parameters) in zip(files, queries):
        values = ", ".join([f"{first} + row - 1, user_raw, item_raw, {time_raw}", *side])
        insert = f"INSERT INTO log SELECT {values} FROM ({query})"
        num_rows = _read(db, file, insert, parameters)[0][0]
        db.execute("INSERT INTO file VALUES (?, ?, ?)", [str(file.path), first, num_rows])
        first += num_rows
    return columns[0], columns[1], columns[2]


def clean(
    db: duckdb.DuckDBPyConnection, files: Sequence[LogFile], names: LogColumns, columns: tuple[RawColumn, RawColumn, RawColumn]
) -> Cleaned:
    """Give every row of ``log`` its typed values or the reason why it is set aside: the table ``event``.

    Returns:
        The types that the columns turned out to have.

    Raises:
        InputError: an id column of a text log holds numbers with a fraction.
    """
    parse = files[0].format is not Format.PARQUET  # parquet says itself what is a string
    user_type = _id_type(db, "user", names.user, columns[0], parse)
    item_type = _id_type(db, "item", names.item, columns[1], parse)
    time, time_unit = _time(db, columns[2])
    db.execute(f"""
        CREATE TABLE event AS
        WITH typed AS (
            SELECT position, {time} AS time,
                {_id_value("user", user_type)} AS user_id, {_id_value("item", item_type)} AS item_id,
                CASE {_id_reasons("user", columns[0], user_type)} {_id_reasons("item", columns[1], item_type)}
                     WHEN time_raw IS NULL THEN 'null_timestamp' WHEN {time} IS NULL THEN 'bad_timestamp' END AS reason
            FROM log)
        SELECT position, user_id, item_id, time, CASE
            WHEN reason IS NULL AND row_number() OVER (PARTITION BY reason, user_id, item_id, time ORDER BY position) > 1
            THEN 'duplicate_event' ELSE reason END AS reason
        FROM typed""")
    return Cleaned(user_type, item_type, time_unit)


def drop_rare(db: duckdb.DuckDBPyConnection, min_user_events: int, min_item_events: int) -> dict[str, int]:
    """Keep the largest set of events whose users and items all have enough of them: the table ``kept``.

    A key is the position where its user or item first appears among the clean rows, so that keys sort as the log does.

    Returns:
        The number of events lost, by reason.
    """
    for role in ("user", "item"):
        db.execute(f"""
            CREATE TABLE {role}_name AS SELECT {role}_id, min(position) AS {role}_key
            FROM event WHERE reason IS NULL GROUP BY {role}_id""")
    db.execute("""
        CREATE TABLE kept AS SELECT position, user_key, item_key, time
        FROM event JOIN user_name USING (user_id) JOIN item_name USING (item_id) WHERE reason IS NULL""")
    lost = {"rare_user": 0, "rare_item": 0}
    while True:
        before = sum(lost.values())
        for role, least in (("user", min_user_events), ("item", min_item_events)):
            rare = f"SELECT {role}_key FROM kept GROUP BY {role}_key HAVING count(*) < {least}"
            lost[f"rare_{role}"] += _rows(db, f"DELETE FROM kept WHERE {role}_key IN ({rare})")[0][0]
        if sum(lost.values()) == before:
            return lost


def _read(db: duckdb.DuckDBPyConnection, file: LogFile, query: str, parameters: dict[str, object]) -> list[tuple]:
    try:
        return db.execute(query, parameters).fetchall()
    except duckdb.OutOfMemoryException:
        raise
    except duckdb.Error as error:
        # What follows the cause are hints about options of DuckDB that our user does not have.
        cause = re.split(r"\n\s*\n|\nPossible", str(error))[0].replace("\n", "; ")
        what = f"{str(file.path)!r} ({file.format}) cannot be read: {cause}"
        raise InputError(f"{what}; correct it or write the file again") from error


def _rows(db: duckdb.DuckDBPyConnection, query: str) -> list[tuple]:
    return db.execute(query).fetchall()


def _common_column(name: str, is_id: bool, types: Sequence[tuple[LogFile, str]]) -> RawColumn:
    """Find how a column is staged, so that the values of all files fit."""
    found: dict[RawColumn, LogFile] = {}
    for file, sql_type in types:
        column = _raw_column(sql_type)
        if column is None or (is_id and column.kind not in ("integer", "text")):
            allowed = "whole numbers or strings" if is_id else "whole numbers, floats, timestamps or strings"
            hint = f"; a {sql_type} cannot hold every id, so write int64" if column and column.kind == "float" else ""
            raise InputError(f"column {name!r} of {str(file.path)!r} has type {sql_type}; it must hold {allowed}{hint}")
        found.setdefault(column, file)
    kinds = {column.kind: file for column, file in found.items()}
    if len(kinds) > 1:
        seen = ", ".join(f"{kind} in {str(file.path)!r}" for kind, file in kinds.items())
        raise InputError(f"column {name!r} changes its type between files: {seen}; write them with one type")
    return next((column for column in found if column.sql_type == "HUGEINT"), next(iter(found)))


def _check_side(name: str, file: LogFile, sql_type: str) -> None:
    column = _raw_column(sql_type)
    if sql_type != "BOOLEAN" and (column is None or column.kind not in ("integer", "text")):
        raise InputError(f"side column {name!r} of {str(file.path)!r} has type {sql_type}; {CATEGORICAL}")


def _raw_column(sql_type: str) -> RawColumn | None:
    if sql_type in _NARROW_INTEGERS:
        return RawColumn("integer", "BIGINT")
    if sql_type in ("UBIGINT", "HUGEINT") or re.fullmatch(r"DECIMAL\(\d+,0\)", sql_type):
        return RawColumn("integer", "HUGEINT")
    if sql_type in ("FLOAT", "DOUBLE") or sql_type.startswith("DECIMAL"):
        return RawColumn("float", "DOUBLE")
    if sql_type.startswith("TIMESTAMP") or sql_type == "DATE":
        return RawColumn("timestamp", "BIGINT")
    return RawColumn("text", "VARCHAR") if sql_type == "VARCHAR" else None


def _id_type(db: duckdb.DuckDBPyConnection, role: str, name: str, column: RawColumn, parse: bool) -> str:
    if column.kind == "integer":
        return "int64"
    if not parse:
        return "string"
    raw = f"{role}_raw"
    number = f"regexp_full_match({raw}, '{_NUMBER}')"
    query = f"""
        SELECT count(*), count(*) FILTER (regexp_full_match({raw}, '{_INTEGER}')), count(*) FILTER ({number}),
            min(position) FILTER ({number} AND regexp_matches({raw}, '[.eE]'))
        FROM log WHERE {raw} <> ''"""
    total, integers, numbers, first_float = _rows(db, query)[0]
    if integers == total:
        return "int64"
    if numbers == total and first_float is not None:
        value = _rows(db, f"SELECT {raw} FROM log WHERE position = {first_float}")[0][0]
        is_in = f"{first_float} >= first AND {first_float} < first + num_rows"
        path, row = _rows(db, f"SELECT path, {first_float} - first + 1 FROM file WHERE {is_in}")[0]
        raise InputError(
            f"column {name!r} holds floats as ids (first {value!r} in {path!r}, row {row}); "
            f"a float cannot hold every id, so write whole numbers or text"
        )
    return "string"


def _id_value(role: str, id_type: str) -> str:
    return f"TRY_CAST({role}_raw AS BIGINT)" if id_type == "int64" else f"{role}_raw"


def _id_reasons(role: str, column: RawColumn, id_type: str) -> str:
    """Write the CASE branches that set a bad id aside."""
    raw = f"{role}_raw"
    reasons = f"WHEN {raw} IS NULL THEN 'null_{role}'"
    if column.kind == "text":
        reasons += f" WHEN {raw} = '' THEN 'empty_{role}'"
    if id_type == "int64":
        negative = f"starts_with({raw}, '-')" if column.kind == "text" else f"{raw} < 0"
        reasons += f" WHEN {negative} THEN 'negative_{role}' WHEN TRY_CAST({raw} AS BIGINT) IS NULL THEN '{role}_beyond_int64'"
    return reasons


def _time(db: duckdb.DuckDBPyConnection, column: RawColumn) -> tuple[str, str]:
    """Write the expression that gives a row's time as int64, NULL where it has none, and name its unit.

    Whole numbers stay as they are. If one number of the log has a fraction, all are seconds and become microseconds, rounded.
    Text is read as numbers or as dates, whichever most rows allow; dates without a zone are in UTC.
    """
    if column.kind == "timestamp":
        return "time_raw", "microseconds"
    if column.kind == "integer":
        return "TRY_CAST(time_raw AS BIGINT)", "as_given"
    number = "TRY_CAST(time_raw AS DECIMAL(38, 6))"  # exact, and wide enough for int64
    if column.kind == "text":
        date = "epoch_us(TRY_CAST(time_raw AS TIMESTAMPTZ))"
        numbers, dates = _rows(db, f"SELECT count({number}), count({date}) FROM log")[0]
        if dates > numbers:
            return date, "microseconds"
    if _rows(db, f"SELECT count(*) FROM log WHERE {number} <> trunc({number})")[0][0] == 0:
        return f"TRY_CAST({number} AS BIGINT)", "as_given"
    return f"CASE WHEN abs({number}) < {_MAX_SECONDS} THEN CAST(round({number} * 1000000) AS BIGINT) END", "microseconds"
