"""Write the output of one fragment whole or not at all."""

import io
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from glintru_rec.files import aside_of, publish

REJECTS_FOLDER = "rejects"
UNKNOWN_CANDIDATES_FOLDER = "unknown_candidates"
# The last one is encoded when all else is done, so a job ends that much later.
_ROW_GROUP_BYTES = 16 << 20
# Integers of such a span take about as many bits as differences as they do by a dictionary.
_CLOSE = 1 << 24


class FragmentWriter:
    """The output files of one input fragment; used as a context.

    Files grow under hidden names. At the end of the context they are synced and take their own names, the scores last. After
    an error none of them is left.

    Args:
        output: folder of the job's output.
        name: of the files, in ``output`` and in the folders beside the scores.
        schema: of the scores.
    """

    def __init__(self, output: Path, name: str, schema: pa.Schema):
        self._output = output
        self._name = name
        self._files: dict[str, _GrowingFile] = {}
        self._scores = _GrowingFile(output / name, schema)

    def write_scores(self, table: pa.Table) -> None:
        """Add scored rows."""
        self._scores.write(table)

    def write_beside(self, folder: str, table: pa.Table) -> None:
        """Add rows to the file in ``folder``, which is made for the first row."""
        if not len(table):
            return
        if folder not in self._files:
            (self._output / folder).mkdir(exist_ok=True)
            self._files[folder] = _GrowingFile(self._output / folder / self._name, table.schema)
        self._files[folder].write(table)

    def sizes(self) -> dict[str, int]:
        """Give the bytes of the written files, by their names in ``output``; after the end of the context."""
        names = [self._name, *(f"{folder}/{self._name}" for folder in self._files)]
        return {name: (self._output / name).stat().st_size for name in sorted(names)}

    def __enter__(self) -> "FragmentWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        files = [*self._files.values(), self._scores]
        try:
            for file in files:
                file.close()
            if error is None:
                for file in files:
                    file.publish()
        finally:
            for file in files:
                file.discard()


class _GrowingFile:
    """A parquet file under a hidden name, in row groups of a bounded size."""

    def __init__(self, path: Path, schema: pa.Schema):
        self._path = path
        self._aside = aside_of(path)
        self._schema = schema
        self._writer: pq.ParquetWriter | None = None
        self._pending: list[pa.Table] = []

    def write(self, table: pa.Table) -> None:
        self._pending.append(table)
        if sum(part.nbytes for part in self._pending) >= _ROW_GROUP_BYTES:
            self._flush()

    def close(self) -> None:
        self._flush().close()

    def publish(self) -> None:
        publish(self._aside, self._path)

    def discard(self) -> None:
        self._aside.unlink(missing_ok=True)

    def _flush(self) -> pq.ParquetWriter:
        table = pa.concat_tables(self._pending) if self._pending else self._schema.empty_table()
        if self._writer is None:
            self._writer = pq.ParquetWriter(self._aside, self._schema, **_encodings(table))
        if len(table):
            self._writer.write_table(table)
        self._pending = []
        return self._writer


def _encodings(table: pa.Table) -> dict[str, Any]:
    """Choose how a file's columns are written, by its first rows.

    Scores and vectors are noise to a dictionary and a compressor. Differences are packed in half the time of a dictionary.
    """
    empty = io.BytesIO()
    pq.write_table(table.schema.empty_table(), empty)
    kinds = {column.path: column.physical_type for column in pq.ParquetFile(empty).schema}
    close = [path for path in kinds if _are_close(table, path)]
    others = [path for path, kind in kinds.items() if kind not in ("FLOAT", "DOUBLE") and path not in close]
    return {
        "compression": dict.fromkeys(kinds, "none") | dict.fromkeys(others, "zstd"),
        "use_dictionary": others,
        "column_encoding": dict.fromkeys(close, "DELTA_BINARY_PACKED"),
    }


def _are_close(table: pa.Table, path: str) -> bool:
    """Say whether a column, or the lists of a column, hold integers, and those of a small span."""
    name = path.removesuffix(".list.element")
    if name not in table.schema.names:
        return False
    values = table[name] if name == path else pc.list_flatten(table[name])
    if not pa.types.is_integer(values.type):
        return False
    low, high = pc.min_max(values).values()
    return low.is_valid and high.as_py() - low.as_py() < _CLOSE
