"""The checks of docs/consumers/torchrec_model.py, on its ranks.

torchrun --nproc-per-node=2 foreign_torchrec.py RUN_DIR
"""

import runpy
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from glintru_rec import load_encoder

example = runpy.run_path(str(Path(__file__).parents[1] / "docs/consumers/torchrec_model.py"))


def main(run_dir: str) -> None:
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model, optimizer = example["build"](run_dir)
    encoder, rest = (group["params"] for group in optimizer.param_groups)
    trained = load_encoder(run_dir).state_dict()
    names = {name.split("encoder.", 1)[1]: tensor for name, tensor in model.state_dict().items() if "encoder." in name}
    assert names.keys() == trained.keys()
    for name, tensor in names.items():
        assert torch.equal(tensor, trained[name]), f"{name} is not the run's any more"
    batch = example["batch_of"](dist.get_rank())
    before = [[parameter.detach().clone() for parameter in group] for group in (encoder, rest)]
    losses = example["train"](model, optimizer, batch, 1)
    # Adam's first step is as long as its rate, whatever the gradient.
    for group, start, rate in zip((encoder, rest), before, (example["ENCODER_RATE"], example["RATE"])):
        longest = max(float((now - then).abs().max()) for now, then in zip(group, start))
        assert abs(longest / rate - 1) < 1e-2, (longest, rate)
    losses += example["train"](model, optimizer, batch, 39)
    assert losses[-1] < 0.5 * losses[0], losses
    mine = torch.cat([parameter.detach().flatten() for parameter in encoder])
    other = mine.clone()
    dist.broadcast(other, 0)
    assert torch.equal(mine, other), "the encoder is the same on every rank"
    print("learnt", flush=True)
    dist.barrier()
    dist.destroy_process_group()


main(sys.argv[1])
