"""Each component of the Kubernetes cluster, built with kustomize and checked against the definitions of KubeRay, and the queues
against those of Kueue."""

import copy
import re
import shutil
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPONENTS = sorted(path.parent.name for path in (ROOT / "infra" / "components").glob("*/kustomization.yaml"))


def cluster_with(names, folder: Path) -> dict:
    """The RayCluster that `kubectl apply -k` would send with these components."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here to build with")
    shutil.copytree(ROOT / "infra", folder / "infra", ignore=shutil.ignore_patterns("__pycache__"))
    file = folder / "infra" / "kuberay" / "kustomization.yaml"
    file.write_text(file.read_text() + "components:\n" + "".join(f"  - ../components/{name}\n" for name in names))
    done = subprocess.run(["kubectl", "kustomize", file.parent], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (cluster,) = [d for d in yaml.safe_load_all(done.stdout) if d["kind"] == "RayCluster"]
    return cluster


@pytest.mark.parametrize("names", [*([name] for name in COMPONENTS), ["efa", "nvme", "logs"]], ids="+".join)
def test_components_make_a_cluster_that_kuberay_knows(names, tmp_path, kuberay_definitions):
    cluster = cluster_with(names, tmp_path)
    definition = kuberay_definitions["RayCluster"]
    if "history" in names and "historyServerOptions" not in definition.schema["properties"]["spec"]["properties"]:
        with pytest.raises(jsonschema.ValidationError, match="historyServerOptions"):  # needs KubeRay 1.7
            definition.validate(cluster)
        return
    definition.validate(cluster)
    gpu = cluster["spec"]["workerGroupSpecs"][1]["template"]["spec"]
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "8"
    for container in gpu["containers"]:
        if container["name"] != "tcpx-daemon":  # Google's
            assert container["image"] == "registry.example.com/vit-pipeline:0.1.0"
        assert not container["securityContext"]["allowPrivilegeEscalation"]


def test_what_each_component_adds(tmp_path):
    def gpu_pod(name):
        spec = cluster_with([name], tmp_path / name)["spec"]["workerGroupSpecs"][1]["template"]
        return spec, spec["spec"]["containers"][0]

    _, container = gpu_pod("efa")
    assert container["resources"]["limits"]["vpc.amazonaws.com/efa"] == "32"
    assert {"name": "FI_PROVIDER", "value": "efa"} in container["env"]
    pod, container = gpu_pod("rdma")
    assert pod["spec"]["hostNetwork"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    pod, _ = gpu_pod("gke-rdma")
    interfaces = yaml.safe_load(pod["metadata"]["annotations"]["networking.gke.io/interfaces"])
    assert [row["network"] for row in interfaces] == ["default", *(f"rdma-{i}" for i in range(8))]
    pod, container = gpu_pod("gke-tcpx")
    interfaces = yaml.safe_load(pod["metadata"]["annotations"]["networking.gke.io/interfaces"])
    assert [row["network"] for row in interfaces] == ["default", *(f"vpc{i}" for i in range(1, 5))]
    daemon = pod["spec"]["containers"][1]
    socket = {"name": "tcpx", "mountPath": "/run/tcpx"}
    assert socket in daemon["volumeMounts"]
    assert socket in container["volumeMounts"]
    assert {"name": "NCCL_GPUDIRECTTCPX_UNIX_CLIENT_PREFIX", "value": "/run/tcpx"} in container["env"]
    devices = yaml.safe_load(pod["metadata"]["annotations"]["devices.gke.io/container.tcpx-daemon"])
    assert len(devices) == 8 + 2  # the GPUs, nvidiactl and nvidia-uvm
    history = cluster_with(["history"], tmp_path / "history")["spec"]["historyServerOptions"]
    assert {"name": "RAY_ROOT_DIR", "value": "vit/history"} in history["collectorOptions"]["env"]
    pod, _ = gpu_pod("nvme")
    assert {v["name"]: v for v in pod["spec"]["volumes"]}["scratch"]["hostPath"]["path"] == "/mnt/disks/ssd0"
    pod, _ = gpu_pod("logs")
    assert pod["spec"]["containers"][1]["command"][1] == "/opt/vit/infra/ship_logs.py"


def test_the_table_names_every_component():
    table = (ROOT / "infra" / "components" / "README.md").read_text()
    assert sorted(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == COMPONENTS


def test_kueue_knows_every_field(kueue_definitions):
    documents = list(yaml.safe_load_all((ROOT / "infra" / "kueue" / "queues.yaml").read_text()))
    assert sorted(document["kind"] for document in documents) == sorted(kueue_definitions)
    for document in documents:
        kueue_definitions[document["kind"]].validate(document)
    (queue,) = [document for document in documents if document["kind"] == "ClusterQueue"]
    for old, new in (("nominalQuota", "nominalQuotas"), ("coveredResources", "resources")):
        misspelt = yaml.safe_load(yaml.safe_dump(copy.deepcopy(queue)).replace(f"{old}:", f"{new}:"))
        with pytest.raises(jsonschema.ValidationError):
            kueue_definitions["ClusterQueue"].validate(misspelt)
