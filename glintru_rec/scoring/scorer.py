"""Run an artifact on batches of rows; tables of the job's output come out."""

from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from glintru_rec.export.artifact import Artifact
from glintru_rec.scoring.catalog import catalog_of, items_left, stretches_of
from glintru_rec.scoring.config import ScoreConfig
from glintru_rec.scoring.ranks import rank_and_size
from glintru_rec.scoring.rows import Rows
from glintru_rec.scoring.split import SplitCatalog


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
            self._catalog = catalog_of(artifact, left)

    def schema(self, user_type: pa.DataType) -> pa.Schema:
        """Give the columns of a fragment's output."""
        if self._config.mode == "encode":
            embedding = pa.list_(pa.float32(), self._artifact.manifest["embedding_dim"])
            return pa.schema([("user_id", user_type), ("embedding", embedding)])
        return ranked_schema(user_type, self._artifact)

    def finish(self) -> None:
        """Search this rank's part of the catalog for the others, where they share it; call it when its rows are done."""
        if isinstance(self._catalog, SplitCatalog):
            self._catalog.serve()

    @torch.inference_mode()
    def score(self, rows: Rows) -> pa.Table:
        """Score one batch."""
        config, artifact = self._config, self._artifact
        item_ids, lengths, candidates, candidate_lengths = (
            torch.from_numpy(array).to(config.device) for array in (*rows.history, *rows.candidates)
        )
        is_empty = lengths == 0
        if config.mode == "encode":
            query = artifact.module.encode(item_ids, lengths).cpu().numpy()
            embedding = pa.FixedSizeListArray.from_arrays(pa.array(query.ravel()), query.shape[1])
            return pa.table([rows.users, embedding], schema=self.schema(rows.users.type))
        if config.mode == "candidates":
            scores = artifact.module.score(item_ids, lengths, candidates, candidate_lengths)
            if self._counts is not None:
                of_empty = is_empty.repeat_interleave(candidate_lengths)
                scores[of_empty] = self._counts[candidates[of_empty]]
            return _listed(rows.users, candidates, candidate_lengths, scores, artifact)
        k = min(config.top_k, artifact.vocabulary.num_items)
        query = artifact.module.encode(item_ids, lengths)
        out, out_lengths = (item_ids, lengths) if config.exclude_seen else (item_ids[:0], torch.zeros_like(lengths))
        if config.deny_column:
            denied, denied_lengths = (torch.from_numpy(array).to(config.device) for array in rows.denied)
            out, out_lengths = _joined(out, out_lengths, denied, denied_lengths)
        best, best_scores = self._catalog.top_k_of(query, out, out_lengths, k)
        if self._counts is not None:
            best[is_empty], best_scores[is_empty] = self._popular, self._counts[self._popular]
        return ranked_table(rows.users, best, best_scores, artifact)


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
