"""Our own rules for everything that is sent to a cluster: images, resources, rights, secrets, reachability.

The reason for each rule is in the text of the problem, or in the manifest beside the line in question.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from decimal import Decimal
from typing import Any, Final

import yaml

from infra.checks.model import (
    REPOSITORY,
    Bundle,
    Pods,
    Problem,
    cluster_of,
    entries,
    pods_of,
    section,
    whole,
    worker_groups,
)
from infra.checks.quantity import amount, text
from infra.checks.render import Manifest, identity
from moleblend_ray.errors import SECRET_NAME

PART_OF: Final = "app.kubernetes.io/part-of"
COMPONENT: Final = "app.kubernetes.io/component"
PLACEHOLDERS: Final = re.compile(r"\b(REGISTRY|BUCKET|ROLE)\b")
STOP_WAIT: Final = "RAY_JOB_STOP_WAIT_TIME_S"
_AFTER_STOP_S: Final = 20
"""To end Ray's own processes after the job has ended."""
_LEAST_STOP_S: Final = 30
"""The workers may wait ten seconds for the data of their step; then they write a checkpoint."""
_MOST_HEADS: Final = 1000
"""Pods that the budget of head pods asks for: more than there are."""
_RESOURCES: Final = ("cpu", "memory", "ephemeral-storage")
_EXPOSING: Final = ("Ingress", "HTTPRoute", "Gateway", "VirtualService", "Route")
_SUBMITTER: Final = ["python", "/opt/moleblend/submitter.py"]
_SECRET_TEXT: Final = re.compile(
    r"(?<![A-Z0-9])A[KS]IA[A-Z0-9]{16}(?![A-Z0-9])|://[^/\s:@]+:[^/\s@]+@|-----BEGIN [A-Z ]*PRIVATE KEY"
)


def pinned(package: str) -> str:
    """The version of a package in constraints.txt."""
    found = re.search(
        rf"^{re.escape(package)}==(.+)$", (REPOSITORY / "constraints.txt").read_text(), re.M
    )
    if found is None:
        raise LookupError(f"constraints.txt: {package} is missing")
    return found[1]


def package_version() -> str:
    """The version of this package."""
    found = re.search(r'^version = "(.+)"$', (REPOSITORY / "pyproject.toml").read_text(), re.M)
    if found is None:
        raise LookupError("pyproject.toml: no version")
    return found[1]


def problems(bundle: Bundle) -> Iterator[Problem]:
    """All violations of our rules."""
    for pods in bundle.pods():
        yield from _images(pods)
        yield from _rights(pods)
        yield from _resources(pods)
        yield from _storage(pods)
        yield from _references(bundle, pods)
        yield from _labels(pods)
    for manifest in bundle.of_kind("RayJob", "RayCluster"):
        yield from _cluster(bundle, manifest)
        yield from _one_image(manifest)
    for manifest in bundle.of_kind("RayJob"):
        yield from _ends(manifest)
    for manifest in bundle.objects:
        yield from _selectable(manifest)
        yield from _secrets(manifest)
        yield from _exposure(manifest)
        if bundle.is_ready:
            yield from _placeholders(manifest)
    yield from _network(bundle)


def _images(pods: Pods) -> Iterator[Problem]:
    preparing = {where for where, _ in pods.init_containers}
    for where, container in pods.containers + pods.init_containers:
        image = str(container.get("image", ""))
        tag = image.rpartition("/")[2].partition("@")[0].partition(":")[2]
        if tag in ("", "latest") and "@sha256:" not in image:
            yield Problem(
                f"{where}.image",
                f"expected a fixed tag or digest, found {image!r}: a retry may get another image",
            )
        elif tag and where not in preparing and not _is_of_version(tag):
            yield Problem(
                f"{where}.image", f"expected a tag of version {package_version()}, found {tag!r}"
            )


def _is_of_version(tag: str) -> bool:
    """Whether the tag is the version of this package, alone or with a suffix such as -gpu."""
    return re.match(rf"{re.escape(package_version())}(?![\w.])", tag) is not None


