"""Runs the notebooks and writes them back with their new outputs: `python notebooks/run.py`, from anywhere."""

import hashlib
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
NAMES = ("train_on_shapes.ipynb", "demo.ipynb")  # in this order: the second uses the run that the first leaves


def execute(path: Path, folder: Path) -> nbformat.NotebookNode:
    """The notebook of a file as a run in the working folder `folder` leaves it, cleaned.

    nbclient.exceptions.CellExecutionError at the first cell that fails.
    """
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources=resources,
        record_timing=False,
        coalesce_streams=True,  # else how the text is divided depends on the moment
    ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":  # progress, with its times, is for those who wait
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
            "sources": fingerprint(notebook),
        }
    )
    return notebook


def fingerprint(notebook: nbformat.NotebookNode) -> str:
    """A hash of the code: kept with the outputs, it tells whether these are of the present code."""
    sources = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(sources).encode()).hexdigest()[:16]


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        for name in NAMES:
            nbformat.write(execute(FOLDER / name, Path(temporary)), FOLDER / name)
            print(f"{name}: {(FOLDER / name).stat().st_size / 1024:.0f} KiB")
