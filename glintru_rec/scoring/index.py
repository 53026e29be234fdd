"""An approximate search of the catalog with faiss: built once for an artifact, kept on the disk, checked against exact search.

Shapes: V catalog, B users, T items to leave out, Q numbers of a query or item vector, F items asked of the index for a user.
"""

import fcntl
import hashlib
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glintru_rec.config import check, check_at_least, one_of
from glintru_rec.errors import InputError
from glintru_rec.export.artifact import Artifact
from glintru_rec.files import aside_of, publish, remove_asides, sha256_of, write_json
from glintru_rec.scoring.pipeline import map_in_order

KINDS = ("exact", "ivf", "hnsw")
_MAX_LISTS = 1 << 14
_TRAINING_ITEMS = 64  # for each list
_MIN_TRAINING_ITEMS = 39  # for each list; faiss warns of fewer
_BLOCK_ITEMS = 1 << 16


@dataclass
class IndexConfig:
    """How ``mode=top_k`` searches the catalog.

    An index (``index=ivf`` or ``index=hnsw``; the extra ``faiss``) is built of the artifact's item vectors when there is none
    of the same vectors and settings in ``folder``. It is the same whatever the number of threads; ``hnsw`` is built by one. In
    memory it takes the item vectors in float32, whatever the artifact's precision. Its recall is measured against the exact
    search on some of the job's own users, with the job's lists, then printed and written to the report. Seen, denied and not
    allowed items are never found; users for whom the index finds fewer than top_k items are searched exactly.

    Attributes:
        kind: ``exact``; ``ivf``: inverted lists, clusters of items of which the nearest ``num_probes`` are searched; or
            ``hnsw``: a graph of near items, through which a search walks.
        folder: where indexes are kept; left out: the artifact's name with ``.index``, beside the artifact.
        num_lists: ivf: number of clusters, fewer where there would be less than 39 items for each; 0: four times the square
            root of the number of items, 16384 at most.
        num_probes: ivf: clusters searched for each user. More: better recall, slower.
        num_neighbors: hnsw: neighbors of each item in the graph.
        ef_construction: hnsw: how many items are looked at to place one. More: better recall, slower to build.
        ef_search: hnsw: how many items a search keeps in view. More: better recall, slower.
        seed: of the items that clusters are made of, and of the clusters.
        min_recall: the share of the exact top_k items that the index must find; below it, the job stops before it begins.
        sample: users that the recall is measured on, the first ones of at most 16 input files.
    """

    kind: str = "exact"
    folder: str = ""
    num_lists: int = 0
    num_probes: int = 32
    num_neighbors: int = 32
    ef_construction: int = 200
    ef_search: int = 256
    seed: int = 0
    min_recall: float = 0.95
    sample: int = 500

    def __post_init__(self):
        one_of("index.kind", self.kind, KINDS)
        check("index.num_lists", self.num_lists, self.num_lists >= 0, "at least 0")
        check("index.seed", self.seed, 0 <= self.seed < 2**31, "in [0, 2^31)")
        check("index.num_neighbors", self.num_neighbors, self.num_neighbors >= 2, "at least 2")
        check_at_least(1, "index.", self, ("num_probes", "ef_construction", "ef_search", "sample"))
        check("index.min_recall", self.min_recall, 0 <= self.min_recall <= 1, "in [0, 1]")

    def of_output(self) -> dict[str, Any]:
        """Give what a job's output depends on: of an exact search, nothing else."""
        keys = {
            "exact": (),
            "ivf": ("num_lists", "seed", "num_probes"),
            "hnsw": ("num_neighbors", "ef_construction", "ef_search"),
        }
        return {key: getattr(self, key) for key in ("kind", *keys[self.kind])}


@dataclass(frozen=True)
class IndexReport:
    """What an approximate search is worth.

    Attributes:
        kind: of the index.
        recall: share of the exact search's items that it found, the mean over ``users``; None where there were none.
        users: that it was measured on.
        searched_exactly: of these, users for whom the index found too few items.
    """

    kind: str
    recall: float | None
    users: int
    searched_exactly: int


