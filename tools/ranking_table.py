"""What the sequence tower gives: the same ranking model with and without it, over seeds, in one table.

    python tools/ranking_table.py retrieval=RUN_DIR output=DIR [seeds=0,1,2] [jobs=1] [key=value ...]

``retrieval`` is a run of ``launch/train.py`` on the ranking dataset's ``train_log.parquet``, with the width of the tower. Any
other ``key=value`` goes to every training, ``experiment=ml100k_ranking`` unless told otherwise. Every model trains into
``DIR/MODEL/seed-N``; the same command again skips what is finished. Figures are the means over the seeds, and their
standard deviation, for the weights that were best on validation.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FIGURES = ("auc", "logloss", "gauc")


def models(retrieval: str) -> dict[str, list[str]]:
    """Give the rows of the table: name → overrides."""
    warm = f"tower.init_from={retrieval}"
    return {
        "no tower": ["tower=none"],
        "mean pooling": ["tower=mean"],
        "GLINT-RU from scratch": [],
        "GLINT-RU pre-trained, frozen": [warm, "tower.frozen=true"],
        "GLINT-RU pre-trained, fine-tuned": [warm, "tower.learning_rate_scale=0.3"],
    }


def train(output: Path, overrides: list[str]) -> dict:
    """Train one model with one seed, unless that is done; give its ``finished.json``."""
    finished = output / "finished.json"
    if not finished.exists():
        output.mkdir(parents=True, exist_ok=True)
        started = (output / "config.yaml").exists()
        command = [sys.executable, "-m", "launch.train", f"output={output}", *overrides]
        command += ["trainer.resume=true"] * started
        with output.with_name(f"{output.name}.log").open("a") as log:
            result = subprocess.run(command, stdout=log, stderr=log)
        if result.returncode:
            sys.exit(f"{' '.join(command[1:])} failed: see {log.name}")
    return json.loads(finished.read_text())


def table(results: dict[str, list[dict]]) -> str:
    """Write the figures of every model as Markdown: mean ± standard deviation over the seeds."""
    task = next(iter(next(iter(results.values()))[0]["test"])).split(".")[0]
    lines = [
        f"| model | {' | '.join(f'{name} (test)' for name in FIGURES)} | auc (valid) | seeds |",
        "| --- | --: | --: | --: | --: | --: |",
    ]
    for model, runs in results.items():
        cells = [spread([run["test"][f"{task}.{name}"] for run in runs]) for name in FIGURES]
        cells.append(spread([run["valid"][f"{task}.auc"] for run in runs]))
        lines.append(f"| {model} | {' | '.join(cells)} | {len(runs)} |")
    return "\n".join(lines) + "\n"


def spread(values: list[float]) -> str:
    """Write a mean, and a standard deviation where there is more than one value."""
    mean = f"{statistics.mean(values):.4f}".lstrip("0")
    return f"{mean} ± {statistics.stdev(values):.4f}".replace("± 0", "± ") if len(values) > 1 else mean


def main(arguments: list[str]) -> None:
    """Train what is missing and print the table."""
    own = dict(
        argument.split("=", 1) for argument in arguments if argument.split("=")[0] in ("retrieval", "output", "seeds", "jobs")
    )
    others = [argument for argument in arguments if argument.split("=")[0] not in own]
    if not {"retrieval", "output"} <= own.keys():
        sys.exit(__doc__)
    if not any(argument.startswith(("experiment=", "task=")) for argument in others):
        others.insert(0, "experiment=ml100k_ranking")
    seeds, output = [int(seed) for seed in own.get("seeds", "0,1,2").split(",")], Path(own["output"]).absolute()
    rows = models(str(Path(own["retrieval"]).absolute()))
    jobs = [(model, seed) for seed in seeds for model in rows]

    def run(job: tuple[str, int]) -> dict:
        model, seed = job
        folder = output / model.replace(" ", "_").replace(",", "") / f"seed-{seed}"
        return train(folder, [*others, *rows[model], f"trainer.seed={seed}"])

    os.chdir(Path(__file__).parents[1])
    with ThreadPoolExecutor(int(own.get("jobs", "1"))) as pool:
        finished = dict(zip(jobs, pool.map(run, jobs)))
    text = table({model: [finished[model, seed] for seed in seeds] for model in rows})
    (output / "table.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
