"""An artifact: a trained model as a folder that needs torch alone.

::

    model.pt                   TorchScript of `ScoringModule`, or of `RecurrentScoringModule` where the encoder is recurrent,
                               for torch.jit.load in Python and torch::jit::load in C++
    item_vectors.npy, …        the item table (see `item_files`), which the module's `open_items` maps into memory
    vocabulary/items.parquet   item_id, index, count: the module's item ids are the indices
    vocabulary/side_features.json   where the model reads side features: their values (see `SideVocabulary`)
    manifest.json              what it is, measured, where it came from, and the size and sha256 of every other file

Model and items are apart: opening takes no longer for a larger catalog, processes on a machine share the table's pages, and
another catalog can take the place of an artifact's own (see `replace_items`).

An artifact is a program: its methods run what whoever wrote it put there. Opening one runs nothing of it. Checksums tell
damage and mistakes, not malice: who can change a file can change the manifest.
"""

import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from glintru_rec.config import wrong_keys
from glintru_rec.data.dataset_files import VOCABULARY_FILE
from glintru_rec.data.side_features import SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export.item_files import BIASES_FILE, NORMS_FILE, OFFSETS_FILE, SCALES_FILE, VECTORS_FILE, item_files
from glintru_rec.export.mapped_array import map_read_only
from glintru_rec.files import sha256_of

ARTIFACT_VERSION = 3
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.pt"
# Keys of a manifest that reading relies on.
_KINDS = {"format": str, "precision": str, "signature": dict, "num_items": int, "vocabulary_sha256": str}
_KINDS |= {"files": dict, "bytes": dict, "versions": dict, "encoder": dict}


@dataclass(frozen=True)
class Artifact:
    """An exported model, verified and opened.

    Attributes:
        path: its folder.
        module: has the methods that ``manifest["signature"]`` names, and its items.
        vocabulary: between original item ids and the module's.
        manifest: as `export_artifact` wrote it.
        side: the side features that the module reads, in the order of the columns of its ``side_ids``.
    """

    path: Path
    module: torch.jit.ScriptModule
    vocabulary: Vocabulary
    manifest: dict[str, Any]
    side: SideVocabulary

    @property
    def fingerprint(self) -> str:
        """What must be equal for a user's state to be of this model: encoder, item table and vocabulary."""
        files = sorted((name, sha256) for name, sha256 in self.manifest["files"].items() if name != VOCABULARY_FILE)
        return hashlib.sha256(json.dumps([files, self.vocabulary.sha256]).encode()).hexdigest()

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu", verify_items: bool = True) -> "Artifact":
        """Open what `export_artifact` wrote, after a check that it is still what was written.

        Args:
            path: the artifact's folder.
            device: where the module will run.
            verify_items: read the whole item table once, for its checksum. Without that its size alone is checked, and a
                table of any size opens at once.

        Raises:
            InputError: the folder is no artifact or one of another version, or a file is missing or was changed.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest.get("task", "retrieval") != "retrieval":
            raise InputError(f"artifact {str(path)!r} is of a {manifest['task']} model; score with it in mode=rank")
        if manifest["format"] != "torchscript":
            raise InputError(f"artifact {str(path)!r} has format {manifest['format']!r}; this program runs torchscript")
        verify_files(path, manifest, verify_items)
        vocabulary = Vocabulary.load(path / VOCABULARY_FILE)
        if vocabulary.sha256 != manifest["vocabulary_sha256"] or vocabulary.num_items != manifest["num_items"]:
            raise InputError(f"{VOCABULARY_FILE} of artifact {str(path)!r} is not the vocabulary of its model; export it again")
        return cls(path, _open_module(path, manifest, device), vocabulary, manifest, SideVocabulary.load(path))


def verify_files(path: Path, manifest: dict[str, Any], items_too: bool = True) -> None:
    """Raise an `InputError` unless every file of an artifact is there, as long as it was, and with its checksum.

    Args:
        path: the artifact's folder.
        manifest: names the files.
        items_too: read the item table for its checksum; otherwise its size is looked at.
    """
    for name, sha256 in manifest["files"].items():
        file = path / name
        if not file.is_file():
            raise InputError(f"artifact {str(path)!r} lacks {name}; export it again")
        found, wanted = file.stat().st_size, manifest["bytes"].get(name)
        if found != wanted:
            raise InputError(
                f"{name} of artifact {str(path)!r} is not the file that was exported: it has {found} bytes, not {wanted}; "
                f"export it again"
            )
        if (items_too or not name.endswith(".npy")) and sha256_of(file) != sha256:
            raise InputError(f"{name} of artifact {str(path)!r} is not the file that was exported; export it again")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read an artifact's manifest.

    Raises:
        InputError: there is none, or it is one of another version, or it lacks something.
    """
    try:
        manifest = json.loads((path / MANIFEST_FILE).read_text())
    except FileNotFoundError as error:
        raise InputError(f"artifact {str(path)!r} has no {MANIFEST_FILE}; give a folder that was exported") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{MANIFEST_FILE} of artifact {str(path)!r} cannot be read: {error}; export it again") from error
    version = manifest.get("artifact_version") if isinstance(manifest, dict) else None
    if version != ARTIFACT_VERSION:
        raise InputError(
            f"artifact {str(path)!r} has artifact_version {version!r}, this program reads {ARTIFACT_VERSION}; export it again"
        )
    if wrong := wrong_keys(manifest, _KINDS):
        named = f"lacks {', '.join(wrong)}, or has values of another kind there"
        raise InputError(f"{MANIFEST_FILE} of artifact {str(path)!r} {named}; export it again")
    least = {VECTORS_FILE, VOCABULARY_FILE} if manifest.get("task", "retrieval") == "retrieval" else {MODEL_FILE}
    if not least <= set(manifest["files"]):
        raise InputError(f"{MANIFEST_FILE} of artifact {str(path)!r} does not name its files; export it again")
    return manifest


