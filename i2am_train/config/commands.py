"""The commands: what each is told, what it runs, and what its help begins with."""

from __future__ import annotations

from typing import Any, NamedTuple

from i2am_train.config.data import DataCacheConfig, DataCheckConfig, DataDeriveConfig, DataMakeConfig
from i2am_train.config.detection import DetectConfig
from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.config.explanation import ExplainConfig
from i2am_train.config.models import ExportConfig, InitConfig
from i2am_train.config.reporting import ReportConfig
from i2am_train.config.tracking import DashboardConfig
from i2am_train.config.training import AblateConfig, TrainConfig


class Command(NamedTuple):
    """A command of ``i2am``."""

    options: type[Any]
    """Schema of ``conf/<command>.yaml``."""
    workflow: str
    """Function of the options, ``module:function`` in ``i2am_train.workflows``; it may return an exit status."""
    examples: str
    first: str = ""
    """The options that people use first, separated by spaces."""
    goes_on: str = ""
    """How the same command continues after it was stopped; empty: it starts anew."""


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
    "detect": Command(
        DetectConfig,
        "detect:run",
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
        "export:run",
        """
        i2am export checkpoint=runs/refined-seed0 output=exported/refined
        i2am export checkpoint=runs/refined-seed0 output=PATH dtype=float16 push=USER/NAME
        """,
    ),
    "init": Command(
        InitConfig,
        "init:run",
        """
        i2am init unet=v1-5-pruned.safetensors encoder=facebook/dinov2-giant output=models/start
        i2am init unet=FOLDER vae=VITONHD_VAE_finetuning.ckpt encoder=FOLDER output=models/start
        i2am init custom=FILE.safetensors encoder=facebook/dinov2-giant output=models/custom
        """,
        first="output unet custom vae encoder height width paint_by_example dci_vton",
    ),
    "dashboard": Command(
        DashboardConfig,
        "dashboard:run",
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
