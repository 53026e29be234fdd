"""Smaller item tables: what is stored, what the exported methods make of it, and what it costs on validation histories."""

import json
import math

import numpy as np
import pyarrow as pa
import pytest
import torch

from glintru_rec.data.dataset import EvalCases, SequenceDataset
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders import LRURec
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, ScoringModule, Validation, export_artifact, item_files, replace_items
from glintru_rec.export.item_files import quantize_rows, read_items, write_items
from glintru_rec.export.precision import measure_precision
from glintru_rec.files import sha256_of
from glintru_rec.programs.export import ExportConfig, ExportDataConfig, export_run
from glintru_rec.scoring import catalog
from glintru_rec.scoring.catalog import FewItems, catalog_of, most_items, stretches_of

NUM_ITEMS, WIDTH, MAX_SEQ_LEN = 400, 16, 20
VOCABULARY = Vocabulary(pa.array(np.arange(NUM_ITEMS)), np.ones(NUM_ITEMS, dtype=np.int64))
TABLES = [(precision, kind) for precision in ("fp16", "int8") for kind in ("dot", "cosine", "bias")]


def make_encoder():
    torch.manual_seed(0)
    return LRURec(WIDTH, num_blocks=1).eval().requires_grad_(False)


def make_table(kind, scale=1.0):
    """Rows of very different lengths; with a bias that is large beside them."""
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(NUM_ITEMS, WIDTH, generator=generator) * torch.rand(NUM_ITEMS, 1, generator=generator) * scale
    bias = 100 * torch.randn(NUM_ITEMS, 1, generator=generator)
    return torch.cat([rows, bias], dim=1) if kind == "bias" else rows


def similarity_of(kind):
    return "cosine" if kind == "cosine" else "dot"


def make_cases(exact, num_cases=60):
    """Histories of 1 to 25 items; the target is somewhere in the model's own top 12, or anywhere."""
    generator = torch.Generator().manual_seed(2)
    lengths = torch.arange(num_cases) % 25 + 1
    items = torch.randint(NUM_ITEMS, (int(lengths.sum()),), generator=generator)
    ids, _ = exact.top_k(items, lengths, 12)
    targets = ids[torch.arange(num_cases), torch.arange(num_cases) % 12]
    targets[::7] = torch.randint(NUM_ITEMS, (len(targets[::7]),), generator=generator)
    offsets = np.concatenate([[0], lengths.cumsum(0).numpy()])
    return EvalCases(items.numpy(), offsets, targets.numpy(), np.arange(num_cases))


def export(output, kind, precision, table=None, **limits):
    encoder = make_encoder()
    table = make_table(kind) if table is None else table
    cases = make_cases(ScoringModule(encoder, table, similarity_of(kind), MAX_SEQ_LEN))
    return export_artifact(
        encoder,
        similarity_of(kind),
        table,
        VOCABULARY,
        output,
        max_seq_len=MAX_SEQ_LEN,
        encoder_config={},
        provenance={},
        precision=precision,
        validation=Validation(cases, **limits),
    )


def rounded_plainly(rows):
    """Round to the nearest of 255 equal steps up to the largest magnitude."""
    steps = rows.abs().amax(dim=1, keepdim=True) / 127
    return (rows / steps).round().nan_to_num() * steps


def restored_of(numbers, scales, offsets):
    return scales.double().unsqueeze(1) * (numbers.double() + offsets.double().unsqueeze(1))


