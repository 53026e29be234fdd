"""The catalog as the input of a job (``mode=items``): parts of items whose vectors are to be written."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from glintru_rec.data.side_features import NO_SIDE, SideVocabulary
from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.scoring.fragments import Fragment, InputFile, Stamp
from glintru_rec.scoring.rows import Columns, Limits, Rows, decode

_PART_ITEMS = 1 << 20
_COLUMNS = Columns("item_id", "items", None)


@dataclass(frozen=True)
class ItemFragment(Fragment):
    """Some items of the catalog: rows of an item each, which is its own history.

    Attributes:
        items: their vocabulary indices, int64.
    """

    items: np.ndarray

    def read(self, batch_size: int, vocabulary: Vocabulary, limits: Limits, side: SideVocabulary = NO_SIDE) -> Iterator[Rows]:
        """Give the items in batches; what a job tells of histories is of no use."""
        for start in range(0, self.num_rows, batch_size):
            ids = vocabulary.decode(self.items[start : start + batch_size])
            lists = pa.ListArray.from_arrays(pa.array(np.arange(len(ids) + 1), pa.int32()), ids)
            yield decode(
                pa.record_batch([ids, lists], ["item_id", "items"]), _COLUMNS, vocabulary, self.file.name, start + 1, limits
            )


def item_fragments(items: np.ndarray, vocabulary: Vocabulary) -> dict[str, Fragment]:
    """Cut a catalog into parts of at most 2^20 items, one output file each.

    Args:
        items: vocabulary indices, int64, ascending.
        vocabulary: of the catalog.
    """
    fragments: dict[str, Fragment] = {}
    for number, start in enumerate(range(0, len(items), _PART_ITEMS)):
        part = items[start : start + _PART_ITEMS]
        name = f"part-{number:05d}.parquet"
        # There is no file; that the items are the same ones is told by the artifact's checksums.
        file = InputFile(Path(name), name, Stamp(len(part), 0))
        fragments[name] = ItemFragment(file, _COLUMNS, len(part), vocabulary.item_ids.type, pa.schema([]), (), part)
    return fragments
