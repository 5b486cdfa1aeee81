"""Kuberay.yaml: the fields of KubeRay's own resources, and the same cluster as cluster.yaml and serve/production.yaml."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
# KubeRay 1.7, ray.io/v1; pods are Kubernetes' own and not repeated here
CLUSTER = {
    "authOptions", "autoscalerOptions", "enableInTreeAutoscaling", "gcsFaultToleranceOptions", "headGroupSpec",
    "headServiceAnnotations", "historyServerOptions", "managedBy", "networkPolicy", "rayVersion", "suspend", "tlsOptions",
    "upgradeStrategy", "workerGroupSpecs",
}  # fmt: skip
AUTH = {"enableK8sTokenAuth", "mode", "secretName"}
AUTOSCALER = {
    "args", "command", "env", "envFrom", "idleTimeoutSeconds", "image", "imagePullPolicy", "resources", "securityContext",
    "upscalingMode", "version", "volumeMounts",
}  # fmt: skip
HEAD = {"enableIngress", "headService", "ingressOptions", "labels", "rayStartParams", "resources", "serviceType", "template"}
WORKER = {
    "groupName", "idleTimeoutSeconds", "labels", "maxReplicas", "minReplicas", "numOfHosts", "priority", "rayStartParams",
    "replicas", "resources", "scaleStrategy", "suspend", "template",
}  # fmt: skip
SERVICE = {
    "deploymentUnhealthySecondThreshold", "excludeHeadPodFromServeSvc", "managedBy", "rayClusterConfig",
    "rayClusterDeletionDelaySeconds", "serveConfigV2", "serveService", "serviceUnhealthySecondThreshold", "suspend",
    "upgradeStrategy",
}  # fmt: skip
MACHINES = {"m5.xlarge": (4, 16, 0), "c6id.4xlarge": (16, 32, 0), "g6.12xlarge": (48, 192, 4)}  # CPUs, GiB, GPUs, by AWS
TYPE = "node.kubernetes.io/instance-type"

Tree = dict[str, Any]


@pytest.fixture
def documents() -> dict[str, Tree]:
    return {d["kind"]: d for d in yaml.safe_load_all((ROOT / "kuberay.yaml").read_text(encoding="utf-8"))}


@pytest.fixture
def launched() -> Tree:
    return yaml.safe_load((ROOT / "cluster.yaml").read_text(encoding="utf-8"))


def clusters(documents: dict[str, Tree]) -> list[Tree]:
    return [documents["RayCluster"]["spec"], documents["RayService"]["spec"]["rayClusterConfig"]]


def groups(cluster: Tree) -> dict[str, Tree]:
    """The pods of a cluster by the name of their group."""
    result = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    return {name: group["template"]["spec"] for name, group in {"head": cluster["headGroupSpec"], **result}.items()}


def test_only_fields_that_kuberay_knows(documents: dict[str, Tree]) -> None:
    versions = {kind: document["apiVersion"] for kind, document in documents.items()}
    assert versions == {
        "PersistentVolumeClaim": "v1", "RayCluster": "ray.io/v1", "RayService": "ray.io/v1", "Deployment": "apps/v1",
        "Service": "v1",
    }  # fmt: skip
    assert documents["RayService"]["spec"].keys() <= SERVICE
    for cluster in clusters(documents):
        assert cluster.keys() <= CLUSTER
        assert cluster["authOptions"].keys() <= AUTH
        assert cluster["autoscalerOptions"].keys() <= AUTOSCALER
        assert cluster["headGroupSpec"].keys() <= HEAD
        for group in cluster["workerGroupSpecs"]:
            assert {"groupName", "minReplicas", "maxReplicas", "template"} <= group.keys() <= WORKER
            assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
            assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_machines_and_counts_are_those_of_cluster_yaml(documents: dict[str, Tree], launched: Tree) -> None:
    types, cluster = launched["available_node_types"], documents["RayCluster"]["spec"]
    assert groups(cluster).keys() == types.keys()
    for name, pod in groups(cluster).items():
        assert pod["nodeSelector"][TYPE] == types[name]["node_config"]["InstanceType"]
    for group in cluster["workerGroupSpecs"]:
        counts = types[group["groupName"]]
        assert (group["minReplicas"], group["maxReplicas"]) == (counts["min_workers"], counts["max_workers"])
    assert types["head"]["resources"] == {"CPU": 0}
    assert cluster["autoscalerOptions"]["idleTimeoutSeconds"] == 60 * launched["idle_timeout_minutes"]


def test_every_pod_fits_its_machine_and_leaves_something_to_the_system(documents: dict[str, Tree]) -> None:
    for cluster in clusters(documents):
        for pod in groups(cluster).values():
            (container,) = pod["containers"]
            cpus, gib, gpus = MACHINES[pod["nodeSelector"][TYPE]]
            need = container["resources"]["requests"]
            assert need == container["resources"]["limits"]  # Ray counts limits, Kubernetes places by requests
            assert cpus - 2 <= int(need["cpu"]) < cpus
            assert 0.7 * gib < int(need["memory"].removesuffix("Gi")) < 0.95 * gib
            assert int(need.get("nvidia.com/gpu", 0)) == gpus


def test_heads_take_no_tasks_and_nobody_gets_in_without_the_token(documents: dict[str, Tree]) -> None:
    for cluster in clusters(documents):
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
        assert cluster["authOptions"] == {"mode": "token", "secretName": "addressvlm-token"}
        assert cluster["enableInTreeAutoscaling"]


def test_all_pods_see_the_same_volume_and_have_cuda_only_with_a_gpu(documents: dict[str, Tree]) -> None:
    claim = documents["PersistentVolumeClaim"]
    assert claim["spec"]["accessModes"] == ["ReadWriteMany"]
    targets = re.findall(r"AS (cpu|gpu)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    for cluster in clusters(documents):
        for pod in groups(cluster).values():
            (container,) = pod["containers"]
            target = "gpu" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
            assert container["image"].endswith(f":0.1.0-{target}")
            assert target in targets
            (volume,) = [v for v in pod["volumes"] if "persistentVolumeClaim" in v]
            assert volume["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
            assert {"name": volume["name"], "mountPath": "/shared"} in container["volumeMounts"]


def test_pods_of_a_node_share_what_they_download(documents: dict[str, Tree]) -> None:
    for cluster in clusters(documents):
        for pod in groups(cluster).values():
            (container,) = pod["containers"]
            (cache,) = [volume["name"] for volume in pod["volumes"] if "hostPath" in volume]
            assert {"name": cache, "mountPath": "/cache"} in container["volumeMounts"]
            values = {entry["name"]: entry.get("value", "") for entry in container["env"]}
            assert all(values[name].startswith("/cache/") for name in ("HF_HOME", "ADDRESSVLM_CACHE"))


def test_the_service_outlives_its_head_and_a_machine(documents: dict[str, Tree]) -> None:
    cluster = documents["RayService"]["spec"]["rayClusterConfig"]
    host, port = cluster["gcsFaultToleranceOptions"]["redisAddress"].split(":")
    service = documents["Service"]
    assert (service["metadata"]["name"], service["spec"]["ports"]) == (host, [{"port": int(port)}])
    assert service["spec"]["selector"] == documents["Deployment"]["spec"]["template"]["metadata"]["labels"]
    by_name = {group["groupName"]: group for group in cluster["workerGroupSpecs"]}
    assert by_name["gpu"]["minReplicas"] >= 2
    for name, group in by_name.items():
        (spread,) = group["template"]["spec"]["topologySpreadConstraints"]
        assert spread["topologyKey"] == "kubernetes.io/hostname"
        assert spread["labelSelector"]["matchLabels"] == {"ray.io/group": name}


def test_ray_is_the_pinned_one_everywhere(documents: dict[str, Tree]) -> None:
    (pinned,) = re.findall(r"^ray==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert {cluster["rayVersion"] for cluster in clusters(documents)} == {pinned}
    assert f"ARG RAY={pinned}\n" in (ROOT / "Dockerfile").read_text()


def test_the_service_is_that_of_production_yaml(documents: dict[str, Tree]) -> None:
    served = yaml.safe_load(documents["RayService"]["spec"]["serveConfigV2"])
    production = yaml.safe_load((ROOT / "serve" / "production.yaml").read_text(encoding="utf-8"))
    for tree in (served, production):
        assert tree["applications"][0]["args"].pop("model").startswith("/")
    assert served == production
    gpus = served["applications"][0]["args"]["max_replicas"] * served["applications"][0]["args"]["num_gpus"]
    group = next(g for g in documents["RayService"]["spec"]["rayClusterConfig"]["workerGroupSpecs"] if g["groupName"] == "gpu")
    each = int(group["template"]["spec"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"])
    assert group["maxReplicas"] * each >= gpus
