"""The border of the program: plain values become typed options, or a message that helps."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i2am_train.config.commands import COMMANDS
from i2am_train.config.evaluation import EvaluateConfig
from i2am_train.config.explanation import ExplainConfig
from i2am_train.config.models import SamplingConfig
from i2am_train.config.options import build, option_names, plain, unknown_option
from i2am_train.config.training import AblateConfig, OptimizationConfig, TrainConfig
from i2am_train.errors import ConfigError
from i2am_train.types import LayerWeighting, Pairing


def test_nested_values_get_their_types() -> None:
    """Groups, enums, paths, unions and tuples arrive as the schema says."""
    config = build(
        TrainConfig,
        {
            "output": "runs/here",
            "data": {"synthetic": {"test": 7}},
            "attribution": {"weighting": "density", "layers": [2, "up_blocks.2.attentions.0"]},
            "evaluation": {"pairing": "unpaired"},
            "optimization": {"betas": [0.5, 0.9], "learning_rate": 1},
        },
    )
    assert config.output == Path.cwd() / "runs/here"
    assert config.data.synthetic.test == 7
    assert config.attribution.weighting is LayerWeighting.DENSITY
    assert config.attribution.layers == [2, "up_blocks.2.attentions.0"]
    assert config.evaluation.pairing is Pairing.UNPAIRED
    assert config.optimization.betas == (0.5, 0.9)
    assert isinstance(config.optimization.learning_rate, float)
    assert config.seed == 0


def test_texts_and_mappings_in_one_list() -> None:
    """Import paths with and without keywords; keywords may be anything, and read back equal."""
    entries = ["a.b:C", {"fn": "a.b:D", "every": 5, "at": [1, {"x": None}]}]
    config = build(TrainConfig, {"callbacks": entries})
    assert config.callbacks == plain(config)["callbacks"] == entries
    with pytest.raises(ConfigError, match=r"callbacks\[0\]=null .* a text or a mapping"):
        build(TrainConfig, {"callbacks": [None]})


def test_one_or_several() -> None:
    """A lone checkpoint or sample and a list of them are both understood; a number can name a folder."""
    one = build(ExplainConfig, {"checkpoint": 2024, "sample": 3})
    assert (one.checkpoints, one.samples) == (["2024"], [3])
    several = build(ExplainConfig, {"checkpoint": ["tiny", "runs/a"], "sample": [3, 17]})
    assert (several.checkpoints, several.samples) == (["tiny", "runs/a"], [3, 17])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"checkpoint": []}, r"checkpoint=\[\] .* a list of values that are all different"),
        ({"checkpoint": "tiny", "sample": [3, 3]}, r"sample=\[3, 3\] .* all different"),
        ({"checkpoint": "tiny", "sample": [0, -1]}, r"sample\[1\]=-1 .* at least 0"),
        ({"checkpoint": "tiny", "sample": ["x"]}, r"sample\[0\]=x .* a whole number"),
        ({"checkpoint": "tiny", "sample": "x"}, r"sample=x .* a whole number"),
    ],
)
def test_impossible_lists_are_named(values: dict[str, object], message: str) -> None:
    """Nothing, the same twice, and what a lone value could not be either."""
    with pytest.raises(ConfigError, match=message):
        build(ExplainConfig, values)


def test_zero_is_a_value() -> None:
    """Seed 0, weight 0.0 and null are kept apart: nothing is replaced because it is falsy."""
    config = build(
        TrainConfig,
        {"seed": 0, "objective": {"terms": {"cwg": {"weight": 0.0}}}, "optimization": {"gradient_clip": None}},
    )
    assert config.seed == 0
    assert config.objective.terms == {"cwg": {"weight": 0.0}}
    assert config.optimization.gradient_clip is None


@pytest.mark.parametrize("schema", [c.options for c in COMMANDS.values()], ids=COMMANDS)
def test_plain_is_the_inverse_of_build(schema: type) -> None:
    """What a configuration says in YAML's types reads back as an equal configuration."""
    needed = {name for name, value in plain(schema).items() if value == "???"}
    needed |= {"checkpoint", "unet"} & plain(schema).keys()  # others can stand in their place
    given = dict.fromkeys(needed, "tiny")
    config = build(schema, given)
    assert build(schema, plain(config)) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"objectiv": {"dcml": 1}}, r"no option 'objectiv'\. Did you mean 'objective'\?"),
        ({"objective": {"varian": 1}}, r"no option 'objective\.varian'\. .*'objective\.variant'"),
        ({"objective": 3}, r"objective=3 .* a group of options"),
        ({"seed": "one"}, r"seed=one is not possible: expected a whole number"),
        ({"seed": 1.5}, r"seed=1\.5 .* whole number"),
        ({"seed": True}, r"seed=True .* whole number"),
        ({"seed": None}, r"seed=null .* whole number"),
        ({"seed": -1}, r"seed=-1 .* at least 0"),
        ({"resume": "yes"}, r"resume=yes .* true or false"),
        ({"objective": {"variant": "rewrd"}}, r"one of paper, .*Did you mean 'reward'\?"),
        ({"objective": {"layers": 10}}, r"objective\.layers=10 .*1\.\.\.9"),
        ({"attribution": {"delta": 1.0}}, r"attribution\.delta=1\.0 .* in \[0, 1\)"),
        ({"attribution": {"delta": float("nan")}}, r"attribution\.delta=nan"),
        ({"attribution": {"penalties": 3}}, r"attribution\.penalties=3 .* a list"),
        ({"attribution": {"penalties": [1, "x"]}}, r"attribution\.penalties\[1\]=x .* a number"),
        ({"optimization": {"betas": [0.9]}}, r"optimization\.betas=.* a list of 2 values"),
        ({"data": {"height": 100}}, r"data\.height=100 .* multiple of 16"),
        ({"name": "a/b"}, r"name=a/b .* names a folder"),
        ({"init": ""}, r"init='' .* a folder"),
    ],
)
def test_impossible_values_are_named(values: dict[str, object], message: str) -> None:
    """Each refusal names the option by its dotted path, the value found, and what was expected."""
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, values)


