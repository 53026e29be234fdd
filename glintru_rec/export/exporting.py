"""Write an artifact (see `glintru_rec.export.artifact` for what it is)."""

import copy
import hashlib
import importlib.metadata
import json
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from glintru_rec.config import check, one_of
from glintru_rec.data.dataset import EvalCases
from glintru_rec.data.dataset_files import VOCABULARY_FILE
from glintru_rec.data.side_features import SIDE_FILE, SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders.base import Encoder
from glintru_rec.encoders.side_embeddings import SideEmbeddings
from glintru_rec.errors import InputError
from glintru_rec.export.artifact import ARTIFACT_VERSION, MANIFEST_FILE, MODEL_FILE, load_script
from glintru_rec.export.item_files import PRECISIONS, VECTORS_FILE, item_files, read_items, write_items
from glintru_rec.export.mapped_array import map_array
from glintru_rec.export.parity import TOLERANCE, measure_parity
from glintru_rec.export.precision import measure_precision
from glintru_rec.export.programs import check_exportable, program_file, write_programs
from glintru_rec.export.recurrent_module import RecurrentScoringModule
from glintru_rec.export.scoring_module import ScoringModule
from glintru_rec.export.signature import program_signature, signature
from glintru_rec.files import check_free, folder_aside, sha256_of
from glintru_rec.model import check_similarity, unit_parts

FORMATS = ("torchscript", "pt2", "aoti")


