"""Plans of GPT-3 175B and of Llama-70B: the numbers of the paper, and no allocation."""

import dataclasses
import math
import os
import subprocess
import sys
from argparse import ArgumentTypeError
from typing import Any

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import AxisType
from paths import PYTHONPATH, ROOT

sys.path.insert(0, str(ROOT / "examples"))

import meshes
import placement
import plan_large
import plan_step
import tpu_memory
from gpt3 import GPT3, GPT3Config

import jlora

TINY = GPT3(GPT3Config(vocab=50, hidden=24, layers=2, heads=3, positions=8))


def size_of(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def figures(name: str, rank: int, mesh: str) -> tuple[jlora.Plan, jlora.Memory]:
    model = plan_large.MODELS[name]
    params = plan_large.abstract_params(model)
    plan = plan_large.plan_of(model, params, rank=rank)
    sizes = plan_large.abstract_mesh(meshes.parse_sizes(mesh))
    return plan, plan_large.memory_of(plan, params, sizes)


def test_the_models_have_their_sizes() -> None:
    """GPT-3: 12d² + 13d per layer, tables of tokens and positions, and a norm."""
    d, layers = 12288, 96
    gpt3 = layers * (12 * d**2 + 13 * d) + (50257 + 2048 + 2) * d
    params = {n: plan_large.abstract_params(m) for n, m in plan_large.MODELS.items()}
    assert size_of(params["gpt3"]) == gpt3 == 174_604_259_328
    assert size_of(params["llama70b"]) == 70_553_706_496
    leaves = jax.tree.leaves(params)
    assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("bfloat16")}


def test_gpt3_at_rank_4_is_that_of_the_paper() -> None:
    """Of 175 billion 18.9 million; checkpoints of 350 GB and 35 MB (MiB, in fact)."""
    plan, memory = figures("gpt3", 4, "fsdp=1")
    assert plan.trainable == 96 * 2 * 2 * 12288 * 4 == 18_874_368
    assert all(use.factored for target in plan.targets for use in target.uses)
    assert 9_000 < plan.total / plan.trainable < 10_000
    assert memory.checkpoint == 2 * 36 * 2**20  # of float32, twice the paper's
    assert round(memory.full_checkpoint / 1e9) == 349
    assert round((memory.full_total or 0) / 1e9) == 1397
    assert round(memory.total / 1e9) == 350
    assert memory.total - memory.base - memory.batch == 4 * memory.factors + 4


@pytest.mark.parametrize("name", list(plan_large.MODELS))
def test_a_mesh_divides_what_each_device_holds(name: str) -> None:
    _, one = figures(name, 16, "fsdp=1")
    for mesh in ("fsdp=64", "fsdp=8,tensor=8", "data=2,fsdp=32"):
        _, memory = figures(name, 16, mesh)
        devices = math.prod(meshes.parse_sizes(mesh).values())
        parts = meshes.parse_sizes(mesh)["fsdp"] * meshes.parse_sizes(mesh)["tensor"]
        assert memory.devices == devices == 64
        # Norms, biases and positions are whole, and so is a vocabulary of 29 · 1733.
        assert 1 <= memory.base / (one.base / parts) < 1.05
        assert memory.batch == one.batch
        assert memory.checkpoint == one.checkpoint
        assert memory.full_checkpoint == one.full_checkpoint


@pytest.mark.usefixtures("fast_compile")
def test_the_decoder_is_causal_and_knows_positions() -> None:
    tokens = jax.random.randint(jax.random.key(1), (2, 8), 0, 50)
    variables = jax.jit(TINY.init)(jax.random.key(0), tokens)
    apply = jax.jit(TINY.apply)
    logits, same = apply(variables, tokens), apply(variables, jnp.zeros_like(tokens))
    later = apply(variables, tokens.at[:, 5].add(1))
    assert logits.shape == (2, 8, 50)
    assert jnp.allclose(logits[:, :5], later[:, :5], atol=1e-5)
    assert not jnp.allclose(logits[:, 5:], later[:, 5:], atol=1e-2)
    assert not jnp.allclose(same[:, 1:], same[:, :-1], atol=1e-2)


