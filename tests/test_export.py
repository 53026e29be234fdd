"""An artifact gives the model's own scores where only torch is installed, and refuses to be anything else."""

import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders import GlintRU
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, RecurrentScoringModule, ScoringModule, export_artifact, exporting
from glintru_rec.export.exporting import encoder_sha256
from glintru_rec.files import sha256_of
from glintru_rec.jagged import keep_last, offsets_from_lengths
from glintru_rec.model import SequenceModel

NUM_ITEMS, WIDTH, MAX_SEQ_LEN = 300, 16, 50
VOCABULARY = Vocabulary(pa.array(np.arange(NUM_ITEMS) * 7 + 2**53), np.ones(NUM_ITEMS, dtype=np.int64))

KINDS = {
    f"{encoder}-{direction}-{similarity}": (encoder == "GlintRU", direction == "causal", similarity)
    for encoder in ("GlintRU", "Light")
    for direction in ("causal", "bidirectional")
    for similarity in ("dot", "cosine")
} | {"GlintRU-causal-bias": (True, True, "bias"), "Light-bidirectional-bias": (False, False, "bias")}
BATCHES = ([], [0], [0, 1, 2, 49, 50, 51, 500], [3] * 7, [500])

# Runs where the package and its dependencies cannot be imported.
FRESH = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("glintru_rec", "torchrec", "fbgemm_gpu", "pyarrow"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import torch

torch.set_num_threads(1)
for kind in sys.argv[1:]:
    module = torch.jit.load(f"{kind}/model.pt")
    module.open_items(kind)
    outputs = []
    for item_ids, lengths, candidates, candidate_lengths in torch.load("batches.pt"):
        outputs.append([
            module.encode(item_ids, lengths),
            module.score(item_ids, lengths, candidates, candidate_lengths),
            *module.top_k(item_ids, lengths, 10),
            *module.top_k(item_ids, lengths, 10, False),
        ])
    torch.save(outputs, f"{kind}.pt")
"""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads do not help tensors this small, and wait for each other where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class PlainTable(nn.Module):
    def __init__(self, num_items=NUM_ITEMS, width=WIDTH):
        super().__init__()
        self.embedding = nn.Embedding(num_items, width)

    def forward(self, item_ids, more_ids):
        return self.embedding(item_ids), self.embedding(more_ids)


def make_model(gated_mlp=True, causal=True, similarity="dot", num_items=NUM_ITEMS):
    """``similarity`` may be ``bias``: the dot product and a bias for each item."""
    torch.manual_seed(0)
    item_bias = similarity == "bias"
    encoder = GlintRU(WIDTH, gated_mlp=gated_mlp, causal=causal)
    table = PlainTable(num_items, WIDTH + item_bias)
    return SequenceModel(table, encoder, "dot" if item_bias else similarity, item_bias).eval()


def export(model, output, vocabulary=VOCABULARY, **changes):
    arguments = {
        "encoder": model.encoder,
        "similarity": model.similarity,
        "item_vectors": model.table.embedding.weight,
        "vocabulary": vocabulary,
        "output": output,
        "max_seq_len": MAX_SEQ_LEN,
        "encoder_config": {"encoder": "glint_ru"},
        "provenance": {"run": "a-run", "step": 12},
    }
    return export_artifact(**(arguments | changes))


def make_module(model, **options):
    return ScoringModule(model.encoder, model.table.embedding.weight.detach(), model.similarity, MAX_SEQ_LEN, **options)


def make_batch(lengths, num_items=NUM_ITEMS):
    lengths = torch.tensor(lengths, dtype=torch.int64)
    generator = torch.Generator().manual_seed(int(lengths.sum()))
    item_ids = torch.randint(num_items, (int(lengths.sum()),), generator=generator)
    candidate_lengths = torch.arange(lengths.numel()) % 4 * 5
    candidates = torch.randint(num_items, (int(candidate_lengths.sum()),), generator=generator)
    return item_ids, lengths, candidates, candidate_lengths


@torch.no_grad()
def eager_query(model, item_ids, lengths):
    return model.encode(*keep_last(item_ids, offsets_from_lengths(lengths), MAX_SEQ_LEN), item_ids[:0])[0]


@torch.no_grad()
def eager_scores(model, item_ids, lengths, exclude_seen=False):
    """The score of every user and item, [B, V], seen items at -inf where asked."""
    scores = eager_query(model, item_ids, lengths) @ model.item_vectors(model.table.embedding.weight).t()
    if exclude_seen:
        for user, seen in enumerate(item_ids.split(lengths.tolist())):
            scores[user, seen] = -math.inf
    return scores


def brute_force_top_k(scores, k):
    """Ids and scores by a stable sort of the whole catalog."""
    order = np.argsort(-scores.numpy(), axis=1, kind="stable")[:, :k]
    best = np.take_along_axis(scores.numpy(), order, axis=1)
    tail = [(0, 0), (0, k - order.shape[1])]
    order, best = np.pad(order, tail), np.pad(best, tail, constant_values=-np.inf)
    return torch.from_numpy(np.where(np.isinf(best), -1, order)), torch.from_numpy(best)


def check_top_k(scores, ids, best, k):
    """The same scores, and each id has the score it is given with: nearly equal scores may change places."""
    _, expected = brute_force_top_k(scores, k)
    assert ids.dtype == torch.int64
    assert torch.equal(ids >= 0, expected.isfinite())
    torch.testing.assert_close(best, expected, rtol=0, atol=1e-5)
    at_ids = scores.gather(1, ids.clamp(min=0))
    torch.testing.assert_close(torch.where(ids < 0, -math.inf, at_ids), expected, rtol=0, atol=1e-5)
    for row in ids.tolist():
        known = [item for item in row if item >= 0]
        assert len(set(known)) == len(known)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An artifact, not to be changed."""
    path = tmp_path_factory.mktemp("export") / "artifact"
    export(make_model(), path)
    return path


@pytest.fixture(scope="module")
def fresh_outputs(tmp_path_factory):
    """What a process without the package made of every kind of model."""
    folder = tmp_path_factory.mktemp("fresh")
    for kind, arguments in KINDS.items():
        export(make_model(*arguments), folder / kind)
    torch.save([make_batch(lengths) for lengths in BATCHES], folder / "batches.pt")
    (folder / "fresh.py").write_text(FRESH)
    subprocess.run([sys.executable, "-I", "fresh.py", *KINDS], cwd=folder, check=True)
    return folder


@pytest.mark.programs
@pytest.mark.parametrize("kind", KINDS)
def test_fresh_process_without_the_package_gives_the_models_scores(kind, fresh_outputs):
    model = make_model(*KINDS[kind])
    batches = [make_batch(lengths) for lengths in BATCHES]
    outputs = torch.load(fresh_outputs / f"{kind}.pt")
    assert len(outputs) == len(batches)
    for (item_ids, lengths, candidates, candidate_lengths), output in zip(batches, outputs):
        query, scores, ids, best, ids_with_seen, best_with_seen = output
        assert query.shape == (len(lengths), model.vector_dim)
        torch.testing.assert_close(query, eager_query(model, item_ids, lengths), rtol=0, atol=1e-5)
        users = torch.arange(len(lengths)).repeat_interleave(candidate_lengths)
        everything = eager_scores(model, item_ids, lengths)
        torch.testing.assert_close(scores, everything[users, candidates], rtol=0, atol=1e-5)
        check_top_k(eager_scores(model, item_ids, lengths, exclude_seen=True), ids, best, 10)
        check_top_k(everything, ids_with_seen, best_with_seen, 10)


@pytest.mark.parametrize("max_block_cells", [1, 40, 8 * 37, 1 << 24])
@pytest.mark.parametrize("similarity", ["dot", "cosine", "bias"])
@pytest.mark.parametrize("k", [1, 7, NUM_ITEMS, NUM_ITEMS + 5])
def test_top_k_is_argsort_whatever_the_blocks(max_block_cells, similarity, k):
    model = make_model(similarity=similarity)
    module = make_module(model, max_block_cells=max_block_cells)
    item_ids, lengths, _, _ = make_batch([2, 0, 60, 300, 1, 5, 5, 9])
    for exclude_seen in (True, False):
        scores = eager_scores(model, item_ids, lengths, exclude_seen)
        check_top_k(scores, *module.top_k(item_ids, lengths, k, exclude_seen), k)


@pytest.mark.parametrize("max_block_cells", [1, 60, 1 << 24])
def test_equal_scores_go_to_the_lower_id(max_block_cells):
    model = make_model()
    with torch.no_grad():  # four different scores, in steps that every order of addition gives exactly
        model.table.embedding.weight.zero_()
        model.table.embedding.weight[:, 0] = torch.arange(NUM_ITEMS) % 4
    item_ids, lengths, _, _ = make_batch([4, 9, 0])
    module = make_module(model, max_block_cells=max_block_cells)
    for exclude_seen in (True, False):
        ids, best = module.top_k(item_ids, lengths, 90, exclude_seen)
        expected_ids, expected = brute_force_top_k(eager_scores(model, item_ids, lengths, exclude_seen), 90)
        assert torch.equal(ids, expected_ids)
        torch.testing.assert_close(best, expected)


@pytest.mark.parametrize("max_block_cells", [5 * 16, 5 * 512, 1 << 24])
@pytest.mark.parametrize("k", [1, 20, 200])
def test_top_k_of_many_items_is_argsort(max_block_cells, k):
    """Enough items for whole groups of them to be passed over; rows with many equal scores, and with few."""
    generator = torch.Generator().manual_seed(3)
    vectors = torch.randn(3001, 4, generator=generator)
    vectors[:, :2] = torch.randint(-9, 10, (3001, 2), generator=generator).float()
    query = torch.tensor([[1, 3, 0, 0], [0, 1, 0, 0], [0, 0, 0, 0], [0, 0, 1, 0], [1, 2, 0, 0.01]])
    module = ScoringModule(GlintRU(4, num_heads=1), vectors, "dot", MAX_SEQ_LEN, max_block_cells).eval()
    seen, seen_lengths = torch.arange(3001).repeat(2)[:3300], torch.tensor([300, 0, 0, 2990, 10])
    scores = query @ vectors.t()
    scores[torch.repeat_interleave(seen_lengths), seen] = -torch.inf
    ids, best = module.top_k_of(query, seen, seen_lengths, k)
    expected_ids, expected = brute_force_top_k(scores, k)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(best, expected)
    assert bool(module.top_k_of(query[:1] * torch.nan, seen[:0], seen[:1], k)[1].isnan().all())


def test_items_before_the_encoders_reach_were_seen():
    model = make_model()
    item_ids, lengths = torch.arange(MAX_SEQ_LEN + 30), torch.tensor([MAX_SEQ_LEN + 30])
    ids, _ = make_module(model).top_k(item_ids, lengths, NUM_ITEMS)
    assert sorted(ids[0, : NUM_ITEMS - MAX_SEQ_LEN - 30].tolist()) == list(range(MAX_SEQ_LEN + 30, NUM_ITEMS))
    assert (ids[0, NUM_ITEMS - MAX_SEQ_LEN - 30 :] == -1).all()


def test_a_user_who_saw_everything_gets_nothing():
    ids, best = make_module(make_model()).top_k(torch.arange(NUM_ITEMS), torch.tensor([NUM_ITEMS]), 3)
    assert ids.tolist() == [[-1, -1, -1]]
    assert best.tolist() == [[-math.inf] * 3]


def test_batch_equals_its_members_one_by_one():
    model = make_model()
    module = make_module(model)
    item_ids, lengths, _, _ = make_batch([3, 0, 77, 1, 50])
    together = module.encode(item_ids, lengths)
    alone = [module.encode(history, torch.tensor([len(history)])) for history in item_ids.split(lengths.tolist())]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-6)


