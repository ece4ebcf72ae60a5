"""Hydra: every file composes, experiments have the last word, arms inherit, and what was typed is what arrives."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf

from i2am_train.config.commands import COMMANDS
from i2am_train.config.locations import conf_folder, experiment_names
from i2am_train.config.options import build, option_names, plain
from i2am_train.config.store import arm_config, arm_values, as_typed, compose, to_dataclass, to_yaml
from i2am_train.config.training import AblateConfig, TrainConfig, TrainingGroups
from i2am_train.errors import ConfigError

REQUIRED = {
    "evaluate": ["checkpoint=x"],
    "explain": ["checkpoint=x"],
    "data_check": ["root=x"],
    "export": ["checkpoint=x", "output=y"],
    "init": ["unet=x", "output=y"],
    "data_derive": ["root=x"],
    "data_match": ["root=x"],
    "data_cache": ["root=x", "output=y"],
}
ARMS = experiment_names(option_names(TrainConfig))
STUDIES = sorted(set(experiment_names(option_names(AblateConfig))) - set(ARMS))
FILES = sorted(
    (path.parent.name, path.stem) for path in conf_folder().glob("*/*.yaml") if path.parent.name != "experiment"
)


def leaves(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted names and values of all options."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        nested = leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else None
        found |= {f"{prefix}{name}": value} if nested is None else nested
    return found


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_the_schema_s(command: str) -> None:
    """The default files say nothing else than --help, which shows the schema's defaults."""
    overrides = REQUIRED.get(command, [])
    given = dict(override.split("=") for override in overrides)
    assert compose(command, overrides) == build(COMMANDS[command].options, given)


@pytest.mark.parametrize(("group", "name"), FILES)
def test_every_file_of_a_group_composes(group: str, name: str) -> None:
    """No file in conf/ names an option that does not exist, and each of its values arrives."""
    config = plain(compose("train", [f"{group}={name}"]))
    file = OmegaConf.load(conf_folder() / group / f"{name}.yaml")
    said = OmegaConf.to_container(OmegaConf.create(config | {group: file})[group], resolve=True)  # ${...} of the others
    assert isinstance(said, dict)
    arrived = leaves(config[group])
    for option, value in leaves(said).items():
        assert arrived[option] == value


@pytest.mark.parametrize(("command", "name"), [("train", a) for a in ARMS] + [("ablate", s) for s in STUDIES])
def test_every_leaf_of_every_experiment_survives(command: str, name: str) -> None:
    """Nothing that an experiment file sets is overridden by the defaults."""
    arrived = leaves(plain(compose(command, [f"experiment={name}"])))
    for option, value in leaves(arm_values(name)).items():
        assert arrived[option] == value


def test_every_experiment_belongs_to_a_command() -> None:
    """No file in conf/experiment is left out of the test above."""
    files = {path.stem for path in (conf_folder() / "experiment").glob("*.yaml")}
    assert files == {*ARMS, *STUDIES}
    assert {"baseline", "refined", "supervised"} <= set(ARMS)
    assert "demo" in STUDIES


def test_the_command_line_has_the_last_word() -> None:
    """An override beats the experiment."""
    config = compose("train", ["experiment=refined", "objective.terms.cwg=0.5", "seed=3"])
    assert config.objective.terms["cwg"] == {"weight": 0.5, "entropy_floor": 0.4}
    assert (config.seed, config.name) == (3, "refined")
    assert config.folder == Path.cwd() / "runs" / "refined-seed3"


