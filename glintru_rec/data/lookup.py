"""Find the places of ids in a list of ids: tables that are built once, and no loop over ids.

Shapes: V ids of the list, N ids that are looked for.
"""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_MISSING = -1
# A slot whose key is gone: the search for others goes on behind it.
_REMOVED = -2
# A table with a cell for every number from the least id to the largest may have so many cells an id.
_MAX_CELLS_PER_ID = 4
# Of the hash table's slots, this share or less is taken, so that most ids are where they are first looked for.
_SLOTS_PER_ID = 4
# Once this share is taken, or was, the table is made anew.
_MAX_USED = 0.75
_MIX = np.uint64(0x9E3779B97F4A7C15)  # 2⁶⁴ / golden ratio, odd
_SCRAMBLE = (np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53))
_WORD = 8


class IntegerLookup:
    """Places of integers: in a plain table where they lie close together, else in a hash table.

    Args:
        ids: int64 ``[V]``, each once.
    """

    def __init__(self, ids: np.ndarray):
        low = int(ids.min()) if len(ids) else 0
        span = int(ids.max()) - low + 1 if len(ids) else 0
        self._table: np.ndarray | None = None
        if span <= _MAX_CELLS_PER_ID * len(ids):
            # The first and the last cell are those of all other numbers, below and above. What wraps around is as far from
            # the least id as it was, modulo 2⁶⁴.
            self._first = np.array([low]) - 1
            self._table = np.full(span + 2, _MISSING, dtype=np.min_scalar_type(-len(ids) - 1))
            self._table[ids - self._first] = np.arange(len(ids))
        else:
            self._hashed = HashTable(ids.view(np.uint64))

    def find(self, numbers: np.ndarray) -> np.ndarray:
        """Give the place of every number, -1 where it is not in the list: int64 ``[N]`` in, int64 ``[N]`` out."""
        if self._table is None:
            return self._hashed.find(numbers.view(np.uint64))
        return self._table.take(numbers - self._first, mode="clip").astype(np.int64)


class TextLookup:
    """Places of strings, by their hashes; what is found is compared, so different strings with one hash do no harm.

    Args:
        ids: strings ``[V]``, each once, none null.
    """

    def __init__(self, ids: pa.Array):
        self._ids = ids
        lengths = pc.binary_length(ids).to_numpy()
        self._longest = int(lengths.max(initial=0))
        hashes = hash_texts(ids, self._longest, _mixed)
        ordered = np.sort(hashes)
        # Two ids with one hash, which chance does not bring about: the table would know but one of them.
        self._hashed = None if (ordered[1:] == ordered[:-1]).any() else HashTable(hashes)

    def find(self, texts: pa.Array) -> np.ndarray:
        """Give the place of every string, -1 where it is not in the list or null: strings ``[N]`` in, int64 ``[N]`` out."""
        if self._hashed is None:
            return pc.index_in(texts, value_set=self._ids).fill_null(_MISSING).to_numpy(zero_copy_only=False).astype(np.int64)
        places = self._hashed.find(hash_texts(texts, self._longest, _mixed))
        found = self._ids.take(pa.array(places, mask=places < 0))
        return np.where(pc.equal(found, texts).fill_null(False).to_numpy(zero_copy_only=False), places, _MISSING)


