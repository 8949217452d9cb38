"""Writes the results of the last runs into README.md, as tables.

    python benchmarks/report.py

Everything between the two markers comes from `results/*.json`.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from timing import RESULTS, run_plot, table

PAGE = Path(__file__).parent / "README.md"
MARKERS = "<!-- results -->", "<!-- end of results -->"
NAMES = (
    "train_step",
    "train_step_8b",
    "fused",
    "variants",
    "variants_8b",
    "many_adapters",
    "mixed_batch",
    "inference",
    "inference-tensor=2",
    "inference-fsdp=2",
    "memory",
    "trace_time",
    "plan_scale",
    "tpu_compile",
)
TITLES = {
    "train_step_8b": "`train_step.py --size 8b`",
    "variants_8b": "`variants.py --size 8b`",
    "inference-tensor=2": "`inference.py --mesh tensor=2`, on a mesh of two",
    "inference-fsdp=2": "`inference.py --mesh fsdp=2`, on a mesh of two",
    "tpu_compile": "`tpu_compile.py`, estimates of the TPU's compiler, no TPU",
}
PLATFORMS = {"gpu": "GPU", "cpu": "CPU"}
Json = Mapping[str, Any]


def report() -> str:
    """Returns all results as Markdown."""
    parts = []
    for platform, words in PLATFORMS.items():
        for name in NAMES:
            path = RESULTS / f"{name}-{platform}.json"
            if path.exists():
                result = json.loads(path.read_text())
                title = TITLES.get(name, f"`{name}.py`")
                parts += [f"### {title}, {words}", *_section(name, result)]
    return "\n\n".join(part for part in parts if part)


def page(text: str) -> str:
    """Returns the page with the results put between its markers."""
    start, end = (text.index(marker) for marker in MARKERS)
    return f"{text[: start + len(MARKERS[0])]}\n{report()}\n{text[end:]}"


def _section(name: str, result: Json) -> Iterator[str]:
    path = RESULTS / f"{name}-{result['machine']['platform']}.json"
    yield _machine(result["machine"])
    for run in result.get("runs", ()):
        many = f", on {n} devices" if (n := run.get("devices") or 1) > 1 else ""
        yield f"{run['label']}{many}, {run['rounds']} rounds{_other(run, result)}"
        yield _times(run["seconds"], run["tokens"])
        yield _plot(run_plot(path, run["label"]))
    for title, seconds in _seconds(result):
        yield title
        yield _times(seconds)
    for case, rows in result.get("bytes", {}).items():
        yield case
        yield _records([{"contender": name, **row} for name, row in rows.items()])
    if "rows" in result:
        yield _records(result["rows"])
    ratios = result.get("ratios", {}).items()
    yield "\n".join(f"* {key}: {ratio:.3f}" for key, ratio in ratios)
    yield _plot(path.with_suffix(".png"))


def _machine(machine: Json) -> str:
    versions = ", ".join(f"{k} {v}" for k, v in machine["versions"].items())
    return (
        f"{machine['device']}, Python {machine['python']}, {versions}; "
        f"{machine['date']}."
    )


def _other(run: Json, result: Json) -> str:
    """Returns when and with which JAX a run was made, if not as the page's heading."""
    facts = lambda machine: (machine["date"], machine["versions"]["jax"])
    date, version = facts(run["machine"])
    same = (date, version) == facts(result["machine"])
    return "" if same else f" (jax {version}, {date})"


def _plot(path: Path) -> str:
    name = f"{RESULTS.name}/{path.name}"
    return f"![{path.stem}]({name})" if path.exists() else ""


def _seconds(result: Json) -> Iterator[tuple[str, Json]]:
    """Yields title and times of each group of contenders."""
    yield from result.get("seconds", {}).items() if "runs" not in result else ()
    for tokens, one in result.get("trained", {}).items():
        yield f"8 adapters trained, {tokens} tokens each", one["seconds"]
    if "served" in result:
        title = "a batch of sequences with adapters of their own, forward"
        yield title, result["served"]["seconds"]


def _times(seconds: Json, tokens: int | None = None) -> str:
    """Returns the table of contenders; ratios are of medians, to the first."""
    first = next(iter(seconds.values()))["median"]
    head = ["", "median ms", "min ms", "ratio"] + ["tokens/s"] * (tokens is not None)
    rows = []
    for name, each in seconds.items():
        median = each["median"]
        row = [name, f"{1e3 * median:.2f}", f"{1e3 * each['min']:.2f}"]
        row.append(f"{median / first:.3f}")
        rows.append(row + ([f"{tokens / median:,.0f}"] if tokens is not None else []))
    return table(head, rows)


def _records(rows: Sequence[Json]) -> str:
    """Returns a table of records with the same keys."""
    head = list(dict.fromkeys(key for row in rows for key in row))
    return table(head, [[_cell(key, row.get(key, "")) for key in head] for row in rows])


def _cell(key: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.3f}"


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    print(f"wrote {PAGE}")