@pytest.mark.parametrize(
    ("experiment", "words", "terms"),
    [
        ("baseline", ["objective.terms.cwg=.01"], {"cwg": {"weight": 0.01}}),
        ("baseline", ["objective.terms.cwg.weight=.01"], {"cwg": {"weight": 0.01}}),
        ("baseline", ["objective.terms.cwg={weight: .01}"], {"cwg": {"weight": 0.01}}),
        ("baseline", ["objective.terms={cwg: {weight: .01}}"], {"cwg": {"weight": 0.01}}),
        ("supervised", ["objective.terms.supervised=1e-3"], {"supervised": {"weight": 0.001}}),
        (
            "supervised",
            ["objective.terms.cwg=1", "objective.terms.cwg.timesteps=[0,500]", "objective.terms.cwg.sigma=2"],
            {"supervised": {"weight": 0.03}, "cwg": {"weight": 1.0, "timesteps": [0, 500], "sigma": 2}},
        ),
        ("supervised", ["~objective.terms.supervised"], {}),
    ],
)
def test_terms_on_the_command_line(experiment: str, words: list[str], terms: dict[str, Any]) -> None:
    """As a user would write them, whether the experiment has the term or not."""
    assert compose("train", [f"experiment={experiment}", *words]).objective.terms == terms


def test_another_weight_keeps_a_term_s_keywords() -> None:
    """The number stands for the weight and not for the whole term."""
    cwg = compose("train", ["experiment=paper_refined", "objective.terms.cwg=3"]).objective.terms["cwg"]
    assert cwg == {"weight": 3.0, "sigma": 1.0, "detach_centers": False}
    with pytest.raises(ConfigError, match=r"objective\.terms\.cwg=3 .*such as objective\.terms\.cwg=\{name: value"):
        compose("train", ["experiment=paper_refined", "objective.terms={cwg: 3}"])


@pytest.mark.parametrize(
    ("word", "layers"),
    [
        ("5", {5: 1.0}),
        ("[2,5]", {2: 1.0, 5: 1.0}),
        ("{2: 1.0, 5: 0.5}", {2: 1.0, 5: 0.5}),
        ("{5: 0.5}", {5: 0.5}),
        ("up_blocks.2.attentions.1", {"up_blocks.2.attentions.1": 1.0}),
        ("{up_blocks.2.attentions.1: 2}", {"up_blocks.2.attentions.1": 2.0}),
    ],
)
@pytest.mark.parametrize("experiment", ["refined", "paper_refined"])
def test_layers_on_the_command_line(experiment: str, word: str, layers: dict[int | str, float]) -> None:
    """They replace those of the experiment, whatever the form of either."""
    words = [f"experiment={experiment}", f"objective.layers={word}"]
    assert compose("train", words).objective.layer_weights == layers


def test_an_arm_s_layers_replace_the_study_s(tmp_path: Path) -> None:
    """They are one value, and not options that are merged; an arm without any has the study's."""
    study = compose("ablate", ["objective.layers={2: 1.0, 5: 0.5}"])
    arm = tmp_path / "arm.yaml"
    arm.write_text("defaults: [refined]\nobjective: {layers: {4: 2}}\n")
    found = {name: arm_config(study, name, 0, Path("cell")).objective for name in (str(arm), "refined")}
    assert found[str(arm)].layer_weights == {4: 2.0}
    assert found["refined"].layer_weights == {2: 1.0, 5: 0.5}
    assert found["refined"].terms == found[str(arm)].terms


@pytest.mark.parametrize(("entries", "steps"), [("FILE", 4), ("FILE, _self_", 4), ("_self_, FILE", 3)])
def test_an_arm_says_where_its_own_options_come(tmp_path: Path, entries: str, steps: int) -> None:
    """As in Hydra's own files: last, unless _self_ stands elsewhere among the defaults."""
    below, arm = tmp_path / "below.yaml", tmp_path / "arm.yaml"
    below.write_text("optimization: {steps: 3, warmup_steps: 2}\n")
    arm.write_text(f"defaults: [{entries.replace('FILE', repr(str(below)))}]\noptimization: {{steps: 4}}\n")
    assert arm_values(str(arm)) == {"optimization": {"steps": steps, "warmup_steps": 2}}


@pytest.mark.parametrize("override", ["objective.dcmll=1", "experiment=refind", "seed=[0"])
def test_hydra_refuses_what_it_cannot_place(override: str) -> None:
    """Unknown options, unknown files and unreadable values stop composition."""
    with pytest.raises(HydraException, match=r".+"):
        compose("train", [override])