def test_a_required_option_is_asked_for() -> None:
    """Without a checkpoint, explain says what to type."""
    with pytest.raises(ConfigError, match=r"checkpoint is required .* checkpoint=VALUE"):
        build(ExplainConfig, {"checkpoint": "???"})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, r"found neither\. Give checkpoint=FOLDER"),
        ({"images": "a"}, r"found images\. .* images=FOLDER and reference=FOLDER"),
        ({"checkpoint": "tiny", "images": "a", "reference": "b"}, r"checkpoint and images and ref"),
        ({"checkpoint": "tiny", "resize": [64, 48]}, r"resize=\[64, 48\] .* null with a checkpoint"),
        ({"images": "a", "reference": "b", "resize": [64, 0]}, r"resize\[1\]=0 .* between 1 and 16384"),
        ({"images": "a", "reference": "b", "devices": 2}, r"devices=2 .* 1 for finished images"),
        ({"checkpoint": "tiny", "devices": 0}, r"devices=0 .* at least 1"),
        ({"checkpoint": "tiny", "evaluation": {"kernel_subset_size": 1}}, r"kernel_subset_size=1 .* at least 2"),
    ],
)
def test_evaluate_judges_one_thing(values: dict[str, object], message: str) -> None:
    """Either a checkpoint or two folders; what only belongs to folders is refused with a checkpoint."""
    with pytest.raises(ConfigError, match=message):
        build(EvaluateConfig, values)


@pytest.mark.parametrize(
    ("optimization", "message"),
    [
        ({"compile": True}, r"optimization\.compile=True .* false with trainer\.strategy=fsdp"),
        ({"channels_last": True}, r"optimization\.channels_last=True .* false with"),
        ({"optimizer": "adamw8bit"}, r"optimization\.optimizer=adamw8bit .* adamw with"),
        ({"precision": "16-mixed"}, r"precision=16-mixed .* 32-true or bf16-mixed with"),
    ],
)
def test_what_does_not_go_together_with_sharding(optimization: dict[str, object], message: str) -> None:
    """Refused as a configuration; without sharding the same is possible."""
    with pytest.raises(ConfigError, match=message):
        build(TrainConfig, {"optimization": optimization, "trainer": {"strategy": "fsdp"}})
    build(TrainConfig, {"optimization": optimization, "trainer": {"strategy": "ddp"}})


def test_only_one_kind_of_sharding() -> None:
    """Lightning's others would save parts; and a model that is judged is not sharded."""
    for strategy in ("fsdp_cpu_offload", "deepspeed_stage_3"):
        with pytest.raises(ConfigError, match=rf"strategy={strategy} .* expected fsdp"):
            build(TrainConfig, {"trainer": {"strategy": strategy}})
    with pytest.raises(ConfigError, match=r"strategy=fsdp .* expected auto or ddp"):
        build(EvaluateConfig, {"checkpoint": "tiny", "strategy": "fsdp"})


def test_patches_are_pairs() -> None:
    """Lists of [y, x] become tuples; anything else is refused at its place in the list."""
    config = build(ExplainConfig, {"checkpoint": "tiny", "generated_patches": [[3, 4], [0, 1]]})
    assert config.generated_patches == [(3, 4), (0, 1)]
    with pytest.raises(ConfigError, match=r"generated_patches\[1\]=5 .* list of 2"):
        build(ExplainConfig, {"checkpoint": "tiny", "generated_patches": [[3, 4], 5]})


def test_the_reference_arm_is_one_of_the_arms() -> None:
    """An ablation whose comparison has no partner is refused before anything is trained."""
    with pytest.raises(ConfigError, match="reference=baseline is none of the arms"):
        build(AblateConfig, {"arms": ["base", "refined"]})
    with pytest.raises(ConfigError, match="names nothing twice"):
        build(AblateConfig, {"seeds": [1, 1]})


def test_hints_find_the_group_of_a_word() -> None:
    """A right word without its group leads to the option; a strange word leads to --help."""
    known = option_names(TrainConfig)
    assert "'optimization.steps' or 'sampling.steps'" in unknown_option("steps", known)
    assert "'objective.variant'" in unknown_option("losses.variant", known)
    assert "--help" in unknown_option("zzzz", known)


@settings(max_examples=40, deadline=None)
@given(steps=st.integers(1, 1000), guidance=st.floats(1.0, 20.0), rate=st.floats(1e-8, 1.0, exclude_min=True))
def test_legal_numbers_survive(steps: int, guidance: float, rate: float) -> None:
    """Any legal number goes through build and plain unchanged."""
    sampling = build(SamplingConfig, {"steps": steps, "guidance": guidance})
    assert plain(sampling)["guidance"] == guidance
    assert sampling.steps == steps
    assert build(OptimizationConfig, {"learning_rate": rate}).learning_rate == rate
