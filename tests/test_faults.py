"""Runs that are signalled, killed, stopped, short of disk, or go bad; and what is kept of them."""

import contextlib
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from glintru_rec.config import compose
from glintru_rec.data.batches import TrainingBatches
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.training.build import build_model
from glintru_rec.training.checkpoint import best_checkpoint, list_checkpoints, load_plain, read_state
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.rank_meter import describe_lag
from glintru_rec.training.run_log import RunLog
from glintru_rec.training.trainer import Stopped, Trainer
from tests.conftest import REPOSITORY, SMALL, environment, run_program

programs = pytest.mark.programs


def records(run_dir: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


@contextlib.contextmanager
def trainer_of(dataset_dir, output, *overrides):
    """A trainer in this process, its run directory made."""
    output.mkdir()
    with process_group("cpu") as device:
        config = compose("train", TrainConfig, [f"data.path={dataset_dir}", f"output={output}", *SMALL, *overrides])
        yield Trainer(config, SequenceDataset.open(dataset_dir), device)


AVERAGED = ["table=replicated", "optimizer.ema_decay=0.9"]


@pytest.mark.parametrize("in_background", ["true", "false"])
@pytest.mark.parametrize("overrides", [["table=row_wise"], AVERAGED])
def test_a_checkpoint_holds_the_weights_of_its_step(dataset_dir, tmp_path, overrides, in_background):
    """Whatever training does while it is written."""
    overrides = [*overrides, f"trainer.checkpoint_in_background={in_background}"]
    with trainer_of(dataset_dir, tmp_path / "run", *overrides) as trainer:
        trainer.begin_epoch()
        batches = trainer.batches.epoch(0)
        trainer.train_step(next(batches))

        def whole() -> dict[str, torch.Tensor]:
            parts = trainer.model.state_dict()
            return {
                name: (part.to_local().local_shards()[0] if hasattr(part, "to_local") else part).detach().clone()
                for name, part in parts.items()
            }

        with trainer.average.in_place() if trainer.average else contextlib.nullcontext():
            expected = whole()
        trained = whole()
        trainer.checkpoints.save(trainer.state)
        for _ in range(3):
            trainer.train_step(next(batches))
        trainer.checkpoints.wait()
        assert any(not torch.equal(part, trained[name]) for name, part in whole().items())
        (checkpoint,) = list_checkpoints(tmp_path / "run")
        plain = compose("train", TrainConfig, ["data.path=x", "output=y", *SMALL, "table=replicated"])
        model = build_model(plain, trainer.num_items, torch.device("cpu"))
        load_plain(checkpoint, model)
        assert model.state_dict().keys() == expected.keys()
        assert all(torch.equal(part, expected[name]) for name, part in model.state_dict().items())
        trainer.resume()  # and what training goes on with
        assert all(torch.equal(part, trained[name]) for name, part in whole().items())


def test_a_signal_during_validation_saves_what_training_goes_on_with(dataset_dir, tmp_path):
    """Validation has the average in the model's place; it is done first thing when the run goes on."""
    overrides = [*AVERAGED, "trainer.max_epochs=1"]
    with trainer_of(dataset_dir, tmp_path / "run", *overrides) as trainer:
        swap = trainer.average.swap

        def swap_and_signal() -> None:
            trainer.average.swap = swap
            swap()
            os.kill(os.getpid(), signal.SIGTERM)

        trainer.average.swap = swap_and_signal
        with pytest.raises(Stopped):
            trainer.fit()
        assert not records(tmp_path / "run", "valid")
        trained = [weight.clone() for weight in trainer.average.parameters]
        average = [weight.clone() for weight in trainer.average.average]
        assert not torch.equal(trained[0], average[0])
        trainer.resume()
        assert all(map(torch.equal, trainer.average.parameters, trained))
        assert all(map(torch.equal, trainer.average.average, average))
        step = trainer.state.step
        trainer.fit()
        assert [record["step"] for record in records(tmp_path / "run", "valid")] == [step]
        assert trainer.state.step == step


def test_a_signal_at_the_very_end_waits_for_the_last_checkpoint(dataset_dir, tmp_path):
    with trainer_of(dataset_dir, tmp_path / "run", "trainer.max_epochs=1") as trainer:
        finish = trainer._finish

        def signal_and_finish() -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            finish()

        trainer._finish = signal_and_finish
        trainer.fit()
        assert (tmp_path / "run/finished.json").is_file()
        assert len(list_checkpoints(tmp_path / "run")) == 1


def test_a_best_checkpoint_that_was_lost_is_not_reported(dataset_dir, tmp_path, capfd):
    with trainer_of(dataset_dir, tmp_path / "run", "trainer.max_epochs=1") as trainer:
        trainer.state.best_step, trainer.state.best_value = 1, 0.9  # the disk was full then
        state = trainer.fit()
    finished = json.loads((tmp_path / "run/finished.json").read_text())
    assert finished["best_step"] == state.best_step == state.step
    assert finished["valid_ndcg@10"] == state.value < 0.9
    assert "step 1, ndcg@10 0.9000, could not be written" in capfd.readouterr().err


def test_old_checkpoints_that_cannot_be_removed_spoil_no_new_one(dataset_dir, tmp_path, capfd):
    with trainer_of(dataset_dir, tmp_path / "run", "trainer.keep_last=1") as trainer:
        trainer.checkpoints.save(trainer.state)
        trainer.checkpoints.wait()
        (list_checkpoints(tmp_path / "run")[0] / "progress.json").write_text("damaged")
        trainer.state.step = 1
        trainer.checkpoints.save(trainer.state)
        trainer.checkpoints.wait()
        assert not trainer.checkpoints.last.error
        assert read_state(list_checkpoints(tmp_path / "run")[-1]).step == 1
    assert "old checkpoints could not be removed" in capfd.readouterr().err


def test_an_epoch_that_goes_on_with_other_batches_is_validated_at_its_end(dataset_dir, tmp_path):
    with trainer_of(dataset_dir, tmp_path / "run", "trainer.max_steps=2", "trainer.checkpoint_every_steps=2") as trainer:
        trainer.fit()
    with process_group("cpu") as device:
        overrides = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", *SMALL, "trainer.batch_targets=900"]
        config = compose("train", TrainConfig, [*overrides, "trainer.max_steps=3"])
        trainer = Trainer(config, SequenceDataset.open(dataset_dir), device)
        trainer.resume()
        trainer.state.validated_step = -1  # as of a run that was killed at that step
        trainer.fit()
    assert [record["step"] for record in records(tmp_path / "run", "valid")] == [3]


def test_the_newest_and_the_best_are_kept(dataset_dir, tmp_path):
    with trainer_of(dataset_dir, tmp_path / "run", "trainer.keep_last=2", "trainer.keep_best=2") as trainer:
        values = {1: 0.1, 2: 0.5, 3: 0.3, 4: None, 5: 0.5, 6: 0.2, 7: None, 8: 0.4}
        for trainer.state.step, trainer.state.value in values.items():
            trainer.checkpoints.save(trainer.state)
        trainer.checkpoints.wait()
        (tmp_path / "run/config.yaml").touch()
        assert [read_state(checkpoint).step for checkpoint in list_checkpoints(tmp_path / "run")] == [2, 5, 7, 8]
        assert read_state(best_checkpoint(tmp_path / "run")).step == 2  # the first of equals
        trainer.state.value = 0.6  # step 8 was validated after it was saved
        trainer.checkpoints.save(trainer.state)
        trainer.checkpoints.wait()
        assert [read_state(checkpoint).step for checkpoint in list_checkpoints(tmp_path / "run")] == [2, 7, 8]
        assert read_state(best_checkpoint(tmp_path / "run")).step == 8
        assert not list((tmp_path / "run/checkpoints").glob(".partial-*"))


def test_checkpoints_of_an_older_version_are_read(run_dir, tmp_path):
    fields = json.loads((best_checkpoint(run_dir) / "progress.json").read_text())
    older = {**fields, "step_in_epoch": 7, "value": None}
    del older["batches_in_epoch"], older["value"]
    (tmp_path / "progress.json").write_text(json.dumps(older))
    state = read_state(tmp_path)
    assert state.value == fields["best_value"]
    assert state.batches_in_epoch == 7


def test_the_run_log_drops_what_a_resumed_run_does_again(tmp_path):
    log = RunLog(tmp_path)
    log.write("train", 5, 0, loss=1.0)
    log.write("valid", 5, 1, value=0.1)
    log.write("train", 10, 1, loss=1.0, rank_seconds=[1.0, 2.0])
    log.write("valid", 10, 2, value=0.1)
    log.close()
    RunLog(tmp_path, step=10, validated_step=5).close()  # killed between the validation and what the checkpoint says of it
    assert [record["step"] for record in records(tmp_path)] == [5, 10]
    assert [record["step"] for record in records(tmp_path, "valid")] == [5]


def test_rank_meter_sees_time_targets_and_lookups(dataset_dir, tmp_path):
    with trainer_of(dataset_dir, tmp_path / "run", "loss.num_negatives=40") as trainer:
        trainer.begin_epoch()
        batches = trainer.batches.epoch(0)
        trainer.train_step(next(batches))
        trainer.monitor.meter.collect(0)
        trainer.model.module.encoder.register_forward_hook(lambda *_: time.sleep(0.05))
        trainer.model.module.table.embeddings.register_forward_hook(lambda *_: time.sleep(0.2))
        num_ids = 0
        for batch, _ in zip(batches, range(3)):
            trainer.train_step(batch)
            num_ids += batch.item_ids.numel() + 40
        figures = trainer.monitor.meter.collect(300)
        (seconds,) = figures["rank_seconds"]
        assert seconds >= 3 * 0.05
        (exchange,) = figures["rank_exchange_seconds"]
        assert exchange >= 3 * 0.2
        assert figures["rank_targets_per_second"] == [300 / seconds]
        assert figures["rank_lookups"] == [num_ids]
        assert all(values == [0] for values in trainer.monitor.meter.collect(0).values())


@pytest.mark.parametrize(
    ("rates", "lag"),
    [
        ([100], ""),
        ([100, 90], ""),
        ([3000, 1500], "rank 1 lags: 1,500 targets/s in encoder and loss, the others 3,000"),
        ([60, 100, 90, 110], "rank 0 lags: 60 targets/s in encoder and loss, the others 100"),
        ([0.0, 0.0], ""),
    ],
)
def test_a_rank_lags_behind_the_median_of_the_others(rates, lag):
    assert describe_lag([0.5, 2.0], rates) == lag
    assert describe_lag([0.5, 0.9], rates) == ""  # too short to tell


@programs
@pytest.mark.parametrize(
    ("overrides", "limit"),
    [
        (["table.optimizer=sgd", "table.learning_rate=1e30", "trainer.checkpoint_every_steps=1"], ""),
        (["optimizer.learning_rate=1e30"], ""),
        (["trainer.max_loss=0.001"], ", or is above trainer.max_loss=0.001"),
    ],
)
def test_a_run_that_goes_bad_names_step_users_items_and_the_last_good_checkpoint(dataset_dir, tmp_path, overrides, limit):
    arguments = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", *SMALL, *overrides]
    result = run_program("train", *arguments, "trainer.log_every_steps=1000", check=False)
    assert result.returncode == 2
    found = re.search(r"the loss of batch (\d+) of epoch 1, at step (\d+), is not finite(.*?): lower", result.stderr)
    assert found, result.stderr
    number, step = int(found[1]), int(found[2])
    assert number == step == (1 if limit else 2)  # the first step spoils the weights
    assert found[3] == limit
    dataset = SequenceDataset.open(dataset_dir)
    batches = TrainingBatches(*dataset.train_sequences(), 20, 128, seed=0)
    batch, sequences = batches.look_up(0, *batches.bounds(0)[number - 1 : number + 1])
    users = re.search(r"users (.*?) and \d+ more", result.stderr)[1].split(", ")
    items = re.search(r"and items (.*?) and \d+ more", result.stderr)[1].split(", ")
    assert len(users) == len(items) == 5
    assert {int(user) for user in users} <= set(np.array(dataset.user_ids)[sequences])
    assert {int(item) for item in items} <= set(dataset.vocabulary.decode(batch.item_ids.numpy()).to_pylist())
    assert "last good checkpoint: there is none yet" in result.stderr
    checkpoints = list_checkpoints(tmp_path / "run")
    assert len(checkpoints) == ("trainer.checkpoint_every_steps=1" in overrides)
    assert ("do not go on from" in result.stderr) == bool(checkpoints)  # its weights gave the bad loss
    assert all(f"do not go on from {checkpoint}" in result.stderr for checkpoint in checkpoints)
    assert not records(tmp_path / "run", "valid")


def begin(*overrides: str, nproc: int = 1) -> subprocess.Popen:
    elastic = ["torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}", "-m"] if nproc > 1 else []
    command = [sys.executable, "-m", *elastic, "launch.train", *overrides]
    return subprocess.Popen(
        command, cwd=REPOSITORY, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(holds, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 200
    while not holds():
        assert process.poll() is None, process.communicate()[0][-4000:]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def last_step(run_dir: Path) -> int:
    text = (run_dir / "metrics.jsonl").read_text() if (run_dir / "metrics.jsonl").exists() else ""
    return max((json.loads(line)["step"] for line in text.splitlines(keepends=True) if line.endswith("\n")), default=0)


@programs
def test_signals_save_and_the_epoch_goes_on_exactly_on_other_ranks(dataset_dir, tmp_path):
    """SIGTERM to two ranks, Ctrl-C to one, and the rest: every target of the epoch once."""
    run = tmp_path / "run"
    arguments = [f"data.path={dataset_dir}", f"output={run}", *SMALL, "trainer.batch_targets=24", "trainer.max_epochs=1"]
    arguments += ["trainer.log_every_steps=1"]
    with begin(*arguments, nproc=2) as two:
        wait_for(lambda: last_step(run) >= 5, two)
        two.send_signal(signal.SIGTERM)
        output, _ = two.communicate(timeout=100)
    assert two.returncode != 0
    (checkpoint,) = list_checkpoints(run)
    on_two = read_state(checkpoint).step
    assert read_state(checkpoint).batches_in_epoch == 2 * on_two
    assert f"stopped by a signal at step {on_two}; last checkpoint: {checkpoint}" in output
    assert last_step(run) == on_two
    with begin(*arguments, "trainer.resume=true") as one:
        wait_for(lambda: last_step(run) >= on_two + 5, one)
        one.send_signal(signal.SIGINT)
        one.communicate(timeout=100)
    assert one.returncode == 75
    assert not (run / "finished.json").exists()
    run_program("train", *arguments, "trainer.resume=true")
    batches = TrainingBatches(*SequenceDataset.open(dataset_dir).train_sequences(), 20, 24, seed=0)
    steps = records(run)
    assert [record["step"] for record in steps] == list(range(1, on_two + batches.num_batches(0) - 2 * on_two + 1))
    sizes = [batch.item_ids.numel() - (batch.offsets.numel() - 1) for batch in batches.epoch(0)]
    both = [sum(sizes[place : place + 2]) for place in range(0, 2 * on_two, 2)]
    assert [record["num_targets"] for record in steps] == both + sizes[2 * on_two :]


@programs
def test_a_full_disk_stops_neither_training_nor_the_log(dataset_dir, tmp_path):
    """The kernel refuses every write to a file for a while, as a full disk does."""
    run = tmp_path / "run"
    arguments = [f"data.path={dataset_dir}", f"output={run}", *SMALL, "trainer.max_epochs=100", "trainer.max_steps=300"]
    arguments += ["trainer.log_every_steps=1", "trainer.checkpoint_every_steps=10", "trainer.validate_every_epochs=100"]
    with begin(*arguments) as process:
        wait_for(lambda: list_checkpoints(run), process)
        unlimited = resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (1, resource.RLIM_INFINITY))
        good = None
        lines = []
        for line in process.stdout:
            lines.append(line)
            if "could not be written" in line:
                good = list_checkpoints(run)[-1]
                break
        assert good is not None, "".join(lines)
        assert re.search(r"warning: the checkpoint of step \d+ could not be written \(.*File too large", line), line
        assert line.rstrip().endswith(f"last good one: {good}")
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, unlimited)
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output[-4000:]
    assert [record["step"] for record in records(run)] == list(range(1, 301))
    finished = json.loads((run / "finished.json").read_text())
    assert finished["num_failed_checkpoints"] >= 1
    assert finished["num_checkpoints"] >= 2
    assert finished["steps"] == 300
    assert read_state(list_checkpoints(run)[-1]).step == 300


@programs
def test_a_killed_and_a_hung_rank_lose_nothing(tmp_path):
    """`tools/chaos.py train`: kill -9, then stop, one of two ranks; the losses, metrics and weights of an undisturbed run."""
    command = [sys.executable, "tools/chaos.py", "train", "kills=2", "stop_every=2", "seed=3", f"output={tmp_path}"]
    command += ["trainer.max_epochs=4"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "kill 1/2" in result.stdout
    assert "stop 2/2" in result.stdout
    assert "jobs, 2 blows" in result.stdout
    assert os.listdir(tmp_path / "undisturbed")
