"""The training loop, to be read from the top: fit → train_epoch → train_step."""

import time
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from glintru_rec.data.batches import START, Batch
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.dataset_files import fingerprint
from glintru_rec.data.id_map import ID_MAP_FILE, IdMap
from glintru_rec.data.reader_dataset import RowGroupDataset
from glintru_rec.errors import InputError
from glintru_rec.memory import give_back_freed
from glintru_rec.metrics import Protocol
from glintru_rec.progress import Progress
from glintru_rec.scoring.evaluation import check_has_cases, evaluate
from glintru_rec.tables.sharding import build_optimizer
from glintru_rec.training.averaging import WeightAverage
from glintru_rec.training.batch_loss import BatchLoss
from glintru_rec.training.build import (
    build_batches,
    build_distributed,
    build_negatives,
    build_uniform,
    check_kind,
    check_vocabulary,
    warm_start,
)
from glintru_rec.training.checkpoint import RunState, find_resumable, from_first_rank, load_checkpoint, newest_checkpoint
from glintru_rec.training.checkpoint_writer import CheckpointWriter
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.dynamic_items import DynamicItems
from glintru_rec.training.ending import write_finished
from glintru_rec.training.monitor import BadLoss, Monitor, describe_checkpoints, name_batch
from glintru_rec.training.processes import StopSignals, seed_step
from glintru_rec.training.rank_meter import RankMeter
from glintru_rec.training.run_log import RunLog
from glintru_rec.training.schedule import LearningRates
from glintru_rec.training.summary import peak_memory


class Stopped(Exception):
    """A signal ended training before its end; it is saved and can go on."""


