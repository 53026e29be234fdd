"""Training on a dynamic vocabulary: real ranks, a catalog that changes overnight, export and scoring.

The ranks are those of tests/dynamic_ranks.py, which ends with files.
"""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader

from glintru_rec.config import compose
from glintru_rec.data.batches import TrainingBatches
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.id_map import ID_MAP_FILE, IdMap, VocabularyConfig
from glintru_rec.data.prepare import PrepareConfig, prepare
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact
from glintru_rec.programs.evaluate import EvaluateConfig, evaluate_run
from glintru_rec.programs.export import ExportConfig, export_run
from glintru_rec.programs.train import train
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.scoring.job import score
from glintru_rec.tables.item_table import BIAS_COLUMNS
from glintru_rec.tables.sharding import TABLE_KEY
from glintru_rec.training.build import load_unsharded
from glintru_rec.training.checkpoint import folder_of, list_checkpoints
from glintru_rec.training.config import TrainConfig
from tests.conftest import REPOSITORY, SMALL, environment, make_log
from tests.dynamic_ranks import ADMIT_AFTER, CAPACITY, FRESH, FRESH_ROWS, FRESH_WIDTH, MIDDLE, STEPS, VOCABULARY
from tests.table_ranks import NUM_ITEMS, SMALL_ENCODER
from tests.test_tables import join
from tests.test_training import losses, records

NEW = 30  # items that come, and that go, from one day to the next

pytestmark = pytest.mark.programs


@pytest.fixture(scope="module")
def ranks(tmp_path_factory) -> Path:
    """Two days of a log with text for ids, prepared with these, and what the ranks did with them."""
    out = tmp_path_factory.mktemp("dynamic")
    for day in (1, 2):
        log = make_log(seed=day)
        number = (log["item_id"].to_numpy() - 500) // 7 + NEW * (day - 1)
        log = log.set_column(1, "item_id", pa.array([f"item {each}" for each in number]))
        pq.write_table(log, out / f"log {day}.parquet")
        prepare(PrepareConfig(str(out / f"log {day}.parquet"), str(out / f"day {day}"), ids="raw"), progress=len)
    command = [sys.executable, "-m", "tests.dynamic_ranks", str(out)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-5000:]
    (out / "stdout").write_text(done.stdout)
    return out


def rows_by_id(path: Path) -> dict[str, int]:
    """The items that have rows in a map that was saved."""
    return {entry["item_id"]: entry["row"] for entry in pq.read_table(path).to_pylist() if entry["row"] >= 0}


def map_of(run: Path, step: int) -> Path:
    return folder_of(run, step) / ID_MAP_FILE


def tensor_of(checkpoint: Path, name: str) -> Tensor:
    """A tensor of a checkpoint, whole."""
    import torch.distributed.checkpoint as dcp

    described = FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    (key,) = (key for key in described if key.endswith(name))
    tensors = {key: torch.empty(described[key].size, dtype=described[key].properties.dtype)}
    dcp.load(tensors, checkpoint_id=checkpoint, no_dist=True)
    return tensors[key]


def weights_of(checkpoint: Path) -> Tensor:
    return tensor_of(checkpoint, f"model.{TABLE_KEY}")


@pytest.mark.parametrize("name", FRESH)
def test_rows_drawn_anew(ranks, name):
    """They get the same values on any ranks, and no optimizer state; nothing else changes; the next step goes on from them."""
    fresh, shape = {}, (NUM_ITEMS, FRESH_WIDTH + BIAS_COLUMNS)
    for size in (1, 2):
        results = [torch.load(ranks / f"fresh {rank} of {size}.pt")[name] for rank in range(size)]
        tables = {when: join([result[when]["table"] for result in results], shape) for when in results[0]}
        shapes = {"momentum1": shape if "adagrad" in name else (NUM_ITEMS,)}
        shapes |= dict.fromkeys(("exp_avg", "exp_avg_sq"), shape)
        others = torch.ones(NUM_ITEMS, dtype=torch.bool)
        others[FRESH_ROWS] = False
        assert torch.equal(tables["after"][others], tables["before"][others])
        assert not torch.eq(tables["after"], tables["before"])[FRESH_ROWS, :FRESH_WIDTH].any()
        assert not tables["after"][FRESH_ROWS, FRESH_WIDTH:].any()  # biases
        states = results[0]["after"]["state"]
        assert states
        for moment in states:
            before, after, following = (
                join([result[when]["state"].get(moment, []) for result in results], shapes[moment.split(".")[-1]])
                for when in ("before", "after", "next")
            )
            assert before[FRESH_ROWS].any()
            assert not after[FRESH_ROWS].any()
            assert following[FRESH_ROWS].any()
            assert torch.equal(after[others], before[others])
        fresh[size] = tables["after"][FRESH_ROWS, :FRESH_WIDTH]
        assert 0 < fresh[size].std() < 0.04  # 0.02 is drawn
    assert torch.equal(fresh[1], fresh[2])


