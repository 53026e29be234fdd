"""Encoders side by side: each computes and learns what it would alone, and their cosines add up."""

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from glintru_rec.config import compose
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.encoders import Ensemble, GlintRU, LRURec, RecGRELA, SASRec, build_encoder
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, replace_items
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.losses import full_softmax, sampled_softmax
from glintru_rec.model import SequenceModel
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.trainer import Trainer
from tests.conftest import run_program

WIDTH, NUM_ITEMS, NONE = 8, 30, torch.empty(0, dtype=torch.int64)
KINDS = {
    "glint_ru+lru_rec": lambda: [GlintRU(WIDTH, num_heads=2), LRURec(WIDTH)],
    "three": lambda: [RecGRELA(WIDTH, num_blocks=1, num_heads=2), GlintRU(WIDTH, num_heads=2), LRURec(WIDTH, num_blocks=1)],
    "twice": lambda: [GlintRU(WIDTH, num_heads=2), GlintRU(WIDTH, num_heads=2)],
    "not recurrent": lambda: [GlintRU(WIDTH, num_heads=2), SASRec(WIDTH, num_blocks=1)],
    "bidirectional": lambda: [GlintRU(WIDTH, num_heads=2, causal=False), RecGRELA(WIDTH, num_heads=2, causal=False)],
}


