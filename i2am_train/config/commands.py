"""The schema of each command's options."""

from __future__ import annotations

from typing import Any

from i2am_train.config.data import (
    DataCacheConfig,
    DataCheckConfig,
    DataDeriveConfig,
    DataMakeConfig,
)
from i2am_train.config.detection import DetectConfig
from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.config.explanation import ExplainConfig
from i2am_train.config.models import ExportConfig, InitConfig
from i2am_train.config.reporting import ReportConfig
from i2am_train.config.tracking import DashboardConfig
from i2am_train.config.training import AblateConfig, TrainConfig

COMMANDS: dict[str, type[Any]] = {
    "train": TrainConfig,
    "evaluate": EvaluateConfig,
    "ablate": AblateConfig,
    "explain": ExplainConfig,
    "detect": DetectConfig,
    "report": ReportConfig,
    "export": ExportConfig,
    "init": InitConfig,
    "dashboard": DashboardConfig,
    "data_make": DataMakeConfig,
    "data_check": DataCheckConfig,
    "data_cache": DataCacheConfig,
    "data_derive": DataDeriveConfig,
}
"""Schema of each file ``conf/<command>.yaml``."""
