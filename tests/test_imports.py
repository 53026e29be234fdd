"""Imports point down only, and the torch-only floors stand on torch alone."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]

# The longest prefix of a module's name decides.
FLOORS = {
    "glintru_rec.jagged": 0,
    "glintru_rec.config": 0,
    "glintru_rec.errors": 0,
    "glintru_rec.files": 0,
    "glintru_rec.progress": 0,
    "glintru_rec.ops": 1,
    "glintru_rec.encoders": 2,
    "glintru_rec": 2,  # the package's own names are the encoders
    "glintru_rec.losses": 3,
    "glintru_rec.metrics": 3,
    "glintru_rec.candidates": 3,
    "glintru_rec.memory": 4,
    "glintru_rec.model": 4,
    "glintru_rec.data": 4,
    "glintru_rec.tables": 4,
    "glintru_rec.training": 5,
    "glintru_rec.scoring": 5,
    "glintru_rec.export": 5,
    "glintru_rec.ranking": 5,
    "glintru_rec.programs": 6,
    "launch": 6,
}


class Import(NamedTuple):
    module: str
    """Where the import stands."""
    target: str
    """What it names: a module, or a name in one."""
    at_start: bool
    """Whether it runs when the module is imported: not in a function, nor for the type checker alone."""


def modules() -> dict[str, Path]:
    paths = [path for top in ("glintru_rec", "launch") for path in sorted((REPOSITORY / top).rglob("*.py"))]
    names = [".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__") for path in paths]
    return dict(zip(names, paths))


MODULES = modules()


def imports_of(module: str, tree: ast.AST, is_package: bool) -> Iterator[Import]:
    def walk(node: ast.AST, at_start: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(module, alias.name, at_start) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                base = child.module or ""
                if child.level:
                    parents = module.split(".")[: len(module.split(".")) - child.level + is_package]
                    base = ".".join([*parents, *([base] if base else [])])
                yield from (Import(module, f"{base}.{alias.name}", at_start) for alias in child.names)
            else:
                is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
                for_types = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
                yield from walk(child, at_start and not is_function and not for_types)

    yield from walk(tree, True)


IMPORTS = [
    found
    for module, path in MODULES.items()
    for found in imports_of(module, ast.parse(path.read_text()), path.name == "__init__.py")
]


def longest(name: str, known) -> str | None:
    parts = name.split(".")
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in known), None)


def floor(module: str) -> int:
    if module == "glintru_rec":
        return FLOORS["glintru_rec"]
    owner = longest(module, FLOORS)
    if owner in (None, "glintru_rec"):
        pytest.fail(f"{module} stands on no floor: add it to FLOORS")
    return FLOORS[owner]


def is_torch_only(module: str) -> bool:
    return (floor(module) <= 3 or module == "glintru_rec.model") and not is_kernels(module)


def is_kernels(module: str) -> bool:
    """Whether a module holds Triton kernels: it stands on torch and triton."""
    return module.startswith("glintru_rec.ops.triton_")


def test_the_walk_reads_every_form_of_import():
    source = """
import os, a.b as c
from x.y import z
from . import near
from .. import far
from ..other import name
if TYPE_CHECKING:
    import types_only
try:
    import tried
except ImportError:
    pass
class Class:
    import in_class
    def method(self):
        from late import later
