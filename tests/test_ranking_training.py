"""Ranking models trained for real: on two ranks, resumed on one, warm-started from a retrieval run."""

import json
import math
import os
import signal

import pytest
import torch
import torch.distributed.checkpoint as dcp

from glintru_rec.config import compose
from glintru_rec.errors import InputError
from glintru_rec.programs.launcher import task_of
from glintru_rec.programs.train_ranking import train_ranking
from glintru_rec.ranking.batches import RankingBatch
from glintru_rec.ranking.build import build_ranking_model, load_encoder
from glintru_rec.ranking.config import RankingConfig
from glintru_rec.ranking.dataset import RankingDataset
from glintru_rec.ranking.metrics import binary_metrics, number_metrics
from glintru_rec.ranking.trainer import RankingTrainer
from glintru_rec.tables.collections import MIN_ROWS_PER_RANK
from glintru_rec.tables.sharding import TABLE_KEY
from glintru_rec.training.build import load_unsharded
from glintru_rec.training.checkpoint import best_checkpoint, list_checkpoints, read_state
from tests.conftest import run_program

SMALL = ["task=ranking", "tower.width=16", "tower.options.num_heads=2", "model.embedding_dim=8", "trainer.batch_examples=128"]


def figures(run_dir) -> dict:
    return json.loads((run_dir / "finished.json").read_text())


def test_train_on_two_ranks_and_go_on_with_one(ranking_data, run_dir, tmp_path):
    """Large tables spread by rows, small ones whole on one rank: what two ranks saved, one rank reads."""
    sizes = RankingDataset.open(ranking_data).manifest["num_embeddings"]
    assert min(sizes["sparse:event"], sizes["sequence:event"]) >= 2 * MIN_ROWS_PER_RANK > sizes["item"]
    out = tmp_path / "run"
    start = [f"data.path={ranking_data}", f"output={out}", *SMALL, "trainer.max_epochs=2"]
    start += [f"tower.init_from={run_dir}", "tower.learning_rate_scale=0.3"]
    run_program("train", *start, nproc=2)
    two = figures(out)
    assert two["test"]["odd.auc"] > 0.9
    (out / "finished.json").unlink()
    run_program("train", *start, "trainer.resume=true")  # nothing is left to train: measured again, on one rank
    one = figures(out)
    assert one["steps"] == two["steps"] > 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    validated = {record["step"]: record["epoch"] for record in records if record["kind"] == "valid"}
    assert one["best_epoch"] == two["best_epoch"] == validated[read_state(list_checkpoints(out)[-1]).best_step]
    for split in ("valid", "test"):
        assert one[split] == pytest.approx(two[split], abs=1e-5)
    refused = run_program("train", *start, "trainer.resume=true", "model.cross_rank=3", check=False)
    assert refused.returncode == 2
    assert "another model" in refused.stderr


def test_a_frozen_tower_is_the_retrieval_runs(ranking_data, run_dir, tmp_path):
    """After training: the encoder and the rows of the known items are to the bit those of the retrieval run."""
    out = tmp_path / "run"
    run_program(
        "train",
        f"data.path={ranking_data}",
        f"output={out}",
        *SMALL,
        f"tower.init_from={run_dir}",
        "tower.frozen=true",
        "trainer.max_epochs=1",
        "table=replicated",
        "table.weight_decay=0.1",
    )
    run, dataset = load_unsharded(run_dir), RankingDataset.open(ranking_data)
    encoder = run.model.encoder.state_dict()
    num_rows = dataset.num_embeddings("sequence")["item"]
    saved = {f"tower.encoder.{name}": torch.empty_like(tensor) for name, tensor in encoder.items()}
    item_key = "tower.embeddings.embeddings.t_item.weight"
    saved[item_key] = torch.empty(num_rows, 16)
    dcp.load({"model": saved}, checkpoint_id=best_checkpoint(out), no_dist=True)
    for name, tensor in encoder.items():
        assert torch.equal(saved[f"tower.encoder.{name}"], tensor)
    places = run.vocabulary.encode(dataset.item_ids)
    assert (places >= 0).all()
    assert torch.equal(saved[item_key][1:], run.model.state_dict()[TABLE_KEY][torch.from_numpy(places)])


