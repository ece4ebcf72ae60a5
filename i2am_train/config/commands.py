"""The commands: what each is told, what it runs, and its ``--help``."""

from __future__ import annotations

import ast
import inspect
import sys
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from functools import cache
from itertools import pairwise
from textwrap import dedent, fill, indent
from typing import Any, Literal, NamedTuple, get_args, get_origin, get_type_hints

from i2am_train.config.data import DataCacheConfig, DataCheckConfig, DataDeriveConfig, DataMakeConfig, DataMatchConfig
from i2am_train.config.evaluation import DiagnoseConfig, EvaluateConfig
from i2am_train.config.explanation import DetectConfig, ExplainConfig, FaithfulConfig
from i2am_train.config.locations import conf_folder, experiment_names
from i2am_train.config.models import ExportConfig, InitConfig
from i2am_train.config.options import REQUIRED, group_of, plain
from i2am_train.config.reporting import DashboardConfig, ReportConfig
from i2am_train.config.training import AblateConfig, TrainConfig


class Command(NamedTuple):
    """A command of ``i2am``."""

    options: type[Any]
    """Their class, or schema."""
    workflow: str
    """Function of the options, ``module:function`` in ``i2am_train.workflows``; it may return an exit status."""
    examples: str
    first: str = ""
    """The options that people use first, separated by spaces."""
    goes_on: str = ""
    """How the same command continues after it was stopped; empty: it starts anew."""


DEFAULT_FILES = {
    "data": "synthetic",
    "objective": "denoising",
    "optimization": "finetune",
    "sampling": "ddim10",
    "attribution": "paper",
    "evaluation": "offline",
    "validation": "epoch",
    "tracking": "local",
    "trainer": "single",
}
"""The file of ``conf/<group>/`` that a command takes for each of its groups unless it is told another one."""
WITH_EXPERIMENTS = ("train", "ablate")
"""Commands that take ``experiment=``."""

