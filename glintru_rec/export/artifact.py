"""An artifact: a trained model as a folder that needs torch alone.

::

    model.pt                   TorchScript of `ScoringModule`, or of `RecurrentScoringModule` where the encoder is recurrent,
                               for torch.jit.load in Python and torch::jit::load in C++
    vocabulary/items.parquet   item_id, index, count: the module's item ids are the indices
    manifest.json              signature, measured parity, where it came from, sha256 of the other two

The module's buffer ``item_vectors`` holds a row for each item. With ``similarity`` "dot" an item's score is ``query · row``;
both have the manifest's ``embedding_dim`` numbers. With ``item_bias`` that is one more than the encoder's width: a row ends
with the item's bias, a query with 1. With "cosine" the query has length 1, and the score is ``query · row / |row|``.
"""

import copy
import importlib.metadata
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glintru_rec.data.dataset import VOCABULARY_FILE
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders.base import Encoder
from glintru_rec.errors import InputError
from glintru_rec.export.parity import TOLERANCE, measure_parity
from glintru_rec.export.recurrent_module import RecurrentScoringModule
from glintru_rec.export.scoring_module import ScoringModule
from glintru_rec.files import check_free, folder_aside, sha256_of
from glintru_rec.model import check_similarity

ARTIFACT_VERSION = 1
MANIFEST_FILE = "manifest.json"
MODEL_FILE = "model.pt"


@dataclass(frozen=True)
class Artifact:
    """An exported model, verified and loaded.

    Attributes:
        path: its folder.
        module: has the methods that ``manifest["signature"]`` names.
        vocabulary: between original item ids and the module's.
        manifest: as `export_artifact` wrote it.
    """

    path: Path
    module: torch.jit.ScriptModule
    vocabulary: Vocabulary
    manifest: dict[str, Any]

    @property
    def fingerprint(self) -> str:
        """What must be equal for a user's state to be of this model: its file and its vocabulary."""
        return f"{self.manifest['files'][MODEL_FILE]}-{self.vocabulary.sha256}"

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "Artifact":
        """Read what `export_artifact` wrote, after a check that it is still what was written.

        Args:
            path: the artifact's folder.
            device: where the module will run.

        Raises:
            InputError: the folder is no artifact or one of another version, or a file is missing or was changed.
        """
        path = Path(path)
        manifest = _read_manifest(path)
        for name, sha256 in manifest["files"].items():
            file = path / name
            if not file.is_file():
                raise InputError(f"artifact {str(path)!r} lacks {name}; export it again")
            if sha256_of(file) != sha256:
                raise InputError(f"{name} of artifact {str(path)!r} is not the file that was exported; export it again")
        vocabulary = Vocabulary.load(path / VOCABULARY_FILE)
        if vocabulary.sha256 != manifest["vocabulary_sha256"]:
            raise InputError(f"{VOCABULARY_FILE} of artifact {str(path)!r} is not the vocabulary of its model; export it again")
        return cls(path, torch.jit.load(str(path / MODEL_FILE), map_location=device), vocabulary, manifest)