def test_a_signal_stops_it_and_it_goes_on_from_the_last_epoch(ranking_data, tmp_path, monkeypatch):
    """SIGTERM in the second of three epochs; the rest, and what comes out, is as if nothing had been."""
    arguments = [
        "task=ranking",
        f"data.path={ranking_data}",
        *SMALL,
        "table=replicated",
        "table.eps=1e-6",
        "trainer.max_epochs=3",
    ]
    arguments += ["trainer.batch_examples=512"]

    def train(name: str, *more: str) -> int:
        return train_ranking(compose("train_ranking", RankingConfig, [*arguments, f"output={tmp_path / name}", *more]))

    assert train("whole") == 0
    whole = figures(tmp_path / "whole")
    train_step, eps = RankingTrainer.train_step, set()

    def struck(trainer: RankingTrainer, batch: RankingBatch) -> torch.Tensor:
        eps.update(group["eps"] for group in trainer.optimizer.param_groups)
        if trainer.state.step == whole["steps"] // 3 + 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(trainer, batch)

    with monkeypatch.context() as patched:
        patched.setattr(RankingTrainer, "train_step", struck)
        assert train("struck") == 75
    assert eps == {1e-6, 1e-8}  # of the tables, and of all else
    assert not (tmp_path / "struck/finished.json").exists()
    assert read_state(list_checkpoints(tmp_path / "struck")[-1]).epoch == 1
    assert train("struck", "trainer.resume=true") == 0
    assert figures(tmp_path / "struck") == whole


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["tower.encoder=gru"], "tower.encoder is 'gru'"),
        (["+tower.options.causal=false"], "must not see the future"),
        (["tower.frozen=true"], "needs tower.init_from"),
        (["tower.init_from=/nowhere", "tower.combine=concat"], "tower.combine=sum"),
        (["+data.tasks.click=1"], "data.tasks.click"),
        (["tower.features=[colour]"], "'colour'"),
        (["task=sorting"], "task is 'sorting'"),
        (["+tower.options.colour=1"], "tower.options.colour is not an option of glint_ru"),
        (["tower=sasrec", "data.max_seq_len=151"], r"tower.options.max_seq_len is 200; .* data.block_examples = 201"),
        (["+tower.options.max_seq_len=x", "tower.encoder=sasrec"], "tower.options.max_seq_len is 'x'"),
        (["experiment=ml100k_ranking", "table=row_wise"], "table.weight_decay=0.01: .* use 0"),
        (["table.cache_load_factor=0.5"], "table.cache_load_factor is 0.5; it must be left as it is"),
        (["table.topology.memory_gib=4"], "table.topology is {'memory_gib': 4.0, .* left as it is"),
    ],
)
def test_bad_config_is_one_clear_message(ranking_data, tmp_path, capsys, overrides, message):
    arguments = ["task=ranking", f"data.path={ranking_data}", f"output={tmp_path}", *overrides]
    if overrides[0].startswith("task="):
        with pytest.raises(SystemExit):
            task_of(arguments)
        assert message in capsys.readouterr().err
        return
    with pytest.raises(InputError, match=message):
        build_ranking_model(
            compose("train_ranking", RankingConfig, arguments), RankingDataset.open(ranking_data).manifest, torch.device("cpu")
        )


def test_the_experiment_says_the_task():
    assert task_of(["experiment=ml100k_ranking", "trainer.seed=1"]) == "ranking"
    assert task_of(["experiment=smoke"]) == task_of(["data.path=x"]) == "retrieval"


def test_encoder_of_a_run_is_its_models(run_dir):
    encoder, model = load_encoder(run_dir), load_unsharded(run_dir).model
    x, offsets = torch.randn(7, 16), torch.tensor([0, 3, 7])
    assert torch.equal(encoder(x, offsets), model.encoder(x, offsets))
    assert not encoder.training


def test_metrics_against_hand_worked_figures():
    """u0: positives .9 .2, negative .5: 1 of 2 pairs. u1: positive .4, negatives .3 .6: 1 of 2. u2 has positives only."""
    scores = torch.tensor([0.9, 0.2, 0.5, 0.4, 0.3, 0.6, 0.1])
    labels = torch.tensor([1.0, 1, 0, 1, 0, 0, 1])
    users = torch.tensor([0, 0, 0, 1, 1, 1, 2]).numpy()
    got = binary_metrics(torch.logit(scores), labels, users)
    assert got["gauc"] == pytest.approx((1 / 2 + 1 / 2) / 2)
    pairs = [(p > n) for p in (0.9, 0.2, 0.4, 0.1) for n in (0.5, 0.3, 0.6)]
    assert got["auc"] == pytest.approx(sum(pairs) / len(pairs))
    said = [0.9, 0.2, 0.5, 0.4, 0.7, 0.4, 0.1]  # the probability of the label
    assert got["logloss"] == pytest.approx(-sum(map(math.log, said)) / 7, abs=1e-6)
    assert number_metrics(torch.tensor([1.0, 3]), torch.tensor([2.0, 5]))["rmse"] == pytest.approx(math.sqrt(2.5))