def _one_image(manifest: Manifest) -> Iterator[Problem]:
    images = {
        container.get("image") for pods in pods_of(manifest) for _, container in pods.containers
    }
    if len(images) > 1:
        yield Problem(
            identity(manifest),
            f"expected one image for head, workers and submitter (Ray wants the same Python and Ray), found {sorted(map(str, images))}",
        )


def _rights(pods: Pods) -> Iterator[Problem]:
    spec, security = pods.spec, section(pods.spec, "securityContext")
    if security.get("runAsNonRoot") is not True or security.get("runAsUser") in (None, 0):
        yield Problem(
            f"{pods.where}.spec.securityContext",
            "expected runAsNonRoot: true and a runAsUser that is not 0",
        )
    if section(security, "seccompProfile").get("type") != "RuntimeDefault":
        yield Problem(
            f"{pods.where}.spec.securityContext.seccompProfile", "expected type: RuntimeDefault"
        )
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(key):
            yield Problem(
                f"{pods.where}.spec.{key}",
                "expected it unset: the pod would see others of its node",
            )
    for index, volume in enumerate(entries(spec, "volumes")):
        if "hostPath" in volume:
            yield Problem(
                f"{pods.where}.spec.volumes[{index}]", "hostPath: expected no file of the node"
            )
    if pods.role != "head" and spec.get("automountServiceAccountToken") is not False:
        yield Problem(
            f"{pods.where}.spec.automountServiceAccountToken",
            "expected false: only the head talks to the API server",
        )
    for where, container in pods.containers + pods.init_containers:
        yield from _container_rights(where, container)
        if section(container, "securityContext").get("readOnlyRootFilesystem") is not True:
            yield Problem(
                f"{where}.securityContext.readOnlyRootFilesystem", "expected true: files go to /tmp"
            )


def _container_rights(where: str, container: Mapping[str, Any]) -> Iterator[Problem]:
    own = section(container, "securityContext")
    if own.get("privileged") or own.get("allowPrivilegeEscalation") is not False:
        yield Problem(
            f"{where}.securityContext",
            "expected allowPrivilegeEscalation: false, not privileged",
        )
    capabilities = section(own, "capabilities")
    if capabilities.get("drop") != ["ALL"] or capabilities.get("add"):
        yield Problem(
            f"{where}.securityContext.capabilities", "expected drop: [ALL] and none added"
        )
    # What a container says of itself replaces what its pod says.
    if own.get("runAsUser") == 0 or own.get("runAsNonRoot") is False:
        yield Problem(f"{where}.securityContext", "expected no root: the pod says who it runs as")
    if section(own, "seccompProfile").get("type", "RuntimeDefault") != "RuntimeDefault":
        yield Problem(f"{where}.securityContext.seccompProfile", "expected that of the pod")


def _resources(pods: Pods) -> Iterator[Problem]:
    for where, container in pods.containers + pods.init_containers:
        yield from _container_resources(where, container)
    if pods.role != "worker":
        return
    for where, container in pods.containers:
        found = section(container, "resources", "limits").get("cpu")
        cpus = amount(found)
        if cpus is not None and cpus != int(cpus):
            yield Problem(
                f"{where}.resources",
                f"cpu: expected a whole number as limit, found {found}: Ray counts it as more",
            )


def _container_resources(where: str, container: Mapping[str, Any]) -> Iterator[Problem]:
    resources = section(container, "resources")
    requests, limits = section(resources, "requests"), section(resources, "limits")
    gpus = [name for name in {**requests, **limits} if name.endswith("/gpu")]
    for name in (*_RESOURCES, *gpus):
        asked, most = amount(requests.get(name)), amount(limits.get(name))
        if asked is None or most is None:
            yield Problem(
                f"{where}.resources",
                f"{name}: expected a request and a limit, found {requests.get(name)} and {limits.get(name)}",
            )
        elif asked > most:
            yield Problem(
                f"{where}.resources",
                f"{name}: expected a request up to the limit, found {requests[name]} of {limits[name]}",
            )
        elif name in ("memory", *gpus) and asked != most:
            yield Problem(
                f"{where}.resources",
                f"{name}: expected the request to be the limit, found {requests[name]} and {limits[name]}",
            )


