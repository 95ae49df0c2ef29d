"""Real data that is not in the repository: ../shared/data beside the checkout, or the folder in RLVR_DATA."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(os.environ.get("RLVR_DATA", Path(__file__).parents[2] / "shared" / "data"))


def rows(name: str) -> list[dict[str, Any]]:
    """The rows of a file, or a skip that says which is not there."""
    path = FOLDER / name
    if not path.is_file():
        pytest.skip(f"no {path}: set RLVR_DATA to the folder that holds it")
    with path.open() as file:
        return [json.loads(line) for line in file]
