"""Export a trained ranking model (see `glintru_rec.export.ranking_artifact` for what comes out)."""

import importlib.metadata
import json
import platform
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchrec import KeyedJaggedTensor

from glintru_rec.config import from_yaml
from glintru_rec.errors import InputError
from glintru_rec.export.artifact import ARTIFACT_VERSION, MANIFEST_FILE, MODEL_FILE, load_script
from glintru_rec.export.parity import TOLERANCE
from glintru_rec.export.ranking_artifact import RANKING
from glintru_rec.files import check_free, folder_aside, sha256_of
from glintru_rec.ranking.batches import RankingBatch
from glintru_rec.ranking.build import build_ranking_model, task_weights, tower_features
from glintru_rec.ranking.config import RankingConfig
from glintru_rec.ranking.dataset import FEATURES_FILE, ITEM, ITEM_VOCABULARY_FILE, num_embeddings, vocabulary_file
from glintru_rec.ranking.model import RankingModel
from glintru_rec.ranking.scoring_module import RankingModule
from glintru_rec.ranking.tower import CANDIDATE
from glintru_rec.training.checkpoint import best_checkpoint, load_plain, read_state

_EXAMPLES = 16


def export_ranking(run_dir: str | Path, output: str | Path) -> dict[str, Any]:
    """Write the artifact of a ranking run's best checkpoint. It appears at ``output`` whole or not at all.

    Args:
        run_dir: what ``launch/train.py task=ranking`` wrote.
        output: folder to make; it must not exist, or be empty.

    Returns:
        The manifest.

    Raises:
        InputError: no run directory of a ranking model, or its parts do not belong together, or the output is taken.
        RuntimeError: the written module gives other predictions than the model.
    """
    run_dir, output = Path(run_dir), Path(output)
    check_free("output", output)
    checkpoint = best_checkpoint(run_dir)
    config, features, state = from_yaml(run_dir / "config.yaml", RankingConfig), _read_features(run_dir), read_state(checkpoint)
    if state.model_fingerprint != config.model_fingerprint():
        raise InputError(f"{checkpoint} was written by another model than {run_dir / 'config.yaml'} describes")
    if state.vocabulary_sha256 != sha256_of(run_dir / ITEM_VOCABULARY_FILE):
        raise InputError(f"{run_dir / ITEM_VOCABULARY_FILE} is not the vocabulary that the run was trained on")
    # The weights come from the checkpoint, wherever training began.
    plain = replace(config, tower=replace(config.tower, init_from="", frozen=False))
    model = build_ranking_model(plain, features, torch.device("cpu"))
    load_plain(checkpoint, model)
    model.eval().requires_grad_(False)
    tasks = {name: features["tasks"][name] for name in task_weights(config, features)}
    scales, sparse, sequence = features["dense"], num_embeddings(features, "sparse"), tower_features(config, features)
    module = RankingModule(
        model,
        [kind == "binary" for kind in tasks.values()],
        [scale["mean"] for scale in scales.values()],
        [scale["deviation"] for scale in scales.values()],
        config.data.max_seq_len,
    ).eval()
    sides = [f"sequence:{name}" for name in sequence if name != ITEM]
    vocabularies = {name: vocabulary_file(name) for name in [ITEM, *(f"sparse:{name}" for name in sparse), *sides]}
    with folder_aside(output) as folder:
        (folder / "vocabulary").mkdir()
        for file in vocabularies.values():
            shutil.copyfile(run_dir / file, folder / file)
        torch.jit.save(torch.jit.script(module), str(folder / MODEL_FILE))
        written = load_script(folder / MODEL_FILE)
        difference = _difference(written, model, module, sparse, sequence, len(scales), config.data.max_seq_len)
        if not difference <= TOLERANCE:  # true for NaN too
            raise RuntimeError(
                f"the exported model differs from the trained one by {difference:.3g} of a probability or of a number's "
                f"scale; at most {TOLERANCE} is allowed, so nothing was written"
            )
        names = [MODEL_FILE, *vocabularies.values()]
        manifest = {
            "artifact_version": ARTIFACT_VERSION,
            "task": RANKING,
            "format": "torchscript",
            "precision": "fp32",
            "signature": {"predict": _signature(len(scales), len(sparse), len(sides), list(tasks))},
            "tasks": tasks,
            "dense": scales,
            "has_tower": bool(sequence),
            "expressions": features["expressions"],
            "vocabularies": vocabularies,
            "num_items": features["num_embeddings"][ITEM] - 1,
            "vocabulary_sha256": state.vocabulary_sha256,
            "max_seq_len": config.data.max_seq_len,
            "encoder": asdict(plain.tower),
            "provenance": {"run": run_dir.name, "step": state.step, "valid": state.value},
            "versions": {
                "torch": torch.__version__,
                "glintru_rec": importlib.metadata.version("glintru_rec"),
                "python": platform.python_version(),
            },
            "parity": {"tolerance": TOLERANCE, "predict": difference},
            "files": {name: sha256_of(folder / name) for name in names},
            "bytes": {name: (folder / name).stat().st_size for name in names},
        }
        (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=2) + "\n")
    return manifest


