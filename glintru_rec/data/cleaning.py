"""The queries that turn a raw log into clean events, one text for all engines (see `glintru_rec.data.engine`).

::

    files --stage--> log (position, *_raw) --clean--> event (position, user_id, item_id, time, reason)
                                    earlier events --^  | reason IS NULL
                                                        +--drop_rare--> kept (position, user_key, item_key, time), or with
                                                                        raw ids (position, user_key, item_id, time)

``position`` numbers the rows of the log, over all its files. It is a row's name everywhere below, and what breaks ties in time.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import duckdb

from glintru_rec.data.engine import Columns, Engine, RawColumn, fetch_one, read_log
from glintru_rec.data.formats import Format, LogColumns, LogFile
from glintru_rec.data.side_features import CATEGORICAL
from glintru_rec.errors import InputError

# No leading zeros: '007' and '7' may be two products, so a column with such ids is text.
_INTEGER = "0|-?[1-9][0-9]*"
_NUMBER = "[+-]?([0-9]+[.]?[0-9]*|[.][0-9]+)([eE][+-]?[0-9]+)?"
# What all engines read alike.
_DATE = "[0-9]{4}[-/][0-9]{1,2}[-/][0-9]{1,2}"
_CLOCK = "([01]?[0-9]|2[0-3]):[0-5][0-9](:[0-5][0-9]([.][0-9]{1,9})?)?"
_ZONE = "(Z| UTC|[+-](0[0-9]|1[0-4])(:?[0-5][0-9])?)?"
_TIME = f"{_DATE}([ T]{_CLOCK}{_ZONE})?"
_NARROW_INTEGERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "UTINYINT", "USMALLINT", "UINTEGER"}
# Largest number of seconds whose microseconds fit in int64.
_MAX_SECONDS = 2**63 // 10**6


@dataclass(frozen=True)
class Cleaned:
    """What cleaning found out about the columns.

    Attributes:
        user_type: ``int64`` or ``string``.
        item_type: ``int64`` or ``string``.
        time_unit: ``as_given`` (the log's own whole numbers) or ``microseconds``.
        were_seconds: the microseconds were numbers with a fraction, and so seconds, in this log or one before it.
    """

    user_type: str
    item_type: str
    time_unit: str
    were_seconds: bool = False


def stage(engine: Engine, files: Sequence[LogFile], names: LogColumns, first: int = 0) -> Columns:
    """Read the files into the table ``log``, in the log's order, every value still as it was written; side columns as text.

    Args:
        engine: with no tables of a log.
        files: of the log.
        names: its columns.
        first: position of the first row.

    Returns:
        How the user, item and time columns are staged.

    Raises:
        InputError: a file is corrupt, a column has a type that cannot be used, or its type changes between files.
    """
    with duckdb.connect() as reader:
        queries = [file.query(names) for file in files]
        described = [read_log(reader, file, f"DESCRIBE {query[0]}", query[1]) for file, query in zip(files, queries)]
    # The first row of a description is the row number's.
    user, item, time = (
        _common_column(name, role < 3, [(file, str(description[role][1])) for file, description in zip(files, described)])
        for role, name in enumerate((names.user, names.item, names.time), start=1)
    )
    for place, name in enumerate(names.side):
        for file, description in zip(files, described):
            _check_side(name, file, str(description[4 + place][1]))
    engine.stage(files, names, (user, item, time), first)
    return user, item, time


def clean(
    engine: Engine,
    files: Sequence[LogFile],
    names: LogColumns,
    columns: Columns,
    expected: Cleaned | None = None,
    earlier: str = "",
) -> Cleaned:
    """Give every row of ``log`` its typed values or the reason why it is set aside: the table ``event``.

    Args:
        engine: with the table ``log``.
        files: of the log.
        names: its columns.
        columns: how they were staged.
        expected: what the columns must be read as; None to find out.
        earlier: query of clean events (position, time, user_id, item_id) that the log continues; their positions are lower.
            They become events too, and repeats of them are duplicates.

    Returns:
        The types that the columns turned out to have.

    Raises:
        InputError: an id column of a text log holds numbers with a fraction, or a column is not what is expected.
    """
    parse = files[0].format is not Format.PARQUET  # parquet says itself what is a string
    user_type = _id_type(engine, "user", names.user, columns[0], parse, expected.user_type if expected else "")
    item_type = _id_type(engine, "item", names.item, columns[1], parse, expected.item_type if expected else "")
    are_seconds = expected is not None and expected.were_seconds
    time, time_unit, were_seconds = _time(engine, columns[2], are_seconds)
    cleaned = Cleaned(user_type, item_type, time_unit, were_seconds or are_seconds)
    if expected is not None:
        _check_expected(files, names, cleaned, expected)
    union = f"UNION ALL SELECT position, time, user_id, item_id, CAST(NULL AS STRING) FROM ({earlier})" if earlier else ""
    engine.create(
        "event",
        f"""
        WITH typed AS (
            SELECT position, {time} AS time,
                {_id_value("user", user_type)} AS user_id, {_id_value("item", item_type)} AS item_id,
                CASE {_id_reasons("user", columns[0], user_type)} {_id_reasons("item", columns[1], item_type)}
                     WHEN time_raw IS NULL THEN 'null_timestamp' WHEN {time} IS NULL THEN 'bad_timestamp' END AS reason
            FROM log {union})
        SELECT position, user_id, item_id, time, CASE
            WHEN reason IS NULL AND row_number() OVER (PARTITION BY reason, user_id, item_id, time ORDER BY position) > 1
            THEN 'duplicate_event' ELSE reason END AS reason
        FROM typed""",
    )
    return cleaned


def drop_rare(engine: Engine, min_user_events: int, min_item_events: int, raw: bool = False) -> dict[str, int]:
    """Keep the largest set of events whose users and items all have enough of them: the table ``kept``.

    A key is the position where its user or item first appears among the clean rows, so that keys sort as the log does.

    Args:
        engine: with the table ``event``.
        min_user_events: the fewest events of a user.
        min_item_events: of an item.
        raw: items keep their ids, get no keys, and none is rare.

    Returns:
        The number of events lost, by reason.
    """
    least_of = {"user": min_user_events} if raw else {"user": min_user_events, "item": min_item_events}
    for role in least_of:
        engine.create(
            f"{role}_name",
            f"SELECT {role}_id, min(position) AS {role}_key FROM event WHERE reason IS NULL GROUP BY {role}_id",
        )
    item, names = ("item_id", "") if raw else ("item_key", "JOIN item_name USING (item_id)")
    engine.create(
        "kept",
        f"""
        SELECT position, user_key, {item}, time
        FROM event JOIN user_name USING (user_id) {names} WHERE reason IS NULL""",
    )
    lost = {"rare_user": 0, "rare_item": 0}
    while True:
        before = sum(lost.values())
        for role, least in least_of.items():
            rare = f"SELECT {role}_key FROM kept GROUP BY {role}_key HAVING count(*) < {least}"
            lost[f"rare_{role}"] += engine.remove("kept", f"{role}_key", rare)
        if sum(lost.values()) == before:
            return lost


def _check_expected(files: Sequence[LogFile], names: LogColumns, cleaned: Cleaned, expected: Cleaned) -> None:
    found = (cleaned.user_type, cleaned.item_type, cleaned.time_unit)
    wanted = (expected.user_type, expected.item_type, expected.time_unit)
    for name, is_type, must_be in zip(names, found, wanted):
        if is_type != must_be:
            hint = ""
            if is_type == "as_given":  # so the dataset's are microseconds
                hint = " (whole numbers, of a unit that nobody knows; write timestamps)"
            raise InputError(
                f"column {name!r} of {str(files[0].path)!r} is {is_type}{hint}, but the dataset's is {must_be}; write it so"
            )


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
    return next((column for column in found if column.sql_type == "DECIMAL(38,0)"), next(iter(found)))


def _check_side(name: str, file: LogFile, sql_type: str) -> None:
    column = _raw_column(sql_type)
    if sql_type != "BOOLEAN" and (column is None or column.kind not in ("integer", "text")):
        raise InputError(f"side column {name!r} of {str(file.path)!r} has type {sql_type}; {CATEGORICAL}")


def _raw_column(sql_type: str) -> RawColumn | None:
    if sql_type in _NARROW_INTEGERS:
        return RawColumn("integer", "BIGINT")
    if sql_type in ("UBIGINT", "HUGEINT") or re.fullmatch(r"DECIMAL\(\d+,0\)", sql_type):
        return RawColumn("integer", "DECIMAL(38,0)")
    if sql_type in ("FLOAT", "DOUBLE") or sql_type.startswith("DECIMAL"):
        return RawColumn("float", "DOUBLE")
    if sql_type.startswith("TIMESTAMP") or sql_type == "DATE":
        return RawColumn("timestamp", "BIGINT")
    return RawColumn("text", "STRING") if sql_type == "VARCHAR" else None


def _id_type(engine: Engine, role: str, name: str, column: RawColumn, parse: bool, expected: str) -> str:
    """Find the type of an id column; text of a text log is whole numbers if all of it is, and text is not ``expected``."""
    if column.kind == "integer":
        return "int64"
    if not parse or expected == "string":
        return "string"
    raw = f"{role}_raw"
    is_integer, is_number = f"matches({raw}, '{_INTEGER}')", f"matches({raw}, '{_NUMBER}')"
    query = f"""
        SELECT count(*), count(*) FILTER (WHERE {is_number}), min(position) FILTER (WHERE NOT {is_integer}),
            min(position) FILTER (WHERE {is_number} AND ({raw} LIKE '%.%' OR lower({raw}) LIKE '%e%'))
        FROM log WHERE {raw} <> ''"""
    total, numbers, first_text, first_float = engine.rows(query)[0]
    if first_text is None:
        return "int64"
    if expected:
        raise InputError(f"column {name!r} holds {_where(engine, raw, first_text)}, but the dataset's ids are {expected}")
    if numbers == total and first_float is not None:
        raise InputError(
            f"column {name!r} holds floats as ids (first {_where(engine, raw, first_float)}); "
            f"a float cannot hold every id, so write whole numbers or text"
        )
    return "string"


def _where(engine: Engine, raw: str, position: int) -> str:
    """Write a value of the log, with its place."""
    value = engine.rows(f"SELECT {raw} FROM log WHERE position = {position}")[0][0]
    is_in = f"{position} >= first AND {position} < first + num_rows"
    path, row = engine.rows(f"SELECT path, {position} - first + 1 FROM file WHERE {is_in}")[0]
    return f"{value!r} in {path!r}, row {row}"


def _id_value(role: str, id_type: str) -> str:
    return f"TRY_CAST({role}_raw AS BIGINT)" if id_type == "int64" else f"{role}_raw"


def _id_reasons(role: str, column: RawColumn, id_type: str) -> str:
    """Write the CASE branches that set a bad id aside."""
    raw = f"{role}_raw"
    reasons = f"WHEN {raw} IS NULL THEN 'null_{role}'"
    if column.kind == "text":
        reasons += f" WHEN {raw} = '' THEN 'empty_{role}'"
    if id_type == "int64":
        negative = f"{raw} LIKE '-%'" if column.kind == "text" else f"{raw} < 0"
        reasons += f" WHEN {negative} THEN 'negative_{role}' WHEN TRY_CAST({raw} AS BIGINT) IS NULL THEN '{role}_beyond_int64'"
    return reasons


def _time(engine: Engine, column: RawColumn, are_seconds: bool) -> tuple[str, str, bool]:
    """Write the expression that gives a row's time as int64, NULL where it has none; name its unit, and say if it was seconds.

    Whole numbers stay as they are. If one number of the log has a fraction, all are seconds and become microseconds, rounded;
    so they are, but for a column of integers, where ``are_seconds`` says it. Text is read as numbers or as ISO dates, whichever
    most rows allow; dates without a zone are in UTC.
    """
    if column.kind == "timestamp":
        return "time_raw", "microseconds", False
    if column.kind == "integer":
        return "TRY_CAST(time_raw AS BIGINT)", "as_given", False
    if column.kind == "text":
        text = "trim(time_raw)"
        # A decimal is exact, and wide enough for int64.
        number = f"CASE WHEN matches({text}, '{_NUMBER}') THEN TRY_CAST({text} AS DECIMAL(38,6)) END"
        date = f"CASE WHEN matches({text}, '{_TIME}') THEN micros(replace({text}, '/', '-')) END"
        numbers, dates = engine.rows(f"SELECT count({number}), count({date}) FROM log")[0]
        if dates > numbers:
            return date, "microseconds", False
    else:
        number = "CASE WHEN abs(time_raw) < 9.2e18 THEN time_raw END"  # no NaN, nor what int64 cannot hold
    num_fractions = f"SELECT count(*) FROM (SELECT {number} AS number FROM log) WHERE number % 1 <> 0"
    if not are_seconds and fetch_one(engine, num_fractions) == 0:
        return f"TRY_CAST({number} AS BIGINT)", "as_given", False
    micros = f"TRY_CAST(CASE WHEN abs({number}) < {_MAX_SECONDS} THEN round(({number}) * 1000000) END AS BIGINT)"
    return micros, "microseconds", True
