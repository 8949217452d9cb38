"""Executes notebooks from top to bottom in a kernel of their own and keeps the outputs.

    python notebooks/execute.py                      # all of them
    python notebooks/execute.py 01_quickstart.ipynb

The CPU is used, so that the outputs are those of a machine that everybody has.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOKS = Path(__file__).resolve().parent
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def execute(
    notebook: nbformat.NotebookNode, cell_timeout: int = 180, **environment: str
) -> nbformat.NotebookNode:
    """Executes a notebook in place, in this folder and on the CPU, and returns it.

    Raises:
        nbclient.exceptions.CellExecutionError: If a cell fails that has no tag
            "raises-exception".
    """
    client = NotebookClient(
        notebook,
        timeout=cell_timeout,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    )
    env = {**os.environ, "JAX_PLATFORMS": "cpu", **environment}
    # jlora as it lies here, and nothing else of what this process imports from.
    paths = str(NOTEBOOKS.parent), env.get("PYTHONPATH", "")
    env["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    client.execute(env=env)
    notebook.metadata = nbformat.from_dict(METADATA)
    return notebook


def main(names: Sequence[str]) -> None:
    """Executes the notebooks of these names, or all, and writes them back."""
    paths = [NOTEBOOKS / Path(name).name for name in names]
    for path in paths or sorted(NOTEBOOKS.glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        nbformat.write(execute(notebook, cell_timeout=900), path)
        print(f"{path.name}: {path.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main(sys.argv[1:])
