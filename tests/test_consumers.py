"""The example programs around an artifact: built and run, against the artifact's own methods."""

import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch

from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders import GlintRU
from glintru_rec.export import Artifact, export_artifact
from tests.conftest import REPOSITORY, environment

NUM_ITEMS, WIDTH = 50, 8
CONSUMERS = REPOSITORY / "docs/consumers"
HISTORIES = [[3, 14, 15], [], [9] * 40]

pytestmark = pytest.mark.programs


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("consumers") / "artifact"
    vocabulary = Vocabulary(pa.array([f"item-{i}" for i in range(NUM_ITEMS)]), np.ones(NUM_ITEMS, dtype=np.int64))
    about = {"max_seq_len": 20, "encoder_config": {}, "provenance": {}}
    export_artifact(GlintRU(WIDTH), "dot", torch.randn(NUM_ITEMS, WIDTH), vocabulary, path, **about)
    return path


def run(*command, lines=""):
    return subprocess.run(command, input=lines, capture_output=True, text=True, timeout=300, env=environment())


def check(output, artifact, names):
    """Lists of a program's output are those of the artifact's methods."""
    module = Artifact.load(artifact).module
    lengths = torch.tensor([len(history) for history in HISTORIES])
    item_ids = torch.tensor([item for history in HISTORIES for item in history])
    ids, scores = module.top_k(item_ids, lengths, 5)
    lines = [[entry.rsplit(":", 1) for entry in line.split()] for line in output.splitlines()]
    assert [[name for name, _ in line] for line in lines] == [[names(place) for place in row] for row in ids.tolist()]
    given = torch.tensor([[float(score) for _, score in line] for line in lines])
    torch.testing.assert_close(given, scores, rtol=1e-5, atol=1e-6)  # printed with six digits


def test_python(artifact):
    lines = "\n".join(" ".join(f"item-{item}" for item in [*history, 999]) for history in HISTORIES)
    result = run(sys.executable, "-I", CONSUMERS / "top_k.py", str(artifact), "5", lines=lines)
    assert result.returncode == 0, result.stderr
    check(result.stdout, artifact, lambda place: f"item-{place}")


def test_cpp(artifact, tmp_path):
    configured = run("cmake", "-S", CONSUMERS, "-B", tmp_path, f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}")
    assert configured.returncode == 0, configured.stdout + configured.stderr
    built = run("cmake", "--build", tmp_path)
    assert built.returncode == 0, built.stdout + built.stderr
    lines = "".join(" ".join(map(str, history)) + "\n" for history in HISTORIES)
    result = run(tmp_path / "top_k", artifact, "5", lines=lines)
    assert result.returncode == 0, result.stderr
    check(result.stdout, artifact, str)
    refused = run(tmp_path / "top_k", artifact / "nowhere", "5")
    assert (refused.returncode, refused.stderr[:6]) == (1, "error:")