def test_an_added_key_is_refused() -> None:
    """Hydra's + cannot smuggle in an option that nothing reads."""
    with pytest.raises(ConfigError, match=r"no option 'objective\.weight'"):
        compose("train", ["+objective.weight=1"])


def test_a_dangling_reference_is_one_line() -> None:
    """An interpolation that leads nowhere names the option that holds it."""
    with pytest.raises(ConfigError, match=r"^sampling\.steps: Interpolation key 'foo' not found\. "):
        compose("train", ["sampling.steps=${foo}"])


def test_yaml_round_trip() -> None:
    """The YAML that a dry run prints reads back as the same configuration."""
    signs = ["attribution.weighting=density", "output=a${b (1)"]
    config = compose("ablate", ["experiment=demo", *signs])
    assert to_dataclass("ablate", OmegaConf.create(to_yaml(config))) == config


def test_an_arm_is_the_study_s_settings_and_its_own() -> None:
    """A cell inherits everything shared, and what its arm's file says wins over the study."""
    study = compose("ablate", ["optimization.steps=7", "objective.variant=mixed", "init=elsewhere"])
    refined = arm_config(study, "refined", seed=2, output=Path("cell"))
    assert refined.name == "refined"
    assert refined.seed == 2
    assert refined.init == "elsewhere"
    assert refined.optimization.steps == 7
    assert refined.objective == compose("train", ["experiment=refined"]).objective
    assert arm_config(study, "baseline", 0, Path("cell")).objective.terms == {}
    for group in {item.name for item in fields(TrainingGroups)} - {"objective"}:
        assert getattr(refined, group) == getattr(study, group)


def test_an_arm_can_be_a_file(tmp_path: Path) -> None:
    """A YAML file anywhere is an arm, named after the file unless it says otherwise."""
    file = tmp_path / "weak_cwg.yaml"
    file.write_text("objective: {terms: {dcml: {weight: 0.007}, cwg: {weight: 1e-4}}}\n")
    cell = arm_config(AblateConfig(), str(file), seed=0, output=tmp_path / "cell")
    assert (cell.name, cell.label, cell.objective.terms["cwg"]["weight"]) == ("weak_cwg", "weak_cwg", 1e-4)


def test_an_arm_with_other_weights(tmp_path: Path) -> None:
    """The weights of all its terms and nothing else, a name and a label of its own; of a file of any name, too."""
    study = compose("ablate", ["arms=[baseline,leffa,leffa*0.3,leffa*3]"])
    assert study.arms[2:] == ["leffa*0.3", "leffa*3"]
    leffa, low, high = (arm_config(study, arm, 0, Path("cell")) for arm in study.arms[1:])
    assert leffa.objective.terms["leffa"] == {"weight": 0.1, "timesteps": [0, 500]}
    assert low.objective.terms["leffa"] == {"weight": 0.03, "timesteps": [0, 500]}
    assert high.objective.terms["leffa"] == {"weight": 0.3, "timesteps": [0, 500]}
    assert (low.name, low.label) == ("leffa-x0.3", "Leffa x 0.3")
    assert replace(low, name=leffa.name, label=leffa.label, objective=leffa.objective) == leffa
    file = tmp_path / "a*2.yaml"
    file.write_text("objective: {terms: {tv: {weight: 0.5}, cwg: {weight: 1, schedule: early, share: 0.5}}}\n")
    own = arm_config(study, f"{file}*2", 0, Path("cell"))
    assert own.objective.terms["tv"] == {"weight": 1.0}
    assert own.objective.terms["cwg"] == {"weight": 2.0, "schedule": "early", "share": 0.5}
    assert (own.name, own.label) == ("a*2-x2", "a*2 x 2")
    assert arm_config(study, str(file), 0, Path("cell")).objective.terms["tv"] == {"weight": 0.5}


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("baseline*3", r"'baseline\*3' is not possible: \*3 multiplies the weights of its terms"),
        ("leffa*0", r"a factor above 0"),
        ("base*2", r"no arm 'base' "),
        ("leffa*", r"no arm 'leffa\*'"),
        ("leffa*-1", r"no arm 'leffa\*-1'"),
    ],
)
def test_weights_that_cannot_be_multiplied(arm: str, message: str) -> None:
    """Nothing to multiply, a factor that switches all off, and what is no factor."""
    with pytest.raises(ConfigError, match=message):
        arm_config(AblateConfig(), arm, seed=0, output=Path("cell"))


