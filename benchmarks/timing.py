"""Interleaved timing of rivals in one process, and what is written down about it.

Round after round, every contender runs once, so that a machine that slows down or warms
up does so for all of them. Times are wall times until the result is there.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import jax

RESULTS = Path(__file__).parent / "results"


@dataclasses.dataclass
class Contender:
    """A step that is timed: `step(*state) -> state`, its state carried from run to run.

    A step may return only the first parts of its state: the others stay as they are.

    Attributes:
        name: as tables print it.
        step: a compiled function; it may donate its state.
        state: the first state.
    """

    name: str
    step: Callable[..., tuple[Any, ...]]
    state: tuple[Any, ...]

    def run(self) -> None:
        """Runs one step to its end."""
        new = jax.block_until_ready(self.step(*self.state))
        self.state = (*new, *self.state[len(new) :])


def interleave(
    contenders: Sequence[Contender], *, rounds: int, warmup: int = 2
) -> dict[str, list[float]]:
    """Returns the seconds of each round of each contender."""
    times: dict[str, list[float]] = {c.name: [] for c in contenders}
    for turn in range(warmup + rounds):
        print(f"\rround {turn + 1} of {warmup + rounds}", end="", flush=True)
        # Turning the order keeps what runs before from always being the same.
        at = turn % len(contenders)
        for contender in (*contenders[at:], *contenders[:at]):
            start = time.perf_counter()
            contender.run()
            if turn >= warmup:
                times[contender.name].append(time.perf_counter() - start)
    print("\r" + " " * 30, end="\r")
    return times


def summarize(
    times: Mapping[str, Sequence[float]], per: int = 1
) -> dict[str, dict[str, float]]:
    """Returns median and minimum of each contender, in seconds for one of its steps."""
    return {
        name: {"median": statistics.median(each) / per, "min": min(each) / per}
        for name, each in times.items()
    }


def machine() -> dict[str, Any]:
    """Returns what a reader needs to know about where numbers come from."""
    device = jax.devices()[0]
    packages = ("jax", "jaxlib", "flax", "optax", "qwix", "libtpu", "torch", "peft")
    versions = {}
    for name in packages:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    cpu, cores = device.platform == "cpu", len(os.sched_getaffinity(0))
    return {
        "device": f"{cores} CPU cores" if cpu else device.device_kind,
        "platform": device.platform,
        "python": platform.python_version(),
        "versions": versions,
        "date": datetime.date.today().isoformat(),
        "load": os.getloadavg()[0],
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table with padded columns."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    pad = lambda cells: [c.ljust(w) for c, w in zip(cells, widths, strict=True)]
    line = lambda cells: "| " + " | ".join(pad(cells)) + " |"
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([line(head), rule, *map(line, rows)])


def write(name: str, result: Mapping[str, Any], out: Path | None = None) -> Path:
    """Writes a result with the machine's description as JSON, and says where."""
    where = machine()
    folder = RESULTS if out is None else out
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{where['platform']}.json"
    path.write_text(json.dumps({"machine": where, **result}, indent=1) + "\n")
    print(f"wrote {path}")
    return path


def run_plot(path: Path, label: str) -> Path:
    """Returns where the plot of one run lies beside its results' JSON."""
    return path.with_name(
        f"{path.stem}-{label.replace(', ', '-').replace(' ', '-')}.png"
    )


@contextlib.contextmanager
def drawing(path: Path, panels: int = 1, **sizes: Any) -> Iterator[Any]:
    """Gives axes, or an array of them, and writes the figure to a PNG file after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, panels, **sizes)
    yield axes
    for one in figure.axes:
        one.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def bars(path: Path, title: str, values: Mapping[str, float], unit: str) -> None:
    """Draws horizontal bars to a PNG file."""
    names = list(values)[::-1]
    heights = [values[name] for name in names]
    colors = ["tab:orange" if n.startswith("jlora") else "tab:gray" for n in names]
    with drawing(path, figsize=(7, 0.6 + 0.36 * len(values))) as axes:
        drawn = axes.barh(names, heights, color=colors)
        axes.bar_label(drawn, fmt="%.3g", padding=3)
        axes.set(xlabel=unit)
        axes.figure.suptitle(title)  # over the names too, which may be long


def lines(
    path: Path,
    title: str,
    values: Mapping[str, Mapping[int, float]],
    labels: tuple[str, str],
) -> None:
    """Draws a line for each name over numbers on a logarithmic axis, to a PNG file."""
    with drawing(path, figsize=(7, 4)) as axes:
        for name, points in values.items():
            axes.plot(list(points), list(points.values()), marker="o", label=name)
        axes.set(xscale="log", xlabel=labels[0], ylabel=labels[1], title=title)
        ticks = sorted({x for points in values.values() for x in points})
        axes.set_xticks(ticks, list(map(str, ticks)))
        axes.minorticks_off()
        axes.set_ylim(bottom=0)
        axes.legend()