def test_rows_are_rounded_with_less_error_than_by_the_largest_step():
    rows = make_table("dot")
    numbers, scales, offsets = quantize_rows(rows)
    assert (numbers.dtype, scales.dtype, offsets.dtype) == (torch.int8, torch.float32, torch.float32)
    assert int(numbers.min()) >= -127
    truth, restored = rows.double(), restored_of(numbers, scales, offsets)
    error = (truth - restored).square().sum(1)
    assert error.mean() <= 0.5 * (truth - rounded_plainly(truth)).square().sum(1).mean()
    # Of any scale and offset the fitted ones have the least error: what is left has no part along the numbers, or along ones.
    assert bool(((truth - restored).sum(1).abs() <= 1e-5 * truth.abs().sum(1)).all())
    along = ((truth - restored) * numbers.double()).sum(1)
    assert bool((along.abs() <= 1e-5 * (truth * numbers.double()).abs().sum(1)).all())
    for factor in (2.0**-100, 2.0**110):
        again, scaled, shifted = quantize_rows(rows * factor)
        assert torch.equal(again, numbers)
        assert torch.equal(scaled / factor, scales)
        assert torch.equal(shifted, offsets)


def test_no_row_is_worse_than_rounded_symmetrically():
    """Rows of every kind: of whole numbers that symmetric rounding keeps, far from 0, of one value, of a single outlier."""
    torch.manual_seed(0)
    whole = torch.randint(-127, 128, (2000, WIDTH)).float()
    whole[:, 0] = 127
    lone = torch.zeros(1000, WIDTH)
    lone[:, 3] = torch.randn(1000)
    kinds = {
        "normal": torch.randn(5000, WIDTH),
        "whole": whole,
        "positive": torch.rand(2000, WIDTH) + 3,
        "far": 1 + 1e-6 * torch.randn(2000, WIDTH),
        "lone": lone,
        "binary": torch.randint(2, (2000, WIDTH)).float(),
        "equal": torch.randn(2000, 1).expand(-1, WIDTH).contiguous(),
        "zero": torch.zeros(1, WIDTH),
    }
    for kind, rows in kinds.items():
        truth = rows.double()
        error = (restored_of(*quantize_rows(rows)) - truth).norm(dim=1)
        plain = (rounded_plainly(truth) - truth).norm(dim=1)
        # Beside the last bits of float32, in which scale and offset are kept.
        assert bool((error <= plain + 1e-6 * truth.norm(dim=1)).all()), kind
    for kind in ("equal", "zero"):
        numbers, scales, offsets = quantize_rows(kinds[kind])
        assert torch.equal(scales.unsqueeze(1) * (numbers + offsets.unsqueeze(1)), kinds[kind])


@pytest.mark.parametrize(("precision", "kind"), [*TABLES, ("fp32", "dot"), ("fp32", "cosine"), ("fp32", "bias")])
def test_blocks_of_a_table_make_one_file(precision, kind, tmp_path, monkeypatch):
    table = make_table(kind)
    for name in ("whole", "blocks"):
        (tmp_path / name).mkdir()
        write_items(table, WIDTH, kind == "cosine", precision, tmp_path / name)
        monkeypatch.setattr(item_files, "_BLOCK_ROWS", 37)
    names = item_files.item_files(precision, kind == "cosine", kind == "bias")
    assert sorted(path.name for path in (tmp_path / "blocks").iterdir()) == sorted(names)
    for name in names:
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "blocks" / name).read_bytes()
    restored = read_items(tmp_path / "blocks")
    assert restored.shape == table.shape
    rows, stored = table[:, :WIDTH], restored[:, :WIDTH]
    plainly = {"fp32": rows, "fp16": rows.half().float(), "int8": rounded_plainly(rows)}[precision]
    assert bool(((stored - rows).norm(dim=1) <= (plainly - rows).norm(dim=1) * 1.001).all())
    if precision == "int8" and kind == "bias":
        assert torch.equal(restored[:, WIDTH], table[:, WIDTH])


