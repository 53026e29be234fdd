"""Rank the catalog of an artifact for histories of original item ids, with torch and pyarrow; no glintru_rec.

One history a line on standard input, item ids separated by blanks, oldest first; one line of ``item:score`` a history on
standard output. Items that the vocabulary lacks are skipped::

    echo "242 302 377" | python docs/consumers/top_k.py ARTIFACT_DIR 10
"""

import sys

import pyarrow.parquet as pq
import torch


def main(folder: str, k: int) -> None:
    """Read histories, write lists."""
    names = [str(item) for item in pq.read_table(f"{folder}/vocabulary/items.parquet")["item_id"].to_pylist()]
    index = {name: place for place, name in enumerate(names)}
    model = torch.jit.load(f"{folder}/model.pt")
    model.open_items(folder)
    histories = [[index[item] for item in line.split() if item in index] for line in sys.stdin]
    item_ids = torch.tensor([item for history in histories for item in history], dtype=torch.int64)
    with torch.inference_mode():
        ids, scores = model.top_k(item_ids, torch.tensor([len(history) for history in histories]), k, True)
    for places, values in zip(ids.tolist(), scores.tolist()):
        print(*(f"{names[place]}:{value:g}" for place, value in zip(places, values) if place >= 0))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
