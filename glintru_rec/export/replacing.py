"""Give an artifact another catalog: new items, or new vectors, with the encoder's files as they are."""

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from glintru_rec.data.dataset_files import VOCABULARY_FILE
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export.artifact import MANIFEST_FILE, read_manifest, verify_files
from glintru_rec.export.item_files import item_files, write_items
from glintru_rec.files import check_free, folder_aside, sha256_of
from glintru_rec.model import unit_parts


def replace_items(
    artifact: str | Path, item_vectors: Tensor, vocabulary: Vocabulary, output: str | Path, source: dict[str, Any]
) -> dict[str, Any]:
    """Write an artifact of the same model, format and precision for another catalog, whole or not at all.

    What the precision costs is not measured again: the new manifest's ``validation`` is empty.

    Args:
        artifact: folder of an artifact; left as it is.
        item_vectors: ``[V, Q]``, Q being the artifact's ``embedding_dim``; with a bias, that last. With ``cosine`` too, of the
            lengths that they were trained with: the encoder reads them. An ensemble's parts are scaled to length 1.
        vocabulary: of the V items.
        output: folder to make; it must not exist, or be empty.
        source: where the vectors come from, for the manifest's ``provenance["items"]``.

    Returns:
        The new manifest.

    Raises:
        InputError: the artifact is damaged or of a ranking model, the vectors are not of its width or number, or the output is
            taken.
    """
    artifact, output = Path(artifact), Path(output)
    check_free("output", output)
    manifest = read_manifest(artifact)
    if manifest.get("task", "retrieval") != "retrieval":
        raise InputError(f"artifact {str(artifact)!r} is of a {manifest['task']} model, whose items are inside; train it again")
    verify_files(artifact, manifest, items_too=False)
    num_items, vector_dim = item_vectors.shape
    if vector_dim != manifest["embedding_dim"] or num_items != vocabulary.num_items:
        raise InputError(
            f"the new item table is {num_items} x {vector_dim}, the vocabulary has {vocabulary.num_items} items and the "
            f"artifact's vectors {manifest['embedding_dim']} numbers; these must be the same"
        )
    item_vectors = unit_parts(item_vectors, manifest["unit_parts"]) if "unit_parts" in manifest else item_vectors
    is_cosine, item_bias = manifest["similarity"] == "cosine", manifest["item_bias"]
    tables = item_files(manifest["precision"], is_cosine, item_bias)
    with folder_aside(output) as folder:
        (folder / VOCABULARY_FILE).parent.mkdir()
        vocabulary.save(folder / VOCABULARY_FILE)
        write_items(item_vectors, vector_dim - item_bias, is_cosine, manifest["precision"], folder)
        for name in set(manifest["files"]) - {*tables, VOCABULARY_FILE}:
            shutil.copyfile(artifact / name, folder / name)
        replaced = manifest | {
            "num_items": num_items,
            "vocabulary_sha256": vocabulary.sha256,
            "provenance": manifest["provenance"] | {"items": source},
            "validation": {},
            "files": {name: sha256_of(folder / name) for name in manifest["files"]},
            "bytes": {name: (folder / name).stat().st_size for name in manifest["files"]},
        }
        (folder / MANIFEST_FILE).write_text(json.dumps(replaced, indent=2) + "\n")
    return replaced
