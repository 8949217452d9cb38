"""The benchmarks run at toy sizes, and their page quotes what they wrote."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from paths import ROOT

BENCHMARKS = ROOT / "benchmarks"
SMALL = "--d 32 --ffn 48 --layers 3 --heads 2 --kv-heads 2 --vocab 64"
RUNS = {
    "many_adapters": "--rounds 1 --adapters 4 --tokens 8 --prompts 8 --prompt-tokens 6 "
    + SMALL,
    "inference": f"--rounds 1 --batch 2 --seq 8 --cache 8 --decode-steps 2 {SMALL}",
    "variants": f"--rounds 1 --batch 2 --seq 8 {SMALL}",
    "trace_time": "--layers 1 2 --d 32 --rounds 1 --compile-up-to 1",
    "plan_scale": "--sizes 1B 8B --modes scanned",
}

# Compiled quickly, on as many devices as a mesh needs.
DEVICES = "--xla_force_host_platform_device_count=4"


def run(script: str, *flags: str) -> str:
    """Runs a script of the folder, compiled quickly, and returns what it prints."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", BENCHMARKS / script, *flags],
        cwd=ROOT,
        env={
            **os.environ,
            "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
            "XLA_FLAGS": f"{os.environ['XLA_FLAGS']} {DEVICES}",
        },
        capture_output=True,
        text=True,
        encoding="utf-8",
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.mark.examples
@pytest.mark.parametrize("name", RUNS)
def test_a_script_runs_and_writes(name: str, tmp_path: Path) -> None:
    printed = run(f"{name}.py", "--out", str(tmp_path), *RUNS[name].split())
    result = json.loads((tmp_path / f"{name}-cpu.json").read_text(encoding="utf-8"))
    assert result["machine"]["platform"] == "cpu"
    assert (tmp_path / f"{name}-cpu.png").stat().st_size > 1000
    last = printed.strip().splitlines()[-1]
    assert last.startswith("ratio ")


@pytest.mark.examples
def test_all_contenders_compute_the_same() -> None:
    """jlora, those written by hand and, where installed, Qwix: losses and gradients."""
    printed = run("train_step.py", "--check", "--without", "PyTorch")
    assert "all the same" in printed


@pytest.mark.examples
@pytest.mark.parametrize(
    "mesh",
    [
        "--devices 4 --mesh tensor=2,fsdp --without PyTorch hand",
        "--devices 2 --mesh data --inside --without PyTorch hand Qwix merged full",
    ],
)
def test_on_a_mesh_all_contenders_compute_what_one_device_does(mesh: str) -> None:
    flags = f"--check {mesh}".split()
    assert "all the same" in run("train_step.py", *flags)


@pytest.mark.examples
def test_tokens_are_decoded_on_a_mesh(tmp_path: Path) -> None:
    flags = f"{RUNS['inference']} --decode-batches 4 --devices 4 --mesh fsdp=2,tensor=2"
    printed = run("inference.py", "--out", str(tmp_path), *flags.split())
    assert (tmp_path / "inference-fsdp=2-tensor=2-cpu.json").exists()
    assert "ratio unmerged / base decode, batch 4: " in printed


def test_a_mesh_that_the_devices_do_not_make() -> None:
    code = (
        "from placing import sizes_of\n"
        "found = list(sizes_of('tensor=2,fsdp', 8).items())\n"
        "assert found == [('tensor', 2), ('fsdp', 4)]\n"
        "assert sizes_of('data', 8) == {'data': 8}\n"
        "for text in ('fsdp=3', 'fsdp=2', 'data,fsdp', 'model=8', 'tensor=3,fsdp'):\n"
        "    try: sizes_of(text, 8)\n"
        "    except ValueError as error: print(error)\n"
    )
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("is no mesh of 8 devices; give axes") == 5


def test_the_page_quotes_the_results() -> None:
    code = (
        "import report; text = report.PAGE.read_text(encoding='utf-8'); "
        "assert report.page(text) == text, 'run python benchmarks/report.py'"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
