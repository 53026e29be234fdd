"""A TorchRec model of one's own with the encoder of a run in it, under one DistributedModelParallel.

    torchrun --nproc-per-node=2 docs/consumers/torchrec_model.py RUN_DIR

Toy data, to be replaced: is the last item of a history odd? Each rank prints its loss before and after training. On CPUs;
GPUs want the backend nccl, and model and batches on each rank's device.
"""

import sys

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from glintru_rec import load_encoder

NUM_ITEMS = NUM_USERS = 64
TABLE_RATE, RATE, ENCODER_RATE = 0.05, 1e-2, 3e-3  # the encoder knows something already


class MyModel(nn.Module):
    """Tables of items and users, the encoder over histories, a head."""

    def __init__(self, encoder: nn.Module, width: int):
        super().__init__()
        item = EmbeddingConfig(NUM_ITEMS, width, name="t_item", feature_names=["history"])
        user = EmbeddingBagConfig(NUM_USERS, width, name="t_user", feature_names=["user"])
        self.items = EmbeddingCollection([item], device=torch.device("meta"))  # its rows are made where they will lie
        self.users = EmbeddingBagCollection([user], device=torch.device("meta"))
        self.encoder = encoder
        self.head = nn.Linear(2 * width, 1)

    def forward(self, histories: KeyedJaggedTensor, users: KeyedJaggedTensor) -> Tensor:
        """Give a logit for each history, none of which is empty."""
        items = self.items(histories)["history"]
        offsets = items.offsets().long()
        hidden = self.encoder(items.values(), offsets)
        last = hidden[offsets[1:] - 1]
        return self.head(torch.cat([last, self.users(users).values()], dim=1)).squeeze(1)


def build(run_dir: str) -> tuple[DistributedModelParallel, torch.optim.Optimizer]:
    """Make the model from a run's encoder, its tables where the planner wants them, and the optimizer of all but those."""
    encoder = load_encoder(run_dir).train()
    model = MyModel(encoder, encoder.width)
    for tables in (model.items, model.users):
        apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": TABLE_RATE})
    sharded = DistributedModelParallel(model, device=torch.device("cpu"))
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    groups = [
        {"params": [weight for name, weight in dense.items() if name.startswith("encoder.")], "lr": ENCODER_RATE},
        {"params": [weight for name, weight in dense.items() if not name.startswith("encoder.")], "lr": RATE},
    ]
    return sharded, torch.optim.AdamW(groups, weight_decay=0.0)


def batch_of(rank: int) -> tuple[KeyedJaggedTensor, KeyedJaggedTensor, Tensor]:
    """Draw 32 histories, their users, and whether each history's last item is odd."""
    random = torch.Generator().manual_seed(1 + rank)
    lengths = torch.randint(1, 9, (32,), generator=random)
    items = torch.randint(0, NUM_ITEMS, (int(lengths.sum()),), generator=random)
    users = torch.randint(0, NUM_USERS, (32,), generator=random)
    odd = (items[lengths.cumsum(0) - 1] % 2).float()
    histories = KeyedJaggedTensor(["history"], items, lengths=lengths)
    owners = KeyedJaggedTensor(["user"], users, lengths=torch.ones(32, dtype=torch.int64))
    return histories, owners, odd


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: tuple, steps: int) -> list[float]:
    """Train on one batch; the tables learn inside ``backward()``. Gives the loss of each step."""
    histories, users, labels = batch
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = binary_cross_entropy_with_logits(model(histories, users), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main(run_dir: str) -> None:
    """Train on every rank's own batch."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, optimizer = build(run_dir)
    losses = train(model, optimizer, batch_of(dist.get_rank()), 40)
    sys.stdout.write(f"rank {dist.get_rank()}: loss {losses[0]:.3f} before, {losses[-1]:.3f} after\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
