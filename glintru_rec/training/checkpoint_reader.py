"""Read `torch.distributed.checkpoint` files without running what they say.

That library unpickles a checkpoint's ``.metadata``, and values that are no tensors, with no restriction, so whoever writes
into a run directory could run code on the machine that reads it. Both are read here first with all names refused but
those that a checkpoint is made of; tensors the library itself reads with ``weights_only``.
"""

import enum
import io
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem

from glintru_rec.errors import InputError

_DESCRIPTIONS = "torch.distributed.checkpoint.metadata"
_ALLOWED = {
    *((_DESCRIPTIONS, name) for name in ("Metadata", "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING")),
    *((_DESCRIPTIONS, f"{kind}Metadata") for kind in ("TensorStorage", "BytesStorage", "ChunkStorage")),
    (_DESCRIPTIONS, "TensorProperties"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    ("pathlib", "PosixPath"),
    ("pathlib", "WindowsPath"),
}


def _member(kind: Any, name: str) -> Any:
    """Stand for ``getattr``, by which the first releases of Python 3.11 pickle the members of an enum, and nothing else."""
    if not isinstance(kind, enum.EnumType) or name not in kind.__members__:
        raise InputError(f"its metadata takes {name!r} of {kind}, which no checkpoint needs; do not trust this file")
    return kind[name]


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _member
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and (module, name) not in _ALLOWED:
            raise InputError(f"its metadata names {module}.{name}, which no checkpoint needs; do not trust this file")
        return super().find_class(module, name)


class InertReader(FileSystemReader):
    """A `FileSystemReader` that refuses metadata which would run anything."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Read the description of all tensors.

        Raises:
            InputError: it names anything but what tensors are described with.
        """
        for path in Path(self.path).glob("*.metadata"):
            with path.open("rb") as file:
                _MetadataUnpickler(file).load()
        return super().read_metadata(*args, **kwargs)


class InertPlanner(DefaultLoadPlanner):
    """A `DefaultLoadPlanner` that refuses values which would run anything."""

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        """Read a value that is no tensor.

        Raises:
            pickle.UnpicklingError: it is made of more than ``torch.load`` allows with ``weights_only``.
        """
        torch.load(value, weights_only=True)
        value.seek(0)
        super().load_bytes(read_item, value)


class GrowingPlanner(InertPlanner):
    """An `InertPlanner` for a table that has more rows than the checkpoint's; those that it lacks stay as they are.

    Args:
        key: of the table in the checkpoint.
    """

    def __init__(self, key: str):
        super().__init__()
        self.key = key

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:
        """Give the table in the checkpoint the rows of the table in memory; there is nothing to read for the new ones."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        assert self.metadata is not None
        tensors = self.metadata.state_dict_metadata
        saved, table = tensors.get(self.key), self.state_dict[self.key]
        if isinstance(saved, TensorStorageMetadata) and saved.size[0] < table.size(0):
            grown = replace(saved, size=torch.Size([table.size(0), *saved.size[1:]]))
            self.metadata = replace(self.metadata, state_dict_metadata={**tensors, self.key: grown})
