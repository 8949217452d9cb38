"""The example of docs/add_a_format.md: one file and one line, which read and write."""

import itertools
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fenced import blocks
from patched import apply, copy_sources, run
from paths import ROOT
from safetensors.numpy import load_file, save_file

PAGE = blocks((ROOT / "docs" / "add_a_format.md").read_text(encoding="utf-8"))
TITLED = {one.title: one.text for one in PAGE if one.title}
FORMAT = "jlora/_formats/plain.py"
(PATCH,) = (one.text for one in PAGE if one.language == "diff")

pytestmark = pytest.mark.docs


def jlora(folder: Path, *words: str) -> Any:
    """Runs `python -m jlora`."""
    return run(folder, sys.executable, "-m", "jlora", *words, JAX_PLATFORMS="cpu")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the sources, and the file of the page."""
    copy = copy_sources(tmp_path_factory.mktemp("plain"))
    (copy / "make.py").write_text(TITLED["make.py"], encoding="utf-8")
    done = run(copy, sys.executable, "make.py")
    assert done.returncode == 0, done.stderr
    return copy


@pytest.fixture(scope="module")
def patched(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Such a copy with the page's file and its line."""
    copy = tmp_path_factory.mktemp("format") / "patched"
    shutil.copytree(plain, copy)
    return apply(copy, PATCH, {FORMAT: TITLED[FORMAT]})


def test_the_format_is_one_line_beside_its_file() -> None:
    assert len(re.findall(r"^\+(?!\+\+)", PATCH, re.MULTILINE)) == 1
    assert not re.findall(r"^-(?!--)", PATCH, re.MULTILINE)


def test_without_it_the_file_is_refused(plain: Path) -> None:
    done = jlora(plain, "inspect", "plain.safetensors")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == TITLED["without the format"]


def test_the_file_is_inspected(patched: Path) -> None:
    done = jlora(patched, "inspect", "plain.safetensors")
    assert done.returncode == 0, done.stderr
    assert done.stdout == TITLED["with the format"]


READ = """
import sys, numpy, jlora
from pathlib import Path
from jlora._formats import plain
configs, adapter = plain.read(Path(sys.argv[1]))
deltas = {path: jlora.delta(factors) for path, factors in adapter.items()}
numpy.savez(sys.argv[2], **{path.replace("/", ":"): d for path, d in deltas.items()})
several = [configs] if isinstance(configs, jlora.LoraConfig) else configs
print(sorted((config.alpha, config.rank) for config in several))
"""


def test_the_deltas_are_those_of_numpy(patched: Path) -> None:
    tensors = load_file(patched / "plain.safetensors")
    (patched / "read.py").write_text(READ)
    command = (sys.executable, "read.py", "plain.safetensors", "deltas.npz")
    done = run(patched, *command, JAX_PLATFORMS="cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[(2.0, 2), (6.0, 2)]\n"
    of = lambda name: [tensors[f"{name}.{k}"] for k in ("down", "up")]
    down, up = of("layers.0.q_proj")
    a, b = of("conv")
    expected = {
        "params:layers:0:q_proj:kernel": 3 * (up @ down).T,
        "params:conv:kernel": np.einsum("rihw,or->hwio", a, b[:, :, 0, 0]),
    }
    found = np.load(patched / "deltas.npz")
    assert set(found) == set(expected)
    for path, delta in expected.items():
        np.testing.assert_allclose(found[path], delta, rtol=1e-5, atol=1e-6)


def test_it_is_converted_to_other_formats_and_back(patched: Path) -> None:
    tensors = load_file(patched / "plain.safetensors")
    dense = {n: t for n, t in tensors.items() if not n.startswith("conv")}
    save_file(dense, patched / "dense.safetensors")
    ways = ["dense.safetensors", "peft", "checkpoint", "back.safetensors", "again"]
    for source, target in itertools.pairwise(ways):
        form = ["--to", "plain"] if target.startswith("back") else []
        done = jlora(patched, "convert", source, target, *form)
        assert done.returncode == 0, done.stderr
    back = load_file(patched / "back.safetensors")
    assert {n: t.shape for n, t in back.items()} == {
        n: t.shape for n, t in dense.items()
    }
    assert all(np.array_equal(back[name], dense[name]) for name in dense)
    peft = load_file(patched / "again" / "adapter_model.safetensors")
    factors = {n.removeprefix("base_model.model."): t for n, t in peft.items()}
    for peft_name, name in (("lora_A", "down"), ("lora_B", "up")):
        tensor = factors[f"layers.0.q_proj.{peft_name}.weight"]
        assert np.array_equal(tensor, dense[f"layers.0.q_proj.{name}"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"q.middle": np.ones((2, 2), np.float32)}, "'q.middle'"),
        ({"q.up": np.ones((2, 2), np.float32)}, "the two factors"),
        ({"conv.up": np.ones((5, 3, 1, 1), np.float32)}, "ranks 2 and 3"),
        ({"conv.up": np.ones((5, 2), np.float32)}, "of the shapes"),
        ({"conv.scale": np.array(np.nan, np.float32)}, "NaN"),
    ],
)
def test_what_is_wrong_is_one_line(
    change: dict[str, np.ndarray], message: str, patched: Path
) -> None:
    tensors = load_file(patched / "plain.safetensors")
    save_file(tensors | change, patched / "wrong.safetensors")
    done = jlora(patched, "inspect", "wrong.safetensors")
    (line,) = done.stderr.splitlines()
    assert (done.returncode, done.stdout) == (2, "")
    assert message in line


def test_the_laws_of_the_house_hold_with_it(patched: Path) -> None:
    command = ("-m", "pytest", "-p", "no:cacheprovider", "-m", "not slow")
    done = run(
        patched, sys.executable, *command, "tests/test_structure.py", PYTEST_ADDOPTS=""
    )
    assert done.returncode == 0, done.stdout + done.stderr