def test_the_other_terms_are_swept_at_three_weights_each() -> None:
    """On the seed of the sweep, for as many steps."""
    sweep, others = (compose("ablate", [f"experiment={name}"]) for name in ("sweep", "sweep_others"))
    assert replace(others, name=sweep.name, arms=sweep.arms) == sweep
    swept: dict[str, list[float]] = {}
    for arm in others.arms:
        for term, entry in arm_config(others, arm, 100, Path("cell")).objective.terms.items():
            swept.setdefault(term, []).append(entry["weight"])
    assert swept == {
        "leffa": [0.03, 0.1, 0.3],
        "matches": [0.009, 0.03, 0.09],
        "entropy": [0.015, 0.05, 0.15],
        "atv": [0.0015, 0.005, 0.015],
        "supervised": [0.009, 0.03, 0.09],
    }


def test_an_experiment_can_be_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of any name, also that of a shipped one; words have the last word; others of its name are not mixed up."""
    monkeypatch.chdir(tmp_path)
    for folder, steps in (("a b", 3), ("c", 4)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "refined.yaml").write_text(
            "defaults: [strong]\nobjective: {terms: {cwg: {weight: 0.5}}}\n"
            f"optimization: {{steps: {steps}}}\nlabel: Mine\n"
        )
    config = compose("train", ["experiment=a b/refined.yaml", "optimization.warmup_steps=2"])
    strong = compose("train", ["experiment=strong"])
    assert config.objective.terms["cwg"] == {"weight": 0.5, "entropy_floor": 0.2}
    assert config.objective.terms["dcml"] == strong.objective.terms["dcml"]
    assert (config.optimization.steps, config.optimization.warmup_steps) == (3, 2)
    assert (config.name, strong.name) == (strong.name, "strong")
    assert compose("train", ["experiment=c/refined.yaml"]).optimization.steps == 4
    (tmp_path / "own.yml").write_text("seeds: [3]\n")
    assert compose("ablate", ["experiment=own.yml"]).seeds == [3]
    with pytest.raises(ConfigError, match="no option 'seeds'"):
        compose("train", ["experiment=own.yml"])
    (tmp_path / "own.yml").write_text("callbacks: ['json:loads']\n")
    assert compose("train", ["experiment=own.yml"]).callbacks == ["json:loads"]
    assert (compose("train", ["experiment=own.yml"]).name, config.label) == ("own", "Mine")


def test_an_unknown_arm_lists_the_arms() -> None:
    """A misspelled arm says which there are."""
    with pytest.raises(ConfigError, match=r"no arm 'refind' .*base, .*baseline, .*refined"):
        arm_config(AblateConfig(), "refind", seed=0, output=Path("cell"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"holds nothing: expected options of `i2am train`"),
        (b"- 1\n- 2\n", r"holds a list \(\[1, 2\]\): expected options"),
        (b"3\n", r"no option '3'|cannot be read as YAML"),
        (bytes(range(256)), r"cannot be read as YAML in UTF-8"),
        ("label: größe".encode("latin-1"), r"cannot be read as YAML in UTF-8"),
        ("label: a".encode("utf-16"), r"cannot be read as YAML in UTF-8"),
        (b"name: [a\n  b: {", r"cannot be read as YAML in UTF-8 \(while parsing a flow sequence"),
        (b"label: a\nlabel: b\n", r"cannot be read as YAML in UTF-8 .*label"),
        (b"a: &a [*a]", r"cannot be read as YAML in UTF-8 .*recursion"),
        (b"name: !!python/object/apply:os.system [x]", r"cannot be read as YAML .*constructor"),
        (b"label: ${nowhere}", r"Interpolation key 'nowhere' not found"),
        (b"objective: {dcmll: 1}", r"my arm\.yaml' is not possible: .*no option 'objective\.dcmll'"),
        (b"optimization: {steps: many}", r"my arm\.yaml' is not possible: optimization\.steps=many"),
        (b"objective: null", r"is not possible: objective=null is not possible: .* a group"),
        (b"checkpoint: tiny", r"no option 'checkpoint'"),
        (b'label: "a\\nb"', r"label='a\\nb' is not possible: expected one line"),
        (b'label: "a\\0b"', r"without the character NUL"),
        (b"seed: 3", r"sets seed, which is the study's"),
        (b"defaults: 3", r"entry '3' under defaults"),
        (b"defaults: [{override /data: nofile}]", r"no file conf/data/nofile\.yaml, which the defaults"),
        (b"defaults: [SELF]", r"defaults in .*my arm\.yaml lead back to itself"),
        (b"defaults: [refind]", r"no arm 'refind'"),
    ],
)
def test_what_is_no_arm_is_one_sentence(tmp_path: Path, content: bytes, message: str) -> None:
    """Files that are torn, of another kind or encoding, or set what is not an arm's to set."""
    file = tmp_path / "my arm.yaml"
    file.write_bytes(content.replace(b"SELF", f"'{file}'".encode()))
    with pytest.raises(ConfigError, match=message):
        arm_config(AblateConfig(), str(file), seed=0, output=tmp_path / "cell")


