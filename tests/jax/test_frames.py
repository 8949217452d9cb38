"""Whose a line is: judged by where packages lie, not by words in paths."""

import contextlib
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import equinox
import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import jlora
from jlora._jax.frames import Owner, owner_of, place

WORDS = ("jlora", "jax", "jaxlib", "flax", "equinox", "functools", "site-packages")

SOURCE = """
import functools
import jax, jax.numpy as jnp

def plain(params, x):
    return x @ params["w"]

def nested(params, x):
    return jax.jit(jax.checkpoint(plain))(params, x)

def looped(params, x):
    return jax.lax.scan(lambda c, _: (plain(params, c), None), x, None, length=2)[0]

def indirect(params, x):
    return functools.partial(plain, params)(x)

def penalized(params, x):
    return plain(params, x) + jnp.cumsum(params["w"], 0).sum()
"""


def module_in(folder: Path) -> ModuleType:
    folder.mkdir(parents=True)
    file = folder / "my_model.py"
    file.write_text(SOURCE, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("my_model", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


PARAMS, X = {"w": jnp.ones((7, 7))}, jnp.ones((3, 7))


@pytest.mark.parametrize("word", WORDS)
@pytest.mark.parametrize("name", ["plain", "nested", "looped", "indirect"])
def test_a_plan_names_the_line_of_a_model_in_any_folder(
    tmp_path: Path, word: str, name: str
) -> None:
    fn = getattr(module_in(tmp_path / word / "mine"), name)
    plan = jlora.lora(fn, jlora.LoraConfig("w", rank=2)).plan(PARAMS, X)
    assert [use.source for use in plan.targets[0].uses] == ["my_model.py:6"]


@pytest.mark.parametrize("word", WORDS)
def test_an_error_names_the_line_of_a_model_in_any_folder(
    tmp_path: Path, word: str
) -> None:
    fn = module_in(tmp_path / word).penalized
    with pytest.raises(jlora.MaterializationError, match=r"my_model\.py:18"):
        jlora.lora(fn, jlora.LoraConfig("w", rank=2)).plan(PARAMS, X)


def test_what_lies_beside_the_package_is_its_users() -> None:
    root = Path(jlora.__file__).parents[1]
    for file in (
        "tests/jax/test_frames.py",
        "examples/train_sharded.py",
        "conftest.py",
    ):
        assert owner_of(str(root / file)) is Owner.MODEL
    assert owner_of(str(root / "jlora" / "_program" / "trace.py")) is Owner.JAX


@pytest.mark.parametrize(
    ("file", "owner"),
    [
        (jax.__file__, Owner.JAX),
        (contextlib.__file__, Owner.JAX),
        (functools.__file__, Owner.JAX),
        (nn.__file__, Owner.LIBRARY),
        (equinox.__file__, Owner.LIBRARY),
        (pytest.__file__, Owner.MODEL),
        ("<stdin>", Owner.MODEL),
        ("<ipython-input-3-0a1b>", Owner.MODEL),
        ("<string>", Owner.MADE),
        ("/home/me/flax/linen/linear.py", Owner.MODEL),
        (os.path.dirname(jax.__file__) + "_models/layer.py", Owner.MODEL),
    ],
)
def test_the_owner_of_a_file(file: str, owner: Owner) -> None:
    assert owner_of(file) is owner


def test_links_are_followed(tmp_path: Path) -> None:
    link = tmp_path / "mine"
    link.symlink_to(Path(nn.__file__).parent, target_is_directory=True)
    assert owner_of(str(link / "linear.py")) is Owner.LIBRARY


def test_a_folder_without_an_init_is_no_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "haiku").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "haiku", raising=False)
    importlib.import_module("haiku")
    monkeypatch.delitem(sys.modules, "haiku")
    assert owner_of(str(tmp_path / "haiku" / "model.py")) is Owner.MODEL


LIBRARY, JAX = (nn.__file__, 5), (jax.__file__, 2)
MODEL, MADE = ("/home/me/train.py", 3), ("<string>", 4)


@pytest.mark.parametrize(
    ("frames", "line"),
    [
        ([JAX, MODEL, LIBRARY, ("/home/me/main.py", 9)], "train.py:3"),
        ([JAX, LIBRARY, MODEL], "train.py:3"),
        ([JAX, LIBRARY, MADE], "<string>:4"),
        ([JAX, LIBRARY, (jlora.__file__, 1)], "__init__.py:5"),
        ([JAX, (jlora.__file__, 1)], "__init__.py:2"),
    ],
)
def test_the_line_that_says_most(frames: list[tuple[str, int]], line: str) -> None:
    found = place(frames)
    assert found and found[1] == line


def test_no_frames_but_those_of_python_say_nothing() -> None:
    assert place([("<frozen runpy>", 88)]) is None


def test_a_program_that_is_a_string_is_named() -> None:
    code = """
import jax, jlora
model = lambda params, x: x @ params["w"]
w, x = [jax.ShapeDtypeStruct(s, "float32") for s in ((7, 5), (3, 7))]
plan = jlora.lora(model, jlora.LoraConfig("w", rank=2)).plan({"w": w}, x)
print(plan.targets[0].uses[0].source)
"""
    root = str(Path(jlora.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": root, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert (done.stdout, done.stderr) == ("<string>:3\n", "")
