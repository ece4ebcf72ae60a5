"""What a text refers to exists: no note that only its writer has, no equation or section that the paper lacks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOTES = re.compile(r"\bspec (section )?\d|\badapters note|\b(spec|adapters|experiment|design)\.md\b")
EQUATIONS = re.compile(r"\b(?:eqs?\.|[Ee]quations?) (\d+)(?:(?:-| to | and |, )(\d+))*")
APPENDICES = re.compile(r"\bA\.(\d+)\b")


def texts() -> dict[str, str]:
    folders = ("i2am_train", "tests", "scripts", "conf", "data")
    found = [*ROOT.glob("*.md"), *(path for name in folders for path in (ROOT / name).rglob("*"))]
    endings = {".py", ".md", ".yaml", ".j2", ".js"}
    return {str(p.relative_to(ROOT)): p.read_text() for p in found if p.suffix in endings}


def test_no_note_from_outside_the_repository_is_cited() -> None:
    """Facts stand where they are used, or the paper is cited."""
    own = Path(__file__).name
    found = [
        f"{name}: {match[0]}"
        for name, text in texts().items()
        if not name.endswith(own)
        for match in NOTES.finditer(text)
    ]
    assert not found


def test_equations_and_appendices_are_the_paper_s() -> None:
    """The paper has equations 1 to 24 and appendices A.1 to A.7."""
    for name, text in texts().items():
        for match in EQUATIONS.finditer(text):
            assert all(1 <= int(number) <= 24 for number in re.findall(r"\d+", match[0])), f"{name}: {match[0]}"
        assert all(1 <= int(number) <= 7 for number in APPENDICES.findall(text)), name
