"""Validates infra/ with Ray's schema, the definitions of KubeRay and Kubernetes, kustomize, linters and the command
lines of the jobs. tests/unit/test_command_lines.py does so for the commands of pages."""

import copy
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import jsonschema
import pytest
import yaml

from pipeline.cluster import STOP_RECORDS
from pipeline.errors import UserError
from pipeline.graph import file, instances
from pipeline.training.config import PretrainConfig
from tests.commandlines import parse_job as parse

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
RAY_UP = sorted((INFRA / "ray-up").glob("*.yaml"))
KUBERAY = sorted(path for path in (INFRA / "kuberay").glob("*.yaml") if path.name != "kustomization.yaml")
EVERY_FILE = sorted(path for path in INFRA.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def documents(path):
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def of_kind(kind):
    return [document for path in KUBERAY for document in documents(path) if document["kind"] == kind]


def strings(value):
    """Every string inside a YAML document."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from strings(item)


def word_lists(value):
    """Every list of words inside a YAML document: commands that are given word by word."""
    if isinstance(value, list):
        if all(isinstance(item, str) for item in value):
            yield value
        else:
            for item in value:
                yield from word_lists(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from word_lists(item)


# ---------------------------------------------------------------- command lines

COMMAND = re.compile(r"\bpython (?:\S*/)?jobs/(\w+)\.py\b([^\n|;>&]*)")
SHELL = {
    "RECIPE": "b16_imagenet",
    "DATA": "s3://bucket/vit/imagenet",
    "OUTPUT": "s3://bucket/vit/x",
    "split": "train",
} | {"STORE": "s3://bucket/vit"}


def command_lines():
    """(where, job, argv) of every job that a file of infra/ starts, without its pages."""
    for path in [path for path in EVERY_FILE if path.suffix != ".md"]:
        text = path.read_text().replace("\\\n", " ")
        if path.suffix == ".yaml":
            comments = [line.lstrip("# ") for line in text.splitlines() if line.lstrip().startswith("#")]
            texts = [*comments, *(string for document in documents(path) for string in strings(document))]
            texts += [shlex.join(words) for document in documents(path) for words in word_lists(document)]
        else:
            texts = [text]
        for text in texts:
            for job, rest in COMMAND.findall(text.replace("\\\n", " ")):
                rest = re.sub(r"\$\(\(.*?\)\)", "16", rest)
                rest = re.sub(r"\$\{?(\w+)\}?", lambda match: SHELL[match[1]], rest.replace('"$@"', ""))
                yield f"{path.relative_to(ROOT)}: {job}{rest}", job, shlex.split(rest, comments=True)


COMMAND_LINES = list(command_lines())


@pytest.mark.parametrize(("job", "argv"), [case[1:] for case in COMMAND_LINES], ids=[case[0] for case in COMMAND_LINES])
def test_every_command_line_is_one_that_the_job_reads(job, argv, monkeypatch):
    parse(job, argv, monkeypatch)


def test_commands_are_found_everywhere():
    places = {where.partition(":")[0] for where, _, _ in COMMAND_LINES}
    for place in (
        *(
            "infra/ray-up/aws.yaml",
            "infra/slurm/pretrain.sbatch",
            "infra/kuberay/evaluate.yaml",
        ),
        *("infra/kuberay/prepare.yaml", "infra/kuberay/pretrain.yaml", "infra/kuberay/transfer.yaml"),
        *("infra/kuberay/evaluate-raycronjob.yaml", "infra/skypilot/pretrain.yaml"),
        *("infra/kuberay/pipeline.yaml", "infra/kuberay/pipeline-raycronjob.yaml"),
        *("infra/cron/pipeline.cron", "infra/slurm/pipeline.scron", "infra/pipelines/b16-imagenet.yaml"),
    ):
        assert place in places, f"no command found in {place}"


def test_the_watcher_is_started_with_existing_options():
    spec = importlib.util.spec_from_file_location("preemption", INFRA / "preemption.py")
    preemption = sys.modules.setdefault("preemption", importlib.util.module_from_spec(spec))
    spec.loader.exec_module(preemption)
    starts = {}
    for path in RAY_UP:
        (starts[path.name],) = [
            shlex.split(command)[3:]
            for command in yaml.safe_load(path.read_text())["worker_start_ray_commands"]
            if "preemption.py" in command
        ]
    for group in of_kind("RayCluster")[0]["spec"]["workerGroupSpecs"]:
        pod = group["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        starts[group["groupName"]] = command[2:]
        assert preemption.arguments(command[2:]).grace < pod["terminationGracePeriodSeconds"]
    sky = yaml.safe_load((INFRA / "skypilot" / "pretrain.yaml").read_text())["run"]
    (command,) = [line for line in sky.splitlines() if "preemption.py" in line]
    for cloud in ("aws", "gcp"):  # as SKYPILOT_CLUSTER_INFO names them, in lower case
        words = shlex.split(command.replace("$cloud", cloud).replace("$head", "10.0.0.2"))[2:]
        assert preemption.arguments(words[: words.index(">")]).watch == cloud
    for name, argv in starts.items():
        options = preemption.arguments([word for word in argv[: argv.index(">")] if word] if ">" in argv else argv)
        assert options.watch == name.removesuffix(".yaml") if name.endswith(".yaml") else options.now
    assert len(starts) == 4


def test_a_wrong_command_line_is_noticed(monkeypatch):
    with pytest.raises(UserError, match="--workers"):
        parse("pretrain", ["--recipe", "b16_imagenet", "--wokers", "8"], monkeypatch)


def test_pretrain_commands_ask_for_what_the_clusters_have(monkeypatch):
    """--workers divides the lanes of the recipe, and the cluster can have that many GPUs."""
    (cluster,) = of_kind("RayCluster")
    (group,) = [group for group in cluster["spec"]["workerGroupSpecs"] if group["groupName"] == "gpu"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    offered = {"infra/kuberay": (group["maxReplicas"] * int(limits["nvidia.com/gpu"]), int(limits["cpu"]))}
    for path in RAY_UP:
        gpu = yaml.safe_load(path.read_text())["available_node_types"]["gpu"]
        offered[f"infra/ray-up/{path.name}"] = (gpu["max_workers"] * gpu["resources"]["GPU"], gpu["resources"]["CPU"])
    checked = 0
    for where, job, argv in COMMAND_LINES:
        for place, (gpus, cpus) in offered.items():
            if job == "pretrain" and where.startswith(place):
                config = parse(job, argv, monkeypatch)
                assert config.runtime.gpus
                assert config.lanes % config.runtime.workers == 0
                assert config.runtime.workers <= gpus
                assert 8 * config.runtime.cpus_per_worker <= cpus
                checked += 1
    assert checked >= 2


# ---------------------------------------------------------------- ray up


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_files_pass_rays_own_validation(path):
    from ray.autoscaler._private.util import prepare_config, validate_config

    config = yaml.safe_load(path.read_text())
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    for key in ("setup_commands", "head_setup_commands", "worker_setup_commands"):
        assert prepared[key] == [], "ray up fills these with installations of its own"
    types = config["available_node_types"]
    assert types["head"]["resources"]["CPU"] == 0
    assert sum(kind.get("max_workers", 0) for kind in types.values()) <= config["max_workers"]
    misspelt = copy.deepcopy(config)
    misspelt["idle_timeout_minuts"] = 5
    with pytest.raises(jsonschema.ValidationError):
        validate_config(prepare_config(misspelt))


@pytest.mark.parametrize("path", RAY_UP, ids=lambda path: path.name)
def test_ray_up_clusters_are_closed(path):
    config = yaml.safe_load(path.read_text())
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]
    assert any(target.endswith("/.ray/auth_token") for target in config["file_mounts"])
    (start,) = [command for command in config["head_start_ray_commands"] if "ray start" in command]
    assert "--dashboard-host=127.0.0.1" in start
    spot = yaml.safe_dump(config["available_node_types"]["cpu"]).lower()
    assert "spot" in spot
    assert "spot" not in yaml.safe_dump(config["available_node_types"]["gpu"]).lower()


# ---------------------------------------------------------------- Kubernetes


def test_ray_resources_match_kuberays_definitions(kuberay_definitions):
    validated = []
    for path in KUBERAY:
        for document in documents(path):
            if document["apiVersion"] == "ray.io/v1":
                kuberay_definitions[document["kind"]].validate(document)
                validated.append(document["kind"])
    assert sorted(validated) == ["RayCluster", "RayCronJob", "RayCronJob", "RayJob", "RayJob", "RayJob"]


def test_the_scheduled_pod_is_a_pod(kuberay_definitions):
    """The CronJob's pod against the pod schema that KubeRay's definitions carry."""
    head = kuberay_definitions["RayCluster"].schema["properties"]["spec"]["properties"]["headGroupSpec"]
    pod = jsonschema.Draft202012Validator(head["properties"]["template"])
    for cron in of_kind("CronJob"):
        pod.validate(cron["spec"]["jobTemplate"]["spec"]["template"])


@pytest.mark.parametrize(
    ("where", "value"),
    [
        (("spec", "authOptions", "mode"), "tokn"),
        (("spec", "enableInTreeAutoscalling"), True),
        (("spec", "workerGroupSpecs", 0, "maxReplicas"), "32"),
        (("spec", "workerGroupSpecs", 1, "template", "spec", "containers", 0, "imagePullPolciy"), "Always"),
    ],
)
def test_mistakes_in_a_cluster_are_noticed(kuberay_definitions, where, value):
    (cluster,) = of_kind("RayCluster")
    place = cluster = copy.deepcopy(cluster)
    for key in where[:-1]:
        place = place[key]
    place[where[-1]] = value
    with pytest.raises(jsonschema.ValidationError):
        kuberay_definitions["RayCluster"].validate(cluster)


def test_the_ray_cluster_is_closed_and_scales():
    (cluster,) = of_kind("RayCluster")
    spec = cluster["spec"]
    assert spec["authOptions"]["mode"] == "token"
    assert spec["enableInTreeAutoscaling"]
    assert spec["autoscalerOptions"]["version"] == "v2"
    assert spec["rayVersion"] == pinned()["ray"]
    assert {group["groupName"] for group in spec["workerGroupSpecs"]} == {"cpu", "gpu"}
    pods = [spec["headGroupSpec"]["template"], *(group["template"] for group in spec["workerGroupSpecs"])]
    for pod in [*pods, *(cron["spec"]["jobTemplate"]["spec"]["template"] for cron in of_kind("CronJob"))]:
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        for container in pod["spec"]["containers"]:
            assert container["image"] == "vit-pipeline"  # kustomization.yaml says which
            assert not container["securityContext"]["allowPrivilegeEscalation"]
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}


def test_pods_have_the_time_that_their_hooks_take():
    """terminationGracePeriodSeconds includes the time of the hook; Kubernetes kills the pod at its end."""
    (cluster,) = of_kind("RayCluster")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for group in groups:
        pod = group["template"]["spec"]
        command = pod["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert (ROOT / command[1].removeprefix("/opt/vit/")).is_file()
        assert int(command[command.index("--grace") + 1]) + 10 <= pod["terminationGracePeriodSeconds"]
    stop = int(re.search(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", (INFRA / "Dockerfile").read_text())[1])
    assert stop >= PretrainConfig().runtime.stop_grace + STOP_RECORDS
    head = groups[0]["template"]["spec"]["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
    assert int(head[-1]) > stop


REFERENCES = [(path, image) for path in sorted(INFRA.rglob("*")) if path.suffix in (".yaml", ".yml") or path.name == "Dockerfile"
              for image in re.findall(r"^(?:FROM|ARG PYTHON=|[\s-]*image:)\s*([^\s#]+)", path.read_text(), re.MULTILINE)
              if not image.startswith("$")]  # fmt: skip


@pytest.mark.parametrize(("path", "image"), REFERENCES, ids=lambda value: str(value).removeprefix(f"{INFRA}/"))
def test_images_are_pinned(path, image):
    """Third-party images are pinned by digest. Our images have a version, because their digest is known only after the
    push (docs/clusters.md says where to add it)."""
    if image == "tcpx-daemon":  # Google publishes this one by tag; its kustomization.yaml says so
        assert re.search(r"newTag: v\d+\.\d+\.\d+$", path.read_text(), re.MULTILINE)
    elif "vit-pipeline" in image or "vit-mlflow" in image:
        by_kustomization = image == "vit-pipeline"
        assert by_kustomization or re.search(r"/vit-(pipeline|mlflow):\d+\.\d+\.\d+$", image)
    else:
        assert re.fullmatch(r"[\w./-]+:\d+\.\d+[\w.-]*@sha256:[0-9a-f]{64}", image)


def test_images_are_found_everywhere():
    assert {path.relative_to(INFRA).parts[0] for path, _ in REFERENCES} >= {
        "Dockerfile",
        "kuberay",
        "mlflow",
        "ray-up",
        "components",
    }


def test_jobs_run_on_the_existing_cluster():
    (cluster,) = of_kind("RayCluster")
    jobs = [job["spec"] for job in of_kind("RayJob")] + [cron["spec"]["jobTemplate"] for cron in of_kind("RayCronJob")]
    for job in jobs:
        assert job["clusterSelector"] == {"ray.io/cluster": cluster["metadata"]["name"]}
        # the operator refuses these together with a clusterSelector
        assert not job.keys() & {"backoffLimit", "ttlSecondsAfterFinished", "suspend", "shutdownAfterJobFinishes"}


def test_ray_jobs_have_names():
    """`ray job list` and the dashboard show metadata, and only the end of a long entry point."""
    documents_ = [*of_kind("RayJob"), *documents(INFRA / "rayjob" / "all" / "pipeline.yaml")]
    names = [job["spec"]["metadata"]["job_name"] for job in documents_]
    names += [cron["spec"]["jobTemplate"]["metadata"]["job_name"] for cron in of_kind("RayCronJob")]
    for cron in of_kind("CronJob"):
        (option,) = [word for word in next(word_lists(cron["spec"])) if word.startswith("--metadata-json=")]
        names.append(json.loads(option.partition("=")[2])["job_name"])
    assert sorted(names) == [*["evaluate"] * 2, *["pipeline"] * 3, "prepare", "pretrain", "transfer"]


def test_the_two_schedules_are_at_one_time():
    schedules = [
        {cron["metadata"]["name"]: cron["spec"]["schedule"] for cron in of_kind(kind)}
        for kind in ("CronJob", "RayCronJob")
    ]
    assert schedules[0] == schedules[1]
    assert set(schedules[0]) == {"evaluate", "pipeline"}


def test_kustomization_names_files_and_images_that_exist():
    kustomization = yaml.safe_load((INFRA / "kuberay" / "kustomization.yaml").read_text())
    for name in kustomization["resources"]:
        assert (INFRA / "kuberay" / name).is_file()
    assert [image["name"] for image in kustomization["images"]] == ["vit-pipeline"]
    (generated,) = kustomization["configMapGenerator"]
    used = {
        reference["configMapRef"]["name"]
        for group in (
            of_kind("RayCluster")[0]["spec"]["headGroupSpec"],
            *of_kind("RayCluster")[0]["spec"]["workerGroupSpecs"],
        )
        for container in group["template"]["spec"]["containers"]
        for reference in container["envFrom"]
        if "configMapRef" in reference
    }
    assert used == {generated["name"]}


def built(folder):
    """What `kubectl apply -k` would send."""
    if shutil.which("kubectl") is None:
        pytest.skip("kubectl is not here to build with")
    done = subprocess.run(["kubectl", "kustomize", INFRA / folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def test_kustomize_builds_the_cluster(kuberay_definitions):
    documents = built("kuberay")
    assert {document["kind"] for document in documents} >= {"RayCluster", "CronJob", "ConfigMap", "NetworkPolicy"}
    assert {document["metadata"]["namespace"] for document in documents} == {"vit"}
    (cluster,) = [document for document in documents if document["kind"] == "RayCluster"]
    kuberay_definitions["RayCluster"].validate(cluster)
    images = set(re.findall(r"'image': '([^']*)'", str(documents)))
    assert images == {"registry.example.com/vit-pipeline:0.1.0"}  # in containers of resources of KubeRay, too


def test_a_rayjob_brings_the_cluster_with_it(kuberay_definitions):
    documents = built("rayjob")
    assert sorted(document["kind"] for document in documents) == [
        *("ConfigMap", "NetworkPolicy", "RayJob", "ServiceAccount")
    ]
    job = next(document for document in documents if document["kind"] == "RayJob")
    kuberay_definitions["RayJob"].validate(job)
    (cluster,) = [document for document in built("kuberay") if document["kind"] == "RayCluster"]
    assert job["spec"]["rayClusterSpec"] == cluster["spec"]
    assert job["spec"]["backoffLimit"] > 0
    assert "clusterSelector" not in job["spec"]  # KubeRay refuses it together with backoffLimit


def test_kueue_admits_the_whole_cluster_or_nothing(kuberay_definitions):
    documents = built("kueue")
    (cluster,) = [document for document in documents if document["kind"] == "RayCluster"]
    kuberay_definitions["RayCluster"].validate(cluster)
    (local,) = [document for document in documents if document["kind"] == "LocalQueue"]
    (queue,) = [document for document in documents if document["kind"] == "ClusterQueue"]
    assert cluster["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == local["metadata"]["name"]
    assert cluster["metadata"]["namespace"] == local["metadata"]["namespace"]
    assert local["spec"]["clusterQueue"] == queue["metadata"]["name"]
    assert not cluster["spec"]["enableInTreeAutoscaling"]
    quota = {row["name"]: row["nominalQuota"] for row in queue["spec"]["resourceGroups"][0]["flavors"][0]["resources"]}
    asked = dict.fromkeys(quota, 0)
    for group in [cluster["spec"]["headGroupSpec"] | {"replicas": 1}, *cluster["spec"]["workerGroupSpecs"]]:
        for container in group["template"]["spec"]["containers"]:
            for name in quota:
                value = str(container["resources"]["requests"].get(name, "0"))
                asked[name] += group["replicas"] * int(value.removesuffix("Gi"))
    for name, most in quota.items():
        assert 0 < asked[name] <= int(str(most).removesuffix("Gi")), name


# ---------------------------------------------------------------- linters of the test extra


def linted(tool, *arguments):
    """The output of a linter; "" means no problems."""
    program = shutil.which(tool, path=os.pathsep.join([os.path.dirname(sys.executable), os.environ["PATH"]]))
    if program is None:
        pytest.skip(f"{tool} is not installed: pip install -c constraints.txt -e '.[test]'")
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert bool(done.returncode) == bool(done.stdout + done.stderr)
    return done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted(INFRA.glob("slurm/*.sbatch")), ids=lambda path: path.name)
def test_shellcheck_finds_nothing(path, tmp_path):
    assert linted("shellcheck", path) == ""
    (tmp_path / "bad.sh").write_text("#!/bin/bash\ncd $1\n")
    assert "SC2086" in linted("shellcheck", tmp_path / "bad.sh")


@pytest.mark.parametrize(
    "path",
    sorted(set(INFRA.rglob("Dockerfile*")) - set(INFRA.rglob("*.dockerignore"))),
    ids=lambda path: str(path.relative_to(INFRA)),
)
def test_hadolint_finds_nothing(path, tmp_path):
    assert linted("hadolint", path) == ""
    (tmp_path / "Dockerfile").write_text("FROM debian\nRUN cd /tmp\n")
    assert "DL3006" in linted("hadolint", tmp_path / "Dockerfile")


@pytest.mark.parametrize("path", [*KUBERAY, INFRA / "mlflow" / "kubernetes.yaml"], ids=lambda path: path.name)
def test_kubernetes_knows_every_field(path):
    """Validates with Kubernetes' schemas, except resources of Ray and Kueue, which are validated above."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    for document in documents(path):
        if document["apiVersion"] not in ("ray.io/v1", "kueue.x-k8s.io/v1beta2"):
            kubernetes_validate.validate(document, "1.32", strict=True)
            with pytest.raises(kubernetes_validate.ValidationError):
                kubernetes_validate.validate(document | {"metadta": {}}, "1.32", strict=True)


# ---------------------------------------------------------------- rights


def statements(name):
    return json.loads((INFRA / "iam" / f"{name}.json").read_text())["Statement"]


def test_nodes_read_the_corpus_and_write_one_prefix():
    granted = {}
    for statement in statements("node"):
        assert statement["Effect"] == "Allow"
        actions = statement["Action"] if isinstance(statement["Action"], list) else [statement["Action"]]
        granted.setdefault(statement["Resource"], set()).update(actions)
        assert not any("*" in action for action in actions)
    assert granted.pop("*") == {"ecr:GetAuthorizationToken"}  # it has no resource of its own
    (image,) = {document["docker"]["image"] for document in map(yaml.safe_load, [RAY_UP[0].read_text()])}
    repository = image.partition("/")[2].partition(":")[0]
    assert "ecr:BatchGetImage" in granted.pop(f"arn:aws:ecr:us-east-1:123456789012:repository/{repository}")
    assert granted["arn:aws:s3:::corpus/*"] == {"s3:GetObject"}
    assert "s3:PutObject" in granted["arn:aws:s3:::bucket/vit/*"]
    assert set(granted) == {f"arn:aws:s3:::{name}" for name in ("corpus", "corpus/*", "bucket", "bucket/vit/*")}
    (listing,) = [statement for statement in statements("node") if statement["Resource"] == "arn:aws:s3:::bucket"]
    assert listing["Condition"] == {"StringLike": {"s3:prefix": ["vit", "vit/*"]}}


def test_the_condition_of_google_covers_objects_and_lists():
    """A list has the name of the bucket as its resource, so that a condition on objects alone would refuse it."""
    condition = yaml.safe_load((INFRA / "iam" / "gcs-condition.yaml").read_text())
    objects, lists = condition["expression"].split(" || ")
    assert objects == 'resource.name.startsWith("projects/_/buckets/bucket/objects/vit/")'
    assert "objectListPrefix" in lists
    assert "infra/iam/gcs-condition.yaml" in (ROOT / "docs" / "clusters.md").read_text()


def test_the_mlflow_server_writes_its_artifacts_and_nothing_else():
    (listing, writing) = statements("mlflow")
    assert listing["Resource"] == "arn:aws:s3:::bucket"
    assert listing["Condition"] == {"StringLike": {"s3:prefix": ["mlflow", "mlflow/*"]}}
    assert writing["Resource"] == "arn:aws:s3:::bucket/mlflow/*"
    text = (INFRA / "mlflow" / "kubernetes.yaml").read_text()
    assert "--from-literal=artifacts=s3://bucket/mlflow " in text
    (account,) = [d for d in yaml.safe_load_all(text) if d["kind"] == "ServiceAccount"]
    assert account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"].endswith(":role/vit-mlflow")


def test_every_address_in_the_examples_is_one_that_nodes_may_use():
    for where, _, argv in COMMAND_LINES:
        for flag, value in itertools.pairwise(argv) if where.startswith("infra/") else ():
            if value.startswith("s3://"):
                assert value.startswith("s3://corpus/" if flag == "--source" else "s3://bucket/vit/"), where


def test_only_the_head_starts_machines_and_only_its_own():
    cluster = yaml.safe_load((INFRA / "ray-up" / "aws.yaml").read_text())
    rights = {statement["Sid"]: statement for statement in statements("head")}
    everywhere = [sid for sid, statement in rights.items() if statement["Resource"] == "*"]
    assert everywhere == ["SeeInstances"]
    assert all(action.startswith("ec2:Describe") for action in rights["SeeInstances"]["Action"])
    tag = rights["EndAndTagNodesOfThisClusterOnly"]["Condition"]["StringEquals"]["aws:ResourceTag/ray-cluster-name"]
    assert tag == cluster["cluster_name"]
    images = {kind["node_config"]["ImageId"] for kind in cluster["available_node_types"].values()}
    assert {f"arn:aws:ec2:{cluster['provider']['region']}::image/{image}" for image in images} < set(
        rights["StartNodesFromOneImage"]["Resource"]
    )
    for name in ("cpu", "gpu"):
        profile = cluster["available_node_types"][name]["node_config"]["IamInstanceProfile"]["Arn"]
        assert profile.replace("instance-profile", "role") == rights["GiveNodesTheirRole"]["Resource"]


# ---------------------------------------------------------------- image, scripts, secrets


def pinned():
    return dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().split())


