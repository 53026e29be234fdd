"""A ranking run as an artifact: the trained model's predictions of raw rows, where neither torchrec nor fbgemm is."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from glintru_rec.config import compose
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, replace_items
from glintru_rec.export.ranking_artifact import RankingArtifact
from glintru_rec.programs.export import ExportConfig, export_run
from glintru_rec.programs.train_ranking import train_ranking
from glintru_rec.ranking import exporting
from glintru_rec.ranking.batches import RankingBatches
from glintru_rec.ranking.build import build_ranking_model
from glintru_rec.ranking.config import RankingConfig
from glintru_rec.ranking.dataset import RankingDataset
from glintru_rec.ranking.prepare import PrepareRankingConfig, prepare_ranking
from glintru_rec.ranking.scoring_module import RankingModule
from glintru_rec.scoring import ScoreConfig, score
from glintru_rec.training.checkpoint import best_checkpoint, load_plain
from tests.conftest import REPOSITORY, environment, make_log

TASKS = {"odd": "item_id % 2 = 1", "size": "item_id % 7 / 3.5"}
SPARSE = {"user": "user_id", "pair": "[item_id % 5, user_id % 3]"}
DENSE = {"before": "count(*) OVER user_past", "half": "CASE WHEN item_id % 3 > 0 THEN item_id / 2 END"}
SEQUENCE = {"odd": "item_id % 2", "third": "item_id % 3 = 0"}
KINDS = {
    "glint_ru": ["tower=glint_ru", "tower.options.num_heads=2"],
    "concat": [
        "tower=lru_rec",
        "tower.combine=concat",
        "tower.output=query",
        "model.interaction=dlrm",
        "tower.features=[third]",
    ],
    "no tower": ["tower=none"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A dataset, a run and an artifact of each kind."""
    folder = tmp_path_factory.mktemp("ranking_export")
    pq.write_table(make_log(100), folder / "log.parquet")
    expressions = {"tasks": TASKS, "sparse": SPARSE, "dense": DENSE, "sequence": SEQUENCE}
    prepare_ranking(PrepareRankingConfig(str(folder / "log.parquet"), str(folder / "dataset"), examples="test", **expressions))
    small = ["task=ranking", "tower.width=16", "model.embedding_dim=8", "trainer.max_epochs=1", "table=replicated"]
    for name, options in KINDS.items():
        paths = [f"data.path={folder / 'dataset'}", f"output={folder / name}"]
        assert train_ranking(compose("train_ranking", RankingConfig, [*small, *paths, *options])) == 0
        export_run(ExportConfig(checkpoint=str(folder / name), output=str(folder / f"{name} artifact")))
    return folder


def run_config(folder, name: str) -> RankingConfig:
    return exporting.from_yaml(folder / name / "config.yaml", RankingConfig)


