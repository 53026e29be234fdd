"""What `pip install` gives: public names, and programs with their configs, from a wheel and from an sdist."""

import ast
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

import glintru_rec
from tests.conftest import REPOSITORY


def test_public_names_are_those_that_type_checkers_know():
    tree = ast.parse((REPOSITORY / "glintru_rec" / "__init__.pyi").read_text())
    typed = {alias.name for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert typed == {*glintru_rec.__all__, *glintru_rec._ELSEWHERE}
    assert typed <= set(dir(glintru_rec))
    assert all(getattr(glintru_rec, name).__doc__ for name in typed)
    assert glintru_rec.__version__ == version("glintru_rec")
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        _ = glintru_rec.nonsense


def test_import_loads_torch_alone():
    """That is what makes it quick: everything else is loaded when it is asked for."""
    code = "import sys, torch; before = set(sys.modules); import glintru_rec; print(*sorted(set(sys.modules) - before))"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    loaded = {name.split(".")[0] for name in result.stdout.split()}
    assert loaded - set(sys.stdlib_module_names) <= {"glintru_rec", "torch"}, result.stderr


def run(*command: str, cwd: Path, **environment: str) -> str:
    result = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1", **environment}
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-3000:]
    return result.stdout


@pytest.mark.programs
def test_wheel_and_sdist_hold_programs_and_configs(tmp_path):
    """Both are built from a copy of the checkout; what the wheel holds, and nothing else, runs from another folder."""
    checkout, built = tmp_path / "checkout", tmp_path / "built"
    ignored = shutil.ignore_patterns(".*", "outputs", "build", "dist", "*.egg-info", "__pycache__", "tests")
    shutil.copytree(REPOSITORY, checkout, symlinks=True, ignore=ignored)
    build = "from setuptools import build_meta as b; print(b.build_sdist({0!r}), b.build_wheel({0!r}))".format(str(built))
    built.mkdir()
    run(sys.executable, "-c", build, cwd=checkout)
    (wheel,), (sdist,) = built.glob("*.whl"), built.glob("*.tar.gz")
    with tarfile.open(sdist) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    assert {"pyproject.toml", "glintru_rec/configs/train.yaml", "glintru_rec/configs/model/glint_ru.yaml"} <= names
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "site")
    configs = sorted(path.relative_to(REPOSITORY) for path in (REPOSITORY / "configs").rglob("*.yaml"))
    assert configs
    assert all((tmp_path / "site/glintru_rec" / path).is_file() for path in configs)
    assert (tmp_path / "site/glintru_rec/py.typed").is_file()
    site, elsewhere = str(tmp_path / "site"), tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = "import glintru_rec; print(glintru_rec.__file__)"
    assert run(sys.executable, "-c", where, cwd=elsewhere, PYTHONPATH=site).startswith(site)
    text = run(sys.executable, "-m", "launch.train", "--help", cwd=elsewhere, PYTHONPATH=site)
    assert "model=glint_lru|glint_ru|" in text
    assert "max_epochs: 20" in text
    torchx = [str(Path(sys.executable).parent / "torchx"), "run", "--dryrun", "-s", "local_cwd"]
    assert "launch.train" in run(*torchx, "launch/train.py", "data.path=d", cwd=elsewhere, PYTHONPATH=site)
