"""Hydra and OmegaConf: commands as Hydra knows them, words as it can read them, composed options, experiments and arms.

The options reach Hydra as plain values, so that every option exists (and no other one can be set), choices are written
as in ``paper`` or ``reward``, and checking happens once, in ``build``, with messages of our own.

Hydra's grammar knows few signs outside of quotation marks: ä, #, &, (, = and others end in an error, a comma makes a
sweep, 1e5 a number. Where an option is a text, ``as_typed`` sets the marks. Lists, interpolations, sweeps (with -m) and
what is quoted already stay Hydra's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException
from yaml import YAMLError

from i2am_train.config.commands import COMMANDS, DEFAULT_FILES, WITH_EXPERIMENTS
from i2am_train.config.locations import absolute, conf_folder, experiment_names
from i2am_train.config.options import build, group_of, option_names, plain, shortened
from i2am_train.config.training import AblateConfig, TrainConfig, TrainingGroups
from i2am_train.doors import allow_named
from i2am_train.errors import ConfigError

_OURS = {f"{command}{ending}" for command in COMMANDS for ending in ("_schema.yaml", ".yaml")}
"""What Hydra's store calls our commands."""
BASE_ARM = "base"
"""The arm that is not trained: the checkpoint that all arms start from."""
ARM_ENDINGS = (".yaml", ".yml")
"""By these a path is told from the name of a shipped experiment."""

ELEMENT = re.compile(r"""\s*(?P<element>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'|[^,]*?)\s*,""", re.DOTALL)
"""One element of a typed list and the comma after it: quoted, or up to the next comma."""
_TIMES = re.compile(r"(?P<file>.+)\*(?P<factor>\d+(\.\d+)?|\.\d+)")
"""An arm with other weights: a file's name or path, and the factor of the weights of its terms."""
_SELF = "_self_"
"""Hydra's entry under ``defaults`` for what the file itself sets; it comes last where it is not there."""
_WHOLE = ("layers",)
"""Options whose mapping is one value: another one replaces it, and is not merged into it."""
_SHORT = {"objective.terms": "weight"}
"""Options with names of the user's own, and the key that ``option.name=value`` is short for."""
HALF_INTERPOLATION = re.compile(r"\$\{(?![^{}]+\})")
"""A ``${`` that refers to nothing, since it is not closed."""


@contextmanager
def known_to_hydra(name: str) -> Iterator[None]:
    """Meanwhile Hydra knows a command: its options with their defaults, and the files that they begin with.

    A command runs in the folder where it was called, and Hydra leaves nothing there. It knows no other command of ours:
    whatever it knows, it copies for every composition, which would take twice as long.
    """
    store, options = ConfigStore.instance(), COMMANDS[name].options
    before = store.repo
    store.repo = {known: node for known, node in before.items() if known not in _OURS}
    store.store(name=f"{name}_schema", node=plain(options))
    groups = [item.name for item in fields(options)]
    files = [{group: file} for group, file in DEFAULT_FILES.items() if group in groups]
    # Last, so that an experiment has the last word before the command line.
    experiment = [{"experiment": None}] if name in WITH_EXPERIMENTS else []
    no_logs = [{"override hydra/job_logging": "none"}, {"override hydra/hydra_logging": "none"}]
    hydra = {
        "job": {"name": name, "chdir": False},
        "run": {"dir": "."},
        "sweep": {"dir": "runs/sweeps", "subdir": "."},
        "output_subdir": None,
    }
    defaults = [f"{name}_schema", *files, "_self_", *experiment, *no_logs]
    store.store(name=name, node={"defaults": defaults, "hydra": hydra})
    try:
        yield
    finally:
        store.repo = before


def compose(command: str, overrides: Sequence[str] = ()) -> Any:
    """The configuration of a command, as the command line would compose it.

    Args:
        command: key of ``config.commands.COMMANDS``: train, evaluate, ..., data_make.
        overrides: as on the command line, for example ``["experiment=refined", "seed=1"]``.

    Returns:
        An instance of the command's ``options``.

    Raises:
        ConfigError: an option is unknown, missing, of another type or out of range.
        hydra.errors.HydraException: an override cannot be read or names no option.

    >>> compose("train", ["experiment=reward", "objective.terms.cwg=0.02"]).objective.terms
    {'dcml': {'weight': 0.007}, 'tv': {'weight': 0.002}, 'cwg': {'weight': 0.02}}
    """
    GlobalHydra.instance().clear()
    allow_named(overrides)
    with known_to_hydra(command):
        words = as_typed(command, with_own_experiment(command, overrides))
        with initialize_config_dir(version_base="1.3", config_dir=str(conf_folder())):
            return to_dataclass(command, hydra_compose(config_name=command, overrides=words))


