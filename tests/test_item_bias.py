"""A bias for each item, against ``hidden @ items.T + bias`` in float64, from training to the scoring job."""

import copy
import json
from hashlib import sha256

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.testing import assert_close

from glintru_rec.candidates import sample_candidates
from glintru_rec.config import compose
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders import ENCODERS
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, export_artifact
from glintru_rec.jagged import offsets_from_lengths
from glintru_rec.losses import full_softmax, sampled_softmax
from glintru_rec.metrics import Protocol
from glintru_rec.model import SequenceModel
from glintru_rec.scoring import ScoreConfig, score, update_states
from glintru_rec.scoring.evaluation import evaluate
from glintru_rec.tables.sharding import local_rows
from glintru_rec.training.config import TrainConfig
from glintru_rec.training.processes import process_group
from glintru_rec.training.summary import count_parameters
from glintru_rec.training.trainer import Trainer

NUM_ITEMS, WIDTH, UNUSED = 60, 16, 3
NONE = torch.empty(0, dtype=torch.int64)


class PlainTable(nn.Module):
    """Rows as fbgemm has them: embedding, bias, and numbers that nothing reads (here not 0, so that reading them shows)."""

    def __init__(self, dtype):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(NUM_ITEMS, WIDTH + 1 + UNUSED, dtype=dtype))

    def forward(self, item_ids, more_ids):
        return self.weight[item_ids], self.weight[more_ids]


def make_model(encoder="lru_rec", dtype=torch.float32):
    torch.manual_seed(0)
    return SequenceModel(PlainTable(dtype), ENCODERS[encoder](WIDTH).to(dtype), item_bias=True).eval()


def plain_scores(encoder, rows, histories):
    """What the paper says: the scores of the whole catalog after each history, ``[B, V]``, all in float64."""
    items, bias = rows[:, :WIDTH].double(), rows[:, WIDTH].double()
    hidden = [
        encoder(items[history], torch.tensor([0, len(history)]))[-1] if len(history) else items.new_zeros(WIDTH)
        for history in histories
    ]
    return torch.stack(hidden) @ items.T + bias


def in_float64(encoder):
    return copy.deepcopy(encoder).double().eval()


def random_histories(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(NUM_ITEMS, (length,), generator=generator) for length in lengths]


def ragged(histories):
    return torch.cat([NONE, *histories]), torch.tensor([len(history) for history in histories])


@pytest.mark.parametrize("loss", ["full", "sampled"])
@pytest.mark.parametrize("encoder", ENCODERS)
def test_loss_and_gradients(encoder, loss):
    """Both losses train embedding and bias as the formula with a bias does, and leave the rest of the row alone."""
    model = make_model(encoder, torch.float64)
    sequences = random_histories([5, 2, 9])
    item_ids, lengths = ragged(sequences)
    negative_ids = torch.arange(NUM_ITEMS) if loss == "full" else torch.randint(NUM_ITEMS, (12,))
    output = model(item_ids, offsets_from_lengths(lengths), negative_ids)
    prefixes = [sequence[:n] for sequence in sequences for n in range(1, len(sequence))]
    targets = torch.cat([sequence[1:] for sequence in sequences])
    logits = plain_scores(model.encoder, model.table.weight, prefixes)
    if loss == "full":
        ours = full_softmax(output.query, output.aim, output.negatives)
        theirs = functional.cross_entropy(logits, targets, reduction="none")
    else:
        log_q = torch.randn(12, dtype=torch.float64)
        ours = sampled_softmax(output.query, output.positive, output.negatives, output.target_ids, negative_ids, log_q)
        rivals = (logits[:, negative_ids] - log_q).masked_fill(targets[:, None] == negative_ids, -torch.inf)
        own = logits.gather(1, targets[:, None])
        theirs = functional.cross_entropy(torch.cat([own, rivals], dim=1), torch.zeros_like(targets), reduction="none")
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    parameters = list(model.parameters())
    assert parameters[0] is model.table.weight
    gradients = torch.autograd.grad(ours.sum(), parameters)
    assert_close(gradients, torch.autograd.grad(theirs.sum(), parameters), rtol=1e-8, atol=1e-8)
    assert gradients[0][:, WIDTH].any()
    assert not gradients[0][:, WIDTH + 1 :].any()


