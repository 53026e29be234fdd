"""Is everything here that training, compiling and exporting need? One line a check: ok, or what to do.

python tools/doctor.py [--ranks 2] [--no-compile]

Versions first: torch, fbgemm and torchrec come in threes, CUDA and its driver, Triton and Java in pairs. Then the real things,
on a log of 100 users that is drawn here: `launch.train` with the item table sharded over two gloo ranks, the run's best
checkpoint exported and its lists compared with the model's own, an encoder compiled by torch.compile. Takes about 15 s, and up
to a minute where nothing was compiled before. Exit status: 0; 1 where there is something to do.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

# What was built and tested together; a release of one of them needs that of the others.
FBGEMM_OF_TORCH = {"2.11": "1.6", "2.12": "1.7", "2.13": "1.8"}
TRITON_OF_TORCH = {"2.11": "3.6", "2.12": "3.7", "2.13": "3.7"}
OLDEST_JAVA_OF_SPARK = {"3": 8, "4": 17}
REPOSITORY = Path(__file__).resolve().parents[1]
SECONDS = 240


class Problem(Exception):
    """Something is not as it should be; the text says what, and what to do."""


def installed(package: str) -> str | None:
    """Give the version of an installed package; None if there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def minor(release: str) -> str:
    """Shorten ``2.13.0+cpu`` to ``2.13``."""
    return ".".join(release.split("+")[0].split(".")[:2])


def output_of(*command: str) -> str | None:
    """Give what a program prints, stderr included; None if it is not there or fails."""
    try:
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout if result.returncode == 0 else None


def check_python() -> str:
    """Python's version, and a C++ compiler, which torch.compile needs."""
    here = ".".join(map(str, sys.version_info[:3]))
    if not (3, 11) <= sys.version_info[:2] <= (3, 12):
        raise Problem(f"python is {here}: use 3.11 or 3.12 (make PYTHON=python3.11 setup)")
    compiler = next((name for name in ("c++", "g++", "clang++") if shutil.which(name)), None)
    if compiler is None:
        raise Problem(f"python {here}; no C++ compiler: install g++ (trainer.compile=true and format=aoti need one)")
    return f"python {here}, C++ compiler {compiler}"


def check_stack(versions: dict[str, str | None]) -> str:
    """Torch, fbgemm and torchrec: of one release.

    Args:
        versions: of torch, torchrec, fbgemm-gpu and fbgemm-gpu-cpu; None for what is not installed.
    """
    torch_version, torchrec = versions["torch"], versions["torchrec"]
    if torch_version is None or torchrec is None:
        raise Problem(f"torch is {torch_version}, torchrec {torchrec}: make setup")
    both = {name: found for name in ("fbgemm-gpu", "fbgemm-gpu-cpu") if (found := versions[name])}
    if len(both) != 1:
        raise Problem(f"fbgemm: {both or 'not installed'}; exactly one of fbgemm-gpu and fbgemm-gpu-cpu is needed: make setup")
    ((name, fbgemm),) = both.items()
    said = f"torch {torch_version}, {name} {fbgemm}, torchrec {torchrec}"
    wanted = FBGEMM_OF_TORCH.get(minor(torch_version))
    if wanted is None:
        raise Problem(f"{said}: torch {' or '.join(FBGEMM_OF_TORCH)} is needed")
    if not minor(fbgemm) == minor(torchrec) == wanted:
        raise Problem(f"{said}: torch {minor(torch_version)} needs fbgemm {wanted} and torchrec {wanted} (make setup)")
    return f"{said}: belong together"


def check_imports() -> str:
    """The compiled parts load, and torchrec finds fbgemm's operators."""
    import fbgemm_gpu  # noqa: F401 (loads the operators)
    import torch
    import torchrec

    torch.ops.fbgemm.asynchronous_complete_cumsum(torch.tensor([1, 2]))
    return f"torch {torch.__version__} and torchrec {torchrec.__version__} load, fbgemm's operators run"