class HashTable:
    """Open addressing with linear probing; all keys take a step at once.

    Args:
        keys: uint64 ``[V]``. The caller may change those whose places are not in the table.
        places: that are in it from the start, their keys each once; None for all.
        slots_per_key: at least so many, and fewer than twice as many.
    """

    def __init__(self, keys: np.ndarray, places: np.ndarray | None = None, slots_per_key: int = _SLOTS_PER_ID):
        self._keys = keys
        bits = max(1, (slots_per_key * len(keys)).bit_length())
        self._shift, self._mask = np.uint64(64 - bits), (1 << bits) - 1
        self._slots = np.full(1 << bits, _MISSING, dtype=np.min_scalar_type(-len(keys) - 2))
        self._num_used = 0  # slots that hold a place or have held one, at most
        self.add(np.arange(len(keys)) if places is None else places)

    @property
    def nbytes(self) -> int:
        """Bytes of the slots."""
        return self._slots.nbytes

    def add(self, places: np.ndarray) -> None:
        """Take in places, int64 ``[N]``, whose keys the table does not have."""
        if self._num_used + len(places) > _MAX_USED * len(self._slots):
            places = np.concatenate([self._slots[self._slots >= 0].astype(np.int64), places])
            self._slots.fill(_MISSING)
            self._num_used = 0
        self._num_used += len(places)
        slots = self._first(self._keys[places])
        while len(places):
            free = self._slots[slots] < 0
            self._slots[slots[free]] = places[free]
            # Of several keys that took one slot, one has it.
            lost = self._slots[slots] != places
            places, slots = places[lost], (slots[lost] + 1) & self._mask

    def remove(self, places: np.ndarray) -> None:
        """Give up places, int64 ``[N]``, that the table has."""
        slots = self._first(self._keys[places])
        while len(places):
            here = self._slots[slots] == places
            self._slots[slots[here]] = _REMOVED
            places, slots = places[~here], (slots[~here] + 1) & self._mask

    def find(self, keys: np.ndarray) -> np.ndarray:
        """Give the place of every key, or -1."""
        places = np.full(len(keys), _MISSING)
        if not len(self._keys):
            return places
        waiting: np.ndarray | slice = slice(None)
        slots = self._first(keys)
        while len(slots):
            here = self._slots[slots]
            wanted = keys[waiting]
            # Without a place, one of the last keys is taken: a comparison in vain, and no branch.
            same = (self._keys[here] == wanted) & (here >= 0)
            numbers = np.arange(len(keys)) if isinstance(waiting, slice) else waiting
            places[numbers[same]] = here[same]
            further = ~same & (here != _MISSING)
            waiting, slots = numbers[further], (slots[further] + 1) & self._mask
        return places

    def _first(self, keys: np.ndarray) -> np.ndarray:
        return (_mixed(keys) >> self._shift).astype(np.int64)


def _mixed(keys: np.ndarray) -> np.ndarray:
    """Let every bit of a key reach the high bits of the result."""
    return (keys ^ (keys >> np.uint64(32))) * _MIX


def _scrambled(keys: np.ndarray) -> np.ndarray:
    """Let every bit of a key change every bit of the result with a chance near one half (MurmurHash3's last step)."""
    for factor in _SCRAMBLE:
        keys = (keys ^ (keys >> np.uint64(33))) * factor
    return keys ^ (keys >> np.uint64(33))


def hash_texts(texts: pa.Array, longest: int, mix: Callable[[np.ndarray], np.ndarray] = _scrambled) -> np.ndarray:
    """Hash strings by words of 8 bytes, on all machines alike.

    Two strings have one hash with a chance of 2⁻⁶⁴, unless somebody makes them so.

    Args:
        texts: strings ``[N]``.
        longest: those with more bytes are hashed by their lengths alone.
        mix: mixes the bits of uint64 ``[N]``; a faster one than the default makes likelier that two have one hash.

    Returns:
        uint64 ``[N]``.
    """
    _, offsets_buffer, data_buffer = texts.buffers()
    if not len(texts):
        return np.empty(0, dtype=np.uint64)
    offsets = np.frombuffer(offsets_buffer, dtype=np.int32)[texts.offset : texts.offset + len(texts) + 1].astype(np.int64)
    data = np.zeros(offsets[-1] - offsets[0] + _WORD, dtype=np.uint8)  # whole words may be read to the end
    if data_buffer is not None:
        data[:-_WORD] = np.frombuffer(data_buffer, dtype=np.uint8)[offsets[0] : offsets[-1]]
    words = np.ndarray((len(data) - _WORD + 1,), dtype="<u8", buffer=data, strides=(1,))
    starts, lengths = offsets[:-1] - offsets[0], np.diff(offsets)
    hashes = mix(lengths.astype(np.uint64))
    bytes_kept = np.array([(1 << 8 * n) - 1 for n in range(_WORD + 1)], dtype=np.uint64)
    rows = np.flatnonzero(lengths <= longest)
    for place in range(0, longest, _WORD):
        is_left = lengths[rows] > place
        if not is_left.all():  # among many short ones a long one costs what its own words do
            rows = rows[is_left]
            if not rows.size:
                break
        word = words[starts[rows] + place] & bytes_kept[np.minimum(lengths[rows] - place, _WORD)]
        hashes[rows] = mix(hashes[rows] ^ word)
    return hashes
