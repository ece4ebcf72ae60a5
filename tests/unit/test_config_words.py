"""Words of the command line: what was typed is what arrives, through Hydra's real parser."""

from __future__ import annotations

from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from i2am_train.config.store import compose
from i2am_train.config.words import as_typed
from i2am_train.errors import ConfigError

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


def test_hydra_s_own_words_stay() -> None:
    """Null, interpolations, quoted texts, lists of numbers, sweeps with -m, and words that are no options."""
    words = ["output=null", "label=${name}-2", "output='a'", "seed=1", "hydra.job.name=a b", "x"]
    words += ["attribution.layers=[1,up_blocks.1]", "optimization.betas=[0.5,0.9]", "objective.layer=2"]
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
