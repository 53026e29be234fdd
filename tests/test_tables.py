"""The item table under every sharding, on 1, 2 and 4 gloo ranks: one model, one checkpoint, one evaluation.

The ranks are those of tests/table_ranks.py, which ends with files; here they are compared with an unsharded model in
float64, and with one another.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.testing import assert_close

from glintru_rec.config import compose
from glintru_rec.errors import InputError
from glintru_rec.programs.export import ExportConfig, export_run
from glintru_rec.tables import item_table
from glintru_rec.tables.config import TableConfig
from glintru_rec.tables.item_table import ItemTable, fill_rows
from glintru_rec.tables.sharding import TABLE_KEY
from glintru_rec.training.build import build_model, load_unsharded
from glintru_rec.training.checkpoint import load_plain
from glintru_rec.training.config import TrainConfig
from tests import table_ranks
from tests.conftest import REPOSITORY, environment
from tests.table_ranks import LOADS, LOADS_OF_WEIGHTS, MORE_STEPS, NUM_ITEMS, RANKED, STEPS, TABLES, WIDTH, WORLD_SIZES

EXACT = [name for name in TABLES if "fp16" not in name]
FP16 = [name for name in TABLES if "fp16" in name]


@pytest.fixture(scope="module")
def ranks(dataset_dir, tmp_path_factory) -> Path:
    """What the ranks have written."""
    out = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "tests.table_ranks", str(out), str(dataset_dir)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (out / "stdout").write_text(done.stdout)
    return out


def read(ranks: Path, kind: str) -> dict[int, list[dict]]:
    """Results of every rank, by the number of ranks."""
    files = {size: [ranks / f"{kind} {rank} of {size}.pt" for rank in range(size)] for size in WORLD_SIZES}
    return {size: [torch.load(path) for path in paths] for size, paths in files.items()}


@pytest.fixture(scope="module")
def trained(ranks) -> dict[int, list[dict]]:
    return read(ranks, "trained")


@pytest.fixture(scope="module")
def loaded(ranks) -> dict[int, list[dict]]:
    return read(ranks, "loaded")


def join(parts_of_ranks: list[list[tuple[tuple[int, ...], Tensor]]], shape: tuple[int, ...]) -> Tensor:
    """Put the ranks' parts of a tensor together; copies must be alike, and nothing may be left out."""
    whole = torch.full(shape, torch.nan)
    for at, part in itertools.chain.from_iterable(parts_of_ranks):
        place = tuple(slice(begin, begin + size) for begin, size in zip(at, part.shape))
        assert whole[place].isnan().all() or torch.equal(whole[place], part.float())
        whole[place] = part.float()
    assert not whole.isnan().any()
    return whole


def table_of(results: list[dict]) -> Tensor:
    return join([result["table"] for result in results], (NUM_ITEMS, WIDTH))


def state_of(results: list[dict]) -> dict[str, Tensor]:
    """The table's optimizer state."""
    states = [result["state"] for result in results]
    names = {name: part for state in states for name, parts in state.items() for part in parts}
    shapes = {name: (NUM_ITEMS, *part.shape[1:-1], *[WIDTH] * (part.dim() - 1)) for name, (_, part) in names.items()}
    return {name: join([state.get(name, []) for state in states], shape) for name, shape in shapes.items()}


def losses_of(results: list[dict]) -> list[Tensor]:
    """The losses of all targets, in the batch's order, step by step."""
    return [torch.cat(losses) for losses in zip(*(result["losses"] for result in results))]


@pytest.fixture(scope="module")
def plain(trained) -> dict[str, tuple]:
    """Losses, tables and encoders of an unsharded model in float64, by the sharded one's name."""
    runs: dict[tuple[str, str], tuple] = {}
    of_name = {}
    for name in TABLES:
        config = table_ranks.config_of(name)
        kind = config.table.optimizer, config.table.dtype
        if kind not in runs:
            rows = table_of([trained[1][0][name]["first"]])
            runs[kind] = table_ranks.run_plain(build_model(config, NUM_ITEMS, torch.device("cpu")), rows, kind[0])
        of_name[name] = runs[kind]
    return of_name


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", TABLES)
def test_first_values_follow_from_the_seed_alone(name, world_size, trained):
    rows = table_of([result[name]["first"] for result in trained[world_size]])
    assert torch.equal(rows, table_of([trained[1][0][name]["first"]]))
    if name in EXACT and name != "replicated":
        assert torch.equal(rows, table_of([trained[1][0]["row_wise"]["first"]]))
    assert rows.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", EXACT)