@dataclass(frozen=True)
class Validation:
    """What a precision below fp32 must stand.

    Attributes:
        cases: validation histories of the dataset and the items that followed.
        max_ndcg_loss: largest relative loss of NDCG@10 that is allowed.
        max_cases: at most so many of the cases are looked at.
    """

    cases: EvalCases
    max_ndcg_loss: float = 0.005
    max_cases: int = 10_000


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
    precision: str = "fp32",
    format: str = "torchscript",
    validation: Validation | None = None,
    side: SideEmbeddings | None = None,
    side_vocabulary: SideVocabulary | None = None,
) -> dict[str, Any]:
    """Write a model as an artifact that gives the scores the model gives. It appears at ``output`` whole or not at all.

    Args:
        encoder: trained; left as it is.
        similarity: ``dot`` or ``cosine``; the sum of an ensemble's cosines is written as a dot product of parts of length 1.
        item_vectors: the whole item table, ``[V, D]`` for an encoder of width D, or ``[V, D + 1]`` with each item's bias
            last.
        vocabulary: of the V items.
        output: folder to make; it must not exist, or be empty.
        max_seq_len: the encoder will see each history's last ``max_seq_len`` items.
        encoder_config: how the encoder was built, for the manifest.
        provenance: run directory, step, dataset fingerprint and whatever else tells where the model comes from.
        precision: of the item table: ``fp32``, ``fp16``, or ``int8`` with a scale and an offset for each row. The
            encoder stays in fp32.
        format: ``torchscript``; ``pt2``, of `torch.export`; or ``aoti``, compiled by AOTInductor (see `programs`).
        validation: what the precision is measured on; needed for others than fp32.
        side: of the model's side features; None for none.
        side_vocabulary: names and values of these.

    Returns:
        The manifest.

    Raises:
        InputError: the output folder is taken or cannot be written, or table and vocabulary differ in size, or table
            and encoder in width, or there are biases with ``cosine``, or the precision loses more than is allowed, or the
            format cannot hold the encoder or the precision.
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
    one_of("precision", precision, PRECISIONS)
    check("precision", precision, precision == "fp32" or validation is not None, "fp32 where there is no validation set")
    one_of("format", format, FORMATS)
    side_vocabulary = side_vocabulary or SideVocabulary()
    side = side if side is not None else SideEmbeddings([], encoder.width)
    assert side.sizes == side_vocabulary.sizes
    if format != "torchscript":
        check_exportable(format, encoder, precision, side_vocabulary.names)
    side = copy.deepcopy(side).to("cpu", torch.float32).eval().requires_grad_(False)
    encoder = copy.deepcopy(encoder).to("cpu", torch.float32).eval().requires_grad_(False)
    item_vectors = item_vectors.detach().to("cpu", torch.float32).contiguous()
    parts = {}
    if similarity == "cosine" and encoder.members > 1:  # it reads what is scored: their sum is a dot product of these
        item_vectors, similarity = unit_parts(item_vectors, encoder.members), "dot"
        parts = {"unit_parts": encoder.members}
    is_cosine, item_bias = similarity == "cosine", vector_dim > encoder.width
    with folder_aside(output) as folder:
        (folder / VOCABULARY_FILE).parent.mkdir()
        vocabulary.save(folder / VOCABULARY_FILE)
        side_vocabulary.save(folder)
        write_items(item_vectors, encoder.width, is_cosine, precision, folder)
        tables = item_files(precision, is_cosine, item_bias)
        written: Any
        if format == "torchscript":
            written = _write_script(encoder, similarity, item_vectors[:0], max_seq_len, precision, side, folder)
            methods, models = signature(vector_dim, encoder.state_size, len(side.sizes)), [MODEL_FILE]
        else:
            stored = map_array(str(folder / VECTORS_FILE))
            written = write_programs(format, encoder, similarity, stored, max_seq_len, folder)
            methods = program_signature(vector_dim, encoder.state_size, str(stored.dtype).removeprefix("torch."))
            models = [program_file(method) for method in methods]
        # The module must agree with the model whose table is the one written; what rounding the table costs is another matter.
        table = item_vectors if precision == "fp32" else read_items(folder)
        parity = measure_parity(written, encoder, similarity, table, max_seq_len, side)
        _check_parity(parity)
        measured: dict[str, float] = {}
        if validation is not None:
            exact = ScoringModule(encoder, item_vectors, similarity, max_seq_len, side=side)
            measured = measure_precision(written, exact, validation.cases, validation.max_cases)
            _check_loss(precision, measured, validation.max_ndcg_loss)
            measured["table_bytes"] = sum((folder / name).stat().st_size for name in tables)
            measured["table_bytes_fp32"] = item_vectors.numel() * item_vectors.element_size()
        names = [*models, *tables, VOCABULARY_FILE, *([SIDE_FILE] if side_vocabulary.names else [])]
        manifest = {
            "artifact_version": ARTIFACT_VERSION,
            "format": format,
            "precision": precision,
            "signature": methods,
            "num_items": num_items,
            "embedding_dim": vector_dim,
            "max_seq_len": max_seq_len,
            "similarity": similarity,
            **parts,
            "item_bias": item_bias,
            "encoder": encoder_config,
            "encoder_sha256": encoder_sha256(encoder),
            "vocabulary_sha256": vocabulary.sha256,
            **({"side_features": dict(zip(side_vocabulary.names, side_vocabulary.sizes))} if side_vocabulary.names else {}),
            "provenance": provenance,
            "versions": {
                "torch": torch.__version__,
                "glintru_rec": importlib.metadata.version("glintru_rec"),
                "python": platform.python_version(),
            },
            "parity": {"tolerance": TOLERANCE, **parity},
            "validation": measured,
            "files": {name: sha256_of(folder / name) for name in names},
            "bytes": {name: (folder / name).stat().st_size for name in names},
        }
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _write_script(
    encoder: Encoder,
    similarity: str,
    no_items: Tensor,
    max_seq_len: int,
    precision: str,
    side: SideEmbeddings,
    folder: Path,
) -> torch.jit.ScriptModule:
    module_class = RecurrentScoringModule if encoder.recurrent else ScoringModule
    module = module_class(encoder, no_items, similarity, max_seq_len, precision=precision, side=side).eval()
    torch.jit.save(torch.jit.script(module), str(folder / MODEL_FILE))
    written = load_script(folder / MODEL_FILE)
    written.open_items(str(folder))
    return written


def encoder_sha256(encoder: Encoder) -> str:
    """Fingerprint an encoder's weights: names, shapes and float32 values, in order."""
    digest = hashlib.sha256()
    for name, tensor in encoder.state_dict().items():
        digest.update(f"{name} {list(tensor.shape)}\n".encode())
        digest.update(tensor.float().cpu().contiguous().numpy().astype("<f4").tobytes())
    return digest.hexdigest()


def _check_parity(parity: dict[str, dict[str, float]]) -> None:
    for method, figures in parity.items():
        if not figures["relative"] <= TOLERANCE:  # true for NaN too
            raise RuntimeError(
                f"the exported {method} differs from the model by {figures['max_abs_difference']:.3g} at a scale of "
                f"{figures['scale']:.3g}; at most {TOLERANCE} of the scale is allowed, so nothing was written"
            )


def _check_loss(precision: str, measured: dict[str, float], max_ndcg_loss: float) -> None:
    loss = -measured["ndcg@10_change"]
    if loss > max_ndcg_loss:
        raise InputError(
            f"precision={precision} loses {loss:.2%} of NDCG@10 on {measured['users']:,} validation users "
            f"({measured['ndcg@10_fp32']:.4f} to {measured['ndcg@10']:.4f}), more than max_ndcg_loss={max_ndcg_loss:.2%}; "
            f"nothing was written: export fp32 or fp16, or allow more"
        )