def test_cosine_has_no_room_for_a_bias():
    with pytest.raises(InputError, match="a cosine has no room for a bias"):
        SequenceModel(PlainTable(torch.float32), ENCODERS["lru_rec"](WIDTH), "cosine", item_bias=True)


def test_fingerprint_tells_models_with_biases_from_others():
    paths = ["data.path=x", "output=y"]
    biased, plain = (compose("train", TrainConfig, [*paths, f"model.item_bias={bias}"]) for bias in (True, False))
    assert biased.model_fingerprint() != plain.model_fingerprint()
    names = ("encoder", "embedding_dim", "similarity", "options")  # all there was before there were biases
    described = {"model": {name: getattr(plain.model, name) for name in names}, "max_seq_len": plain.data.max_seq_len}
    assert plain.model_fingerprint() == sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def dataset(dataset_dir):
    dataset = SequenceDataset.open(dataset_dir)
    assert dataset.num_items == NUM_ITEMS
    return dataset


@pytest.fixture
def make_trainer(dataset_dir, dataset, tmp_path):
    """Make trainers of a biased LRURec in a process group of one."""
    with process_group("cpu") as device:

        def make(*overrides):
            fixed = [f"data.path={dataset_dir}", f"output={tmp_path / 'run'}", "model=lru_rec", "model.options.dropout=0"]
            sizes = [f"model.embedding_dim={WIDTH}", "data.max_seq_len=20", "trainer.batch_targets=128", "loss=full_softmax"]
            return Trainer(compose("train", TrainConfig, [*fixed, *sizes, *overrides]), dataset, device)

        yield make


TABLES = {
    "sgd": ["table.optimizer=sgd", "table.learning_rate=0.5"],
    "rowwise_adagrad": ["table=row_wise"],
    "fp16": ["table.dtype=fp16"],
    "replicated": ["table=replicated", "table.weight_decay=0.01"],
}


@pytest.mark.parametrize("table", TABLES)
def test_biases_start_at_zero_and_are_trained(table, make_trainer):
    trainer = make_trainer(*TABLES[table], "trainer.max_epochs=9")
    before = local_rows(trainer.model)[0].clone()
    assert before.shape == (NUM_ITEMS, WIDTH + 1 + UNUSED)
    assert before[:, :WIDTH].std() == pytest.approx(0.02, rel=0.1)
    assert not before[:, WIDTH:].any()
    first, *others = trainer.batches.epoch(0)
    expected = plain_sgd_step(trainer, first, before)
    trainer.train_step(first)
    if table == "sgd":
        assert_close(local_rows(trainer.model)[0].double(), expected, rtol=0, atol=1e-6)
    for batch in others:
        trainer.train_step(batch)
    after = local_rows(trainer.model)[0]
    assert (after[:, WIDTH] != 0).all()
    assert not after[:, WIDTH + 1 :].any()
    assert count_parameters(trainer.model.module, NUM_ITEMS)["table"] == NUM_ITEMS * (WIDTH + 1)


def plain_sgd_step(trainer, batch, rows):
    """The table after a step of SGD on the formula with a bias, float64."""
    rows = rows.double().requires_grad_()
    sequences = batch.item_ids.split(batch.offsets.diff().tolist())
    prefixes = [sequence[:n] for sequence in sequences for n in range(1, len(sequence))]
    logits = plain_scores(in_float64(trainer.model.module.encoder), rows, prefixes)
    loss = functional.cross_entropy(logits, torch.cat([sequence[1:] for sequence in sequences]), reduction="sum") / 128
    return (rows - 0.5 * torch.autograd.grad(loss, [rows])[0]).detach()