def replay(dataset: SequenceDataset, steps: list[tuple[int, int]]) -> list[IdMap]:
    """The map after every step of a run: steps of so many ranks, each from so many batches of the epoch on."""
    batches = TrainingBatches(*dataset.train_sequences(), 20, 128, seed=0)
    parts = [batch.item_ids.numpy() for batch in batches.epoch(0)]
    id_map = IdMap("string", VocabularyConfig(CAPACITY, admit_after=ADMIT_AFTER, evict_ratio=1))
    keys = id_map.keys_of(dataset.vocabulary.item_ids)
    names = dict(zip(keys.tolist(), dataset.vocabulary.item_ids.to_pylist(), strict=True))
    tables = []
    for step, (first, size) in enumerate(steps):
        if first < len(parts):
            seen = keys[np.concatenate(parts[first : first + size])]
            changes = id_map.update(*np.unique(seen, return_counts=True), step)
            id_map.name(changes.rows, pa.array([names[key] for key in id_map.keys[changes.rows].tolist()], pa.string()))
        tables.append(id_map.to_table())
    return tables


def test_two_ranks_keep_one_map(ranks):
    """It is that of their batches together, in every step; items come, and go once the table is full."""
    expected = replay(SequenceDataset.open(ranks / "day 1"), [(2 * step, 2) for step in range(STEPS)])
    saved = [pq.read_table(map_of(ranks / "two", step + 1)) for step in range(STEPS)]
    assert all(one.equals(other, check_metadata=True) for one, other in zip(saved, expected))
    found = records(ranks / "two")
    assert [record["step"] for record in found] == list(range(1, STEPS + 1))
    admitted, evicted = (sum(record[name] for record in found) for name in ("admitted", "evicted"))
    assert found[-1]["items"] == CAPACITY == admitted - evicted
    assert evicted > 10
    # Every item of every batch is either known or not, and the targets of a step are those of what is known.
    batches = TrainingBatches(*SequenceDataset.open(ranks / "day 1").train_sequences(), 20, 128, seed=0)
    sizes = [batch.item_ids.numel() for batch in batches.epoch(0)]
    events = [record["known_events"] + record["unknown_events"] for record in found]
    assert events[: len(sizes) // 2] == [sum(sizes[2 * step : 2 * step + 2]) for step in range(len(sizes) // 2)]
    known, unknown = (sum(record[f"{name}_events"] for record in found) for name in ("known", "unknown"))
    assert 0 < unknown < known / 2
    assert all(record["num_targets"] < record["known_events"] for record in found)
    # The second epoch counts nothing.
    assert any(record["epoch"] == 1 for record in found)
    assert not any(record["admitted"] + record["evicted"] for record in found if record["epoch"] == 1)
    assert (
        f"items {CAPACITY} of {CAPACITY}  admitted {admitted:,}  evicted {evicted:,}  unknown "
        in (ranks / "stdout").read_text()
    )


def test_a_row_that_changes_hands_begins_anew(ranks):
    """In a real run: Adagrad's sum of squares only grows, but where a row goes to another item."""
    fallen = 0
    for step in range(1, STEPS):
        before, after = (tensor_of(folder_of(ranks / "two", each), "momentum1") for each in (step, step + 1))
        owners = [{row: item for item, row in rows_by_id(map_of(ranks / "two", each)).items()} for each in (step, step + 1)]
        kept = torch.tensor([row in owners[0] and owners[0][row] == owners[1].get(row) for row in range(CAPACITY)])
        assert (after >= before)[kept].all()
        fallen += int((after < before).sum())
    assert fallen > 10


def test_going_on_with_the_map(ranks):
    """On as many ranks: to the bit. On another number, and under another sharding: the same map, rows and optimizer state."""
    assert losses(ranks / "two again") == losses(ranks / "two")
    last = [folder_of(ranks / run, STEPS) for run in ("two", "two again")]
    assert torch.equal(*(weights_of(checkpoint) for checkpoint in last))
    assert pq.read_table(last[0] / ID_MAP_FILE).equals(pq.read_table(last[1] / ID_MAP_FILE), check_metadata=True)

    for begun, size, source in (
        ("one begins", 1, folder_of(ranks / "two", MIDDLE)),
        ("two begin", 2, list_checkpoints(ranks / "one")[-1]),
    ):
        parts = [torch.load(ranks / f"{begun} {rank}.pt") for rank in range(size)]
        assert torch.equal(join([part["table"] for part in parts], (CAPACITY, 16)), weights_of(source))
        state = join([part["state"].get("t_item.momentum1", []) for part in parts], (CAPACITY,))
        assert torch.equal(state, tensor_of(source, "momentum1"))
        for rank in range(size):
            found = pq.read_table(ranks / f"{begun} {rank}.parquet")
            assert found.equals(pq.read_table(source / ID_MAP_FILE), check_metadata=True)
    # From there, one rank takes one batch a step.
    steps = [(2 * step, 2) for step in range(MIDDLE)] + [(2 * MIDDLE + step, 1) for step in range(STEPS - MIDDLE)]
    expected = replay(SequenceDataset.open(ranks / "day 1"), steps)[-1]
    assert pq.read_table(map_of(ranks / "one", STEPS)).equals(expected, check_metadata=True)


def test_the_next_day_keeps_every_surviving_row(ranks):
    source = load_best(ranks / "two")
    known = rows_by_id(source / ID_MAP_FILE)
    parts = [torch.load(ranks / f"day 2 begins {rank}.pt") for rank in range(2)]
    assert torch.equal(join([part["table"] for part in parts], (CAPACITY, 16)), weights_of(source))
    assert rows_by_id(ranks / "day 2 begins 1.parquet") == rows_by_id(ranks / "day 2 begins 0.parquet") == known

    later = rows_by_id(list_checkpoints(ranks / "later")[-1] / ID_MAP_FILE)
    assert sorted(later.values()) == list(range(CAPACITY))
    survivors, came, went = known.keys() & later.keys(), later.keys() - known.keys(), known.keys() - later.keys()
    assert {item: later[item] for item in survivors} == {item: known[item] for item in survivors}
    assert {later[item] for item in came} == {known[item] for item in went}
    numbers = {name: {int(item.split()[1]) for item in items} for name, items in (("came", came), ("went", went))}
    assert min(numbers["came"]) >= NEW
    assert max(numbers["came"]) >= 60  # the first day's log has 0 to 59
    assert len(survivors) > 10
    assert len(came) > 10
    assert sum(number < NEW for number in numbers["went"]) > len(went) / 2  # mostly what is gone from the log


def load_best(run: Path) -> Path:
    return load_unsharded(run).checkpoint


def test_evaluate_export_and_score_know_the_same_items(ranks, tmp_path):
    """The scoring job finds what evaluation ranks first, by original ids, on data with items that the model never met."""
    dataset = ranks / "day 2"
    for run in ("later", "two", "exact", "roomy"):  # all but the first know only yesterday's items
        figures = evaluated(ranks / run, dataset, tmp_path / f"{run}.json")
        artifact = tmp_path / run
        export_run(compose("export", ExportConfig, [f"checkpoint={ranks / run}", f"output={artifact}"]))
        opened = Artifact.load(artifact)
        known = rows_by_id(load_best(ranks / run) / ID_MAP_FILE)
        assert dict(zip(opened.vocabulary.item_ids.to_pylist(), itertools.count())) == known
        vectors = torch.from_numpy(np.load(artifact / "item_vectors.npy"))
        assert torch.equal(vectors, weights_of(load_best(ranks / run))[: len(known)])

        cases = SequenceDataset.open(dataset)
        cases.write_histories(tmp_path / "histories.parquet", "valid")
        histories = pq.read_table(tmp_path / "histories.parquet")
        unknown = sum(target not in known for target in histories["target"].to_pylist())
        assert figures["num_targets_unknown"] == unknown
        assert 0 < unknown < len(histories)
        scores = tmp_path / f"{run} scores"
        overrides = [f"artifact={artifact}", f"input={tmp_path / 'histories.parquet'}", f"output={scores}", "top_k=10"]
        score(compose("score", ScoreConfig, [*overrides, "mode=top_k"]))
        report = json.loads((scores / "report.json").read_text())
        items = pc.list_flatten(histories["history"]).to_pylist()
        assert report["unknown_history_items"] == sum(item not in known for item in items) > 0
        targets = dict(zip(*(histories[name].to_pylist() for name in ("user_id", "target"))))
        lists = pq.read_table(next(scores.glob("*.parquet"))).to_pylist()
        hits = sum(targets[row["user_id"]] in row["item_ids"] for row in lists)
        assert len(lists) > 150
        left_out = (len(histories) - len(lists)) / len(histories)
        assert figures["hr@10"] == pytest.approx(hits / len(histories), abs=1e-9 + left_out)
    assert json.loads((tmp_path / "later.json").read_text())["metrics"]["ndcg@10"] > 0.25  # chance is 0.11


def evaluated(run: Path, data: Path, output: Path, *overrides: str) -> dict:
    fixed = [f"checkpoint={run}", f"data.path={data}", f"output={output}", "split=valid"]
    evaluate_run(compose("evaluate", EvaluateConfig, [*fixed, *overrides]))
    result = json.loads(output.read_text())
    return result["metrics"] | result["protocol"]


def test_rows_without_an_item_are_no_candidates(ranks, tmp_path):
    """Two ranks, of which one has none in use, rank as one does; among sampled candidates an unknown target is a miss."""
    found = evaluated(ranks / "roomy", ranks / "day 1", tmp_path / "full.json")
    (seen,) = records(ranks / "roomy", "valid")
    same = ("hr@10", "ndcg@10", "mrr", "num_targets_unknown")
    assert [found[name] for name in same] == pytest.approx([seen[name] for name in same], rel=1e-6)
    assert 10 < records(ranks / "roomy")[-1]["items"] < 60
    for kind in ("uniform", "popularity"):
        sampled = evaluated(
            ranks / "roomy", ranks / "day 1", tmp_path / f"{kind}.json", f"candidates={kind}:9", "exclude_seen=false"
        )
        assert sampled["num_targets_unknown"] == found["num_targets_unknown"] > 0
        assert sampled["hr@10"] == pytest.approx(1 - found["num_targets_unknown"] / found["num_users"], abs=1e-12)


DYNAMIC = ["data.path=x", "output=y", *VOCABULARY]


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["data.path=x", "output=y", "data.vocabulary=dynamic"], "needs vocabulary.capacity"),
        (["data.path=x", "output=y", "vocabulary.capacity=9"], "no effect with data.vocabulary=dense"),
        ([*DYNAMIC, "data.vocabulary=raw"], "one of dense, dynamic"),
        ([*DYNAMIC, "vocabulary.admit_after=0"], "vocabulary.admit_after is 0"),
        ([*DYNAMIC, "vocabulary.decay=2"], "vocabulary.decay is 2"),
        ([*DYNAMIC, "vocabulary.evict_ratio=0.5"], "vocabulary.evict_ratio is 0.5"),
        ([*DYNAMIC, "loss.negatives=popularity"], "loss.negatives=popularity needs how often"),
        ([*DYNAMIC, "table=replicated", "optimizer.ema_decay=0.9"], "rows of evicted items"),
        ([*DYNAMIC, "table.kernel=fused_uvm_caching"], "overwritten from the cache"),
        ([*DYNAMIC, "model.side_features=[rating]"], "is of items alone"),
    ],
)
def test_what_cannot_be_had_is_refused(overrides, reason):
    with pytest.raises(InputError, match=reason):
        compose("train", TrainConfig, overrides)


