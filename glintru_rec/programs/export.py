"""The program export."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from glintru_rec.config import check, one_of
from glintru_rec.data.dataset import SequenceDataset
from glintru_rec.data.dataset_files import MANIFEST_FILE, fingerprint, read_manifest
from glintru_rec.data.side_features import SideVocabulary
from glintru_rec.errors import InputError
from glintru_rec.export.exporting import FORMATS, Validation, export_artifact
from glintru_rec.export.item_files import PRECISIONS
from glintru_rec.files import sha256_of
from glintru_rec.programs.launcher import write_config
from glintru_rec.ranking.exporting import export_ranking
from glintru_rec.tables.sharding import TABLE_KEY
from glintru_rec.training.build import PlainRun, dataset_seen_by, load_unsharded
from glintru_rec.training.checkpoint import RunState
from glintru_rec.training.processes import quiet_dependencies


@dataclass
class ExportDataConfig:
    """What a precision below fp32 is measured on.

    Attributes:
        path: the dataset that the run was trained on; where it is not said, the place that the run remembers.
    """

    path: str = ""


@dataclass
class ExportConfig:
    """An export of a run's best checkpoint.

    Attributes:
        checkpoint: a run directory, of a retrieval or a ranking model (the latter as ``torchscript`` in ``fp32`` only).
        output: the artifact's folder; it must not exist, or be empty.
        format: ``torchscript``, which the program score runs; or for servers, with one file for each method and for recurrent
            encoders only: ``pt2``, of torch.export, and ``aoti``, compiled by AOTInductor for this kind of machine (minutes).
        precision: of the item table: ``fp32``, ``fp16``, or ``int8`` with a scale and an offset for each row. The manifest says
            what that costs on the validation users: error of scores, overlap of the top 10 and 100, change of NDCG@10.
        max_ndcg_loss: a precision that loses more of NDCG@10, relative to fp32, is refused.
        validation_users: users that a precision is measured on, at most.
    """

    checkpoint: str = MISSING
    output: str = MISSING
    format: str = "torchscript"
    precision: str = "fp32"
    max_ndcg_loss: float = 0.005
    validation_users: int = 10_000
    data: ExportDataConfig = field(default_factory=ExportDataConfig)

    def __post_init__(self):
        one_of("format", self.format, FORMATS)
        one_of("precision", self.precision, PRECISIONS)
        check("max_ndcg_loss", self.max_ndcg_loss, 0 <= self.max_ndcg_loss <= 1, "from 0 to 1")
        check("validation_users", self.validation_users, self.validation_users >= 1, "at least 1")


def export_run(config: ExportConfig) -> None:
    """Write the artifact of a run's best checkpoint, and how far it is from the model."""
    quiet_dependencies()
    run_dir = Path(config.checkpoint)
    if task_of_run(run_dir) == "ranking":
        _export_ranking_run(config)
        return
    run = load_unsharded(run_dir)
    config_of_run, state, vocabulary, model, _ = run
    dataset = Path(config.data.path or config_of_run.data.path)
    side_vocabulary = SideVocabulary.load(run_dir)
    manifest = export_artifact(
        model.encoder,
        model.similarity,
        model.state_dict()[TABLE_KEY][: vocabulary.num_items, : model.vector_dim],
        vocabulary,
        config.output,
        max_seq_len=config_of_run.data.max_seq_len,
        encoder_config=asdict(config_of_run.model),
        provenance={
            "run": run_dir.name,
            "step": state.step,
            "valid_ndcg@10": state.value,
            "model_fingerprint": state.model_fingerprint,
            "dataset": {"name": dataset.name, "manifest_sha256": _fingerprint(dataset, state)},
        },
        precision=config.precision,
        format=config.format,
        validation=None if config.precision == "fp32" else _validation(config, dataset, run, side_vocabulary),
        side=model.side,
        side_vocabulary=side_vocabulary,
    )
    write_config(config, Path(config.output) / "export.config.yaml")
    for method, figures in manifest["parity"].items():
        if method == "tolerance":
            continue
        print(f"parity of {method:8} {figures['max_abs_difference']:.1e} at a scale of {figures['scale']:.1f}")
    if manifest["validation"]:
        _print_validation(manifest["validation"])
    print(f"written: {config.output}")


def task_of_run(run_dir: Path) -> str:
    """Give the task that a run directory's config names; ``retrieval`` where there is none to be read."""
    try:
        written = OmegaConf.load(run_dir / "config.yaml")
    except (OSError, ValueError, YAMLError, OmegaConfBaseException):
        return "retrieval"
    return str(written.get("task", "retrieval")) if isinstance(written, DictConfig) else "retrieval"


def _export_ranking_run(config: ExportConfig) -> None:
    for key, only in (("format", "torchscript"), ("precision", "fp32")):
        given = getattr(config, key)
        check(key, given, given == only, f"{only}, as checkpoint is a ranking run")
    manifest = export_ranking(config.checkpoint, config.output)
    write_config(config, Path(config.output) / "export.config.yaml")
    print(f"parity of predict {manifest['parity']['predict']:.1e}")
    print(f"written: {config.output}")


def _validation(config: ExportConfig, path: Path, run: PlainRun, side: SideVocabulary) -> Validation:
    if not (path / MANIFEST_FILE).is_file():
        raise InputError(
            f"precision={config.precision} is measured on the run's dataset, which is not at {str(path)!r}: give data.path=…"
        )
    dataset = SequenceDataset.open(path, side.names)
    seen = dataset_seen_by(run.config, run.state, run.checkpoint, dataset, Path(config.checkpoint))
    (cases,) = seen.case_blocks("valid")
    return Validation(cases, config.max_ndcg_loss, config.validation_users)


def _fingerprint(path: Path, state: RunState) -> str | None:
    """Give the checksum of a dataset's manifest; None where the dataset is gone or was prepared anew."""
    try:
        is_the_runs = fingerprint(read_manifest(path)) == state.vocabulary_sha256
    except InputError:
        return None
    return sha256_of(path / MANIFEST_FILE) if is_the_runs else None


def _print_validation(measured: dict[str, Any]) -> None:
    print(
        f"against fp32 on {measured['users']:,} validation users: NDCG@10 {measured['ndcg@10']:.4f} "
        f"({measured['ndcg@10_change']:+.2%}), overlap of the top 10 {measured['overlap@10']:.4f}, of the top 100 "
        f"{measured['overlap@100']:.4f}, error of scores {measured['score_error']:.1e} at a spread of "
        f"{measured['score_spread']:.1e}"
    )