def check_cuda() -> str:
    """The GPU, its driver and the builds of torch and fbgemm for it."""
    import torch

    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    if driver is None:
        return "no NVIDIA driver (no nvidia-smi): computes on the CPU"
    driver = driver.split()[0]
    if torch.version.cuda is None:
        raise Problem(f"driver {driver}, but torch {torch.__version__} is a CPU build: remove .venv, then make setup")
    if installed("fbgemm-gpu") is None:
        raise Problem(f"driver {driver}, but fbgemm is the CPU build: remove .venv, then make setup")
    if not torch.cuda.is_available():
        raise Problem(f"torch's CUDA {torch.version.cuda} does not start with driver {driver}: install a newer driver")
    return f"driver {driver}, torch's CUDA {torch.version.cuda}"


def check_devices() -> str:
    """What there is to compute on."""
    import torch

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    gpus = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    named = [f"{gpu.name} ({gpu.total_memory / 2**30:.0f} GiB, sm_{gpu.major}{gpu.minor})" for gpu in gpus]
    return f"{cores} cores, {memory:.0f} GiB of memory, {', '.join(named) or 'no GPU'}"


def check_triton(torch_version: str, triton: str | None, has_gpu: bool) -> str:
    """Triton, for the kernels: torch's CUDA build brings its own, the CPU build needs none."""
    wanted = TRITON_OF_TORCH.get(minor(torch_version))
    if triton is None:
        if has_gpu:
            raise Problem(f"no triton: the GPU kernels cannot run; pip install 'triton=={wanted}.*'")
        return "triton is not installed: not needed without a GPU (pip install -e '.[triton]' for the kernels' tests)"
    if minor(triton) != wanted:
        raise Problem(f"triton {triton} with torch {torch_version}: pip install 'triton=={wanted}.*'")
    return f"triton {triton} belongs to torch {minor(torch_version)}"


def check_java(pyspark: str | None, java: str | None) -> str:
    """Java, for pyspark where that is installed.

    Args:
        pyspark: its version, None without it.
        java: what ``java -version`` prints, None without it.
    """
    if pyspark is None:
        return "pyspark is not installed: not needed on one machine"
    found = re.search(r'version "(?:1\.)?(\d+)', java or "")
    oldest = OLDEST_JAVA_OF_SPARK.get(pyspark.split(".")[0], 17)
    if found is None or int(found[1]) < oldest:
        raise Problem(f"pyspark {pyspark} needs Java {oldest} or newer, found {found[1] if found else 'none'}: install a JDK")
    return f"pyspark {pyspark}, Java {found[1]}"


def draw_log(path: Path) -> None:
    """Write a log of 100 users whose next item mostly follows from the last one."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.parquet as pq

    rng = np.random.default_rng(0)
    users, places = np.repeat(np.arange(100), 12), np.tile(np.arange(12), 100)
    items = (rng.integers(0, 50, 100).repeat(12) + 3 * places + (rng.random(users.size) < 0.1)) % 50
    pq.write_table(pa.table({"user_id": users, "item_id": items, "timestamp": places}), path)


def check_training(folder: Path, ranks: int) -> str:
    """`launch.train` on some ranks, with the item table spread over them."""
    from glintru_rec.data.prepare import PrepareConfig, prepare

    draw_log(folder / "log.parquet")
    prepare(PrepareConfig(str(folder / "log.parquet"), str(folder / "dataset")), progress=lambda _: None)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", "-m", "launch.train"]
    overrides = ["experiment=smoke", f"data.path={folder / 'dataset'}", f"output={folder / 'run'}", "trainer.device=cpu"]
    overrides += ["trainer.batch_targets=64", "trainer.max_epochs=3"]
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {"OMP_NUM_THREADS": "1", **os.environ, "PYTHONPATH": path}
    result = subprocess.run(
        [*command, *overrides], cwd=REPOSITORY, capture_output=True, text=True, timeout=SECONDS, env=environment
    )
    if result.returncode:
        lines = [line for line in result.stderr.splitlines() if "rror" in line] or result.stderr.splitlines()[-1:]
        raise Problem(f"training on {ranks} gloo ranks failed: {lines[0].strip() if lines else 'it said nothing'}")
    done = re.search(r"done: (\d+) steps; best ndcg@10 ([\d.]+)", result.stdout)
    assert done is not None
    return f"{done[1]} steps on {ranks} gloo rank(s), the item table sharded by rows: valid ndcg@10 {done[2]}"


def check_export(folder: Path) -> str:
    """Export the run, open it with torch alone, and compare its lists with the model's."""
    import contextlib
    import io

    import torch

    from glintru_rec.jagged import offsets_from_lengths
    from glintru_rec.programs.export import ExportConfig, export_run
    from glintru_rec.training.build import load_unsharded

    with contextlib.redirect_stdout(io.StringIO()):
        export_run(ExportConfig(str(folder / "run"), str(folder / "artifact")))
    scripted = torch.jit.load(str(folder / "artifact" / "model.pt"))
    scripted.open_items(str(folder / "artifact"))
    model = load_unsharded(folder / "run").model
    item_ids, lengths = torch.tensor([3, 6, 9, 40, 43]), torch.tensor([3, 2])
    with torch.inference_mode():
        _, scores = scripted.top_k(item_ids, lengths, 5, False)
        query, catalog = model.encode(item_ids, offsets_from_lengths(lengths), torch.arange(model.table.num_items))
        expected = (query @ catalog.T).topk(5).values
    difference = (scores - expected).abs().max().item()
    if not difference < 1e-4:
        raise Problem(f"scores of the exported model differ from the model's by {difference:.1e}: report this")
    return f"a scripted model gives the model's lists (scores within {difference:.0e})"


