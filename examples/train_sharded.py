"""Trains an adapter of a sharded language model: FSDP × tensor parallelism × LoRA.

The same program runs on host devices, on the accelerators of one machine, and on the
machines of a pod, each with a process of its own. The base is sharded by the rules in
placement.py; adapter and optimizer state follow it. It exits with 2 if something is
missing or doesn't fit.

    python examples/train_sharded.py --devices 8 --steps 20
    python examples/train_sharded.py --mesh data=2,fsdp=2,tensor=2
    python examples/train_sharded.py --distributed --random-init 8b --dtype bfloat16
"""

import sys
from argparse import Namespace
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

import jlora

try:
    import meshes
    import options
    import placement
    import saving
    import sharded_training
    import sources
    from rich.console import Console
    from sharded_training import Run
except ModuleNotFoundError as error:
    sys.exit(f"`{error.name}` isn't installed; install the extra `jlora[examples]`")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the whole story and returns the exit code."""
    parser = options.make_parser((__doc__ or "").partition("\n")[0])
    args = options.parse(parser, argv)
    try:
        meshes.start(args)
        mesh = meshes.make_mesh(args.mesh)
        meshes.check_rows(args.batch, mesh)
    except (RuntimeError, ValueError) as error:
        parser.error(str(error))
    first = jax.process_index() == 0  # of many processes, one speaks
    console = Console(quiet=not first, soft_wrap=True, highlight=False)
    try:
        run = prepare(args, mesh, console)
    except (ImportError, OSError, ValueError) as error:
        complain = Console(stderr=True, soft_wrap=True, highlight=False)
        complain.print(f"error: {error}", style="red", markup=False)
        return 2
    describe(run, console)
    timings = sharded_training.fit(args, run, console)
    run.checkpoints.close()
    report(args, run, timings, console)
    return 0


def prepare(args: Namespace, mesh: Mesh, console: Console) -> Run:
    """Returns the run that the options ask for, with all that it needs on the mesh."""
    source = sources.load(args, mesh)
    config = jlora.LoraConfig(args.target, rank=args.rank, alpha=2.0 * args.rank)
    lora = jlora.lora(source.model.apply, config)
    plan = lora.plan(source.variables, jnp.zeros((args.batch, args.length), jnp.int32))
    console.print(str(plan), markup=False)
    tx = sharded_training.optimizer(args.lr)
    trained, placed = sharded_training.start(lora, tx, source.variables, args)
    checkpoints = saving.open_checkpoints(args.out, resume=args.resume)
    kept = {name: getattr(args, name) for name in options.KEPT}
    begin, found, history = saving.restore(checkpoints, trained._asdict(), kept)
    return Run(
        mesh=mesh,
        source=source,
        loss=source.make_loss(lora.apply),
        tx=tx,
        placed=placed,
        trained=trained._replace(**found),
        begin=begin,
        history=history,
        checkpoints=checkpoints,
    )


def describe(run: Run, console: Console) -> None:
    """Prints the mesh, what each device holds, and where the run begins."""
    kind, processes = run.mesh.devices.flat[0].device_kind, jax.process_count()
    console.print(
        f"mesh {meshes.describe(dict(run.mesh.shape))}: {run.mesh.size} × {kind} in "
        f"{processes} process{'es' if processes > 1 else ''}"
    )
    trees = {
        "base": run.source.variables,
        "adapter": run.trained.adapter,
        "optimizer state": run.trained.state,
    }
    held = {k: placement.bytes_per_device(tree) / 1e6 for k, tree in trees.items()}
    parts = ", ".join(f"{name} {size:.2f} MB" for name, size in held.items())
    console.print(f"each device holds {parts}")
    if run.begin:
        console.print(f"resumed after {run.begin} steps")


def report(
    args: Namespace, run: Run, timings: Sequence[tuple[int, float]], console: Console
) -> None:
    """Prints how it went, and writes that to `losses.json`."""
    steady = timings[1:] or timings
    speed = sum(n for n, _ in steady) / sum(s for _, s in steady) if steady else None
    saving.write_losses(args.out, run.history, speed)
    losses, evals = run.history["losses"], [v for _, v in run.history["evals"]]
    if speed is None:
        console.print(f"nothing to do: `--steps` {args.steps} were done before")
    else:
        without = "with" if len(timings) == 1 else "without"
        console.print(f"{speed:.0f} tokens/s {without} the first step, which compiles")
    console.print(f"training loss: {losses[0]:.3f} → {losses[-1]:.3f}")
    console.print(f"held-out loss: {evals[0]:.3f} → {evals[-1]:.3f}")
    console.print(f"checkpoints and losses.json written to {args.out}", markup=False)


if __name__ == "__main__":
    sys.exit(main())
