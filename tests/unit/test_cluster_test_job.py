"""What `make cluster-test` looks for on its cluster is what the package runs there."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_actors_and_tasks_whose_places_are_checked_are_those_of_the_package() -> None:
    script = (ROOT / "jobs" / "cluster_test.py").read_text()
    places = re.search(r"^PLACES[^{]*\{(.*?)^\}", script, re.DOTALL | re.MULTILINE)
    assert places is not None
    looked_for = set(re.findall(r'^    "(\w+)":', places[1], re.MULTILINE))
    defined = {
        name
        for file in (ROOT / "moleblend_ray").rglob("*.py")
        for name in re.findall(r"^(?:class|def) (\w+)", file.read_text(), re.MULTILINE)
    }
    assert "_Converter" in looked_for
    assert looked_for - defined == {"RayTrainWorker"}  # Ray's own