def _read_features(run_dir: Path) -> dict[str, Any]:
    try:
        return json.loads((run_dir / FEATURES_FILE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(
            f"checkpoint={run_dir} has no readable {FEATURES_FILE}: {error}; train again, for older runs did not keep what "
            f"their features mean"
        ) from error


def _signature(num_dense: int, num_sparse: int, num_sides: int, tasks: list[str]) -> dict[str, Any]:
    """Describe `RankingModule.predict`: B examples, T events, N pooled ids."""
    shapes: dict[str, tuple[str, list[str | int]]] = {
        "dense": ("float64", ["B", num_dense]),
        "sparse_ids": ("int64", ["N"]),
        "sparse_lengths": ("int64", [num_sparse, "B"]),
        "events": ("int64", ["T", 1 + num_sides]),
        "lengths": ("int64", ["B"]),
        "candidates": ("int64", ["B"]),
    }
    inputs = [{"name": name, "dtype": dtype, "shape": shape} for name, (dtype, shape) in shapes.items()]
    return {"inputs": inputs, "outputs": [{"name": ", ".join(tasks), "dtype": "float32", "shape": ["B", len(tasks)]}]}


@torch.inference_mode()
def _difference(
    written: Any,
    model: RankingModel,
    module: RankingModule,
    sparse: dict[str, int],
    sequence: dict[str, int],
    num_dense: int,
    max_seq_len: int,
) -> float:
    """Compare the module with the eager model on random examples: one without a past, one with the longest."""
    generator = torch.Generator().manual_seed(0)

    def draw(size: int, rows: int) -> Tensor:
        return torch.randint(rows, (size,), generator=generator)

    scaled = torch.randn(_EXAMPLES, num_dense, generator=generator)
    pooled = {name: draw(_EXAMPLES, 4) for name in sparse}
    ids = {name: draw(int(pooled[name].sum()), rows) for name, rows in sparse.items()}
    lengths = draw(_EXAMPLES, max_seq_len + 1)
    lengths[:2] = torch.tensor([0, max_seq_len])
    events = {name: draw(int(lengths.sum()), rows) for name, rows in sequence.items()}
    candidates = draw(_EXAMPLES, sequence.get(ITEM, 1))
    histories = KeyedJaggedTensor(
        [*events, CANDIDATE],
        torch.cat([*events.values(), candidates]),
        lengths=torch.cat([*[lengths] * len(events), torch.ones_like(lengths)]),
    )
    no_ids = torch.empty(0, dtype=torch.int64)
    sparse_ids, sparse_lengths = torch.cat([no_ids, *ids.values()]), torch.cat([no_ids, *pooled.values()])
    batch = RankingBatch(
        scaled,
        KeyedJaggedTensor(list(sparse), sparse_ids, lengths=sparse_lengths),
        histories,
        lengths,
        torch.empty(0),
        torch.empty(0),
    )
    wanted = model(batch)
    wanted = torch.where(module.is_binary, wanted.sigmoid(), wanted)
    dense = scaled.double() * module.deviations + module.means
    columns = torch.stack(list(events.values()), dim=1) if events else torch.empty(0, 1, dtype=torch.int64)
    inputs = (dense, sparse_ids, sparse_lengths.view(len(sparse), _EXAMPLES), columns, lengths, candidates)
    # TorchScript watches a graph's first call and optimises it for the second; both must agree with the model.
    worst = max(float((written.predict(*inputs) - wanted).abs().max()) for _ in range(2))
    return worst / max(1.0, float(wanted.abs().max()))
