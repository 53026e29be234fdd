"""The losses of one batch: what is looked up and encoded, and what it is compared with.

Shapes: B sequences of T items in a batch, F side features of an event.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from glintru_rec.data.batches import Batch
from glintru_rec.losses import NegativeSampler, Seen, full_softmax, sampled_softmax, seen_before
from glintru_rec.model import TrainingOutput
from glintru_rec.tables.sharding import DistributedModelParallel, answered_ids
from glintru_rec.training.config import TrainConfig


class BatchLoss:
    """Give one loss per target of a batch, by the exact softmax or the sampled one; of an ensemble, the mean of its members'.

    Args:
        config: the whole run.
        model: of `build_distributed`.
        num_items: items that the loss ranges over.
        device: of this rank.

    Attributes:
        num_items: as above; a dynamic vocabulary changes it.
        whole_catalog: whether the loss is exact; if not, it needs ``negatives``.
        negatives: of this rank; set anew when they are to be drawn otherwise.
    """

    negatives: NegativeSampler

    def __init__(self, config: TrainConfig, model: DistributedModelParallel, num_items: int, device: torch.device):
        self.model, self.num_items, self.device = model, num_items, device
        self.loss = config.loss
        self.whole_catalog = config.loss.over_whole_catalog(num_items)
        self.autocast = torch.autocast(device.type, torch.bfloat16, enabled=config.trainer.precision == "bf16")
        self.sampled_softmax = sampled_softmax
        if config.trainer.compile:
            self.sampled_softmax = torch.compile(sampled_softmax, fullgraph=True, dynamic=True)

    def __call__(self, batch: Batch) -> Tensor:
        """Give one loss per target, ``[T - B]`` (``[B]`` where the encoder is not causal)."""
        item_ids, offsets = batch.item_ids.to(self.device), batch.offsets.to(self.device)
        side_ids = None if batch.side_ids is None else batch.side_ids.to(self.device)
        seen = self._seen(item_ids, offsets)
        if self.whole_catalog:
            return self._exact(item_ids, offsets, side_ids, seen)
        target_ids = batch.item_ids[self.model.module.target_places(batch.offsets)]
        return self._sampled(item_ids, offsets, side_ids, seen, target_ids)

    def _exact(self, item_ids: Tensor, offsets: Tensor, side_ids: Tensor | None, seen: Seen | None) -> Tensor:
        loss = self.loss
        own = answered_ids(self.num_items)  # all ranks together have all
        output = self._vectors(item_ids, offsets, torch.arange(own.start, own.stop, device=self.device), side_ids)
        precision, ranks = loss.precision, dist.group.WORLD
        members = [
            full_softmax(
                part.query, part.aim, part.negatives, loss.temperature, precision, ranks, seen=seen, first_item=own.start
            )
            for part in self._members(output)
        ]
        return torch.stack(members).mean(0)

    def _sampled(
        self, item_ids: Tensor, offsets: Tensor, side_ids: Tensor | None, seen: Seen | None, target_ids: Tensor
    ) -> Tensor:
        loss = self.loss
        drawn = self.negatives.draw(target_ids)
        negative_ids, log_q, target_log_q = (part.to(self.device) for part in drawn)
        output = self._vectors(item_ids, offsets, negative_ids, side_ids)
        seen_places = None if seen is None else seen.places(negative_ids)
        target_ids = target_ids.to(self.device)
        members = [
            self.sampled_softmax(
                part.query,
                part.positive,
                part.negatives,
                target_ids,
                negative_ids,
                log_q if loss.logq_correction else None,
                loss.temperature,
                part.aim,
                target_log_q if loss.correct_positive else None,
                seen_places=seen_places,
                seen_log_weight=0.0 if seen is None else seen.log_weight,
            )
            for part in self._members(output)
        ]
        return torch.stack(members).mean(0)

    def _members(self, output: TrainingOutput) -> list[TrainingOutput]:
        """Give each member of an ensemble its part of the vectors: it is trained apart, by a loss of its own."""
        members = self.model.module.encoder.members
        if members == 1:
            return [output]
        query, positive, aim, negatives = (
            [part.contiguous() for part in whole.chunk(members, dim=1)]
            for whole in (output.query, output.positive, output.aim, output.negatives)
        )
        return [TrainingOutput(query[m], positive[m], aim[m], output.target_ids, negatives[m]) for m in range(members)]

    def _vectors(self, item_ids: Tensor, offsets: Tensor, negative_ids: Tensor, side_ids: Tensor | None) -> TrainingOutput:
        """Look up and encode, in mixed precision if asked for: the vectors are fp32 all the same, and so is the loss."""
        with self.autocast:
            return self.model(item_ids, offsets, negative_ids, self.loss.horizon, self.loss.horizon_decay, side_ids)

    def _seen(self, item_ids: Tensor, offsets: Tensor) -> Seen | None:
        """Say which items weigh less among each target's negatives."""
        loss = self.loss
        if loss.seen_weight == 1:
            return None
        return seen_before(item_ids, offsets, self.model.module.target_places(offsets), loss.horizon, loss.seen_weight)
