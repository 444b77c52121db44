"""What the KubeRay operator and Kueue refuse although the schemas allow it.

KubeRay: `ray-operator/controllers/ray/utils/validation.go` and the CEL rules of its CRDs, release 1.7. Kueue: the webhooks of
`pkg/controller/jobs/rayjob` and `raycluster`. The operator says so in an event of the object, minutes after `kubectl apply`.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, Final

import yaml

from infra.checks.model import Bundle, Problem, cluster_of, entries, section, whole, worker_groups
from infra.checks.render import Manifest, identity

_MODES: Final = ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode")
_MANAGERS: Final = ("ray.io/kuberay-operator", "kueue.x-k8s.io/multikueue")
_LEAST: Final = {
    "activeDeadlineSeconds": 1,
    "preRunningDeadlineSeconds": 1,
    "backoffLimit": 0,
    "ttlSecondsAfterFinished": 0,
}
"""Whole numbers of a job, and the smallest that each may be."""
_NAME: Final = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
_LONGEST_NAME: Final = {"RayJob": 47, "RayCluster": 53}
_DELETION_ORDER: Final = ("DeleteWorkers", "DeleteCluster", "DeleteSelf")
_RESOURCE_PARAMS: Final = ("num-cpus", "num-gpus", "memory", "resources")
_V2_SWITCH: Final = "RAY_enable_autoscaler_v2"
QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"

NEWER_THAN_1_6: Final = (
    "networkPolicy", "tlsOptions", "historyServerOptions", "gcsFaultToleranceOptions.backend",
    "gcsFaultToleranceOptions.storage", "headGroupSpec.ingressOptions", "autoscalerOptions.command",
    "autoscalerOptions.args", "workerGroupSpecs.priority",
)  # fmt: skip
"""Fields of a cluster that exist in KubeRay 1.7 but not in 1.6.2, by comparison of both API references. An older operator
ignores them silently."""


def problems(bundle: Bundle) -> Iterator[Problem]:
    """Everything that the operator or the queue would refuse."""
    for manifest in bundle.of_kind("RayJob", "RayCluster"):
        yield from _name(manifest)
        if manifest["kind"] == "RayJob":
            yield from _job(manifest)
        found = cluster_of(manifest)
        if found is not None:
            where, cluster = found
            yield from _groups(where, cluster)
            yield from _autoscaler(where, cluster)
            yield from _authentication(manifest, where, cluster)
            yield from _fault_tolerance(manifest, where, cluster)
            yield from _newer_fields(where, cluster)
        if QUEUE_LABEL in section(manifest["metadata"], "labels"):
            yield from _queue(manifest)


def _name(manifest: Manifest) -> Iterator[Problem]:
    name, longest = manifest["metadata"]["name"], _LONGEST_NAME[manifest["kind"]]
    if not _NAME.fullmatch(name) or len(name) > longest:
        yield Problem(
            f"{identity(manifest)} metadata.name",
            f"expected lower-case letters, digits and dashes, a letter first, at most {longest} characters, found {name!r}",
        )


def _job(manifest: Manifest) -> Iterator[Problem]:
    spec, where = manifest["spec"], f"{identity(manifest)} spec"
    mode = spec.get("submissionMode", "K8sJobMode")
    backoff, selector = whole(spec, "backoffLimit"), spec.get("clusterSelector")
    if mode not in _MODES:
        yield Problem(
            f"{where}.submissionMode", f"expected one of {', '.join(_MODES)}, found {mode!r}"
        )
    if not selector and "rayClusterSpec" not in spec:
        yield Problem(where, "expected rayClusterSpec or clusterSelector, found neither")
    if selector and not selector.get("ray.io/cluster"):
        yield Problem(f"{where}.clusterSelector", "expected a cluster's name under ray.io/cluster")
    if backoff and (selector or mode == "InteractiveMode"):
        other = "clusterSelector" if selector else "InteractiveMode"
        yield Problem(f"{where}.backoffLimit", f"expected 0 with {other}, found {backoff}")
    if spec.get("suspend") and not spec.get("shutdownAfterJobFinishes"):
        yield Problem(f"{where}.suspend", "expected shutdownAfterJobFinishes: true with it")
    if spec.get("suspend") and selector:
        yield Problem(f"{where}.suspend", "a job on a cluster of others cannot be suspended")
    if mode == "SidecarMode":
        for key in ("clusterSelector", "submitterPodTemplate", "submitterConfig"):
            if key in spec:
                yield Problem(f"{where}.{key}", "not supported with submissionMode SidecarMode")
    for key, least in _LEAST.items():
        yield from _is_whole(where, spec, key)
        if whole(spec, key, least) < least:
            yield Problem(f"{where}.{key}", f"expected >= {least}, found {spec[key]}")
    if spec.get("managedBy", _MANAGERS[0]) not in _MANAGERS:
        yield Problem(
            f"{where}.managedBy", f"expected {' or '.join(_MANAGERS)}, found {spec['managedBy']!r}"
        )
    yield from _runtime_environment(where, spec.get("runtimeEnvYAML", ""))
    yield from _deletion(where, spec)


def _runtime_environment(where: str, text: str) -> Iterator[Problem]:
    try:
        loaded = yaml.safe_load(text) or {}
    except yaml.YAMLError as error:
        yield Problem(f"{where}.runtimeEnvYAML", f"is no YAML: {str(error).splitlines()[0]}")
        return
    if not isinstance(loaded, dict):
        yield Problem(f"{where}.runtimeEnvYAML", f"expected a mapping, found {text!r}")
        return
    for name, value in section(loaded, "env_vars").items():
        if not isinstance(value, str):
            yield Problem(
                f"{where}.runtimeEnvYAML env_vars.{name}",
                f"expected a string, found {value!r}: quote it",
            )


def _deletion(where: str, spec: Mapping[str, Any]) -> Iterator[Problem]:
    shutdown = bool(spec.get("shutdownAfterJobFinishes"))
    if whole(spec, "ttlSecondsAfterFinished") > 0 and not shutdown:
        yield Problem(
            f"{where}.ttlSecondsAfterFinished", "expected shutdownAfterJobFinishes: true with it"
        )
    strategy = spec.get("deletionStrategy")
    if strategy is None:
        return
    place = f"{where}.deletionStrategy"
    rules = entries(strategy, "deletionRules")
    old = [key for key in ("onSuccess", "onFailure") if key in strategy]
    if not rules and len(old) != 2:
        yield Problem(place, "expected deletionRules, or both onSuccess and onFailure")
    if rules and old:
        yield Problem(place, f"expected either deletionRules or {' and '.join(old)}, found both")
    if rules and shutdown:
        yield Problem(place, "deletionRules and shutdownAfterJobFinishes exclude each other")
    cluster = section(spec, "rayClusterSpec")
    yield from _deletion_rules(f"{place}.deletionRules", rules, spec, cluster)


def _deletion_rules(
    place: str, rules: list[Mapping[str, Any]], spec: Mapping[str, Any], cluster: Mapping[str, Any]
) -> Iterator[Problem]:
    seen: dict[tuple[str, str], dict[str, int]] = {}
    for index, rule in enumerate(rules):
        condition, policy = section(rule, "condition"), rule.get("policy", "")
        states = [key for key in ("jobStatus", "jobDeploymentStatus") if key in condition]
        if len(states) != 1:
            yield Problem(
                f"{place}[{index}].condition",
                f"expected one of jobStatus and jobDeploymentStatus, found {' and '.join(states) or 'neither'}",
            )
            continue
        if policy == "DeleteWorkers" and cluster.get("enableInTreeAutoscaling"):
            yield Problem(
                f"{place}[{index}].policy", "DeleteWorkers is not supported with the autoscaler"
            )
        if policy in ("DeleteWorkers", "DeleteCluster") and spec.get("clusterSelector"):
            yield Problem(
                f"{place}[{index}].policy", f"{policy} is not supported with clusterSelector"
            )
        key = (states[0], condition[states[0]])
        after = seen.setdefault(key, {})
        if policy in after:
            yield Problem(f"{place}[{index}]", f"a second {policy} for {key[0]} {key[1]}")
        after[policy] = whole(condition, "ttlSeconds")
    for (kind, state), after in seen.items():
        times = [(policy, after[policy]) for policy in _DELETION_ORDER if policy in after]
        for (first, early), (second, late) in itertools.pairwise(times):
            if late < early:
                yield Problem(
                    place,
                    f"{kind} {state}: expected {second} not before {first}, found {late} s and {early} s",
                )


def _groups(where: str, cluster: Mapping[str, Any]) -> Iterator[Problem]:
    head = section(cluster, "headGroupSpec")
    named = [("headGroupSpec", head)] + [
        (f"workerGroupSpecs[{index}]", group) for index, group in enumerate(worker_groups(cluster))
    ]
    for place, group in named:
        params = section(group, "rayStartParams")
        if not section(group, "template", "spec").get("containers"):
            yield Problem(f"{where}.{place}", "expected a container")
        if group.get("resources") and set(params) & set(_RESOURCE_PARAMS):
            yield Problem(
                f"{where}.{place}",
                "resources stand in rayStartParams and in resources; expected one of them",
            )
        if "labels" in params:
            yield Problem(
                f"{where}.{place}.rayStartParams.labels", "not supported: use the group's labels"
            )
        for key, value in params.items():
            if not isinstance(value, str):
                yield Problem(
                    f"{where}.{place}.rayStartParams.{key}",
                    f"expected a string, found {value!r}: quote it",
                )
    for index, group in enumerate(worker_groups(cluster)):
        yield from _replicas(f"{where}.workerGroupSpecs[{index}]", group)
    names = [group.get("groupName") for group in worker_groups(cluster)]
    if len(set(names)) < len(names):
        yield Problem(f"{where}.workerGroupSpecs", f"expected distinct groupNames, found {names}")


def _replicas(place: str, group: Mapping[str, Any]) -> Iterator[Problem]:
    for key in ("replicas", "minReplicas", "maxReplicas", "idleTimeoutSeconds"):
        yield from _is_whole(place, group, key)
    least, most = whole(group, "minReplicas"), whole(group, "maxReplicas", 2**31 - 1)
    replicas = whole(group, "replicas", least)
    if least < 0 or least > most:
        yield Problem(place, f"expected 0 <= minReplicas <= maxReplicas, found {least} and {most}")
    elif not least <= replicas <= most:
        yield Problem(f"{place}.replicas", f"expected {least} to {most}, found {replicas}")


def _is_whole(place: str, node: Mapping[str, Any], key: str) -> Iterator[Problem]:
    if key in node and (not isinstance(node[key], int) or isinstance(node[key], bool)):
        yield Problem(f"{place}.{key}", f"expected a whole number, found {node[key]!r}")


def _autoscaler(where: str, cluster: Mapping[str, Any]) -> Iterator[Problem]:
    is_on = bool(cluster.get("enableInTreeAutoscaling"))
    options = section(cluster, "autoscalerOptions")
    is_v2 = is_on and options.get("version") == "v2"
    head = section(cluster, "headGroupSpec", "template", "spec")
    switch = any(
        entry.get("name") == _V2_SWITCH
        for container in entries(head, "containers")[:1]
        for entry in entries(container, "env")
    )
    if switch and (not is_on or "version" in options):
        yield Problem(
            f"{where}.headGroupSpec",
            f"{_V2_SWITCH}: expected autoscalerOptions.version: v2 instead",
        )
    if whole(options, "idleTimeoutSeconds") < 0:
        yield Problem(f"{where}.autoscalerOptions.idleTimeoutSeconds", "expected >= 0")
    if is_v2 and head.get("restartPolicy", "Never") != "Never":
        yield Problem(
            f"{where}.headGroupSpec.template.spec.restartPolicy",
            "expected Never with autoscaler v2",
        )
    for index, group in enumerate(worker_groups(cluster)):
        yield from _autoscaled_group(
            f"{where}.workerGroupSpecs[{index}]", group, is_on=is_on, is_v2=is_v2
        )


def _autoscaled_group(
    place: str, group: Mapping[str, Any], *, is_on: bool, is_v2: bool
) -> Iterator[Problem]:
    spec = section(group, "template", "spec")
    if is_v2 and spec.get("restartPolicy", "Never") != "Never":
        yield Problem(f"{place}.template.spec.restartPolicy", "expected Never with autoscaler v2")
    if is_on and group.get("suspend"):
        yield Problem(f"{place}.suspend", "a group cannot be suspended with the autoscaler on")
    for key in ("idleTimeoutSeconds", "priority"):
        if group.get(key) and not is_v2:
            yield Problem(
                f"{place}.{key}",
                "expected enableInTreeAutoscaling: true and autoscaler version v2 with it",
            )
    if whole(group, "idleTimeoutSeconds") < 0:
        yield Problem(
            f"{place}.idleTimeoutSeconds", f"expected >= 0, found {group['idleTimeoutSeconds']}"
        )


def _authentication(
    manifest: Manifest, where: str, cluster: Mapping[str, Any]
) -> Iterator[Problem]:
    options = section(cluster, "authOptions")
    if options.get("enableK8sTokenAuth"):
        if manifest["kind"] == "RayJob":
            yield Problem(f"{where}.authOptions.enableK8sTokenAuth", "not supported in a RayJob")
        if options.get("secretName"):
            yield Problem(
                f"{where}.authOptions", "enableK8sTokenAuth and secretName exclude each other"
            )
    if options.get("mode") == "token":
        version = tuple(
            int(part) for part in re.findall(r"\d+", str(cluster.get("rayVersion", "")))[:2]
        )
        if version < (2, 52):
            yield Problem(
                f"{where}.rayVersion",
                f"expected 2.52 or newer with tokens, found {cluster.get('rayVersion')!r}",
            )


def _fault_tolerance(
    manifest: Manifest, where: str, cluster: Mapping[str, Any]
) -> Iterator[Problem]:
    head = section(cluster, "headGroupSpec")
    containers = entries(head, "template", "spec", "containers")
    variables = {entry.get("name") for found in containers[:1] for entry in entries(found, "env")}
    if "gcsFaultToleranceOptions" in cluster:
        for name in sorted({"RAY_REDIS_ADDRESS", "REDIS_PASSWORD"} & variables):
            yield Problem(
                f"{where}.headGroupSpec", f"{name}: expected it in gcsFaultToleranceOptions only"
            )
        if "ray.io/ft-enabled" in section(manifest["metadata"], "annotations"):
            yield Problem(
                f"{identity(manifest)} metadata.annotations",
                "ray.io/ft-enabled beside gcsFaultToleranceOptions",
            )
    elif "RAY_REDIS_ADDRESS" in variables:
        yield Problem(
            f"{where}.headGroupSpec", "RAY_REDIS_ADDRESS: expected gcsFaultToleranceOptions with it"
        )


def _newer_fields(where: str, cluster: Mapping[str, Any]) -> Iterator[Problem]:
    for path in NEWER_THAN_1_6:
        first, _, last = path.partition(".")
        nodes = cluster.get(first)
        found = nodes if isinstance(nodes, list) else [nodes or {}]
        if (not last and first in cluster) or (last and any(last in node for node in found)):
            yield Problem(
                f"{where}.{path}", "is newer than KubeRay 1.6, which would drop it without a word"
            )


def _queue(manifest: Manifest) -> Iterator[Problem]:
    spec = manifest["spec"]
    if manifest["kind"] == "RayJob" and not spec.get("shutdownAfterJobFinishes"):
        yield Problem(
            f"{identity(manifest)} spec.shutdownAfterJobFinishes",
            "expected true: Kueue wants its quota back at the end",
        )
    found = cluster_of(manifest)
    if found is None:
        return
    where, cluster = found
    if cluster.get("enableInTreeAutoscaling"):
        yield Problem(
            f"{where}.enableInTreeAutoscaling", "expected false: Kueue has given a fixed quota"
        )
    if len(worker_groups(cluster)) > 7:
        yield Problem(f"{where}.workerGroupSpecs", "expected at most 7 with Kueue")
    for index, group in enumerate(worker_groups(cluster)):
        if group.get("groupName") == "head":
            yield Problem(
                f"{where}.workerGroupSpecs[{index}].groupName",
                "Kueue keeps the name head for the head",
            )
