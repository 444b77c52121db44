"""The command works from an installed wheel, without the checkout."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_moleblend_runs_from_a_wheel_with_conf_inside(tmp_path: Path) -> None:
    pytest.importorskip("hatchling", reason="the build backend is not installed")
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(tmp_path), str(REPOSITORY)], check=True)
    (wheel,) = tmp_path.glob("moleblend_ray-*.whl")
    site = tmp_path / "site"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    # `jobs` or `infra` at the top of site-packages would be the modules of every project in that environment.
    installed = {path.name for path in site.iterdir() if path.suffix != ".dist-info"}
    assert installed == {"moleblend_ray"}
    assert (site / "moleblend_ray" / "conf" / "pretrain.yaml").is_file()
    assert (site / "moleblend_ray" / "py.typed").is_file()
    entry_points = next(site.glob("*.dist-info")) / "entry_points.txt"
    assert "moleblend = moleblend_ray.cli:main" in entry_points.read_text()
    done = subprocess.run(
        [sys.executable, "-c", FROM_WHEEL, str(site)],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "num_layers" in done.stdout


FROM_WHEEL = """
import sys
import moleblend_ray, moleblend_ray.config.compose as compose
assert moleblend_ray.__file__.startswith(sys.argv[1]), moleblend_ray.__file__
assert str(compose.config_dir()).startswith(sys.argv[1])
from moleblend_ray.cli import main
sys.exit(main(["pretrain", "model=tiny", "data=x", "out=y", "--dry-run"]))
"""