@torch.no_grad()
def trained(folder, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The trained model's own predictions of the test period, and which events they are of."""
    dataset = RankingDataset.open(folder / "dataset")
    model = build_ranking_model(run_config(folder, name), dataset.manifest, torch.device("cpu"))
    load_plain(best_checkpoint(folder / name), model)
    batches = list(RankingBatches(dataset, "test", 100, 50, 64).epoch())
    predicted = torch.cat([model.eval()(batch) for batch in batches])
    predicted[:, 0] = predicted[:, 0].sigmoid()
    return predicted.numpy(), torch.cat([batch.examples for batch in batches]).numpy()


def raw_rows(folder) -> list[dict]:
    """Every event of the log as an example with the features that its expressions are worth, by user and time."""
    log = pq.read_table(folder / "log.parquet").sort_by([("user_id", "ascending"), ("timestamp", "ascending")]).to_pylist()
    rows, past = [], {}
    for event in log:
        user, item = event["user_id"], event["item_id"]
        history = past.setdefault(user, [])
        rows.append(
            {
                "user_id": user,
                "item_id": item,
                "history": list(history),
                "sequence.odd": [each % 2 for each in history],
                "sequence.third": [each % 3 == 0 for each in history],
                "sparse.user": user,
                "sparse.pair": [item % 5, user % 3],
                "dense.before": len(history),
                "dense.half": item / 2 if item % 3 else None,
            }
        )
        history.append(item)
    return rows


def score_rows(folder, name: str, rows: list[dict], where, schema: pa.Schema | None = None, **options):
    pq.write_table(pa.Table.from_pylist(rows, schema), where / "in.parquet")
    arguments = {"input": str(where / "in.parquet"), "output": str(where / "out"), "mode": "rank", "batch_size": 50}
    report = score(ScoreConfig(str(folder / f"{name} artifact"), **{**arguments, **options}))
    return report, pq.read_table(where / "out/in.parquet")


@pytest.mark.parametrize("name", KINDS)
def test_raw_rows_get_the_trained_models_predictions(folder, name, tmp_path):
    """What examples that shared a history got in one batch, each gets from a row of its own."""
    wanted, examples = trained(folder, name)
    rows = raw_rows(folder)
    assert len({tuple(row["history"]) for row in rows}) > 100
    report, scores = score_rows(folder, name, [rows[place] for place in examples], tmp_path)
    assert report.rows_scored == len(examples) > 100
    assert scores["user_id"].to_pylist() == [rows[place]["user_id"] for place in examples]
    for place, task in enumerate(TASKS):
        assert np.abs(scores[task].to_numpy() - wanted[:, place]).max() < 1e-5
    assert np.ptp(wanted[:, 0]) > 1e-3
    assert report.fallback == 0


def test_prepare_writes_a_period_as_rows_to_score(folder, tmp_path):
    events = np.flatnonzero(RankingDataset.open(folder / "dataset").split == 2)
    rows = raw_rows(folder)
    written = pq.read_table(folder / "dataset/examples.parquet")
    assert written.drop_columns(["tasks.odd", "tasks.size"]).to_pylist() == [rows[place] for place in events]
    assert written["tasks.odd"].to_pylist() == [item % 2 == 1 for item in written["item_id"].to_pylist()]
    (tmp_path / "in.parquet").symlink_to(folder / "dataset/examples.parquet")
    config = ScoreConfig(str(folder / "concat artifact"), str(tmp_path / "in.parquet"), str(tmp_path / "out"), "rank")
    assert score(config).rows_scored == len(events)


def test_unknown_values_and_bad_rows(folder, tmp_path):
    """Values that training did not see are the unknown one's; what is no example is set aside with its reason."""
    good = raw_rows(folder)[30]
    unknown = {**good, "history": [*good["history"], 1], "sparse.user": 7, "sparse.pair": [99], "item_id": 3}
    unknown |= {"sequence.odd": [*good["sequence.odd"], 9], "sequence.third": [*good["sequence.third"], None]}
    null = {**good, "sequence.odd": None, "sparse.user": None, "sparse.pair": None, "dense.before": None}
    bad = {
        "null_user": {"user_id": None},
        "null_item": {"item_id": None},
        "null_history": {"history": None},
        "null_history_item": {"history": [None, *good["history"][1:]]},
        "side_feature_of_other_length": {"sequence.third": [True]},
    }
    rows = [
        good,
        unknown,
        null,
        *({**good, **changes} for changes in bad.values()),
        {**good, "history": [], "sequence.odd": []},
    ]
    rows[-1]["sequence.third"] = []
    report, scores = score_rows(folder, "glint_ru", rows, tmp_path)
    assert report.rows_set_aside == dict.fromkeys(sorted(bad), 1)
    assert (report.rows_in, report.rows_scored, report.unknown_candidates, report.unknown_history_items) == (9, 4, 1, 1)
    assert scores["item_id"].to_pylist() == [good["item_id"], 3, good["item_id"], good["item_id"]]
    rejects = pq.read_table(tmp_path / "out/rejects/in.parquet").to_pylist()
    assert [(row["reason"], row["row"]) for row in rejects] == [(reason, 4 + place) for place, reason in enumerate(bad)]
    assert pq.read_table(tmp_path / "out/unknown_candidates/in.parquet")["row"].to_pylist() == [2]

    # By hand: row 0 of every table for what is unknown, and the mean of a number that is null.
    artifact = RankingArtifact.load(folder / "glint_ru artifact")

    def place(feature, value):
        values = artifact.values[feature].to_pylist()
        return values.index(value) + 1 if value in values else 0

    events = [[place("item", i), place("sequence:odd", i % 2), place("sequence:third", i % 3 == 0)] for i in good["history"]]
    untold, mean = [[item, 0, third] for item, _, third in events], artifact.manifest["dense"]["before"]["mean"]
    half = artifact.manifest["dense"]["half"]["mean"] if good["dense.half"] is None else good["dense.half"]
    cases = (  # dense before, sparse user, sparse pairs, events, candidate
        (good["dense.before"], [0], [0], [*events, [0, 0, 0]], 0),
        (mean, [0], [], untold, place("item", good["item_id"])),
    )
    for row, (before, user, pair, history, candidate) in enumerate(cases, start=1):
        said = artifact.module.predict(
            torch.tensor([[before, half]], dtype=torch.float64),
            torch.tensor(user + pair),
            torch.tensor([[1], [len(pair)]]),
            torch.tensor(history),
            torch.tensor([len(history)]),
            torch.tensor([candidate]),
        )
        assert np.allclose([scores[task][row].as_py() for task in TASKS], said[0], atol=1e-6)


def test_a_whole_number_that_a_float_rounds(folder, tmp_path):
    report, _ = score_rows(folder, "no tower", [{**raw_rows(folder)[30], "dense.before": 2**53 + 1}], tmp_path)
    assert report.rows_scored == 1


def test_a_value_that_the_type_cannot_hold_sets_its_row_aside(folder, tmp_path):
    """As all values of a column have one type, the others of it are unsigned too."""
    good, too_large = raw_rows(folder)[30], 2**63
    history = good["history"]
    rows = [
        good,
        {**good, "item_id": too_large},
        {**good, "history": [*history[:-1], too_large]},
        {**good, "sequence.odd": [too_large, *good["sequence.odd"][1:]]},
        {**good, "sparse.user": too_large},
        {**good, "sparse.pair": [1, too_large]},
        {**good, "sparse.user": None, "history": None},
        good,
    ]
    unsigned = {pa.int64(): pa.uint64(), pa.list_(pa.int64()): pa.list_(pa.uint64())}
    schema = pa.schema([(field.name, unsigned.get(field.type, field.type)) for field in pa.Table.from_pylist([good]).schema])
    report, scores = score_rows(folder, "glint_ru", rows, tmp_path, schema)
    assert (report.failed, report.rows_in, report.rows_scored) == ({}, 8, 2)
    assert report.rows_set_aside == {"value_of_other_type": 5, "null_history": 1}
    rejects = pq.read_table(tmp_path / "out/rejects/in.parquet").to_pylist()
    assert [row["row"] for row in rejects if row["reason"] == "value_of_other_type"] == [2, 3, 4, 5, 6]
    (tmp_path / "alone").mkdir()
    _, alone = score_rows(folder, "glint_ru", [good], tmp_path / "alone")
    assert [scores["odd"][row].as_py() for row in (0, 1)] == pytest.approx([alone["odd"][0].as_py()] * 2, abs=1e-6)


def test_a_column_that_is_missing_or_of_another_type(folder, tmp_path):
    rows = raw_rows(folder)[30:32]
    cases = (
        ("sparse.pair", None, "has no column 'sparse.pair'.*the others are the model's features"),
        ("sequence.odd", "x", r"column 'sequence.odd' .* has type string; .* write it as list<int64>"),
        ("item_id", "x", r"column 'item_id' .* has type string; .* write it as int64"),
        ("dense.half", "x", "column 'dense.half' .* has type string; it must hold numbers"),
    )
    for number, (column, value, message) in enumerate(cases):
        where = tmp_path / str(number)
        where.mkdir()
        changed = [{key: each for key, each in row.items() if key != column} for row in rows]
        if value is not None:
            changed = [{**row, column: value} for row in changed]
        with pytest.raises(InputError, match=message):
            score_rows(folder, "glint_ru", changed, where)


def test_each_artifact_has_its_modes(folder, run_dir, tmp_path):
    with pytest.raises(InputError, match="is of a ranking model; score with it in mode=rank"):
        Artifact.load(folder / "glint_ru artifact")
    one = Vocabulary(pa.array([1]), np.ones(1))
    with pytest.raises(InputError, match="is of a ranking model, whose items are inside"):
        replace_items(folder / "glint_ru artifact", torch.zeros(1, 8), one, tmp_path / "no", {})
    export_run(ExportConfig(checkpoint=str(run_dir), output=str(tmp_path / "retrieval")))
    with pytest.raises(InputError, match="is of a retrieval model; mode=rank needs one of a ranking model"):
        RankingArtifact.load(tmp_path / "retrieval")
    for key, value in (("format", "pt2"), ("precision", "int8")):
        with pytest.raises(InputError, match=f"{key} is '{value}'; it must be .*, as checkpoint is a ranking run"):
            export_run(ExportConfig(checkpoint=str(folder / "concat"), output=str(tmp_path / "no"), **{key: value}))


FRESH = """
import sys

blocked = ["torchrec", "fbgemm_gpu", "glintru_rec", "pyarrow"]

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch

module = torch.jit.load(sys.argv[1] + "/model.pt")
no_ids = torch.zeros(0, dtype=torch.int64)
inputs = [torch.zeros(2, 2, dtype=torch.float64), torch.ones(2, dtype=torch.int64), torch.tensor([[1, 1], [0, 0]])]
inputs += [torch.zeros(3, 3, dtype=torch.int64), torch.tensor([3, 0]), torch.tensor([1, 1])]
print(module.predict(*inputs)[:, 0].tolist())
nobody = [torch.zeros(0, 2, dtype=torch.float64), no_ids, torch.zeros(2, 0, dtype=torch.int64), torch.zeros(0, 3), no_ids]
print(list(module.predict(*nobody, no_ids).shape))

blocked[2:] = []
from glintru_rec.scoring import ScoreConfig, score
print(score(ScoreConfig(sys.argv[1], "in.parquet", "fresh", "rank", batch_size=50)).rows_scored)
"""


def test_the_module_needs_torch_alone_and_the_job_neither_torchrec_nor_fbgemm(folder, tmp_path):
    _, scores = score_rows(folder, "glint_ru", raw_rows(folder)[:60], tmp_path)
    command = [sys.executable, "-c", FRESH, str(folder / "glint_ru artifact")]
    env = environment() | {"PYTHONPATH": str(REPOSITORY)}
    result = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    probabilities, shape_of_nobody, num_scored = map(json.loads, result.stdout.splitlines())
    assert all(0 < probability < 1 for probability in probabilities)
    assert (shape_of_nobody, num_scored) == ([0, len(TASKS)], 60)
    assert pq.read_table(tmp_path / "fresh/in.parquet").equals(scores)


def test_a_run_that_is_not_whole_is_refused(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "concat", tmp_path / "run")
    items = pq.read_table(tmp_path / "run/vocabulary/item.parquet")
    pq.write_table(items.slice(1), tmp_path / "run/vocabulary/item.parquet")
    config = ExportConfig(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "artifact"))
    with pytest.raises(InputError, match="is not the vocabulary that the run was trained on"):
        export_run(config)
    (tmp_path / "run/features.json").unlink()
    with pytest.raises(InputError, match=r"has no readable features.json.*train again"):
        export_run(config)

    class Broken(RankingModule):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.heads = torch.nn.ModuleList(reversed(self.heads))

    monkeypatch.setattr(exporting, "RankingModule", Broken)
    with pytest.raises(RuntimeError, match="the exported model differs from the trained one by"):
        export_run(ExportConfig(checkpoint=str(folder / "concat"), output=str(tmp_path / "artifact")))
    assert not (tmp_path / "artifact").exists()


def test_a_run_does_not_go_on_with_other_features(folder, tmp_path):
    shutil.copytree(folder / "dataset", tmp_path / "dataset")
    paths = [f"data.path={tmp_path / 'dataset'}", f"output={folder / 'no tower'}", "trainer.resume=true"]
    small = ["task=ranking", "tower.width=16", "model.embedding_dim=8", "trainer.max_epochs=1", "table=replicated"]
    config = compose("train_ranking", RankingConfig, [*small, *KINDS["no tower"], *paths])
    users = tmp_path / "dataset/vocabulary/sparse.user.parquet"
    pq.write_table(pq.read_table(users).sort_by([("value", "descending")]), users)
    with pytest.raises(InputError, match="was trained with other values of sparse:user"):
        train_ranking(config)
    manifest = json.loads((tmp_path / "dataset/manifest.json").read_text())
    manifest["dense"]["before"]["mean"] += 1
    (tmp_path / "dataset/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="was trained with other dense than"):
        train_ranking(config)
