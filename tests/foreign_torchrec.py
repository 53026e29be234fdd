"""Someone's own TorchRec ranking model, run by torchrun: the planner chooses, nothing of ours but the encoder of a run.

torchrun --nproc-per-node=2 foreign_torchrec.py RUN_DIR
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig, KeyedJaggedTensor
from torchrec.distributed.model_parallel import DistributedModelParallel
from torchrec.optim import RowWiseAdagrad
from torchrec.optim.apply_optimizer_in_backward import apply_optimizer_in_backward
from torchrec.optim.optimizers import in_backward_optimizer_filter

from glintru_rec import GlintRU, load_encoder

# Of the encoder, which knows something already, and of all else that is dense.
ENCODER_RATE, RATE = 3e-3, 1e-2


class Foreign(nn.Module):
    def __init__(self, encoder: GlintRU):
        super().__init__()
        meta = torch.device("meta")
        self.items = EmbeddingCollection([EmbeddingConfig(64, 16, name="t_item", feature_names=["history"])], device=meta)
        self.users = EmbeddingBagCollection([EmbeddingBagConfig(64, 16, name="t_user", feature_names=["user"])], device=meta)
        self.encoder = encoder
        self.head = nn.Linear(32, 1)

    def forward(self, histories: KeyedJaggedTensor, users: KeyedJaggedTensor) -> torch.Tensor:
        items = self.items(histories)["history"]
        hidden = self.encoder(items.values(), items.offsets().long())
        last = hidden[items.offsets().long()[1:] - 1]
        return self.head(torch.cat([last, self.users(users).values()], dim=1)).squeeze(1)


def main() -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = Foreign(load_encoder(sys.argv[1]))
    trained = {name: tensor.clone() for name, tensor in model.encoder.state_dict().items()}
    for tables in (model.items, model.users):
        apply_optimizer_in_backward(RowWiseAdagrad, tables.parameters(), {"lr": 0.05})
    sharded = DistributedModelParallel(model, device=torch.device("cpu"))
    dense = dict(in_backward_optimizer_filter(sharded.named_parameters()))
    encoder = [parameter for name, parameter in dense.items() if name.startswith("encoder.")]
    rest = [parameter for name, parameter in dense.items() if not name.startswith("encoder.")]
    for name, tensor in model.encoder.state_dict().items():
        assert torch.equal(tensor, trained[name]), f"{name} is not the run's any more"
    groups = [{"params": encoder, "lr": ENCODER_RATE}, {"params": rest, "lr": RATE}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    torch.manual_seed(1 + dist.get_rank())
    lengths = torch.randint(1, 9, (32,))
    items = torch.randint(0, 64, (int(lengths.sum()),))
    histories = KeyedJaggedTensor(["history"], items, lengths=lengths)
    users = KeyedJaggedTensor(["user"], torch.randint(0, 64, (32,)), lengths=torch.ones(32, dtype=torch.int64))
    labels = (items[lengths.cumsum(0) - 1] % 2).float()  # what only the encoder can tell
    losses = []
    before = [[parameter.detach().clone() for parameter in group["params"]] for group in groups]
    for step in range(40):
        optimizer.zero_grad()
        loss = nn.functional.binary_cross_entropy_with_logits(sharded(histories, users), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step == 0:  # Adam's first step is as long as its rate, whatever the gradient
            for group, start in zip(groups, before):
                longest = max(float((now - then).abs().max()) for now, then in zip(group["params"], start))
                assert abs(longest / group["lr"] - 1) < 1e-2, (longest, group["lr"])
    assert losses[-1] < 0.5 * losses[0], losses
    mine = torch.cat([parameter.detach().flatten() for parameter in encoder])
    other = mine.clone()
    dist.broadcast(other, 0)
    assert torch.equal(mine, other), "the encoder is the same on every rank"
    print("learnt", flush=True)
    dist.barrier()
    dist.destroy_process_group()


main()
