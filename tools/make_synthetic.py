"""Write a log of any catalog size whose next-item law is known, and the best figures that this law allows.

python tools/make_synthetic.py OUTPUT [--items 1000000] [--clusters 200] [--users 4000] [--events 250] [--stay 0.9] [--seed 0]

The items are divided into clusters of equal size; item j of cluster k has the id ``k * items / clusters + j``. Before each
event a user stays in the cluster of the last item with probability ``stay``, and else draws a cluster; then an item of it::

    P(item j of cluster k | last item of cluster c) = (stay · [k = c] + (1 - stay) · g(k)) · z(j)

    g(k) ∝ (k + 1)^-0.5          z(j) ∝ (j + 1)^-1.2

So a few items carry most events, as in real logs, and a million events say enough about these however large the catalog is.
The rest is there all the same: for every item there is one more user, with that item alone. These users give no targets and no
cases to evaluate; they only make each item part of the catalog.

OUTPUT gets ``log.parquet`` (user_id, item_id, timestamp: int64) and ``law.json``: the arguments, and what is expected under the
law when the whole catalog is ranked, seen items included: hr@10 and ndcg@10 of the best possible model and of ranking by
popularity, and the lowest loss (cross-entropy, nats). Prepare the log with ``min_user_events=1 min_item_events=1`` and
evaluate with ``exclude_seen=false``: the law lets items come again. Memory does not grow with users or events, nor beyond a few
numbers per cluster, and per item of one cluster, with the catalog.
"""

import argparse
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CLUSTER_EXPONENT, ITEM_EXPONENT = 0.5, 1.2
TOP = 10
ROWS_AT_ONCE = 1 << 20
COLUMNS = ("user_id", "item_id", "timestamp")


class Law(NamedTuple):
    """What decides the next item."""

    stay: float
    clusters: np.ndarray
    """g, float64 ``[number of clusters]``; also the share of events in each cluster."""
    ranks: np.ndarray
    """z, float64 ``[items of a cluster]``."""

    def transition(self, cluster: int) -> np.ndarray:
        """Give the probability of each next cluster: float64 ``[number of clusters]``."""
        next_cluster = (1 - self.stay) * self.clusters
        next_cluster[cluster] += self.stay
        return next_cluster


