"""The command that gives an artifact another catalog: the encoder's file stays, scores are those of the new vectors."""

import re
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from glintru_rec import GlintRU
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.export import Artifact, export_artifact
from tests.conftest import REPOSITORY

sys.path.append(str(REPOSITORY / "tools"))
from replace_items import main

WIDTH = 8


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("artifact") / "old"
    options = {"max_seq_len": 50, "encoder_config": {}, "provenance": {"run": "a-run"}}
    names = Vocabulary(pa.array(np.arange(30)), np.ones(30, dtype=np.int64))
    export_artifact(GlintRU(WIDTH), "dot", torch.randn(30, WIDTH), names, folder, **options)
    return folder


def write_catalog(path, ids, vectors, **columns):
    pq.write_table(pa.table({"item_id": ids, "embedding": vectors, **columns}), path)
    return path


@pytest.mark.parametrize("kind", [pa.list_(pa.float32(), WIDTH), pa.large_list(pa.float64())])
def test_new_items_of_the_same_encoder(artifact, tmp_path, kind):
    rows = np.random.default_rng(0).standard_normal((5, WIDTH)).astype(np.float32)
    ids = pa.array(["e", "c", "a", "d", "b"])
    path = write_catalog(tmp_path / "items.parquet", ids, pa.array(rows.tolist(), kind), count=[5, 4, 3, 2, 1])
    assert main([f"artifact={artifact}", f"items={path}", f"output={tmp_path / 'new'}"]) == 0
    old, new = Artifact.load(artifact), Artifact.load(tmp_path / "new")
    assert new.manifest["files"]["model.pt"] == old.manifest["files"]["model.pt"]
    assert new.manifest["provenance"]["items"]["file"] == "items.parquet"
    assert new.vocabulary.item_ids.to_pylist() == ids.to_pylist()
    assert new.vocabulary.counts.tolist() == [5, 4, 3, 2, 1]
    history, length = torch.from_numpy(new.vocabulary.encode(pa.array(["d", "e"]))), torch.tensor([2])
    query = new.module.encode(history, length)
    scores = new.module.score(history, length, torch.arange(5), torch.tensor([5]))
    np.testing.assert_allclose(scores, rows.astype(np.float64) @ query[0].double().numpy(), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("ids", "vectors", "message"),
    [
        (pa.array([1.0, 2.0]), [[0.0] * WIDTH] * 2, "'item_id' .* has type double; it must hold integers or strings"),
        ([1, 1], [[0.0] * WIDTH] * 2, "holds an item_id more than once"),
        ([1, None], [[0.0] * WIDTH] * 2, "'item_id' .* has 1 null"),
        ([1, 2], [[0.0] * WIDTH, None], "'embedding' .* has 1 null"),
        ([1, 2], [[0.0] * WIDTH, [0.0]], "differ in length"),
        ([1, 2], [[0.0] * WIDTH, [float("nan")] * WIDTH], "no finite number"),
        ([1, 2], [[0.0]] * 2, "new item table is 2 x 1"),
        ([], [], "in 0 rows"),
    ],
)
def test_what_is_no_catalog_is_refused(artifact, tmp_path, capsys, ids, vectors, message):
    columns = ids if isinstance(ids, pa.Array) else pa.array(ids, pa.int64()), pa.array(vectors, pa.list_(pa.float32()))
    path = write_catalog(tmp_path / "items.parquet", *columns)
    assert main([f"artifact={artifact}", f"items={path}", f"output={tmp_path / 'new'}"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert re.search(message, said)
    assert not (tmp_path / "new").exists()


def test_the_command_line_and_files_that_are_none(artifact, tmp_path, capsys):
    assert main([f"artifact={artifact}"]) == 2
    assert "python tools/replace_items.py artifact=DIR" in capsys.readouterr().err
    (tmp_path / "text.parquet").write_text("item_id")
    for path in (tmp_path / "none.parquet", tmp_path / "text.parquet"):
        assert main([f"artifact={artifact}", f"items={path}", f"output={tmp_path / 'new'}"]) == 2
        assert "is not readable parquet" in capsys.readouterr().err
