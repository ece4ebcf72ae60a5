"""The model card of an exported model: sizes, training, data, scores with intervals, limits.

What is known is taken from the run that made the model and from the evaluations that lie in its folder; what is not
known is left out, and the card says so.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from i2am_train.files import read_object
from i2am_train.metrics.registry import METRICS
from i2am_train.reporting.table import interval_text, markdown_lines, number
from i2am_train.results.evaluations import Evaluation, read_evaluations
from i2am_train.runs import MANIFEST_FILE, SETTINGS_FILE
from i2am_train.types import GridSize

_TAGS = ["virtual-try-on", "attention", "i2am", "diffusers"]
_PIPELINE_TAG = "image-to-image"
_SHOWN = ("name", "init", "objective", "optimization")
"""Groups of a run's settings that make the model what it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the card says of the model itself."""

    name: str
    origin: str
    """The checkpoint, as the command named it."""
    run: Path
    """Folder of the run, or of the model where there is none."""
    image_size: GridSize
    reference_grid: GridSize
    encoder: str
    parameters: Mapping[str, int]
    """Number of weights by network."""
    prediction_type: str
    dtype: str
    license: str | None = None
    base_model: str | None = None


def model_card(facts: ModelFacts) -> str:
    """The text of ``README.md``, with the header that the hub reads.

    Raises:
        RunFolderError: an evaluation in the run's folder cannot be read.
    """
    from huggingface_hub import ModelCard, ModelCardData

    evaluations = _evaluations(facts.run)
    data = ModelCardData(
        license=facts.license,
        library_name="diffusers",
        pipeline_tag=_PIPELINE_TAG,
        tags=_TAGS,
        base_model=facts.base_model,
        model_name=facts.name.rpartition("/")[2],
        eval_results=list(_eval_results(evaluations)) or None,
        metrics=sorted({name for one in evaluations for name, _ in _scores(one)}) or None,
    )
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(facts, evaluations)}"))


def _evaluations(run: Path) -> Sequence[Evaluation]:
    if not any(run.glob("evaluation*/results.json")):
        return ()
    final = [one for one in read_evaluations([run], mixed=True) if not one.snapshot]
    return tuple(final)


def _scores(evaluation: Evaluation) -> Iterator[tuple[str, float]]:
    """The scores of an evaluation that tables know, in their order."""
    for name in METRICS:
        if evaluation.metrics.get(name) is not None:
            yield name, evaluation.metrics[name]


def _eval_results(evaluations: Sequence[Evaluation]) -> Iterator[Any]:
    from huggingface_hub import EvalResult

    for evaluation in evaluations:
        for name, value in _scores(evaluation):
            yield EvalResult(
                task_type=_PIPELINE_TAG,
                task_name="Virtual try-on",
                dataset_type=str(evaluation.manifest.get("data")),
                dataset_name=_data_name(evaluation),
                dataset_config=str(evaluation.pairing),
                dataset_split="test",
                metric_type=name,
                metric_name=METRICS[name].label,
                metric_value=round(value, METRICS[name].digits + 2),
            )


def _data_name(evaluation: Evaluation) -> str:
    root = (evaluation.settings.get("data") or {}).get("root")
    return Path(root).name if root else "i2am_train synthetic"


def _text(facts: ModelFacts, evaluations: Sequence[Evaluation]) -> str:
    parts = [
        f"# {facts.name.rpartition('/')[2]}",
        "A latent diffusion model that dresses a person in a reference garment (virtual try-on): Stable Diffusion's "
        "U-Net and VAE, with an image encoder where the text encoder was, as in I2AM (ICLR 2025). Exported by "
        "i2am_train.",
        "## Use",
        _USE.format(name=facts.name),
        "## Model",
        *_model(facts),
        "## Training",
        *_training(facts),
        "## Evaluation",
        *_evaluation(evaluations),
        "## Limits",
        _LIMITS,
    ]
    return "\n\n".join(parts) + "\n"


