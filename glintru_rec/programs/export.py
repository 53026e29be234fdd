"""The program export."""

from dataclasses import asdict, dataclass
from pathlib import Path

from omegaconf import MISSING

from glintru_rec.export.artifact import export_artifact
from glintru_rec.programs.launcher import write_config
from glintru_rec.tables.sharding import TABLE_KEY
from glintru_rec.training.build import load_unsharded
from glintru_rec.training.processes import quiet_dependencies


@dataclass
class ExportConfig:
    """An export of a run's best checkpoint.

    Attributes:
        checkpoint: a run directory.
        output: the artifact's folder; it must not exist, or be empty.
    """

    checkpoint: str = MISSING
    output: str = MISSING


def export_run(config: ExportConfig) -> None:
    """Write the artifact of a run's best checkpoint, and how far it is from the model."""
    quiet_dependencies()
    config_of_run, state, vocabulary, model = load_unsharded(Path(config.checkpoint))
    manifest = export_artifact(
        model.encoder,
        model.similarity,
        model.state_dict()[TABLE_KEY][:, : model.vector_dim],
        vocabulary,
        config.output,
        max_seq_len=config_of_run.data.max_seq_len,
        encoder_config=asdict(config_of_run.model),
        provenance={"run": Path(config.checkpoint).name, "step": state.step, "valid_ndcg@10": state.best_value},
    )
    write_config(config, Path(config.output) / "export.config.yaml")
    for method, figures in manifest["parity"].items():
        if method == "tolerance":
            continue
        print(f"parity of {method:8} {figures['max_abs_difference']:.1e} at a scale of {figures['scale']:.1f}")
    print(f"written: {config.output}")
