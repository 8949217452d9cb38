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

import jax
import numpy as np
import pytest
from families import FAMILIES, NEW
from paths import ORACLE
from torch_python import oracle_python, oracle_python_4
from torch_tree import as_params, as_state, rules

import jlora.peft
import jlora.weights
from jlora.__main__ import FAILED, SAME, main

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.timeout(3600),  # the first test of an era makes all families
    pytest.mark.filterwarnings("ignore:PEFT .* twice:UserWarning"),
]
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "PYTHONDONTWRITEBYTECODE": "1"}
ERAS = {"now": oracle_python, "4.57": oracle_python_4}
# What a checkpoint does not tell of some files, so that they are not converted.
NOT_CONVERTED = {"llama_rows": "the files have some rows"}
# Whose adapters have convolutions, of which a checkpoint and bare params do not tell.
CONVOLVED = ("qwen2_vl", "qwen2_5_vl")
# What PEFT writes along and does not need: frozen copies.
ALONG = (".base_layer.weight", ".original_module.bias", ".modules_to_save.bias")


def ask(python: str, mode: str, folder: Path) -> dict[str, Any]:
    """What `families.py` says."""
    done = subprocess.run(
        [python, str(ORACLE / "families.py"), mode, str(folder), *FAMILIES],
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
        own / "base",
        own / "peft",
        own / "jlora",
        extend_tables=more,
        ignore=["bias"] * lost_biases(own),
    )
    if own.name in NOT_CONVERTED:
        return
    source, middle, target = (str(own / n) for n in ("peft", "checkpoint", "again"))
    swapped = own.name == "llama4_text" and own.parent.name == "now"
    kind = ["--model-type", kind_of(own)] if swapped else []
    kind += ["--convolutions"] * (own.name in CONVOLVED)
    lost = ["--ignore", "bias"] * lost_biases(own)
    assert main(["convert", *lost, source, middle]) == SAME
    assert main(["convert", *kind, middle, target]) == SAME


def lost_biases(own: Path) -> bool:
    """Whether PEFT trained biases that it did not save."""
    return own.name == "bert_lora_only" and own.parent.name == "4.57"


def kind_of(own: Path) -> str:
    """`model_type` of a family."""
    config = json.loads((own / "base" / "config.json").read_text())
    return config["model_type"]


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
    if lost_biases(own):
        with pytest.raises(jlora.AdapterError, match=r"before 0\.21 does not save"):
            jlora.weights.merge_folder(own / "base", own / "peft", own / "no")
    base, wanted, found = (tensors(own / f) for f in ("base", "merged", "jlora"))
    assert set(found) == set(wanted)
    changed = 0
    for key, value in wanted.items():
        assert_near(found[key], value, key)
        changed += key not in base or not np.array_equal(base[key], value)
    assert changed > 1
    # Of table and head that are two tensors now transformers 4 says that they are one,
    # and reads them so; the outputs of what jlora wrote are those of the adapter.
    if era == "now":
        said = [
            json.loads((own / folder / "config.json").read_text())
            for folder in ("jlora", "merged")
        ]
        one, other = (config.get("tie_word_embeddings") for config in said)
        assert one == other


def adapter(folder: Path) -> dict[str, Any]:
    """The tensors of an adapter, but for what PEFT writes along."""
    found = dict(jlora.weights.open_weights(folder / jlora.peft.WEIGHTS))
    return {name: t for name, t in found.items() if not name.endswith(ALONG)}


