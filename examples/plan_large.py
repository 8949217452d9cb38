"""Plans LoRA for GPT-3 175B and Llama-70B, and says what training them would hold.

    python examples/plan_large.py
    python examples/plan_large.py --model llama70b --mesh fsdp=16,tensor=8 --rank 16
    python examples/plan_large.py --model llama70b --tpu v5p:4x4x4

The params are shapes without values and the mesh has no devices, so that this runs
anywhere in seconds: nothing of the models is allocated. For GPT-3 it prints the numbers
of section 4.2 of the LoRA paper: query and value projections at rank 4 are 18.9 million
values of 175 billion, ten thousand times fewer, and their checkpoint has tens of
megabytes instead of 350 GB. The base is in bfloat16 and the factors are in float32;
Adam's moments have the dtypes of what is trained, as `optax.adam` keeps them.
With `--tpu` the step is compiled by the TPU's own compiler, if libtpu is installed: it
counts activations too and says whether the step fits. No TPU is needed for that; it
takes minutes, and is an estimate until a TPU has run it.

References:
    Hu et al., LoRA: Low-Rank Adaptation of Large Language Models
    <https://arxiv.org/abs/2106.09685>, 2021, sections 4.2 and 7.1.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import meshes
import optax
import parsing
import plan_step
import tpu_memory
from gpt3 import GPT3, GPT3Config
from jax.sharding import AbstractMesh, AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import keystr, tree_map_with_path
from llama import LLAMA_70B, Llama
from placement import ROWS, leaf_spec, on_mesh

import jlora

HALF = jnp.bfloat16
MODELS: dict[str, nn.Module] = {
    "gpt3": GPT3(GPT3Config(dtype=HALF)),
    "llama70b": Llama(dataclasses.replace(LLAMA_70B, dtype=HALF)),
}
TITLES = {"gpt3": "GPT-3 175B", "llama70b": "Llama-70B"}
LENGTH = 2048


def abstract_params(model: nn.Module) -> Any:
    """Returns the variables of a model in bfloat16: shapes, and no values."""
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    wide = jax.eval_shape(model.init, jax.random.key(0), tokens)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, HALF), wide)


def abstract_mesh(sizes: dict[str, int]) -> AbstractMesh:
    """Returns a mesh of no devices, with Auto axes."""
    auto = (AxisType.Auto,) * len(sizes)
    return AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)


def param_specs(params: Any, mesh: Any) -> Any:
    """Returns the spec of each leaf: matrices in parts, biases and norms whole."""

    def spec(path: Any, leaf: Any) -> P:
        name = keystr(path, simple=True, separator="/")
        matrix = name.endswith(("kernel", "embedding"))
        return leaf_spec(name, leaf.shape, mesh) if matrix else P()

    return tree_map_with_path(spec, params)


def plan_of(model: nn.Module, params: Any, *, rank: int) -> jlora.Plan:
    """Returns the plan of query and value projections at a rank."""
    tokens = jax.ShapeDtypeStruct((1, LENGTH), jnp.int32)
    return lora_of(model, rank).plan(params, tokens)


def lora_of(model: nn.Module, rank: int) -> jlora.Lora:
    """Returns a model with its query and value projections adapted."""
    return jlora.lora(model.apply, jlora.LoraConfig("(q|v)_proj/kernel", rank=rank))


def memory_of(plan: jlora.Plan, params: Any, mesh: AbstractMesh) -> jlora.Memory:
    """Returns what a step of Adam holds on each device, with a row of a batch on it."""
    rows = mesh.shape["data"] * mesh.shape["fsdp"]
    place = NamedSharding(mesh, ROWS)
    return plan.memory(
        optimizer=optax.adam(1e-4),
        mesh=mesh,
        batch=jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32, sharding=place),
        shardings=param_specs(params, mesh),
    )


def fits_on(
    topology: tpu_memory.Topology, model: nn.Module, sizes: dict[str, int], rank: int
) -> str:
    """Returns whether a step fits on TPUs, and the bound of its speed.

    By their compiler, or from shapes alone.
    """
    params = abstract_params(model)
    plan = plan_of(model, params, rank=rank)
    most = topology.most_tokens(plan.flops.step / LENGTH) if plan.flops else ""
    if not tpu_memory.has_compiler():
        held = memory_of(plan, params, abstract_mesh(sizes)).total
        told = tpu_memory.verdict(topology, held, "a step holds")
        by = "From shapes alone (libtpu is not installed), activations aside"
        return f"{by}: {told}; {most}"
    mesh = tpu_memory.mesh_of(topology, sizes)
    placed = plan_step.placed(params, on_mesh(param_specs(params, mesh), mesh))
    lora = lora_of(plan_step.model_on(model, mesh), rank)
    rows = sizes["data"] * sizes["fsdp"]
    tokens = jax.ShapeDtypeStruct((rows, LENGTH), jnp.int32)
    step, args = plan_step.step_on(mesh, lora, optax.adam(1e-4), placed, tokens)
    told = tpu_memory.verdict(topology, tpu_memory.peak_of(step, *args), "a step takes")
    return f"By the TPU's own compiler, without a TPU, so an estimate: {told}; {most}"


def totals(plan: jlora.Plan, whole: jlora.Memory) -> str:
    """Returns what is saved, from the memory of one device that holds everything."""
    size = lambda held: f"{held / 1e9:,.1f} GB"
    added = whole.optimizer + whole.gradients + whole.factors
    full = (whole.full_optimizer or 0) + whole.full_gradients
    half = f"{2 * plan.trainable / 1e6:.1f} MB"
    return (
        f"Adam on all params holds {size(whole.base + full)} beside activations, "
        f"{size(full)} of it gradients and moments.\n"
        f"Adam on the adapter holds {size(whole.base + added)}, {size(added)} of it "
        "factors, gradients and moments.\n"
        f"In half precision the adapter is a checkpoint of {half} beside one of "
        f"{size(whole.full_checkpoint)}."
    )


PAPER = (
    "The LoRA paper (section 4.2, rank 4) has 1.2 TB and 350 GB, and checkpoints of "
    "350 GB and 35 MB."
)


def show(name: str, sizes: dict[str, int], rank: int) -> None:
    """Prints the plan of a model, its memory on a mesh, and what is saved in all."""
    params = abstract_params(MODELS[name])
    plan = plan_of(MODELS[name], params, rank=rank)
    one = abstract_mesh(dict.fromkeys(sizes, 1))
    print(f"{TITLES[name]}, queries and values at rank {rank}\n\n{plan}\n")
    print(
        f"Adam on {meshes.describe(sizes)}, a row of {LENGTH} tokens on each device\n"
    )
    print(memory_of(plan, params, abstract_mesh(sizes)), end="\n\n")
    print(totals(plan, memory_of(plan, params, one)))
    if name == "gpt3":
        print(PAPER)
    print()


def main(argv: Sequence[str] | None = None) -> None:
    """Plans the models that the command line names."""
    parser = parsing.new_parser(__doc__)
    add = parser.add_argument
    add("--model", choices=(*MODELS, "both"), default="both", help="which model")
    add(
        "--mesh",
        type=meshes.parse_sizes,
        help="sizes of the mesh axes data, fsdp and tensor; no device is needed; by "
        "default fsdp has 64, or those of --tpu",
    )
    add("--rank", type=int, default=4, help="rank of the factors")
    add(
        "--tpu",
        type=tpu_memory.parse_topology,
        help="whether a step fits on TPUs of this topology, such as v5p:4x4x4; without "
        "libtpu from shapes alone",
    )
    args = parser.parse_args(argv)
    if args.mesh is None:
        args.mesh = meshes.parse_sizes(f"fsdp={args.tpu.devices if args.tpu else 64}")
    devices = math.prod(args.mesh.values())
    if args.tpu and args.tpu.devices != devices:
        parser.error(
            f"--tpu {args.tpu.name} has {args.tpu.devices} devices and --mesh "
            f"{meshes.describe(args.mesh)} {devices}; give --mesh as many"
        )
    for name in MODELS if args.model == "both" else (args.model,):
        show(name, args.mesh, args.rank)
        if args.tpu:
            print(fits_on(args.tpu, MODELS[name], args.mesh, args.rank), end="\n\n")


if __name__ == "__main__":
    main()