class PlainTable(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = nn.Parameter(rows)

    def forward(self, item_ids, more_ids):
        return self.rows[item_ids], self.rows[more_ids]


def make(kind, dtype=torch.float64):
    torch.manual_seed(0)
    return Ensemble(KINDS[kind]()).to(dtype).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_each_member_computes_what_it_does_alone(kind):
    encoder = make(kind)
    x, offsets = torch.randn(10, encoder.width, dtype=torch.float64), torch.tensor([0, 3, 3, 4, 10])
    hidden = encoder(x, offsets)
    assert hidden.shape == x.shape
    for part, out, member in zip(x.split(WIDTH, 1), hidden.split(WIDTH, 1), encoder.each, strict=True):
        assert_close(out, functional.normalize(member.encoder(part, offsets), dim=1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["glint_ru+lru_rec", "three", "twice"])
def test_recurrent_form(kind):
    """Prefill and then steps, from any place on, by way of packed states, are the whole history encoded."""
    encoder = make(kind)
    assert encoder.recurrent
    x = torch.randn(9, encoder.width, dtype=torch.float64)
    whole = encoder(x, torch.tensor([0, 9]))
    for cut in (0, 1, 5, 9):
        hidden, state = encoder.prefill(x[:cut], torch.tensor([0, cut]))
        assert_close(hidden, whole[:cut], rtol=0, atol=1e-12)
        if cut == 0:
            assert torch.equal(encoder.pack_state(state), encoder.pack_state(encoder.init_state(1)))
        packed = encoder.pack_state(state)
        assert packed.shape == (1, encoder.state_size)
        for n in range(cut, 9):
            out, after = encoder.step(x[n : n + 1], encoder.unpack_state(packed))
            assert_close(out[0], whole[n], rtol=0, atol=1e-10)
            packed = encoder.pack_state(after)


def test_without_the_recurrent_form():
    for kind in ("not recurrent", "bidirectional"):
        encoder = make(kind)
        assert not encoder.recurrent
        assert encoder.state_size == 0
        with pytest.raises(ValueError, match="only if all of its members"):
            encoder.init_state(1)
    assert make("not recurrent").causal
    assert not make("bidirectional").causal


def test_scores_are_the_sum_of_cosines():
    """Of the members' own hidden vectors and their own part of each row, whatever its length."""
    encoder, rows = make("glint_ru+lru_rec"), torch.randn(NUM_ITEMS, 2 * WIDTH, dtype=torch.float64)
    rows[3, :WIDTH] *= 100
    model = SequenceModel(PlainTable(rows), encoder, "cosine")
    ids, offsets = torch.tensor([3, 7, 1, 3]), torch.tensor([0, 3, 4])
    query, items = model.encode(ids, offsets, torch.arange(NUM_ITEMS))
    expected = torch.zeros(2, NUM_ITEMS, dtype=torch.float64)
    for part, member in zip(rows.split(WIDTH, 1), encoder.each, strict=True):
        part = functional.normalize(part, dim=1)
        hidden = member.encoder(part[ids], offsets)[offsets[1:] - 1]
        expected += functional.cosine_similarity(hidden.unsqueeze(1), part.unsqueeze(0), dim=2)
    assert_close(query @ items.T, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("sampled", [False, True])
def test_members_learn_apart(dataset_dir, sampled):
    """The loss is the mean of the members' own, so each gets half of the gradients of training alone on its columns."""
    overrides = [f"data.path={dataset_dir}", "output=none", "model=glint_lru", "model.embedding_dim=16", "table=replicated"]
    overrides += ["model.options.dropout=0", "loss.temperature=0.1", "loss.horizon=2", "optimizer.ema_decay=0"]
    overrides += ["loss.num_negatives=20"] if sampled else ["loss=full_softmax"]
    with process_group("cpu") as device:
        trainer = Trainer(compose("train", TrainConfig, overrides), SequenceDataset.open(dataset_dir), device)
        trainer.begin_epoch()
        batch = next(iter(trainer.batches.epoch(0)))
        if sampled:
            drawn = trainer.losses.negatives.draw(batch.item_ids)
            trainer.losses.negatives.draw = lambda target_ids: drawn
        losses = trainer.losses(batch)
        losses.sum().backward()
        module, ids, offsets = trainer.model.module, batch.item_ids, batch.offsets
        table = next(parameter for name, parameter in module.named_parameters() if name.startswith("table."))
        alone_losses = torch.zeros_like(losses)
        for m, member in enumerate(module.encoder.each):
            own = slice(8 * m, 8 * m + 8)
            alone = SequenceModel(PlainTable(functional.normalize(table.detach()[:, own], dim=1)), member.encoder, "cosine")
            expected = [parameter.grad.clone() for parameter in member.encoder.parameters()]
            alone.zero_grad()
            negative_ids = drawn.ids if sampled else torch.arange(trainer.num_items)
            output = alone(ids, offsets, negative_ids, horizon=2)
            if sampled:
                arguments = (output.query, output.positive, output.negatives, output.target_ids, drawn.ids, drawn.log_q)
                loss = sampled_softmax(*arguments, 0.1, output.aim)
            else:
                loss = full_softmax(output.query, output.aim, output.negatives, 0.1)
            loss.sum().backward()
            alone_losses += loss.detach() / 2
            found = [parameter.grad / 2 for parameter in member.encoder.parameters()]
            assert_close(found, expected, rtol=1e-3, atol=1e-5)
        assert_close(losses.detach(), alone_losses)


@pytest.mark.parametrize("kind", KINDS)
def test_scripted(kind):
    encoder = make(kind, torch.float32)
    scripted = torch.jit.script(encoder)
    for lengths in ([], [0], [3, 0, 5]):
        offsets = offsets_from_lengths(torch.tensor(lengths, dtype=torch.int64))
        x = torch.randn(sum(lengths), encoder.width)
        assert_close(scripted(x, offsets), encoder(x, offsets))


def test_from_training_to_an_artifact(dataset_dir, tmp_path):
    """By the real programs, on two ranks that share the table: the artifact encodes, and scores, as the model does."""
    run, artifact = tmp_path / "run", tmp_path / "artifact"
    small = ["model=glint_lru", "model.embedding_dim=16", "loss=full_softmax", "loss.temperature=0.1"]
    run_program("train", f"data.path={dataset_dir}", f"output={run}", *small, "trainer.max_epochs=2", nproc=2)
    run_program("export", f"checkpoint={run}", f"output={artifact}")
    opened, dataset = Artifact.load(artifact), SequenceDataset.open(dataset_dir)
    assert opened.manifest["similarity"] == "dot"
    assert opened.manifest["embedding_dim"] == 16
    with process_group("cpu") as device:
        overrides = [f"data.path={dataset_dir}", f"output={tmp_path / 'again'}", *small, f"trainer.init_from={run}"]
        trainer = Trainer(compose("train", TrainConfig, overrides), dataset, device)
        cases = dataset.eval_cases("valid")
        history = torch.from_numpy(cases.history_items).long()
        lengths = torch.from_numpy(cases.history_offsets).diff()
        query = opened.module.encode(history, lengths)
        assert_close(query[:, :8].norm(dim=1), torch.ones(len(lengths)))
        model = trainer.model.module.eval()
        expected, items = model.encode(history, offsets_from_lengths(lengths), torch.arange(dataset.num_items))
        assert_close(query, expected, rtol=0, atol=1e-5)
        found = opened.module.vectors_of(torch.arange(dataset.num_items))
        assert_close(query @ found.T, expected @ items.T, rtol=0, atol=2e-5)
    scales = torch.tensor([3.0, 0.5]).repeat_interleave(8)  # vectors of other lengths, as a table has them
    replace_items(artifact, found * scales, opened.vocabulary, tmp_path / "replaced", {})
    assert_close(Artifact.load(tmp_path / "replaced").module.vectors_of(torch.arange(dataset.num_items)), found)


@pytest.mark.parametrize(
    ("name", "width", "options", "message"),
    [
        ("glint_ru+gru", 16, {}, "'gru'; it must be one of"),
        ("glint_ru+lru_rec", 15, {}, "model.embedding_dim is 15; it must be a multiple of 2"),
        ("glint_ru+lru_rec", 16, {"num_heads": 2}, "model.options.num_heads is not an option of lru_rec"),
        ("glint_ru+lru_rec", 16, {"lru_rec": 3}, "model.options.lru_rec is 3; it must hold options of lru_rec"),
        ("glint_ru+lru_rec", 16, {"glint_ru": {"causal": False}}, r"causal is \[False, True\]"),
        ("glint_ru+lru_rec", 16, {"sasrec": {}}, "model.options.sasrec is not an option"),
    ],
)
def test_bad_config(name, width, options, message):
    with pytest.raises(InputError, match=message):
        build_encoder(name, width, options)


def test_a_member_has_options_of_its_own():
    encoder = build_encoder("glint_ru+lru_rec", 16, {"dropout": 0.3, "glint_ru": {"num_heads": 2, "dropout": 0.1}})
    glint, lru = (member.encoder for member in encoder.each)
    assert (glint.dropout.p, glint.blocks[0].attention.num_heads, lru.dropout.p) == (0.1, 2, 0.3)
    with pytest.raises(InputError, match=r"model\.similarity is 'dot'; it must be cosine with several encoders"):
        compose("train", TrainConfig, ["data.path=x", "output=y", "model=glint_lru", "model.similarity=dot"])
    with pytest.raises(InputError, match="widths are"):
        Ensemble([GlintRU(8), LRURec(16)])
