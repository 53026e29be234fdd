"""The artifact of a ranking model: its module, and what turns the values of features into what it reads.

::

    model.pt                    TorchScript with one method, ``predict`` (see the manifest's signature); tables are inside
    vocabulary/item.parquet     value, count: the values of each categorical feature; the row of a value in its table is its
    vocabulary/sparse.*.parquet   place + 1, row 0 is for null and for values that training did not see
    vocabulary/sequence.*.parquet
    manifest.json               features, tasks, scales of dense features, the expressions that gave their values in
                                training, parity, provenance, and the size and sha256 of every other file

Scoring needs torch and pyarrow, neither torchrec nor fbgemm.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from glintru_rec.errors import InputError
from glintru_rec.export.artifact import MODEL_FILE, load_script, read_manifest, verify_files

RANKING = "ranking"
ITEM_FEATURE = "item"


@dataclass(frozen=True)
class RankingArtifact:
    """An exported ranking model, verified and opened.

    Attributes:
        path: its folder.
        module: has the method ``predict``.
        values: the values of each categorical feature (``item``, ``sparse:NAME``, ``sequence:NAME``), in the order of their
            rows.
        manifest: as `glintru_rec.ranking.exporting.export_ranking` wrote it.
    """

    path: Path
    module: torch.jit.ScriptModule
    values: dict[str, pa.Array]
    manifest: dict[str, Any]

    @classmethod
    def load(cls, path: str | Path, device: str = "cpu") -> "RankingArtifact":
        """Open an artifact, after a check that it is still what was written.

        Args:
            path: its folder.
            device: where the module will run.

        Raises:
            InputError: the folder is no artifact of a ranking model, or a file is missing or was changed.
        """
        path = Path(path)
        manifest = read_manifest(path)
        if manifest.get("task") != RANKING:
            raise InputError(f"artifact {str(path)!r} is of a retrieval model; mode=rank needs one of a ranking model")
        verify_files(path, manifest)
        values = {name: pq.read_table(path / file)["value"].combine_chunks() for name, file in manifest["vocabularies"].items()}
        return cls(path, load_script(path / MODEL_FILE, device), values, manifest)

    def features(self, group: str) -> list[str]:
        """Give the names of the features of a group (``sparse``, ``sequence``), in the order in which the module reads them."""
        return [name.removeprefix(f"{group}:") for name in self.values if name.startswith(f"{group}:")]
