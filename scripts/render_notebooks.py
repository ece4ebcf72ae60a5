"""Runs the notebooks and keeps their pictures: ``python scripts/render_notebooks.py [NAME ...]``.

Each notebook (or those named, as in ``01_explain_a_model``) is executed from top to bottom in an empty folder. The
picture of a cell with the tag ``picture:NAME`` becomes ``data/figures/notebooks/NAME.png``. The notebooks themselves
are written back without outputs, which is how they are committed. The tests use the same functions.
"""

import base64
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = ROOT / "notebooks"
PICTURES = ROOT / "data" / "figures" / "notebooks"

PATIENCE = 1800
"""Seconds that a cell may take while rendering, which may happen beside other work."""


def read(path: Path) -> NotebookNode:
    """A valid notebook, as it lies on disk."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def executed(
    notebook: NotebookNode, folder: Path, parameters: Mapping[str, Any] | None = None, time_limit: int = PATIENCE
) -> NotebookNode:
    """The notebook with the outputs of one run in ``folder``, with the package of this checkout.

    ``parameters`` are assigned at the end of the cell with the tag ``parameters``; ``time_limit`` is in seconds for
    each cell. Raises nbclient's ``CellExecutionError`` or ``CellTimeoutError`` where a cell fails.
    """
    ready = nbformat.from_dict(notebook)
    lines = [f"{name} = {value!r}" for name, value in (parameters or {}).items()]
    cell = next(cell for cell in ready.cells if "parameters" in tags(cell))
    cell.source = "\n".join([cell.source, *lines])
    client = NotebookClient(
        ready, timeout=time_limit, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "IPYTHONDIR": str(folder / ".ipython")}
    client.execute(env=os.environ | own)
    return ready


def tags(cell: NotebookNode) -> list[str]:
    """The tags of a cell."""
    return list(cell.metadata.get("tags", []))


def pictures(notebook: NotebookNode) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each tagged picture of an executed notebook."""
    for cell in notebook.cells:
        for tag in tags(cell):
            if tag.startswith("picture:"):
                yield tag.removeprefix("picture:"), _picture(cell)


def _picture(cell: NotebookNode) -> bytes:
    found = [output.data for output in cell.outputs if "image/png" in output.get("data", {})]
    if len(found) != 1:
        raise ValueError(f"The cell with the tags {tags(cell)} made {len(found)} pictures, not 1.")
    return base64.b64decode(found[0]["image/png"])


def text(notebook: NotebookNode) -> str:
    """All that the cells of an executed notebook printed and returned as text."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [output.get("data", {}) for output in outputs]
    returned = [data.get("text/markdown") or data.get("text/plain", "") for data in shown]
    return "\n".join([*(output.get("text", "") for output in outputs), *returned])


def stripped(notebook: NotebookNode) -> NotebookNode:
    """The notebook as it is committed: no outputs, no counts, no metadata of one machine."""
    clean = nbformat.from_dict(notebook)
    for cell in clean.cells:
        cell.metadata = {"tags": tags(cell)} if tags(cell) else {}
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    clean.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    return clean


def main() -> None:
    paths = sorted(NOTEBOOKS.glob("*.ipynb"))
    wanted = sys.argv[1:] or [path.stem for path in paths]
    unknown = set(wanted) - {path.stem for path in paths}
    if unknown:
        sys.exit(f"There is no notebook {', '.join(sorted(unknown))} in {NOTEBOOKS}.")
    PICTURES.mkdir(parents=True, exist_ok=True)
    for path in paths:
        if path.stem in wanted:
            render(path)


def render(path: Path) -> None:
    """Execute one notebook, write its pictures, and write it back stripped."""
    notebook = read(path)
    started = time.monotonic()
    with TemporaryDirectory(prefix="notebook-") as folder:
        done = executed(notebook, Path(folder))
    names = []
    for name, content in pictures(done):
        (PICTURES / f"{name}.png").write_bytes(content)
        names.append(name)
    nbformat.write(stripped(notebook), path)
    seconds = time.monotonic() - started
    print(f"{path.stem}: {seconds:.0f} s; pictures: {', '.join(names) or 'none'}")


if __name__ == "__main__":
    main()
