"""Checks the objects against JSON schemas of KubeRay's CRDs, if such files are available."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import jsonschema  # type: ignore[import-untyped]

from infra.checks.model import Bundle, Problem
from infra.checks.render import identity

FILES: Final = {"RayJob": "rayjob-v1.schema.json", "RayCluster": "raycluster-v1.schema.json"}


def problems(bundle: Bundle, folder: Path) -> Iterator[Problem]:
    """What the schemas in ``folder`` refuse: unknown and missing fields, wrong types and values."""
    for kind, name in FILES.items():
        validator = jsonschema.Draft202012Validator(json.loads((folder / name).read_text()))
        for manifest in bundle.of_kind(kind):
            for error in validator.iter_errors(manifest):
                path = ".".join(map(str, error.absolute_path)) or "the object"
                yield Problem(f"{identity(manifest)} {path}", error.message[:300])