def _storage(pods: Pods) -> Iterator[Problem]:
    """Sizes of /dev/shm and /tmp against the limits and the object store."""
    if pods.role not in ("head", "worker") or not pods.containers:
        return
    where, container = pods.containers[0]
    limits = section(container, "resources", "limits")
    volumes = {
        volume.get("name"): volume.get("emptyDir") for volume in entries(pods.spec, "volumes")
    }
    mounted = {
        mount.get("mountPath"): volumes.get(mount.get("name"))
        for mount in entries(container, "volumeMounts")
    }
    shared = section(mounted, "/dev/shm")
    yield from _shared_memory(pods, shared, amount(limits.get("memory")))
    yield from _object_store(pods, amount(shared.get("sizeLimit")))
    disk = amount(section(mounted, "/tmp").get("sizeLimit"))
    room = amount(limits.get("ephemeral-storage"))
    if disk is None:
        yield Problem(
            f"{where}.volumeMounts",
            "/tmp: expected an emptyDir with a sizeLimit: spilled objects go there",
        )
    elif room is not None and disk > room:
        yield Problem(
            f"{pods.where}.spec.volumes",
            f"/tmp: expected at most the ephemeral-storage limit, found {text(disk)} of {text(room)}",
        )


def _shared_memory(
    pods: Pods, shared: Mapping[str, Any], memory: Decimal | None
) -> Iterator[Problem]:
    where, _ = pods.containers[0]
    size = amount(shared.get("sizeLimit"))
    if shared.get("medium") != "Memory" or size is None:
        yield Problem(
            f"{where}.volumeMounts",
            "/dev/shm: expected an emptyDir with medium Memory and a sizeLimit",
        )
    elif memory is not None and size > memory / 2:
        yield Problem(
            f"{pods.where}.spec.volumes",
            f"/dev/shm: expected at most half of the memory limit, which it counts against, found {text(size)} of {text(memory)}",
        )


def _object_store(pods: Pods, shared: Decimal | None) -> Iterator[Problem]:
    place = f"{pods.where.removesuffix('.template')}.rayStartParams.object-store-memory"
    store = str(section(pods.group, "rayStartParams").get("object-store-memory", ""))
    if not store.isdigit():
        yield Problem(
            place,
            f"expected a number of bytes, found {store!r}: Ray would take 30 % of the memory, whatever /dev/shm has",
        )
    elif shared is not None and Decimal(store) > shared * Decimal("0.9"):
        yield Problem(
            place,
            f"expected at most nine tenths of /dev/shm, found {text(Decimal(store))} of {text(shared)}",
        )


def _references(bundle: Bundle, pods: Pods) -> Iterator[Problem]:
    spec = pods.spec
    account = spec.get("serviceAccountName")
    if account not in bundle.names("ServiceAccount"):
        yield Problem(
            f"{pods.where}.spec.serviceAccountName",
            f"expected an account of these manifests, found {account!r}",
        )
    for volume in entries(spec, "volumes"):
        claim = section(volume, "persistentVolumeClaim").get("claimName")
        if claim is not None and claim not in bundle.names("PersistentVolumeClaim"):
            yield Problem(
                f"{pods.where}.spec.volumes",
                f"no PersistentVolumeClaim {claim!r} in these manifests",
            )
    named = {volume.get("name") for volume in entries(spec, "volumes")}
    for where, container in pods.containers + pods.init_containers:
        for mount in entries(container, "volumeMounts"):
            if mount.get("name") not in named:
                yield Problem(
                    f"{where}.volumeMounts", f"no volume {mount.get('name')!r} in this pod"
                )
        for kind, name in _sources(container):
            known = bundle.names(kind) | (bundle.documented_secrets if kind == "Secret" else set())
            if name not in known:
                yield Problem(
                    where,
                    f"{kind} {name!r}: neither among these manifests nor among those that infra/README.md tells to make",
                )


