"""Give an artifact another catalog, new items or new vectors, and leave its encoder as it is.

python tools/replace_items.py artifact=DIR items=PARQUET output=DIR

PARQUET has a row for each item, in any order: item_id (whole numbers or strings, each once), embedding (a list of as many
numbers as the artifact's embedding_dim; with item_bias the bias last), and perhaps count (events of the item, by which
empty_history=popular ranks where there are no biases; 0 where the column is left out). With similarity cosine, vectors are to
have the lengths that they were trained with, which the encoder reads: not the length 1 that mode=items gives them. Those of an
ensemble (unit_parts in the manifest) may have any: each encoder's part is scaled to length 1.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.errors import InputError
from glintru_rec.export import replace_items
from glintru_rec.files import sha256_of

KEYS = ("artifact", "items", "output")


def read_catalog(path: Path) -> tuple[Tensor, Vocabulary]:
    """Read items and their vectors.

    Returns:
        The vectors, float32 ``[V, Q]``, and the vocabulary of the V items, both in the order of the file.

    Raises:
        InputError: the file cannot be read, lacks a column, or holds a null, an id twice, or a vector of another length or with
            a number that is not finite.
    """
    try:
        with pq.ParquetFile(path) as file:
            items = file.read()
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise InputError(f"items {str(path)!r} is not readable parquet: {error}") from error
    for name in ("item_id", "embedding"):
        if items.schema.names.count(name) != 1:
            raise InputError(f"items {str(path)!r} needs one column {name!r}; it has {', '.join(items.schema.names)}")
    counts = items["count"] if "count" in items.schema.names else pa.chunked_array([np.zeros(len(items), dtype=np.int64)])
    for name, column in {"item_id": items["item_id"], "embedding": items["embedding"], "count": counts}.items():
        if column.null_count or not len(column):
            raise InputError(f"column {name!r} of items {str(path)!r} has {column.null_count} null(s) in {len(column)} rows")
    ids = items["item_id"].combine_chunks()
    ids = ids.dictionary_decode() if pa.types.is_dictionary(ids.type) else ids
    if not (pa.types.is_integer(ids.type) or str(ids.type) in ("string", "large_string", "string_view")):
        raise InputError(f"column 'item_id' of items {str(path)!r} has type {ids.type}; it must hold integers or strings")
    try:
        ids = ids.cast(pa.int64() if pa.types.is_integer(ids.type) else pa.string())
        counts = counts.combine_chunks().cast(pa.int64())
        lengths = pc.list_value_length(items["embedding"])
        vectors = items["embedding"].combine_chunks().flatten().cast(pa.float32())
    except (pa.ArrowException, OverflowError) as error:
        raise InputError(f"items {str(path)!r}: {error}") from error
    if pc.count_distinct(ids).as_py() < len(ids):
        raise InputError(f"items {str(path)!r} holds an item_id more than once")
    if pc.count_distinct(lengths).as_py() > 1 or vectors.null_count or not pc.all(pc.is_finite(vectors)).as_py():
        raise InputError(f"vectors of items {str(path)!r} differ in length or hold what is no finite number")
    table = torch.from_numpy(vectors.to_numpy(zero_copy_only=False).copy()).view(len(ids), -1)
    return table, Vocabulary(ids, counts.to_numpy())


def main(arguments: list[str]) -> int:
    """Read the command line and write the artifact."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    if len(given) != len(arguments) or set(given) != set(KEYS) or not all(given.values()):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    path = Path(given["items"])
    try:
        vectors, vocabulary = read_catalog(path)
        source = {"file": path.name, "sha256": sha256_of(path)}
        manifest = replace_items(given["artifact"], vectors, vocabulary, given["output"], source)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"written: {given['output']}, {manifest['num_items']:,} items")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
