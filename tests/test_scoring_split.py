"""A catalog shared by ranks and threads: the output of one search of the whole, to the byte. And never a copy of the table."""

import dataclasses

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from glintru_rec import GlintRU
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import export_artifact
from glintru_rec.export.item_files import VECTORS_FILE, read_items, write_items
from glintru_rec.export.mapped_array import map_read_only
from glintru_rec.export.scoring_module import MAX_BLOCK_CELLS, MAX_BLOCK_ITEMS, ScoringModule, block_items
from glintru_rec.scoring import ScoreConfig, score
from tests.conftest import run_program

NUM_ITEMS, WIDTH = 3 * MAX_BLOCK_ITEMS + 100, 8


@pytest.fixture(scope="module", params=["bias", "cosine"])
def artifact(request, tmp_path_factory):
    """Vectors of few values: many items have equal scores."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("artifact") / "artifact"
    has_bias = request.param == "bias"
    vectors = torch.randint(-2, 3, (NUM_ITEMS, WIDTH + has_bias)).float()
    vocabulary = Vocabulary(pa.array(range(NUM_ITEMS)), np.ones(NUM_ITEMS, dtype=np.int64))
    options = {"max_seq_len": 20, "encoder_config": {}, "provenance": {}}
    export_artifact(GlintRU(WIDTH), "dot" if has_bias else "cosine", vectors, vocabulary, folder, **options)
    return str(folder)


def item_file(path, items):
    pq.write_table(pa.table({"item_id": items}), path)
    return str(path)


@pytest.fixture
def config(artifact, tmp_path):
    """Three files of unlike sizes: a rank has batches left when the others have none."""
    (tmp_path / "in").mkdir()
    generator = np.random.default_rng(0)
    for number, num_rows in enumerate((50, 9, 3)):
        histories = [generator.integers(NUM_ITEMS, size=size) for size in generator.integers(1, 30, num_rows)]
        table = pa.table({"user_id": range(num_rows), "history": histories})
        pq.write_table(table, tmp_path / "in" / f"part-{number}.parquet")
    return ScoreConfig(artifact, str(tmp_path / "in"), str(tmp_path / "whole"), "top_k", top_k=300, batch_size=16)


def outputs(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.parquet"))}


@pytest.mark.parametrize("lists", ["none", "few", "most"])
def test_threads_that_share_the_catalog_find_what_one_search_finds(config, tmp_path, lists):
    if lists == "few":
        few = np.arange(0, NUM_ITEMS, 3)
        assert MAX_BLOCK_ITEMS < len(few) < NUM_ITEMS / 2
        config = dataclasses.replace(config, allow=item_file(tmp_path / "allow.parquet", few))
    elif lists == "most":
        config = dataclasses.replace(config, deny=item_file(tmp_path / "deny.parquet", np.arange(0, NUM_ITEMS, 5)))
    score(config)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        score(dataclasses.replace(config, output=str(tmp_path / "split"), catalog="split"))
    finally:
        torch.set_num_threads(before)
    assert len(outputs(tmp_path / "whole")) == 3
    assert outputs(tmp_path / "split") == outputs(tmp_path / "whole")


@pytest.mark.programs
@pytest.mark.parametrize("artifact", ["bias"], indirect=True)
def test_ranks_that_share_the_catalog_write_what_one_process_writes(config, tmp_path):
    """Two ranks, to an address; one process goes on where they were, and finds nothing to do."""
    score(config)
    split = dataclasses.replace(config, output=f"local://{tmp_path / 'split'}", catalog="split")
    keys = ("artifact", "input", "output", "mode", "top_k", "batch_size", "catalog")
    run_program("score", *(f"{key}={getattr(split, key)}" for key in keys), nproc=2)
    assert outputs(tmp_path / "split") == outputs(tmp_path / "whole")
    report = score(dataclasses.replace(split, catalog="whole"))
    assert (report.rows_scored, report.timing.fragments_now) == (62, 0)


def test_only_top_k_shares_its_catalog():
    with pytest.raises(InputError, match="catalog is 'split'; it must be whole, as mode is 'encode'"):
        ScoreConfig("a", "i", "o", "encode", catalog="split")
    with pytest.raises(InputError, match="catalog is 'split'; it must be whole, as device is 'cuda'"):
        ScoreConfig("a", "i", "o", "top_k", catalog="split", device="cuda")


def test_blocks_of_any_batch_begin_where_those_of_a_larger_one_do():
    sizes = [block_items(MAX_BLOCK_CELLS, batch, width) for batch in (1, 256, 257, 1000, 5000) for width in (1, 64, 1025)]
    assert max(sizes) == MAX_BLOCK_ITEMS
    assert all(large % small == 0 for large in sizes for small in sizes if small <= large)


class Largest(TorchDispatchMode):
    """Watch for the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {each.untyped_storage().data_ptr() for each in tree_leaves((args, kwargs)) if isinstance(each, torch.Tensor)}
        result = function(*args, **kwargs or {})
        made = [each.untyped_storage() for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
        self.num_bytes = max(self.num_bytes, *(each.nbytes() for each in made if each.data_ptr() not in given), 0)
        return result


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_a_search_makes_no_tensor_as_large_as_the_table(precision, tmp_path):
    """A million items: no more than a block of them is ever turned into float32."""
    num_items, width = 1_000_000, 64
    rows = torch.randn(1000, width).repeat(num_items // 1000, 1)
    write_items(rows, width, False, precision, tmp_path)
    module = ScoringModule(GlintRU(width), rows[:0], "dot", 20, precision=precision)
    module.open_items(str(tmp_path))
    query, nothing, lengths = torch.randn(8, width), torch.zeros(0, dtype=torch.int64), torch.zeros(8, dtype=torch.int64)
    with Largest() as largest:
        ids, scores = module.top_k_of(query, nothing, lengths, 5)
    assert 0 < largest.num_bytes <= 4 * width * MAX_BLOCK_ITEMS
    assert largest.num_bytes < module.item_vectors.untyped_storage().nbytes() / 3
    stored = read_items(tmp_path)[:1000]
    best = (query.double() @ stored.double().t()).topk(1, dim=1)
    # The thousand rows come again and again; the first five copies of the best win.
    assert torch.equal(ids, best.indices + 1000 * torch.arange(5))
    torch.testing.assert_close(scores, best.values.float().expand(-1, 5), rtol=1e-5, atol=1e-5)


def test_a_table_larger_than_memory_is_mapped(tmp_path):
    """A sparse file of a terabyte takes no disk."""
    path = tmp_path / VECTORS_FILE
    shape = (2**32, 64)
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        file.truncate(file.tell() + 4 * shape[0] * shape[1])
    table = map_read_only(path)
    assert (table.shape, table.dtype) == (shape, torch.float32)
    assert not table[2**31].any()
    np.save(tmp_path / "doubles.npy", np.zeros(3))
    with pytest.raises(ValueError, match="holds float64, not float32, float16 or int8"):
        map_read_only(tmp_path / "doubles.npy")
