"""Say what `make train` made, and where: python tools/summary.py outputs/ml100k."""

import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table


def main(folder: Path) -> None:
    """Print one row per thing made."""

    def read(name: str) -> dict:
        return json.loads((folder / name).read_text())

    dataset, finished, evaluation = read("dataset/manifest.json"), read("run/finished.json"), read("evaluation.json")
    artifact, scores, metrics = read("artifact/manifest.json"), read("scores/report.json"), evaluation["metrics"]
    size = sum(file.stat().st_size for file in (folder / "artifact").rglob("*") if file.is_file())
    table = Table("what", "where", "figures")
    rows = [
        (
            "dataset",
            "dataset",
            f"{dataset['num_users']:,} users, {dataset['num_items']:,} items, {dataset['num_events']:,} events",
        ),
        ("training run", "run", f"{finished['epochs']} epochs, valid ndcg@10 {finished['valid_ndcg@10']:.4f}"),
        (
            "test figures",
            "evaluation.json",
            f"hr@10 {metrics['hr@10']:.4f}, ndcg@10 {metrics['ndcg@10']:.4f}, mrr@10 {metrics['mrr@10']:.4f}",
        ),
        ("artifact", "artifact", f"{artifact['format']}, {artifact['precision']}, {size / 2**20:.1f} MiB"),
        ("ranked candidates", "scores", f"{scores['rows_scored']:,} of {scores['rows_in']:,} users"),
    ]
    for what, where, figures in rows:
        table.add_row(what, str(folder / where), figures)
    Console(width=140).print(table)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
