"""What a scoring job is told: every key of the program score."""

from dataclasses import dataclass, field

import torch

from glintru_rec.config import check, one_of
from glintru_rec.errors import InputError
from glintru_rec.scoring.addresses import is_remote, local_path
from glintru_rec.scoring.index import IndexConfig

MODES = ("candidates", "top_k", "encode", "items", "update", "rank")
_MISSING = "???"  # hydra asks for what has this value
EMPTY_HISTORY = ("reject", "popular")
CATALOGS = ("whole", "split")
_NUMBERS = {3: "three", 4: "four"}


@dataclass
class ScoreConfig:
    """What to score, and how.

    An item of a history that the vocabulary lacks is skipped and counted; so is a candidate, which is listed too. Where the
    model reads side features of events, the input has a column under the name of each: a list as long as the history (in
    mode update, the event's value); null is an unknown value.

    The same command again goes on where a killed job was. Exit status: 0, also when all was done before; 2 for bad input, an
    output begun with another config, artifact or input, or one that another job is writing; 3 where some input files could
    not be read: the others are scored, there is no _SUCCESS, and the same command again does those that were mended.

    Attributes:
        artifact: folder that launch/export.py wrote; at an address of fsspec, every process takes a copy (in ``TMPDIR``).
        input: parquet file, folder of them or glob pattern, local or at an address of fsspec (``s3://…``, with s3fs installed);
            one row per user, or one per event in mode update, which takes a copy (in ``TMPDIR``) of one elsewhere; left out in
            mode items. An address ``https://host/file?sig=…`` is no pattern but that file.
        output: folder to write; it must not exist, be empty, or be of the same job. At an address of fsspec, files are made on
            this machine (in ``TMPDIR``) and taken there; not in mode update. Of two jobs at once the second is refused (see
            `glintru_rec.scoring.lease` for how, elsewhere, and until when after a job was killed).
        mode: ``candidates`` scores each row's own candidates; ``top_k`` finds the best items of the catalog; ``encode``
            writes the user's vector; ``items`` writes the vector of every item: a score is the dot product of both (with
            similarity cosine, item vectors have length 1; biases are in the last number); ``update`` carries
            the states of users on by new events and finds the best items of those who acted (see
            `glintru_rec.scoring.update`); ``rank`` gives the predictions of a ranking model's tasks, probabilities or
            numbers, for each row's item (see `glintru_rec.scoring.examples` for the columns).
        state: folder of the store of user states, on this machine, made when missing; mode update only.
        top_k: items to find for each user (fewer where the catalog has no more).
        exclude_seen: top_k and update leave out the items of the history.
        catalog: ``whole``: every rank searches all items for its own users; ``split``, for catalogs larger than a machine's
            memory: every rank (``--nproc``) searches an even part for the users of all, and the output is the same. mode top_k
            on the cpu only.
        index: an approximate search instead of the exact one, see `IndexConfig`; mode top_k only.
        allow: parquet file, local or at an address, of the only items that top_k may find, or items write, in the column
            ``item_column``; all when left out.
        deny: the same of items that top_k must not find, nor items write. Unknown items of both files are counted.
        deny_column: name of the column of items that top_k must not find for the row's user, lists of item ids; none when left
            out. An item there that the vocabulary lacks changes nothing. (The row's own allow-list is mode candidates.)
        empty_history: what becomes of a row whose history has no known item. ``reject`` sets it aside; ``popular`` scores it,
            in modes candidates and top_k, by the model's item biases where it has them, else by the number of events of
            each item in the dataset.
        max_candidates: a row with more candidates than that is set aside; mode candidates only.
        batch_size: users scored at once by one thread; fewer where histories or candidates are so long that a batch would hold
            more than 2 million of them.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        user_column: name of the column of user ids, integers or strings.
        history_column: name of the column of histories, lists of item ids, oldest first.
        candidates_column: name of the column of candidates, lists of item ids; mode candidates only.
        keep_columns: names of columns of the input that are written beside the scores, as they are; modes candidates, top_k and
            encode only. A folder ``name=value`` of a partitioned dataset is a column, too, here and for the other names: of
            integers where all its values are.
        item_column: name of the column of item ids; of modes update and rank, and of the files ``allow`` and ``deny``.
        time_column: name of the column of times, whole numbers or timestamps; mode update only.
    """

    artifact: str
    input: str = ""
    output: str = _MISSING
    mode: str = _MISSING
    state: str = ""
    top_k: int = 100
    exclude_seen: bool = True
    catalog: str = "whole"
    allow: str = ""
    deny: str = ""
    deny_column: str = ""
    empty_history: str = "reject"
    max_candidates: int = 100_000
    batch_size: int = 1024
    device: str = "cpu"
    user_column: str = "user_id"
    history_column: str = "history"
    candidates_column: str = "candidates"
    keep_columns: list[str] = field(default_factory=list)
    item_column: str = "item_id"
    time_column: str = "timestamp"
    index: IndexConfig = field(default_factory=IndexConfig)

    def __post_init__(self):
        one_of("mode", self.mode, MODES)
        for key in ("artifact", "input", "output", "state", "allow", "deny"):
            setattr(self, key, local_path(getattr(self, key)))
        local = "a path of this machine, as states are changed in place"
        check("state", self.state, not is_remote(self.state), local)
        local = "a path of this machine in mode update, as output and states change at once"
        check("output", self.output, self.mode != "update" or not is_remote(self.output), local)
        has_place = self.index.kind == "exact" or bool(self.index.folder) or not is_remote(self.artifact)
        check(
            "index.folder", self.index.folder, has_place, f"a folder of this machine, as the artifact is at {self.artifact!r}"
        )
        one_of("empty_history", self.empty_history, EMPTY_HISTORY)
        one_of("catalog", self.catalog, CATALOGS)
        check("catalog", self.catalog, self.catalog == "whole" or self.mode == "top_k", f"whole, as mode is {self.mode!r}")
        check("catalog", self.catalog, self.catalog == "whole" or self.device == "cpu", f"whole, as device is {self.device!r}")
        if self.mode not in ("candidates", "top_k"):
            check("empty_history", self.empty_history, self.empty_history == "reject", f"reject, as mode is {self.mode!r}")
        plain = self.mode == "top_k" and self.catalog == "whole" and self.device == "cpu"
        allowed = "exact, unless mode is 'top_k', catalog 'whole' and device 'cpu'"
        check("index.kind", self.index.kind, plain or self.index.kind == "exact", allowed)
        for key in ("allow", "deny", "deny_column"):
            given = getattr(self, key)
            listed = self.mode == "top_k" or (self.mode == "items" and key != "deny_column")
            check(key, given, not given or listed, f"left out, as mode is {self.mode!r}")
            check(key, given, not given or self.empty_history == "reject", "left out, as empty_history is 'popular'")
        names: tuple[str, ...] = ("user_column", "history_column", "candidates_column", "item_column", "time_column")
        if self.mode == "items":
            check("input", self.input, not self.input, "left out, as mode is 'items': the artifact has the items")
            names += ("artifact", "output")
        else:
            names += ("artifact", "input", "output")
        for key in names:
            check(key, getattr(self, key), bool(getattr(self, key)), "a text that is not empty")
        taken = {"user_id", "item_ids", "scores", "embedding"} & {name.lower() for name in self.keep_columns}
        allowed = f"without {', '.join(sorted(taken))}, which the output has itself"
        check("keep_columns", self.keep_columns, not taken, allowed)
        is_set = len({name.lower() for name in self.keep_columns}) == len(self.keep_columns)
        check("keep_columns", self.keep_columns, is_set, "different names")
        kept = not self.keep_columns or self.mode in ("candidates", "top_k", "encode")
        check("keep_columns", self.keep_columns, kept, f"left out, as mode is {self.mode!r}")
        check("top_k", self.top_k, self.top_k >= 1, "at least 1")
        check("max_candidates", self.max_candidates, self.max_candidates >= 1, "at least 1")
        check("batch_size", self.batch_size, self.batch_size >= 1, "at least 1")
        if self.mode == "update":
            check("state", self.state, bool(self.state), "the folder of the user states, as mode is 'update'")
            keys: tuple[str, ...] = ("user_column", "item_column", "time_column")
        else:
            check("state", self.state, not self.state, f"left out, as mode {self.mode!r} keeps no states")
            keys = ("user_column", "history_column", "item_column" if self.mode == "rank" else "candidates_column")
        if self.deny_column:
            keys += ("deny_column",)
        columns = tuple(getattr(self, key) for key in keys)
        check(
            ", ".join(keys),
            columns,
            len({name.lower() for name in columns}) == len(keys),
            f"{_NUMBERS[len(keys)]} different names",
        )
        kind, _, number = self.device.partition(":")
        known = self.device in ("cpu", "cuda") or (kind == "cuda" and number.isdigit())
        check("device", self.device, known, "cpu, cuda or cuda:N")
        if kind == "cuda" and int(number or 0) >= torch.cuda.device_count():
            raise InputError(f"device is {self.device!r}; this machine has {torch.cuda.device_count()} CUDA device(s)")
