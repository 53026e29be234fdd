"""Training for real: fresh processes, gloo ranks, kills."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from glintru_rec.config import compose
from glintru_rec.encoders import build_encoder
from glintru_rec.errors import InputError
from glintru_rec.training.checkpoint import RunState, best_checkpoint, list_checkpoints, read_state
from glintru_rec.training.config import TrainConfig
from tests.conftest import REPOSITORY, SMALL, environment, run_program

pytestmark = pytest.mark.programs


def records(run_dir: Path, kind: str = "train") -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == kind]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    return [(record["step"], record["loss"]) for record in records(run_dir)]


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    from glintru_rec.training.build import load_unsharded

    return load_unsharded(run_dir).model.state_dict()


def compose_of(run_dir: Path) -> TrainConfig:
    from glintru_rec.config import from_yaml

    return from_yaml(run_dir / "config.yaml", TrainConfig)


TWENTY_STEPS = [*SMALL, "trainer.max_steps=20", "trainer.log_every_steps=1", "trainer.checkpoint_every_steps=5"]


def test_run_directory(run_dir):
    assert {"config.yaml", "versions.json", "metrics.jsonl", "finished.json", "checkpoints", "tensorboard"} <= set(
        os.listdir(run_dir)
    )
    assert list((run_dir / "tensorboard").glob("events.*"))
    versions = json.loads((run_dir / "versions.json").read_text())
    assert versions["torch"] == torch.__version__
    assert compose_of(run_dir).model.embedding_dim == 16
    valid = records(run_dir, "valid")
    assert valid[-1]["ndcg@10"] > 0.3  # the law is easy: chance is about 0.08
    best = max(valid, key=lambda record: record["ndcg@10"])
    finished = json.loads((run_dir / "finished.json").read_text())
    assert (finished["best_step"], finished["best_epoch"]) == (best["step"], best["epoch"])
    assert finished["num_parameters"]["table"] == 60 * 16
    assert finished["num_parameters"]["encoder"] == sum(
        weight.numel() for name, weight in weights(run_dir).items() if name.startswith("encoder.")
    )
    assert read_state(best_checkpoint(run_dir)).step == best["step"]


AVERAGED = ["table=replicated", "optimizer.ema_decay=0.9", "optimizer.schedule=cosine", "optimizer.warmup_steps=3"]


@pytest.mark.parametrize(
    "overrides",
    [
        ["table=row_wise", "optimizer.schedule=linear"],
        ["table=replicated"],
        AVERAGED,
        ["model.item_bias=true"],
        ["loss.negatives=mixed", "loss.num_negatives=40"],
    ],
)
def test_resume_equals_uninterrupted(dataset_dir, tmp_path, overrides):
    """20 steps whole = 10 and more, killed with -9, and the rest: losses to the bit, weights too."""
    arguments = [f"data.path={dataset_dir}", *overrides, *TWENTY_STEPS]
    run_program("train", *arguments, f"output={tmp_path / 'whole'}")
    command = [sys.executable, "-m", "launch.train", *arguments, f"output={tmp_path / 'killed'}"]
    with subprocess.Popen(command, cwd=REPOSITORY, env=environment(), stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / "killed/checkpoints/step-00000010").exists():
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed/finished.json").exists()
    run_program("train", *arguments, f"output={tmp_path / 'killed'}", "trainer.resume=true")
    assert losses(tmp_path / "killed") == losses(tmp_path / "whole")
    assert [step for step, _ in losses(tmp_path / "whole")] == list(range(1, 21))
    ours, whole = weights(tmp_path / "killed"), weights(tmp_path / "whole")
    assert all(torch.equal(ours[name], whole[name]) for name in whole)
    # finished.json speaks of all parts of the run: each step's time and targets once.
    killed, undisturbed = (json.loads((tmp_path / name / "finished.json").read_text()) for name in ("killed", "whole"))
    steps = records(tmp_path / "killed")
    assert [step["num_targets"] for step in steps] == [step["num_targets"] for step in records(tmp_path / "whole")]
    assert killed["train_seconds"] == sum(step["seconds"] for step in steps)
    assert killed["targets_per_second"] == sum(step["num_targets"] for step in steps) / killed["train_seconds"]
    same = ("steps", "epochs", "best_step", "best_epoch", "valid_ndcg@10", "num_parameters")
    assert {name: killed[name] for name in same} == {name: undisturbed[name] for name in same}
    assert killed["peak_memory_bytes"] > 10**8


def test_compiled_training(dataset_dir, tmp_path):
    """Going on compiled from an eager checkpoint gives the eager losses, dropout included, and a checkpoint to load as any."""
    small = ["model=lru_rec", "model.embedding_dim=16", "model.options.num_blocks=1", "data.max_seq_len=20", *AVERAGED]
    small += ["loss.num_negatives=16", "loss.seen_weight=0"]
    steps = [f"trainer.{key}" for key in ("batch_targets=128", "log_every_steps=1", "checkpoint_every_steps=3", "keep_last=9")]
    arguments = [f"data.path={dataset_dir}", *small, *steps, "trainer.max_steps=6"]
    run_program("train", *arguments, f"output={tmp_path / 'eager'}")
    shutil.copytree(tmp_path / "eager", tmp_path / "compiled")
    shutil.rmtree(tmp_path / "compiled/checkpoints/step-00000006")
    run_program("train", *arguments, f"output={tmp_path / 'compiled'}", "trainer.resume=true", "trainer.compile=true")
    assert compose_of(tmp_path / "compiled").trainer.compile
    found, expected = losses(tmp_path / "compiled"), losses(tmp_path / "eager")
    assert [step for step, _ in found] == [1, 2, 3, 4, 5, 6]
    assert [loss for _, loss in found] == pytest.approx([loss for _, loss in expected], rel=1e-5)
    ours, eager = weights(tmp_path / "compiled"), weights(tmp_path / "eager")
    assert list(ours) == list(eager)
    for name in eager:
        torch.testing.assert_close(ours[name], eager[name], rtol=1e-3, atol=1e-4)


def test_shards_start_different(dataset_dir, tmp_path):
    """Each rank fills its own rows; from one seed they would be copies of each other. Biases start at 0."""
    arguments = [
        f"data.path={dataset_dir}",
        f"output={tmp_path / 'run'}",
        *SMALL,
        "trainer.max_steps=1",
        "table.learning_rate=1e-30",
        "model.item_bias=true",
    ]
    run_program("train", *arguments, nproc=2)
    (table,) = (value for name, value in weights(tmp_path / "run").items() if "t_item" in name)
    half = -(-len(table) // 2)
    assert not (table[: len(table) - half, :16] == table[half:, :16]).any()
    assert 0 < table[:, 16].abs().max() < 1e-20  # but for the one step
    assert not table[:, 17:].any()


def test_kill_between_last_checkpoint_and_validation(dataset_dir, tmp_path):
    arguments = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", *SMALL, "trainer.max_steps=6"]
    arguments += ["trainer.checkpoint_every_steps=3", "trainer.log_every_steps=1"]
    kill = "import os, sys; from glintru_rec.training.trainer import Trainer; Trainer.validate = lambda self: os._exit(9); "
    kill += "from glintru_rec.programs.launcher import run; from glintru_rec.programs.train import TrainConfig, train; "
    kill += "run('train', TrainConfig, train)"
    assert subprocess.run([sys.executable, "-c", kill, *arguments], cwd=REPOSITORY, env=environment()).returncode == 9
    run_program("train", *arguments, "trainer.resume=true")
    assert [record["step"] for record in records(tmp_path / "run", "valid")] == [6]
    assert read_state(best_checkpoint(tmp_path / "run")).best_step == 6
    run_program("train", *arguments[:-3], "trainer.max_steps=8", "trainer.resume=true")
    assert [record["step"] for record in records(tmp_path / "run", "valid")] == [6, 8]


def test_restart_of_a_refused_launch_leaves_the_other_run(run_dir, dataset_dir):
    before = (run_dir / "config.yaml").read_text()
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1", "--max-restarts=1"]
    command = [*launch, "-m", "launch.train", f"data.path={dataset_dir}", f"output={run_dir}", *SMALL, "trainer.seed=99"]
    assert subprocess.run(command, cwd=REPOSITORY, env=environment(), capture_output=True).returncode != 0
    assert (run_dir / "config.yaml").read_text() == before


def test_resume_needs_a_run(dataset_dir, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    result = run_program("train", f"data.path={dataset_dir}", f"output={tmp_path}", "trainer.resume=true", check=False)
    assert result.returncode == 2
    assert "holds no run to go on with" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_resume_with_other_batches_goes_on_where_the_epoch_was(dataset_dir, tmp_path):
    from glintru_rec.data.batches import TrainingBatches
    from glintru_rec.data.dataset import SequenceDataset
    from glintru_rec.programs.train import train

    def go_on(*overrides: str) -> None:
        fixed = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", *SMALL, "trainer.log_every_steps=1"]
        assert train(compose("train", TrainConfig, [*fixed, "trainer.resume=true", *overrides])) == 0

    go_on("trainer.max_steps=3")
    with pytest.raises(
        InputError, match=r"was written within epoch 1, whose order of reading .* now \(trainer.seed, data.\*, the data or"
    ):
        go_on("trainer.seed=1")
    go_on("trainer.batch_targets=512", "trainer.max_epochs=1")
    items, offsets = SequenceDataset.open(dataset_dir).train_sequences()
    before = TrainingBatches(items, offsets, 20, 128, seed=0)
    for _ in zip(before.epoch(0), range(3)):
        pass
    rest = TrainingBatches(items, offsets, 20, 512, seed=0).num_steps(0, before.place)
    assert [step for step, _ in losses(tmp_path / "run")] == list(range(1, 3 + rest + 1))
    num_targets = sum(record["num_targets"] for record in records(tmp_path / "run"))
    assert num_targets == items.size - (np.diff(offsets) > 0).sum()  # each once
    go_on(
        "trainer.seed=1", "trainer.max_epochs=2", "trainer.max_steps=15"
    )  # between epochs there is nothing to skip or to repeat


def test_half_written_checkpoint_is_not_taken(dataset_dir, tmp_path):
    run = tmp_path / "run"
    arguments = [f"data.path={dataset_dir}", f"output={run}", *SMALL, "trainer.log_every_steps=1"]
    run_program("train", *arguments, "trainer.max_steps=6", "trainer.checkpoint_every_steps=3", "trainer.keep_last=9")
    # What a kill in the middle of a save leaves: a directory aside, without its last files.
    partial = run / "checkpoints/.partial-step-00000009"
    shutil.copytree(run / "checkpoints/step-00000006", partial)
    (partial / "progress.json").unlink()
    (partial / ".metadata").unlink()
    assert [path.name for path in list_checkpoints(run)] == ["step-00000003", "step-00000006"]
    shutil.rmtree(run / "checkpoints/step-00000006")
    result = run_program("train", *arguments, "trainer.max_steps=6", "trainer.resume=true")
    assert "step-00000003 (step 3" in result.stdout
    assert [step for step, _ in losses(run)] == [1, 2, 3, 4, 5, 6]
    assert not partial.exists()


def test_two_ranks_learn_what_one_learns(dataset_dir, tmp_path):
    """Two gloo ranks with the table sharded by rows; SGD, so that the sum over ranks is all that matters."""
    common = [f"data.path={dataset_dir}", *SMALL, "model.options.dropout=0", "trainer.max_epochs=1", "loss=full_softmax"]
    common += ["table.optimizer=sgd", "trainer.log_every_steps=1", "trainer.patience=0"]
    run_program("train", *common, f"output={tmp_path / 'two'}", "trainer.batch_targets=64", nproc=2)
    run_program("train", *common, f"output={tmp_path / 'one'}", "trainer.batch_targets=128")
    two, one = records(tmp_path / "two", "valid"), records(tmp_path / "one", "valid")
    assert two[-1]["num_users"] == one[-1]["num_users"]
    checkpoint = best_checkpoint(tmp_path / "two")
    assert {path.name.split("_")[2] for path in checkpoint.glob("*.distcp")} == {"0", "1"}  # each rank wrote its part
    # Batches are packed differently, so the runs are not equal; but both must have learnt, and alike.
    assert two[-1]["ndcg@10"] == pytest.approx(one[-1]["ndcg@10"], rel=0.2)
    first = losses(tmp_path / "two")[0][1]
    assert losses(tmp_path / "two")[-1][1] < first - 0.1


ONE_STEP = """
import sys
from pathlib import Path
import torch
import torch.distributed as dist
from glintru_rec.config import compose
from glintru_rec.data.batches import Batch
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.jagged import lengths_from_offsets, offsets_from_lengths
from glintru_rec.losses import Negatives
from glintru_rec.tables.sharding import local_rows
from glintru_rec.training.build import build_negatives
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.trainer import Trainer