@pytest.mark.parametrize(("precision", "kind"), TABLES)
def test_exported_methods_rank_by_the_stored_rows(precision, kind, tmp_path):
    manifest = export(tmp_path / "artifact", kind, precision, max_ndcg_loss=1.0)
    assert manifest["precision"] == precision
    assert json.loads((tmp_path / "artifact" / "manifest.json").read_text()) == manifest
    assert all(figures["relative"] <= 1e-5 for name, figures in manifest["parity"].items() if name != "tolerance")
    artifact = Artifact.load(tmp_path / "artifact")
    module = artifact.module
    assert module.item_vectors.dtype == {"fp16": torch.float16, "int8": torch.int8}[precision]
    lengths = torch.tensor([3, 0, 19])
    item_ids = torch.arange(22) * 11
    query = module.encode(item_ids, lengths)
    vectors = module.vectors_of(torch.arange(NUM_ITEMS))
    rows = read_items(tmp_path / "artifact")
    truth = torch.nn.functional.normalize(rows, dim=1) if kind == "cosine" else rows
    torch.testing.assert_close(vectors, truth, rtol=1e-6, atol=1e-6)
    products = query.double() @ vectors.double().t()
    ids, scores = module.top_k(item_ids, lengths, 7, False)
    expected = products.topk(7, dim=1).values.float()
    scale = float(expected.abs().max())
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6 * scale)
    torch.testing.assert_close(products.gather(1, ids).float(), expected, rtol=0, atol=1e-6 * scale)
    given = module.score(item_ids, lengths, torch.arange(60), torch.tensor([10, 20, 30]))
    users = torch.arange(3).repeat_interleave(torch.tensor([10, 20, 30]))
    torch.testing.assert_close(given, products[users, torch.arange(60)].float(), rtol=0, atol=1e-6 * scale)


@pytest.mark.parametrize(("precision", "kind"), [*TABLES, ("fp32", "dot"), ("fp32", "cosine"), ("fp32", "bias")])
def test_a_jobs_lists_leave_the_best_of_the_stored_rows(precision, kind, tmp_path):
    """The truth is the whole catalog's ranking, from which what may not be found is crossed out."""
    export(tmp_path / "artifact", kind, precision, max_ndcg_loss=1.0)
    artifact = Artifact.load(tmp_path / "artifact")
    module = artifact.module
    query = module.encode(torch.arange(22) * 11, torch.tensor([3, 0, 19]))
    seen, seen_lengths = torch.tensor([8, 9, 50]), torch.tensor([2, 0, 1])
    whole_ids, whole_scores = module.top_k_of(query, seen, seen_lengths, NUM_ITEMS)
    for items in (np.arange(5, NUM_ITEMS, 3), np.delete(np.arange(NUM_ITEMS), [0, *whole_ids[0, :3].tolist()])):
        for search in (FewItems(artifact, items), most_items(artifact, items)):
            ids, scores = search.top_k_of(query, seen, seen_lengths, 7)
            for row in range(3):
                left = torch.isin(whole_ids[row], torch.from_numpy(items))
                assert ids[row].tolist() == whole_ids[row, left][:7].tolist()
                torch.testing.assert_close(scores[row], whole_scores[row, left][:7], rtol=1e-6, atol=1e-6)
        ids, scores = catalog_of(artifact, items).top_k_of(query[:1], seen[:0], seen_lengths[1:2], NUM_ITEMS)
        assert sorted(ids[ids >= 0].tolist()) == items.tolist()
        assert bool((scores[ids < 0] == -torch.inf).all())
    few, most = catalog_of(artifact, np.arange(9)), catalog_of(artifact, np.arange(1, NUM_ITEMS))
    assert isinstance(few, FewItems)
    assert most.item_vectors.data_ptr() == module.item_vectors.data_ptr()