def test_sharded_equals_unsharded(name, world_size, trained, plain):
    results = [result[name] for result in trained[world_size]]
    losses, tables, encoders = plain[name]
    for ours, true in zip(losses_of(results), losses[:STEPS], strict=True):
        assert_close(ours.double(), true, rtol=0, atol=1e-5)
    table = table_of([result["last"] for result in results])
    assert_close(table.double(), tables[STEPS - 1], rtol=0, atol=1e-5)
    assert (table - table_of([result["first"] for result in results])).abs().max() > 0.01
    for result in results:
        for key, weight in encoders[STEPS - 1].items():
            assert_close(result["last"]["encoder"][key].double(), weight, rtol=0, atol=1e-5)


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", FP16)
def test_fp16_rows_round_once_a_step(name, world_size, trained, plain):
    results = [result[name] for result in trained[world_size]]
    table = table_of([result["last"] for result in results])
    assert table.abs().max() < 0.5  # so that rounding errs by 2^-12 at most
    assert_close(table.double(), plain[name][1][STEPS - 1], rtol=0, atol=STEPS * 2**-12)
    assert {part.dtype for result in results for _, part in result["last"]["table"]} == {torch.float16}


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(
    "names",
    [
        ("row_wise", "table_wise", "auto"),
        ("row_wise adagrad", "table_wise adagrad", "column_wise adagrad"),
        ("row_wise sgd", "column_wise sgd"),
        ("row_wise fp16 adagrad", "column_wise fp16"),
    ],
)
def test_shardings_agree_to_the_bit(names, world_size, trained):
    """The same sums in the same order: what differs is who does them."""
    first, *others = ([result[name] for result in trained[world_size]] for name in names)
    for other in others:
        assert all(torch.equal(*pair) for pair in zip(losses_of(first), losses_of(other), strict=True))
        assert torch.equal(table_of([result["last"] for result in first]), table_of([result["last"] for result in other]))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("source", "into"), LOADS)
def test_checkpoints_load_under_other_shardings(source, into, world_size, trained, loaded, plain):
    """Weights and optimizer state to the bit; and training goes on as if nothing had happened."""
    name, saved_by = source.split(" of ")
    saved = [result[name]["last"] for result in trained[int(saved_by)]]
    results = [result[source, into] for result in loaded[world_size]]
    assert torch.equal(table_of([result["loaded"] for result in results]), table_of(saved))
    ours, theirs = state_of([result["loaded"] for result in results]), state_of(saved)
    assert ours.keys() == theirs.keys() == {"t_item.momentum1"}
    assert torch.equal(ours["t_item.momentum1"], theirs["t_item.momentum1"])
    assert theirs["t_item.momentum1"].any()
    if into in EXACT:
        for loss, true in zip(losses_of(results), plain[name][0][STEPS:], strict=True):
            assert_close(loss.double(), true, rtol=0, atol=1e-5)
    assert len(losses_of(results)) == MORE_STEPS


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize(("source", "into"), LOADS_OF_WEIGHTS)
def test_weights_load_across_optimizers(source, into, world_size, trained, loaded):
    name, saved_by = source.split(" of ")
    saved = [result[name]["last"] for result in trained[int(saved_by)]]
    results = [result[source, into]["loaded"] for result in loaded[world_size]]
    assert torch.equal(table_of(results), table_of(saved))
    assert all(torch.equal(results[0]["encoder"][key], weight) for key, weight in saved[0]["encoder"].items())


@pytest.mark.parametrize("name", TABLES)
def test_checkpoints_have_one_key_space_and_are_read_whole(name, ranks, trained):
    def keys(name: str, world_size: int) -> set[str]:
        return set(FileSystemReader(ranks / f"{name} of {world_size}").read_metadata().state_dict_metadata)

    row_wise = {"rowwise_adagrad": "row_wise", "adagrad": "row_wise adagrad", "sgd": "row_wise sgd", "adamw": "replicated"}
    like = keys(row_wise[table_ranks.config_of(name).table.optimizer], 1)
    model = build_model(table_ranks.config_of("replicated"), NUM_ITEMS, torch.device("cpu"))
    for world_size in WORLD_SIZES:
        assert keys(name, world_size) == like
        load_plain(ranks / f"{name} of {world_size}", model)
        saved = [result[name]["last"] for result in trained[world_size]]
        assert torch.equal(model.state_dict()[TABLE_KEY], table_of(saved))


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", TABLES)
def test_plans_say_what_ranks_hold(name, world_size, trained):
    results = [result[name] for result in trained[world_size]]
    for rank, result in enumerate(results):
        parts = [part for kind in (result["last"]["table"], *result["last"]["state"].values()) for _, part in kind]
        assert result["plan"] == results[0]["plan"]
        assert result["plan"]["bytes_per_rank"][rank] == sum(part.numel() * part.element_size() for part in parts)
    plan = results[0]["plan"]
    assert plan["sharding"] in (("row_wise", "table_wise") if name == "auto" else (name.split()[0],))
    assert (plan["chosen_for"] is not None) == (name == "auto")