def test_the_image_has_every_dependency_pinned_and_no_root():
    text = (INFRA / "Dockerfile").read_text()
    instructions = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert [line for line in instructions if line.startswith("USER")] == ["USER 1000"]
    assert "-c constraints.txt" in text
    assert "RAY_AUTH_MODE=token" in text
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for extra in ("s3", "vtab") for name in project["optional-dependencies"][extra]]
    names = {re.split(r"[\[<>=]", name)[0].lower() for name in (*project["dependencies"], *extras)}
    assert names <= {name.lower() for name in pinned()}
    for source in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for name in source.split():
            assert (ROOT / name).exists()
            assert f"!{name}" in (INFRA / "Dockerfile.dockerignore").read_text().split()


SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN [A-Z ]*PRIVATE KEY|(?:secret_access_key|auth_token|session_key|secret_key|password)['\"]?[ \t]*[=:][ \t]*['\"]?[\w+/]{12,}",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", EVERY_FILE, ids=lambda path: str(path.relative_to(INFRA)))
def test_no_secret_is_written_down(path):
    assert not SECRET.search(path.read_text())


def test_the_secret_pattern_finds_secrets():
    # concatenated, so that scanners do not find them in this file
    for text in ("AKIA" + "A" * 16, "AWS_SECRET_ACCESS_" + "KEY=" + "a" * 40, "RAY_AUTH_" + "TOKEN: " + "b" * 32):
        assert SECRET.search(text)


def test_spot_nodes_may_be_requested():
    """RunInstances with a market option also needs permissions for the spot request."""
    cluster = yaml.safe_load((INFRA / "ray-up" / "aws.yaml").read_text())
    assert "InstanceMarketOptions" in cluster["available_node_types"]["cpu"]["node_config"]
    (start,) = [statement for statement in statements("head") if statement["Action"] == "ec2:RunInstances"]
    assert "arn:aws:ec2:us-east-1:123456789012:spot-instances-request/*" in start["Resource"]


def test_roles_are_trusted_by_those_who_assume_them():
    """EC2 may assume the roles of instance profiles, and only the service account of account.yaml the role of pods."""
    (ec2,) = statements("trust-ec2")
    assert ec2["Principal"] == {"Service": "ec2.amazonaws.com"}
    (eks,) = statements("trust-eks")
    (account,) = [d for d in documents(INFRA / "kuberay" / "account.yaml") if d["kind"] == "ServiceAccount"]
    subjects = [value for key, value in eks["Condition"]["StringEquals"].items() if key.endswith(":sub")]
    assert subjects == [f"system:serviceaccount:vit:{account['metadata']['name']}"]
    role = account["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]
    (passed,) = [s["Resource"] for s in statements("head") if s["Action"] == "iam:PassRole"]
    assert role == passed


def test_every_cluster_has_the_address_and_the_password_of_mlflow():
    for path in RAY_UP:
        config = yaml.safe_load(path.read_text())
        assert any(option.startswith("--env MLFLOW_TRACKING_URI=") for option in config["docker"]["run_options"])
        assert "/home/ray/.mlflow/credentials" in config["file_mounts"]
    kustomization = yaml.safe_load((INFRA / "kuberay" / "kustomization.yaml").read_text())
    assert any(text.startswith("MLFLOW_TRACKING_URI=") for text in kustomization["configMapGenerator"][0]["literals"])
    (cluster,) = of_kind("RayCluster")
    groups = [cluster["spec"]["headGroupSpec"], *cluster["spec"]["workerGroupSpecs"]]
    for container in (container for group in groups for container in group["template"]["spec"]["containers"]):
        assert {"secretRef": {"name": "vit-mlflow", "optional": True}} in container["envFrom"]
    assert "MLFLOW_TRACKING_URI" in (INFRA / "slurm" / "pretrain.sbatch").read_text()


# ---------------------------------------------------------------- pipelines and their schedules


@pytest.mark.parametrize("path", sorted((INFRA / "pipelines").glob("*.yaml")), ids=lambda path: path.name)
def test_pipeline_files_say_what_their_jobs_know(path):
    found = instances.expand(file.load(str(path)), str(path))
    assert set(found) == {"images", "tasks", "pretrain", "transfer", "promote"}
    assert {"images", "tasks", "pretrain", "transfer"} == {up for one in found.values() for up in one.needs}


def test_all_schedules_start_one_command():
    commands_of = {where.partition(":")[0]: argv for where, job, argv in COMMAND_LINES if job == "pipeline"}
    places = ("kuberay/pipeline.yaml", "kuberay/pipeline-raycronjob.yaml", "slurm/pipeline.scron", "cron/pipeline.cron")
    started = [
        [word for word in commands_of[f"infra/{place}"] if "http" not in word and word != "--address"]
        for place in places
    ]
    assert started == [["run", "s3://bucket/vit/pipeline.yaml", "--skip-if-running"]] * 4