def test_a_file_of_any_name_is_an_arm(tmp_path: Path) -> None:
    """Its folder has a name without spaces; tables call it as the user does."""
    file = tmp_path / "größe 2 (neu), a=b.yaml"
    file.write_text("sampling: {steps: 4}\noptimization: {steps: '${sampling.steps}'}\n")
    study = compose("ablate", [f"arms=[baseline,'{file}']"])
    cell = arm_config(study, study.arms[1], seed=0, output=tmp_path / "cell")
    assert (cell.name, cell.label) == ("größe-2-(neu),-a=b", "größe 2 (neu), a=b")
    assert cell.optimization.steps == 4


TYPED = [
    "runs/a b",
    "übung/größe",
    "数据/日本",
    "a (1).yaml",
    "run#2",
    "R&D",
    "lr=0.1,steps=5",
    "a=b=c",
    "one, two",
    "12:30",
    "C:\\new\\folder",
    "ends in \\",
    "it's",
    'the "old" one',
    "$HOME/x",
    "a${b",
    "tilde~",
    "[old] data",
    "[old]",
    "{new}",
    "a{b}c",
    "a;b!c<d>e`f^g",
    "50 %",
    "a|b?c*d@e+f",
    "1e5",
    "007",
    "1_000",
    "1.50",
    "true",
    "False",
    "inf",
    "nan",
    " before",
    "after ",
    "choice(a,b)",
    "range(1,3)",
    "file(1",
    "-5",
    "--x",
]


def test_a_text_arrives_as_typed() -> None:
    """Texts and paths: whatever the signs, and a second time likewise."""
    for texts in (TYPED[start : start + 3] for start in range(0, len(TYPED), 3)):
        names = ("tracking.group", "tracking.entity", "tracking.name")
        folders = ("output", "data.root", "tracking.folder")
        words = [f"{name}={text}" for name, text in zip(names, texts, strict=False)]
        words += [f"{name}={text}" for name, text in zip(folders, texts, strict=False)]
        once = as_typed("train", words)
        assert as_typed("train", once) == once
        config = compose("train", words)
        tracking = config.tracking
        arrived = (tracking.group, tracking.entity, tracking.name)[: len(texts)]
        assert arrived == tuple(texts)
        paths = (config.output, config.data.root, tracking.folder)[: len(texts)]
        assert paths == tuple(Path.cwd() / text for text in texts)


