"""Logs are recognised by what they hold; what cannot be read says so by name."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from glintru_rec.data.formats import Format, LogColumns, find_files, open_log, recognise
from glintru_rec.errors import InputError

NAMES = LogColumns("user_id", "item_id", "timestamp")


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns or {"user_id": [1], "item_id": [2], "timestamp": [3]}), path)


@pytest.mark.parametrize(
    ("text", "expected", "delimiter"),
    [
        ("user_id,item_id,timestamp\n1,2,3\n", Format.CSV, ","),
        ("timestamp;item_id;rating;user_id\n1;2;3;4\n", Format.CSV, ";"),
        ("user_id\titem_id\ttimestamp\n1\t2\t3\n", Format.CSV, "\t"),
        ("item_id|user_id|timestamp\n", Format.CSV, "|"),
        ("\ufeffuser_id,item_id,timestamp\r\n1,2,3\r\n", Format.CSV, ","),
        ('"user_id","item_id","title, year","timestamp"\n1,2,x,3\n', Format.CSV, ","),
        ("user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t2\t3\t4\n", Format.RECBOLE, "\t"),
        ("1::1193::5::978300760\n", Format.MOVIELENS_DAT, "::"),
        ("196\t242\t3\t881250949\n", Format.MOVIELENS_DATA, "\t"),
    ],
)
def test_text_is_recognised_by_content(tmp_path, text, expected, delimiter):
    path = tmp_path / "log.parquet"  # the name lies
    path.write_text(text, encoding="utf-8", newline="")
    log = recognise(path, NAMES)
    assert log.format is expected
    assert log.delimiter == delimiter
    assert set(NAMES) <= set(log.columns)


def test_parquet_is_recognised_by_content(tmp_path):
    write_parquet(tmp_path / "log.csv")
    assert recognise(tmp_path / "log.csv", NAMES).format is Format.PARQUET


def test_files_come_in_name_order(tmp_path):
    for name in ("b.csv", "a.csv", "sub/c.csv", "_SUCCESS", ".hidden.csv", "_temporary/x.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("user_id,item_id,timestamp\n")
    names = [str(file.relative_to(tmp_path)) for file in find_files(str(tmp_path))]
    assert names == ["a.csv", "b.csv", "sub/c.csv"]
    assert [file.name for file in find_files(f"{tmp_path}/*.csv")] == ["a.csv", "b.csv"]
    assert [file.name for file in find_files(f"{tmp_path}/**/c.csv")] == ["c.csv"]
    assert find_files(str(tmp_path / "b.csv")) == [tmp_path / "b.csv"]


def test_no_file_matches(tmp_path):
    for location in (str(tmp_path), f"{tmp_path}/*.parquet", f"{tmp_path}/absent.csv"):
        with pytest.raises(InputError, match="matches no file"):
            open_log(location, NAMES)


def test_mixed_formats_name_two_files(tmp_path):
    write_parquet(tmp_path / "a.parquet")
    (tmp_path / "b.csv").write_text("user_id,item_id,timestamp\n1,2,3\n")
    with pytest.raises(InputError, match=r"mixes formats: .*a\.parquet.*b\.csv"):
        open_log(str(tmp_path), NAMES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"log\.x' is empty"),
        (b"PAR1 and then nothing of parquet", r"log\.x' starts like parquet but cannot be read"),
        (b"\x1f\x8b\x08\x00\x00\x00", "of no known format"),
        ("user_id,item_id,timestamp\n1,2,3\n".encode("utf-16"), "of no known format"),
        (b"\n\n", "of no known format"),
        (b"1,2,3\n4,5,6\n", "'1,2,3', which is not a header"),
        (b"user_id,product,timestamp\n1,2,3\n", r"no column 'item_id'; it has 'user_id', 'product', 'timestamp'"),
        (b"user_id:token\tname:token\n1\tx\n", r"RecBole .inter\) has no column 'item_id'; it has 'user_id', 'name'"),
        (b"user_id,item_id,timestamp,User_ID\n1,2,3,4\n", "several columns called 'user_id'"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    (tmp_path / "log.x").write_bytes(content)
    with pytest.raises(InputError, match=message):
        recognise(tmp_path / "log.x", NAMES)


def test_truncated_parquet(tmp_path):
    write_parquet(tmp_path / "log.parquet")
    whole = (tmp_path / "log.parquet").read_bytes()
    (tmp_path / "log.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"log\.parquet' starts like parquet but cannot be read"):
        recognise(tmp_path / "log.parquet", NAMES)


def test_parquet_lacks_a_column(tmp_path):
    write_parquet(tmp_path / "log.parquet", user_id=[1], item=[2], timestamp=[3])
    with pytest.raises(InputError, match="no column 'item_id'; it has 'user_id', 'item', 'timestamp'"):
        recognise(tmp_path / "log.parquet", NAMES)