def load_script(path: Path, device: str = "cpu") -> torch.jit.ScriptModule:
    """Load a TorchScript file, running nothing of it.

    `torch.jit.load` unpickles tensors, plain values and the classes whose code lies in the file, and nothing else. The one
    thing of a file that it runs is a class's ``__setstate__``, which can write files; ours have none.

    Raises:
        InputError: the file is no TorchScript, or would run something.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            code = [name for name in archive.namelist() if "/code/" in name]
            if any(b"__setstate__" in archive.read(name) for name in code):
                raise InputError(f"{str(path)!r} would run code of its own when it is loaded (__setstate__); do not trust it")
        return torch.jit.load(str(path), map_location=device)
    except (OSError, RuntimeError, torch.jit.Error, zipfile.BadZipFile) as error:
        raise InputError(f"{str(path)!r} is no TorchScript that torch {torch.__version__} loads: {_last(error)}") from error


def _open_module(path: Path, manifest: dict[str, Any], device: str) -> torch.jit.ScriptModule:
    module = load_script(path / MODEL_FILE, device)
    missing = [method for method in manifest["signature"] if not hasattr(module, method)]
    if missing:
        raise InputError(f"{MODEL_FILE} of artifact {str(path)!r} lacks {', '.join(missing)}; export it again")
    try:
        _open_items(module, path, device)
    except (OSError, ValueError) as error:
        raise InputError(f"the item table of artifact {str(path)!r} cannot be opened: {_last(error)}") from error
    if module.item_vectors.size(0) != manifest["num_items"]:
        raise InputError(
            f"{VECTORS_FILE} of artifact {str(path)!r} has {module.item_vectors.size(0)} rows, not "
            f"{manifest['num_items']}; export it again"
        )
    return module


def _open_items(module: torch.jit.ScriptModule, path: Path, device: str) -> None:
    """Do what the module's ``open_items`` does, with mappings that may be larger than memory."""
    names = item_files("int8" if module.is_int8 else "fp32", module.cosine, module.item_bias)
    tables = {name: map_read_only(path / name).to(device) for name in names}
    module.item_vectors = tables[VECTORS_FILE]
    if OFFSETS_FILE in tables:
        module.item_offsets = tables[OFFSETS_FILE]
    if SCALES_FILE in tables:
        module.item_scales = module.score_scales = tables[SCALES_FILE]
    if BIASES_FILE in tables:
        module.item_biases = tables[BIASES_FILE]
    if NORMS_FILE in tables:
        module.score_scales = tables[NORMS_FILE]


def _last(error: BaseException) -> str:
    """Give the last line of a message, which tells; TorchScript's own have a traceback before it."""
    return (str(error).strip().splitlines() or [""])[-1]