def test_texts_in_a_list_arrive_as_typed() -> None:
    """The same in lists and in one-or-several; only commas and spaces at the ends need quotation marks."""
    texts = [text for text in TYPED if text == text.strip() and "," not in text]
    report = compose("report", [f"names=[{','.join(texts)}]", f"runs=[{','.join(texts)}]"])
    assert report.names == texts
    assert report.runs == [Path.cwd() / text for text in texts]
    assert compose("explain", [f"checkpoint=[{','.join(texts)}]"]).checkpoints == texts
    for text in texts:  # each list needs a reason of its own to be quoted
        typed = as_typed("report", [f"names=[first,{text}]"])[0]
        read = OverridesParser.create().parse_override(typed).value()
        assert read == ["first", text.replace("${", "\\${")]  # OmegaConf takes the backslash away


@pytest.mark.parametrize(
    ("word", "names"),
    [
        ("names=['a, b',c]", ["a, b", "c"]),
        ('names=["a, b (1)", c (2) ]', ["a, b (1)", "c (2)"]),
        ("names=[]", []),
        ("names=[a\\,b]", ["a,b"]),
        ("names=[ä,'ö',1e5,true]", ["ä", "ö", "1e5", "true"]),
    ],
)
def test_what_is_quoted_stays_so(word: str, names: list[str]) -> None:
    """Quotation marks and backslashes mean what they mean to Hydra, also beside elements without."""
    assert compose("report", [word]).names == names


@pytest.mark.parametrize(
    "word",
    [
        "seed=[0,1",
        "names=[a,,b]",
        "names=[a,b,]",
        "names=[a,b",
        "output='a",
        'output="a b',
        "seeds=[0,(]",
        "+output=a(b",
    ],
)
def test_what_nobody_can_read_stays_hydra_s(word: str) -> None:
    """Brackets and marks that are not closed, and commas without an element, are errors."""
    with pytest.raises(HydraException, match=r"Error parsing|Exception|input|missing|extraneous"):
        compose("ablate" if word.startswith("seeds") else "report", [word])


def test_lists_hold_names_and_mappings() -> None:
    """Paths with spaces, and import paths with keywords."""
    own = {"fn": "my_package:Mine", "share": 0.3}
    assert compose("detect", ["detectors=[{fn: my_package:Mine, share: 0.3},a/b]"]).detectors == [own, "a/b"]
    assert compose("detect", ["detectors=[/models/my yolos,a/b]"]).detectors == ["/models/my yolos", "a/b"]
    with pytest.raises(ConfigError, match="names nothing twice"):
        compose("detect", ["detectors=[{fn: my_package:Mine, share: 0.3},{fn: my_package:Mine, share: 0.3}]"])


def test_hydra_s_own_words_stay() -> None:
    """Null, interpolations, quoted texts, lists of numbers, sweeps with -m, and words that are no options."""
    words = ["output=null", "label=${name}-2", "output='a'", "seed=1", "hydra.job.name=a b", "x"]
    words += ["attribution.layers=[1,up_blocks.1]", "optimization.betas=[0.5,0.9]", "objective.layers=2"]
    assert as_typed("train", words) == words
    sweep = ["data.root=a,b", "seed=0,1", "name=choice(a,b)", "data.root=a (1),b"]
    assert as_typed("train", sweep, sweep=True) == sweep
    assert as_typed("train", sweep[:1]) == ["data.root='a,b'"]


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("seed=1 (x)", r"seed=1 \(x\) is not possible: expected a whole number"),
        (f"seed={'9' * 5000}", r"seed=9+\.\.\. is not possible: expected a whole number"),
        ("data.layout=viton hd(", r"expected one of auto, viton_hd, dresscode"),
        ("label=${nam}", r"label: Interpolation key 'nam' not found.*\\\$\{"),
    ],
)
def test_the_option_says_what_it_expects(word: str, message: str) -> None:
    """What is no text is not called unreadable either."""
    with pytest.raises(ConfigError, match=message):
        compose("train", [word])