class Trainer:
    """Train a model on a sequence dataset.

    Args:
        config: the whole run.
        dataset: opened from ``config.data.path`` (`open_dataset`).
        device: of this rank; the process group exists.
    """

    def __init__(self, config: TrainConfig, dataset: SequenceDataset | RowGroupDataset, device: torch.device):
        self.config, self.dataset, self.device = config, dataset, device
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.run_dir = Path(config.output)
        self.num_items = config.num_rows(dataset.num_items)
        id_map = IdMap(dataset.vocabulary.id_type, config.vocabulary) if config.dynamic else None
        check_has_cases(dataset.num_cases, "valid")  # now, not after the first epoch
        self.model = build_distributed(config, self.num_items, device, dataset.side.sizes)
        # A run that goes on has weights of its own.
        if config.trainer.init_from and from_first_rank(lambda: newest_checkpoint(self.run_dir)) is None:
            warm_start(self.model, Path(config.trainer.init_from), dataset, id_map)
        dense = config.optimizer
        self.optimizer = build_optimizer(
            self.model,
            config.table,
            lambda groups: torch.optim.AdamW(groups, lr=dense.learning_rate, weight_decay=dense.weight_decay, fused=True),
        )
        self.items = DynamicItems(config, id_map, self.model, self.optimizer) if id_map else None
        self.learning_rates = LearningRates(self.optimizer, dense.schedule, dense.warmup_steps)
        self.average = WeightAverage(self.model.module.parameters(), dense.ema_decay) if dense.ema_decay > 0 else None
        if config.trainer.compile:  # in place: the names of the parameters stay as they are
            self.model.module.encoder.compile(fullgraph=True, dynamic=True)
        self.losses = BatchLoss(config, self.model, self.num_items, device)
        self.batches = build_batches(config, dataset, self.model.module.encoder.causal)
        vocabulary_sha256, batching = fingerprint(dataset.manifest), self.batches.fingerprint()
        averaged = self.average is not None
        self.state = RunState(
            config.model_fingerprint(), vocabulary_sha256, batching, averaged=averaged, dynamic=config.dynamic
        )
        self.checkpoints = CheckpointWriter(
            self.run_dir,
            self.model,
            self.optimizer,
            self.average,
            config.trainer.keep_last,
            config.trainer.keep_best,
            config.trainer.checkpoint_in_background,
            config.trainer.timeout_seconds,
            id_map,
        )
        spread = config.table.sharding == "row_wise"
        meter = RankMeter(self.model.module.table, -(-self.num_items // self.world_size) if spread else 0)
        self.monitor = Monitor(meter, config.trainer.max_loss, device)
        self.protocol = Protocol(split="valid")

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run directory, if there is one."""
        found = find_resumable(self.run_dir, self.state.model_fingerprint)
        if found is None:
            return
        newest, state = found
        check_kind(self.config.dynamic, state, self.run_dir)
        check_vocabulary(self.dataset, state, self.run_dir)
        if state.averaged != self.state.averaged:
            raise InputError(
                f"{newest} was written {'with' if state.averaged else 'without'} an average of the weights "
                f"(optimizer.ema_decay): resume likewise, or choose another output"
            )
        if state.batching != self.state.batching:
            if state.batches_in_epoch:  # what is done of it could be neither skipped nor told from what is not
                raise InputError(
                    f"{newest} was written within epoch {state.epoch + 1}, whose order of reading is another one now "
                    f"(trainer.seed, data.*, the data or this program have changed): resume with what they were, or begin a "
                    f"new run with its weights by trainer.init_from={self.run_dir}"
                )
            state.batching = self.state.batching
        if self.items is not None:
            self.items.id_map.load(newest / ID_MAP_FILE)
        load_checkpoint(newest, self.model, self.optimizer, self.average)
        self.state = state
        if self.rank == 0:
            print(f"resumed from {newest} (step {state.step}, epoch {state.epoch + 1})", flush=True)

    def fit(self) -> RunState:
        """Train until the last epoch, the last step, or until validation stops improving.

        Raises:
            Stopped: by SIGTERM or SIGINT, on any rank; the weights of the last step are saved.
        """
        trainer, state = self.config.trainer, self.state
        self.log = RunLog(self.run_dir, state.step, state.validated_step, self.config) if self.rank == 0 else None
        if self.rank == 0:
            (self.run_dir / "finished.json").unlink(missing_ok=True)  # of a shorter run that now goes on
        ahead = self.batches.num_steps(state.epoch, state.place)
        ahead += max(0, trainer.max_epochs - state.epoch - 1) * self.batches.num_steps(state.epoch)
        total = state.step + ahead
        self.progress = Progress("train", min(total, trainer.max_steps or total), "steps", enabled=self.rank == 0)
        with StopSignals() as self.signals:
            try:
                self._fit()
            except Stopped as stopped:  # saved only here: validation, for one, has given the weights back by now
                raise Stopped(f"{stopped}; last checkpoint: {self._save_at_once()}") from None
            self._finish()
        return state

    def _fit(self) -> None:
        while True:
            if self._is_validation_due():
                self.validate()
                self.save()
            if self._is_over():
                break
            self.train_epoch()
            if self._out_of_steps():
                break
            self.state.epoch, self.state.place = self.state.epoch + 1, START
        if self.state.validated_step != self.state.step:
            self.validate()
            self.save()

    def _is_validation_due(self) -> bool:
        """Whether validation follows on the epoch that has ended, now or before a signal came between."""
        state = self.state
        if state.batches_in_epoch or state.validated_step == state.step:
            return False
        return state.step > 0 and state.epoch % self.config.trainer.validate_every_epochs == 0

    def _finish(self) -> None:
        """Wait for the last checkpoint and say how the run went; a signal still has to wait for this."""
        state = self.state
        patience = self.config.trainer.patience
        if self.rank == 0 and state.has_stalled(patience):
            print(f"stopped: {patience} validations without a better ndcg@10", flush=True)
        self._wait_for_checkpoint()
        last = self.checkpoints.last
        if last and last.error:
            raise InputError(f"the last checkpoint cannot be written ({last.error}); make room, go on by trainer.resume=true")
        if self.log is None:
            return
        self.log.close()
        write_finished(self.run_dir, state, self.model.module, self.num_items)

    def train_epoch(self) -> None:
        """Train on what is left of the epoch under way."""
        trainer, state = self.config.trainer, self.state
        self.begin_epoch()
        self.monitor.restart_clock()
        for batch in self.batches.epoch(state.epoch, state.place):
            self.monitor.add(self.train_step(batch), state.batches_in_epoch, self.batches.given)
            state.step += 1
            state.place = self.batches.place
            if state.step % trainer.log_every_steps == 0:
                self._record()
            if trainer.checkpoint_every_steps and state.step % trainer.checkpoint_every_steps == 0:
                self.save()
            if self._out_of_steps():
                break
            self._stop_if_asked()
        self._record()

    def begin_epoch(self) -> None:
        """Make ready what the steps of the epoch under way share."""
        self.model.train()
        if not self.losses.whole_catalog:  # anew for every epoch: which items are targets may change
            self.losses.negatives = build_negatives(self.config.loss, self.dataset, self.batches, self.state.epoch)

    def train_step(self, batch: Batch) -> Tensor:
        """Take one optimizer step.

        The table's rows change inside ``backward()``; the step exchanges embeddings between ranks once each way.

        Args:
            batch: on the CPU.

        Returns:
            Sum of this rank's losses and number of its targets, float64 ``[2]``.
        """
        seed_step(self.config.trainer.seed, self.state.step, self.rank)
        if self.items is not None:
            batch = self._admit(batch, self.items)
        self._set_learning_rates()
        self.optimizer.zero_grad()
        losses = self.losses(batch)
        # A fixed divisor, not the batch's own count: every target of the epoch weighs the same.
        (losses.sum() / self.config.trainer.batch_targets).backward()
        self.monitor.meter.backward_ended(losses)
        if self.config.optimizer.max_grad_norm > 0:
            dense = [parameter for parameter in self.model.module.parameters() if parameter.grad is not None]
            torch.nn.utils.clip_grad_norm_(dense, self.config.optimizer.max_grad_norm)
        self.optimizer.step()
        if self.average is not None:
            self.average.update(self.state.step)
        return torch.stack([losses.detach().sum().double(), losses.new_tensor(losses.numel(), dtype=torch.float64)])

    def _admit(self, batch: Batch, items: DynamicItems) -> Batch:
        """Give a batch in rows of the table; the loss ranges over those that are in use from now on."""
        batch = items.enter(batch, self.state)
        self.losses.num_items = items.num_items
        if not self.losses.whole_catalog:
            self.losses.negatives = build_uniform(self.config.loss, items.num_items)
        return batch

    def validate(self) -> None:
        """Rank the validation targets; note whether this is the best yet."""
        trainer, state = self.config.trainer, self.state
        progress = Progress("validate", 1, "users", enabled=self.rank == 0)

        def update(done: int, total: int) -> None:
            progress.total = total
            progress.update(done)
            self._stop_if_asked()

        seconds = time.monotonic()
        give_back_freed()  # by the steps, whose memory would otherwise lie beside that of validation
        # Validation would be compiled anew, without gradients: longer than it takes.
        uncompiled = torch.compiler.set_stance("force_eager") if self.config.trainer.compile else nullcontext()
        with self.average.in_place() if self.average else nullcontext(), uncompiled:
            dataset = self.items.view(self.dataset) if self.items else self.dataset
            metrics = evaluate(
                self.model, dataset, self.protocol, self.config.data.max_seq_len, trainer.eval_batch_users, update
            )
        seconds = time.monotonic() - seconds
        # While histories are read backwards figures level out early, and rise once more when all are read in order.
        state.note_validation(metrics["ndcg@10"], counts=state.epoch > self.config.data.reversed_epochs)
        if self.log is not None:
            self.log.write("valid", state.step, state.epoch, **metrics, seconds=seconds, **peak_memory(self.device))
            best = "  best so far" if state.is_best else ""
            figures = "  ".join(f"{name} {metrics[name]:.4f}" for name in ("hr@10", "ndcg@10", "mrr@10"))
            print(f"epoch {state.epoch}  step {state.step}  {figures}{best}", flush=True)
            if self.items is not None:
                print(self.items.describe(), flush=True)

    def save(self) -> None:
        """Begin to write a checkpoint, unless the loss has gone bad."""
        self._record()
        if self.state.validated_step != self.state.step:
            self.state.value = None
        self.checkpoints.save(self.state)
        self._log_saves()
        self.monitor.restart_clock()  # copying a checkpoint is no training

    def _wait_for_checkpoint(self) -> None:
        """Wait until the last checkpoint is on the disk, or cannot be."""
        self.checkpoints.wait()
        self._log_saves()

    def _log_saves(self) -> None:
        """Write down what became of the saves that have ended."""
        for save in self.checkpoints.take_saves():
            if self.log is not None:
                seconds = {"stalled_seconds": save.stalled_seconds, "write_seconds": save.write_seconds}
                self.log.write("checkpoint", save.state.step, save.state.epoch, failed=int(bool(save.error)), **seconds)

    def _stop_if_asked(self) -> None:
        """Stop, all ranks together, once one of them has got a signal.

        Raises:
            Stopped: there was one.
        """
        if self.signals.any_rank_received():
            raise Stopped(f"stopped by a signal at step {self.state.step}")

    def _save_at_once(self) -> Path | None:
        """Save where a signal stopped the run; give the checkpoint there is to go on from."""
        self.save()
        self._wait_for_checkpoint()
        if self.log is not None:
            self.log.close()
        return newest_checkpoint(self.run_dir)

    def _is_over(self) -> bool:
        """Whether the last epoch or step is done, or validation has stopped improving."""
        trainer, state = self.config.trainer, self.state
        return state.has_stalled(trainer.patience) or self._out_of_steps() or state.epoch >= trainer.max_epochs

    def _out_of_steps(self) -> bool:
        return 0 < self.config.trainer.max_steps <= self.state.step

    def _set_learning_rates(self) -> None:
        state, trainer = self.state, self.config.trainer
        done = (state.epoch + self.batches.share_done(state.epoch, state.place)) / trainer.max_epochs
        if trainer.max_steps:
            done = max(done, state.step / trainer.max_steps)
        self.learning_rates.set(done, state.step)

    def _record(self) -> None:
        """Write the mean loss of all ranks since the last record, if there was a step.

        Raises:
            InputError: the loss of a batch was not finite, or too high.
        """
        bad = self.monitor.find_bad_loss()
        if bad is not None:
            raise self._diverged(bad)
        figures = self.monitor.collect()
        if figures is None:
            return
        if self.items is not None:
            figures |= self.items.collect()
        if self.log is not None:
            self.log.write("train", self.state.step, self.state.epoch, **figures)
        speed = f"loss {figures['loss']:.4f}  {figures['targets_per_second']:,.0f} targets/s"
        self.progress.update(self.state.step, f"epoch {self.state.epoch + 1}  {speed}")

    def _diverged(self, bad: BadLoss) -> InputError:
        """Say what the batch with the bad loss was made of, and what is left."""
        step, epoch, max_loss = self.state.step - bad.steps_ago, self.state.epoch, self.config.trainer.max_loss
        named = name_batch(bad, self.batches, self.dataset, epoch)
        self._wait_for_checkpoint()
        limit = f", or is above trainer.max_loss={max_loss}" if max_loss else ""
        return InputError(
            f"the loss of batch {bad.number + 1} of epoch {epoch + 1}, at step {step}, is not finite{limit}: "
            f"lower the learning rates, or look at its {named}; {describe_checkpoints(self.run_dir, step)}"
        )
