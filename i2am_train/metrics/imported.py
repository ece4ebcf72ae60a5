"""Image metrics of the user's own, by their import paths: entries of the option ``evaluation.metrics``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torchmetrics import Metric

from i2am_train.doors import calls, is_import_path, make, path_and_keywords, resolve
from i2am_train.errors import ConfigError, I2AMError
from i2am_train.metrics.registry import SHIPPED, MetricInfo, register
from i2am_train.types import GridSize

OPTION = "evaluation.metrics"
EXPECTED = (
    "a function of two batches of pictures (generated, real), float32 [batch, 3, height, width] in [0, 1], that "
    "returns one number per sample, or a torchmetrics.Metric that is updated with two such batches"
)
DESCRIPTION = ("name", "label", "higher_is_better", "digits", "unit", "description")
"""What an attribute of the object, or an entry of the mapping, says of a metric; other entries are its arguments."""
COLUMNS = ("index", "name", "garment_name")
"""What else stands in a sample's row."""


@dataclass(frozen=True)
class ImportedScore:
    """A metric of the user's own as all others are: two uint8 batches to one value per sample.

    A ``torchmetrics.Metric`` is reset and asked for each sample alone, in this process alone.
    """

    path: str
    score: Callable[..., Any]

    def __call__(
        self, generated: UInt8[Tensor, "batch 3 height width"], real: UInt8[Tensor, "batch 3 height width"]
    ) -> Float[Tensor, " batch"]:
        """One value per sample.

        Raises:
            ConfigError: what comes back is something else.
        """
        with torch.no_grad():
            found = self._values(generated.float() / 255, real.float() / 255)
        values = torch.as_tensor(found, device=generated.device)
        if values.shape != (len(generated),) or values.is_complex():
            raise ConfigError(
                f"{OPTION}: {self.path} gave values of shape {list(values.shape)} for {len(generated)} samples. "
                f"Expected {EXPECTED}."
            )
        return values.float()

    def _values(self, generated: Tensor, real: Tensor) -> Any:
        if not isinstance(self.score, Metric):
            return self.score(generated, real)
        metric = self.score.to(generated.device)
        metric.sync_on_compute = False
        values = []
        for pair in zip(generated[:, None], real[:, None], strict=True):
            metric.reset()
            metric.update(*pair)
            values.append(torch.as_tensor(metric.compute()).reshape(()))
        metric.reset()
        return torch.stack(values)


def metric_names(entries: Sequence[str | Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of the metrics that the option's entries mean; those by import path are registered.

    Args:
        entries: names, import paths, or mappings of an import path (``fn``) and what describes the metric.

    Raises:
        ConfigError: an entry cannot be imported or is no metric, or its name is taken.

    >>> metric_names(["ssim", "fid"])
    ('ssim', 'fid')
    """
    names: dict[str, str] = {}
    for index, entry in enumerate(entries):
        if isinstance(entry, str) and not is_import_path(entry):
            names[entry] = entry
            continue
        option = f"{OPTION}[{index}]"
        path, keywords = path_and_keywords(entry, option)
        found = resolve(path, option, EXPECTED, partial(_fault, _arguments(keywords)))
        name, info = _described(f"{option}={path}", found, keywords)
        if names.setdefault(name, path) != path or name in (*SHIPPED, *COLUMNS):
            raise ConfigError(
                f"{option}={path} is called '{name}', and so is another metric. Give it a name of its own: "
                f"{{fn: {path}, name: my_{name}}}."
            )
        register(name, info, ImportedScore(path, _made(f"{option}={path}", found, keywords)))
    return tuple(names)


def check_imported(scores: Mapping[str, Callable[[Tensor, Tensor], Tensor]], size: GridSize) -> None:
    """Ask the user's own metrics for two random pictures: what would fail after hours fails now.

    Raises:
        ConfigError: one fails, or gives something else than one number per sample.
    """
    draw = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 2, 3, *size), generator=draw, dtype=torch.uint8)
    for name, score in scores.items():
        if not isinstance(score, ImportedScore):
            continue
        try:
            score(*pictures)
        except I2AMError:
            raise
        except Exception as error:
            raise ConfigError(
                f"{OPTION}: {name} ({score.path}) fails on two random pictures of {size}: {type(error).__name__}: "
                f"{error}. Expected {EXPECTED}; --debug shows where it fails."
            ) from error


def _arguments(keywords: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in keywords.items() if name not in DESCRIPTION}


def _fault(arguments: Mapping[str, Any], found: Any) -> str | None:
    if isinstance(found, type):
        if not issubclass(found, Metric):
            return "is a class that does not derive from torchmetrics.Metric"
        return calls(**arguments)(found) or calls("self", "generated", "real")(found.update)
    if isinstance(found, Metric):
        if arguments:
            return f"is an object already and takes no {', '.join(arguments)}"
        return calls("generated", "real")(found.update)
    return calls("generated", "real", **arguments)(found)


def _made(named: str, found: Any, keywords: Mapping[str, Any]) -> Callable[..., Any]:
    if isinstance(found, Metric):
        return found
    if not isinstance(found, type):
        return partial(found, **_arguments(keywords))
    made: Metric = make(found, named, **_arguments(keywords))
    return made


def _described(named: str, found: Any, keywords: Mapping[str, Any]) -> tuple[str, MetricInfo]:
    """Name and description: what the mapping says, else the object's attributes, else its own name and text."""
    own = getattr(found, "__name__", type(found).__name__)
    said: dict[str, Any] = {
        "name": own,
        "label": None,
        "higher_is_better": None,
        "digits": 4,
        "unit": "",
        "description": None,
    }
    said |= {name: getattr(found, name) for name in DESCRIPTION if hasattr(found, name)}
    said |= {name: keywords[name] for name in DESCRIPTION if name in keywords}
    name = str(said.pop("name"))
    if not re.fullmatch(r"[^\W\d]\w{0,39}", name):
        raise ConfigError(
            f"{named} is called {name!r}, which cannot be the name of a column: expected letters, digits and _, at "
            f"most 40. Give it a name: {{fn: {named.partition('=')[2]}, name: my_metric}}."
        )
    first_line = (getattr(found, "__doc__", None) or name).strip().splitlines()[0].rstrip(".")
    said["label"] = said["label"] or name
    said["description"] = said["description"] or first_line[:100]
    for text in ("label", "unit", "description"):
        line = said[text]
        if not isinstance(line, str) or not line.isprintable() or len(line) > 100:
            raise ConfigError(f"{named} has the {text} {line!r}. Expected one line of at most 100 letters.")
    better, digits = said["higher_is_better"], said["digits"]
    if better not in (True, False, None) or digits not in range(11):
        raise ConfigError(
            f"{named} has higher_is_better={better!r} and digits={digits!r}. Expected true, false or null, and a "
            "number of 0 to 10 decimal places."
        )
    return name, MetricInfo(said["label"], better, digits, "image", said["description"], said["unit"], paired_only=True)