@pytest.mark.parametrize("table", ["sgd", "replicated"])
@pytest.mark.parametrize("kind", ["full", "uniform"])
def test_evaluation_ranks_by_score_and_bias(table, kind, make_trainer, dataset, monkeypatch):
    trainer = make_trainer(*TABLES[table])
    rows = local_rows(trainer.model)[0]
    rows.normal_()  # in place: these are the model's own
    rows[:, WIDTH] *= 3
    monkeypatch.setattr("glintru_rec.scoring.evaluation.BLOCK_SCORES", 7 * 240)
    monkeypatch.setattr("glintru_rec.scoring.evaluation.COMPARED_SCORES", 50)
    protocol = Protocol("full" if kind == "full" else f"{kind}:20", exclude_seen=kind == "full")
    metrics = evaluate(trainer.model, dataset, protocol, 20, 100)

    cases = dataset.eval_cases("test")
    histories = [torch.from_numpy(part) for part in np.split(cases.history_items, cases.history_offsets[1:-1])]
    targets = torch.from_numpy(np.asarray(cases.targets))
    with torch.no_grad():
        scores = plain_scores(in_float64(trainer.model.module.encoder), rows, [history[-20:] for history in histories])
    own = scores.gather(1, targets[:, None])
    if kind == "full":
        for row, history in enumerate(histories):
            scores[row, history] = -torch.inf
        ranks = 1.0 + (scores > own).sum(1)
        ranks[[target in history for target, history in zip(targets, histories)]] = torch.inf
    else:
        users = torch.from_numpy(np.asarray(cases.user_index))
        none = torch.zeros(len(users) + 1, dtype=torch.int64)
        drawn = sample_candidates(kind, 20, users, targets, NONE, none, NUM_ITEMS, None, protocol.seed)
        ranks = 1.0 + (scores.gather(1, drawn) > own).sum(1)
    assert metrics["mrr"] == pytest.approx((1 / ranks).mean().item(), abs=1e-6)
    assert metrics["hr@10"] == pytest.approx((ranks <= 10).double().mean().item(), abs=1e-6)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    model, path = make_model(), tmp_path_factory.mktemp("artifact") / "artifact"
    vectors = model.table.weight.detach()[:, : model.vector_dim]
    vocabulary = Vocabulary(pa.array(np.arange(NUM_ITEMS)), np.ones(NUM_ITEMS, dtype=np.int64))
    about = {"encoder_config": {"encoder": "lru_rec"}, "provenance": {}}
    export_artifact(model.encoder, "dot", vectors, vocabulary, path, max_seq_len=50, **about)
    return path


@torch.no_grad()
def true_scores(histories):
    model = make_model()
    return plain_scores(in_float64(model.encoder), model.table.weight, histories)


def test_artifact_keeps_the_vectors_alone(artifact):
    loaded = Artifact.load(artifact)
    assert loaded.module.item_vectors.shape == (NUM_ITEMS, WIDTH + 1)
    assert loaded.manifest["embedding_dim"] == WIDTH + 1
    assert loaded.manifest["item_bias"] is True
    assert loaded.manifest["signature"]["encode"]["outputs"][0]["shape"] == ["B", WIDTH + 1]