COMMANDS: dict[str, Command] = {
    "train": Command(
        TrainConfig,
        "train:run",
        """
        i2am train experiment=refined seed=1
        i2am train experiment=baseline init=PATH output=runs/my-baseline optimization.steps=400
        i2am train experiment=refined data=viton_hd data.root=PATH init=PATH trainer=ddp
        """,
        first="experiment init data.root output seed optimization.steps "
        "optimization.learning_rate data.batch_size trainer.devices dry_run",
        goes_on="from the last checkpoint",
    ),
    "evaluate": Command(
        EvaluateConfig,
        "evaluate:run",
        """
        i2am evaluate checkpoint=tiny
        i2am evaluate checkpoint=runs/refined-seed0 evaluation.pairing=unpaired
        i2am evaluate checkpoint=runs/refined-seed0 sampling=dpmpp10 devices=2 strategy=ddp
        i2am evaluate images=PATH reference=PATH output=runs/other-model evaluation=paper
        i2am evaluate images=PATH reference=PATH evaluation.pairing=unpaired resize=[512,384]
        """,
        first="checkpoint images reference data.root evaluation.pairing evaluation.samples "
        "evaluation.metrics sampling.steps device output",
        goes_on="with the batches that are not there yet",
    ),
    "ablate": Command(
        AblateConfig,
        "ablate:run",
        """
        i2am ablate seeds=[0,1,2]
        i2am ablate arms=[base,baseline,refined,supervised] seeds=[0,1,2,3,4] name=study
        i2am ablate experiment=demo
        """,
        first="experiment arms seeds reference name init data.root optimization.steps evaluation.samples output",
        goes_on="with the cells that are not finished yet",
    ),
    "explain": Command(
        ExplainConfig,
        "explain:run",
        """
        i2am explain checkpoint=tiny sample=17
        i2am explain checkpoint=runs/refined-seed0 sample=17 attribution.layer=5 pairing=unpaired
        i2am explain checkpoint=[runs/baseline-seed0,runs/refined-seed0] sample=[3,17]
        i2am explain --recipes
        i2am explain model=catvton checkpoint=PATH adapter=FILE image=FILE mask=FILE reference=FILE
        i2am explain model=factory factory=my_model:build image=FILE mask=FILE reference=FILE
        """,
        first="checkpoint sample pairing data.root attribution.layer model image mask reference output",
    ),
    "faithful": Command(
        FaithfulConfig,
        "faithful:run",
        """
        i2am faithful checkpoint=tiny
        i2am faithful checkpoint=runs/refined-seed0 samples=64 layers=[2,5,8] fill=blur
        i2am faithful model=catvton checkpoint=PATH adapter=FILE image=FILE mask=FILE reference=FILE
        """,
        first="checkpoint samples layers shares fill data.root model image reference output",
        goes_on="with the batches that are not there yet",
    ),
    "diagnose": Command(
        DiagnoseConfig,
        "faithful:diagnose",
        """
        i2am diagnose checkpoint=tiny
        i2am diagnose checkpoint=runs/baseline-seed0 samples=64 heads=false
        i2am train experiment=runs/baseline-seed0/diagnose/repair.yaml init=runs/baseline-seed0
        """,
        first="checkpoint samples layers heads least_use data.root sampling.steps device output",
        goes_on="with the batches that are not there yet",
    ),
    "detect": Command(
        DetectConfig,
        "explain:detect",
        """
        i2am detect root=data/coco dtype=float16
        i2am detect root=data/coco detectors=[torchvision:maskrcnn_resnet50_fpn,PekingU/rtdetr_r50vd]
        i2am detect pipeline=FOLDER root=PATH split=val2017 height=256 width=256 steps=20
        """,
        first="root pipeline detectors samples steps dtype device delta output",
        goes_on="with the batches that are not there yet",
    ),
    "report": Command(
        ReportConfig,
        "report:run",
        """
        i2am report runs=[runs/study]
        i2am report runs=[runs/baseline-seed0,runs/refined-seed0] explained=[FOLDER]
        i2am report explained=[runs/explain-tiny-test17-paired]
        i2am report detected=[runs/detect-Paint-by-Example-coco]
        i2am report explained=[FOLDER,OTHER] models=[baseline,refined] figures=[refinement,scores]
        """,
        first="runs explained detected names figures formats layers output",
    ),
    "export": Command(
        ExportConfig,
        "models:export",
        """
        i2am export checkpoint=runs/refined-seed0 output=exported/refined
        i2am export checkpoint=runs/refined-seed0 output=PATH dtype=float16 push=USER/NAME
        """,
    ),
    "init": Command(
        InitConfig,
        "models:init",
        """
        i2am init unet=v1-5-pruned.safetensors encoder=facebook/dinov2-giant output=models/start
        i2am init unet=FOLDER vae=VITONHD_VAE_finetuning.ckpt encoder=FOLDER output=models/start
        i2am init custom=FILE.safetensors encoder=facebook/dinov2-giant output=models/custom
        """,
        first="output unet custom vae encoder height width paint_by_example dci_vton",
    ),
    "dashboard": Command(
        DashboardConfig,
        "report:dashboard",
        """
        i2am dashboard
        i2am dashboard entity=my-team project=i2am-train group=study
        i2am dashboard output=dashboard.json
        """,
    ),
    "data_make": Command(
        DataMakeConfig,
        "data:make",
        """
        i2am data make
        i2am data make root=data/small train=200 test=20 height=64 width=48 seed=1
        """,
    ),
    "data_derive": Command(
        DataDeriveConfig,
        "data:derive",
        """
        i2am data derive root=data/zalando-hd-resized
        i2am data derive root=/data/DressCode categories=[upper_body,dresses] preview=true
        i2am data derive root=my_photographs parser=FOLDER estimator=FOLDER preview=true
        i2am data derive root=my_photographs parser=mattmdjaga/segformer_b2_clothes pose=none
        """,
        goes_on="with the pictures that are not there yet",
    ),
    "data_match": Command(
        DataMatchConfig,
        "data:match",
        """
        i2am data match root=data/zalando-hd-resized preview=true
        i2am data match root=/data/DressCode categories=[upper_body]
        """,
        goes_on="with the samples that are not there yet",
    ),
    "data_check": Command(
        DataCheckConfig,
        "data:check",
        """
        i2am data check root=data/zalando-hd-resized height=1024 width=768
        i2am data check root=PATH json=report.json
        """,
    ),
    "data_cache": Command(
        DataCacheConfig,
        "data:cache",
        """
        i2am data cache root=data/zalando-hd-resized init=PATH output=caches/viton
        i2am data cache root=PATH init=PATH output=PATH variants=8 dtype=float16
        """,
        goes_on="with the shards that are not there yet",
    ),
}

WIDTH, NAME_WIDTH = 100, 36
"""Columns of the help, and of the names in it."""


