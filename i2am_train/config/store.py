"""Hydra and OmegaConf: registering the schemas, composing a configuration, reading an arm.

The schemas reach Hydra as plain values, so that every option exists (and no other one can be set),
choices are written as in ``paper`` or ``reward``, and checking happens once, in ``build``, with
messages of our own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError

from i2am_train.config.build import build, plain
from i2am_train.config.locations import conf_folder, experiment_names
from i2am_train.config.schema import COMMANDS, AblateConfig, TrainConfig, option_names
from i2am_train.errors import ConfigError

BASE_ARM = "base"
"""The arm that is not trained: the checkpoint that all arms start from."""

SHARED_GROUPS = (
    "data",
    "objective",
    "optimization",
    "sampling",
    "attribution",
    "evaluation",
    "validation",
    "tracking",
    "trainer",
)
"""Groups of an ablation that its arms inherit."""


def register_schemas() -> None:
    """Give Hydra every command's options with their defaults, as ``<command>_schema``."""
    store = ConfigStore.instance()
    for command, schema in COMMANDS.items():
        store.store(name=f"{command}_schema", node=plain(schema))


def compose(command: str, overrides: Sequence[str] = ()) -> Any:
    """The configuration of a command, as the command line would compose it.

    Args:
        command: train, evaluate, ablate, explain, report, dashboard, data_make, data_derive or data_check.
        overrides: as on the command line, for example ``["experiment=refined", "seed=1"]``.

    Returns:
        An instance of ``COMMANDS[command]``.

    Raises:
        ConfigError: an option is unknown, missing, of another type or out of range.
        hydra.errors.HydraException: an override cannot be read or names no option.
    """
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return to_dataclass(command, hydra_compose(config_name=command, overrides=list(overrides)))


def to_dataclass(command: str, config: DictConfig) -> Any:
    """The typed and checked form of what Hydra composed; an instance of ``COMMANDS[command]``."""
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except InterpolationResolutionError as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    assert isinstance(values, dict)
    return build(COMMANDS[command], {str(name): value for name, value in values.items()})


def to_yaml(config: Any) -> str:
    """A configuration as YAML; reading it back with ``from_yaml`` gives an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(plain(config)))


def from_yaml(command: str, text: str) -> Any:
    """The configuration of a command from its YAML; an instance of ``COMMANDS[command]``."""
    return to_dataclass(command, DictConfig(OmegaConf.create(text)))


def arm_config(study: AblateConfig, arm: str, seed: int, output: Path) -> TrainConfig:
    """The training configuration of one cell: the study's settings, then what the arm's file says.

    Args:
        study: the ablation.
        arm: name of a file in ``conf/experiment`` or path of such a file.
        seed: training seed of the cell.
        output: run folder of the cell.

    Raises:
        ConfigError: there is no such arm, or its file sets an option that does not exist.
    """
    shared = {group: plain(getattr(study, group)) for group in SHARED_GROUPS}
    values = _overlaid({"name": Path(arm).stem, "init": study.init, **shared}, arm_values(arm))
    return build(TrainConfig, {**values, "seed": seed, "output": output})


def arm_values(arm: str) -> dict[str, Any]:
    """The options that an experiment file sets, nested, unchecked."""
    path = conf_folder() / "experiment" / f"{arm}.yaml"
    if arm.endswith((".yaml", ".yml")):
        path = Path(arm).expanduser()
    if not path.is_file():
        known = ", ".join([BASE_ARM, *experiment_names(option_names(TrainConfig))])
        raise ConfigError(
            f"There is no arm '{arm}' ({path} is missing). Arms are {known}, or the path of a "
            "YAML file that sets options of `i2am train`."
        )
    values = _read_yaml(path)
    below: dict[str, Any] = {}
    for entry in values.pop("defaults", []):
        below = _overlaid(below, _default(entry, path))
    return _overlaid(below, values)


def _default(entry: Any, path: Path) -> dict[str, Any]:
    """What an entry of an experiment's ``defaults`` stands for: another experiment, or a file of a group."""
    match entry:
        case str(name):
            return arm_values(name)
        case dict() if len(entry) == 1 and (word := next(iter(entry))).startswith("override /"):
            group = word.removeprefix("override /")
            return {group: _read_yaml(conf_folder() / group / f"{entry[word]}.yaml")}
    raise ConfigError(
        f"The entry '{entry}' under defaults in {path} is not possible: expected the name of another experiment, or "
        "'override /GROUP: FILE'."
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    values = OmegaConf.to_container(OmegaConf.load(path))
    return {str(name): value for name, value in values.items()} if isinstance(values, dict) else {}


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both merged at every depth; ``above`` wins."""
    merged = deepcopy(dict(below))
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _overlaid(merged[name], value)
        else:
            merged[name] = deepcopy(value)
    return merged