class IndexedCatalog:
    """Find the best items with an index, and exactly for users for whom it finds too few.

    Args:
        artifact: whose items they are.
        config: of the index, not ``exact``.
        items: vocabulary indices that may be found, int64, ascending; None: all.
        exact: the exact search of these items.
        num_threads: to build the index with, where there is none.

    Raises:
        InputError: see `open_index`.
    """

    def __init__(self, artifact: Artifact, config: IndexConfig, items: np.ndarray | None, exact: Any, num_threads: int):
        self._faiss = _faiss()
        self._index = open_index(artifact, config, num_threads)
        self._num_items = artifact.vocabulary.num_items
        self._exact = exact
        self._selector = None
        if items is not None:
            may_be_found = np.zeros(self._num_items, dtype=bool)
            may_be_found[items] = True
            self._bits = np.packbits(may_be_found, bitorder="little")
            self._selector = self._faiss.IDSelectorBitmap(self._bits)
        if config.kind == "ivf":
            self._parameters = self._faiss.SearchParametersIVF(nprobe=config.num_probes, sel=self._selector)
        else:
            self._parameters = self._faiss.SearchParametersHNSW(efSearch=config.ef_search, sel=self._selector)

    def top_k_of(self, query: Tensor, seen_ids: Tensor, seen_lengths: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Do what `ScoringModule.top_k_of` does, approximately: ids and scores, ``[B, k]`` each."""
        ids, scores, has_few = self.found(query, seen_ids, seen_lengths, k)
        if bool(has_few.any()):
            of_few = has_few.repeat_interleave(seen_lengths)
            ids[has_few], scores[has_few] = self._exact.top_k_of(query[has_few], seen_ids[of_few], seen_lengths[has_few], k)
        return ids, scores

    def found(self, query: Tensor, seen_ids: Tensor, seen_lengths: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Give what the index finds, less the items to leave out: ids, scores, and who has fewer than k, bool ``[B]``."""
        if not len(query):
            return torch.zeros(0, k, dtype=torch.int64), torch.zeros(0, k), torch.zeros(0, dtype=torch.bool)
        # So many that even the user with the longest list to leave out keeps k, but for very long ones.
        most_seen = int(seen_lengths.max())
        num_asked = min(self._num_items, k + min(most_seen, k))
        self._faiss.omp_set_num_threads(1)  # of this thread; batches are what runs at once
        scores, ids = map(torch.from_numpy, self._index.search(query.contiguous().numpy(), num_asked, params=self._parameters))
        users = torch.arange(len(query))
        seen_pairs = users.repeat_interleave(seen_lengths) * self._num_items + seen_ids
        is_out = (ids < 0) | torch.isin(users.unsqueeze(1) * self._num_items + ids, seen_pairs)
        ids, scores = ids.masked_fill(is_out, -1), scores.masked_fill(is_out, float("-inf"))
        missing = max(0, k - num_asked)
        ids = torch.nn.functional.pad(ids, [0, missing], value=-1)
        scores = torch.nn.functional.pad(scores, [0, missing], value=float("-inf"))
        ids, order = torch.sort(ids, dim=1)  # of equal scores the lower id comes first
        scores, order = torch.sort(scores.gather(1, order), dim=1, descending=True, stable=True)
        ids = ids.gather(1, order)
        ids, scores = ids[:, :k], scores[:, :k]
        return ids, scores, (ids < 0).any(dim=1)


def open_index(artifact: Artifact, config: IndexConfig, num_threads: int) -> Any:
    """Read the index of an artifact's items from the disk; build and keep it first, where there is none.

    One process at a time builds in a folder, and removes what killed builds have left there. Another one waits, and then reads
    what it wants if that has been built.

    Args:
        artifact: whose items they are.
        config: what it is to be.
        num_threads: to build it with.

    Raises:
        InputError: faiss is not installed, the index was changed, or cannot be written.
    """
    faiss = _faiss()
    terms = _terms(artifact, config, faiss.__version__)
    name = hashlib.sha256(json.dumps(terms, sort_keys=True).encode()).hexdigest()[:16]
    folder = (
        Path(config.folder) if config.folder else artifact.path.absolute().with_name(artifact.path.absolute().name + ".index")
    )
    path, about = folder / f"{config.kind}-{name}.faiss", folder / f"{config.kind}-{name}.json"
    if not about.exists():
        try:
            with _only_builder(folder):
                if not about.exists():
                    remove_asides(folder)
                    index = _built(artifact, config, num_threads)
                    aside = aside_of(path)
                    try:
                        faiss.write_index(index, str(aside))
                        publish(aside, path)
                    finally:
                        aside.unlink(missing_ok=True)
                    write_json(about, terms | {"sha256": sha256_of(path)})
                    return index
        except (OSError, RuntimeError) as error:
            raise InputError(f"an index cannot be kept in {str(folder)!r}: {error}; name another index.folder") from error
    try:
        if json.loads(about.read_text())["sha256"] != sha256_of(path):
            raise ValueError("it is not what was written")
        return faiss.read_index(str(path))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise InputError(f"index {str(path)!r} cannot be used: {error}; remove it and {about.name!r}") from error


@contextmanager
def _only_builder(folder: Path) -> Iterator[None]:
    """Hold a folder of indexes, alone; the kernel lets go of it when the process dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _terms(artifact: Artifact, config: IndexConfig, version: str) -> dict[str, Any]:
    """Tell what an index is made of; what searches of it are told does not enter."""
    keys = {"ivf": ("num_lists", "seed"), "hnsw": ("num_neighbors", "ef_construction")}[config.kind]
    tables = {name: sha256 for name, sha256 in artifact.manifest["files"].items() if name.endswith(".npy")}
    return {"kind": config.kind, "faiss": version, "items": tables} | {key: getattr(config, key) for key in keys}


def _built(artifact: Artifact, config: IndexConfig, num_threads: int) -> Any:
    faiss = _faiss()
    faiss.omp_set_num_threads(1)
    num_items, width = artifact.vocabulary.num_items, artifact.manifest["embedding_dim"]
    if config.kind == "hnsw":
        index = faiss.IndexHNSWFlat(width, config.num_neighbors, faiss.METRIC_INNER_PRODUCT)
        index.hnsw.efConstruction = config.ef_construction
        for start in range(0, num_items, _BLOCK_ITEMS):
            index.add(_vectors(artifact, np.arange(start, min(start + _BLOCK_ITEMS, num_items))))
        return index
    num_lists = config.num_lists or min(_MAX_LISTS, round(4 * math.sqrt(num_items)))
    num_lists = max(1, min(num_lists, num_items // _MIN_TRAINING_ITEMS))
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, num_lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.seed = config.seed
    sample = np.random.default_rng(config.seed).permutation(num_items)[: num_lists * _TRAINING_ITEMS]
    index.train(_vectors(artifact, np.sort(sample)))

    def assigned(start: int) -> tuple[np.ndarray, np.ndarray]:
        faiss.omp_set_num_threads(1)
        vectors = _vectors(artifact, np.arange(start, min(start + _BLOCK_ITEMS, num_items)))
        return vectors, np.ascontiguousarray(index.quantizer.search(vectors, 1)[1].ravel())

    for vectors, lists in map_in_order(assigned, iter(range(0, num_items, _BLOCK_ITEMS)), num_threads):
        index.add_core(len(vectors), faiss.swig_ptr(vectors), None, faiss.swig_ptr(lists))
    return index


def _vectors(artifact: Artifact, items: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        return artifact.module.vectors_of(torch.from_numpy(items)).numpy()


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise InputError("an index needs faiss, which is not installed: pip install 'glintru_rec[faiss]'") from error
    return faiss