@pytest.mark.parametrize("kind", ["dot", "cosine", "bias"])
def test_stretches_of_an_int8_catalog_hold_the_best_of_the_whole(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(catalog, "MAX_BLOCK_ITEMS", 64)
    export(tmp_path / "artifact", kind, "int8", max_ndcg_loss=1.0)
    artifact = Artifact.load(tmp_path / "artifact")
    query = artifact.module.encode(torch.arange(22) * 11, torch.tensor([3, 0, 19]))
    seen, seen_lengths = torch.tensor([5, 300, 7]), torch.tensor([2, 0, 1])
    for items in (None, np.arange(1, NUM_ITEMS, 3), np.delete(np.arange(NUM_ITEMS), 9)):
        ids, scores = catalog_of(artifact, items).top_k_of(query, seen, seen_lengths, 7)
        searches = [search for share in range(2) for search in stretches_of(artifact, items, share, 2, 2)]
        assert len(searches) > 2
        found = [search.top_k_of(query, seen, seen_lengths, 7) for search in searches]
        best, order = torch.cat([scores for _, scores in found], dim=1).sort(dim=1, descending=True, stable=True)
        torch.testing.assert_close(best[:, :7], scores, rtol=1e-6, atol=1e-6)
        assert torch.equal(torch.cat([ids for ids, _ in found], dim=1).gather(1, order)[:, :7], ids)


@pytest.mark.parametrize("max_cases", [60, 1000, 17])
def test_measures_are_those_of_the_definitions(max_cases, tmp_path):
    """Against sets, sums and logarithms, one user at a time."""
    table = make_table("dot")
    export(tmp_path / "artifact", "dot", "int8", max_ndcg_loss=1.0)
    module = Artifact.load(tmp_path / "artifact").module
    exact = ScoringModule(make_encoder(), table, "dot", MAX_SEQ_LEN)
    cases = make_cases(exact)
    measured = measure_precision(module, exact, cases, max_cases)
    chosen = sorted({int(place) for place in np.linspace(0, 59, min(60, max_cases))})
    squares, spreads, overlaps, gains = [], [], {10: [], 100: []}, {"fp32": [], "int8": []}
    for case in chosen:
        history = torch.from_numpy(cases.history_items[cases.history_offsets[case] : cases.history_offsets[case + 1]])
        lists = {}
        for name, of in (("fp32", exact), ("int8", module)):
            scores = of.encode(history, torch.tensor([len(history)])) @ of.vectors_of(torch.arange(NUM_ITEMS)).t()
            scores[0, history] = -math.inf
            lists[name] = scores[0], scores[0].topk(100).indices.tolist()
            best = lists[name][1][:10]
            gains[name].append(1 / math.log2(best.index(cases.targets[case]) + 2) if cases.targets[case] in best else 0.0)
        best = lists["fp32"][1]
        squares += ((lists["int8"][0] - lists["fp32"][0])[best] ** 2).tolist()
        spreads.append(float(lists["fp32"][0][best].std(correction=0)))
        for k, shares in overlaps.items():
            shares.append(len(set(best[:k]) & set(lists["int8"][1][:k])) / k)
    exact_ndcg, ndcg = np.mean(gains["fp32"]), np.mean(gains["int8"])
    expected = {
        "users": len(chosen),
        "score_error": math.sqrt(np.mean(squares)),
        "score_spread": np.mean(spreads),
        "overlap@10": np.mean(overlaps[10]),
        "overlap@100": np.mean(overlaps[100]),
        "ndcg@10": ndcg,
        "ndcg@10_fp32": exact_ndcg,
        "ndcg@10_change": (ndcg - exact_ndcg) / exact_ndcg,
    }
    assert measured == pytest.approx(expected, rel=1e-3)
    assert 0.5 < measured["overlap@100"] < 1  # rounding is seen, and is no other model


def test_a_precision_that_loses_too_much_is_refused(tmp_path):
    table = make_table("dot")
    table[:, 0] = 100  # one column takes nearly all of a row's 255 steps, and tells no item from another
    with pytest.raises(
        InputError, match=r"precision=int8 loses \d.*% of NDCG@10 on 60 validation users .* max_ndcg_loss=0.50%"
    ):
        export(tmp_path / "artifact", "dot", "int8", table)
    assert list(tmp_path.iterdir()) == []
    manifest = export(tmp_path / "artifact", "dot", "int8", table, max_ndcg_loss=1.0)
    assert manifest["validation"]["ndcg@10_change"] < -0.005
    export(tmp_path / "half", "dot", "fp16", table)


def test_what_cannot_be_measured_or_held_is_refused(tmp_path):
    table = make_table("dot")
    table[17, 3] = 70_000
    with pytest.raises(InputError, match=r"item 17 has a component of 7e\+04, more than fp16 holds"):
        export(tmp_path / "artifact", "dot", "fp16", table)
    nothing = EvalCases(np.zeros(0, np.int64), np.zeros(1, np.int64), np.zeros(0, np.int64), np.zeros(0, np.int64))
    about = {"max_seq_len": 5, "encoder_config": {}, "provenance": {}}
    arguments = (make_encoder(), "dot", make_table("dot"), VOCABULARY, tmp_path / "artifact")
    with pytest.raises(InputError, match="no user with three events"):
        export_artifact(*arguments, precision="fp16", validation=Validation(nothing), **about)
    with pytest.raises(InputError, match="precision is 'int8'; it must be fp32 where there is no validation set"):
        export_artifact(*arguments, precision="int8", **about)
    with pytest.raises(InputError, match="precision is 'int4'; it must be one of fp32, fp16, int8"):
        export_artifact(*arguments, precision="int4", **about)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("precision", "kind"), [("int8", "bias"), ("fp32", "cosine")])