def _sources(container: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Secrets and ConfigMaps that the container's variables come from."""
    for source in entries(container, "envFrom"):
        for key, kind in (("secretRef", "Secret"), ("configMapRef", "ConfigMap")):
            if key in source:
                yield kind, str(source[key].get("name"))
    for entry in entries(container, "env"):
        for key, kind in (("secretKeyRef", "Secret"), ("configMapKeyRef", "ConfigMap")):
            if key in section(entry, "valueFrom"):
                yield kind, str(entry["valueFrom"][key].get("name"))


def _labels(pods: Pods) -> Iterator[Problem]:
    if pods.labels.get(PART_OF) != "moleblend":
        yield Problem(
            f"{pods.where}.metadata.labels",
            f"expected {PART_OF}: moleblend, by which the network policies select",
        )
    component = section(pods.owner["metadata"], "labels").get(COMPONENT)
    if pods.labels.get(COMPONENT) != component:
        yield Problem(
            f"{pods.where}.metadata.labels",
            f"{COMPONENT}: expected {component!r} as of its owner, found {pods.labels.get(COMPONENT)!r}",
        )


def _selectable(manifest: Manifest) -> Iterator[Problem]:
    if COMPONENT not in section(manifest["metadata"], "labels"):
        yield Problem(
            f"{identity(manifest)} metadata.labels",
            f"expected {COMPONENT}: a job's name, or shared: `kubectl apply -l` passes over what has none",
        )


def _cluster(bundle: Bundle, manifest: Manifest) -> Iterator[Problem]:
    found = cluster_of(manifest)
    if found is None:
        return
    where, cluster = found
    head = section(cluster, "headGroupSpec")
    if cluster.get("rayVersion") != pinned("ray"):
        yield Problem(
            f"{where}.rayVersion",
            f"expected {pinned('ray')} as in constraints.txt, found {cluster.get('rayVersion')!r}",
        )
    if section(cluster, "authOptions").get("mode") != "token":
        yield Problem(
            f"{where}.authOptions.mode",
            "expected token: without it whoever reaches the head runs code",
        )
    if section(head, "rayStartParams").get("num-cpus") != "0":
        yield Problem(
            f"{where}.headGroupSpec.rayStartParams.num-cpus",
            'expected "0": work on the head can end the whole run',
        )
    if (
        cluster.get("enableInTreeAutoscaling")
        and section(cluster, "autoscalerOptions").get("version") != "v2"
    ):
        yield Problem(f"{where}.autoscalerOptions.version", "expected v2")
    if cluster.get("enableInTreeAutoscaling"):
        # The operator makes a container of the head pod from it: a namespace that refuses one, refuses the pod.
        place, options = f"{where}.autoscalerOptions", section(cluster, "autoscalerOptions")
        yield from _container_rights(place, options)
        yield from _container_resources(place, options)
    yield from _head(f"{where}.headGroupSpec", head)
    yield from _disruption_budget(bundle, manifest)


def _head(where: str, head: Mapping[str, Any]) -> Iterator[Problem]:
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield Problem(
            where,
            "expected serviceType ClusterIP and no ingress: the dashboard runs what it is sent",
        )


def _disruption_budget(bundle: Bundle, manifest: Manifest) -> Iterator[Problem]:
    labels = {PART_OF: "moleblend", "ray.io/node-type": "head"}
    budgets = [
        found["spec"].get("minAvailable")
        for found in bundle.of_kind("PodDisruptionBudget")
        if found["spec"]["selector"].get("matchLabels") == labels
    ]
    # A percentage needs an owner with a scale subresource, as maxUnavailable does.
    if not any(isinstance(least, int) and least >= _MOST_HEADS for least in budgets):
        yield Problem(
            identity(manifest),
            f"expected a PodDisruptionBudget for all head pods, with minAvailable: {_MOST_HEADS}, which is more than there are: "
            "with less, one of several could be evicted",
        )


def _ends(manifest: Manifest) -> Iterator[Problem]:
    """How a job ends, and whether there is enough time to commit its work."""
    spec, where = manifest["spec"], f"{identity(manifest)} spec"
    for key in ("backoffLimit", "preRunningDeadlineSeconds"):
        if key not in spec:
            yield Problem(f"{where}.{key}", "expected a number")
    if not spec.get("shutdownAfterJobFinishes") and not section(spec, "deletionStrategy").get(
        "deletionRules"
    ):
        yield Problem(
            where,
            "expected shutdownAfterJobFinishes or deletionRules: the cluster would stay for ever",
        )
    cluster = section(spec, "rayClusterSpec")
    gpus = any("/gpu" in json.dumps(group) for group in worker_groups(cluster))
    if "deletionStrategy" in spec and gpus:
        yield Problem(
            f"{where}.deletionStrategy",
            "expected shutdownAfterJobFinishes with GPUs: rules leave the cluster of a stopped job",
        )
    yield from _graces(manifest)
    yield from _submitter(manifest)


def _submitter(manifest: Manifest) -> Iterator[Problem]:
    """The operator's own command for the submitter ends with the stream of the log, and the job would be taken for failed."""
    spec, where = manifest["spec"], f"{identity(manifest)} spec.submitterPodTemplate"
    if spec.get("submissionMode", "K8sJobMode") != "K8sJobMode":
        return
    containers = entries(section(spec, "submitterPodTemplate"), "spec", "containers") or [{}]
    if containers[0].get("command") != _SUBMITTER:
        yield Problem(
            f"{where}.spec.containers[0].command",
            f"expected {_SUBMITTER}, found {containers[0].get('command')}: where the stream of the log breaks, the operator "
            "would delete a cluster that works",
        )
    elif containers[0].get("args") != [spec.get("entrypoint"), spec.get("runtimeEnvYAML")]:
        yield Problem(
            f"{where}.spec.containers[0].args",
            "expected spec.entrypoint and spec.runtimeEnvYAML: the job would be another than the RayJob says",
        )


def _graces(manifest: Manifest) -> Iterator[Problem]:
    spec, where = manifest["spec"], f"{identity(manifest)} spec"
    variables = _variables(spec)
    if variables is None:
        return
    wait = _seconds(variables.get(STOP_WAIT))
    if wait is None or wait < _LEAST_STOP_S:
        yield Problem(
            f"{where}.runtimeEnvYAML",
            f"{STOP_WAIT}: expected seconds, at least {_LEAST_STOP_S} to commit a checkpoint, found {variables.get(STOP_WAIT)!r}: "
            "without it `ray job stop` would kill the job after three",
        )
        return
    for pods in pods_of(manifest):
        if pods.role in ("head", "worker"):
            yield from _grace(pods, wait)


def _variables(spec: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The variables of a job's runtime environment; None if this is no YAML, which another rule reports."""
    try:
        loaded = yaml.safe_load(spec.get("runtimeEnvYAML") or "")
    except yaml.YAMLError:
        return None
    return section(loaded, "env_vars") if isinstance(loaded, dict) else {}


def _grace(pods: Pods, wait: int) -> Iterator[Problem]:
    """Whether a pod has the time that the job may take to stop, and its hook waits as long."""
    grace = whole(pods.spec, "terminationGracePeriodSeconds", 30)
    if grace < wait + _AFTER_STOP_S:
        yield Problem(
            f"{pods.where}.spec.terminationGracePeriodSeconds",
            f"expected at least {wait + _AFTER_STOP_S} ({STOP_WAIT} and {_AFTER_STOP_S} s to end Ray), found {grace}",
        )
    for place, container in pods.containers[:1]:
        command = [
            str(word) for word in entries(container, "lifecycle", "preStop", "exec", "command")
        ]
        seconds = _seconds(command[4]) if len(command) == 5 else None
        if command[1:4] != ["/opt/moleblend/leave.py", pods.role, "--seconds"] or seconds is None:
            yield Problem(
                f"{place}.lifecycle.preStop",
                f"expected leave.py {pods.role} --seconds N, found {command}",
            )
        elif seconds > grace - _AFTER_STOP_S:
            yield Problem(
                f"{place}.lifecycle.preStop",
                f"expected at most {grace - _AFTER_STOP_S} seconds within the grace period of {grace}, found {command[4]}",
            )
        elif seconds < wait:
            yield Problem(
                f"{place}.lifecycle.preStop",
                f"expected at least the {wait} seconds of {STOP_WAIT}, found {command[4]}: the pod would end before its work is committed",
            )


def _seconds(value: Any) -> int | None:
    """The seconds that Ray and the hook read from this text; None for what they refuse."""
    return int(value) if isinstance(value, str) and value.isdecimal() else None


def _secrets(manifest: Manifest) -> Iterator[Problem]:
    where = identity(manifest)
    if manifest.get("kind") == "Secret" and (manifest.get("data") or manifest.get("stringData")):
        yield Problem(where, "a Secret with values: make it with kubectl, outside of any file")
    for path, node in _walk(manifest, ""):
        if isinstance(node, str) and _SECRET_TEXT.search(node):
            yield Problem(
                f"{where} {path}", "looks like a credential (not shown): refer to a Secret"
            )
        if (
            isinstance(node, dict)
            and SECRET_NAME.search(str(node.get("name", "")))
            and node.get("value")
        ):
            yield Problem(
                f"{where} {path}",
                f"variable {node['name']} with a value (not shown): refer to a Secret",
            )
    for name in _variables(section(manifest, "spec")) or ():
        if SECRET_NAME.search(str(name)):
            yield Problem(
                f"{where} spec.runtimeEnvYAML env_vars.{name}",
                "a secret by its name (value not shown): Ray shows runtime environments to all",
            )


def _walk(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, node
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _walk(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, f"{path}[{index}]")


def _exposure(manifest: Manifest) -> Iterator[Problem]:
    kind, where = manifest.get("kind"), identity(manifest)
    if kind in _EXPOSING:
        yield Problem(where, "opens a way from outside: use kubectl port-forward")
    if kind == "Service" and section(manifest, "spec").get("type", "ClusterIP") != "ClusterIP":
        yield Problem(f"{where} spec.type", "expected ClusterIP: use kubectl port-forward")
    if kind == "NetworkPolicy":
        for index, rule in enumerate(entries(manifest["spec"], "ingress")):
            sources = entries(rule, "from")
            if not sources or any("ipBlock" in source or source == {} for source in sources):
                yield Problem(
                    f"{where} spec.ingress[{index}]",
                    "lets anyone or an address range in: expected pods by their labels",
                )
            elif not rule.get("ports") and any("namespaceSelector" in source for source in sources):
                yield Problem(
                    f"{where} spec.ingress[{index}].ports",
                    "expected the ports that pods of other namespaces may use",
                )


def _network(bundle: Bundle) -> Iterator[Problem]:
    """Every pod must be selected by a policy that denies everything it does not name."""
    selectors = [
        section(found["spec"], "podSelector", "matchLabels")
        for found in bundle.of_kind("NetworkPolicy")
        if "Ingress" in found["spec"].get("policyTypes", ["Ingress"])
    ]
    for pods in bundle.pods():
        if not any(selector.items() <= dict(pods.labels).items() for selector in selectors):
            yield Problem(
                pods.where,
                "no NetworkPolicy selects these pods: everyone in the cluster reaches them",
            )


def _placeholders(manifest: Manifest) -> Iterator[Problem]:
    for path, node in _walk(manifest, ""):
        if isinstance(node, str) and (found := PLACEHOLDERS.search(node)):
            yield Problem(
                f"{identity(manifest)} {path}",
                f"{found[1]} is still to be replaced: infra/kuberay/base/settings.yaml",
            )