def test_table_is_neither_copied_nor_normalised():
    for similarity in ("dot", "cosine", "bias"):
        model = make_model(similarity=similarity)
        weight = model.table.embedding.weight.detach()
        module = make_module(model)
        assert module.item_vectors.data_ptr() == weight.data_ptr()
        assert sum(buffer.numel() for buffer in module.buffers()) <= weight.numel() + NUM_ITEMS


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("encode", torch.arange(3), torch.tensor([1, 1])), "add up to 3 items; they add up to 2"),
        (("encode", torch.arange(3), torch.tensor([5, -2])), "must not be negative"),
        (("top_k", torch.arange(3), torch.tensor([3]), 0), "k is 0"),
        (("score", torch.arange(3), torch.tensor([3]), torch.arange(2), torch.tensor([1, 1])), "2 candidate lengths .* 1 hist"),
        (("score", torch.arange(3), torch.tensor([3]), torch.arange(2), torch.tensor([1])), "add up to 2 items"),
        (
            ("score", torch.arange(3), torch.tensor([3]), torch.tensor([0, NUM_ITEMS]), torch.tensor([2])),
            "candidates are from 0 to",
        ),
        (
            ("score", torch.arange(3), torch.tensor([3]), torch.tensor([5, -1]), torch.tensor([2])),
            "candidates are from -1 to 5",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_refused(arguments, message):
    method, *tensors = arguments
    with pytest.raises(ValueError, match=message):
        getattr(make_module(make_model()), method)(*tensors)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("times", [1, 3])
def test_lists_may_repeat_items_and_be_longer_than_the_catalog(similarity, times):
    model = make_model(similarity=similarity)
    item_ids, lengths, *_ = make_batch([3, 0, 5])
    candidate_lengths = torch.tensor([0, NUM_ITEMS * times, NUM_ITEMS * times * 2])
    candidates = torch.arange(NUM_ITEMS).repeat(3 * times)
    scripted = torch.jit.script(make_module(model))
    expected = eager_scores(model, item_ids, lengths)[torch.arange(3).repeat_interleave(candidate_lengths), candidates]
    for _ in range(3):  # TorchScript watches the first call, and runs others as it optimised them
        scores = scripted.score(item_ids, lengths, candidates, candidate_lengths)
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("item_id", [-1, NUM_ITEMS])
def test_an_id_outside_the_catalog_is_refused(item_id):
    with pytest.raises((IndexError, RuntimeError), match="out of range"):
        make_module(make_model()).encode(torch.tensor([item_id]), torch.tensor([1]))


def test_manifest_says_what_the_artifact_is(tmp_path):
    manifest = export(make_model(similarity="cosine"), tmp_path / "artifact")
    assert json.loads((tmp_path / "artifact" / "manifest.json").read_text()) == manifest
    assert manifest["artifact_version"] == 3
    assert (manifest["format"], manifest["precision"], manifest["similarity"]) == ("torchscript", "fp32", "cosine")
    assert (manifest["num_items"], manifest["embedding_dim"], manifest["max_seq_len"]) == (NUM_ITEMS, WIDTH, MAX_SEQ_LEN)
    assert manifest["vocabulary_sha256"] == VOCABULARY.sha256
    assert manifest["provenance"] == {"run": "a-run", "step": 12}
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["encoder_sha256"] == encoder_sha256(make_model().encoder)
    assert set(manifest["files"]) == {"model.pt", "item_vectors.npy", "inverse_norms.npy", "vocabulary/items.parquet"}
    for name, size in manifest["bytes"].items():
        assert (tmp_path / "artifact" / name).stat().st_size == size
    stateless = {"open_items", "encode", "score", "top_k", "top_k_of", "vectors_of"}
    assert set(manifest["signature"]) == stateless | {"init_state", "step", "advance"}
    for method in ("encode", "score", "top_k", "step", "advance"):
        assert 0 <= manifest["parity"][method]["relative"] <= 1e-5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["artifact"]


@pytest.mark.parametrize("similarity", ["dot", "bias"])
def test_signature_is_that_of_the_module(similarity, tmp_path):
    export(make_model(similarity=similarity), tmp_path / "artifact")
    artifact = Artifact.load(tmp_path / "artifact")
    assert artifact.manifest["item_bias"] is (similarity == "bias")
    assert artifact.manifest["embedding_dim"] == artifact.module.item_vectors.size(1) == WIDTH + (similarity == "bias")
    module = artifact.module
    for method, signature in artifact.manifest["signature"].items():
        schema = getattr(module, method).schema
        # Without side features there are none to be given.
        arguments = [argument.name for argument in schema.arguments[1:] if argument.name != "side_ids"]
        assert arguments == [entry["name"] for entry in signature["inputs"]]
        sizes = {"T": 3, "B": 1, "C": 2, "n": 3, "k": 4}
        values = {"lengths": 3, "candidate_lengths": 2, "seen_lengths": 3, "k": 4, "exclude_seen": True, "batch_size": 1}
        values["folder"] = str(artifact.path)
        inputs = []
        for entry in signature["inputs"]:
            value = values.get(entry["name"], 0)
            shape = [sizes.get(size, size) for size in entry.get("shape", [])]
            inputs.append(torch.full(shape, value, dtype=getattr(torch, entry["dtype"])) if shape else value)
        outputs = getattr(module, method)(*inputs)
        outputs = () if outputs is None else outputs if isinstance(outputs, tuple) else (outputs,)
        for output, entry in zip(outputs, signature["outputs"], strict=True):
            assert list(output.shape) == [sizes.get(size, size) for size in entry["shape"]]
            assert str(output.dtype) == f"torch.{entry['dtype']}"


def test_export_leaves_the_model_as_it_was(tmp_path):
    model = make_model().train()
    export(model, tmp_path / "artifact")
    assert model.encoder.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    module = Artifact.load(tmp_path / "artifact").module
    assert not any(parameter.requires_grad for parameter in module.parameters())
    item_ids, lengths, _, _ = make_batch([40])
    assert torch.equal(module.encode(item_ids, lengths), module(item_ids, lengths))  # no dropout


def test_half_precision_tables_export_as_float32(tmp_path):
    model = make_model()
    export(model, tmp_path / "artifact", item_vectors=model.table.embedding.weight.half())
    assert Artifact.load(tmp_path / "artifact").module.item_vectors.dtype == torch.float32


def test_load_gives_back_module_and_vocabulary(tmp_path):
    vocabulary = Vocabulary(pa.array([f"ü{i}" for i in range(NUM_ITEMS)]), np.ones(NUM_ITEMS, dtype=np.int64))
    export(make_model(), tmp_path / "artifact", vocabulary)
    artifact = Artifact.load(tmp_path / "artifact")
    assert artifact.vocabulary.item_ids == vocabulary.item_ids
    assert artifact.module.max_seq_len == MAX_SEQ_LEN
    assert artifact.manifest["num_items"] == NUM_ITEMS


def test_a_tiny_catalog_exports(tmp_path):
    vocabulary = Vocabulary(pa.array([5]), np.ones(1, dtype=np.int64))
    export(make_model(num_items=1), tmp_path / "artifact", vocabulary)
    ids, _ = Artifact.load(tmp_path / "artifact").module.top_k(torch.tensor([0]), torch.tensor([1]), 2, False)
    assert ids.tolist() == [[0, -1]]


@pytest.mark.parametrize("broken", ["encode", "top_k", "advance", "nan"])
def test_a_module_that_differs_from_the_model_is_not_exported(broken, tmp_path, monkeypatch):
    model = make_model()
    module_class = RecurrentScoringModule
    if broken == "nan":
        with torch.no_grad():
            model.table.embedding.weight[17] = math.nan
    else:

        class Broken(RecurrentScoringModule):
            def __init__(self, encoder, item_vectors, similarity, max_seq_len, precision, side):
                wrong_length = max_seq_len - 1 if broken == "encode" else max_seq_len
                super().__init__(encoder, item_vectors, similarity, wrong_length, precision=precision, side=side)
                if broken == "top_k":
                    self.score_scales = torch.full((NUM_ITEMS,), 1.001)
                if broken == "advance":
                    self.first_state += 0.01

        module_class = Broken
    monkeypatch.setattr(exporting, "RecurrentScoringModule", module_class)
    with pytest.raises(RuntimeError, match=r"the exported \w+ differs from the model by (nan|[\d.e-]+) at a scale of"):
        export(model, tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch.jit, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export(make_model(), tmp_path / "artifact")
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_taken_is_refused(tmp_path):
    (tmp_path / "artifact").mkdir()
    (tmp_path / "artifact" / "precious").write_text("mine")
    with pytest.raises(InputError, match=r"artifact' exists and is not an empty folder"):
        export(make_model(), tmp_path / "artifact")
    assert (tmp_path / "artifact" / "precious").read_text() == "mine"
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="not an empty folder"):
        export(make_model(), tmp_path / "file")
    with pytest.raises(InputError, match="cannot be written"):
        export(make_model(), tmp_path / "file" / "below")
    (tmp_path / "empty").mkdir()
    export(make_model(), tmp_path / "empty")


def test_a_vocabulary_of_another_size_is_refused(tmp_path):
    with pytest.raises(InputError, match="300 rows, the vocabulary 299 items"):
        export(make_model(), tmp_path / "artifact", Vocabulary(VOCABULARY.item_ids[:-1], VOCABULARY.counts[:-1]))


@pytest.mark.parametrize(
    ("width", "similarity", "message"),
    [
        (WIDTH + 4, "dot", "the item table is 20 wide, the encoder 16"),
        (WIDTH - 1, "dot", "the item table is 15 wide, the encoder 16"),
        (WIDTH + 1, "cosine", "a cosine has no room for a bias"),
    ],
)
def test_vectors_that_do_not_fit_the_encoder_are_refused(width, similarity, message, tmp_path):
    with pytest.raises(InputError, match=message):
        export(make_model(), tmp_path / "artifact", item_vectors=torch.zeros(NUM_ITEMS, width), similarity=similarity)
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_similarity_is_refused(tmp_path):
    with pytest.raises(InputError, match="euclid"):
        export(make_model(), tmp_path / "artifact", similarity="euclid")
    assert list(tmp_path.iterdir()) == []


class TestDamagedArtifact:
    @pytest.fixture
    def artifact(self, exported, tmp_path):
        return shutil.copytree(exported, tmp_path / "artifact")

    def edit(self, artifact, **changes):
        manifest = json.loads((artifact / "manifest.json").read_text())
        (artifact / "manifest.json").write_text(json.dumps(manifest | changes))

    def refused(self, path, message):
        with pytest.raises(InputError, match=message) as caught:
            Artifact.load(path)
        assert str(path) in str(caught.value)

    def test_missing(self, tmp_path):
        self.refused(tmp_path / "nothing", "has no manifest.json")

    @pytest.mark.parametrize("name", ["model.pt", "item_vectors.npy", "vocabulary/items.parquet"])
    def test_file_missing(self, artifact, name):
        (artifact / name).unlink()
        self.refused(artifact, f"lacks {name}")

    @pytest.mark.parametrize("name", ["model.pt", "item_vectors.npy", "vocabulary/items.parquet"])
    def test_one_bit_flipped(self, artifact, name):
        content = bytearray((artifact / name).read_bytes())
        content[len(content) // 2] ^= 1
        (artifact / name).write_bytes(content)
        self.refused(artifact, f"{name} of artifact .* is not the file that was exported")

    @pytest.mark.parametrize("name", ["model.pt", "item_vectors.npy", "vocabulary/items.parquet"])
    def test_truncated(self, artifact, name):
        size = (artifact / name).stat().st_size
        os.truncate(artifact / name, size - 1)
        self.refused(artifact, f"{name} of artifact .* has {size - 1} bytes, not {size}")

    def test_items_that_are_not_verified(self, artifact):
        """They are opened unread, but not with another size, nor another shape."""
        with (artifact / "item_vectors.npy").open("r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\x7f")
        Artifact.load(artifact, verify_items=False)
        half = np.load(artifact / "item_vectors.npy")[: NUM_ITEMS // 2]
        np.save(artifact / "item_vectors.npy", half)
        size = (artifact / "item_vectors.npy").stat().st_size
        with pytest.raises(InputError, match=f"item_vectors.npy of artifact .* it has {size} bytes"):
            Artifact.load(artifact, verify_items=False)
        manifest = json.loads((artifact / "manifest.json").read_text())
        self.edit(artifact, bytes=manifest["bytes"] | {"item_vectors.npy": size})
        with pytest.raises(InputError, match="has 150 rows, not 300"):
            Artifact.load(artifact, verify_items=False)

    def test_swapped_vocabulary(self, artifact):
        """Also by one who corrects its checksum."""
        reversed_ids = Vocabulary(pa.array(VOCABULARY.item_ids.to_numpy()[::-1]), VOCABULARY.counts)
        reversed_ids.save(artifact / "vocabulary/items.parquet")
        manifest = json.loads((artifact / "manifest.json").read_text())
        name = "vocabulary/items.parquet"
        self.edit(
            artifact,
            files=manifest["files"] | {name: sha256_of(artifact / name)},
            bytes=manifest["bytes"] | {name: (artifact / name).stat().st_size},
        )
        self.refused(artifact, "vocabulary/items.parquet of artifact .* is not the vocabulary of its model")

    def test_another_models_file(self, artifact):
        torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(artifact / "model.pt"))
        manifest = json.loads((artifact / "manifest.json").read_text())
        self.edit(
            artifact,
            files=manifest["files"] | {"model.pt": sha256_of(artifact / "model.pt")},
            bytes=manifest["bytes"] | {"model.pt": (artifact / "model.pt").stat().st_size},
        )
        self.refused(artifact, "model.pt of artifact .* lacks open_items, encode, score")

    def test_other_format(self, artifact):
        self.edit(artifact, format="pt2")
        self.refused(artifact, "has format 'pt2'; this program runs torchscript")

    @pytest.mark.parametrize("text", ["", "{", "[]", "\x80"])
    def test_manifest_that_is_none(self, artifact, text):
        (artifact / "manifest.json").write_text(text, encoding="latin-1")
        self.refused(artifact, "manifest.json|artifact_version None")

    def test_other_version(self, artifact):
        self.edit(artifact, artifact_version=2)
        self.refused(artifact, "artifact_version 2, this program reads 3")

    def test_manifest_without_files(self, artifact):
        self.edit(artifact, files={})
        self.refused(artifact, "does not name its files")
        manifest = json.loads((artifact / "manifest.json").read_text())
        del manifest["bytes"], manifest["precision"]
        (artifact / "manifest.json").write_text(json.dumps(manifest))
        self.refused(artifact, "manifest.json of artifact .* lacks precision, bytes")

    def test_other_vocabulary(self, artifact):
        self.edit(artifact, vocabulary_sha256="0" * 64)
        self.refused(artifact, "is not the vocabulary of its model")
