"""What is trained whole in a PEFT adapter: which modules PEFT saves, and what is there.

PEFT saves modules whose names end with one of `modules_to_save`, whether a dot is
before it or not, and all that is below them; nothing below one is adapted.
"""

import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from peft_files import CONFIG, PREFIX, WEIGHTS, config, layout, pack, write
from safetensors.numpy import load_file

import jlora.peft
from jlora import AdapterError, LoraConfig, LoraFactors

SHAPES = {
    "final_norm/scale": (5,),
    "head/dense/kernel": (5, 7),
    "head/out/kernel": (7, 3),
    "head/scale": (5,),
    "norm/scale": (5,),
    "q/kernel": (5, 7),
}


def params() -> dict[str, np.ndarray]:
    """Params with no two values alike."""
    generator = np.random.default_rng(0)
    number = lambda shape: generator.normal(size=shape).astype(np.float32)
    return {path: number(shape) for path, shape in SHAPES.items()}


def factors(path: str) -> LoraFactors:
    """Factors of a kernel of two axes."""
    axes = jlora.KernelAxes((), (0,), (1,))
    a, b = (np.ones(s, np.float32) for s in axes.factor_shapes(SHAPES[path], 2))
    return LoraFactors(jax.numpy.asarray(a), jax.numpy.asarray(b), axes, 0.5)


def adapter(*paths: str) -> dict[str, Any]:
    """An adapter that trains scales and `head/out` whole, and adapts the rest."""
    whole = lambda path: path.endswith("scale") or "out" in path
    return {
        path: np.ones(SHAPES[path], np.float32) if whole(path) else factors(path)
        for path in paths
    }


def saved(folder: Path, *paths: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is said and held by the files of an adapter, as PEFT names it."""
    jlora.peft.save(folder, params(), adapter(*paths), LoraConfig(rank=2))
    tensors = load_file(folder / WEIGHTS)
    return json.loads((folder / CONFIG).read_text()), {
        name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()
    }


def test_modules_whose_names_end_so_are_written_along(tmp_path: Path) -> None:
    said, tensors = saved(tmp_path, "norm/scale", "q/kernel")
    assert said["modules_to_save"] == ["norm"]
    np.testing.assert_array_equal(tensors["norm.weight"], np.ones(5))
    base = params()["final_norm/scale"]
    np.testing.assert_array_equal(tensors["final_norm.weight"], base)
    _, loaded = jlora.peft.load(tmp_path, params())
    assert set(loaded) == {"norm/scale", "final_norm/scale", "q/kernel"}
    np.testing.assert_array_equal(loaded["final_norm/scale"], base)


def test_what_is_below_a_saved_module_is_written_along(tmp_path: Path) -> None:
    said, tensors = saved(tmp_path, "head/scale")
    assert said["modules_to_save"] == ["head"]
    assert set(tensors) == {"head.weight", "head.dense.weight", "head.out.weight"}
    kernel = params()["head/dense/kernel"]
    np.testing.assert_array_equal(tensors["head.dense.weight"], kernel.T)


def test_what_is_written_along_needs_values(tmp_path: Path) -> None:
    shapes = jax.eval_shape(params)
    with pytest.raises(AdapterError, match=r"'final_norm/scale'.* as arrays"):
        jlora.peft.save(tmp_path / "a", shapes, adapter("norm/scale"))
    jlora.peft.save(tmp_path / "a", shapes, adapter("final_norm/scale"))


@pytest.mark.parametrize(
    "paths, wrong",
    [
        (("head/scale", "head/dense/kernel"), "head.dense"),
        (("head/out/kernel", "head/scale", "head/dense/kernel"), "head.dense"),
    ],
)
def test_factors_below_a_saved_module_are_refused(
    paths: tuple[str, ...], wrong: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=rf"'{wrong}'.*PEFT drops factors there"):
        saved(tmp_path / "a", *paths)
    assert not (tmp_path / "a").exists()
    saved(tmp_path / "a", "head/out/kernel", "head/dense/kernel")


def test_a_parameter_of_no_module_is_refused(tmp_path: Path) -> None:
    rules = [("norm/scale", "scale", "parameter"), ("(?P<all>.*)", "{all}")]
    with pytest.raises(AdapterError, match=r"saves modules, and \['norm/scale'\]"):
        jlora.peft.save(tmp_path, params(), adapter("norm/scale"), (), rules)


def test_without_targets_it_is_said_that_there_are_none(tmp_path: Path) -> None:
    """PEFT takes None as the targets that it knows for the kind of model."""
    said, _ = saved(tmp_path, "final_norm/scale")
    assert said["target_modules"] == "dummy-target-modules"
    found, loaded = jlora.peft.load(tmp_path, params())
    assert isinstance(found, LoraConfig) and found.full
    assert set(loaded) == {"final_norm/scale"}


# --- as PEFT writes it ---

HEAD = {"head.weight": (5,), "head.dense.weight": (7, 5), "head.out.weight": (3, 7)}


def written(folder: Path, whole: dict[str, tuple[int, ...]], **said: Any) -> Path:
    """A file with factors of `q`, and some tensors that are trained whole."""
    shapes = {"q.lora_A.weight": (2, 5), "q.lora_B.weight": (7, 2), **whole}
    arrays = {PREFIX + n: np.ones(shape, np.float32) for n, shape in shapes.items()}
    return write(folder, config(**said), pack(*layout(arrays)))


@pytest.mark.parametrize("targets", [["q", "dense"], "q|head.dense", "all-linear"])
def test_what_is_below_a_saved_module_is_not_selected(
    targets: Any, tmp_path: Path
) -> None:
    """As in RoBERTa: `dense` is adapted, but not that of the classifier."""
    written(tmp_path, HEAD, target_modules=targets, modules_to_save=["head"])
    _, loaded = jlora.peft.load(tmp_path, params())
    whole = {path for path in SHAPES if path.startswith("head/")}
    assert set(loaded) == {"q/kernel", *whole}


def test_all_that_is_below_a_saved_module_is_promised(tmp_path: Path) -> None:
    part = {name: shape for name, shape in HEAD.items() if "out" not in name}
    written(tmp_path, part, target_modules=["q"], modules_to_save=["ead"])
    with pytest.raises(AdapterError, match=r"'head.out.weight' is missing"):
        jlora.peft.load(tmp_path, params())


def test_factors_below_a_saved_module_are_none_of_peft_s(tmp_path: Path) -> None:
    said = {"target_modules": ["q"], "modules_to_save": ["q"]}
    written(tmp_path, {"q.weight": (7, 5)}, **said)
    with pytest.raises(AdapterError, match="'q' has factors, and the config does not"):
        jlora.peft.load(tmp_path, params())