def test_runs_of_another_kind_are_refused(ranks, tmp_path):
    """A dense run does not start from a dynamic one, nor the other way round; another capacity, or no item, is an error too."""
    prepare(PrepareConfig(str(ranks / "log 1.parquet"), str(tmp_path / "day 1")), progress=len)
    dense = [f"output={tmp_path / 'dense'}", f"data.path={tmp_path / 'day 1'}", *SMALL, *SMALL_ENCODER, "trainer.max_steps=1"]
    train(compose("train", TrainConfig, dense))

    def refused(*overrides: str) -> str:
        path = ranks / "day 2" if VOCABULARY[0] in overrides else tmp_path / "day 1"
        fixed = [f"data.path={path}", *SMALL, *SMALL_ENCODER]
        with pytest.raises(InputError) as raised:
            train(compose("train", TrainConfig, [f"output={tmp_path / 'refused'}", *fixed, *overrides]))
        return str(raised.value)

    assert "this run has data.vocabulary=dense" in refused(f"trainer.init_from={ranks / 'two'}")
    assert "was trained with data.vocabulary=dense" in refused(f"trainer.init_from={tmp_path / 'dense'}", *VOCABULARY)
    other = [VOCABULARY[0], f"trainer.init_from={ranks / 'two'}", "vocabulary.capacity=41"]
    assert f"vocabulary.capacity is 41, but the item table of {load_best(ranks / 'two')} has 40 rows" in refused(*other)
    # A run that goes on does so on its own data; new data begin a new run.
    assert "new data begin a new run" in refused(f"output={ranks / 'one'}", "trainer.resume=true", *VOCABULARY)
    assert not (tmp_path / "refused").exists()
    rare = [*VOCABULARY[:2], "vocabulary.admit_after=1000", "trainer.max_steps=2", "trainer.log_every_steps=1"]
    for loss in ("sampled_softmax", "full_softmax"):  # steps without a target do no harm
        refusal = refused(*rare, f"loss={loss}", f"output={tmp_path / loss}")
        assert "no item was seen vocabulary.admit_after=1000 times" in refusal
