"""Models of transformers that PEFT adapted and merged, merged by jlora.

`tests/oracle/families.py` makes them, with torch.
"""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import FAMILIES
from paths import ORACLE
from torch_python import oracle_python

import jlora.peft
import jlora.weights

pytestmark = pytest.mark.oracle
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all families."""
    place = tmp_path_factory.mktemp("families")
    done = subprocess.run(
        [oracle_python(), str(ORACLE / "families.py"), str(place)],
        capture_output=True,
        text=True,
        timeout=900,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return place


def tensors(folder: Path) -> dict[str, Any]:
    return dict(jlora.weights.open_weights(folder))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_merge_is_that_of_peft(name: str, made: Path, tmp_path: Path) -> None:
    own, out = made / name, tmp_path / "merged"
    jlora.weights.merge_folder(
        own / "base", own / "peft", out, extend_tables=name.endswith("resized")
    )
    base, wanted, found = (tensors(f) for f in (own / "base", own / "merged", out))
    assert set(found) == set(wanted)
    changed = 0
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=2e-5, err_msg=key)
        changed += key not in base or not np.array_equal(base[key], value)
    assert changed > 1
    tied = [
        json.loads((folder / "config.json").read_text()).get("tie_word_embeddings")
        for folder in (out, own / "merged")
    ]
    assert tied[0] == tied[1]
