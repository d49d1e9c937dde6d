"""infra/ray-up/gcp.yaml through Ray's own GCP node provider and Google's own client, against a local imitation of Google
Cloud that checks every request body against Google's published schemas.

What `ray up` does before it logs in to the head, and what the head's autoscaler does afterwards.
"""

from pathlib import Path

import pytest
import yaml

from tests.googlecompute import google_cloud
from tests.rayup import with_option

INFRA = Path(__file__).parents[2] / "infra"
PROJECT = "my-project"
ACCOUNTS = [f"vit-{role}@{PROJECT}.iam.gserviceaccount.com" for role in ("head", "node")]


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    with google_cloud(tmp_path_factory.mktemp("google"), PROJECT) as running:
        yield running


@pytest.fixture
def cloud(service, tmp_path, monkeypatch):
    for name in ("https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**service.environment, "HOME": str(tmp_path)}.items():  # Ray writes a key to ~/.ssh
        monkeypatch.setenv(name, value)
    service.clear()
    service.accounts.update(ACCOUNTS)
    return service


def bootstrap(change=lambda config: None, option: str = "") -> dict:
    """gcp.yaml as `ray up` completes it. option: the title of an option to use."""
    from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(with_option((INFRA / "ray-up" / "gcp.yaml").read_text(), option))
    change(config)
    config = prepare_config(config)
    validate_config(config)
    return GCPNodeProvider.bootstrap_config(config)


def provider_of(config: dict):
    from ray.autoscaler._private.gcp.node_provider import GCPNodeProvider

    return GCPNodeProvider(config["provider"], config["cluster_name"])


def start(provider, config: dict, node_type: str) -> str:
    """Starts a node as Ray's autoscaler does, and returns its name."""
    kind = "head" if node_type == config["head_node_type"] else "worker"
    tags = {"ray-node-type": kind, "ray-user-node-type": node_type, "ray-node-name": f"ray-vit-{kind}"}
    (node,) = provider.create_node(config["available_node_types"][node_type]["node_config"], tags, 1)
    return node


def test_ray_starts_every_node_type(cloud):
    config = bootstrap()
    provider = provider_of(config)
    made = {name: cloud.instances[start(provider, config, name)] for name in config["available_node_types"]}
    assert {name: one["machineType"].rpartition("/")[2] for name, one in made.items()} == {
        "head": "n2-standard-8",
        "cpu": "c3-standard-44",
        "gpu": "a3-highgpu-8g",
    }
    assert {name: one["serviceAccounts"][0]["email"] for name, one in made.items()} == {
        "head": ACCOUNTS[0],
        "cpu": ACCOUNTS[1],
        "gpu": ACCOUNTS[1],
    }
    assert {name: one.get("scheduling", {}).get("provisioningModel") for name, one in made.items()} == {
        "head": None,
        "cpu": "SPOT",
        "gpu": None,
    }
    assert made["gpu"]["scheduling"]["onHostMaintenance"] == "TERMINATE"  # Compute Engine cannot move GPUs


def test_only_the_head_has_a_public_address(cloud):
    config = bootstrap()
    provider = provider_of(config)
    for name in config["available_node_types"]:
        (card,) = cloud.instances[start(provider, config, name)]["networkInterfaces"]
        assert card["subnetwork"] == f"projects/{PROJECT}/regions/us-central1/subnetworks/vit"
        assert bool(card.get("accessConfigs")) == (name == "head")


def test_the_autoscaler_finds_and_ends_its_nodes_with_the_rights_of_an_instance_admin(cloud):
    config = bootstrap()
    head = provider_of(config)
    start(head, config, "head")
    cloud.calls.clear()
    nodes = [start(head, config, name) for name in ("cpu", "gpu")]
    assert sorted(head.non_terminated_nodes({"ray-node-type": "worker"})) == sorted(nodes)
    head.set_node_tags(nodes[0], {"ray-node-status": "up-to-date"})
    assert head.non_terminated_nodes({"ray-node-status": "up-to-date"}) == nodes[:1]
    assert head.internal_ip(nodes[1]).startswith("10.0.0.")
    head.terminate_nodes(nodes)
    assert head.non_terminated_nodes({"ray-node-type": "worker"}) == []
    # roles/compute.instanceAdmin.v1 has these, and no others are needed
    assert set(cloud.calls) <= {f"instances.{name}" for name in ("insert", "list", "get", "setLabels", "delete")} | {
        "operations.get"
    }


def test_options_of_the_gpu_nodes(cloud):
    config = bootstrap(option="placement")
    node = cloud.instances[start(provider_of(config), config, "gpu")]
    assert node["resourcePolicies"] == [f"projects/{PROJECT}/regions/us-central1/resourcePolicies/vit"]
    config = bootstrap(option="reservation")
    node = cloud.instances[start(provider_of(config), config, "gpu")]
    assert node["reservationAffinity"]["values"] == ["vit"]


def test_what_ray_up_itself_creates_in_the_project(cloud):
    """docs/clusters.md names this account, so that an operator can remove it."""
    bootstrap()
    extra = f"ray-autoscaler-sa-v1@{PROJECT}.iam.gserviceaccount.com"
    assert cloud.accounts == {*ACCOUNTS, extra}
    assert {binding["role"] for binding in cloud.bindings} >= {"roles/compute.admin"}
    assert [item["key"] for item in cloud.metadata["items"]] == ["ssh-keys"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schedulin": {}}, "schedulin"),
        ({"scheduling": [{"provisioningModel": "SPOT"}]}, "scheduling"),
        ({"scheduling": {"provisioningModel": "SPOTTY"}}, "SPOTTY"),
        ({"serviceAccounts": [{"email": "nobody@x", "scopes": []}]}, "does not exist"),
    ],
)
def test_mistakes_are_noticed(cloud, change, message):
    config = bootstrap(lambda config: config["available_node_types"]["gpu"]["node_config"].update(change))
    with pytest.raises(Exception, match=message):
        start(provider_of(config), config, "gpu")
