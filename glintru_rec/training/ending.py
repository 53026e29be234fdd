"""How a run ends: what it says of itself in ``finished.json``."""

import sys
from pathlib import Path

from glintru_rec.files import write_json
from glintru_rec.model import SequenceModel
from glintru_rec.training.checkpoint import RunState, list_checkpoints, rank_checkpoints, read_state
from glintru_rec.training.summary import count_parameters, summarize_records


def write_finished(run_dir: Path, state: RunState, model: SequenceModel, num_items: int) -> None:
    """Write ``finished.json``: how the run went, all its parts together.

    Where the checkpoint of the best validation could not be written, that is said, and ``state`` then names the best there is.

    Args:
        run_dir: with ``metrics.jsonl`` closed.
        state: at the end.
        model: that was trained.
        num_items: size of the catalog.
    """
    best = read_state(rank_checkpoints(list_checkpoints(run_dir))[0])
    if best.step != state.best_step and best.value is not None:
        lost = f"the checkpoint of step {state.best_step}, ndcg@10 {state.best_value:.4f}, could not be written"
        print(f"warning: {lost}; the best there is: step {best.step}, {best.value:.4f}", file=sys.stderr, flush=True)
        state.best_step, state.best_value = best.step, best.value
    summary = {
        "steps": state.step,
        "epochs": state.epoch,
        "best_step": state.best_step,
        "valid_ndcg@10": state.best_value,
        **summarize_records(run_dir / "metrics.jsonl", state.best_step),
        "num_parameters": count_parameters(model, num_items),
    }
    write_json(run_dir / "finished.json", summary)
