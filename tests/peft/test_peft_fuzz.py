"""Thousands of altered adapters: each is refused by a typed error, or read as before.

Of a folder that jlora wrote, an altered byte must not change what is read. That of PEFT
has no digest: there it is enough that nothing but a typed error is raised. All
cases are the same in every run.
"""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import numpy as np
import peft_files as files
import pytest
from alterations import ALTER, altered, profile, values
from hypothesis import given, settings
from peft_files import CONFIG, PARAMS, WEIGHTS, pack, unpack

import jlora
import jlora.peft
from jlora._files.patterns import Endings, file_pattern
from jlora._files.untrusted import parse_json
from jlora._peft.config import PeftConfig
from jlora._peft.config_file import config_json, parse_config
from jlora._torch.fused import join, split
from jlora._torch.modules import TorchModule

pytestmark = pytest.mark.slow

# --- what is altered, and what is asked of it ---


def as_jlora_writes(folder: Path) -> Path:
    return files.written_by_jlora(folder)


def as_peft_writes(folder: Path) -> Path:
    header, data = files.layout(files.tensors())
    every = json.loads(config_json(PeftConfig(r=2, lora_alpha=6)))
    every["target_modules"] = "(q|v)"
    return files.write(folder, every, pack(header, data))


WRITERS = {"jlora": as_jlora_writes, "peft": as_peft_writes}


class Folder:
    """A good folder, whose files are replaced one at a time."""

    def __init__(self, path: Path, writer: str) -> None:
        self.path = WRITERS[writer](path)
        self.sealed = writer == "jlora"
        self.good = {n: (path / n).read_bytes() for n in (CONFIG, WEIGHTS)}
        self.expected = self._meaning(*jlora.peft.load(path, PARAMS))

    def read(self, name: str, altered: bytes) -> bool:
        """Loads with an altered file; returns whether it was taken."""
        (self.path / name).write_bytes(altered)
        try:
            found = jlora.peft.load(self.path, PARAMS)
        except jlora.AdapterError as error:
            assert len(str(error)) < 10_000
            return False
        except Exception as error:
            raise AssertionError(f"{name} as {altered!r} raises {error!r}") from error
        meaning = self._meaning(*found)
        if self.sealed:
            assert meaning == self.expected, f"{name} as {altered!r} is read otherwise"
        return True

    @staticmethod
    def _meaning(configs: Any, adapter: Any) -> tuple[Any, ...]:
        several = (configs,) if isinstance(configs, jlora.LoraConfig) else configs
        values = {
            path: (np.asarray(f.a).tobytes(), np.asarray(f.b).tobytes(), f.scaling)
            for path, f in adapter.items()
        }
        return {(c.target, c.rank, c.scaling) for c in several}, values


@pytest.fixture
def folder(tmp_path: Path, request: pytest.FixtureRequest) -> Folder:
    return Folder(tmp_path, request.param)


both_writers = pytest.mark.parametrize("folder", WRITERS, indirect=True)
both_files = pytest.mark.parametrize("name", [CONFIG, WEIGHTS])

# --- bytes ---


@both_writers
def test_swapped_names(folder: Folder) -> None:
    header, data = unpack(folder.good[WEIGHTS])
    names = [name for name in header if name != "__metadata__"]
    for order in itertools.permutations(names):
        entries = {new: header[old] for new, old in zip(order, names, strict=True)}
        altered = {"__metadata__": header["__metadata__"], **entries}
        taken = folder.read(WEIGHTS, pack(altered, data))
        if folder.sealed or list(order) == names:
            assert taken == (list(order) == names)


@pytest.mark.parametrize("how", ALTER)
@both_files
@both_writers
def test_altered_bytes(folder: Folder, name: str, how: str) -> None:
    taken = [folder.read(name, altered) for altered in ALTER[how](folder.good[name])]
    assert not all(taken)


def test_there_are_enough_cases(tmp_path: Path) -> None:
    count = 0
    for writer in WRITERS:
        good = Folder(tmp_path / writer, writer).good.values()
        count += sum(len(list(alter(d))) for alter in ALTER.values() for d in good)
    assert count >= 5000


# --- JSON ---


@both_writers
@profile
@given(st.data())
def test_altered_config(folder: Folder, data: st.DataObject) -> None:
    (folder.path / WEIGHTS).write_bytes(folder.good[WEIGHTS])
    good = json.loads(folder.good[CONFIG])
    folder.read(CONFIG, json.dumps(data.draw(altered(good))).encode())


@both_writers
@profile
@given(st.data())
def test_altered_header(folder: Folder, data: st.DataObject) -> None:
    header, stored = unpack(folder.good[WEIGHTS])
    changed = data.draw(altered(header))
    folder.read(WEIGHTS, pack(changed, stored))


@profile
@given(st.data())
@pytest.mark.parametrize("folder", ["jlora"], indirect=True)
def test_altered_notes(folder: Folder, data: st.DataObject) -> None:
    header, stored = unpack(folder.good[WEIGHTS])
    notes = data.draw(altered(json.loads(header["__metadata__"]["jlora"])))
    header["__metadata__"]["jlora"] = json.dumps(notes)
    folder.read(WEIGHTS, pack(header, stored))


