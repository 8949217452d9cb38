"""examples/train_sharded.py: its meshes, placement, options, and resumed runs.

The runs are those of a model of a few thousand weights on the eight host devices of
this process; tests/whole/test_distributed.py has several processes.
"""

import json
import sys
from argparse import ArgumentTypeError
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from example_runs import needs_data, run_example
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from paths import EXAMPLES

sys.path.insert(0, str(EXAMPLES))

import chat_data
import meshes
import options
import placement
import saving
import sources
import train_sharded
from llama import Llama, LlamaConfig
from tiny_llama import TALKS, random_weights, write_gguf

pytestmark = pytest.mark.usefixtures("fast_compile")

TINY = ["--random-init", "tiny", "--length", "16"]


def mesh_of(**sizes: int) -> AbstractMesh:
    shape = tuple(sizes.get(name, 1) for name in meshes.AXES)
    return AbstractMesh(shape, meshes.AXES, axis_types=(AxisType.Auto,) * len(shape))


def parsed(*words: str) -> Any:
    parser = options.make_parser("")
    return options.parse(parser, words)


def run(out: Path, *words: str) -> Any:
    """Runs the script in this process; returns what it wrote of its losses."""
    assert train_sharded.main([*TINY, "--out", str(out), *words]) == 0
    return json.loads((out / "losses.json").read_text())


# Meshes.


@pytest.mark.parametrize("count", range(1, 65))
def test_the_default_mesh_has_every_device(count: int) -> None:
    sizes = meshes.default_sizes(count)
    assert tuple(sizes) == meshes.AXES
    assert np.prod(list(sizes.values())) == count


@pytest.mark.parametrize(
    ("count", "sizes"),
    [(1, (1, 1, 1)), (2, (1, 2, 1)), (4, (1, 2, 2)), (8, (2, 2, 2)), (16, (2, 4, 2))],
)
def test_the_default_mesh(count: int, sizes: tuple[int, ...]) -> None:
    assert tuple(meshes.default_sizes(count).values()) == sizes


def test_sizes_are_read_and_written() -> None:
    assert meshes.parse_sizes("tensor=2, data=3") == {"data": 3, "fsdp": 1, "tensor": 2}
    assert meshes.describe(meshes.parse_sizes("fsdp=4")) == "data=1,fsdp=4,tensor=1"


@pytest.mark.parametrize("text", ["", "fsdp", "fsdp=", "fsdp=0", "fsdp=-1", "model=2"])
def test_sizes_that_make_no_sense(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="data=2,fsdp=2,tensor=2"):
        meshes.parse_sizes(text)


# Placement.


def specs_of(config: LlamaConfig, mesh: Any) -> dict[str, P]:
    """The spec of every leaf, by the last names of its path."""
    model, tokens = Llama(config), jnp.zeros((1, 4), jnp.int32)
    abstract = jax.eval_shape(model.init, jax.random.key(0), tokens)
    specs = placement.param_specs(abstract, mesh)["params"]
    blocks = specs.pop("blocks")
    return {
        "/".join(part.key for part in path): spec
        for tree in (specs, blocks)
        for path, spec in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda node: isinstance(node, P)
        )
    }


def test_the_specs_of_a_llama() -> None:
    found = specs_of(sources.SIZES["8b"], mesh_of(data=2, fsdp=4, tensor=2))
    heads = P(None, "fsdp", "tensor", None)
    assert found == {
        "embed/embedding": P("tensor", "fsdp"),
        "attention/q_proj/kernel": heads,
        "attention/k_proj/kernel": heads,
        "attention/v_proj/kernel": heads,
        "attention/o_proj/kernel": P(None, "tensor", None, "fsdp"),
        "mlp/gate_proj/kernel": P(None, "fsdp", "tensor"),
        "mlp/up_proj/kernel": P(None, "fsdp", "tensor"),
        "mlp/down_proj/kernel": P(None, "tensor", "fsdp"),
        "lm_head/kernel": P("fsdp", "tensor"),
        "attention_norm/scale": P(None, None),
        "mlp_norm/scale": P(None, None),
        "norm/scale": P(None),
    }