def make_law(num_items: int, num_clusters: int, stay: float) -> Law:
    """Make the law of a catalog."""
    return Law(stay, zipf(num_clusters, CLUSTER_EXPONENT), zipf(num_items // num_clusters, ITEM_EXPONENT))


def zipf(size: int, exponent: float) -> np.ndarray:
    """Give probabilities that fall as (j + 1)^-exponent: float64 ``[size]``."""
    weights = np.arange(1.0, size + 1) ** -exponent
    return weights / weights.sum()


def best_figures(law: Law) -> dict[str, float]:
    """Work out what a model that knows the law and the last item's cluster is expected to reach, and the lowest loss.

    An item among the best ten of all is among the best ten of its cluster, so ten of each cluster are looked at.
    """
    head, figures = law.ranks[:TOP], {"hr@10": 0.0, "ndcg@10": 0.0}
    item_entropy, loss = entropy(law.ranks), 0.0
    for cluster, share in enumerate(law.clusters.tolist()):
        transition = law.transition(cluster)
        for name, figure in figures_of(np.outer(transition, head).ravel()).items():
            figures[name] += share * figure
        loss += share * (entropy(transition) + item_entropy)  # cluster and item are drawn independently
    return {**figures, "loss": loss}


def figures_of(probabilities: np.ndarray) -> dict[str, float]:
    """Give the expected figures of ranking items by their true probabilities."""
    top = np.sort(np.partition(probabilities, -TOP)[-TOP:])[::-1] if probabilities.size > TOP else np.sort(probabilities)[::-1]
    return {"hr@10": float(top.sum()), "ndcg@10": float(top @ (1 / np.log2(np.arange(2, top.size + 2))))}


def entropy(probabilities: np.ndarray) -> float:
    """-Σ p log p, in nats."""
    positive = probabilities[probabilities > 0]
    return float(-(positive * np.log(positive)).sum())


def events(law: Law, num_users: int, num_events: int, rng: np.random.Generator) -> Iterator[dict[str, np.ndarray]]:
    """Yield the histories of the users who follow the law, some users at a time."""
    cluster_sums, rank_sums = (np.cumsum(p) / p.sum() for p in (law.clusters, law.ranks))
    users_at_once = max(1, ROWS_AT_ONCE // num_events)
    for start in range(0, num_users, users_at_once):
        shape = (min(users_at_once, num_users - start), num_events)
        place = np.broadcast_to(np.arange(num_events), shape)
        moved = rng.random(shape) >= law.stay
        last_move = np.maximum.accumulate(np.where(moved, place, 0), axis=1)  # all begin with a draw
        drawn = np.searchsorted(cluster_sums, rng.random(shape), side="right")
        cluster = np.take_along_axis(drawn, last_move, axis=1)
        item = cluster * law.ranks.size + np.searchsorted(rank_sums, rng.random(shape), side="right")
        user = np.repeat(np.arange(start, start + shape[0]), num_events)
        yield dict(zip(COLUMNS, (user, item.ravel(), place.ravel())))


def whole_catalog(num_items: int, first_user: int) -> Iterator[dict[str, np.ndarray]]:
    """Yield one event for every item, each of a user with no other."""
    for start in range(0, num_items, ROWS_AT_ONCE):
        item = np.arange(start, min(start + ROWS_AT_ONCE, num_items))
        yield dict(zip(COLUMNS, (first_user + item, item, np.zeros_like(item))))


def make_synthetic(
    output: Path, num_items: int, num_clusters: int, num_users: int, num_events: int, stay: float, seed: int
) -> dict:
    """Write log and law; give what ``law.json`` holds.

    Args:
        output: a folder, made where it is missing.
        num_items: a multiple of ``num_clusters``.
        num_clusters: of equal size.
        num_users: who follow the law.
        num_events: of each of these.
        stay: probability of staying in a cluster.
        seed: the same arguments give the same bytes.
    """
    law, rng = make_law(num_items, num_clusters, stay), np.random.default_rng(seed)
    output.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(output / "log.parquet", pa.schema([(name, pa.int64()) for name in COLUMNS])) as writer:
        for part in chain(events(law, num_users, num_events, rng), whole_catalog(num_items, num_users)):
            writer.write_table(pa.table(part))
    said = {
        "items": num_items,
        "clusters": num_clusters,
        "users": num_users,
        "events": num_events,
        "stay": stay,
        "seed": seed,
        "best": best_figures(law),
        "popularity": figures_of(np.outer(law.clusters, law.ranks[:TOP]).ravel()),
    }
    (output / "law.json").write_text(json.dumps(said, indent=2) + "\n")
    return said


def main() -> None:
    """Read the command line, write, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    for name, default in (("items", 1_000_000), ("clusters", 200), ("users", 4000), ("events", 250), ("seed", 0)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--stay", type=float, default=0.9)
    given = parser.parse_args()
    for name, least in (("clusters", 1), ("users", 1), ("events", 3), ("seed", 0)):
        if getattr(given, name) < least:
            parser.error(f"--{name} is {getattr(given, name)}; it must be at least {least}")
    if given.items < given.clusters or given.items % given.clusters:
        parser.error(f"--items is {given.items}; it must be a multiple of --clusters ({given.clusters})")
    if not 0 <= given.stay <= 1:
        parser.error(f"--stay is {given.stay}; it must be from 0 to 1")
    law = make_synthetic(given.output, given.items, given.clusters, given.users, given.events, given.stay, given.seed)
    print(json.dumps(law, indent=2))


if __name__ == "__main__":
    main()