folder, *overrides = sys.argv[1:]
with process_group("cpu") as device:
    for negatives in ("in_batch", "mixed"):
        config = compose("train", TrainConfig, [*overrides, f"loss.negatives={negatives}"])
        trainer = Trainer(config, SequenceDataset.open(config.data.path), device)
        before = local_rows(trainer.model)[0].clone()
        trainer.losses.negatives = build_negatives(config.loss, trainer.dataset, trainer.batches, 0)
        batches, kept = trainer.batches.epoch(0), {}
        batch = next(batches)
        if dist.get_world_size() == 1:  # the union of what two ranks have
            second = next(batches)
            lengths = torch.cat([lengths_from_offsets(each.offsets) for each in (batch, second)])
            batch = Batch(torch.cat([batch.item_ids, second.item_ids]), offsets_from_lengths(lengths))
            config.trainer.batch_targets *= 2
            if negatives == "mixed":
                drawn = Negatives(*torch.load(Path(folder) / "mixed.pt"), torch.empty(0))
                trainer.losses.negatives.draw = lambda target_ids: drawn
        def keep(name, function):
            def call(argument):
                kept[name] = function(argument)
                return kept[name]
            return call
        trainer.losses.negatives.draw = keep("negatives", trainer.losses.negatives.draw)
        trainer.losses = keep("losses", trainer.losses)
        trainer.train_step(batch)
        after = local_rows(trainer.model)[0]
        result = {"losses": kept["losses"].detach(), "negatives": kept["negatives"][:2], "before": before, "after": after}
        torch.save(result, Path(folder) / f"{negatives}-{dist.get_rank()}-of-{dist.get_world_size()}.pt")