# Runs a command, and says how much memory its largest process took.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, *sys.argv[1:]]).returncode
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
print(peak * (1 if sys.platform == "darwin" else 1024), file=sys.stderr)
sys.exit(code)
"""


@pytest.mark.examples
def test_both_are_planned_in_seconds_without_their_weights() -> None:
    pytest.importorskip("resource")
    command = [sys.executable, "-c", MEASURE, "examples/plan_large.py"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": PYTHONPATH, "PYTHONUTF8": "1"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=30,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stderr.split()[-1]) < 2e9
    for line in (
        "trainable 18,874,368 of 174,604,259,328 (0.011 %), 9,251× fewer",
        "checkpoint 75.5 MB, of all params 349 GB",
        "Adam on all params holds 1,396.8 GB",
        "Adam on the adapter holds 349.5 GB, 0.3 GB of it",
        "a checkpoint of 37.7 MB beside one of 349.2 GB",
        "trainable 8,192,000 of 70,553,706,496 (0.012 %), 8,613× fewer",
    ):
        assert line in done.stdout


def test_the_options_choose_model_mesh_and_rank(
    capsys: pytest.CaptureFixture[str],
) -> None:
    plan_large.main(["--model", "llama70b", "--mesh", "tensor=8", "--rank", "16"])
    printed = capsys.readouterr().out
    assert "Llama-70B, queries and values at rank 16" in printed
    assert "8 devices" in printed and "GPT-3" not in printed
    with pytest.raises(SystemExit):
        plan_large.main(["--mesh", "rows=8"])


# Whether a step fits on TPUs. By their compiler: tests/whole/test_tpu.py.


def test_without_the_compiler_shapes_say_whether_it_fits(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tpu_memory, "has_compiler", lambda: False)
    words = ["--model", "llama70b", "--mesh", "fsdp=4,tensor=4"]
    plan_large.main([*words, "--tpu", "v5e:4x4"])
    _, memory = figures("llama70b", 4, words[-1])
    printed = capsys.readouterr().out
    taken = memory.total / 2**30
    assert "From shapes alone (libtpu is not installed), activations aside" in printed
    assert f"on v5e:4x4 a step holds {taken:.1f} of 15.8 GiB a device" in printed
    assert f"it fits, with {15.75 - taken:.1f} to spare" in printed


@pytest.mark.parametrize(
    ("text", "devices"),
    [("v5e:4x4", 16), ("v5p:4x4x4", 64), ("v4:2x2x1", 4), ("tpu7x:2x2x1", 8)],
)
def test_topologies(text: str, devices: int) -> None:
    topology = tpu_memory.parse_topology(text)
    assert (topology.name, topology.kind) == (text, text.partition(":")[0])
    assert topology.devices == devices


TEXTS = ["", "v5e", "v5e:", "v5e:4x", "v5e:0x4", "h100:8", "v5e:4x4x4", "v5p:4x4"]


@pytest.mark.parametrize("text", TEXTS)
def test_topologies_that_make_no_sense(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="write `v5e:4x4`"):
        tpu_memory.parse_topology(text)


def test_a_mesh_has_the_devices_of_the_topology(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit):
        plan_large.main(["--tpu", "v5e:4x4", "--mesh", "fsdp=64"])
    told = capsys.readouterr().err
    assert "--tpu v5e:4x4 has 16 devices and --mesh data=1,fsdp=64,tensor=1 64" in told


def test_a_topology_is_a_mesh(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tpu_memory, "has_compiler", lambda: False)
    plan_large.main(["--model", "llama70b", "--tpu", "v5e:4x4"])
    printed = capsys.readouterr().out
    assert "Adam on data=1,fsdp=16,tensor=1" in printed
    assert "at most 670 tokens a second a device, by its FLOPs" in printed


def test_what_does_not_fit_is_told() -> None:
    topology = tpu_memory.parse_topology("v5e:4x4")
    told = tpu_memory.verdict(topology, 20.25 * 2**30, "a step takes")
    assert told.endswith("20.2 of 15.8 GiB a device: it doesn't fit, 4.5 are missing")


@pytest.mark.parametrize(
    ("message", "taken"),
    [
        (
            "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, "
            "the total memory required for HLO temporaries (32.50G) exceeds available "
            "HBM (15.75G). HLO module: jit_step.",
            32.5 * 2**30,
        ),
        (
            "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
            "memory space hbm. Used 512.00M of 15.75G hbm.",
            2**29,
        ),
        ("RESOURCE_EXHAUSTED: of vmem", None),
        ("INVALID_ARGUMENT: 3.0G exceeds available HBM (15.75G)", None),
    ],
)
def test_what_the_compiler_says_of_what_does_not_fit(
    message: str, taken: float | None
) -> None:
    class Step:
        def lower(self) -> "Step":
            return self

        def compile(self) -> None:
            raise jax.errors.JaxRuntimeError(message)

    if taken is not None:
        assert tpu_memory.peak_of(Step()) == taken
        return
    with pytest.raises(jax.errors.JaxRuntimeError):
        tpu_memory.peak_of(Step())


@pytest.mark.parametrize("name", list(plan_large.MODELS))
def test_a_step_can_be_lowered_for_its_mesh(name: str) -> None:
    """On host devices, at small widths: what the TPU's compiler is given."""
    mesh = jax.make_mesh((1, 4, 2), meshes.AXES, (AxisType.Auto,) * 3)
    sizes = {"vocab": 64, "hidden": 32, "layers": 2, "heads": 4}
    if name == "llama70b":
        sizes |= {"mlp": 48, "kv_heads": 2, "head_dim": 8}
    model = plan_large.MODELS[name]
    small = type(model)(dataclasses.replace(model.config, **sizes))
    params = plan_large.abstract_params(small)
    specs = plan_large.param_specs(params, mesh)
    placed = plan_step.placed(params, placement.on_mesh(specs, mesh))
    lora = plan_large.lora_of(plan_step.model_on(small, mesh), 3)
    tokens = jax.ShapeDtypeStruct((4, 16), jnp.int32)
    step, args = plan_step.step_on(mesh, lora, optax.adam(1e-4), placed, tokens)
    held = step.lower(*args).compile().memory_analysis().argument_size_in_bytes
    memory = plan_large.plan_of(small, params, rank=3).memory(
        optimizer=optax.adam(1e-4), mesh=mesh, batch=args[3], shardings=specs
    )
    assert memory.arguments == held
    assert memory.factors > 0
