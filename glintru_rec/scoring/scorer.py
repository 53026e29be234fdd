"""Run an artifact on batches of rows; tables of the job's output come out."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from glintru_rec.errors import InputError
from glintru_rec.export.artifact import Artifact
from glintru_rec.scoring.catalog import catalog_of, items_left, stretches_of
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.scoring.fragments import Fragment, InputFile, open_fragments
from glintru_rec.scoring.index import IndexedCatalog, IndexReport
from glintru_rec.scoring.item_vectors import item_fragments
from glintru_rec.scoring.pipeline import map_in_order, one_thread_each
from glintru_rec.scoring.ranks import on_first, rank_and_size
from glintru_rec.scoring.rows import Columns, Limits, Rows
from glintru_rec.scoring.split import SplitCatalog

# What an index is measured on: the first rows of so many files, in batches of so many.
_SAMPLED_FILES = 16
_SAMPLED_ROWS = 64


class Scorer:
    """What a job does to every batch.

    Histories that are empty take part where ``empty_history`` is ``popular``: with item biases the model itself ranks by
    what it learnt of popularity; without, it scores every item 0, and the items' counts of events stand in.
    """

    def __init__(self, config: ScoreConfig, artifact: Artifact):
        self._config = config
        self._artifact = artifact
        self._counts: Tensor | None = None
        if config.empty_history == "popular" and not artifact.manifest.get("item_bias", False):
            self._counts = torch.tensor(artifact.vocabulary.counts, dtype=torch.float32, device=config.device)
            # Sorted as integers: large counts that are one float are no tie.
            by_count = np.argsort(-artifact.vocabulary.counts, kind="stable")
            self._popular = torch.from_numpy(by_count[: config.top_k]).to(config.device)

        left, self.unknown_listed_items = None, 0
        if config.allow or config.deny:
            left, self.unknown_listed_items = items_left(config.allow, config.deny, config.item_column, artifact.vocabulary)
        if config.catalog == "split":
            num_threads = torch.get_num_threads()
            stretches = stretches_of(artifact, left, *rank_and_size(), num_threads)
            self._catalog: Any = SplitCatalog(stretches, num_threads)
        else:
            # Items that are written are read where they lie: nothing is to be searched, nor copied for that.
            self._catalog = catalog_of(artifact, None if config.mode == "items" else left)
        self._left = left

    def item_fragments(self) -> dict[str, Fragment]:
        """Give the items that are written, where these are the input (see `glintru_rec.scoring.item_vectors`)."""
        vocabulary = self._artifact.vocabulary
        return item_fragments(np.arange(vocabulary.num_items) if self._left is None else self._left, vocabulary)

    def prepare(self, fragments: list[Fragment]) -> IndexReport | None:
        """Open the index, where the search is approximate, and measure it on some users of the input.

        In a process group every rank calls this.

        Returns:
            What was measured; None where the search is exact.

        Raises:
            InputError: the index cannot be had, or finds less of the exact search's items than is asked for.
        """
        config, artifact = self._config, self._artifact
        if config.index.kind == "exact":
            return None
        with one_thread_each(config.device) as num_threads:
            exact = self._catalog

            def open_one() -> IndexedCatalog:
                return IndexedCatalog(artifact, config.index, self._left, exact, num_threads)

            opened: list[IndexedCatalog] = []
            on_first(lambda: opened.append(open_one()))  # which builds it, where there is none
            self._catalog = indexed = opened[0] if opened else open_one()
            return on_first(lambda: self._measured(indexed, exact, fragments, num_threads))

    def _measured(self, indexed: IndexedCatalog, exact: Any, fragments: list[Fragment], num_threads: int) -> IndexReport:
        """Compare the index with the exact search."""
        config = self._config

        @torch.inference_mode()
        def compare(rows: Rows) -> tuple[list[float], int]:
            query, out, out_lengths, k = self._question(rows)
            approximate, best = (search.top_k_of(query, out, out_lengths, k)[0] for search in (indexed, exact))
            shares = [
                float(torch.isin(truth[truth >= 0], found).float().mean())
                for truth, found in zip(best, approximate)
                if bool((truth >= 0).any())
            ]
            return shares, int(indexed.found(query, out, out_lengths, k)[2].sum())

        compared = list(map_in_order(compare, self._sample(fragments), num_threads))
        shares = [share for some, _ in compared for share in some]
        recall = round(sum(shares) / len(shares), 6) if shares else None
        report = IndexReport(config.index.kind, recall, len(shares), sum(few for _, few in compared))
        if recall is not None and recall < config.index.min_recall:
            more = {"ivf": "index.num_probes", "hnsw": "index.ef_search"}[config.index.kind]
            raise InputError(
                f"index {config.index.kind} finds {recall:.4f} of the exact top {config.top_k} of {len(shares)} of the job's "
                f"users, less than index.min_recall={config.index.min_recall}; give more {more}, or index=exact"
            )
        return report

    def _sample(self, fragments: list[Fragment]) -> Iterator[Rows]:
        """Read the first rows of some files, evenly chosen; those that cannot be read are reported when they are scored."""
        some = [fragment for fragment in fragments if fragment.num_rows]
        some = some[:: -(-len(some) // _SAMPLED_FILES) or 1]
        limits = Limits(self._config.max_candidates, keep_empty=False)
        share = -(-self._config.index.sample // max(1, len(some)))
        for fragment in some:
            num_read = 0
            try:
                artifact, batch_size = self._artifact, min(share, _SAMPLED_ROWS)
                for rows in fragment.read(batch_size, artifact.vocabulary, limits, artifact.side):
                    yield rows
                    num_read += rows.num_read
                    if num_read >= share:
                        break
            except InputError:
                continue

    def open(self, files: list[InputFile]) -> dict[str, Fragment | InputError]:
        """Open all files of the input (see `open_fragments`)."""
        config, artifact = self._config, self._artifact
        candidates_column = config.candidates_column if config.mode == "candidates" else None
        columns = Columns(
            config.user_column,
            config.history_column,
            candidates_column,
            config.deny_column or None,
            side=tuple(artifact.side.names),
            kept=tuple(config.keep_columns),
        )
        return open_fragments(files, columns, artifact.vocabulary)

    def read(self, fragment: Fragment) -> Iterator[Rows]:
        """Read a fragment, a batch at a time."""
        limits = Limits(self._config.max_candidates, keep_empty=self._config.empty_history == "popular")
        return fragment.read(self._config.batch_size, self._artifact.vocabulary, limits, self._artifact.side)

    def schema(self, user_type: pa.DataType) -> pa.Schema:
        """Give the columns of a fragment's output."""
        if self._config.mode in ("encode", "items"):
            embedding = pa.list_(pa.float32(), self._artifact.manifest["embedding_dim"])
            whose = "item_id" if self._config.mode == "items" else "user_id"
            return pa.schema([(whose, user_type), ("embedding", embedding)])
        return ranked_schema(user_type, self._artifact)

    def finish(self) -> None:
        """Search this rank's part of the catalog for the others, where they share it; call it when its rows are done."""
        if isinstance(self._catalog, SplitCatalog):
            self._catalog.serve()

    def score(self, rows: Rows) -> pa.Table:
        """Score one batch; the columns to keep come last."""
        table = self._scored(rows)
        for name, column in zip(self._config.keep_columns, rows.kept):
            table = table.append_column(name, column)
        return table

    @torch.inference_mode()
    def _scored(self, rows: Rows) -> pa.Table:
        config, artifact = self._config, self._artifact
        item_ids, lengths, candidates, candidate_lengths = (
            torch.from_numpy(array).to(config.device) for array in (*rows.history, *rows.candidates)
        )
        side = self._side(rows)
        is_empty = lengths == 0
        if config.mode in ("encode", "items"):
            vectors_of, encode = artifact.module.vectors_of, artifact.module.encode
            vectors = vectors_of(item_ids) if config.mode == "items" else encode(item_ids, lengths, *side)
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(vectors.cpu().numpy().ravel()), vectors.size(1))
            return pa.table([rows.users, embedding], schema=self.schema(rows.users.type))
        if config.mode == "candidates":
            scores = artifact.module.score(item_ids, lengths, candidates, candidate_lengths, *side)
            if self._counts is not None:
                of_empty = is_empty.repeat_interleave(candidate_lengths)
                scores[of_empty] = self._counts[candidates[of_empty]]
            return _listed(rows.users, candidates, candidate_lengths, scores, artifact)
        best, best_scores = self._catalog.top_k_of(*self._question(rows))
        if self._counts is not None:
            best[is_empty], best_scores[is_empty] = self._popular, self._counts[self._popular]
        return ranked_table(rows.users, best, best_scores, artifact)

    def _side(self, rows: Rows) -> tuple[Tensor, ...]:
        """Give what comes after a method's histories."""
        # Artifacts of models without side features may be of a time when no method took any.
        return (torch.from_numpy(rows.side_ids).to(self._config.device),) if self._artifact.side.names else ()

    def _question(self, rows: Rows) -> tuple[Tensor, Tensor, Tensor, int]:
        """Give the arguments of ``top_k_of`` for a batch."""
        config, artifact = self._config, self._artifact
        item_ids, lengths = (torch.from_numpy(array).to(config.device) for array in rows.history)
        query = artifact.module.encode(item_ids, lengths, *self._side(rows))
        out, out_lengths = (item_ids, lengths) if config.exclude_seen else (item_ids[:0], torch.zeros_like(lengths))
        if config.deny_column:
            denied, denied_lengths = (torch.from_numpy(array).to(config.device) for array in rows.denied)
            out, out_lengths = _joined(out, out_lengths, denied, denied_lengths)
        return query, out, out_lengths, min(config.top_k, artifact.vocabulary.num_items)


