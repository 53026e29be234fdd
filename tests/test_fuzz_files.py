"""A thousand damaged artifacts, datasets and configs: each is refused with one message, or means what it meant before."""

import copy
import json
import random
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from glintru_rec import GlintRU
from glintru_rec.config import compose
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, export_artifact
from glintru_rec.scoring import ScoreConfig
from glintru_rec.training.config import TrainConfig

NUM_ITEMS, WIDTH = 40, 8
ODD_VALUES = [None, True, -1, 0, 7, 10**30, 1.5, float("nan"), "", "x", "../../etc", [], [1], {}, {"a": 1}]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("fuzz") / "artifact"
    vocabulary = Vocabulary(pa.array(np.arange(NUM_ITEMS)), np.ones(NUM_ITEMS, dtype=np.int64))
    encoder = GlintRU(WIDTH, num_heads=2).eval().requires_grad_(False)
    rows = torch.randn(NUM_ITEMS, WIDTH)
    export_artifact(
        encoder, "dot", rows, vocabulary, path, max_seq_len=20, encoder_config={}, provenance={}, format="torchscript"
    )
    return path


def answer(artifact: Artifact) -> list:
    ids, scores = artifact.module.top_k(torch.tensor([1, 2, 3]), torch.tensor([2, 1]), 5, True)
    return [artifact.vocabulary.decode(ids.flatten().numpy()).to_pylist(), scores.tolist()]


def change_json(value, rng: random.Random):
    """Change one thing of a JSON value, at any depth: a key goes, a value becomes another, or a key is new."""
    value = copy.deepcopy(value)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = rng.choice(keys)
        inner = place[key]
        if isinstance(inner, dict | list) and inner and rng.random() < 0.7:
            place = inner
            continue
        how = rng.randrange(3)
        if how == 0:
            del place[key]
        elif how == 1 or isinstance(place, list):
            place[key] = rng.choice(ODD_VALUES)
        else:
            place[f"{key}_"] = place.pop(key)
        return value


def change_bytes(content: bytes, rng: random.Random) -> bytes:
    """Cut, grow or overwrite a file somewhere."""
    place = rng.randrange(len(content) + 1)
    how = rng.randrange(4)
    if how == 0:
        return content[:place]
    if how == 1:
        return content[:place] + rng.randbytes(rng.randrange(1, 9)) + content[place:]
    if how == 2:
        return content[:place] + bytes(16) + content[place + 16 :]
    return content[:place] + rng.randbytes(1) + content[place + 1 :]


def damaged(folder: Path, path: Path, name: str, content: bytes) -> Path:
    """Make a folder like another but for one file; the others are links."""
    shutil.rmtree(path, ignore_errors=True)
    for file in (each for each in folder.rglob("*") if each.is_file()):
        target = path / file.relative_to(folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(file)
    (path / name).unlink()
    (path / name).write_bytes(content)
    return path


def load_or_refuse(load):
    """Give what was loaded, or None where it was refused in a message of one or a few lines."""
    try:
        return load()
    except InputError as error:
        message = str(error)
    assert 10 < len(message) < 3000
    assert "Traceback" not in message
    return None


def test_manifests_of_artifacts(artifact, tmp_path):
    rng, manifest, sound = (
        random.Random(0),
        json.loads((artifact / "manifest.json").read_text()),
        answer(Artifact.load(artifact)),
    )
    refused = 0
    for _ in range(150):
        text = json.dumps(change_json(manifest, rng))
        if rng.random() < 0.1:
            text = change_bytes(text.encode(), rng).decode(errors="replace")
        path = damaged(artifact, tmp_path / "artifact", "manifest.json", text.encode())
        loaded = load_or_refuse(lambda path=path: Artifact.load(path))
        refused += loaded is None
        assert loaded is None or answer(loaded) == sound
    assert refused > 20


def test_files_of_artifacts(artifact, tmp_path):
    rng = random.Random(1)
    names = [str(file.relative_to(artifact)) for file in artifact.rglob("*") if file.is_file() and file.name != "manifest.json"]
    assert len(names) >= 3
    for _ in range(500):
        name = rng.choice(names)
        content = (artifact / name).read_bytes()
        changed = change_bytes(content, rng)
        path = damaged(artifact, tmp_path / "artifact", name, changed)
        loaded = load_or_refuse(lambda path=path: Artifact.load(path))
        assert (loaded is None) == (changed != content)


def test_datasets(dataset_dir, tmp_path):
    rng, sound = random.Random(2), SequenceDataset.open(dataset_dir)
    files = [file for file in dataset_dir.rglob("*") if file.is_file() and file.name != "config.yaml"]
    read = [file for file in files if file.parent != dataset_dir or file.name == "manifest.json"]
    refused = 0
    for _ in range(400):
        file = rng.choice(read)
        content = file.read_bytes()
        if file.suffix == ".json":
            changed = json.dumps(change_json(json.loads(content), rng)).encode()
        else:
            changed = change_bytes(content, rng)
        path = damaged(dataset_dir, tmp_path / "dataset", str(file.relative_to(dataset_dir)), changed)
        loaded = load_or_refuse(lambda path=path: SequenceDataset.open(path))
        refused += loaded is None
        if loaded is not None:  # a flipped byte of a value is a value; what was read is a dataset still
            assert loaded.offsets[-1] == len(loaded.items) == len(sound.items)
            assert 0 <= loaded.items.min() <= loaded.items.max() < loaded.num_items == sound.num_items
    assert refused > 100


@pytest.mark.parametrize(("program", "schema"), [("train", TrainConfig), ("score", ScoreConfig)])
def test_configs(program, schema):
    rng = random.Random(3)
    required = {"train": ["data.path=d", "output=o"], "score": ["artifact=a", "input=i", "output=o"]}[program]
    keys = {
        "train": [
            "model.embedding_dim",
            "trainer.max_epochs",
            "loss.name",
            "loss.num_negatives",
            "table.dtype",
            "optimizer.schedule",
        ],
        "score": ["mode", "top_k", "batch_size", "index.kind", "keep_columns", "empty_history"],
    }[program]
    values = [
        "-1",
        "0",
        "1e400",
        "nan",
        "null",
        "''",
        "x",
        "[1,2]",
        "{a:1}",
        "true",
        "1.5",
        "${oops}",
        "'a b'",
        "10",
        "[",
        "a=b=c",
    ]
    refused = 0
    for _ in range(50):
        key = rng.choice([*keys, "no.such.key", rng.choice(keys) + "x", rng.choice(keys).upper()])
        override = f"{rng.choice(['', '', '+', '~'])}{key}={rng.choice(values)}"
        loaded = load_or_refuse(lambda override=override: compose(program, schema, [*required, override]))
        refused += loaded is None
    assert refused > 25
