"""Ids are found by tables as a dictionary finds them."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glintru_rec.data import lookup
from glintru_rec.data.lookup import IntegerLookup, TextLookup, hash_texts

INT64 = st.integers(-(1 << 63), (1 << 63) - 1)
NUMBERS = st.one_of(INT64, st.integers(-9, 9))
# Of few letters, so that many are found, share beginnings or differ in the last byte only; a word of 8 bytes ends within some.
TEXTS = st.one_of(st.text("ab", max_size=20), st.text(max_size=9))


def check_integers(ids, wanted):
    places = {number: place for place, number in enumerate(ids)}
    found = IntegerLookup(np.array(ids, dtype=np.int64)).find(np.array(wanted, dtype=np.int64))
    assert found.dtype == np.int64
    assert found.tolist() == [places.get(number, -1) for number in wanted]


def check_texts(ids, wanted):
    places = {text: place for place, text in enumerate(ids)}
    found = TextLookup(pa.array(ids, pa.string())).find(pa.array(wanted, pa.string()))
    assert found.dtype == np.int64
    assert found.tolist() == [places.get(text, -1) for text in wanted]


@given(st.lists(NUMBERS, unique=True, max_size=40), st.lists(NUMBERS, max_size=40))
def test_integers(ids, others):
    check_integers(ids, ids + others + ids[::-1])


@given(st.lists(TEXTS, unique=True, max_size=40), st.lists(TEXTS | st.none(), max_size=40))
def test_texts(ids, others):
    check_texts(ids, ids + others + ids[::-1])


@pytest.mark.parametrize("step", [1, 3, 1 << 20, 1 << 40, (1 << 63) // 5000])
def test_many_integers_dense_and_far_apart(step):
    generator = np.random.default_rng(0)
    ids = (generator.permutation(5000) - 2500) * step
    check_integers(ids.tolist(), [*ids.tolist(), *(ids + 1).tolist(), -(1 << 63), (1 << 63) - 1])


def test_a_part_of_an_array_of_texts():
    found = TextLookup(pa.array(["x", "bb", "", "aaaaaaaaa"]).slice(1)).find(
        pa.array(["x", None, "aaaaaaaaa", "bb", ""]).slice(1)
    )
    assert found.tolist() == [-1, 2, 0, 1]


def test_a_hash_does_not_depend_on_the_texts_beside_it():
    texts = ["", "b", "12345678", "123456789", "long" * 75, "c", "too long" * 50, "more" * 20]
    together = hash_texts(pa.array(texts), 300)
    assert together.tolist() == [hash_texts(pa.array([text]), 300)[0] for text in texts]
    assert np.unique(together).size == len(texts)


def test_texts_with_one_hash_are_still_told_apart(monkeypatch):
    """Neither two ids of the list, nor an id of the list and a text that is not in it."""
    monkeypatch.setattr(lookup, "hash_texts", lambda texts, longest, mix: np.zeros(len(texts), dtype=np.uint64))
    check_texts(["a", "b"], ["b", "c", "a", None])
    check_texts(["a"], ["b", "a", None])