@profile
@given(values)
@pytest.mark.parametrize("folder", ["peft"], indirect=True)
def test_any_json(folder: Folder, value: Any) -> None:
    folder.read(CONFIG, json.dumps(value).encode())
    (folder.path / CONFIG).write_bytes(folder.good[CONFIG])
    folder.read(WEIGHTS, pack(value))


@profile
@given(st.binary(max_size=60))
@pytest.mark.parametrize("folder", ["peft"], indirect=True)
def test_any_bytes(folder: Folder, data: bytes) -> None:
    folder.read(CONFIG, data)
    (folder.path / CONFIG).write_bytes(folder.good[CONFIG])
    folder.read(WEIGHTS, data)
    folder.read(WEIGHTS, pack(data))


arrays = st.lists(st.integers(0, 8), max_size=5).map(tuple)


@profile
@given(st.dictionaries(st.integers(0, 5), arrays, min_size=1, max_size=4))
@pytest.mark.parametrize("folder", ["peft"], indirect=True)
def test_any_shapes(folder: Folder, shapes: dict[int, tuple[int, ...]]) -> None:
    names = [*files.tensors(), f"{files.PREFIX}q.bias", f"{files.PREFIX}v.weight"]
    new = {names[i]: np.ones(shape, np.float16) for i, shape in shapes.items()}
    folder.read(WEIGHTS, pack(*files.layout({**files.tensors(), **new})))


# --- regexes ---

letters = st.sampled_from("ab.q_1")
classes = st.sampled_from(["[ab]", "[^a]", "[a-c1]", r"\d", r"\w", r"\W", r"\.", "."])


def _grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    group = inner.map(lambda x: f"({x})") | inner.map(lambda x: f"(?:{x})")
    times = st.sampled_from(["*", "+", "?", "*?", "+?", "{2}", "{,2}", "{1,}", "{1,3}"])
    return st.one_of(
        st.tuples(group | letters | classes, times).map("".join),
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map("|".join),
        group,
    )


regexes = st.recursive(
    letters | classes | st.sampled_from(["", "^", "$", r"\b", r"\A", r"\Z"]),
    _grown,
    max_leaves=8,
)


@settings(profile, max_examples=1500)
@given(regexes, st.lists(st.text("ab.q_1\n", max_size=8), min_size=1, max_size=5))
def test_patterns_match_as_in_python(pattern: str, names: list[str]) -> None:
    try:
        matches = file_pattern(pattern)
    except ValueError as error:
        assert "repeats repeated" in str(error)
        return
    for name in names:
        assert matches(name) == (re.fullmatch(pattern, name) is not None), name


@settings(profile, max_examples=500)
@given(st.text(r"ab\()[]{}*+?|^$.,1-:<>=P", max_size=12), st.text("ab1", max_size=8))
def test_any_text_is_a_pattern_of_python_or_refused(pattern: str, name: str) -> None:
    try:
        matched = file_pattern(pattern)(name)
    except ValueError:
        return
    try:
        found = re.fullmatch(pattern, name)
    except re.error:
        return
    assert matched == (found is not None)


keys = st.one_of(
    st.text("ab.", min_size=1, max_size=5),
    st.text("ab.", min_size=1, max_size=5).map(re.escape),
    st.text("ab.", min_size=1, max_size=5).map(lambda name: f"^{re.escape(name)}"),
    st.sampled_from(["", "^", "a|b", "a$", r"b\.", "(a|b)", "a.*", ".a|b", "[ab].a"]),
)


@settings(profile, max_examples=1000)
@given(
    st.lists(keys, max_size=6, unique=True),
    st.lists(st.text("ab.", max_size=7), min_size=1, max_size=6),
)
def test_endings_match_as_in_peft(keys: list[str], names: list[str]) -> None:
    endings = Endings(keys)
    for name in names:
        found = {k for k in keys if re.fullmatch(rf"(.*\.)?({k})$", name)}
        assert set(endings.of(name)) == found, name


# --- kernels that are together on one side and apart on the other ---


@st.composite
def parts(draw: st.DrawFn) -> tuple[list[TorchModule | None], list[int]]:
    """Factors of the parts of one kernel, of which some may be missing."""
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    some = lambda *shape: rng.normal(size=shape).astype(np.float32)
    widths = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    used = draw(st.lists(st.booleans(), min_size=len(widths), max_size=len(widths)))
    used[draw(st.integers(0, len(widths) - 1))] = True
    shared, rank, fan_in = draw(st.booleans()), draw(st.integers(1, 3)), 5
    a, found = some(fan_in, rank), []
    for width, is_used in zip(widths, used, strict=True):
        own = rank if shared else draw(st.integers(1, 3))
        factors = TorchModule(
            "m", a if shared else some(fan_in, own), some(own, width), 0.5
        )
        found.append(factors if is_used else None)
    return found, widths


