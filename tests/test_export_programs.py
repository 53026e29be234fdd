"""One table of parity: what was exported, in every format, is the eager model, in a process where only torch is installed.

So is a module around a compiled encoder, in this process: torch.compile writes no file.
"""

import json
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest
import torch
from torch import nn

from glintru_rec.data.vocabulary import Vocabulary
from glintru_rec.encoders import Ensemble, GlintRU, LRURec, RecGRELA, SASRec
from glintru_rec.errors import InputError
from glintru_rec.export import Artifact, export_artifact
from glintru_rec.export.recurrent_module import RecurrentScoringModule
from glintru_rec.jagged import keep_last, offsets_from_lengths
from glintru_rec.model import SequenceModel

NUM_ITEMS, WIDTH, MAX_SEQ_LEN = 150, 8, 80
VOCABULARY = Vocabulary(pa.array(np.arange(NUM_ITEMS)), np.ones(NUM_ITEMS, dtype=np.int64))
ENCODERS = {
    "glint_ru": lambda: GlintRU(WIDTH, num_heads=2),
    "light": lambda: GlintRU(WIDTH, num_heads=2, gated_mlp=False),
    "bidirectional": lambda: GlintRU(WIDTH, num_heads=2, causal=False),
    "rec_grela": lambda: RecGRELA(WIDTH, num_blocks=1, num_heads=2),
    "lru_rec": lambda: LRURec(WIDTH, num_blocks=1),
    "ensemble": lambda: Ensemble([GlintRU(WIDTH // 2, num_heads=2), LRURec(WIDTH // 2, num_blocks=1)]),
    "sasrec": lambda: SASRec(WIDTH, num_blocks=1, max_seq_len=MAX_SEQ_LEN),
}
SCRIPTED = [("glint_ru", "dot"), ("light", "cosine"), ("bidirectional", "dot")]
SCRIPTED += [("rec_grela", "dot"), ("lru_rec", "bias"), ("ensemble", "dot"), ("sasrec", "dot")]
# Tracing takes 12 to 20 seconds an encoder, compiling 40. The other two are refused: they have no step, or no shapes to export.
TRACED = [("light", "cosine"), ("rec_grela", "dot"), ("lru_rec", "bias"), ("ensemble", "dot")]
COMPILED = [("glint_ru", "dot"), ("rec_grela", "dot"), ("lru_rec", "dot")]
CASES = [("torchscript", *case) for case in SCRIPTED]
CASES += [("pt2", *case) for case in TRACED] + [("aoti", *case) for case in COMPILED]
CASES += [("compiled", *case) for case in TRACED]
BATCHES = {
    "none": [],
    "one": [17],
    "empty": [0, 0],
    "seven": [0, 1, 5000, 2, 63, 64, 65],
    "thousand": [n % 4 for n in range(1000)],
}

FRESH = """
import json
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("glintru_rec", "torchrec", "fbgemm_gpu", "pyarrow"):
            raise ImportError(name)

sys.meta_path.insert(0, Blocked())
import numpy as np
import torch

torch.set_num_threads(1)
batches = torch.load("batches.pt")
outputs = {}
with torch.inference_mode():
    for folder in sys.argv[1:]:
        manifest = json.load(open(f"{folder}/manifest.json"))
        recurrent = "step" in manifest["signature"]
        if manifest["format"] == "torchscript":
            module = torch.jit.load(f"{folder}/model.pt")
            module.open_items(folder)
            run = {name: getattr(module, name) for name in manifest["signature"]}
            items, top_k = [], lambda ids, lengths: run["top_k"](ids, lengths, 100)
        else:
            items = [torch.from_numpy(np.load(f"{folder}/item_vectors.npy"))]
            files = {name: f"{folder}/{name}.pt2" for name in manifest["signature"]}
            if manifest["format"] == "pt2":
                run = {name: torch.export.load(file).module() for name, file in files.items()}
            else:
                run = {name: torch._inductor.aoti_load_package(file) for name, file in files.items()}
            top_k = lambda ids, lengths: run["top_k"](*items, ids, lengths, ids, lengths)
        for name, (ids, lengths, candidates, candidate_lengths, new_ids) in batches[manifest["format"]].items():
            out = outputs[folder, name] = {
                "encode": run["encode"](*items, ids, lengths),
                "score": run["score"](*items, ids, lengths, candidates, candidate_lengths),
                "top_k": top_k(ids, lengths),
            }
            if recurrent:
                (state,) = [size for size in manifest["signature"]["step"]["inputs"] if size["name"] == "state"]
                state = torch.zeros(len(lengths), state["shape"][1])
                out["advance"], state = run["advance"](*items, ids, lengths, state)
                out["step"], _ = run["step"](*items, new_ids, state)
torch.save(outputs, "outputs.pt")
"""


class PlainTable(nn.Module):
    def __init__(self, rows):
        super().__init__()
        self.rows = rows

    def forward(self, item_ids, more_ids):
        return self.rows[item_ids], self.rows[more_ids]


def make_model(encoder, kind):
    torch.manual_seed(0)
    made = ENCODERS[encoder]().eval().requires_grad_(False)
    table = PlainTable(torch.randn(NUM_ITEMS, WIDTH + (kind == "bias")))
    return SequenceModel(table, made, "cosine" if kind == "cosine" else "dot", kind == "bias").eval()


def make_batch(lengths):
    lengths = torch.tensor(lengths, dtype=torch.int64)
    generator = torch.Generator().manual_seed(len(lengths))
    candidate_lengths = torch.arange(lengths.numel()) % 3
    sizes = (int(lengths.sum()), int(candidate_lengths.sum()), lengths.numel())
    ids, candidates, new_ids = (torch.randint(NUM_ITEMS, (size,), generator=generator) for size in sizes)
    return ids, lengths, candidates, candidate_lengths, new_ids


def batches_of(format):
    longest = 200 if format == "pt2" else 5000  # a step of an uncompiled loop takes a millisecond
    return {name: make_batch([min(length, longest) for length in lengths]) for name, lengths in BATCHES.items()}


def export(model, path, format, **changes):
    arguments = {"max_seq_len": MAX_SEQ_LEN, "encoder_config": {}, "provenance": {}, "format": format}
    return export_artifact(model.encoder, model.similarity, model.table.rows, VOCABULARY, path, **(arguments | changes))


def query_of(model, ids, lengths):
    return model.encode(*keep_last(ids, offsets_from_lengths(lengths), MAX_SEQ_LEN), ids[:0])[0]


@torch.inference_mode()
def run_compiled(encoder, kind):
    """What FRESH makes of an artifact, of the module that is scripted, with the encoder compiled as training compiles it."""
    model = make_model(encoder, kind)
    model.encoder.compile(fullgraph=True, dynamic=True)
    model.encoder.step = torch.compile(model.encoder.step, fullgraph=True, dynamic=True)
    module = RecurrentScoringModule(model.encoder, model.table.rows, model.similarity, MAX_SEQ_LEN)
    outputs = {}
    for name, (ids, lengths, candidates, candidate_lengths, new_ids) in batches_of("compiled").items():
        out = outputs[f"compiled-{encoder}", name] = {
            "encode": module.encode(ids, lengths),
            "score": module.score(ids, lengths, candidates, candidate_lengths),
            "top_k": module.top_k(ids, lengths, 100),
        }
        out["advance"], state = module.advance(ids, lengths, module.init_state(len(lengths)))
        out["step"], _ = module.step(new_ids, state)
    return outputs


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What a process without the package made of every artifact, and this one of compiled encoders."""
    folder = tmp_path_factory.mktemp("programs")
    compiled = {}
    for format, encoder, kind in CASES:
        if format == "compiled":
            compiled |= run_compiled(encoder, kind)
            continue
        export(make_model(encoder, kind), folder / f"{format}-{encoder}", format)
    torch.save({format: batches_of(format) for format in ("torchscript", "pt2", "aoti")}, folder / "batches.pt")
    (folder / "fresh.py").write_text(FRESH)
    names = [f"{format}-{encoder}" for format, encoder, _ in CASES if format != "compiled"]
    subprocess.run([sys.executable, "-I", "fresh.py", *names], cwd=folder, check=True)
    return folder, torch.load(folder / "outputs.pt") | compiled


@pytest.mark.programs
@pytest.mark.parametrize(("format", "encoder", "kind"), CASES)
@torch.no_grad()
def test_every_method_gives_what_the_model_gives(format, encoder, kind, outputs):
    model = make_model(encoder, kind)
    vectors = model.item_vectors(model.table.rows)
    for name, (ids, lengths, candidates, candidate_lengths, new_ids) in batches_of(format).items():
        out = outputs[1][f"{format}-{encoder}", name]
        query = query_of(model, ids, lengths)
        scores = query @ vectors.t()
        scale = max([1.0, *scores.abs().flatten().tolist()])
        close = {"rtol": 0, "atol": 1e-5 * scale}
        torch.testing.assert_close(out["encode"], query, **close)
        users = torch.arange(len(lengths)).repeat_interleave(candidate_lengths)
        torch.testing.assert_close(out["score"], scores[users, candidates], **close)
        scores[torch.arange(len(lengths)).repeat_interleave(lengths), ids] = -torch.inf
        top_ids, top_scores = out["top_k"]
        expected = scores.sort(dim=1, descending=True).values[:, :100]
        torch.testing.assert_close(top_scores, expected, **close)
        assert torch.equal(top_ids >= 0, expected.isfinite())
        at_ids = scores.gather(1, top_ids.clamp(min=0)).where(top_ids >= 0, -torch.inf)
        torch.testing.assert_close(at_ids, expected, **close)
        assert ("step" in out) == model.encoder.recurrent
        if model.encoder.recurrent:
            # A state knows the whole history; `encode` its last MAX_SEQ_LEN items.
            torch.testing.assert_close(out["advance"], model.encode(ids, offsets_from_lengths(lengths), ids[:0])[0], **close)
            histories = [torch.cat(pair) for pair in zip(ids.split(lengths.tolist()), new_ids.split(1))]
            longer = torch.cat(histories) if histories else new_ids
            truth = model.encode(longer, offsets_from_lengths(lengths + 1), ids[:0])[0]
            torch.testing.assert_close(out["step"], truth, **close)


@pytest.mark.programs
def test_manifest_names_the_programs(outputs):
    folder = outputs[0] / "pt2-light"
    manifest = json.loads((folder / "manifest.json").read_text())
    programs = {f"{method}.pt2" for method in manifest["signature"]}
    assert set(manifest["files"]) == programs | {"item_vectors.npy", "inverse_norms.npy", "vocabulary/items.parquet"}
    assert manifest["format"] == "pt2"
    assert manifest["signature"]["encode"]["inputs"][0] == {
        "name": "item_vectors",
        "dtype": "float32",
        "shape": ["V", WIDTH],
    }
    with pytest.raises(InputError, match="has format 'pt2'; this program runs torchscript"):
        Artifact.load(folder)


@pytest.mark.parametrize("format", ["pt2", "aoti"])
def test_what_programs_cannot_hold_is_refused(format, tmp_path):
    for encoder, name in (("sasrec", "SASRec"), ("bidirectional", "GlintRU")):
        with pytest.raises(InputError, match=f"format={format} cannot hold {name} .* export format=torchscript"):
            export(make_model(encoder, "dot"), tmp_path / "artifact", format)
    with pytest.raises(InputError, match="format is 'onnx'; it must be one of torchscript, pt2, aoti"):
        export(make_model("lru_rec", "dot"), tmp_path / "artifact", "onnx")
    assert list(tmp_path.iterdir()) == []
