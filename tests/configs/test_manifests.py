"""The cluster manifests render and pass all checks, and each kind of mistake in them is refused for its own reason."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from infra.checks.__main__ import OVERLAYS, check, main
from infra.checks.model import Bundle
from infra.checks.render import Manifest, RenderError, identity, render

KUBERAY = OVERLAYS.parent
NAMES = sorted(folder.name for folder in OVERLAYS.iterdir())
Change = Callable[["Edit"], object]


@dataclass(frozen=True)
class Edit:
    """The objects of an overlay, to be spoiled."""

    objects: list[Manifest]

    def __getitem__(self, name: str) -> Any:
        """The object Kind/name, or of the jobs the one whose name begins so."""
        return next(found for found in self.objects if identity(found).startswith(name))

    @property
    def job(self) -> Any:
        """What pretraining asks for."""
        return self["RayJob/moleblend-pretrain"]["spec"]

    @property
    def cluster(self) -> Any:
        """The cluster of pretraining."""
        return self.job["rayClusterSpec"]

    @property
    def submitter(self) -> Any:
        """The container that submits it."""
        return self.job["submitterPodTemplate"]["spec"]["containers"][0]

    @property
    def head(self) -> Any:
        """Its head."""
        return self.cluster["headGroupSpec"]

    @property
    def head_pod(self) -> Any:
        """The head's pod."""
        return self.head["template"]["spec"]

    @property
    def data(self) -> Any:
        """Its group for data."""
        return self.cluster["workerGroupSpecs"][0]

    @property
    def train(self) -> Any:
        """Its group for training."""
        return self.cluster["workerGroupSpecs"][1]

    @property
    def train_pod(self) -> Any:
        """A pod of the latter."""
        return self.train["template"]["spec"]

    @property
    def trainer(self) -> Any:
        """Ray's container in it."""
        return self.train_pod["containers"][0]


@pytest.fixture(scope="module")
def rendered() -> dict[str, list[Manifest]]:
    return {name: render(OVERLAYS / name) for name in NAMES}


