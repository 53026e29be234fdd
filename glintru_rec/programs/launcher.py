"""How programs start: their TorchX jobs, their command lines, their errors."""

import inspect
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from glintru_rec.config import CONFIG_DIR, compose, describe_defaults, to_yaml
from glintru_rec.errors import InputError
from glintru_rec.files import write_text

Schema = TypeVar("Schema")

USER_ERROR = 2
# Where the ranks of several machines meet, on the first of them: torchelastic's own choice.
RENDEZVOUS_PORT = 29500
TASKS = ("retrieval", "ranking")


def app(
    program: str,
    overrides: Sequence[str],
    nproc: int = 1,
    max_restarts: int = 0,
    nnodes: int = 1,
    max_retries: int = 0,
    cpu: int = 0,
    gpu: int = 0,
    memory_mb: int = 4096,
    image: str = "",
    mounts: str = "",
    share_cores: bool = False,
) -> Any:
    """Describe the TorchX job of ``launch/<program>.py``.

    Args:
        program: name of the module in ``launch``.
        overrides: passed on to it.
        nproc: processes (ranks) on each machine.
        max_restarts: times that torchelastic restarts all ranks after a failure.
        nnodes: machines.
        max_retries: times that the scheduler starts the whole job anew after a failure.
        cpu: cores to ask for on each machine; 0: one for each process.
        gpu: GPUs to ask for on each machine.
        memory_mb: memory to ask for on each machine, in MiB.
        image: of the container, where the scheduler starts one.
        mounts: in TorchX's words: ``type=bind,src=…,dst=…``, perhaps ``,readonly``, and ``,type=…`` for the next.
        share_cores: several processes share out the cores of this machine, where ``OMP_NUM_THREADS`` does not say how many
            threads each has; otherwise torchrun gives each of them one.
    """
    from torchx import specs

    if min(nproc, nnodes, memory_mb) < 1 or min(max_restarts, max_retries, cpu, gpu) < 0:
        raise ValueError(
            f"nproc is {nproc}, nnodes {nnodes}, memory_mb {memory_mb}: at least 1 is needed; max_restarts is {max_restarts}, "
            f"max_retries {max_retries}, cpu {cpu}, gpu {gpu}: at least 0"
        )
    entrypoint, command = "python", ["-m", f"launch.{program}", *overrides]
    elastic = [f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
    if nnodes > 1:
        # The scheduler puts the first machine's name into a variable, and the shell that into the command.
        host = f"$${{{specs.macros.rank0_env}:=localhost}}:{RENDEZVOUS_PORT}"
        rendezvous = f"--nnodes={nnodes} --rdzv-backend=c10d --rdzv-id={specs.macros.app_id} --rdzv-endpoint={host}"
        start = f"exec python -m torch.distributed.run {rendezvous}"
        entrypoint, command = "bash", ["-c", f"{start} {shlex.join([*elastic, *command])}"]
    elif nproc > 1 or max_restarts > 0:
        command = ["-m", "torch.distributed.run", "--standalone", *elastic, *command]
    # OpenMP's waiting threads spin; beside another busy process that makes small operations several times slower.
    env = {"PYTHONUNBUFFERED": "1", "GOMP_SPINCOUNT": "1000"}
    if share_cores and nproc > 1:
        env["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or str(max(1, _cores() // nproc))
    role = specs.Role(
        name=program,
        image=image,
        entrypoint=entrypoint,
        args=command,
        num_replicas=nnodes,
        max_retries=max_retries,
        env=env,
        resource=specs.Resource(cpu=cpu or nproc, gpu=gpu, memMB=memory_mb),
        port_map={"c10d": RENDEZVOUS_PORT},
        mounts=specs.parse_mounts(mounts.split(",")) if mounts else [],
    )
    return specs.AppDef(name=program, roles=[role])


def _cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def task_of(arguments: Sequence[str]) -> str:
    """Find out which task a command line is of: ``task=`` says so, or the experiment's file, otherwise ``retrieval``."""
    given = dict(argument.split("=", 1) for argument in arguments if "=" in argument)
    experiment = CONFIG_DIR / "experiment" / f"{given.get('experiment')}.yaml"
    if "task" not in given and experiment.is_file():
        given |= dict(line.split(": ", 1) for line in experiment.read_text().splitlines() if line.startswith("task: "))
    task = given.get("task", "retrieval")
    if task not in TASKS:
        exit_with(InputError(f"task is {task!r}; it must be one of {', '.join(TASKS)}"))
    return task


def exit_with(error: InputError) -> NoReturn:
    """Say what the user can mend, and exit."""
    print(f"error: {error}", file=sys.stderr, flush=True)
    sys.exit(USER_ERROR)


def run(program: str, schema: type[Schema], main: Callable[[Schema], int | None], task: str = "retrieval") -> NoReturn:
    """Compose the config from the command line, run ``main`` with it, and exit.

    ``configs/<program>.yaml`` is the config of retrieval, ``configs/<program>_<task>.yaml`` that of another task.

    Exit status: what ``main`` gives, None being 0; 2 after one clear message for what the user can mend; 1 and a traceback
    for a defect.
    """
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(help_text(program, schema, task))
        sys.exit(0)
    if "--multirun" in arguments:
        exit_with(
            InputError("--multirun: give the same key=value to tools/sweep.py, which trains all combinations into one table")
        )
    try:
        status = main(compose(_config_of(program, task), schema, arguments))
    except InputError as error:
        exit_with(error)
    sys.exit(status)


def _config_of(program: str, task: str) -> str:
    return program if task == "retrieval" else f"{program}_{task}"


def help_text(program: str, schema: type[Any], task: str = "retrieval") -> str:
    """Say what a program takes: its keys, what they mean, their defaults."""
    chosen = "" if task == "retrieval" else f" task={task}"
    parts = [f"usage: torchx run launch/{program}.py{chosen} [key=value ...]     (before the keys, the flags of its --help)\n"]
    pending: list[tuple[str, type[Any]]] = [("", schema)]
    for prefix, config in pending:
        parts.append(f"{prefix or 'top level'}: {inspect.cleandoc(config.__doc__ or '')}\n")
        for name, kind in inspect.get_annotations(config).items():
            if inspect.isclass(kind) and hasattr(kind, "__dataclass_fields__"):
                pending.append((f"{prefix}{name}.", kind))
    return "\n".join([*parts, "defaults:\n", describe_defaults(_config_of(program, task), schema)])


def write_config(config: Any, path: Any) -> None:
    """Write the resolved config and say where."""
    write_text(path, to_yaml(config))
    print(f"resolved config: {path}", flush=True)
