"""The training loop of a ranking model, to be read from the top: fit → train_epoch → train_step."""

import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional

from glintru_rec.errors import InputError
from glintru_rec.progress import Progress
from glintru_rec.ranking.batches import RankingBatch, RankingBatches
from glintru_rec.ranking.build import build_distributed_ranking, task_weights
from glintru_rec.ranking.config import RankingConfig
from glintru_rec.ranking.dataset import RankingDataset
from glintru_rec.ranking.metrics import binary_metrics, number_metrics
from glintru_rec.training.checkpoint import RunState, best_checkpoint, find_resumable, load_checkpoint, newest_checkpoint
from glintru_rec.training.checkpoint_writer import CheckpointWriter
from glintru_rec.training.processes import StopSignals, seed_step
from glintru_rec.training.run_log import RunLog
from glintru_rec.training.summary import peak_memory
from glintru_rec.training.trainer import Stopped

_EVAL_EXAMPLES = 4096


class RankingTrainer:
    """Train a ranking model on a ranking dataset.

    Args:
        config: the whole run.
        dataset: opened from ``config.data.path``.
        device: of this rank; the process group exists.
    """

    def __init__(self, config: RankingConfig, dataset: RankingDataset, device: torch.device):
        self.config, self.dataset, self.device = config, dataset, device
        self.rank, self.run_dir = dist.get_rank(), Path(config.output)
        self.weights = task_weights(config, dataset.manifest)
        self.columns = [list(dataset.manifest["tasks"]).index(name) for name in self.weights]
        self.kinds = [dataset.manifest["tasks"][name] for name in self.weights]
        self.model, self.optimizer = build_distributed_ranking(config, dataset, device)
        self.batches = self._batches("train", config.trainer.batch_examples)
        data = config.data
        batching = f"{self.batches.num_examples} {self.batches.num_steps} {data.max_seq_len} {data.block_examples} "
        batching += f"{config.trainer.seed} {dist.get_world_size()}"
        self.state = RunState(config.model_fingerprint(), dataset.item_sha256, batching)
        trainer = config.trainer
        self.checkpoints = CheckpointWriter(
            self.run_dir, self.model, self.optimizer, None, trainer.keep_last, 1, False, trainer.timeout_seconds
        )
        self.loss_sum = torch.zeros(2, dtype=torch.float64, device=device)  # since the last record: losses, labels

    def _batches(self, split: str, batch_examples: int) -> RankingBatches:
        data, span = self.config.data, self.config.encoder_span
        sizes = (data.max_seq_len, data.block_examples, batch_examples)
        batches = RankingBatches(self.dataset, split, *sizes, self.rank, dist.get_world_size())
        if span is not None and batches.longest_history > span:
            raise InputError(
                f"tower.options.max_seq_len is {span}, but a shared history of the {split} period has "
                f"{batches.longest_history} events (many of a user bear one time): it would be cut"
            )
        return batches

    def resume(self) -> None:
        """Go on from the newest checkpoint of the run directory, if there is one."""
        found = find_resumable(self.run_dir, self.state.model_fingerprint)
        if found is None:
            return
        newest, state = found
        if state.vocabulary_sha256 != self.state.vocabulary_sha256:
            raise InputError(f"{newest} belongs to another dataset than data.path={self.config.data.path}")
        state.batching = self.state.batching  # checkpoints stand between epochs
        load_checkpoint(newest, self.model, self.optimizer)
        self.state = state
        if self.rank == 0:
            print(f"resumed from {newest} (epoch {state.epoch} done)", flush=True)

    def fit(self) -> RunState:
        """Train until the last epoch, or until validation stops improving; then load the best weights.

        Raises:
            Stopped: by SIGTERM or SIGINT, on any rank; the checkpoint of the last whole epoch stands.
        """
        trainer, state = self.config.trainer, self.state
        self.log = RunLog(self.run_dir, state.step, state.validated_step, self.config) if self.rank == 0 else None
        if self.rank == 0:
            (self.run_dir / "finished.json").unlink(missing_ok=True)  # of a shorter run that now goes on
        total = state.step + (trainer.max_epochs - state.epoch) * self.batches.num_steps
        self.progress = Progress("train", total, "steps", enabled=self.rank == 0)
        with StopSignals() as self.signals:
            while state.epoch < trainer.max_epochs and not state.has_stalled(trainer.patience):
                self.train_epoch()
                state.epoch += 1
                self.validate()
                self.checkpoints.save(state)
                self._stop_if_asked()
        if self.rank == 0 and state.has_stalled(trainer.patience):
            print(f"stopped: {trainer.patience} validations without a better figure", flush=True)
        if self.log is not None:
            self.log.close()
        if self.checkpoints.last and self.checkpoints.last.error:
            raise InputError(f"the last checkpoint cannot be written ({self.checkpoints.last.error}); make room and resume")
        dist.barrier()  # the first rank publishes checkpoints and drops old ones
        load_checkpoint(best_checkpoint(self.run_dir), self.model)
        return state

    def train_epoch(self) -> None:
        """Train on every example once."""
        self.model.train()
        self.recorded = time.monotonic()
        for batch in self.batches.epoch(self.config.trainer.seed, self.state.epoch):
            self.loss_sum += self.train_step(batch.to(self.device))
            self.state.step += 1
            self._stop_if_asked()
            if self.state.step % self.config.trainer.log_every_steps == 0:
                self._record()
        self._record()

    def train_step(self, batch: RankingBatch) -> Tensor:
        """Take one optimizer step; sharded tables change inside ``backward()``.

        Returns:
            Weighted sum of this rank's losses and number of its labels, float64 ``[2]``.
        """
        seed_step(self.config.trainer.seed, self.state.step, self.rank)
        self.optimizer.zero_grad()
        loss, count = self._loss(self.model(batch), batch.labels[:, self.columns])
        # A fixed divisor, not the batch's own count: every example of the epoch weighs the same.
        (loss / self.config.trainer.batch_examples).backward()
        self.optimizer.step()
        return torch.stack([loss.detach().double(), count.double()])

    def _loss(self, predicted: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Sum the tasks' weighted losses over the labels that there are."""
        known = ~labels.isnan()
        target = labels.nan_to_num()
        total = predicted.new_zeros(())
        for place, (kind, weight) in enumerate(zip(self.kinds, self.weights.values())):
            loss = functional.binary_cross_entropy_with_logits if kind == "binary" else functional.mse_loss
            each = loss(predicted[:, place], target[:, place], reduction="none")
            total = total + weight * (each * known[:, place]).sum()
        return total, known.sum()

    def validate(self) -> None:
        """Measure the validation period; note whether this is the best yet."""
        state, seconds = self.state, time.monotonic()
        metrics = self.evaluate("valid")
        first = next(iter(self.weights))
        state.note_validation(metrics[f"{first}.auc"] if self.kinds[0] == "binary" else -metrics[f"{first}.rmse"])
        if self.log is not None:
            seconds = time.monotonic() - seconds
            self.log.write("valid", state.step, state.epoch, **metrics, seconds=seconds, **peak_memory(self.device))
            figures = "  ".join(f"{name} {figure:.4f}" for name, figure in metrics.items())
            best = "  best so far" if state.is_best else ""
            print(f"epoch {state.epoch}  step {state.step}  {figures}{best}", flush=True)

    @torch.no_grad()
    def evaluate(self, split: str) -> dict[str, float]:
        """Predict every example of a period, each rank its share, and measure all of them on every rank."""
        self.model.eval()
        examples, predicted = [], []
        for batch in self._batches(split, _EVAL_EXAMPLES).epoch():
            predicted.append(self.model(batch.to(self.device)).cpu())
            examples.append(batch.examples)
        shares: list = [None] * dist.get_world_size()
        dist.all_gather_object(shares, (torch.cat(examples), torch.cat(predicted)))
        all_examples = torch.cat([share[0] for share in shares]).numpy()
        places, first = np.unique(all_examples, return_index=True)  # what fills up the ranks comes twice
        values = torch.cat([share[1] for share in shares])[first]
        metrics: dict[str, float] = {}
        for place, (name, kind) in enumerate(zip(self.weights, self.kinds)):
            labels = torch.from_numpy(self.dataset.labels[places, self.columns[place]])
            known = ~labels.isnan()
            if not known.any():
                raise InputError(f"no event of the {split} period has a label of {name}")
            if kind == "binary":
                users = self.dataset.user[places][known.numpy()]
                figures = binary_metrics(values[known, place], labels[known], users)
            else:
                figures = number_metrics(values[known, place], labels[known])
            metrics |= {f"{name}.{figure}": value for figure, value in figures.items()}
        return metrics

    def _stop_if_asked(self) -> None:
        """Stop, all ranks together, once one of them has got a signal."""
        if not self.signals.any_rank_received():
            return
        if self.log is not None:
            self.log.close()
        raise Stopped(f"stopped by a signal at step {self.state.step}; last checkpoint: {newest_checkpoint(self.run_dir)}")

    def _record(self) -> None:
        """Write the mean loss of all ranks since the last record, if there was a step.

        Raises:
            InputError: it is not finite.
        """
        dist.all_reduce(self.loss_sum)
        total, count = self.loss_sum.tolist()
        self.loss_sum.zero_()
        seconds, self.recorded = time.monotonic() - self.recorded, time.monotonic()
        if not count:
            return
        if not math.isfinite(total):
            raise InputError(f"the loss is {total} at step {self.state.step}: lower the learning rates")
        if self.log is not None:
            self.log.write(
                "train",
                self.state.step,
                self.state.epoch,
                loss=total / count,
                seconds=seconds,
                labels_per_second=count / seconds,
            )
        note = f"epoch {self.state.epoch + 1}  loss {total / count:.4f}  {count / seconds:,.0f} labels/s"
        self.progress.update(self.state.step, note)
