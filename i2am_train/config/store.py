"""Hydra and OmegaConf: registering the schemas, composing a configuration, reading an arm.

The schemas reach Hydra as plain values, so that every option exists (and no other one can be set),
choices are written as in ``paper`` or ``reward``, and checking happens once, in ``build``, with
messages of our own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from hashlib import sha256
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from i2am_train.config.build import build, option_names, plain, shortened
from i2am_train.config.commands import COMMANDS
from i2am_train.config.locations import absolute, conf_folder, experiment_names
from i2am_train.config.training import AblateConfig, TrainConfig
from i2am_train.config.words import as_typed
from i2am_train.doors import allow_named
from i2am_train.errors import ConfigError

BASE_ARM = "base"
"""The arm that is not trained: the checkpoint that all arms start from."""
ARM_ENDINGS = (".yaml", ".yml")
"""By these a path is told from the name of a shipped experiment."""

WITH_EXPERIMENTS = ("train", "ablate")
"""Commands that take ``experiment=``."""

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
    for name, command in COMMANDS.items():
        store.store(name=f"{name}_schema", node=plain(command.options))


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
    allow_named(overrides)
    words = as_typed(command, with_own_experiment(command, overrides))
    with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
        return to_dataclass(command, hydra_compose(config_name=command, overrides=words))


def with_own_experiment(command: str, words: Sequence[str], *, sweep: bool = False) -> list[str]:
    """The words of a command; in ``experiment=FILE``, a YAML file of the user's is given to Hydra under a name.

    Args:
        command: key of ``COMMANDS``.
        words: as typed.
        sweep: a comma separates values of a sweep (-m).

    Raises:
        ConfigError: there is no such file, or it sets nothing.
    """
    named = []
    for word in words:
        option, _, value = word.partition("=")
        if option == "experiment" and command in WITH_EXPERIMENTS:
            files = value.split(",") if sweep else [value]
            word = f"experiment={','.join(_experiment_name(command, file) for file in files)}"
        named.append(word)
    return named


def _experiment_name(command: str, typed: str) -> str:
    """What Hydra knows an experiment by: its name in ``conf/experiment``, or one that is made for a file."""
    file = typed.strip("'\"")
    if not file.endswith(ARM_ENDINGS):
        return typed
    path = absolute(Path(file))
    if not path.is_file():
        known = ", ".join(experiment_names(option_names(COMMANDS[command].options)))
        raise ConfigError(
            f"There is no experiment '{file}' ({path} {'is no file' if path.exists() else 'is missing'}). Experiments "
            f"are {known}, or the path of a YAML file that sets options of `i2am {command}`."
        )
    names = {"name": arm_name(file), "label": _stem(file)} if command == "train" else {}
    name = f"{arm_name(file)}-{sha256(str(path).encode()).hexdigest()[:8]}"
    node = _literal({**names, **arm_values(str(path))})
    ConfigStore.instance().store(name, node, group="experiment", package="_global_")
    return name


def to_dataclass(command: str, config: DictConfig) -> Any:
    """The typed and checked form of what Hydra composed; an instance of ``COMMANDS[command]``."""
    try:
        values = OmegaConf.to_container(config, resolve=True)
    except InterpolationResolutionError as error:
        raise ConfigError(
            f"{error.full_key}: {str(error).splitlines()[0]}. ${{...}} stands for another option; a text that holds "
            "these signs is written \\${...}."
        ) from error
    assert isinstance(values, dict)
    return build(COMMANDS[command].options, {str(name): value for name, value in values.items()})


def to_yaml(config: Any) -> str:
    """A configuration as YAML; reading it back with ``from_yaml`` gives an equal one."""
    return OmegaConf.to_yaml(OmegaConf.create(_literal(plain(config))))


def _literal(value: Any) -> Any:
    """Plain values whose texts OmegaConf takes as they are: ``${`` is no interpolation any more."""
    if isinstance(value, str):
        return value.replace("${", r"\${")
    if isinstance(value, Mapping):
        return {name: _literal(item) for name, item in value.items()}
    return [_literal(item) for item in value] if isinstance(value, list) else value


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
    names = {"name": arm_name(arm), "label": _stem(arm), "init": study.init}
    own = arm_values(arm)
    for option in ("seed", "output", "dry_run"):
        if option in own:
            raise ConfigError(f"The arm '{arm}' sets {option}, which is the study's to set. Take it out of the file.")
    try:
        values = _overlaid({**names, **shared}, own)
        return build(TrainConfig, {**values, "seed": seed, "output": output})
    except ConfigError as error:
        raise ConfigError(f"The arm '{arm}' is not possible: {error}") from error


def arm_name(arm: str) -> str:
    """An arm's short name, which names folders: that of its file, without signs that a name cannot have.

    >>> arm_name("refined"), arm_name("arms/my arm (2).yaml")
    ('refined', 'my-arm-(2)')
    """
    return re.sub(r"[\s/\\]+", "-", _stem(arm)).lstrip(".-") or "arm"


def _stem(arm: str) -> str:
    return Path(arm).stem if arm.endswith(ARM_ENDINGS) else arm


def arm_values(arm: str, readers: Sequence[Path] = ()) -> dict[str, Any]:
    """The options that an experiment file sets, nested, unchecked.

    Args:
        arm: as for ``arm_config``.
        readers: the files whose ``defaults`` led here.

    Raises:
        ConfigError: there is no such file, it sets nothing, or its ``defaults`` cannot be followed.
    """
    path = conf_folder() / "experiment" / f"{arm}.yaml"
    if arm.endswith(ARM_ENDINGS):
        path = absolute(Path(arm))
    if not path.is_file():
        known = ", ".join([BASE_ARM, *experiment_names(option_names(TrainConfig))])
        found = "is no file" if path.exists() else "is missing"
        raise ConfigError(
            f"There is no arm '{arm}' ({path} {found}). Arms are {known}, or the path of a "
            "YAML file that sets options of `i2am train`."
        )
    if path in readers:
        raise ConfigError(f"The defaults in {path} lead back to itself. Take the entry out.")
    values = _read_yaml(path)
    entries = values.pop("defaults", None) or []
    if not isinstance(entries, list):
        raise _impossible_default(entries, path)
    below: dict[str, Any] = {}
    for entry in entries:
        below = _overlaid(below, _default(entry, path, readers))
    return _overlaid(below, values)


def _default(entry: Any, path: Path, readers: Sequence[Path]) -> dict[str, Any]:
    """What an entry of an experiment's ``defaults`` stands for: another experiment, or a file of a group."""
    match entry:
        case str(name):
            return arm_values(name, [*readers, path])
        case dict() if len(entry) == 1 and str(word := next(iter(entry))).startswith("override /"):
            file = f"{word.removeprefix('override /')}/{entry[word]}.yaml"
            if not (conf_folder() / file).is_file():
                raise ConfigError(f"There is no file conf/{file}, which the defaults in {path} name.")
            return {file.partition("/")[0]: _read_yaml(conf_folder() / file)}
    raise _impossible_default(entry, path)


def _impossible_default(entry: Any, path: Path) -> ConfigError:
    return ConfigError(
        f"The entry '{entry}' under defaults in {path} is not possible: expected the name of another experiment, or "
        "'override /GROUP: FILE'."
    )


def _read_yaml(path: Path) -> dict[str, Any]:
    """The options in a file, interpolations between them resolved.

    Raises:
        ConfigError: it is missing, not YAML, or sets no options.
    """
    expected = "expected options of `i2am train`, such as 'objective: {dcml: 0.1}'"
    try:
        values = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, ValueError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        reason = shortened(str(error) or type(error).__name__, 200)
        raise ConfigError(f"{path} cannot be read as YAML in UTF-8 ({reason}): {expected}.") from error
    if not isinstance(values, dict) or not values:
        found = "nothing" if not values else f"a list ({shortened(values)})"
        raise ConfigError(f"{path} holds {found}: {expected}.")
    return {str(name): value for name, value in values.items()}


def _overlaid(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Both merged at every depth; ``above`` wins."""
    merged = deepcopy(dict(below))
    for name, value in above.items():
        if isinstance(value, Mapping) and isinstance(merged.get(name), Mapping):
            merged[name] = _overlaid(merged[name], value)
        else:
            merged[name] = deepcopy(value)
    return merged
