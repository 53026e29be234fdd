"""How programs start: their TorchX jobs, their command lines, their errors."""

import inspect
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

from glintru_rec.config import compose, describe_defaults, to_yaml
from glintru_rec.errors import InputError
from glintru_rec.files import write_text

Schema = TypeVar("Schema")

USER_ERROR = 2


def app(program: str, overrides: Sequence[str], nproc: int = 1, max_restarts: int = 0) -> Any:
    """Describe the TorchX job of ``launch/<program>.py``.

    Args:
        program: name of the module in ``launch``.
        overrides: passed on to it.
        nproc: processes (ranks) on one machine.
        max_restarts: times that torchelastic restarts all ranks after a failure.
    """
    from torchx import specs

    if nproc < 1 or max_restarts < 0:
        raise ValueError(f"nproc is {nproc} and max_restarts is {max_restarts}; at least 1 and at least 0 are needed")
    command = ["-m", f"launch.{program}", *overrides]
    if nproc > 1 or max_restarts > 0:
        elastic = ["--standalone", f"--nproc-per-node={nproc}", f"--max-restarts={max_restarts}"]
        command = ["-m", "torch.distributed.run", *elastic, *command]
    role = specs.Role(
        name=program,
        image="",
        entrypoint="python",
        args=command,
        # OpenMP's waiting threads spin; beside another busy process that makes small operations several times slower.
        env={"PYTHONUNBUFFERED": "1", "GOMP_SPINCOUNT": "1000"},
        resource=specs.Resource(cpu=nproc, gpu=0, memMB=4096),
    )
    return specs.AppDef(name=program, roles=[role])


def run(program: str, schema: type[Schema], main: Callable[[Schema], int | None]) -> NoReturn:
    """Compose the config from the command line, run ``main`` with it, and exit.

    Exit status: what ``main`` gives, None being 0; 2 after one clear message for what the user can mend; 1 and a traceback
    for a defect.
    """
    arguments = sys.argv[1:]
    if "--help" in arguments or "-h" in arguments:
        print(help_text(program, schema))
        sys.exit(0)
    try:
        status = main(compose(program, schema, arguments))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(USER_ERROR)
    sys.exit(status)


def help_text(program: str, schema: type[Any]) -> str:
    """Say what a program takes: its keys, what they mean, their defaults."""
    parts = [f"usage: torchx run launch/{program}.py [key=value ...]     (before the keys, the flags of its --help)\n"]
    pending: list[tuple[str, type[Any]]] = [("", schema)]
    for prefix, config in pending:
        parts.append(f"{prefix or 'top level'}: {inspect.cleandoc(config.__doc__ or '')}\n")
        for name, kind in inspect.get_annotations(config).items():
            if inspect.isclass(kind) and hasattr(kind, "__dataclass_fields__"):
                pending.append((f"{prefix}{name}.", kind))
    return "\n".join([*parts, "defaults:\n", describe_defaults(program, schema)])


def write_config(config: Any, path: Any) -> None:
    """Write the resolved config and say where."""
    write_text(path, to_yaml(config))
    print(f"resolved config: {path}", flush=True)
