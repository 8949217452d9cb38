"""Files that jlora wrote, fused by diffusers itself."""

import subprocess
from pathlib import Path

import numpy as np
import pytest
from format_files import FILES, arrays, names
from paths import ROOT
from torch_python import oracle_python

from jlora._formats import diffusers, kohya

pytestmark = [pytest.mark.oracle, pytest.mark.slow]


@pytest.mark.parametrize("case", ["diffusers", "kohya"])
def test_diffusers_fuses_what_jlora_writes(case: str, tmp_path: Path) -> None:
    python = oracle_python()
    found = subprocess.run([python, "-c", "import diffusers"], capture_output=True)
    if found.returncode:
        pytest.skip(f"{python} has no diffusers")
    file = tmp_path / "written.safetensors"
    if case == "kohya":
        _, adapter = kohya.read(FILES[case], base=names(case))
        kohya.write(file, adapter, (), convolutions=True)
    else:
        _, adapter = diffusers.read(FILES[case])
        diffusers.write(file, adapter, (), convolutions=True)
    script = ROOT / "tests" / "oracle" / "fuse_formats.py"
    command = [python, str(script), case, str(file), str(tmp_path / "out.npz")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    fused = np.load(tmp_path / "out.npz")
    merged = arrays(case, "merged")
    of_unet = [name for name in merged if name.startswith("unet.")]
    assert len(of_unet) > 10
    for name in of_unet:
        np.testing.assert_allclose(fused[name], merged[name], rtol=1e-5, atol=2e-6)
