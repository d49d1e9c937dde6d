"""infra/ray-up/aws.yaml and infra/iam/ against moto's EC2 and IAM, through Ray's own AWS node provider.

What `ray up` does before it logs in to the head, and what the head's autoscaler does afterwards with the rights of the role vit-head.
"""

import json
import os
import urllib.request
from pathlib import Path

import boto3
import pytest
import yaml
from botocore.exceptions import ClientError

from tests.objectstore import moto
from tests.rayup import with_option

INFRA = Path(__file__).parents[2] / "infra"
ACCOUNT = "123456789012"  # moto's account, and the one in the files


@pytest.fixture
def endpoint(tmp_path, monkeypatch):
    """The address of a moto server, which all AWS clients of this process use, including Ray's."""
    with moto() as address:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("AWS_ENDPOINT_URL", address)
        monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        monkeypatch.setenv("HOME", str(tmp_path))  # Ray writes the key pair to ~/.ssh
        (tmp_path / ".ssh").mkdir(mode=0o700)
        use_key(monkeypatch, "operator", "secret")
        yield address
        forget_clients()


def use_key(monkeypatch, key: str, secret: str, token: str | None = None) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret)
    if token:
        monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    forget_clients()


def forget_clients() -> None:
    """Ray and boto3 cache clients together with their credentials."""
    from ray.autoscaler._private.aws import utils

    utils.resource_cache.cache_clear()
    utils.client_cache.cache_clear()
    boto3.DEFAULT_SESSION = None


def create_roles() -> None:
    """The roles and instance profiles of docs/clusters.md. moto does not apply conditions and knows EC2's rights as a whole, so
    conditions go, and the policy of the head applies to every resource."""
    iam = boto3.client("iam")
    for role, policies in {"vit-node": ["node"], "vit-head": ["node", "head"]}.items():
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=(INFRA / "iam" / "trust-ec2.json").read_text())
        for name in policies:
            policy = json.loads((INFRA / "iam" / f"{name}.json").read_text())
            for statement in policy["Statement"]:
                statement.pop("Condition", None)
                if name == "head":
                    statement["Resource"] = "*"
            iam.put_role_policy(RoleName=role, PolicyName=name, PolicyDocument=json.dumps(policy))
        iam.create_instance_profile(InstanceProfileName=role)
        iam.add_role_to_instance_profile(InstanceProfileName=role, RoleName=role)


def bootstrap(option: str = "") -> dict:
    """aws.yaml as `ray up` completes it: subnets, a security group, a key pair. The image is one that moto knows.

    option: the title of an option to use."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    ec2 = boto3.client("ec2")
    group = ec2.create_security_group(GroupName="vit", Description="Ray nodes")["GroupId"]
    image = ec2.describe_images(Owners=["amazon"])["Images"][0]["ImageId"]
    text = with_option((INFRA / "ray-up" / "aws.yaml").read_text(), option)
    text = text.replace("ami-0123456789abcdef0", image).replace("sg-0123456789abcdef0", group)
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    return AWSNodeProvider.bootstrap_config(config)


def start(config: dict, node_type: str) -> dict:
    """Starts a node as Ray's autoscaler does, and returns EC2's description of it."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    kind = "head" if node_type == config["head_node_type"] else "worker"
    tags = {"ray-node-type": kind, "ray-user-node-type": node_type}
    (node,) = provider.create_node(config["available_node_types"][node_type]["node_config"], tags, 1)
    return boto3.client("ec2").describe_instances(InstanceIds=[node])["Reservations"][0]["Instances"][0]


def test_ray_starts_every_node_type(endpoint, monkeypatch):
    create_roles()
    config = bootstrap()
    nodes = {name: start(config, name) for name in config["available_node_types"]}
    for name, node in nodes.items():
        profile = "vit-head" if name == "head" else "vit-node"
        assert node["IamInstanceProfile"]["Arn"] == f"arn:aws:iam::{ACCOUNT}:instance-profile/{profile}"
        assert node["MetadataOptions"]["HttpTokens"] == "required"
        assert node["Placement"]["AvailabilityZone"] == "us-east-1a"
    assert {name: node.get("InstanceLifecycle") for name, node in nodes.items()} == {
        "head": None,
        "cpu": "spot",
        "gpu": None,
    }


@pytest.mark.parametrize("option", ["capacity-block", "reservation"])
def test_options_of_the_gpu_nodes(endpoint, option):
    """botocore checks the names of the fields before the request; moto ignores the values of capacity reservations."""
    create_roles()
    config = bootstrap(option)
    settings = config["available_node_types"]["gpu"]["node_config"]
    target = settings["CapacityReservationSpecification"]["CapacityReservationTarget"]
    assert target == {"CapacityReservationId": "cr-0123456789abcdef0"}
    assert (
        settings.get("InstanceMarketOptions")
        == {
            "capacity-block": {"MarketType": "capacity-block"},
            "reservation": None,
        }[option]
    )
    assert start(config, "gpu")["InstanceType"] == "p5.48xlarge"


def test_ray_opens_no_port(endpoint):
    create_roles()
    config = bootstrap()
    for name in config["available_node_types"]:
        assert [group["GroupName"] for group in start(config, name)["SecurityGroups"]] == ["vit"]
    groups = boto3.client("ec2").describe_security_groups()["SecurityGroups"]
    assert {group["GroupName"]: group["IpPermissions"] for group in groups}["vit"] == []
    assert not [group for group in groups if group["GroupName"].startswith("ray")]


def test_the_heads_role_starts_and_ends_nodes_and_has_no_other_right(endpoint, monkeypatch):
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    create_roles()
    config = bootstrap()
    start(config, "head")
    role = boto3.client("sts").assume_role(RoleArn=f"arn:aws:iam::{ACCOUNT}:role/vit-head", RoleSessionName="head")
    request = urllib.request.Request(f"{endpoint}/moto-api/reset-auth", b"0", {"Content-Type": "text/plain"})
    urllib.request.urlopen(request).close()  # from here on every request is checked against the policies
    credentials = role["Credentials"]
    use_key(monkeypatch, *(credentials[name] for name in ("AccessKeyId", "SecretAccessKey", "SessionToken")))

    nodes = [start(config, name)["InstanceId"] for name in ("cpu", "gpu")]
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    assert provider.non_terminated_nodes({"ray-node-type": "worker"}) == nodes
    provider.terminate_nodes(nodes)
    assert provider.non_terminated_nodes({"ray-node-type": "worker"}) == []
    for call in (
        lambda: boto3.client("iam").list_users(),
        lambda: boto3.client("iam").create_access_key(UserName="operator"),
        lambda: boto3.client("ec2").create_vpc(CidrBlock="10.0.0.0/16"),
        lambda: boto3.client("ec2").authorize_security_group_ingress(GroupName="x"),
        lambda: boto3.client("s3").list_buckets(),
    ):
        with pytest.raises(ClientError, match=r"AccessDenied|UnauthorizedOperation"):
            call()
