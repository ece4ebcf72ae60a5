"""The names under which things are logged; they do not change between versions.

Scalars of a training run, the same in ``metrics.csv``, TensorBoard and W&B:

- ``loss/total``, ``loss/denoising`` and ``loss/<term>`` for each term of ``objective.terms`` that has a weight (without
  it; of several layers the weighted sum, beside ``loss/<term>@<layer>`` for each), every ``trainer.log_every_n_steps``
  steps; ``weight/<term>``: the weight of a term with a schedule, at the same steps;
- ``lr``: the learning rate, and ``grad_norm``: the norm of the gradient before it is clipped (not with float16), at
  the same steps;
- ``step_seconds``: the time from the end of one optimizer step to that of the next, at the same steps;
- ``val/<metric>``: each metric of ``metrics.registry.METRICS`` that was asked for, and IMACS at every threshold and
  penalty (``val/imacs_g@d0.4_l3``), once for each validation;
- ``epoch``: beside losses and validation scores.

Their axis is the 0-based optimiser step after which they were taken: ``step`` in CSV and TensorBoard, ``STEP`` in W&B.

Beside them W&B has, for each validation, ``val/table`` (a row per sample), ``val/attribution_generated`` and
``val/attribution_reference`` (pictures with mask overlays), ``val/attribution`` (the panel) and ``val/samples``. A run
of job type "evaluation" has ``eval/<metric>``, ``eval/table`` and ``eval/samples``; one of job type "study" has
``study/arms`` and ``study/differences``.

A run of job type "detection" has ``detect/<kind>/<method>``, the mean IoU on real and on generated images, methods as
``results.json`` has them and detectors by their label; ``detect/sweep/<method>`` over ``detect/delta``; and the tables
``detect/methods``, ``detect/thresholds`` (both with intervals), ``detect/samples`` (a row per sample) and
``detect/table`` (pictures of the first ones), whose boxes are in ``detect/boxes``.
"""

from i2am_train.config.objective import TERMS
from i2am_train.metrics.registry import METRICS

STEP = "trainer/global_step"
"""W&B's name of the optimiser step, as Lightning's logger writes it."""
EPOCH = "epoch"
LEARNING_RATE = "lr"
GRADIENT_NORM = "grad_norm"
STEP_SECONDS = "step_seconds"
LOSS, VALIDATION, EVALUATION, STUDY = "loss/", "val/", "eval/", "study/"
DETECTION = "detect/"

LOSSES = tuple(LOSS + name for name in ("total", "denoising", *TERMS))
"""Losses of the package; a run may have terms of its own beside them."""

TABLE = "table"
SAMPLES = "samples"
ATTRIBUTION = "attribution"
ATTRIBUTION_GENERATED = "attribution_generated"
ATTRIBUTION_REFERENCE = "attribution_reference"
STUDY_ARMS, STUDY_DIFFERENCES = STUDY + "arms", STUDY + "differences"
DETECTION_METHODS, DETECTION_THRESHOLDS = DETECTION + "methods", DETECTION + "thresholds"
DETECTION_SAMPLES, DETECTION_TABLE = DETECTION + SAMPLES, DETECTION + TABLE
DETECTION_BOXES = DETECTION + "boxes"
DETECTION_DELTA, DETECTION_SWEEP = DETECTION + "delta", DETECTION + "sweep/"

TRAIN_JOB, EVALUATION_JOB, STUDY_JOB = "train", "evaluation", "study"
DETECTION_JOB = "detection"


ARM = "arm"
"""Key of a run's configuration that names its arm, on trainings and evaluations."""


def summary_of(metric: str) -> str:
    """What W&B keeps of a metric's curve, for ``define_metric``: its last value, and its best where one end is good.

    >>> summary_of("imacs_g"), summary_of("correspondence_error"), summary_of("spread_ratio")
    ('last,max', 'last,min', 'last')
    """
    better = METRICS[metric].higher_is_better
    return "last" if better is None else f"last,{'max' if better else 'min'}"
