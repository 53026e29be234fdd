"""Configs: hydra composes the files of ``configs/``, dataclasses give every key its type, default and allowed range."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

from glintru_rec.errors import InputError

Schema = TypeVar("Schema")

CONFIG_DIR = Path(__file__).resolve().parent / "configs"  # in a checkout a link to configs/, in a wheel its files


def check(key: str, value: Any, holds: bool, allowed: str) -> None:
    """Raise an `InputError` naming key, value and allowed range unless ``holds``."""
    if not holds:
        raise InputError(f"{key} is {value!r}; it must be {allowed}")


def one_of(key: str, value: Any, choices: Sequence[str]) -> None:
    """Raise an `InputError` unless ``value`` is one of ``choices``."""
    check(key, value, value in choices, f"one of {', '.join(choices)}")


def check_at_least(least: int, group: str, config: Any, keys: Sequence[str]) -> None:
    """Raise an `InputError` unless each of the keys of a config, named ``<group><key>``, is at least ``least``."""
    for key in keys:
        check(f"{group}{key}", getattr(config, key), getattr(config, key) >= least, f"at least {least}")


def compose(program: str, schema: type[Schema], overrides: Sequence[str]) -> Schema:
    """Compose ``configs/<program>.yaml`` with hydra overrides into a validated ``schema``.

    Args:
        program: name of the file in ``configs/``.
        schema: dataclass whose fields are the allowed keys; its ``__post_init__`` checks ranges.
        overrides: as on hydra's command line: ``trainer.max_epochs=5``, ``model=glint_ru_light``.

    Raises:
        InputError: an unknown key, group or option, a value of the wrong type or out of range, a missing value.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        config = _compose(program, schema, overrides)
        missing = OmegaConf.missing_keys(config)
        if missing:
            raise InputError(f"missing value: give {' '.join(f'{key}=…' for key in sorted(missing))}")
        result = OmegaConf.to_object(config)
    except (HydraException, OmegaConfBaseException) as error:
        raise InputError(telling_part(error)) from error
    assert isinstance(result, schema)
    return result


def describe_defaults(program: str, schema: type[Any]) -> str:
    """Write all keys with their defaults as YAML (``???`` has none), and what the groups offer."""
    from omegaconf import OmegaConf

    text = OmegaConf.to_yaml(_compose(program, schema, []))
    defaults = OmegaConf.load(CONFIG_DIR / f"{program}.yaml").defaults  # configs/ also holds lists that are no groups
    groups = sorted(group for default in defaults if not isinstance(default, str) for group in default)
    offered = [f"{group}={'|'.join(sorted(file.stem for file in (CONFIG_DIR / group).glob('*.yaml')))}" for group in groups]
    return "\n".join([text, *offered])


def _compose(program: str, schema: type[Any], overrides: Sequence[str]) -> Any:
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra

    if not (CONFIG_DIR / f"{program}.yaml").is_file():
        raise InputError(f"no {program}.yaml in {CONFIG_DIR}: glintru_rec is not installed whole, or the link is broken")
    ConfigStore.instance().store(name=f"{program}_schema", node=schema)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIG_DIR), version_base="1.3"):
        return hydra_compose(program, overrides=list(overrides))


def to_yaml(config: Any) -> str:
    """Write a composed config as YAML that `from_yaml` reads back."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(dataclasses.asdict(config)))


def from_yaml(path: Path, schema: type[Schema]) -> Schema:
    """Read a config that `to_yaml` wrote.

    Raises:
        InputError: not readable, or not of this schema.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
        result = OmegaConf.to_object(merged)
    except (OSError, ValueError, YAMLError, OmegaConfBaseException) as error:
        raise InputError(f"{path} is not a readable {schema.__name__}: {telling_part(error)}") from error
    assert isinstance(result, schema)
    return result


def telling_part(error: BaseException) -> str:
    """Say in one line what a hydra or omegaconf error complains of."""
    override = getattr(error, "override", None)  # of an OverrideParseException, whose message may leave it out
    if override is not None:
        return (
            f"{override!r} cannot be read: give key=value; a value with blanks, quotes or commas in it needs quotes of its "
            f"own, inside the shell's: 'key=\"a = b\"'"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    noise = (
        "reference_type",
        "object_type",
        "Set the environment",
        "To append to your config",
        "Config search path",
        "provider=",
    )
    lines = [line for line in lines if not line.startswith(noise)]
    cause = error.__cause__
    if cause is not None and str(cause) not in str(error):
        lines += [line.strip() for line in str(cause).splitlines()[:1]]
    return " ".join(lines[:20])


def wrong_keys(found: dict[str, Any], kinds: dict[str, type]) -> list[str]:
    """Name the keys that a JSON object lacks, or has with a value of another kind than ``kinds`` says."""
    return [key for key, kind in kinds.items() if not isinstance(found.get(key), kind)]
