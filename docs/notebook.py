"""Print docs/tutorial.md as a Jupyter notebook: its Python blocks are the cells.

python docs/notebook.py > examples/demo.ipynb
"""

import json
import re
from pathlib import Path
from typing import Any

TUTORIAL = Path(__file__).with_name("tutorial.md")
CODE = re.compile(r"^```python\n(.*?)^```\n", re.DOTALL | re.MULTILINE)

LINK = re.compile(r"\]\((?!\.\./|https?:)")  # to a page beside the tutorial; the notebook lies elsewhere


def code_blocks(text: str) -> list[str]:
    return CODE.findall(text)


def notebook(text: str) -> dict[str, Any]:
    cells = []
    for number, part in enumerate(CODE.split(text)):  # prose and code in turn
        if not part.strip():
            continue
        source = LINK.sub("](../docs/", part.strip("\n")).splitlines(keepends=True)
        cell: dict[str, Any] = {"cell_type": "markdown", "id": f"cell{number}", "metadata": {}, "source": source}
        if number % 2:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return {"cells": cells, "metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}


if __name__ == "__main__":
    print(json.dumps(notebook(TUTORIAL.read_text()), indent=1, ensure_ascii=False))