def export_artifact(
    encoder: Encoder,
    similarity: str,
    item_vectors: Tensor,
    vocabulary: Vocabulary,
    output: str | Path,
    *,
    max_seq_len: int,
    encoder_config: dict[str, Any],
    provenance: dict[str, Any],
) -> dict[str, Any]:
    """Write a model as an artifact that gives the scores the model gives. It appears at ``output`` whole or not at all.

    Args:
        encoder: trained; left as it is.
        similarity: ``dot`` or ``cosine``.
        item_vectors: the whole item table, ``[V, D]`` for an encoder of width D, or ``[V, D + 1]`` with each item's bias
            last.
        vocabulary: of the V items.
        output: folder to make; it must not exist, or be empty.
        max_seq_len: the encoder will see each history's last ``max_seq_len`` items.
        encoder_config: how the encoder was built, for the manifest.
        provenance: run directory, step, dataset fingerprint and whatever else tells where the model comes from.

    Returns:
        The manifest.

    Raises:
        InputError: the output folder is taken or cannot be written, or table and vocabulary differ in size, or table
            and encoder in width, or there are biases with ``cosine``.
        RuntimeError: the written module gives other scores than the model.
    """
    output = Path(output)
    check_free("output", output)
    num_items, vector_dim = item_vectors.shape
    if num_items != vocabulary.num_items:
        raise InputError(
            f"the item table has {num_items} rows, the vocabulary {vocabulary.num_items} items; "
            f"export a run with the dataset it was trained on"
        )
    if vector_dim not in (encoder.width, encoder.width + 1):
        raise InputError(f"the item table is {vector_dim} wide, the encoder {encoder.width}; only a bias may be added to that")
    check_similarity(similarity, item_bias=vector_dim > encoder.width)
    encoder = copy.deepcopy(encoder).to("cpu", torch.float32).eval().requires_grad_(False)
    item_vectors = item_vectors.detach().to("cpu", torch.float32).contiguous()
    with folder_aside(output) as folder:
        (folder / VOCABULARY_FILE).parent.mkdir()
        vocabulary.save(folder / VOCABULARY_FILE)
        module_class = RecurrentScoringModule if encoder.recurrent else ScoringModule
        module = module_class(encoder, item_vectors, similarity, max_seq_len).eval()
        torch.jit.save(torch.jit.script(module), str(folder / MODEL_FILE))
        parity = measure_parity(torch.jit.load(str(folder / MODEL_FILE)), encoder, similarity, item_vectors, max_seq_len)
        for method, figures in parity.items():
            if not figures["relative"] <= TOLERANCE:  # true for NaN too
                raise RuntimeError(
                    f"the exported {method} differs from the model by {figures['max_abs_difference']:.3g} at a scale of "
                    f"{figures['scale']:.3g}; at most {TOLERANCE} of the scale is allowed, so nothing was written"
                )
        manifest = {
            "artifact_version": ARTIFACT_VERSION,
            "format": "torchscript",
            "precision": "fp32",
            "signature": _signature(vector_dim, encoder.state_size),
            "num_items": num_items,
            "embedding_dim": vector_dim,
            "max_seq_len": max_seq_len,
            "similarity": similarity,
            "item_bias": vector_dim > encoder.width,
            "encoder": encoder_config,
            "vocabulary_sha256": vocabulary.sha256,
            "provenance": provenance,
            "versions": {"torch": torch.__version__, "glintru_rec": importlib.metadata.version("glintru_rec")},
            "parity": {"tolerance": TOLERANCE, **parity},
            "files": {name: sha256_of(folder / name) for name in (MODEL_FILE, VOCABULARY_FILE)},
        }
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _signature(vector_dim: int, state_size: int) -> dict[str, Any]:
    """Describe every method: T items of B histories, C candidates; all of these may be 0. No state, no steps."""

    def tensor(name: str, dtype: str, *shape: str | int) -> dict[str, Any]:
        return {"name": name, "dtype": dtype, "shape": list(shape)}

    histories = [tensor("item_ids", "int64", "T"), tensor("lengths", "int64", "B")]
    candidates = [tensor("candidates", "int64", "C"), tensor("candidate_lengths", "int64", "B")]
    options = [{"name": "k", "dtype": "int"}, {"name": "exclude_seen", "dtype": "bool", "default": True}]
    query = tensor("query", "float32", "B", vector_dim)
    seen = [tensor("seen_ids", "int64", "T"), tensor("seen_lengths", "int64", "B")]
    best = [tensor("ids", "int64", "B", "k"), tensor("scores", "float32", "B", "k")]
    signature: dict[str, Any] = {
        "encode": {"inputs": histories, "outputs": [query]},
        "score": {"inputs": histories + candidates, "outputs": [tensor("scores", "float32", "C")]},
        "top_k": {"inputs": histories + options, "outputs": best},
        "top_k_of": {"inputs": [query, *seen, options[0]], "outputs": best},
    }
    if state_size:
        state = tensor("state", "float32", "B", state_size)
        signature |= {
            "init_state": {"inputs": [{"name": "batch_size", "dtype": "int"}], "outputs": [state]},
            "step": {"inputs": [tensor("item_ids", "int64", "B"), state], "outputs": [query, state]},
            "advance": {"inputs": [*histories, state], "outputs": [query, state]},
        }
    return signature


def _read_manifest(path: Path) -> dict[str, Any]:
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
    if not {MODEL_FILE, VOCABULARY_FILE} <= set(manifest.get("files", ())) or "vocabulary_sha256" not in manifest:
        raise InputError(f"{MANIFEST_FILE} of artifact {str(path)!r} does not name its files; export it again")
    return manifest
