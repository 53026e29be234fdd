"""The documentation is true: the code of its pages runs in order, links lead somewhere, every config key is described."""

import re
import subprocess
import sys
from runpy import run_path

import pytest

import glintru_rec
from tests.conftest import REPOSITORY, environment

DOCS = REPOSITORY / "docs"
# In this order: later pages use what the quickstart made. Blocks that need MovieLens or a GPU are marked as text.
PAGES = (
    "quickstart",
    "data",
    "side_features",
    "losses",
    "catalogs",
    "changing_catalogs",
    "checkpoints",
    "search",
    "evaluation",
    "scoring",
    "streaming",
    "ranking",
    "published",
)

# Runs the programs that a page's commands name in this one process: they are the same, without ten imports of torch. What
# TorchX and several ranks add has tests of its own, so here `--nproc` is left out; trainings are short.
RUNNER = """
import json, os, runpy, shlex, subprocess, sys, time, traceback

repository, blocks = sys.argv[1], json.load(sys.stdin)
sys.path.insert(0, repository)
sys.path.insert(0, os.path.join(repository, "tools"))
short = ["trainer.max_steps=12", "model.embedding_dim=16", "trainer.batch_targets=256", "data.max_seq_len=30"]

def program(words):
    if "--dryrun" in words:
        subprocess.run(words, check=True, stdout=subprocess.DEVNULL, cwd=repository)
        return
    if words[0] == "torchx":
        name, rest = words[2], words[3:]
        if rest[0] == "--nproc":
            rest = rest[2:]
        if name == "launch/train.py" and "task=ranking" not in rest:
            rest += short
        run = lambda: runpy.run_module(name[:-3].replace("/", "."), run_name="__main__")
    else:
        name, rest = words[1], words[2:]
        if name == "tools/sweep.py":
            rest += short
        run = lambda: runpy.run_path(os.path.join(repository, name), run_name="__main__")
    sys.argv = [name, *rest]
    try:
        run()
    except SystemExit as end:
        assert not end.code, f"exit status {end.code}: {shlex.join(words)}"

for page, language, text in blocks:
    start = time.process_time()
    try:
        if language == "python":
            exec(compile(text, page, "exec"), {"__name__": "page"})
        else:
            for line in text.replace("\\\\\\n", " ").splitlines():
                program(shlex.split(line, comments=True))
    except BaseException:
        traceback.print_exc()
        sys.exit(f"{page}: this block does not run:\\n{text}")
    print(f"ran {page} {language} {time.process_time() - start:.1f} s of CPU", flush=True)
"""


def blocks_of(page: str) -> list[tuple[str, str, str]]:
    """The page's fenced blocks that are to run: page, language, text."""
    text = (DOCS / f"{page}.md").read_text()
    found = re.findall(r"^```(\S*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    assert {language for language, _ in found} <= {"python", "sh", "text", "{toctree}", "{eval-rst}"}, page
    return [(page, language, code) for language, code in found if language in ("python", "sh")]


@pytest.mark.programs
def test_the_code_of_all_pages_runs(tmp_path):
    import json

    blocks = [block for page in PAGES for block in blocks_of(page)]
    command = [sys.executable, "-c", RUNNER, str(REPOSITORY)]
    env = {**environment(), "MLFLOW_DISABLE_TELEMETRY": "true"}
    result = subprocess.run(
        command, cwd=tmp_path, input=json.dumps(blocks), capture_output=True, text=True, timeout=600, env=env
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    assert len(re.findall(r"^ran ", result.stdout, re.MULTILINE)) == len(blocks), result.stdout[-2000:]


def test_every_page_has_its_place_and_links_lead_somewhere():
    index = (DOCS / "index.md").read_text()
    pages = {path.stem for path in DOCS.glob("*.md")} | {"config"}
    listed = {
        line for block in re.findall(r"```{toctree}(.*?)```", index, re.DOTALL) for line in block.split() if line in pages
    }
    assert listed == pages - {"index"}
    assert {page for page in pages - {"config"} if blocks_of(page)} == set(PAGES)
    for path in [REPOSITORY / "README.md", *DOCS.glob("*.md")]:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text()):
            generated = path.parent == DOCS and target == "config.md"
            assert generated or (path.parent / target).exists(), f"{path.name}: {target}"


def test_every_public_name_is_in_the_reference():
    text = (DOCS / "api.md").read_text()
    for name in {*glintru_rec.__all__, *glintru_rec._ELSEWHERE}:
        assert re.search(rf"^\.\. auto\w+:: glintru_rec\.[\w.]*\b{name}$", text, re.MULTILINE), name


def test_every_key_is_described():
    """Of all programs, with type, unit and default; the reference page is made of nothing else."""
    reference = run_path(str(REPOSITORY / "tools" / "config_reference.py"))
    text = reference["to_markdown"]()
    for program, schema in reference["PROGRAMS"].items():
        keys = list(reference["keys_of"](schema))
        assert keys, program
        for key in keys:
            assert key.meaning, (program, key.name)
            assert f"| `{key.name}` | `{key.kind}` | {key.unit} | `{key.default}` |" in text
    keys = {key.name: key for key in reference["keys_of"](reference["PROGRAMS"]["train"])}
    assert keys["data.path"].default == "must be given"
    assert keys["loss.num_negatives"][1:4] == ("int", "1024", "items")
    assert keys["trainer.timeout_seconds"].unit == "s"
    assert keys["table.topology.memory_gib"].unit == "GiB"
    assert keys["trainer.checkpoint_in_background"].meaning.startswith("training goes on while")
    assert "| `model` | `glint_ru` | GLINT-RU: linear attention" in text


def test_a_key_without_description_is_noticed():
    from dataclasses import dataclass

    @dataclass
    class Config:
        """A config.

        Attributes:
            known: this one.
        """

        known: int = 1
        unknown: int = 2

    reference = run_path(str(REPOSITORY / "tools" / "config_reference.py"))
    with pytest.raises(KeyError, match="unknown"):
        list(reference["keys_of"](Config))