@pytest.mark.parametrize("world_size", WORLD_SIZES)
@pytest.mark.parametrize("name", RANKED)
def test_evaluation_does_not_depend_on_the_sharding(name, world_size, trained):
    like = "row_wise fp16" if name in FP16 else "row_wise"
    expected = trained[1][0][like]["metrics"]
    for result in trained[world_size]:
        assert result[name]["metrics"] == pytest.approx(expected, rel=1e-12)


def test_refusals(trained):
    for world_size in WORLD_SIZES:
        for result in trained[world_size]:
            refused = result["refused"]
            assert "it needs CUDA" in refused["kernel"]
            assert "found no room: the table and its optimizer state take 6.33 GiB" in refused["memory"]
            assert ("found no room" in refused["half"]) == (world_size == 1)  # 6.8 MB, of which a rank has room for 5.4
            assert (f"multiple of {4 * world_size} in all" in refused["columns"]) == (world_size > 1)
            assert ("2 items spread by rows over 4 ranks" in refused["rows"]) == (world_size == 4)


def test_programs(ranks, tmp_path):
    """Runs of two ranks: trained, evaluated, exported; the one whose table had one rank went on by rows on one."""
    printed = (ranks / "stdout").read_text()
    for name, bytes_per_rank in (("table_wise", [60 * 16 * 4 + 60 * 4, 0]), ("column_wise adagrad", [60 * 8 * 4 * 2] * 2)):
        run = ranks / f"{name} run"
        records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        (at_four,) = (record for record in records if record["kind"] == "valid" and record["step"] == 4)
        evaluated = json.loads((ranks / f"{name} run.json").read_text())["metrics"]
        assert evaluated["ndcg@10"] == pytest.approx(at_four["ndcg@10"], rel=1e-12)
        assert f"item table: {name.split()[0]}, fp32" in printed
        assert f"{bytes_per_rank[0]:,}" in printed
        if name != "table_wise":
            assert json.loads((run / "plan.json").read_text())["bytes_per_rank"] == bytes_per_rank
    resumed = ranks / "table_wise run"
    assert json.loads((resumed / "finished.json").read_text())["steps"] == 6
    assert json.loads((resumed / "plan.json").read_text())["sharding"] == "row_wise"
    assert "kernel: fused_uvm_caching" in (ranks / "column_wise adagrad run/config.yaml").read_text()
    export_run(ExportConfig(str(ranks / "column_wise adagrad run"), str(tmp_path / "artifact")))
    vectors = torch.from_numpy(np.load(tmp_path / "artifact/item_vectors.npy"))
    assert torch.equal(vectors, load_unsharded(ranks / "column_wise adagrad run").model.state_dict()[TABLE_KEY])


@pytest.mark.parametrize("cuts", [[0, 37], [0, 1, 4, 5, 36, 37], [0, 13, 13, 37]])
def test_rows_do_not_depend_on_the_cut(cuts, monkeypatch):
    monkeypatch.setattr(item_table, "ROWS_PER_DRAW", 5)
    table = ItemTable(37, 8, TableConfig(), torch.device("meta"), item_bias=True)
    whole = torch.full((37, 12), torch.nan)
    fill_rows(whole, 0, 0, table, std=3.0, seed=1)
    assert not whole[:, 8:].any()
    assert whole[:, :8].std().item() == pytest.approx(3, rel=0.1)
    assert whole[:, :8].unique().numel() == 37 * 8  # no row starts as a copy of another
    for first, last in itertools.pairwise(cuts):
        for left, right in itertools.pairwise([0, 4, 12]):
            part = torch.full((last - first, right - left), torch.nan)
            fill_rows(part, first, left, table, std=3.0, seed=1)
            assert torch.equal(part, whole[first:last, left:right])
    other = torch.empty_like(whole)
    fill_rows(other, 0, 0, table, std=3.0, seed=2)
    assert (other != whole)[:, :8].all()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["table.sharding=grid"],
            "table.sharding is 'grid'; it must be one of row_wise, table_wise, column_wise, auto",
        ),
        (["table=column_wise", "table.optimizer=rowwise_adagrad"], "its one step size per row would become one per column"),
        (["table=table_wise", "table.optimizer=adamw"], "table.optimizer=adamw needs table.sharding=replicated"),
        (["table.kernel=ssd"], "table.kernel is 'ssd'; it must be one of fused, fused_uvm_caching"),
        (["table=replicated", "table.kernel=fused_uvm_caching"], "table.kernel=fused_uvm_caching needs a sharded table"),
        (["table.cache_load_factor=0"], "table.cache_load_factor is 0.0; it must be greater than 0 and at most 1"),
        (["table=auto", "table.topology.memory_gib=-1"], "table.topology.memory_gib is -1.0; it must be greater than 0"),
        (["table=auto", "table.topology.ids_per_step=0"], "table.topology.ids_per_step is 0; it must be at least 1"),
    ],
)
def test_config_errors(overrides, message):
    with pytest.raises(InputError, match=message):
        compose("train", TrainConfig, ["data.path=x", "output=y", *overrides])
