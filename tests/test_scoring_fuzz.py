"""Whatever a parquet file holds: its rows are scored or set aside, or a file that is no input is refused by name."""

from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from glintru_rec import GlintRU
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import export_artifact
from glintru_rec.scoring import ScoreConfig, score

NUM_ITEMS = 20
INTEGERS = [pa.int8(), pa.int32(), pa.int64(), pa.uint64()]
TEXTS = [pa.string(), pa.large_string(), pa.string_view()]
DICTIONARIES = [pa.dictionary(pa.int32(), kind) for kind in (pa.int64(), pa.string())]
OTHERS = [pa.float64(), pa.bool_(), pa.binary(), pa.date32(), pa.decimal128(9, 2), pa.struct([("history", pa.int64())])]


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("artifacts")
    options = {"max_seq_len": 10, "encoder_config": {}, "provenance": {}}
    for name, ids in {"int64": range(NUM_ITEMS), "string": [f"i{i}" for i in range(NUM_ITEMS)]}.items():
        vocabulary = Vocabulary(pa.array(ids), np.ones(NUM_ITEMS, dtype=np.int64))
        export_artifact(GlintRU(8, num_heads=2), "dot", torch.randn(NUM_ITEMS, 8), vocabulary, folder / name, **options)
    return folder


@st.composite
def columns(draw, kinds, num_rows, as_lists):
    """A column of a type, of plain values or lists of them, some of them null."""
    kind = draw(st.sampled_from(kinds))
    value_type = kind.value_type if pa.types.is_dictionary(kind) else kind
    if pa.types.is_integer(value_type):
        largest = 2 ** (value_type.bit_width - pa.types.is_signed_integer(value_type)) - 1
        values = st.sampled_from([0, 5, NUM_ITEMS - 1, NUM_ITEMS, largest])
    else:
        texts = st.sampled_from(["i0", "i5", f"i{NUM_ITEMS}", "", "\0ü"])
        values = texts if value_type in TEXTS else st.none()
    values = st.one_of(st.none(), values)
    if not as_lists:
        flat = pa.array(draw(st.lists(values, min_size=num_rows, max_size=num_rows)), value_type)
        return flat.dictionary_encode() if kind != value_type else flat
    lists = draw(st.lists(st.one_of(st.none(), st.lists(values, max_size=4)), min_size=num_rows, max_size=num_rows))
    list_of = draw(st.sampled_from([pa.list_, pa.large_list] * 3 + [pa.list_view]))
    if kind == value_type:
        return pa.array(lists, list_of(kind))
    flat = pa.array([value for items in lists for value in items or []], value_type).dictionary_encode()
    return pa.ListArray.from_arrays(pa.array(np.cumsum([0, *(len(items or []) for items in lists)]), pa.int32()), flat)


@st.composite
def tables(draw):
    num_rows = draw(st.integers(0, 40))
    ids = draw(st.sampled_from([[*INTEGERS, DICTIONARIES[0]], [*TEXTS, DICTIONARIES[1]], [pa.null(), *OTHERS]]))
    odd = st.integers(0, 9).map(lambda number: number == 0)
    names = ["user_id", "history", "candidates", draw(st.sampled_from(["extra", "extra", "history", "User_id"]))]
    parts = [draw(columns([*INTEGERS, *TEXTS, *DICTIONARIES], num_rows, draw(odd)))]
    parts += [draw(columns(ids, num_rows, not draw(odd))) for _ in range(3)]
    return pa.Table.from_arrays(parts, names), ids


def is_input(table, vocabulary_kinds, mode):
    """Whether a table is what `score` promises to take: some rows, and columns that are there once, of the right types."""
    lists = ["history", "candidates"] if mode == "candidates" else ["history"]
    kinds = {name: table.schema.field(name).type for name in ["user_id", *lists] if table.column_names.count(name) == 1}
    if not len(table) or len(kinds) < 1 + len(lists) or kinds["user_id"] not in [*INTEGERS, *TEXTS, *DICTIONARIES]:
        return False
    are_lists = all(pa.types.is_list(kinds[name]) or pa.types.is_large_list(kinds[name]) for name in lists)
    return are_lists and all(kinds[name].value_type in [*vocabulary_kinds, pa.null()] for name in lists)


@settings(max_examples=80, deadline=None)
@given(
    table_and_ids=tables(),
    damage=st.one_of(st.just([]), st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), max_size=5)),
    mode=st.sampled_from(["candidates", "top_k", "encode"]),
    batch_size=st.sampled_from([1, 5, 64]),
    row_group_size=st.sampled_from([1, 7, 1000]),
)
def test_rows_are_scored_or_set_aside_or_the_file_is_refused(
    artifacts, table_and_ids, damage, mode, batch_size, row_group_size
):
    table, ids = table_and_ids
    ids = [kind for kind in ids if kind not in OTHERS]
    artifact = artifacts / ("string" if TEXTS[0] in ids else "int64")
    with TemporaryDirectory() as folder:
        source, output = Path(folder) / "in.parquet", Path(folder) / "out"
        pq.write_table(table, source, row_group_size=row_group_size, write_page_checksum=True)
        content = bytearray(source.read_bytes())
        for place, byte in damage:
            content[int(place * len(content))] = byte
        source.write_bytes(content)
        refused = None
        try:
            report = score(ScoreConfig(str(artifact), str(source), str(output), mode, top_k=3, batch_size=batch_size))
        except InputError as error:
            refused = str(error)
        if refused is not None:
            assert "in.parquet" in refused
            assert damage or not is_input(table, ids, mode), refused
            return
        if report.failed:
            assert damage
            assert "in.parquet" in report.failed["in.parquet"]
            assert not list(output.glob("*.parquet"))
            return
        written = pq.read_table(output / "in.parquet", partitioning=None)
        rejects = output / "rejects" / "in.parquet"
        num_rejects = pq.read_metadata(rejects).num_rows if rejects.exists() else 0
    assert report.rows_in == len(written) + num_rejects == report.rows_scored + sum(report.rows_set_aside.values())
    if not damage:
        assert report.rows_in == len(table)
    if mode != "encode":
        assert set(written["item_ids"].combine_chunks().flatten().to_pylist()) <= {
            *range(NUM_ITEMS),
            *(f"i{i}" for i in range(NUM_ITEMS)),
        }