def test_the_overlays_are_those_of_the_documentation() -> None:
    assert {"dev", "gpu", "spot", "kueue", "monitoring"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_passes_all_checks(name: str, rendered: dict[str, list[Manifest]]) -> None:
    jobs = [identity(found) for found in rendered[name] if found["kind"] == "RayJob"]
    assert {job.split("-")[1] for job in jobs} == {"prepare", "pretrain", "sweep", "embed"}
    assert [str(problem) for problem in check(Bundle(name, rendered[name]))] == []


@pytest.mark.parametrize("name", sorted({*NAMES} - {"dev"}))
def test_gpus_get_large_micro_batches(name: str, rendered: dict[str, list[Manifest]]) -> None:
    # A host launches all kernels again for each: with the 64 molecules that suit CPUs, a GPU would wait for it.
    edit = Edit(rendered[name])
    assert "nvidia.com/gpu" in edit.trainer["resources"]["limits"]
    assert "stream.micro_batch_size=1024 train.precision=bf16" in edit.job["entrypoint"]
    (embed,) = (
        one for one in rendered[name] if one["metadata"]["name"].startswith("moleblend-embed")
    )
    assert "batch_size=1024" in embed["spec"]["entrypoint"]


@pytest.mark.shared_data
@pytest.mark.parametrize("name", NAMES)
def test_an_overlay_fits_the_schemas_of_kuberay(
    name: str, rendered: dict[str, list[Manifest]], shared_data: Path
) -> None:
    schemas = shared_data / "kuberay"
    assert [str(p) for p in check(Bundle(name, rendered[name]), schemas)] == []
    spoiled = copy.deepcopy(rendered[name])
    edit = Edit(spoiled)
    edit.job["shutdownAfterJobFinish"] = True
    edit.train_pod["containers"][0]["imagePullPolice"] = "Always"
    edit.data["replicas"] = "2"
    found = "\n".join(map(str, check(Bundle(name, spoiled), schemas)))
    assert "spec: Additional properties are not allowed ('shutdownAfterJobFinish' was" in found
    assert "template.spec.containers.0: Additional properties" in found
    assert "spec.rayClusterSpec.workerGroupSpecs.0.replicas: '2' is not of type 'integer'" in found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
def test_kubectl_renders_the_same(name: str, rendered: dict[str, list[Manifest]]) -> None:
    command = ["kubectl", "kustomize", str(OVERLAYS / name)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    if "unknown command" in ended.stderr:
        pytest.skip("this kubectl has no kustomize")
    assert ended.returncode == 0, ended.stderr
    by_kubectl = {identity(found): found for found in yaml.safe_load_all(ended.stdout)}
    assert {identity(found): found for found in rendered[name]} == by_kubectl


def set_image(pod: Any, image: str) -> None:
    pod["containers"][0]["image"] = image


def gpu_of(pod: Any) -> None:
    for part in pod["containers"][0]["resources"].values():
        part["nvidia.com/gpu"] = "1"


def required_terms(pod: Any) -> Any:
    required = pod["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    return required["nodeSelectorTerms"]


def all_images(edit: Edit, image: str) -> None:
    groups = [edit.head, *edit.cluster["workerGroupSpecs"]]
    for template in [edit.job["submitterPodTemplate"], *(group["template"] for group in groups)]:
        set_image(template["spec"], image)


def arguments(edit: Edit, old: str, new: str) -> None:
    assert old in edit.job["entrypoint"]
    edit.job["entrypoint"] = edit.job["entrypoint"].replace(old, new)
    edit.submitter["args"][0] = edit.job["entrypoint"]


def no_shutdown(edit: Edit, *rules: dict[str, Any], keep: bool = False) -> None:
    """Deletion rules in place of shutdownAfterJobFinishes, on a cluster without GPUs."""
    if not keep:
        del edit.job["shutdownAfterJobFinishes"], edit.job["ttlSecondsAfterFinished"]
    edit.job["deletionStrategy"] = {"deletionRules": list(rules)}


def rule(policy: str, ttl: int = 0, **condition: str) -> dict[str, Any]:
    return {"policy": policy, "condition": {**condition, "ttlSeconds": ttl}}


def environment(edit: Edit, name: str, value: str) -> None:
    edit.trainer["env"].append({"name": name, "value": value})


def first(edit: Edit, **container: Any) -> None:
    """A container that runs before those of a training pod."""
    edit.train_pod["initContainers"] = [{"name": "first", **container}]


def cache_beside_the_store(edit: Edit) -> None:
    edit.data["template"]["spec"]["volumes"][0]["emptyDir"].update(sizeLimit="9Gi")
    arguments(edit, "model=base", "model=base stream.cache_bytes=2147483648")


def ingress(edit: Edit) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "Ingress",
        "metadata": {"name": "dashboard", "labels": {"app.kubernetes.io/component": "shared"}},
        "spec": {},
    }


def secret(edit: Edit) -> dict[str, Any]:
    return {**ingress(edit), "kind": "Secret", "apiVersion": "v1", "data": {"key": "c2VjcmV0"}}


# Each: what is done to a good overlay, and what must be said, with the place.
BROKEN: dict[str, tuple[str, Change, str]] = {
    # The operator's rules.
    "name too long": ("gpu", lambda e: e["RayJob/moleblend-pretrain"]["metadata"].update(name="moleblend-pretrain-" + "x" * 40), r"metadata\.name: expected lower-case.*at most 47"),
    "name with a capital": ("gpu", lambda e: e["RayCluster"]["metadata"].update(name="Interactive"), r"RayCluster/Interactive metadata\.name: expected lower-case"),
    "unknown submission mode": ("gpu", lambda e: e.job.update(submissionMode="K8SJobMode"), r"spec\.submissionMode: expected one of K8sJobMode"),
    "retries on a cluster of others": ("gpu", lambda e: e.job.update(clusterSelector={"ray.io/cluster": "a"}), r"spec\.backoffLimit: expected 0 with clusterSelector, found 2"),
    "selector without a name": ("gpu", lambda e: e.job.update(clusterSelector={"team": "a"}), r"clusterSelector: expected a cluster's name under ray\.io/cluster"),
    "retries of an interactive job": ("gpu", lambda e: e.job.update(submissionMode="InteractiveMode"), r"spec\.backoffLimit: expected 0 with InteractiveMode"),
    "sidecar with a submitter": ("gpu", lambda e: e.job.update(submissionMode="SidecarMode"), r"spec\.submitterPodTemplate: not supported with submissionMode SidecarMode"),
    "suspended and kept": ("gpu", lambda e: (e.job.update(suspend=True), e.job.pop("shutdownAfterJobFinishes")), r"spec\.suspend: expected shutdownAfterJobFinishes: true"),
    "time to live without shutdown": ("gpu", lambda e: e.job.update(shutdownAfterJobFinishes=False), r"spec\.ttlSecondsAfterFinished: expected shutdownAfterJobFinishes: true"),
    "no deadline at all": ("gpu", lambda e: e.job.update(preRunningDeadlineSeconds=0), r"spec\.preRunningDeadlineSeconds: expected >= 1, found 0"),
    "negative backoff": ("gpu", lambda e: e.job.update(backoffLimit=-1), r"spec\.backoffLimit: expected >= 0, found -1"),
    "unknown manager": ("gpu", lambda e: e.job.update(managedBy="me"), r"spec\.managedBy: expected ray\.io/kuberay-operator or"),
    "runtime environment no YAML": ("gpu", lambda e: e.job.update(runtimeEnvYAML="env_vars: {"), r"spec\.runtimeEnvYAML: is no YAML"),
    "number as variable": ("gpu", lambda e: e.job.update(runtimeEnvYAML="env_vars: {RAY_JOB_STOP_WAIT_TIME_S: 120}"), r"env_vars\.RAY_JOB_STOP_WAIT_TIME_S: expected a string, found 120"),
    "rules and shutdown": ("dev", lambda e: e.job.update(shutdownAfterJobFinishes=True), r"deletionRules and shutdownAfterJobFinishes exclude"),
    "rule with two states": ("dev", lambda e: e.job["deletionStrategy"]["deletionRules"][0]["condition"].update(jobDeploymentStatus="Failed"), r"deletionRules\[0\]\.condition: expected one of jobStatus and jobDeploymentStatus, found jobStatus and"),
    "rule twice": ("dev", lambda e: e.job["deletionStrategy"]["deletionRules"].append(rule("DeleteCluster", 90, jobStatus="FAILED")), r"deletionRules\[4\]: a second DeleteCluster for jobStatus FAILED"),
    "self before cluster": ("dev", lambda e: e.job["deletionStrategy"]["deletionRules"][3]["condition"].update(ttlSeconds=1), r"expected DeleteSelf not before DeleteCluster, found 1 s and 60 s"),
    "workers deleted under the autoscaler": ("dev", lambda e: e.job["deletionStrategy"]["deletionRules"][0].update(policy="DeleteWorkers"), r"DeleteWorkers is not supported with the autoscaler"),
    "empty strategy": ("dev", lambda e: e.job.update(deletionStrategy={}), r"deletionStrategy: expected deletionRules, or both"),
    "more replicas than allowed": ("gpu", lambda e: e.data.update(replicas=3), r"workerGroupSpecs\[0\]\.replicas: expected 1 to 2, found 3"),
    "fewest above most": ("gpu", lambda e: e.train.update(minReplicas=5), r"workerGroupSpecs\[1\]: expected 0 <= minReplicas <= maxReplicas, found 5 and 4"),
    "start parameter no string": ("gpu", lambda e: e.head["rayStartParams"].update({"num-cpus": 0}), r"headGroupSpec\.rayStartParams\.num-cpus: expected a string, found 0"),
    "resources in two places": ("gpu", lambda e: (e.train.update(resources={"CPU": "4"}), e.train["rayStartParams"].update({"num-cpus": "4"})), r"workerGroupSpecs\[1\]: resources stand in rayStartParams and in resources"),
    "labels among the start parameters": ("gpu", lambda e: e.train["rayStartParams"].update(labels="a=b"), r"rayStartParams\.labels: not supported"),
    "two groups of one name": ("gpu", lambda e: e.train.update(groupName="data"), r"workerGroupSpecs: expected distinct groupNames"),
    "restart policy": ("gpu", lambda e: e.train_pod.update(restartPolicy="Always"), r"restartPolicy: expected Never with autoscaler v2"),
    "idle timeout without autoscaler": ("kueue", lambda e: e.data.update(idleTimeoutSeconds=60), r"workerGroupSpecs\[0\]\.idleTimeoutSeconds: expected enableInTreeAutoscaling: true"),
    "autoscaler by variable": ("gpu", lambda e: e.head_pod["containers"][0]["env"].append({"name": "RAY_enable_autoscaler_v2", "value": "1"}), r"RAY_enable_autoscaler_v2: expected autoscalerOptions\.version"),
    "kubernetes tokens in a job": ("gpu", lambda e: e.cluster["authOptions"].update(enableK8sTokenAuth=True), r"enableK8sTokenAuth: not supported in a RayJob"),
    "Redis beside the options": ("gpu", lambda e: e.head_pod["containers"][0]["env"].append({"name": "RAY_REDIS_ADDRESS", "value": "redis:6379"}), r"RAY_REDIS_ADDRESS: expected gcsFaultToleranceOptions"),
    "field of a newer operator": ("gpu", lambda e: e.cluster.update(networkPolicy={"mode": "DenyAll"}), r"networkPolicy: is newer than KubeRay 1\.6"),
    "nested field of a newer operator": ("gpu", lambda e: e.data.update(priority=5), r"workerGroupSpecs\.priority: is newer than KubeRay 1\.6"),
    "queue with autoscaler": ("kueue", lambda e: e.cluster.update(enableInTreeAutoscaling=True), r"enableInTreeAutoscaling: expected false: Kueue"),
    "queue that never gets its quota back": ("kueue", lambda e: e.job.update(shutdownAfterJobFinishes=False, ttlSecondsAfterFinished=0), r"shutdownAfterJobFinishes: expected true: Kueue"),
    "group named head in a queue": ("kueue", lambda e: e.data.update(groupName="head"), r"groupName: Kueue keeps the name head"),
    "replicas in quotes": ("gpu", lambda e: e.data.update(replicas="2"), r"workerGroupSpecs\[0\]\.replicas: expected a whole number, found '2'"),
    # Versions and images.
    "another Ray": ("gpu", lambda e: e.cluster.update(rayVersion="2.59.0"), r"rayVersion: expected 2\.60\.0 as in constraints\.txt, found '2\.59\.0'"),
    "latest": ("gpu", lambda e: all_images(e, "REGISTRY/moleblend-ray:latest"), r"containers\[0\]\.image: expected a fixed tag or digest, found 'REGISTRY/moleblend-ray:latest'"),
    "no tag": ("gpu", lambda e: all_images(e, "registry:5000/moleblend-ray"), r"image: expected a fixed tag or digest, found 'registry:5000/moleblend-ray'"),
    "image of another version": ("gpu", lambda e: all_images(e, "REGISTRY/moleblend-ray:0.0.9-gpu"), r"image: expected a tag of version 0\.1\.0, found '0\.0\.9-gpu'"),
    "image of a version that begins alike": ("gpu", lambda e: all_images(e, "REGISTRY/moleblend-ray:0.1.01-gpu"), r"image: expected a tag of version 0\.1\.0, found '0\.1\.01-gpu'"),
    "image without CUDA": ("gpu", lambda e: all_images(e, "REGISTRY/moleblend-ray:0.1.0-cpu"), r"workerGroupSpecs\[1\]\.template\.spec\.containers\[0\]\.image: expected the image with CUDA for a pod with a GPU"),
    "two images in a cluster": ("gpu", lambda e: set_image(e.train_pod, "REGISTRY/moleblend-ray:0.1.0-other"), r"expected one image for head, workers and submitter"),
    # Resources.
    "no limit": ("gpu", lambda e: e.trainer["resources"]["limits"].pop("ephemeral-storage"), r"resources: ephemeral-storage: expected a request and a limit, found 50Gi and None"),
    "submitter without requests": ("gpu", lambda e: e.job["submitterPodTemplate"]["spec"]["containers"][0].pop("resources"), r"submitterPodTemplate\.spec\.containers\[0\]\.resources: cpu: expected a request and a limit"),
    "request above limit": ("gpu", lambda e: e.trainer["resources"]["requests"].update(cpu="9"), r"cpu: expected a request up to the limit, found 9 of 8"),
    "memory promised twice": ("gpu", lambda e: e.trainer["resources"]["requests"].update(memory="8Gi"), r"memory: expected the request to be the limit, found 8Gi and 64Gi"),
    "GPU for data": ("gpu", lambda e: gpu_of(e.data["template"]["spec"]), r"workerGroupSpecs\[0\]\.template\.spec\.containers\[0\]\.resources: expected no GPU"),
    "GPU for the head": ("gpu", lambda e: gpu_of(e.head_pod), r"headGroupSpec\.template\.spec\.containers\[0\]\.resources: expected no GPU"),
    "half a CPU": ("gpu", lambda e: e.trainer["resources"]["limits"].update(cpu="8500m"), r"cpu: expected a whole number as limit, found 8500m"),
    "shared memory on disk": ("gpu", lambda e: e.train_pod["volumes"][0]["emptyDir"].pop("medium"), r"/dev/shm: expected an emptyDir with medium Memory"),
    "shared memory as large as the limit": ("gpu", lambda e: e.train_pod["volumes"][0]["emptyDir"].update(sizeLimit="64Gi"), r"/dev/shm: expected at most half of the memory limit.*found 64Gi of 64Gi"),
    "store larger than shared memory": ("gpu", lambda e: e.train["rayStartParams"].update({"object-store-memory": "17179869184"}), r"object-store-memory: expected at most nine tenths of /dev/shm, found 16Gi of 16Gi"),
    "store of unknown size": ("gpu", lambda e: e.train["rayStartParams"].pop("object-store-memory"), r"object-store-memory: expected a number of bytes, found ''"),
    "cache beside the store": ("gpu", cache_beside_the_store, r"/dev/shm of 9Gi holds object store and stream\.cache_bytes together: 10\.00 GiB"),
    "spill without bounds": ("gpu", lambda e: e.train_pod["volumes"][1]["emptyDir"].pop("sizeLimit"), r"/tmp: expected an emptyDir with a sizeLimit"),
    "spill beyond the limit": ("gpu", lambda e: e.train_pod["volumes"][1]["emptyDir"].update(sizeLimit="60Gi"), r"/tmp: expected at most the ephemeral-storage limit, found 60Gi of 50Gi"),
    # Rights.
    "root": ("gpu", lambda e: e.head_pod["securityContext"].update(runAsUser=0), r"securityContext: expected runAsNonRoot: true and a runAsUser that is not 0"),
    "privileges": ("gpu", lambda e: e.trainer["securityContext"].update(privileged=True), r"expected allowPrivilegeEscalation: false, not privileged"),
    "capabilities": ("gpu", lambda e: e.trainer["securityContext"]["capabilities"].update(add=["SYS_PTRACE"]), r"capabilities: expected drop: \[ALL\] and none added"),
    "no seccomp": ("gpu", lambda e: e.train_pod["securityContext"].pop("seccompProfile"), r"seccompProfile: expected type: RuntimeDefault"),
    "writable root": ("gpu", lambda e: e.trainer["securityContext"].update(readOnlyRootFilesystem=False), r"readOnlyRootFilesystem: expected true"),
    "network of the node": ("gpu", lambda e: e.train_pod.update(hostNetwork=True), r"hostNetwork: expected it unset"),
    "files of the node": ("gpu", lambda e: e.train_pod["volumes"].append({"name": "x", "hostPath": {"path": "/"}}), r"hostPath: expected no file of the node"),
    "token on a worker": ("gpu", lambda e: e.train_pod.update(automountServiceAccountToken=True), r"automountServiceAccountToken: expected false"),
    "root in one container": ("gpu", lambda e: e.trainer["securityContext"].update(runAsUser=0, runAsNonRoot=False), r"containers\[0\]\.securityContext: expected no root"),
    "seccomp switched off in one container": ("gpu", lambda e: e.trainer["securityContext"].update(seccompProfile={"type": "Unconfined"}), r"seccompProfile: expected that of the pod"),
    "privileged container before the others": ("gpu", lambda e: first(e, image="busybox:1.36", securityContext={"privileged": True}), r"initContainers\[0\]\.securityContext: expected allowPrivilegeEscalation: false"),
    "moving image before the others": ("gpu", lambda e: first(e, image="busybox"), r"initContainers\[0\]\.image: expected a fixed tag or digest, found 'busybox'"),
    "container before the others without limits": ("gpu", lambda e: first(e, image="busybox:1.36"), r"initContainers\[0\]\.resources: memory: expected a request and a limit"),
    "autoscaler without a limit of its disk": ("gpu", lambda e: e.cluster["autoscalerOptions"]["resources"]["limits"].pop("ephemeral-storage"), r"autoscalerOptions\.resources: ephemeral-storage: expected a request and a limit"),
    "autoscaler with all rights": ("gpu", lambda e: e.cluster["autoscalerOptions"].pop("securityContext"), r"autoscalerOptions\.securityContext: expected allowPrivilegeEscalation: false"),
    "unknown account": ("gpu", lambda e: e.train_pod.update(serviceAccountName="default"), r"serviceAccountName: expected an account of these manifests, found 'default'"),
    # Secrets.
    "unknown secret": ("gpu", lambda e: e.trainer["envFrom"].append({"secretRef": {"name": "mine"}}), r"Secret 'mine': neither among these manifests"),
    "secret in a file": ("gpu", lambda e: e.objects.append(secret(e)), r"Secret/dashboard: a Secret with values"),
    "secret as variable": ("gpu", lambda e: environment(e, "WANDB_API_KEY", "0123456789"), r"variable WANDB_API_KEY with a value \(not shown\)"),
    "signature as variable": ("gpu", lambda e: environment(e, "LINK_SIGNATURE", "0123456789"), r"variable LINK_SIGNATURE with a value \(not shown\)"),
    "session as variable": ("gpu", lambda e: environment(e, "SESSION_COOKIE", "0123456789"), r"variable SESSION_COOKIE with a value \(not shown\)"),
    "connection as variable": ("gpu", lambda e: environment(e, "AZURE_STORAGE_CONNECTION_STRING", "0123456789"), r"variable AZURE_STORAGE_CONNECTION_STRING with a value"),
    "key in the arguments": ("gpu", lambda e: arguments(e, "s3://BUCKET/data", "s3://me:hunter2@store/data"), r"spec\.entrypoint: looks like a credential \(not shown\)"),
    "secret in the runtime environment": ("gpu", lambda e: e.job.update(runtimeEnvYAML=e.job["runtimeEnvYAML"] + '  AWS_SECRET_ACCESS_KEY: "x"\n'), r"runtimeEnvYAML env_vars\.AWS_SECRET_ACCESS_KEY: a secret by its name"),
    "signature in the runtime environment": ("gpu", lambda e: e.job.update(runtimeEnvYAML=e.job["runtimeEnvYAML"] + '  LINK_SIGNATURE: "x"\n'), r"runtimeEnvYAML env_vars\.LINK_SIGNATURE: a secret by its name"),
    "secret in a runtime environment on one line": ("gpu", lambda e: e.job.update(runtimeEnvYAML='env_vars: {RAY_JOB_STOP_WAIT_TIME_S: "120", "API_KEY": "x"}'), r"runtimeEnvYAML env_vars\.API_KEY: a secret by its name"),
    # What can be reached.
    "no token": ("gpu", lambda e: e.cluster["authOptions"].update(mode="disabled"), r"authOptions\.mode: expected token"),
    "load balancer": ("gpu", lambda e: e.head.update(serviceType="LoadBalancer"), r"headGroupSpec: expected serviceType ClusterIP"),
    "ingress by the operator": ("gpu", lambda e: e.head.update(enableIngress=True), r"headGroupSpec: expected serviceType ClusterIP and no ingress"),
    "ingress": ("gpu", lambda e: e.objects.append(ingress(e)), r"Ingress/dashboard: opens a way from outside"),
    "policy for everyone": ("gpu", lambda e: e["NetworkPolicy/moleblend-pods"]["spec"]["ingress"].append({"ports": [{"port": 8265}]}), r"spec\.ingress\[1\]: lets anyone or an address range in"),
    "policy without ports": ("gpu", lambda e: e["NetworkPolicy/moleblend-operator"]["spec"]["ingress"][0].pop("ports"), r"moleblend-operator spec\.ingress\[0\]\.ports: expected the ports"),
    "no policy": ("gpu", lambda e: e.objects.remove(e["NetworkPolicy/moleblend-pods"]), r"workerGroupSpecs\[0\]\.template: no NetworkPolicy selects these pods"),
    "pods without label": ("gpu", lambda e: e.train["template"]["metadata"]["labels"].pop("app.kubernetes.io/part-of"), r"workerGroupSpecs\[1\]\.template\.metadata\.labels: expected app\.kubernetes\.io/part-of"),
    # Ends.
    "work on the head": ("gpu", lambda e: e.head["rayStartParams"].update({"num-cpus": "4"}), r'num-cpus: expected "0"'),
    "autoscaler v1": ("gpu", lambda e: e.cluster["autoscalerOptions"].update(version="v1"), r"autoscalerOptions\.version: expected v2"),
    "head on spot": ("spot", lambda e: e.head_pod.update(tolerations=e.train_pod["tolerations"]), r"tolerations: expected no spot node for the head"),
    "head where untainted spot nodes are": ("spot", lambda e: e.head_pod.pop("affinity"), r"headGroupSpec\.template\.spec\.affinity: expected operator NotIn for \['cloud\.google\.com/gke-spot', 'eks\.amazonaws\.com/capacityType'"),
    "head on spot of one cloud": ("spot", lambda e: required_terms(e.head_pod)[0]["matchExpressions"].pop(), r"affinity: expected operator NotIn for \['karpenter\.sh/capacity-type'\]"),
    "head without budget": ("gpu", lambda e: e.objects.remove(e["PodDisruptionBudget/moleblend-heads"]), r"RayJob/moleblend-pretrain-base-1: expected a PodDisruptionBudget"),
    "budget in the other form": ("gpu", lambda e: e["PodDisruptionBudget/moleblend-heads"]["spec"].update(maxUnavailable=e["PodDisruptionBudget/moleblend-heads"]["spec"].pop("minAvailable") - 1000), r"expected a PodDisruptionBudget for all head pods"),
    "budget that lets one of two heads go": ("gpu", lambda e: e["PodDisruptionBudget/moleblend-heads"]["spec"].update(minAvailable=1), r"minAvailable: 1000, which is more than there are"),
    "budget of one job": ("gpu", lambda e: e["PodDisruptionBudget/moleblend-heads"]["spec"]["selector"]["matchLabels"].update({"app.kubernetes.io/component": "pretrain"}), r"RayJob/moleblend-sweep-base-1: expected a PodDisruptionBudget for all head pods"),
    "cluster for ever": ("gpu", lambda e: (e.job.pop("shutdownAfterJobFinishes"), e.job.pop("ttlSecondsAfterFinished")), r"expected shutdownAfterJobFinishes or deletionRules"),
    "deletion rules with GPUs": ("gpu", lambda e: no_shutdown(e, rule("DeleteCluster", jobStatus="SUCCEEDED")), r"deletionStrategy: expected shutdownAfterJobFinishes with GPUs"),
    "retries left out": ("gpu", lambda e: e.job.pop("backoffLimit"), r"spec\.backoffLimit: expected a number"),
    "submitter that ends with the log": ("gpu", lambda e: e.submitter.pop("command"), r"submitterPodTemplate\.spec\.containers\[0\]\.command: expected \['python', '/opt/moleblend/submitter\.py'\], found None: where the stream"),
    "submitter of another job": ("gpu", lambda e: e.submitter["args"].__setitem__(0, "python jobs/embed.py"), r"submitterPodTemplate\.spec\.containers\[0\]\.args: expected spec\.entrypoint and spec\.runtimeEnvYAML"),
    "submitter on spot": ("spot", lambda e: e.job["submitterPodTemplate"]["spec"].pop("affinity"), r"submitterPodTemplate\.spec\.affinity: expected operator NotIn for \['cloud\.google\.com/gke-spot'.*the loss of the submitter"),
    "three seconds to stop": ("gpu", lambda e: e.job.pop("runtimeEnvYAML"), r"RAY_JOB_STOP_WAIT_TIME_S: expected seconds"),
    "grace below the wait": ("gpu", lambda e: e.train_pod.update(terminationGracePeriodSeconds=130), r"terminationGracePeriodSeconds: expected at least 140 .*, found 130"),
    "no hook": ("gpu", lambda e: e.trainer.pop("lifecycle"), r"lifecycle\.preStop: expected leave\.py worker --seconds N"),
    "hook of the other role": ("gpu", lambda e: e.trainer.update(lifecycle=e.head_pod["containers"][0]["lifecycle"]), r"lifecycle\.preStop: expected leave\.py worker"),
    "hook longer than the grace": ("gpu", lambda e: e.trainer["lifecycle"]["preStop"]["exec"]["command"].__setitem__(4, "140"), r"lifecycle\.preStop: expected at most 130 seconds within the grace period of 150, found 140"),
    "hook shorter than the wait": ("gpu", lambda e: e.trainer["lifecycle"]["preStop"]["exec"]["command"].__setitem__(4, "60"), r"workerGroupSpecs\[1\].*lifecycle\.preStop: expected at least the 120 seconds of RAY_JOB_STOP_WAIT_TIME_S, found 60"),
    "hook with a unit": ("gpu", lambda e: e.trainer["lifecycle"]["preStop"]["exec"]["command"].__setitem__(4, "2m"), r"expected leave\.py worker --seconds N, found .*'2m'"),
    "hook without its number": ("gpu", lambda e: e.trainer["lifecycle"]["preStop"]["exec"]["command"].pop(), r"expected leave\.py worker --seconds N, found .*'--seconds'\]"),
    "no time to stop": ("gpu", lambda e: e.job.update(runtimeEnvYAML='env_vars: {RAY_JOB_STOP_WAIT_TIME_S: "0"}'), r"RAY_JOB_STOP_WAIT_TIME_S: expected seconds, at least 30 .*, found '0'"),
    "time to stop with a unit": ("gpu", lambda e: e.job.update(runtimeEnvYAML='env_vars: {RAY_JOB_STOP_WAIT_TIME_S: "2k"}'), r"RAY_JOB_STOP_WAIT_TIME_S: expected seconds, at least 30 .*, found '2k'"),
    "object that a selection misses": ("gpu", lambda e: e["ServiceAccount/moleblend-head"]["metadata"].pop("labels"), r"ServiceAccount/moleblend-head metadata\.labels: expected app\.kubernetes\.io/component"),
    # Jobs.
    "no such script": ("gpu", lambda e: arguments(e, "jobs/pretrain.py", "jobs/pretrian.py"), r"spec\.entrypoint: no job 'pretrian'"),
    "relative script": ("gpu", lambda e: arguments(e, "/home/ray/moleblend-ray/", ""), r"spec\.entrypoint: expected python /home/ray/moleblend-ray/jobs/JOB\.py, found python jobs/pretrain\.py"),
    "misspelt setting": ("gpu", lambda e: arguments(e, "stream.max_actors", "stream.max_actor"), r"its arguments are refused: .*stream\.max_actor\b"),
    "setting out of range": ("gpu", lambda e: arguments(e, "cluster.num_workers=4", "cluster.num_workers=3"), r"its arguments are refused: .*cluster\.num_workers"),
    "shell braces": ("gpu", lambda e: arguments(e, "s3://BUCKET/data", "s3://BUCKET/data search.choices={readout:[token,sum]}"), r"'\{' means something to the shell that reads it"),
    "shell variable": ("gpu", lambda e: arguments(e, "s3://BUCKET/data", "$BUCKET/data"), r"'\$' means something to the shell that reads it"),
    "job of another name": ("gpu", lambda e: arguments(e, "jobs/pretrain.py", "jobs/embed.py"), r"app\.kubernetes\.io/component: expected 'embed', the job, found 'pretrain'"),
    "local path": ("gpu", lambda e: arguments(e, "out=s3://BUCKET/", "out=/BUCKET/"), r"out=/BUCKET/runs/base-1/pretrain: expected a URI"),
    "files of the pod as output": ("gpu", lambda e: arguments(e, "out=s3://BUCKET/", "out=file:///tmp/"), r"headGroupSpec\.template\.spec\.containers\[0\]\.volumeMounts: out=file:///tmp/runs/base-1/pretrain: expected a shared volume"),
    "shared files missing in one group": ("dev", lambda e: e.train["template"]["spec"]["containers"][0]["volumeMounts"].pop(), r"workerGroupSpecs\[1\]\.template\.spec\.containers\[0\]\.volumeMounts: data=file:///files/data/samples: expected a shared volume"),
    "another run's directory": ("gpu", lambda e: arguments(e, "/runs/base-1/", "/runs/base-2/"), r"expected the run's name, base-1, as a part of the path"),
    "more trainers than GPUs": ("gpu", lambda e: e.train.update(replicas=2, minReplicas=2, maxReplicas=2), r"cluster\.num_workers=4 with 4 CPUs each: the train group has room for 2 at most"),
    "pods too small for a trainer": ("gpu", lambda e: [e.trainer["resources"][key].update(cpu="2") for key in ("requests", "limits")], r"the train group has room for 0 at most"),
    "CPUs that Ray does not see": ("gpu", lambda e: e.train["rayStartParams"].update({"num-cpus": "2"}), r"cluster\.num_workers=4 with 4 CPUs each: the train group has room for 0 at most"),
    "GPUs that Ray does not see": ("gpu", lambda e: e.train.update(resources={"CPU": "8", "GPU": "0"}), r"0 GPUs a pod of the train group, and cluster\.use_gpu=true$"),
    "trainers without GPUs": ("gpu", lambda e: [e.trainer["resources"][key].pop("nvidia.com/gpu") for key in ("requests", "limits")], r"0 GPUs a pod of the train group, and cluster\.use_gpu=true"),
    "GPUs for nobody": ("gpu", lambda e: arguments(e, "model=base", "model=base cluster.use_gpu=false"), r"1 GPUs a pod of the train group, and cluster\.use_gpu=false"),
    "trainers that may be missing": ("gpu", lambda e: e.train.update(replicas=1, minReplicas=1), r"expected minReplicas = maxReplicas for training that is not elastic"),
    "more actors than CPUs": ("gpu", lambda e: arguments(e, "stream.max_actors=16", "stream.max_actors=17"), r"stream\.max_actors=17: the data group has room for 16 at most"),
    "actors without bound": ("gpu", lambda e: arguments(e, "stream.max_actors=16", "stream.min_actors=1"), r"stream\.max_actors: expected a number"),
    "groups without the labels": ("gpu", lambda e: e.data.pop("labels"), r"no group has the labels \{'moleblend-role': 'data'\}"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "change", "expected"), BROKEN.values(), ids=BROKEN.keys())
def test_a_broken_manifest_is_refused_for_its_own_reason(
    name: str, change: Change, expected: str, rendered: dict[str, list[Manifest]]
) -> None:
    spoiled = copy.deepcopy(rendered[name])
    change(Edit(spoiled))
    found = [str(problem) for problem in check(Bundle(name, spoiled))]
    assert any(re.search(expected, text) for text in found), "\n".join(found) or "nothing was found"


def test_a_problem_never_shows_the_secret_it_is_about(rendered: dict[str, list[Manifest]]) -> None:
    spoiled = copy.deepcopy(rendered["gpu"])
    edit = Edit(spoiled)
    environment(edit, "WANDB_API_KEY", "hunter2")
    edit.job["runtimeEnvYAML"] += "  API_TOKEN: hunter2\n"
    edit.job["metadata"] = {"from": "s3://me:hunter2@store/x"}
    found = [str(problem) for problem in check(Bundle("gpu", spoiled))]
    assert len(found) >= 3
    assert not any("hunter2" in text for text in found)


def test_placeholders_are_refused_before_applying_only(
    rendered: dict[str, list[Manifest]],
) -> None:
    assert check(Bundle("gpu", rendered["gpu"])) == []
    found = check(Bundle("gpu", rendered["gpu"], is_ready=True))
    assert {problem.what.split(" ")[0] for problem in found} == {"REGISTRY", "BUCKET"}
    assert check(Bundle("dev", rendered["dev"], is_ready=True)) == []


def settings(tree: Path) -> Any:
    return yaml.safe_load((tree / "base" / "settings.yaml").read_text())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the manifests to edit, as a user would."""
    return Path(shutil.copytree(KUBERAY, tmp_path / "kuberay"))


def test_a_scientist_edits_one_file(tree: Path) -> None:
    edited = settings(tree)
    edited["data"].update(
        {
            "image-gpu": "registry.example/chem/moleblend-ray:0.1.0-gpu",
            "run": "macrocycles",
            "pretrain": "data=gs://lab/data out=gs://lab/runs/macrocycles/a model=small",
        }
    )
    for key in ("prepare", "sweep", "embed"):
        text = edited["data"][key].replace("s3://BUCKET", "gs://lab")
        edited["data"][key] = text.replace("base-1", "macrocycles")
    (tree / "base" / "settings.yaml").write_text(yaml.safe_dump(edited))
    objects = render(tree / "overlays" / "gpu")
    assert check(Bundle("gpu", objects, is_ready=True)) == []
    edit = Edit(objects)
    assert edit["RayJob/moleblend-pretrain-macrocycles"]["spec"]["entrypoint"].endswith(
        "data=gs://lab/data out=gs://lab/runs/macrocycles/a model=small"
    )
    images = {
        found for found in re.findall(r"'image': '([^']+)'", repr(objects)) if "moleblend" in found
    }
    assert images == {"registry.example/chem/moleblend-ray:0.1.0-gpu"}


def test_accounts_with_identities_need_no_secret(tree: Path) -> None:
    objects = render(
        tree / "base",
        [tree / "components" / name for name in ("gpu", "workload-identity", "assemble")],
    )
    assert check(Bundle("identity", objects, documented_secrets=frozenset())) == []
    found = check(Bundle("identity", objects, is_ready=True))
    assert "ServiceAccount/moleblend-head metadata.annotations.eks.amazonaws.com/role-arn" in {
        problem.where for problem in found
    }


def test_spot_moves_every_worker_and_no_head(rendered: dict[str, list[Manifest]]) -> None:
    edit = Edit(rendered["spot"])

    def operators(pod: Any) -> set[str]:
        expressions = [e for term in required_terms(pod) for e in term["matchExpressions"]]
        return {expression["operator"] for expression in expressions}

    assert operators(edit.head_pod) == {"NotIn"}
    for group in edit.cluster["workerGroupSpecs"]:
        assert operators(group["template"]["spec"]) == {"In"}
    assert "cluster.min_workers=1" in edit.job["entrypoint"]
    assert edit.train["minReplicas"] == 1


def test_metrics_are_read_from_ports_that_the_pods_have(
    rendered: dict[str, list[Manifest]],
) -> None:
    bundle = Bundle("monitoring", rendered["monitoring"])
    seen = 0
    for monitor in bundle.of_kind("PodMonitor"):
        wanted = dict(monitor["spec"]["selector"]["matchLabels"])
        role = wanted.pop("ray.io/node-type", None)  # the operator's label
        chosen = [
            pods
            for pods in bundle.pods()
            if pods.role in ("head", "worker")
            and role in (None, pods.role)
            and wanted.items() <= dict(pods.labels).items()
        ]
        for endpoint in monitor["spec"]["podMetricsEndpoints"]:
            for pods in chosen:
                ports = {port["name"] for port in pods.spec["containers"][0]["ports"]}
                assert endpoint["port"] in ports, pods.where
                seen += 1
    assert seen >= 10


def test_the_command_tells_of_each_overlay(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    none = str(tmp_path)
    assert main(["--schemas", none]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines[1:]] == NAMES
    assert all(": ok, " in line for line in lines[1:])
    assert main(["--schemas", none, "--overlay", "gpu", "--ready"]) == 1
    shown = capsys.readouterr().out
    assert "BUCKET is still to be replaced: infra/kuberay/base/settings.yaml" in shown
    assert main(["--schemas", none, "--overlay", "kueue", "--totals"]) == 0
    assert re.search(
        r"RayJob/moleblend-pretrain-base-1 at most: .*gpu 4\b", capsys.readouterr().out
    )


def kustomization(folder: Path, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "kustomization.yaml").write_text(text)
    (folder / "a.yaml").write_text(
        "apiVersion: v1\nkind: ConfigMap\nmetadata: {name: a}\ndata: {x: one two, y: '3'}\n"
    )
    return folder


UNRENDERED = {
    "feature": ("resources: [a.yaml]\nnamePrefix: x-\n", "namePrefix: not known to this renderer"),
    "missing file": ("resources: [b.yaml]\n", r"b\.yaml: no such file or folder"),
    "twins": ("resources: [a.yaml, a.yaml]\n", "ConfigMap/a is there already"),
    "patch of nothing": (
        "resources: [a.yaml]\npatches: [{target: {kind: Secret}, patch: '[]'}]\n",
        "nothing matches the target",
    ),
    "patch of a missing field": (
        "resources: [a.yaml]\npatches: [{target: {name: a}, patch: '[{op: replace, path: /data/z, value: 1}]'}]\n",
        "/data/z: no 'z' there",
    ),
    "source that is not there": (
        "resources: [a.yaml]\nreplacements: [{source: {kind: ConfigMap, name: b, fieldPath: data.x}, targets: []}]\n",
        "0 objects match the source",
    ),
    "word that is not there": (
        "resources: [a.yaml]\nreplacements: [{source: {name: a, fieldPath: data.y}, targets: "
        "[{select: {name: a}, fieldPaths: [data.x], options: {delimiter: ' ', index: 2}}]}]\n",
        "2 words, no word 2",
    ),
    "hashed name": (
        "configMapGenerator: [{name: c, files: [a.yaml]}]\n",
        "expected disableNameSuffixHash: true",
    ),
}


@pytest.mark.parametrize(("text", "expected"), UNRENDERED.values(), ids=UNRENDERED.keys())
def test_what_the_renderer_does_not_know_is_refused(
    text: str, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(RenderError, match=expected):
        render(kustomization(tmp_path / "x", text))


def test_each_mistake_is_told_in_words_of_its_own() -> None:
    texts = [expected for _, _, expected in BROKEN.values()]
    assert len(set(texts)) == len(texts)