def test_an_axis_that_the_mesh_does_not_divide_is_whole() -> None:
    found = specs_of(LlamaConfig(), mesh_of(fsdp=5, tensor=2))  # 9 heads, 3 for keys
    assert found["attention/q_proj/kernel"] == P(None, None, None, None)
    assert found["mlp/gate_proj/kernel"] == P(None, None, "tensor")


def test_put_and_the_bytes_of_a_device() -> None:
    mesh = meshes.make_mesh(meshes.parse_sizes("data=2,fsdp=2,tensor=2"))
    value = np.arange(48, dtype=np.float32).reshape(8, 6)
    array = placement.put(value, NamedSharding(mesh, P("fsdp", "tensor")))
    np.testing.assert_array_equal(array, value)
    assert array.addressable_shards[0].data.shape == (4, 3)
    assert placement.bytes_per_device([array, placement.put_batch(value, mesh)]) == 96


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_random_weights_are_made_in_parts(dtype: str) -> None:
    mesh = meshes.make_mesh(meshes.parse_sizes("fsdp=4,tensor=2"))
    source = sources.load(parsed(*TINY, "--dtype", dtype), mesh)
    leaves = jax.tree.leaves(source.variables)
    assert {leaf.dtype.name for leaf in leaves} == {dtype}
    whole = sum(leaf.nbytes for leaf in leaves)
    assert placement.bytes_per_device(leaves) < whole / 7


# Batches.


def check_batches(source: sources.Source) -> None:
    """Batches from a step on are those that would have come then."""
    equal = lambda one, two: jax.tree.map(np.testing.assert_array_equal, one, two)
    first, later = source.batches(0), source.batches(2)
    next(first)
    assert source.count(next(first)) > 0
    equal(next(first), next(later))
    equal(next(source.batches(0)), next(source.batches(0)))