def _joined(items: Tensor, lengths: Tensor, more: Tensor, more_lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Put two ragged lists together, user by user."""
    users = torch.cat([torch.repeat_interleave(lengths), torch.repeat_interleave(more_lengths)])
    return torch.cat([items, more])[torch.sort(users, stable=True)[1]], lengths + more_lengths


def ranked_schema(user_type: pa.DataType, artifact: Artifact) -> pa.Schema:
    """Give the columns of an output of items and their scores."""
    item_ids = pa.list_(artifact.vocabulary.item_ids.type)
    return pa.schema([("user_id", user_type), ("item_ids", item_ids), ("scores", pa.list_(pa.float32()))])


def ranked_table(users: pa.Array, ids: Tensor, scores: Tensor, artifact: Artifact) -> pa.Table:
    """Write what ``top_k`` found of each user, ``[B, k]``, less the empty places, as user_id, item_ids and scores."""
    found = ids >= 0
    return _listed(users, ids[found], found.sum(1), scores[found], artifact)


def _listed(users: pa.Array, item_ids: Tensor, lengths: Tensor, scores: Tensor, artifact: Artifact) -> pa.Table:
    offsets = pa.array(np.concatenate([[0], lengths.cumsum(0).cpu().numpy()]), pa.int32())
    columns = (artifact.vocabulary.decode(item_ids.cpu().numpy()), pa.array(scores.cpu().numpy()))
    lists = [pa.ListArray.from_arrays(offsets, column) for column in columns]
    return pa.table([users, *lists], schema=ranked_schema(users.type, artifact))