@each
@in_each_era
def test_params_with_the_adapter_are_those_that_peft_merged(
    name: str, era: str, place: Path, tmp_path: Path
) -> None:
    own = family(name, era, place)
    tree, merged = (dict(np.load(own / f"{n}.npz")) for n in ("tree", "tree_merged"))
    kinds, kind = json.loads((own / "kinds.json").read_text()), kind_of(own)
    params, names = as_params(tree, kinds, kind), rules(tree, kinds, kind)
    if name == "llama_both":  # whose table and head are one leaf, and two in the file
        with pytest.raises(jlora.AdapterError, match=r"'lm_head.weight': no leaf"):
            jlora.peft.load(own / "peft", params, names)
        return
    ignore: tuple[str, ...] = ()
    if lost_biases(own):
        with pytest.raises(jlora.AdapterError, match=r"query.bias' is missing"):
            jlora.peft.load(own / "peft", params, names)
        ignore = ("bias",)
    config, loaded = jlora.peft.load(own / "peft", params, names, ignore=ignore)
    found = as_state(jlora.merge(params, loaded), tree, kinds, kind)
    assert set(found) <= set(merged)
    for key, value in found.items():
        assert_near(value, merged[key], key)
    if name in CONVOLVED:
        told = r"patch_embed/proj/kernel.*whether it is the kernel of a convolution"
        with pytest.raises(jlora.AdapterError, match=told):
            jlora.peft.save(tmp_path, params, loaded, config, names)
        names = rules(tree, kinds, kind, convolutions=True)
    jlora.peft.save(tmp_path, params, loaded, config, names)
    again = jlora.peft.load(tmp_path, params, names)[1]
    assert jax.tree.structure(again) == jax.tree.structure(loaded)
    assert jax.tree.all(jax.tree.map(np.array_equal, again, loaded))


@each
@in_each_era
def test_an_adapter_is_the_same_there_and_back(
    name: str,
    era: str,
    place: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    own = family(name, era, place)
    capsys.readouterr()
    assert main(["inspect", str(own / "peft")]) == SAME
    assert " targets, " in capsys.readouterr().out
    if name in NOT_CONVERTED:
        places = [str(own / "peft"), str(tmp_path / "one"), str(tmp_path / "other")]
        codes = [main(["convert", *places[n : n + 2]]) for n in range(2)]
        assert codes[-1] == FAILED
        assert NOT_CONVERTED[name] in capsys.readouterr().err
        return
    if lost_biases(own):
        assert main(["convert", str(own / "peft"), str(tmp_path / "one")]) == FAILED
        assert "does not save those of `lora_only`" in capsys.readouterr().err
    if name in CONVOLVED:
        assert (
            main(["convert", str(own / "checkpoint"), str(tmp_path / "one")]) == FAILED
        )
        assert "--convolutions if they are" in capsys.readouterr().err
    wanted, found = adapter(own / "peft"), adapter(own / "again")
    assert set(found) == set(wanted)
    for key, tensor in wanted.items():
        np.testing.assert_array_equal(found[key], tensor, err_msg=key)


@each
@in_each_era
@pytest.mark.parametrize("what", ["jlora", "again"])
def test_peft_computes_the_same_with_what_jlora_wrote(
    what: str, name: str, era: str, place: Path
) -> None:
    own = family(name, era, place)
    if what == "again" and name in NOT_CONVERTED:
        pytest.skip("it is not converted")
    said = made(era, place).said["check"][name]
    assert not said.get(what, {}).get("unexpected_keys")
    wanted, base = np.load(own / "adapted.npy"), np.load(own / "base.npy")
    size = abs(wanted).max()
    assert abs(wanted - base).max() > 1e-2 * size
    found = np.load(own / f"{what}.npy")
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5 * size)


def on_disk(folder: Path) -> dict[str, np.ndarray]:
    """Tensors in float64; transformers 5 leaves a part out of some names on disk."""
    return {
        name.replace("vision_tower.vision_model.", "vision_tower."): np.asarray(
            tensor, np.float64
        )
        for name, tensor in tensors(folder).items()
    }


@each
@pytest.mark.parametrize("era", ERAS)
def test_an_adapter_is_merged_into_a_base_that_the_other_era_wrote(
    name: str, era: str, place: Path, tmp_path: Path
) -> None:
    other = next(one for one in ERAS if one != era)
    own, base = family(name, era, place), family(name, other, place) / "base"
    jlora.weights.merge_folder(
        base,
        own / "peft",
        tmp_path / "merged",
        extend_tables=name.endswith("resized"),
        ignore=["bias"] * lost_biases(own),
    )
    found, before = on_disk(tmp_path / "merged"), on_disk(base)
    wanted, own_before = on_disk(own / "merged"), on_disk(own / "base")
    # A tied head may be on disk or not.
    assert set(found) ^ set(wanted) <= {"language_model.lm_head.weight"}
    for key in set(found) & set(wanted):
        if np.allclose(found[key], wanted[key], rtol=0, atol=2e-5):  # trained whole
            continue
        one, two = found[key] - before[key], wanted[key] - own_before[key]
        np.testing.assert_allclose(one, two, rtol=0, atol=2e-5, err_msg=key)