def test_exported_methods(artifact):
    module, histories = Artifact.load(artifact).module, random_histories([3, 0, 50, 1])
    item_ids, lengths = ragged(histories)
    truth = true_scores(histories)
    candidates, candidate_lengths = ragged(random_histories([4, 5, 0, 6], seed=1))
    users = torch.arange(4).repeat_interleave(candidate_lengths)
    query = module.encode(item_ids, lengths)
    close = {"rtol": 0, "atol": 1e-4, "check_dtype": False}
    assert_close(query @ module.item_vectors.T, truth, **close)
    assert_close(module.score(item_ids, lengths, candidates, candidate_lengths), truth[users, candidates], **close)
    for ids, best in (module.top_k(item_ids, lengths, 9, False), module.top_k_of(query, NONE, torch.zeros_like(lengths), 9)):
        assert torch.equal(ids, truth.topk(9, dim=1).indices)
        assert_close(best, truth.topk(9, dim=1).values, **close)
    advanced, state = module.advance(item_ids, lengths, module.init_state(4))
    assert_close(advanced @ module.item_vectors.T, truth, **close)
    stepped, _ = module.step(torch.tensor([1, 2, 3, 4]), state)
    longer = [torch.cat([history, torch.tensor([item])]) for history, item in zip(histories, [1, 2, 3, 4])]
    assert_close(stepped @ module.item_vectors.T, true_scores(longer), **close)


def test_an_empty_history_ranks_by_bias(artifact):
    """Learnt popularity: eagerly, exported, and from a state without events."""
    model, module = make_model(), Artifact.load(artifact).module
    bias = model.table.weight.detach()[:, WIDTH]
    with torch.no_grad():
        query, vectors = model.encode(NONE, torch.tensor([0, 0]), torch.arange(NUM_ITEMS))
    assert torch.equal(query @ vectors.T, bias.unsqueeze(0))
    nobody = torch.tensor([0])
    ids, scores = module.top_k(NONE, nobody, NUM_ITEMS)
    assert torch.equal(ids[0], bias.argsort(descending=True))
    assert torch.equal(scores[0], bias.sort(descending=True).values)
    assert torch.equal(module.advance(NONE, nobody, module.init_state(1))[0], query[:1])


def test_scoring_job(artifact, tmp_path):
    """Candidates, lists and vectors of whole histories, and lists of states that events carried on."""
    histories = random_histories([3, 1, 30, 12], seed=2)
    candidates = random_histories([5, 0, 7, 60], seed=3)
    truth = true_scores(histories).numpy()
    lists = [pa.array([part.tolist() for part in parts], pa.list_(pa.int64())) for parts in (histories, candidates)]
    source = str(tmp_path / "users.parquet")
    pq.write_table(pa.table({"user_id": [0, 1, 2, 3], "history": lists[0], "candidates": lists[1]}), source)

    def run(mode, **options):
        places = {"artifact": str(artifact), "input": source, "output": str(tmp_path / mode)}
        config = ScoreConfig(**places | {"mode": mode, "top_k": 8, "exclude_seen": False} | options)
        (update_states if mode == "update" else score)(config)
        return next((tmp_path / mode).glob("*.parquet"))

    def column(path, name):
        return pq.read_table(path)[name].to_pylist()

    for row, (scores, items) in enumerate(zip(column(run("candidates"), "scores"), candidates)):
        np.testing.assert_allclose(scores, truth[row, items], rtol=0, atol=1e-4)
    vectors = Artifact.load(artifact).module.item_vectors.numpy()
    queries = np.array(column(run("encode"), "embedding"))
    assert queries.shape == (4, WIDTH + 1)
    np.testing.assert_allclose(queries @ vectors.T, truth, rtol=0, atol=1e-4)

    users = np.repeat(np.arange(4), [len(history) for history in histories])
    events = {"user_id": users, "item_id": torch.cat(histories).numpy(), "timestamp": np.arange(len(users))}
    pq.write_table(pa.table(events), tmp_path / "events.parquet")
    updated = run("update", input=str(tmp_path / "events.parquet"), state=str(tmp_path / "state"))
    for path in (run("top_k"), updated):
        assert column(path, "item_ids") == np.argsort(-truth, axis=1)[:, :8].tolist()
        np.testing.assert_allclose(column(path, "scores"), -np.sort(-truth, axis=1)[:, :8], rtol=0, atol=1e-4)