def check_compile() -> str:
    """A step of a small encoder through torch.compile, against the same step without."""
    import torch

    from glintru_rec import GlintRU

    torch.manual_seed(0)
    # The GRU expert alone: what torch.compile needs of a machine is the same, and the whole block takes it twice as long.
    encoder = GlintRU(16, attention_expert=False, gated_mlp=False, dropout=0.0)
    x, offsets = torch.randn(10, 16), torch.tensor([0, 4, 10])
    expected = torch.autograd.grad(encoder(x, offsets).square().sum(), list(encoder.parameters()))
    start = time.monotonic()
    encoder.compile(fullgraph=True, dynamic=True)
    gradients = torch.autograd.grad(encoder(x, offsets).square().sum(), list(encoder.parameters()))
    if not all(torch.allclose(*pair, rtol=1e-3, atol=1e-4) for pair in zip(gradients, expected)):
        raise Problem("the compiled encoder has other gradients: train with trainer.compile=false, and report this")
    return f"torch.compile: a training step with the same gradients, compiled in {time.monotonic() - start:.0f} s"


def examine(name: str, check: Callable[[], str]) -> bool:
    """Run one check and print its line; give whether all is well."""
    try:
        print(f"ok    {name:9} {check()}", flush=True)
    except Problem as problem:
        print(f"TO DO {name:9} {problem}", flush=True)
    except Exception as error:
        first = next(iter(str(error).splitlines()), "")
        print(f"TO DO {name:9} {type(error).__name__}: {first} (make setup; --raise shows where)", flush=True)
        if "--raise" in sys.argv:
            raise
    else:
        return True
    return False


def main() -> int:
    """Read the command line, check, give the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2, help="of the training")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--raise", action="store_true", help="show the traceback of the first surprise")
    given = parser.parse_args()
    stack = {name: installed(name) for name in ("torch", "torchrec", "fbgemm-gpu", "fbgemm-gpu-cpu")}
    fine = [examine("python", check_python), examine("stack", lambda: check_stack(stack))]
    fine.append(examine("imports", check_imports))
    if not fine[-1]:
        return 1  # nothing below could run
    import torch

    from glintru_rec.training.processes import quiet_dependencies

    quiet_dependencies()
    fine.append(examine("cuda", check_cuda))
    fine.append(examine("devices", check_devices))
    triton = installed("triton")
    fine.append(examine("triton", lambda: check_triton(torch.__version__, triton, torch.cuda.is_available())))
    fine.append(examine("java", lambda: check_java(installed("pyspark"), output_of("java", "-version"))))
    with tempfile.TemporaryDirectory(prefix="doctor-") as folder:
        fine.append(examine("training", lambda: check_training(Path(folder), given.ranks)))
        if fine[-1]:
            fine.append(examine("export", lambda: check_export(Path(folder))))
    if not given.no_compile:
        fine.append(examine("compile", check_compile))
    return 0 if all(fine) else 1


if __name__ == "__main__":
    sys.exit(main())