def delta(module: TorchModule | None, width: int) -> np.ndarray:
    if module is None:
        return np.zeros((5, width), np.float32)
    return module.scaling * (module.a.astype(float) @ module.b.astype(float))


@profile
@given(parts())
def test_split_undoes_join(case: tuple[list[TorchModule | None], list[int]]) -> None:
    given_parts, widths = case
    whole = join(given_parts, widths)
    again = split(whole, widths)
    for before, after, width in zip(given_parts, again, widths, strict=True):
        np.testing.assert_allclose(delta(after, width), delta(before, width), 1e-6)
        if before is not None:
            assert after is not None
            np.testing.assert_array_equal(after.a, before.a)
            np.testing.assert_array_equal(after.b, before.b)
            assert after.scaling == before.scaling


@profile
@given(
    parts(), st.lists(st.sampled_from([0.25, 0.5, 3.0, 0.7]), min_size=4, max_size=4)
)
def test_join_adds_no_delta(
    case: tuple[list[TorchModule | None], list[int]], scalings: list[float]
) -> None:
    some, widths = case
    scaled = [
        p and TorchModule("m", p.a, p.b, s)
        for p, s in zip(some, scalings[: len(some)], strict=True)
    ]
    whole = join(scaled, widths)
    apart = [delta(p, w) for p, w in zip(scaled, widths, strict=True)]
    together = delta(whole, sum(widths))
    np.testing.assert_allclose(together, np.concatenate(apart, axis=1), 1e-5, 1e-6)


@profile
@given(st.integers(0, 2**31), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_split_keeps_the_delta(seed: int, widths: list[int]) -> None:
    rng = np.random.default_rng(seed)
    # Zeros make it look block-diagonal, or leave parts without a delta.
    b = rng.normal(size=(3, sum(widths))) * rng.integers(0, 2, (3, sum(widths)))
    whole = TorchModule("m", rng.normal(size=(5, 3)), b, 0.5)
    apart = split(whole, widths)
    deltas = [delta(p, w) for p, w in zip(apart, widths, strict=True)]
    np.testing.assert_allclose(np.concatenate(deltas, axis=1), delta(whole, 0), 1e-12)


# --- the config, written and read ---

names = st.lists(st.text("abq_.0", min_size=1, max_size=6), min_size=1, max_size=3)
alphas = st.integers(1, 99) | st.floats(1e-6, 1e6)
configs = st.builds(
    PeftConfig,
    r=st.integers(1, 1 << 16),
    lora_alpha=alphas,
    use_rslora=st.booleans(),
    target_modules=st.none() | st.just("(q|v)") | names.map(tuple),
    exclude_modules=st.none() | st.just("x.*") | names.map(tuple),
    target_parameters=st.none() | names.map(tuple),
    layers_to_transform=st.none() | st.lists(st.integers(0, 9), min_size=1).map(tuple),
    layers_pattern=st.none() | names.map(tuple),
    rank_pattern=st.dictionaries(st.text(max_size=5), st.integers(1, 99), max_size=3),
    alpha_pattern=st.dictionaries(st.text(max_size=5), alphas, max_size=3),
    modules_to_save=st.none() | names.map(tuple),
    bias=st.sampled_from(["none", "all", "lora_only"]),
    ensure_weight_tying=st.booleans(),
    init_lora_weights=st.booleans() | st.sampled_from(["gaussian", "eva"]),
).map(
    # Beside a regex, or a pattern alone, these have no effect, and are refused.
    lambda config: (
        config
        if config.layers_to_transform and not isinstance(config.target_modules, str)
        else dataclasses.replace(config, layers_to_transform=None, layers_pattern=None)
    )
)


@profile
@given(configs, st.booleans(), st.none() | st.text(max_size=5))
def test_a_config_reads_back_as_it_was(
    config: PeftConfig, fan_in_fan_out: bool, base_model: str | None
) -> None:
    text = config_json(config, fan_in_fan_out=fan_in_fan_out, base_model=base_model)
    assert text == config_json(
        config, fan_in_fan_out=fan_in_fan_out, base_model=base_model
    )
    assert parse_config(parse_json(text, "it"), "it") == config
    said = json.loads(text)
    assert list(said) == sorted(said)
    assert said["base_model_name_or_path"] == base_model


@profile
@given(st.recursive(st.integers() | st.text() | st.floats(), lambda x: st.lists(x)))
def test_strict_json_reads_what_json_writes(value: Any) -> None:
    try:
        text = json.dumps(value, allow_nan=False)
    except ValueError:
        with pytest.raises(jlora.CorruptFileError):
            parse_json(json.dumps(value).encode(), "it")
    else:
        assert parse_json(text.encode(), "it") == value


@profile
@given(st.text('"\\[]{}a', max_size=40))
def test_depth_is_counted_outside_of_texts(text: str) -> None:
    whole = json.dumps([text]).encode()
    assert parse_json(whole, "it") == [text]
    levels = "[" * 40 + json.dumps(text) + "]" * 40
    with pytest.raises(jlora.CorruptFileError, match="40 deep"):
        parse_json(levels.encode(), "it")
