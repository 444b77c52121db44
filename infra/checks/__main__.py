"""``python -m infra.checks``: render every overlay and print its problems; exit with 1 if there are any."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

from infra.checks import house, jobs, nodes, operator, schema
from infra.checks.model import REPOSITORY, Bundle, Problem, cluster_of, pods_of, section, whole
from infra.checks.quantity import amount, text
from infra.checks.render import RenderError, identity, render

OVERLAYS: Final = REPOSITORY / "infra" / "kuberay" / "overlays"
SCHEMAS: Final = REPOSITORY.parent / "shared" / "data" / "kuberay"
"""Used if it exists."""


def check(bundle: Bundle, schemas: Path | None = None) -> list[Problem]:
    """All problems of the objects of one overlay, each once."""
    found: list[Problem] = []
    if schemas is not None:
        found += schema.problems(bundle, schemas)
    for rules in (operator, house, nodes, jobs):
        found += rules.problems(bundle)
    return list(dict.fromkeys(found))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the checks and print the problems; return the exit status."""
    options = _options(arguments)
    schemas = options.schemas if (options.schemas / schema.FILES["RayJob"]).is_file() else None
    _say(f"schemas: {schemas or f'none in {options.schemas}: only the rules are checked'}")
    failed = 0
    for name in options.overlay or sorted(folder.name for folder in OVERLAYS.iterdir()):
        try:
            bundle = Bundle(name, render(OVERLAYS / name), options.ready)
        except RenderError as error:
            _say(f"{name}: cannot be rendered: {error}")
            failed += 1
            continue
        found = check(bundle, schemas)
        kinds = ", ".join(
            f"{len(bundle.of_kind(kind))} {kind}" for kind in ("RayJob", "RayCluster")
        )
        _say(
            f"{name}: {'ok' if not found else f'{len(found)} problems'}, {len(bundle.objects)} objects ({kinds})"
        )
        for problem in found:
            _say(f"  {problem}")
        if options.totals:
            _totals(bundle)
        failed += bool(found)
    return 1 if failed else 0


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m infra.checks", description=__doc__)
    parser.add_argument("--overlay", action="append", help="only this one; may be repeated")
    parser.add_argument(
        "--ready", action="store_true", help="also refuse placeholders: before kubectl apply"
    )
    parser.add_argument(
        "--totals", action="store_true", help="what each job asks for with all its pods"
    )
    parser.add_argument(
        "--schemas", type=Path, default=SCHEMAS, help="folder of KubeRay's JSON schemas"
    )
    return parser.parse_args(arguments)


def _totals(bundle: Bundle) -> None:
    """What each job requests with all its pods, to plan a quota."""
    for manifest in bundle.of_kind("RayJob", "RayCluster"):
        _, cluster = cluster_of(manifest) or ("", {})
        autoscales = bool(cluster.get("enableInTreeAutoscaling"))
        # The operator adds the autoscaler to the head pod.
        extra = [section(cluster, "autoscalerOptions")] if autoscales else []
        sums: dict[str, Decimal] = {}
        for pods in pods_of(manifest):
            most = whole(pods.group, "maxReplicas" if autoscales else "replicas")
            count = most if pods.role == "worker" else 1
            containers = [container for _, container in pods.containers]
            for name, value in _requests(containers + (extra if pods.role == "head" else [])):
                sums[name] = sums.get(name, Decimal(0)) + count * value
        shown = ", ".join(f"{name} {text(value)}" for name, value in sums.items())
        _say(f"  {identity(manifest)} at most: {shown}")


def _requests(containers: Iterable[Mapping[str, Any]]) -> Iterable[tuple[str, Decimal]]:
    for container in containers:
        for name, value in section(container, "resources", "requests").items():
            yield name, amount(value) or Decimal(0)


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")


if __name__ == "__main__":
    sys.exit(main())