"""


def test_two_ranks_with_gathered_negatives_are_one_rank_with_all(dataset_dir, run_dir, tmp_path):
    """Losses, and the table after a step of SGD, against one process with both batches and the same negatives."""
    (tmp_path / "one_step.py").write_text(ONE_STEP)
    arguments = [str(tmp_path / "one_step.py"), str(tmp_path), f"data.path={dataset_dir}", "output=none", *SMALL]
    arguments += ["model.options.dropout=0", f"trainer.init_from={run_dir}", "table.optimizer=sgd", "table.learning_rate=1"]
    arguments += ["loss.gather_negatives=true", "loss.num_negatives=40", "loss.mixed_share=0.4"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    subprocess.run([*launch, *arguments], cwd=REPOSITORY, env=environment(), check=True, timeout=300)

    def results(negatives: str, world_size: int) -> list[dict]:
        return [torch.load(tmp_path / f"{negatives}-{rank}-of-{world_size}.pt") for rank in range(world_size)]

    # Of each rank's 40 negatives 16 are from its batch; the counts of targets are worked out anew.
    from glintru_rec.data.dataset import SequenceDataset

    dataset = SequenceDataset.open(dataset_dir)
    items, offsets = dataset.train_sequences()
    counts = np.bincount(np.delete(items, offsets[:-1]), minlength=dataset.num_items)
    ids = results("mixed", 2)[0]["negatives"][0]
    assert ids.numel() == 2 * 40
    log_q = torch.from_numpy(np.log(2 * 24 / dataset.num_items + 2 * 16 * counts / counts.sum()))[ids].float()
    torch.save((ids, log_q), tmp_path / "mixed.pt")
    subprocess.run([sys.executable, *arguments], cwd=REPOSITORY, env=environment(), check=True, timeout=300)
    for negatives in ("in_batch", "mixed"):
        two, (one,) = results(negatives, 2), results(negatives, 1)
        assert two[0]["losses"].numel() != two[1]["losses"].numel()  # ranks have different numbers of targets
        for joined, expected in zip(two[0]["negatives"], one["negatives"]):
            torch.testing.assert_close(joined, expected, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(two[1]["negatives"], two[0]["negatives"], rtol=0, atol=0)
        torch.testing.assert_close(torch.cat([each["losses"] for each in two]), one["losses"], rtol=1e-5, atol=1e-5)
        moved = torch.cat([each["after"] - each["before"] for each in two])
        torch.testing.assert_close(moved, one["after"] - one["before"], rtol=1e-4, atol=1e-5)
        assert moved.abs().max() > 0.01


def test_finished_run(run_dir, dataset_dir, tmp_path):
    """A finished run is left as it is by a resume, and goes on when it is given more epochs."""
    shutil.copytree(run_dir, tmp_path / "run")
    arguments = [
        f"data.path={dataset_dir}",
        f"output={tmp_path / 'run'}",
        *SMALL,
        "model.options.dropout=0.1",
        "trainer.resume=true",
    ]
    run_program("train", *arguments, "trainer.max_epochs=4")
    assert losses(tmp_path / "run") == losses(run_dir)
    run_program("train", *arguments, "trainer.max_epochs=5")
    assert records(tmp_path / "run", "valid")[:4] == records(run_dir, "valid")
    assert [record["epoch"] for record in records(tmp_path / "run", "valid")] == [1, 2, 3, 4, 5]


def test_early_stopping(dataset_dir, tmp_path):
    """After two validations without a better one; those of the epochs that are read backwards in part do not count."""
    arguments = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", *SMALL, "optimizer.learning_rate=1e-9"]
    arguments += ["table.learning_rate=1e-9", "data.reversed_share=0.5", "data.reversed_epochs=7"]
    run_program("train", *arguments, "trainer.patience=2", "trainer.max_epochs=30")
    assert 7 + 2 <= len(records(tmp_path / "run", "valid")) <= 7 + 6


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.depth=3"], "depth"),
        (["model=transformer"], "transformer"),
        (["trainer.max_epochs=many"], "many"),
        (["trainer.max_epochs=0"], "trainer.max_epochs is 0; it must be at least 1"),
        (["loss.temperature=-1"], "loss.temperature is -1.0; it must be greater than 0"),
        (["table.learning_rate=inf"], "table.learning_rate is inf; it must be greater than 0 and finite"),
        (["model.similarity=euclid"], "model.similarity is 'euclid'; it must be one of dot, cosine"),
        (["model=lru_rec", "model.similarity=cosine"], "model.item_bias is True; it must be false with"),
        (["table.optimizer=adamw"], "table.optimizer=adamw needs table.sharding=replicated"),
        (["table.weight_decay=0.1"], "ignores it"),
        (["trainer.batch_targets=16"], "trainer.batch_targets is 16"),
        (["trainer.max_loss=-1"], "trainer.max_loss is -1.0; it must be at least 0"),
        (["trainer.timeout_seconds=0"], "trainer.timeout_seconds is 0.0; it must be greater than 0"),
        (["trainer.keep_best=0"], "trainer.keep_best is 0; it must be at least 1"),
        (["loss.negatives=hard"], "loss.negatives is 'hard'; it must be one of uniform, log_uniform, popularity"),
        (["loss.negatives=in_batch", "loss.logq_correction=false"], "loss.logq_correction is False; it must be true with"),
        (["loss.correct_positive=true", "loss.logq_correction=false"], "loss.correct_positive is True; it must be false with"),
        (["loss.mixed_share=1"], "loss.mixed_share is 1.0; it must be greater than 0 and less than 1"),
        (["loss.popularity_power=-1"], "loss.popularity_power is -1.0; it must be at least 0"),
        (["data.reversed_share=2"], "data.reversed_share is 2.0; it must be from 0 to 1"),
        (["data.reversed_share=0.5"], "data.reversed_epochs is 0; it must be"),
        (["loss.horizon=3", "model.options.causal=false"], "loss.horizon is 3, but model.options.causal is false"),
        (["loss.horizon=0"], "loss.horizon is 0; it must be at least 1"),
        (["optimizer.ema_decay=1"], "optimizer.ema_decay is 1.0; it must be at least 0"),
        (["optimizer.ema_decay=0.9"], "optimizer.ema_decay=0.9 needs table.sharding=replicated"),
        (["optimizer.schedule=step"], "optimizer.schedule is 'step'; it must be one of constant, linear, cosine"),
        (["output=a = b"], "'output=a = b' cannot be read: give key=value; a value with blanks"),
        (["loss"], "'loss' cannot be read: give key=value"),
        ([], "missing value: give data.path=… output=…"),
    ],
)
def test_config_errors(overrides, message):
    paths = ["data.path=x", "output=y"] if overrides else []
    with pytest.raises(InputError, match=message.replace("[", r"\[").replace("(", r"\(")):
        compose("train", TrainConfig, [*paths, *overrides])


def test_validations_are_noted():
    """The first one is the best so far even where its figure is negative, an equal one is no better, and 0 is no patience."""
    state = RunState("model", "vocabulary", "batches")
    seen = []
    for state.step, value in ((3, -2.0), (6, -1.0), (9, -1.0), (12, -1.5)):
        state.note_validation(value)
        seen.append((state.is_best, state.best_step, state.best_value, state.has_stalled(2), state.has_stalled(0)))
    assert seen == [
        (True, 3, -2, False, False),
        (True, 6, -1, False, False),
        (False, 6, -1, False, False),
        (False, 6, -1, True, False),
    ]
    assert (state.value, state.validated_step) == (-1.5, 12)


def test_bad_encoder_option_names_the_choices(dataset_dir, tmp_path):
    result = run_program(
        "train", f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", "+model.options.depth=3", check=False
    )
    assert result.returncode == 2
    assert "model.options.depth is not an option of glint_ru; it has num_heads" in result.stderr
    assert not (tmp_path / "run").exists()
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [({"num_heads": "two"}, "num_heads is 'two'"), ({"dropout": "high"}, "dropout"), ({"causal": "no"}, "causal is 'no'")],
)
def test_encoder_options_have_types(options, message):
    with pytest.raises(InputError, match=message):
        build_encoder("glint_ru", 16, options)


def test_occupied_output_is_refused(dataset_dir, run_dir):
    before = sorted(run_dir.rglob("*"))
    result = run_program("train", f"data.path={dataset_dir}", f"output={run_dir}", *SMALL, check=False)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert "is not empty" in result.stderr
    assert sorted(run_dir.rglob("*")) == before


def test_resume_with_another_model_is_refused(dataset_dir, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    arguments = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", *SMALL, "trainer.resume=true"]
    result = run_program("train", *arguments, "model.embedding_dim=32", check=False)
    assert result.returncode == 2
    assert "was written by another model" in result.stderr
    assert (tmp_path / "run/config.yaml").read_text() == (run_dir / "config.yaml").read_text()


def test_resume_without_the_biases_is_refused(dataset_dir, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    arguments = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", *SMALL, "trainer.resume=true"]
    result = run_program("train", *arguments, "model.options.dropout=0.1", "model.item_bias=true", check=False)
    assert result.returncode == 2
    assert "was written by another model" in result.stderr


def test_resume_without_the_average_is_refused(dataset_dir, run_dir, tmp_path):
    shutil.copytree(run_dir, tmp_path / "run")
    arguments = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", *SMALL, "trainer.resume=true"]
    result = run_program("train", *arguments, "model.options.dropout=0.1", *AVERAGED, check=False)
    assert result.returncode == 2
    assert "was written without an average of the weights" in result.stderr


@pytest.mark.parametrize("overrides", [[], ["table=replicated", "model.options.causal=false"]])
def test_warm_start(run_dir, dataset_dir, tmp_path, overrides):
    """Rates of nothing: after a step the weights are still those of the best checkpoint of the other run."""
    arguments = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", *SMALL, "model.options.dropout=0.1", *overrides]
    rates = ["optimizer.learning_rate=1e-30", "table.learning_rate=1e-30", "trainer.max_steps=1", "trainer.seed=9"]
    run_program("train", *arguments, *rates, f"trainer.init_from={run_dir}")
    ours, theirs = weights(tmp_path / "run"), weights(run_dir)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_warm_start_needs_the_same_parameters(run_dir, dataset_dir, tmp_path):
    arguments = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", *SMALL, f"trainer.init_from={run_dir}"]
    result = run_program("train", *arguments, "model.embedding_dim=32", check=False)
    assert result.returncode == 2
    assert f"checkpoint {best_checkpoint(run_dir)} cannot be loaded into this model" in result.stderr
    assert not (tmp_path / "run").exists()


def test_no_dataset(tmp_path):
    result = run_program("train", f"data.path={tmp_path}", f"output={tmp_path / 'run'}", check=False)
    assert result.returncode == 2
    assert "manifest.json" in result.stderr
    assert not (tmp_path / "run").exists()


def test_dataset_without_validation_users(tmp_path):
    from glintru_rec.data.prepare import PrepareConfig, prepare

    (tmp_path / "log.csv").write_text(
        "user_id,item_id,timestamp\n" + "".join(f"{u},{i},{i}\n" for u in range(9) for i in (1, 2))
    )
    prepare(PrepareConfig(str(tmp_path / "log.csv"), str(tmp_path / "dataset"), min_user_events=1, min_item_events=1))
    result = run_program("train", f"data.path={tmp_path / 'dataset'}", f"output={tmp_path / 'run'}", check=False)
    assert result.returncode == 2
    assert "no user with three events" in result.stderr
    assert not (tmp_path / "run").exists()


def test_help_names_every_key():
    text = run_program("train", "--help").stdout
    for key in ("max_seq_len", "num_negatives", "checkpoint_every_steps", "init_std", "warmup_steps"):
        assert key in text