def with_own_experiment(command: str, words: Sequence[str], *, sweep: bool = False) -> list[str]:
    """The words of a command; in ``experiment=FILE``, a YAML file of the user's is given to Hydra under a name.

    Raises:
        ConfigError: there is no such file, or it sets nothing.

    >>> with_own_experiment("train", ["experiment=refined", "seed=1"])
    ['experiment=refined', 'seed=1']
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
        raise _missing("experiment", file, path, experiment_names(option_names(COMMANDS[command].options)), command)
    names = {"name": arm_name(file), "label": _stem(file)} if command == "train" else {}
    name = f"{arm_name(file)}-{sha256(str(path).encode()).hexdigest()[:8]}"
    node = _literal({**names, **arm_values(str(path))})
    ConfigStore.instance().store(name, node, group="experiment", package="_global_")
    return name


def to_dataclass(command: str, config: DictConfig) -> Any:
    """The typed and checked form of what Hydra composed; an instance of the command's ``options``.

    >>> to_dataclass("data_make", OmegaConf.create({"root": "here", "width": 64})).size
    GridSize(height=128, width=64)
    """
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
    """A configuration as YAML, from which ``to_dataclass`` makes an equal one.

    >>> from i2am_train.config.reporting import DashboardConfig
    >>> print(to_yaml(DashboardConfig(group="a${b")))
    entity: null
    project: i2am-train
    group: a\\${b
    output: null
    """
    return OmegaConf.to_yaml(OmegaConf.create(_literal(plain(config))))


def _literal(value: Any) -> Any:
    """Plain values whose texts OmegaConf takes as they are: ``${`` is no interpolation any more."""
    if isinstance(value, str):
        return value.replace("${", r"\${")
    if isinstance(value, Mapping):
        return {name: _literal(item) for name, item in value.items()}
    return [_literal(item) for item in value] if isinstance(value, list) else value


def arm_config(study: AblateConfig, arm: str, seed: int, output: Path) -> TrainConfig:
    """The training configuration of one cell: the study's settings, then what the arm's file says.

    Args:
        study: the ablation.
        arm: name of a file in ``conf/experiment`` or path of such a file; with ``*FACTOR`` behind it, the weights of
            its terms are that many times as large.
        seed: training seed of the cell.
        output: run folder of the cell.

    Raises:
        ConfigError: there is no such arm, its file sets an option that does not exist, or it has no term to multiply.

    >>> arm_config(AblateConfig(), "refined", seed=1, output=Path("cell")).objective.terms["dcml"]
    {'weight': 0.02, 'force': 'extent'}
    >>> arm_config(AblateConfig(), "refined*3", seed=1, output=Path("cell")).objective.terms["dcml"]
    {'weight': 0.06, 'force': 'extent'}
    """
    shared = {group.name: plain(getattr(study, group.name)) for group in fields(TrainingGroups)}
    file, factor = _file_and_factor(arm)
    names = {"name": arm_name(file), "label": _stem(file), "init": study.init}
    own = arm_values(file)
    for option in ("seed", "output", "dry_run"):
        if option in own:
            raise ConfigError(f"The arm '{arm}' sets {option}, which is the study's to set. Take it out of the file.")
    try:
        values = _overlaid({**names, **shared}, own)
        config = build(TrainConfig, {**values, "seed": seed, "output": output})
    except ConfigError as error:
        raise ConfigError(f"The arm '{arm}' is not possible: {error}") from error
    return config if factor is None else _multiplied(config, arm, factor)


def _file_and_factor(arm: str) -> tuple[str, float | None]:
    found = _TIMES.fullmatch(arm)
    return (arm, None) if found is None else (found["file"], float(found["factor"]))


def _multiplied(config: TrainConfig, arm: str, factor: float) -> TrainConfig:
    """An arm whose terms have ``factor`` times their weight, and a name and a label that say so."""
    terms = {
        name: {**entry, "weight": float(f"{entry['weight'] * factor:.12g}")}
        for name, entry in config.objective.terms.items()
    }
    if not any(entry["weight"] for entry in terms.values()):
        raise ConfigError(
            f"The arm '{arm}' is not possible: *{factor:g} multiplies the weights of its terms, and none is left "
            "that is not 0. Take an arm that has terms, and a factor above 0."
        )
    objective = replace(config.objective, terms=terms)
    return replace(config, name=arm_name(arm), label=f"{config.label} x {factor:g}", objective=objective)


def arm_name(arm: str) -> str:
    """An arm's short name, which names folders: that of its file, without signs that a name cannot have.

    >>> arm_name("refined*3"), arm_name("arms/my arm (2).yaml")
    ('refined-x3', 'my-arm-(2)')
    """
    file, factor = _file_and_factor(arm)
    name = re.sub(r"[\s/\\]+", "-", _stem(file)).lstrip(".-") or "arm"
    return name if factor is None else f"{name}-x{factor:g}"


def _stem(arm: str) -> str:
    return Path(arm).stem if arm.endswith(ARM_ENDINGS) else arm


def arm_values(arm: str, readers: Sequence[Path] = ()) -> dict[str, Any]:
    """The options that an experiment file sets, nested, unchecked.

    Args:
        arm: as for ``arm_config``.
        readers: the files whose ``defaults`` led here.

    Raises:
        ConfigError: there is no such file, it sets nothing, or its ``defaults`` cannot be followed.

    >>> arm_values("baseline")["label"]
    'Baseline'
    """
    path = conf_folder() / "experiment" / f"{arm}.yaml"
    if arm.endswith(ARM_ENDINGS):
        path = absolute(Path(arm))
    if not path.is_file():
        raise _missing("arm", arm, path, [BASE_ARM, *experiment_names(option_names(TrainConfig))], "train")
    if path in readers:
        raise ConfigError(f"The defaults in {path} lead back to itself. Take the entry out.")
    values = _read_yaml(path)
    entries = values.pop("defaults", None) or []
    if not isinstance(entries, list):
        raise _impossible_default(entries, path)
    if _SELF not in entries:
        entries.append(_SELF)
    merged: dict[str, Any] = {}
    for entry in entries:
        merged = _overlaid(merged, values if entry == _SELF else _default(entry, path, readers))
    return merged


def _missing(kind: str, name: str, path: Path, known: Sequence[str], command: str) -> ConfigError:
    found = "is no file" if path.exists() else "is missing"
    return ConfigError(
        f"There is no {kind} '{name}' ({path} {found}). {kind.capitalize()}s are {', '.join(known)}, or the path of a "
        f"YAML file that sets options of `i2am {command}`."
    )


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
    expected = "expected options of `i2am train`, such as 'objective: {terms: {dcml: {weight: 0.1}}}'"
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
    """Both merged at every depth; ``above`` wins.

    >>> _overlaid({"layers": {"2": 1.0}, "terms": {"tv": {"weight": 1}}}, {"layers": {5: 1.0}, "terms": {"cwg": {}}})
    {'layers': {5: 1.0}, 'terms': {'tv': {'weight': 1}, 'cwg': {}}}
    """
    merged = dict(below)
    for name, value in above.items():
        lower = merged.get(name)
        nested = isinstance(value, Mapping) and isinstance(lower, Mapping) and name not in _WHOLE
        merged[name] = _overlaid(dict(lower or {}), value) if nested else value
    return merged


class _Kind(NamedTuple):
    """Which values an option takes, as far as reading its word depends on it."""

    text: bool
    """Texts and nothing else, lists of them apart."""
    texts: bool
    """Lists of texts."""
    lists: bool
    """Lists of anything."""
    mapping: bool = False
    """Names of the user's own."""
    whole: bool = False
    """A mapping or something else, which Hydra would merge into what is there, or refuse beside a list."""
    entries: bool = False
    """Lists of texts and mappings, which Hydra reads: names, and import paths with keywords."""


_TEXT = _Kind(text=True, texts=False, lists=False)


def as_typed(command: str, words: Sequence[str], *, sweep: bool = False) -> list[str]:
    """The words ``name=value`` of a command, quoted where Hydra would not read a value as what was typed.

    Args:
        command: key of ``COMMANDS``; words that name no option of it are left alone.
        sweep: a comma separates values of a sweep (-m), and is not part of a text.

    Raises:
        ConfigError: a group of options is given something that cannot be the name of a file.

    >>> as_typed("train", ["output=runs/a (1)", "data.root=köln,1", "seed=1", "name=1e5"])
    ["output='runs/a (1)'", "data.root='köln,1'", 'seed=1', "name='1e5'"]
    >>> as_typed("train", ["objective.terms.cwg.sigma=2", "objective.terms.cwg=0.1"])
    ['++objective.terms.cwg.sigma=2', '++objective.terms.cwg.weight=0.1']
    >>> as_typed("train", ["objective.layers={2: 1.0, 5: 0.5}"])  # Hydra would merge it with those of an experiment
    ['objective.layers=null', 'objective.layers={2: 1.0, 5: 0.5}']
    """
    kinds = {"experiment": _TEXT, **_kinds(COMMANDS[command].options)}
    groups = {"experiment", *(item.name for item in fields(COMMANDS[command].options) if group_of(item))}
    free = [name for name, kind in kinds.items() if kind.mapping]
    typed = []
    for word in words:
        name, equals, value = word.partition("=")
        if any(f"{name}.".startswith(f"{mapping}.") for mapping in free):
            option = name.rpartition(".")[0]
            if option in _SHORT and equals and not value.startswith("{"):
                word = f"{name}.{_SHORT[option]}={value}"
            typed.append(f"++{word}")  # else Hydra wants it only for names that exist
            continue
        known = equals and name in kinds
        if known and kinds[name].whole and value.startswith(("[", "{")):
            typed.append(f"{name}=null")
        typed.append(f"{name}={_readable(value, kinds[name], sweep)}" if known else word)
        if known and name in groups:
            _check_group(name, value)
    return typed


def _check_group(name: str, value: str) -> None:
    """Hydra has no message for a group that is given anything but the name of a file."""
    read = _read(value)
    whole = (type(None), bool, int, float, list)
    if read is not None and isinstance(read._value, whole):
        raise ConfigError(
            f"{name}={shortened(value)} is not possible: expected the name of a file of conf/{name}, or nothing for "
            f"the default. --help lists the files and the single options."
        )


def _readable(value: str, kind: _Kind, sweep: bool) -> str:
    if value.startswith(("'", '"')) and _read(value) is None:
        return value  # a mark that was not closed: Hydra says so
    if kind.lists and value.startswith("["):
        if kind.entries and "{" in value:
            return value
        return _readable_list(value) if kind.texts and value.endswith("]") else value
    read = _read(value)
    if read is None:
        # Quoted also where no text is meant: the option then says what it expects.
        hydra_s = (value.startswith(("[", "{")) and not kind.text) or (sweep and "," in value)
        return value if hydra_s else _quoted(value)
    if not kind.text or (read.is_sweep_override() and sweep):
        return value
    found = read._value
    kept = found is None or isinstance(found, QuotedString)
    # A backslash before a sign that Hydra would not read is its own way of quoting; at the end it
    # would quote what follows in a list.
    alike = isinstance(found, str) and (found == value or "\\" in value)
    kept = kept or (alike and not value.endswith("\\"))
    return value if kept else _quoted(value)


def _readable_list(value: str) -> str:
    read = _read(value)
    if read is not None and _all_texts(read._value):
        return value
    elements = [match["element"] for match in ELEMENT.finditer(value[1:-1] + ",")]
    if not all(elements):  # two commas in a row, or one at the end: Hydra says so
        return value
    return f"[{','.join(_readable(element, _TEXT, sweep=False) for element in elements)}]"


def _all_texts(found: Any) -> bool:
    return isinstance(found, list) and all(isinstance(item, (str, QuotedString)) for item in found)


def _read(value: str) -> Override | None:
    """What Hydra makes of a value; None where it cannot read it."""
    try:
        return OverridesParser.create().parse_override(f"name={value}")
    except (HydraException, ValueError):  # Python's own refusal of numbers of 5000 digits
        return None


def _quoted(value: str) -> str:
    text = HALF_INTERPOLATION.sub(r"\\${", value)
    return QuotedString(text=text, quote=Quote.single).with_quotes()


def _kinds(schema: type[Any], prefix: str = "") -> dict[str, _Kind]:
    hints = get_type_hints(schema)
    kinds: dict[str, _Kind] = {}
    for item in fields(schema):
        kinds[prefix + item.name] = _kind(hints[item.name])
        if group := group_of(item):
            kinds |= _kinds(group, f"{prefix}{item.name}.")
    return kinds


def _kind(hint: Any) -> _Kind:
    members = [hint] if get_origin(hint) in (None, list, tuple) else list(get_args(hint))
    lists = [get_args(member)[0] for member in members if get_origin(member) in (list, tuple)]
    single = [m for m in members if get_origin(m) not in (list, tuple) and m is not type(None)]
    return _Kind(
        text=all(member in (str, Path) for member in single) and bool(single),
        texts=all(element in (str, Path, str | dict[str, Any]) for element in lists) and bool(lists),
        lists=bool(lists),
        mapping=get_origin(hint) is dict,
        whole=get_origin(hint) is not dict and any(get_origin(member) is dict for member in members),
        entries=str | dict[str, Any] in lists,
    )
