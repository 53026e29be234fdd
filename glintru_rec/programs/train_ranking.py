"""The program train, with ``task=ranking``."""

from pathlib import Path

import torch.distributed as dist

from glintru_rec.files import write_json
from glintru_rec.programs.train import STOPPED, check_free, restarted, start
from glintru_rec.ranking.config import RankingConfig
from glintru_rec.ranking.dataset import RankingDataset, check_features, keep_features
from glintru_rec.ranking.trainer import RankingTrainer
from glintru_rec.training.checkpoint import best_checkpoint, read_state
from glintru_rec.training.mlflow_log import check_loggers, check_reachable
from glintru_rec.training.processes import process_group
from glintru_rec.training.trainer import Stopped

__all__ = ["RankingConfig", "train_ranking"]


def train_ranking(config: RankingConfig) -> int:
    """Train a ranking model into the run directory ``config.output``; at the end, measure its best weights on the test.

    Returns:
        The exit status: 0, or `STOPPED` where a signal ended it early.
    """
    check_loggers(config.logging)
    run_dir = Path(config.output)
    resume = config.trainer.resume or restarted(run_dir)
    dataset = RankingDataset.open(config.data.path)
    with process_group(config.trainer.device, config.trainer.timeout_seconds) as device:
        check_free(run_dir, resume)
        check_reachable(config.logging)
        if resume:
            check_features(config.data.path, run_dir)
        trainer = RankingTrainer(config, dataset, device)
        if resume:
            trainer.resume()
        if dist.get_rank() == 0:
            start(run_dir, config)
            keep_features(config.data.path, run_dir)
        dist.barrier()
        try:
            state = trainer.fit()
        except Stopped as stopped:
            if dist.get_rank() == 0:
                print(stopped, flush=True)
            return STOPPED
        figures = {split: trainer.evaluate(split) for split in ("valid", "test")}
        if dist.get_rank() == 0:
            best_epoch = read_state(best_checkpoint(run_dir)).epoch
            write_json(run_dir / "finished.json", {"steps": state.step, "best_epoch": best_epoch, **figures})
            for split, metrics in figures.items():
                print(split.ljust(6) + "  ".join(f"{name} {figure:.4f}" for name, figure in metrics.items()))
            print(f"done: {state.step} steps; best at step {state.best_step}; {run_dir}")
    return 0