def command_help(command: str) -> str:
    """The ``--help`` of a command: its options with defaults, those that people use first, then the others by group.

    >>> print(command_help("data_check").splitlines()[0])
    usage: i2am data check [name=value ...]
    """
    schema, first = COMMANDS[command].options, COMMANDS[command].first.split()
    known = ", ".join(experiment_names([item.name for item in fields(schema)]))
    experiment = f"Options that belong together, of a file in conf/experiment: {known}."
    entries = {"experiment": _entry("experiment=null", experiment), **_entries(schema)}
    parts = [
        f"usage: i2am {command.replace('_', ' ')} [name=value ...]",
        str(schema.__doc__),
        f"examples:\n{indent(dedent(COMMANDS[command].examples).strip(), '  ')}",
        _block("options that are used first (name=value, without dashes)", first, entries),
        *_groups(schema, "", {n: text for n, text in entries.items() if n not in first}),
        _files(schema),
        "also: --cfg job shows the composed options, --info searchpath where they come from,\n"
        "      --debug shows the traceback of an error, -m seed=0,1,2 runs a sweep (as SLURM jobs with\n"
        "      hydra/launcher=submitit_slurm, after pip install hydra-submitit-launcher).",
    ]
    return "\n\n".join(part for part in parts if part)


def field_docstrings(schema: type[Any]) -> dict[str, str]:
    """The text under each field of a class of options.

    >>> from i2am_train.config.data import SyntheticConfig
    >>> field_docstrings(SyntheticConfig)["test"]
    'Number of held-out samples.'
    """
    found: dict[str, str] = {}
    for of in (one for one in reversed(schema.__mro__) if is_dataclass(one)):
        for field_node, text_node in pairwise(_class_bodies(of.__module__)[of.__name__]):
            match field_node, text_node:
                case (ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text)))):
                    found[name] = " ".join(text.split())
    return found


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in tree.body if isinstance(node, ast.ClassDef)}


def _entries(schema: type[Any], prefix: str = "") -> dict[str, str]:
    """The entry of each option by its dotted name, options of groups included."""
    texts, defaults, hints = field_docstrings(schema), plain(schema), get_type_hints(schema)
    entries: dict[str, str] = {}
    for item in fields(schema):
        name = f"{prefix}{item.name}"
        if group := group_of(item):
            entries |= _entries(group, f"{name}.")
        else:
            text = texts[item.name] + _choices(hints[item.name])
            entries[name] = _entry(f"{name}={_shown(defaults[item.name])}", text)
    return entries


def _block(title: str, names: Iterable[str], entries: Mapping[str, str]) -> str:
    lines = [entries[name] for name in names if name in entries]
    return "\n".join([fill(f"{title}:", WIDTH), *lines]) if lines else ""


def _choices(hint: Any) -> str:
    """The legal values of an option that has only a few."""
    values: tuple[Any, ...] = get_args(hint) if get_origin(hint) is Literal else ()
    if isinstance(hint, type) and issubclass(hint, Enum):
        values = tuple(member.value for member in hint)
    return f" One of {', '.join(values)}." if values else ""


def _groups(schema: type[Any], prefix: str, entries: Mapping[str, str]) -> list[str]:
    """One block for the options of a schema, and one per group in it."""
    title = f"{prefix[:-1]}: {schema.__doc__}".removesuffix(".") if prefix else "options"
    blocks = [_block(title, [f"{prefix}{item.name}" for item in fields(schema)], entries)]
    for item in fields(schema):
        if group := group_of(item):
            blocks += _groups(group, f"{prefix}{item.name}.", entries)
    return blocks


def _files(schema: type[Any]) -> str:
    """The choices of files in conf/ for this command's groups."""
    options = [item.name for item in fields(schema)]
    choices = {group: sorted(path.stem for path in (conf_folder() / group).glob("*.yaml")) for group in options}
    lines = [f"  {group}={'|'.join(names)}" for group, names in choices.items() if names]
    return "\n".join(["files of options, each a file in conf/<group>/:", *lines]) if lines else ""


def _shown(value: Any) -> str:
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(_shown, value))}]"
    return "(required)" if value == REQUIRED else str(value)


def _entry(name: str, text: str) -> str:
    """An option and its meaning in two columns; a long option gets a line of its own."""
    margin = " " * (NAME_WIDTH + 2)
    wrapped = fill(text, WIDTH, initial_indent=margin, subsequent_indent=margin)
    if len(name) + 3 > NAME_WIDTH:
        return f"  {name}\n{wrapped}"
    return f"  {name}".ljust(len(margin)) + wrapped.lstrip()