def test_random_batches_follow_from_the_step() -> None:
    mesh = meshes.make_mesh(None)
    source = sources.load(parsed(*TINY), mesh)
    check_batches(source)
    batch = next(source.batches(0))
    assert batch.shape == (8, 17)
    assert source.count(batch) == 8 * 16
    assert 0 <= batch.min() and batch.max() < source.model.config.vocab


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in a GGUF file."""
    return write_gguf(tmp_path_factory.mktemp("tiny") / "tiny.gguf", random_weights())


def test_chat_batches_follow_from_the_step_and_have_the_length(
    tiny_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    args = parsed("--model", str(tiny_path), "--batch", "4", "--length", "160")
    source = sources.load(args, meshes.make_mesh(None))
    check_batches(source)
    batch = next(source.batches(0))
    assert batch.tokens.shape == (4, 160)
    assert batch.targets.shape == (4, 80)


# Options.


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--steps", "0"], "--steps must be at least 1, got 0"),
        (["--eval-every", "0"], "--eval-every must be at least 1"),
        (["--mesh", "data=3"], "needs 3 devices, and 8 are here; data=2,fsdp=2,tensor"),
        (["--mesh", "model=8"], "'model=8' isn't one of the axes data, fsdp, tensor"),
        (["--batch", "6"], "6 can't be divided among data × fsdp = 4; 8 would fit"),
        (["--model", "a/b"], "not allowed with argument"),
        (["--process-id", "0"], "--num-processes and --process-id go together"),
        (
            ["--coordinator", "a:1", "--num-processes", "2", "--process-id", "2"],
            "--process-id must be one of 0 to 1, got 2",
        ),
    ],
)
def test_options_that_do_not_fit(
    words: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        train_sharded.main([*TINY, *words])
    assert expected in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*TINY, "--target", "querry"], "querry"),
        (["--model", "no.gguf"], "no.gguf"),
    ],
)
def test_what_cannot_be_found_is_named(
    words: list[str],
    expected: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert train_sharded.main([*words, "--out", str(tmp_path)]) == 2
    assert expected in capsys.readouterr().err


# Runs.


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The losses of six steps in one go."""
    out = tmp_path_factory.mktemp("straight")
    return run(out, "--steps", "6", "--eval-every", "3")


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of six steps that stopped after three."""
    out = tmp_path_factory.mktemp("resumed")
    run(out, "--steps", "3")
    run(out, "--steps", "6", "--resume")
    return out


@pytest.mark.slow
def test_a_resumed_run_has_the_losses_of_a_straight_one(
    straight: Any, resumed: Path
) -> None:
    found = json.loads((resumed / "losses.json").read_text())
    assert len(found["losses"]) == 6
    assert found["losses"] == pytest.approx(straight["losses"], rel=1e-6)
    np.testing.assert_allclose(found["evals"], straight["evals"], rtol=1e-6)


def test_a_run_that_is_done_stays_as_it_is(
    resumed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = json.loads((resumed / "losses.json").read_text())
    found = run(resumed, "--steps", "6", "--resume")
    assert found["losses"] == before["losses"]
    assert found["evals"] == before["evals"]
    assert "nothing to do" in capsys.readouterr().out


def test_a_resumed_run_keeps_its_options(
    resumed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--out", str(resumed), "--resume", "--rank", "4", "--seed", "1"]
    assert train_sharded.main([*TINY, *words]) == 2
    printed = capsys.readouterr().err
    assert "`--rank` is 4, and was 8; `--seed` is 1, and was 0" in printed


def test_checkpoints_are_kept_for_a_resumed_run_alone(tmp_path: Path) -> None:
    trained, kept = {"a": jnp.ones(3)}, {"rank": 8}
    for resume, step in ((True, 0), (True, 5), (False, 0)):
        with saving.open_checkpoints(tmp_path, resume=resume) as checkpoints:
            found, _, history = saving.restore(checkpoints, trained, kept)
            assert found == step
            if not step:
                saving.save(checkpoints, 5, trained, history)


@pytest.mark.parametrize("words", [["--mesh", "fsdp=8"], ["--replicate"], ["--remat"]])
@pytest.mark.slow
def test_losses_depend_neither_on_the_placement_nor_on_remat(
    words: list[str], straight: Any, tmp_path: Path
) -> None:
    found = run(tmp_path, "--steps", "6", "--eval-every", "3", *words)
    assert found["losses"] == pytest.approx(straight["losses"], rel=1e-5)
    np.testing.assert_allclose(found["evals"], straight["evals"], rtol=1e-5)


def test_a_run_says_what_each_device_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--mesh", "fsdp=4,tensor=2", "--dtype", "bfloat16", "--replicate"]
    found = run(tmp_path, "--steps", "4", "--lr", "0.01", *words)
    printed = capsys.readouterr().out
    assert "trainable 16,384 of 90,432" in printed
    assert "mesh data=1,fsdp=4,tensor=2: 8 × cpu in 1 process" in printed
    assert "adapter 0.07 MB, optimizer state 0.13 MB" in printed  # whole factors
    assert found["losses"][-1] < found["losses"][0]
    assert found["evals"][0][1] > found["evals"][-1][1]
    assert found["tokens_per_second"] > 0


@pytest.mark.slow
def test_a_chat_model_is_trained(
    tiny_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat_data, "load_conversations", lambda: TALKS)
    words = ["--model", str(tiny_path), "--steps", "4", "--out", str(tmp_path)]
    assert train_sharded.main(words) == 0
    found = json.loads((tmp_path / "losses.json").read_text())
    assert found["losses"][-1] < found["losses"][0]


@pytest.mark.examples
@pytest.mark.timeout(900)
@needs_data("THE SHARDED EXAMPLE IS")
def test_train_sharded_lowers_the_held_out_loss_of_smollm2(tmp_path: Path) -> None:
    words = ["--devices", "8", "--steps", "2", "--batch", "4", "--out", str(tmp_path)]
    run_example("train_sharded.py", *words)
    (_, before), (_, after) = json.loads((tmp_path / "losses.json").read_text())[
        "evals"
    ]
    assert 4.1 < before < 4.3
    assert after < before - 0.1