"""
    found = list(imports_of("p.q.r", ast.parse(source), is_package=False))
    assert [(each.target, each.at_start) for each in found] == [
        ("os", True),
        ("a.b", True),
        ("x.y.z", True),
        ("p.q.near", True),
        ("p.far", True),
        ("p.other.name", True),
        ("types_only", False),
        ("tried", True),
        ("in_class", True),
        ("late.later", False),
    ]
    (found,) = imports_of("p.q", ast.parse("from .r import s"), is_package=True)
    assert found.target == "p.q.r.s"


def test_every_module_has_a_floor():
    assert {floor(module) for module in MODULES} == {0, 1, 2, 3, 4, 5, 6}


def test_imports_point_down():
    own = [
        (found, longest(found.target, MODULES)) for found in IMPORTS if found.target.split(".")[0] in ("glintru_rec", "launch")
    ]
    assert len(own) > 50
    missing = [f"{found.module} imports {found.target}" for found, target in own if target in (None, "glintru_rec", "launch")]
    assert [line for line in missing if not line.endswith("imports glintru_rec.GlintRU")] == []
    upward = [
        f"{found.module} (floor {floor(found.module)}) imports {target} (floor {floor(target)})"
        for found, target in own
        if target is not None and floor(target) > floor(found.module)
    ]
    assert upward == []


def test_lower_floors_and_the_model_import_torch_alone():
    allowed = {*sys.stdlib_module_names, "torch", "glintru_rec"}
    checked = [found for found in IMPORTS if found.at_start and is_torch_only(found.module)]
    assert {"glintru_rec.jagged", "glintru_rec.model", "glintru_rec.encoders.glint_ru"} <= {found.module for found in checked}
    others = [f"{found.module} imports {found.target}" for found in checked if found.target.split(".")[0] not in allowed]
    assert others == []


def test_only_kernels_need_triton():
    """What holds them starts from torch and triton, and no other module imports them, or triton, when it is imported."""
    kernels = [found for found in IMPORTS if found.at_start and is_kernels(found.module)]
    assert {"triton", "triton.language"} <= {found.target for found in kernels}
    allowed = {*sys.stdlib_module_names, "torch", "triton", "glintru_rec"}
    assert [f"{found.module} imports {found.target}" for found in kernels if found.target.split(".")[0] not in allowed] == []
    others = [found for found in IMPORTS if found.at_start and not is_kernels(found.module)]
    wrong = [found for found in others if found.target.split(".")[0] == "triton" or "ops.triton_" in found.target]
    assert [f"{found.module} imports {found.target}" for found in wrong] == []


def type_annotations(tree: ast.AST) -> set[ast.AST]:
    """All nodes inside annotations."""
    roots = [getattr(node, field, None) for node in ast.walk(tree) for field in ("annotation", "returns")]
    return {inner for root in roots if root is not None for inner in ast.walk(root)}


def test_only_the_tables_know_torchrec_distributed():
    """Others may name its types in annotations, and do nothing with them."""
    known = [found for found in IMPORTS if found.target.startswith("torchrec.distributed")]
    assert any(found.module.startswith("glintru_rec.tables.") for found in known)
    wrong = []
    for found in known:
        if found.module.startswith("glintru_rec.tables."):
            continue
        tree = ast.parse(MODULES[found.module].read_text())
        name = found.target.split(".")[-1]
        uses = {node for node in ast.walk(tree) if isinstance(node, ast.Name) and node.id == name}
        if not uses or uses - type_annotations(tree):
            wrong.append(f"{found.module} imports {found.target}")
    assert wrong == []


BLOCKED = ("torchrec", "fbgemm_gpu", "hydra", "omegaconf", "pyarrow", "duckdb", "triton")
ALONE = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {BLOCKED}:
            raise ImportError(name + " is blocked")

sys.meta_path.insert(0, Blocked())
for name in {BLOCKED}:
    try:
        __import__(name)
    except ImportError:
        continue
    sys.exit(name + " could be imported")

import torch
import glintru_rec
from glintru_rec import GlintRU

encoder = GlintRU(64)
hidden = encoder(torch.randn(5, 64), torch.tensor([0, 3, 5]))
assert hidden.shape == (5, 64)
hidden.sum().backward()
torch.jit.script(encoder)

from glintru_rec import *
assert issubclass(SASRec, torch.nn.Module)
try:
    from glintru_rec import SequenceTower
    sys.exit("SequenceTower could be imported")
except ImportError as error:
    assert "SequenceTower needs glintru_rec installed with TorchRec" in str(error), error

import importlib
for name in sys.argv[1:]:
    importlib.import_module(name)
assert not [name for name in sys.modules if name.split(".")[0] in {BLOCKED}]
print("done")
"""


def test_torch_alone_is_enough():
    names = [module for module in MODULES if is_torch_only(module)]
    assert "glintru_rec.model" in names
    result = subprocess.run([sys.executable, "-c", ALONE, *names], cwd=REPOSITORY, capture_output=True, text=True, timeout=120)
    assert result.stdout.strip() == "done", result.stderr[-2000:]
    assert result.returncode == 0
