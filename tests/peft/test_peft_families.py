"""Models of transformers that PEFT adapted and merged: loaded, merged and converted.

`tests/oracle/families.py` makes them, with torch, under the transformers that
`JLORA_ORACLE_PYTHON` has and under 4.57, which `JLORA_ORACLE_PYTHON_4` has.
"""

import dataclasses
import functools
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from families import FAMILIES, NEW
from paths import ORACLE
from torch_python import oracle_python, oracle_python_4

import jlora.peft
import jlora.weights
from jlora.__main__ import SAME, main

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore:PEFT .* twice:UserWarning"),
]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
ERAS = {"now": oracle_python, "4.57": oracle_python_4}
# Files of PEFT 0.18 that do not tell at which side the factors of experts are, and
# those of some rows of a table.
SQUARE = "at which side of"
ROWS = "the files have some rows"


def ask(python: str, mode: str, folder: Path) -> dict[str, Any]:
    """What `families.py` says."""
    done = subprocess.run(
        [python, str(ORACLE / "families.py"), mode, str(folder)],
        capture_output=True,
        text=True,
        timeout=1500,
        env=os.environ | ENVIRONMENT,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@dataclasses.dataclass(frozen=True)
class Made:
    """What PEFT made of the families, and jlora of that, and PEFT of that."""

    folder: Path
    said: dict[str, dict[str, Any]]

    def place(self, name: str) -> Path:
        """The folder of a family; its errors are raised."""
        for mode, said in self.said.items():
            if error := (said.get(name) or {}).get("error"):
                raise AssertionError(f"{name}, {mode}: {error}")
        return self.folder / name


@functools.cache
def made(era: str, folder: Path) -> Made:
    """All families of an era, made once."""
    python, place = ERAS[era](), folder / era
    said = {"make": ask(python, "make", place), "jlora": {}}
    for name in FAMILIES:
        if (place / name / "merged").exists():
            try:
                work(place / name)
            except Exception as error:  # the test of this family fails with it
                said["jlora"][name] = {"error": f"{type(error).__name__}: {error}"}
    return Made(place, {**said, "check": ask(python, "check", place)})


def work(own: Path) -> None:
    """Merges an adapter, and takes it to a checkpoint and back."""
    more = own.name.endswith("resized")
    jlora.weights.merge_folder(
        own / "base", own / "peft", own / "jlora", extend_tables=more
    )
    assert main(["inspect", str(own / "peft")]) == SAME
    if main(["convert", str(own / "peft"), str(own / "checkpoint")]) == SAME:
        back = ["convert", str(own / "checkpoint"), str(own / "again")]
        assert main(back) == SAME


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("families")


def tensors(folder: Path) -> dict[str, Any]:
    return dict(jlora.weights.open_weights(folder))


each = pytest.mark.parametrize("name", FAMILIES)
in_each_era = pytest.mark.parametrize("era", ERAS)


def family(name: str, era: str, place: Path) -> Path:
    """The folder of a family in an era, if there is one."""
    if era == "4.57" and FAMILIES[name][1] in NEW:
        pytest.skip("newer than this transformers")
    return made(era, place).place(name)


def assert_near(found: Any, wanted: Any, told: str = "") -> None:
    np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5, err_msg=told)


@each
@in_each_era
def test_a_merge_is_that_of_peft(name: str, era: str, place: Path) -> None:
    own = family(name, era, place)
    base, wanted, found = (tensors(own / f) for f in ("base", "merged", "jlora"))
    assert set(found) == set(wanted)
    changed = 0
    for key, value in wanted.items():
        assert_near(found[key], value, key)
        changed += key not in base or not np.array_equal(base[key], value)
    assert changed > 1
    tied = [
        json.loads((own / folder / "config.json").read_text()).get(
            "tie_word_embeddings"
        )
        for folder in ("jlora", "merged")
    ]
    assert tied[0] == tied[1]


def relative(found: Path, wanted: Path) -> float:
    """How far outputs are from those that PEFT's adapter gives."""
    one, other = np.load(found), np.load(wanted)
    return float(abs(one - other).max() / abs(other).max())