_USE = """\
`trust_remote_code=True` runs `pipeline.py` and `projector/projector.py` of this folder, which need torch, diffusers and
transformers and nothing else; read them first.

```python
from diffusers import DiffusionPipeline

name = "{name}"  # or the path of this folder
pipeline = DiffusionPipeline.from_pretrained(name, custom_pipeline=name, trust_remote_code=True)
image = pipeline(garment, agnostic, densepose, num_inference_steps=10, guidance_scale=2.0).images[0]  # PIL pictures
```

With i2am_train installed, `trace(pipeline)` gives its attribution maps, and
`i2am evaluate checkpoint=hub:USER/NAME` judges it."""

_LIMITS = """\
- Inputs are an agnostic person image and a DensePose rendering made as those of the training data; others, and other
  sizes, were not tried.
- The scores above are those of the named data and sampling, and say nothing of other persons, garments or poses.
- Attribution maps show where the model looks, not why. Results on people of whom the data has few may be worse; do not
  use pictures of persons without their consent."""


def _model(facts: ModelFacts) -> Iterator[str]:
    weights = ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in facts.parameters.items())
    yield (
        f"- Images: {facts.image_size} (height x width)\n"
        f"- Reference: {facts.encoder}, {facts.reference_grid} patches\n"
        f"- Weights: {weights}; stored as {facts.dtype}\n"
        f"- The network predicts: {facts.prediction_type}"
    )


def _training(facts: ModelFacts) -> Iterator[str]:
    if not (facts.run / SETTINGS_FILE).is_file():
        yield f"Not known: the model was exported from `{facts.origin}`, which is no folder of a training run."
        return
    settings = read_object(facts.run / SETTINGS_FILE)
    file = facts.run / MANIFEST_FILE
    manifest = read_object(file) if file.is_file() else {}
    git = manifest.get("git") or {}
    changed = " with local changes" if git.get("dirty") else ""
    yield (
        f"- Command: `{manifest.get('command', 'not known')}`\n"
        f"- Code: i2am_train, commit {git.get('commit', 'not known')}{changed}\n"
        f"- Data: {(settings.get('data') or {}).get('root') or 'i2am_train synthetic'}, fingerprint "
        f"{manifest.get('data', 'not known')}\n"
        f"- Seed: {settings.get('seed')}"
    )
    kept = {group: settings[group] for group in _SHOWN if settings.get(group) is not None}
    rows = [(f"`{name}`", str(value)) for name, value in _leaves(kept)]
    yield markdown_lines(("Option", "Value"), rows, right=())


def _leaves(options: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Options by their dotted names.

    >>> dict(_leaves({"name": "tiny", "objective": {"layers": {"2": 1.0}}}))
    {'name': 'tiny', 'objective.layers.2': 1.0}
    """
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _evaluation(evaluations: Sequence[Evaluation]) -> Iterator[str]:
    if not evaluations:
        yield "Not evaluated: no evaluation lay in the run's folder when it was exported."
    for evaluation in evaluations:
        sampling = evaluation.settings.get("sampling") or {}
        yield (
            f"{len(evaluation.samples)} held-out samples of {_data_name(evaluation)} (fingerprint "
            f"{evaluation.manifest.get('data')}), {evaluation.pairing}; {sampling.get('sampler')}, "
            f"{sampling.get('steps')} steps, guidance {sampling.get('guidance')}. Intervals are bootstrapped over "
            "samples, at 95 %."
        )
        rows = [_row(evaluation, name, value) for name, value in _scores(evaluation)]
        yield markdown_lines(("Score", "Value", "Interval"), rows, right=(1, 2))


def _row(evaluation: Evaluation, name: str, value: float) -> tuple[str, str, str]:
    info, ends = METRICS[name], evaluation.intervals.get(name)
    interval = interval_text((ends["low"], ends["high"]), info.digits) if ends else "–"
    return info.heading, number(value, info.digits), interval
