"""The part of kustomize that the manifests use: resources, components, JSON patches, replacements, files as ConfigMaps.

With it, the checks and tests need no kubectl. Unsupported features are refused, never skipped. Where kubectl is installed, a test
compares its output with ours. Sources: the documentation of kustomize 5 and RFC 6902.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml

Manifest = dict[str, Any]

LOCAL: Final = "config.kubernetes.io/local-config"
"""Annotation of objects that only kustomize reads: settings, parts."""

_KEYS: Final = {
    "apiVersion", "kind", "metadata", "resources", "components", "patches", "replacements", "configMapGenerator",
    "generatorOptions", "labels",
}  # fmt: skip


class RenderError(Exception):
    """A kustomization that cannot be rendered; the message names file and field."""


def render(folder: Path, extra_components: Iterable[Path] = ()) -> list[Manifest]:
    """The objects that ``kubectl kustomize FOLDER`` prints; ``extra_components`` are applied after its own.

    Raises RenderError for what is missing, wrong, or not among the features known here.
    """
    objects = _accumulate(folder, [], _load_kustomization(folder))
    for component in extra_components:
        objects = _accumulate(component, objects, _load_kustomization(component))
    return [found for found in objects if not _is_local(found)]


def identity(manifest: Manifest) -> str:
    """``Kind/name`` for messages."""
    return f"{manifest.get('kind', '?')}/{manifest.get('metadata', {}).get('name', '?')}"


def _is_local(manifest: Manifest) -> bool:
    return bool((manifest["metadata"].get("annotations") or {}).get(LOCAL) == "true")


def _load_kustomization(folder: Path) -> dict[str, Any]:
    file = folder / "kustomization.yaml"
    if not file.is_file():
        raise RenderError(f"{folder}: expected a folder with a kustomization.yaml")
    loaded = yaml.safe_load(file.read_text()) or {}
    unknown = sorted(set(loaded) - _KEYS)
    if unknown:
        raise RenderError(
            f"{file}: {', '.join(unknown)}: not known to this renderer; expected only {', '.join(sorted(_KEYS))}"
        )
    return dict(loaded)


def _accumulate(
    folder: Path, inherited: list[Manifest], kustomization: Mapping[str, Any]
) -> list[Manifest]:
    """``inherited`` with the additions and changes of the kustomization, in the order in which kustomize applies them."""
    objects = list(inherited)
    for entry in kustomization.get("resources", []):
        path = folder / entry
        objects += (
            _accumulate(path, [], _load_kustomization(path)) if path.is_dir() else _load_file(path)
        )
        _refuse_twins(objects, path)
    for entry in kustomization.get("components", []):
        path = folder / entry
        objects = _accumulate(path, objects, _load_kustomization(path))
    for generator in kustomization.get("configMapGenerator", []):
        objects.append(_config_map(folder, generator, kustomization.get("generatorOptions", {})))
        _refuse_twins(objects, folder)
    for patch in kustomization.get("patches", []):
        _apply_patch(objects, patch, folder)
    for label in kustomization.get("labels", []):
        _apply_labels(objects, label, folder)
    for replacement in kustomization.get("replacements", []):
        _replace(objects, replacement, folder)
    return objects


def _load_file(path: Path) -> list[Manifest]:
    if not path.is_file():
        raise RenderError(f"{path}: no such file or folder")
    # Copied through JSON: objects that YAML anchors share must become separate, because a patch may change one of them.
    return [
        json.loads(json.dumps(found)) for found in yaml.safe_load_all(path.read_text()) if found
    ]


def _refuse_twins(objects: list[Manifest], path: Path) -> None:
    names = [(found.get("apiVersion"), identity(found)) for found in objects]
    twins = {name for name in names if names.count(name) > 1}
    if twins:
        raise RenderError(f"{path}: {', '.join(name for _, name in twins)} is there already")


def _config_map(folder: Path, generator: Mapping[str, Any], common: Mapping[str, Any]) -> Manifest:
    options = {**common, **generator.get("options", {})}
    if not options.get("disableNameSuffixHash"):
        raise RenderError(
            f"{folder}: configMapGenerator {generator['name']}: expected disableNameSuffixHash: true; "
            "names with a hash are not known to this renderer"
        )
    data = dict(entry.split("=", 1) for entry in generator.get("literals", []))
    for entry in generator.get("files", []):
        key, _, file = entry.rpartition("=")
        data[key or Path(file).name] = (folder / file).read_text()
    metadata: dict[str, Any] = {"name": generator["name"]}
    if "namespace" in generator:
        metadata["namespace"] = generator["namespace"]
    for key in ("labels", "annotations"):
        if key in options:
            metadata[key] = dict(options[key])
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}


def _apply_labels(objects: list[Manifest], label: Mapping[str, Any], folder: Path) -> None:
    if label.get("includeSelectors") or label.get("includeTemplates"):
        raise RenderError(f"{folder}: labels: only pairs for the objects themselves are known here")
    for found in objects:
        found["metadata"].setdefault("labels", {}).update(label["pairs"])


def _apply_patch(objects: list[Manifest], patch: Mapping[str, Any], folder: Path) -> None:
    target = patch.get("target") or {}
    if set(target) - {"kind", "name"} or "path" in patch:
        raise RenderError(f"{folder}: patches: expected an inline patch with target kind and name")
    operations = yaml.safe_load(patch["patch"])
    if not isinstance(operations, list):
        raise RenderError(f"{folder}: patches: expected a list of JSON patch operations")
    chosen = [
        found
        for found in objects
        if re.fullmatch(target.get("kind", ".*"), found["kind"])
        and re.fullmatch(target.get("name", ".*"), found["metadata"]["name"])
    ]
    if not chosen:
        raise RenderError(f"{folder}: patches: nothing matches the target {dict(target)}")
    for found in chosen:
        for operation in operations:
            _operate(found, copy.deepcopy(operation), f"{folder}: {identity(found)}")


def _operate(manifest: Manifest, operation: Mapping[str, Any], where: str) -> None:
    """One operation of RFC 6902: add, replace or remove."""
    path, kind = operation["path"], operation["op"]
    *parents, last = [
        part.replace("~1", "/").replace("~0", "~") for part in path.lstrip("/").split("/")
    ]
    node: Any = manifest
    for part in parents:
        node = _child(node, part, f"{where}: {path}")
    if kind != "add":
        _child(node, last, f"{where}: {path}")  # raises if it is missing
    elif isinstance(node, list):
        node.insert(len(node) if last == "-" else int(last), operation["value"])
        return
    if kind == "remove":
        del node[int(last) if isinstance(node, list) else last]
    elif kind in ("add", "replace"):
        node[int(last) if isinstance(node, list) else last] = operation["value"]
    else:
        raise RenderError(f"{where}: {path}: expected add, replace or remove, found {kind}")


def _child(node: Any, part: str, where: str) -> Any:
    try:
        return node[int(part) if isinstance(node, list) else part]
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise RenderError(f"{where}: no {part!r} there") from error


def _replace(objects: list[Manifest], replacement: Mapping[str, Any], folder: Path) -> None:
    source = replacement["source"]
    owners = [found for found in objects if _is_selected(found, source)]
    if len(owners) != 1:
        raise RenderError(
            f"{folder}: replacements: {len(owners)} objects match the source {source}"
        )
    path = _field_path(source["fieldPath"])
    value: Any = owners[0]
    for part in path:
        value = _child(value, part, f"{folder}: replacements: {source}")
    value = copy.deepcopy(value)
    for target in replacement["targets"]:
        chosen = [
            found
            for found in objects
            if _is_selected(found, target["select"])
            and not any(_is_selected(found, rejected) for rejected in target.get("reject", []))
        ]
        if not chosen:
            raise RenderError(f"{folder}: replacements: nothing matches {target['select']}")
        for found in chosen:
            for field in target["fieldPaths"]:
                where = f"{folder}: replacements: {identity(found)} {field}"
                _put(found, _field_path(field), value, target.get("options", {}), where)


def _is_selected(manifest: Manifest, selector: Mapping[str, Any]) -> bool:
    return all(
        wanted == (manifest["metadata"]["name"] if key == "name" else manifest.get(key))
        for key, wanted in selector.items()
        if key in ("apiVersion", "kind", "name")
    )


def _field_path(text: str) -> list[str]:
    """``a.b\\.c.0`` -> a, b.c, 0."""
    return [part.replace("\\.", ".") for part in re.split(r"(?<!\\)\.", text)]


def _put(
    manifest: Manifest, path: list[str], value: Any, options: Mapping[str, Any], where: str
) -> None:
    *parents, last = path
    node: Any = manifest
    for part in parents:
        if options.get("create") and isinstance(node, dict):
            node.setdefault(part, {})
        node = _child(node, part, where)
    if not (options.get("create") and isinstance(node, dict)):
        _child(node, last, where)  # raises if it is missing
    key: Any = int(last) if isinstance(node, list) else last
    if "delimiter" not in options:
        node[key] = copy.deepcopy(value)
        return
    words = str(node[key]).split(options["delimiter"])
    index = options.get("index", 0)
    if not 0 <= index < len(words):
        raise RenderError(f"{where}: {len(words)} words, no word {index}")
    words[index] = str(value)
    node[key] = options["delimiter"].join(words)