def test_another_catalog_for_the_same_encoder(precision, kind, tmp_path):
    """It gives what an export of the encoder with that catalog gives; the model's file is the old one."""
    export(tmp_path / "old", kind, precision, max_ndcg_loss=1.0)
    table = make_table(kind)[:300].flip(0)
    vocabulary = Vocabulary(pa.array([f"new-{i}" for i in range(300)]), np.ones(300, dtype=np.int64))
    source = {"run": "another"}
    manifest = replace_items(tmp_path / "old", table, vocabulary, tmp_path / "new", source)
    assert manifest["provenance"] == {"items": source}
    assert (tmp_path / "old/model.pt").read_bytes() == (tmp_path / "new/model.pt").read_bytes()
    artifact = Artifact.load(tmp_path / "new")
    assert artifact.vocabulary.item_ids == vocabulary.item_ids
    assert artifact.fingerprint != Artifact.load(tmp_path / "old").fingerprint
    exact = ScoringModule(make_encoder(), read_items(tmp_path / "new"), similarity_of(kind), MAX_SEQ_LEN)
    item_ids, lengths = torch.arange(30) * 9, torch.tensor([10, 0, 20])
    torch.testing.assert_close(artifact.module.top_k(item_ids, lengths, 5)[1], exact.top_k(item_ids, lengths, 5)[1])
    for wrong, names in ((table[:, 1:], vocabulary), (table[1:], vocabulary)):
        with pytest.raises(InputError, match="these must be the same"):
            replace_items(tmp_path / "old", wrong, names, tmp_path / "other", source)
    assert not (tmp_path / "other").exists()


def test_the_program_measures_on_the_runs_dataset(run_dir, dataset_dir, tmp_path):
    artifact = tmp_path / "artifact"
    export_run(ExportConfig(str(run_dir), str(artifact), precision="int8"))
    manifest = json.loads((artifact / "manifest.json").read_text())
    cases = SequenceDataset.open(dataset_dir).eval_cases("valid")
    assert manifest["validation"]["users"] == cases.targets.size
    assert manifest["validation"]["ndcg@10_change"] >= -0.005
    fingerprint = sha256_of(dataset_dir / "manifest.json")
    assert manifest["provenance"]["dataset"] == {"name": dataset_dir.name, "manifest_sha256": fingerprint}
    gone = ExportConfig(str(run_dir), str(tmp_path / "other"), precision="fp16", data=ExportDataConfig(str(tmp_path)))
    with pytest.raises(InputError, match=r"precision=fp16 is measured on the run's dataset, .*: give data\.path="):
        export_run(gone)
    with pytest.raises(InputError, match="max_ndcg_loss is 2; it must be from 0 to 1"):
        ExportConfig(str(run_dir), str(tmp_path / "other"), max_ndcg_loss=2)
