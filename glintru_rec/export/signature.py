"""The methods of an exported module, as its manifest describes them."""

from typing import Any

TOP_K = 100
"""Places of the lists that programs of ``pt2`` and ``aoti`` make."""


def signature(vector_dim: int, state_size: int, num_side: int = 0) -> dict[str, Any]:
    """Describe every method: T items of B histories, C candidates, n items; all of these may be 0. No state, no steps.

    What a method takes stands in the order in which it takes it.

    Args:
        vector_dim: numbers of a query or item vector.
        state_size: numbers of a user's state; 0 where the encoder is not recurrent.
        num_side: side features of an event; 0: the model reads none, and no method is given any.
    """
    side = [_tensor("side_ids", "int64", "T", num_side)] if num_side else []
    histories = [_tensor("item_ids", "int64", "T"), _tensor("lengths", "int64", "B")]
    candidates = [_tensor("candidates", "int64", "C"), _tensor("candidate_lengths", "int64", "B")]
    options = [{"name": "k", "dtype": "int"}, {"name": "exclude_seen", "dtype": "bool", "default": True}]
    query = _tensor("query", "float32", "B", vector_dim)
    seen = [_tensor("seen_ids", "int64", "T"), _tensor("seen_lengths", "int64", "B")]
    best = [_tensor("ids", "int64", "B", "k"), _tensor("scores", "float32", "B", "k")]
    vectors = _tensor("vectors", "float32", "n", vector_dim)
    methods: dict[str, Any] = {
        "open_items": {"inputs": [{"name": "folder", "dtype": "str"}], "outputs": []},
        "encode": {"inputs": histories + side, "outputs": [query]},
        "score": {"inputs": histories + candidates + side, "outputs": [_tensor("scores", "float32", "C")]},
        "top_k": {"inputs": histories + options + side, "outputs": best},
        "top_k_of": {"inputs": [query, *seen, options[0]], "outputs": best},
        "vectors_of": {"inputs": [_tensor("item_ids", "int64", "n")], "outputs": [vectors]},
    }
    if state_size:
        state = _tensor("state", "float32", "B", state_size)
        side_of_one = [_tensor("side_ids", "int64", "B", num_side)] if num_side else []
        methods |= {
            "init_state": {"inputs": [{"name": "batch_size", "dtype": "int"}], "outputs": [state]},
            "step": {"inputs": [_tensor("item_ids", "int64", "B"), state, *side_of_one], "outputs": [query, state]},
            "advance": {"inputs": [*histories, state, *side], "outputs": [query, state]},
        }
    return methods


def program_signature(vector_dim: int, state_size: int, table_dtype: str) -> dict[str, Any]:
    """Describe every program of ``pt2`` and ``aoti``: the item table first, V items; E seen items; a state begins as zeros."""
    items = _tensor("item_vectors", table_dtype, "V", vector_dim)
    seen = [_tensor("seen_ids", "int64", "E"), _tensor("seen_lengths", "int64", "B")]
    best = [_tensor("ids", "int64", "B", TOP_K), _tensor("scores", "float32", "B", TOP_K)]
    methods = signature(vector_dim, state_size)
    methods["top_k"] = {"inputs": methods["encode"]["inputs"] + seen, "outputs": best}
    return {
        name: {"inputs": [items, *methods[name]["inputs"]], "outputs": methods[name]["outputs"]}
        for name in ("encode", "score", "top_k", "step", "advance")
    }


def _tensor(name: str, dtype: str, *shape: str | int) -> dict[str, Any]:
    return {"name": name, "dtype": dtype, "shape": list(shape)}
