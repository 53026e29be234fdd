"""What is planted as a checkpoint, an artifact or a dataset is refused, and nothing of it runs."""

import dataclasses
import io
import json
import os
import pickle
import shutil
import zipfile

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, BytesStorageMetadata, Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, ReadItem

from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.prepare import PrepareConfig, prepare
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders import LRURec
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, export_artifact
from glintru_rec.files import sha256_of
from glintru_rec.training.build import load_unsharded
from glintru_rec.training.checkpoint import list_checkpoints
from glintru_rec.training.checkpoint_reader import InertPlanner


class Malice:
    """Makes a folder when it is unpickled."""

    def __init__(self, marker):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path):
    """What malice makes; checked to work, and at the end to have never run."""
    path = tmp_path / "ran"
    pickle.loads(pickle.dumps(Malice(path)))
    path.rmdir()
    yield path
    assert not path.exists()


def pickles_of(marker):
    """The planted content in every shape that torch would read."""
    zipped, legacy = io.BytesIO(), io.BytesIO()
    torch.save(Malice(marker), zipped)
    torch.save(Malice(marker), legacy, _use_new_zipfile_serialization=False)
    return {"pickle": pickle.dumps(Malice(marker), 2), "zip": zipped.getvalue(), "legacy": legacy.getvalue()}


def refused(read, *arguments):
    with pytest.raises(InputError) as caught:
        read(*arguments)
    assert len(str(caught.value)) > 20
    return str(caught.value)


def test_checkpoint(run_dir, tmp_path, marker):
    run = shutil.copytree(run_dir, tmp_path / "run")
    checkpoint = list_checkpoints(run)[-1]
    for path in list_checkpoints(run)[:-1]:
        shutil.rmtree(path)
    progress = json.loads((checkpoint / "progress.json").read_text())
    (checkpoint / "progress.json").write_text(json.dumps(progress | {"best_step": -1}))
    load_unsharded(run)  # as it is, it can be read
    tensors = sorted(checkpoint.glob("*.distcp"))[0]
    for name in (checkpoint / ".metadata", tensors, checkpoint / "progress.json", run / "config.yaml"):
        whole = name.read_bytes()
        for content in pickles_of(marker).values():
            name.write_bytes(content)
            refused(load_unsharded, run)
        name.write_bytes(whole)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    metadata.planner_data = {"beside what is expected": Malice(marker)}
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    assert "metadata names posix.mkdir" in refused(load_unsharded, run)
    for content in pickles_of(marker).values():  # where every tensor is looked for
        metadata.planner_data = None
        places = metadata.storage_data.items()
        metadata.storage_data = {index: dataclasses.replace(at, offset=0, length=len(content)) for index, at in places}
        (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
        tensors.write_bytes(content)
        refused(load_unsharded, run)
    (run / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{marker}']\n")
    refused(load_unsharded, run)


class Attribute:
    """Pickled as ``getattr(owner, name)``."""

    def __init__(self, owner, name):
        self.owner, self.name = owner, name

    def __reduce__(self):
        return getattr, (self.owner, self.name)


def test_checkpoint_of_a_python_that_pickles_enums_by_name(run_dir, tmp_path, monkeypatch):
    run = shutil.copytree(run_dir, tmp_path / "run")
    for checkpoint in list_checkpoints(run):
        description = checkpoint / ".metadata"
        metadata = pickle.loads(description.read_bytes())
        with monkeypatch.context() as patch:  # as Python 3.11.2 has it
            patch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", lambda self, _: (getattr, (type(self), self.name)))
            description.write_bytes(pickle.dumps(metadata))
        assert b"getattr" in description.read_bytes()
    ours, theirs = load_unsharded(run).model.state_dict(), load_unsharded(run_dir).model.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    for owner, name in ((_MEM_FORMAT_ENCODING, "mro"), (Metadata, "__init__"), (torch.float32, "is_complex")):
        for checkpoint in list_checkpoints(run):
            metadata.planner_data = Attribute(owner, name)
            (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
        assert f"metadata takes '{name}'" in refused(load_unsharded, run)


def test_values_of_a_checkpoint_that_are_no_tensors(marker):
    index = MetadataIndex("step")
    item = ReadItem(LoadItemType.BYTE_IO, index, torch.Size([0]), index, torch.Size([0]), torch.Size([0]))
    target = {"step": 0}
    planner = InertPlanner()
    planner.set_up_planner(target, Metadata({"step": BytesStorageMetadata()}), True)
    harmless = io.BytesIO()
    torch.save(12, harmless)
    harmless.seek(0)
    planner.load_bytes(item, harmless)
    assert target == {"step": 12}
    for content in pickles_of(marker).values():
        with pytest.raises((pickle.UnpicklingError, RuntimeError)):
            planner.load_bytes(item, io.BytesIO(content))


class SavesAsItLoads(nn.Module):
    """TorchScript that writes a file when it is loaded."""

    def __init__(self, marker: str):
        super().__init__()
        self.marker = marker

    @torch.jit.export
    def __getstate__(self) -> tuple[str, bool]:
        return self.marker, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[str, bool]) -> None:
        self.marker = state[0]
        self.training = state[1]
        torch.save(torch.zeros(1), self.marker)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture
def exported(tmp_path):
    vocabulary = Vocabulary(pa.array(np.arange(20)), np.ones(20, dtype=np.int64))
    about = {"max_seq_len": 10, "encoder_config": {}, "provenance": {}}
    export_artifact(LRURec(4), "dot", torch.randn(20, 4), vocabulary, tmp_path / "artifact", **about)
    return tmp_path / "artifact"


def test_artifact(exported, tmp_path, marker):
    planted = pickles_of(marker)
    scripted = io.BytesIO()
    torch.jit.save(torch.jit.script(SavesAsItLoads(str(marker))), scripted)
    with zipfile.ZipFile(exported / "model.pt") as whole, zipfile.ZipFile(tmp_path / "mixed.pt", "w") as mixed:
        for name in whole.namelist():  # a TorchScript file whose object is another
            mixed.writestr(name, planted["pickle"] if name.endswith("data.pkl") else whole.read(name))
    planted |= {"mixed": (tmp_path / "mixed.pt").read_bytes(), "script": scripted.getvalue()}
    for name in ("model.pt", "item_vectors.npy", "vocabulary/items.parquet", "manifest.json"):
        for kind, content in planted.items():
            artifact = shutil.copytree(exported, tmp_path / f"{kind}-{name.replace('/', '-')}")
            (artifact / name).write_bytes(content)
            if name != "manifest.json":  # as one would who wants it read
                manifest = json.loads((artifact / "manifest.json").read_text())
                manifest["files"][name] = sha256_of(artifact / name)
                manifest["bytes"][name] = len(content)
                (artifact / "manifest.json").write_text(json.dumps(manifest))
            assert str(artifact) in refused(Artifact.load, artifact)


def test_dataset_and_log(dataset_dir, tmp_path, marker):
    for name in ("manifest.json", "vocabulary/items.parquet", "sequences/part-00000.parquet"):
        for kind, content in pickles_of(marker).items():
            dataset = shutil.copytree(dataset_dir, tmp_path / f"{kind}-{name.replace('/', '-')}")
            (dataset / name).write_bytes(content)
            refused(SequenceDataset.open, dataset)
            (tmp_path / f"{kind}.parquet").write_bytes(content)
            refused(prepare, PrepareConfig(str(tmp_path / f"{kind}.parquet"), str(tmp_path / "out")))
