"""Output files: what is written comes back, in the encoding that its values call for."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glintru_rec.scoring.writer import FragmentWriter

RNG = np.random.default_rng(0)
LISTS = pa.array([0, 3, 3, 10], pa.int32())
TABLE = pa.table(
    {
        "user_id": pa.array([-7, None, 2**20]),
        "item_ids": pa.ListArray.from_arrays(LISTS, pa.array(RNG.integers(100_000, size=10))),
        "scores": pa.ListArray.from_arrays(LISTS, pa.array(RNG.random(10, dtype=np.float32))),
        "hashes": pa.ListArray.from_arrays(LISTS, pa.array(RNG.integers(2**62, size=10))),
        "large": pa.array([2**64 - 1, 2**64 - 3, None], pa.uint64()),
        "embedding": pa.FixedSizeListArray.from_arrays(pa.array(RNG.random(12, dtype=np.float32)), 4),
        "text": ["a", "", None],
        "nulls": pa.array([None] * 3, pa.int64()),
        "inner": [{"number": 1, "share": 0.5}, None, {"number": None, "share": None}],
        "day": pa.array([1, 2, 3], pa.int32()).cast(pa.date32()),
    }
)


@pytest.mark.parametrize("num_tables", [0, 1, 40])
def test_what_is_written_comes_back(num_tables, tmp_path, monkeypatch):
    monkeypatch.setattr("glintru_rec.scoring.writer._ROW_GROUP_BYTES", 5000)
    with FragmentWriter(tmp_path, "part.parquet", TABLE.schema) as files:
        for _ in range(num_tables):
            files.write_scores(TABLE)
    written = pq.read_table(tmp_path / "part.parquet")
    assert written.schema.equals(TABLE.schema)
    assert written.equals(pa.concat_tables([TABLE.schema.empty_table(), *[TABLE] * num_tables]))


def test_columns_have_the_encodings_of_their_first_rows(tmp_path):
    far = TABLE.set_column(1, "item_ids", TABLE["hashes"])  # later rows of a larger span are written all the same
    with FragmentWriter(tmp_path, "part.parquet", TABLE.schema) as files:
        files.write_scores(TABLE)
        files.write_scores(far)
    assert pq.read_table(tmp_path / "part.parquet").equals(pa.concat_tables([TABLE, far]))
    with FragmentWriter(tmp_path, "near.parquet", TABLE.schema) as files:
        files.write_scores(TABLE)
    group = pq.ParquetFile(tmp_path / "near.parquet").metadata.row_group(0)
    columns = {column.path_in_schema: column for column in map(group.column, range(group.num_columns))}
    differences = {path for path, column in columns.items() if "DELTA_BINARY_PACKED" in column.encodings}
    assert differences == {"user_id", "item_ids.list.element", "large"}
    compressed = {path for path, column in columns.items() if column.compression == "ZSTD"}
    assert compressed == {"hashes.list.element", "text", "nulls", "inner.number", "day"}
