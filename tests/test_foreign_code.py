"""The encoder inside other people's models: with torch alone, and in a TorchRec model on two ranks."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glintru_rec
from glintru_rec.ranking import load_encoder
from tests.conftest import REPOSITORY, environment
from tests.test_imports import BLOCKED
from tools.ranking_table import table

TORCH_ALONE = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {(*BLOCKED, "torchx", "yaml")}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
exec(compile(sys.argv[1], "ranking.md", "exec"))
assert not [name for name in sys.modules if name.split(".")[0] in {BLOCKED}]

torch.manual_seed(0)
model = MyModel(num_items=50, width=16)
model.history.load_state_dict(torch.load(sys.argv[2]))
rest = [parameter for name, parameter in model.named_parameters() if not name.startswith("history.")]
optimizer = torch.optim.Adam([{{"params": model.history.parameters(), "lr": 1e-3}}, {{"params": rest, "lr": 1e-2}}])
item_ids, offsets = torch.randint(0, 50, (40,)), torch.arange(0, 41, 5)
candidates, clicked = torch.randint(0, 50, (8,)), torch.tensor([1.0, 0, 1, 0, 1, 0, 1, 0])
losses = []
for _ in range(60):
    optimizer.zero_grad()
    loss = torch.nn.functional.binary_cross_entropy_with_logits(model(item_ids, offsets, candidates), clicked)
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < 0.3 * losses[0], losses
print("done")
"""


def page_block(marker: str) -> str:
    """The Python block of the page on ranking that holds a text."""
    text = (REPOSITORY / "docs" / "ranking.md").read_text()
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", text, re.S) if marker in code]
    return block


def test_the_recipe_needs_torch_alone(run_dir, tmp_path):
    """The page's model trains where neither TorchRec nor fbgemm can be imported, from the weights of a run."""
    encoder = load_encoder(run_dir)
    assert (encoder.width, encoder.blocks[0].attention.num_heads) == (16, 2)
    torch.save(encoder.state_dict(), tmp_path / "encoder.pt")
    recipe = page_block("class MyModel").replace("GlintRU(width)", "GlintRU(width, num_heads=2)")
    command = [sys.executable, "-c", TORCH_ALONE, recipe, str(tmp_path / "encoder.pt")]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=120, env=environment())
    assert result.stdout.strip() == "done", result.stderr[-2000:]


def test_a_runs_encoder_in_a_torchrec_model_on_two_ranks(run_dir):
    """Under one DistributedModelParallel, from a run's weights, at a rate of its own: see tests/foreign_torchrec.py."""
    script = Path(__file__).with_name("foreign_torchrec.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(run_dir)]
    env = environment() | {"PYTHONPATH": os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])}
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300, env=env)
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("learnt") == 2


def test_the_pages_tower():
    names = {"torch": torch}
    exec(compile(page_block("tower = SequenceTower("), "ranking.md", "exec"), names)
    assert [output.shape for output in (names["query"], names["attended"])] == [(3, 32), (3, 32)]
    assert glintru_rec.SequenceTower is names["SequenceTower"]
    assert {*glintru_rec.__all__, "SequenceTower", "load_encoder"} <= set(dir(glintru_rec))
    with pytest.raises(AttributeError, match="Tower"):
        _ = glintru_rec.Tower


def test_the_table_of_the_tower():
    runs = [
        {"valid": {"like.auc": v}, "test": {"like.auc": a, "like.logloss": 0.5, "like.gauc": 0.75}}
        for v, a in ((0.75, 0.5), (0.77, 0.7))
    ]
    text = table({"no tower": runs, "mean": runs[:1]})
    assert "| no tower | .6000 ± .1414 | .5000 ± .0000 | .7500 ± .0000 | .7600 ± .0141 | 2 |" in text
    assert "| mean | .5000 | .5000 | .7500 | .7500 | 1 |" in text
