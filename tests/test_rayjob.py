"""What would be lost: a job on Kubernetes that its operator and the cluster accept, that ends, and that asks for no rights.

The definition of ``RayJob`` is KubeRay's and not in any Python package; ``RAYJOB`` states the part of it that is used here, as of
KubeRay 1.5.1 to 1.7. Pods are checked by Kubernetes' own schema. The whole definition (``ray.io_rayjobs.yaml``, v1, at KubeRay's
commit feeaf72) accepts the manifest too, with unknown fields refused; that was checked once, by hand.
"""

import copy
import shlex
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import typer.main
import yaml
from ray.scripts.scripts import start

from jobs.cli import app

KUBERNETES = "1.31"


def fields(required: tuple[str, ...] = (), **properties: Any) -> dict[str, Any]:
    """An object with these fields and no others."""
    return {"type": "object", "additionalProperties": False, "required": list(required), "properties": properties}


TEXT, WHOLE, YES_NO = {"type": "string"}, {"type": "integer", "minimum": 0}, {"type": "boolean"}
POD = fields(("spec",), metadata={"type": "object"}, spec={"type": "object"})
FLAGS = {"type": "object", "additionalProperties": TEXT}
"""Of ``ray start``; KubeRay takes texts only."""
RAYJOB = fields(
    ("apiVersion", "kind", "metadata", "spec"),
    apiVersion={"const": "ray.io/v1"},
    kind={"const": "RayJob"},
    metadata=fields(("name",), name={"type": "string", "pattern": "^[a-z][a-z0-9-]{0,46}$"}),
    spec=fields(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        shutdownAfterJobFinishes=YES_NO,
        ttlSecondsAfterFinished=WHOLE,
        activeDeadlineSeconds=WHOLE,
        backoffLimit=WHOLE,
        submitterConfig=fields(backoffLimit=WHOLE),
        submitterPodTemplate=POD,
        rayClusterSpec=fields(
            ("headGroupSpec", "rayVersion"),
            rayVersion=TEXT,
            enableInTreeAutoscaling=YES_NO,
            autoscalerOptions=fields(
                idleTimeoutSeconds=WHOLE,
                upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
                securityContext={"type": "object"},
                resources=fields(requests={"type": "object"}, limits={"type": "object"}),
            ),
            authOptions=fields(mode={"enum": ["disabled", "token"]}),
            headGroupSpec=fields(
                ("template",),
                serviceType={"enum": ["ClusterIP", "NodePort", "LoadBalancer"]},
                rayStartParams=FLAGS,
                template=POD,
            ),
            workerGroupSpecs={
                "type": "array",
                "items": fields(
                    ("groupName", "maxReplicas", "minReplicas", "template"),
                    groupName=TEXT,
                    replicas=WHOLE,
                    minReplicas=WHOLE,
                    maxReplicas=WHOLE,
                    rayStartParams=FLAGS,
                    template=POD,
                ),
            },
        ),
    ),
)


@pytest.fixture
def job() -> dict[str, Any]:
    return yaml.safe_load((Path(__file__).parent.parent / "deploy" / "rayjob.yaml").read_text())


def groups_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    """The head and the groups of workers."""
    cluster = job["spec"]["rayClusterSpec"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def pods_of(job: dict[str, Any]) -> list[dict[str, Any]]:
    return [job["spec"]["submitterPodTemplate"], *(group["template"] for group in groups_of(job))]


def containers_of(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for pod in pods_of(job):
        yield from pod["spec"]["containers"]


def validate_pod(pod: dict[str, Any]) -> None:
    whole = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "pod"}, "spec": pod["spec"]}
    kubernetes_validate.validate(whole, KUBERNETES, strict=True)


def test_it_is_a_rayjob(job: dict[str, Any]) -> None:
    jsonschema.validate(job, RAYJOB)


@pytest.mark.parametrize(
    ("section", "name"), [("spec", "ttlSecondsAfterFinish"), ("rayClusterSpec", "autoscaling"), ("headGroupSpec", "replicas")]
)
def test_a_field_that_kuberay_does_not_know_is_found(job: dict[str, Any], section: str, name: str) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    {"spec": job["spec"], "rayClusterSpec": cluster, "headGroupSpec": cluster["headGroupSpec"]}[section][name] = 1
    with pytest.raises(jsonschema.ValidationError, match=name):
        jsonschema.validate(job, RAYJOB)


def test_kubernetes_accepts_its_pods(job: dict[str, Any]) -> None:
    for pod in pods_of(job):
        validate_pod(pod)
    wrong = copy.deepcopy(pods_of(job)[0])
    wrong["spec"]["containers"][0]["securityContext"]["allowPrivilegesEscalation"] = False
    with pytest.raises(kubernetes_validate.ValidationError):
        validate_pod(wrong)


def test_its_entrypoint_is_a_command_that_the_project_has(job: dict[str, Any]) -> None:
    program, name, *words = shlex.split(job["spec"]["entrypoint"])
    assert program == "diffusionclip"
    commands: Any = typer.main.get_command(app)
    options = commands.commands[name].make_context(name, words).params
    assert options["gpus"] > 0
    assert options["workers"] == job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["maxReplicas"]
    assert all(options[place].startswith("s3://") for place in ("input", "output"))
    worker = job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert options["cpus"] + 0.5 <= float(worker["cpu"])  # an actor and a task that reads ahead of it
    assert options["gpus"] <= float(worker["nvidia.com/gpu"])


def test_ray_start_has_the_flags_that_are_given(job: dict[str, Any]) -> None:
    """As KubeRay writes them: ``--name=value``, and only the name for ``"true"``."""
    for group in groups_of(job):
        flags = [f"--{name}" if value == "true" else f"--{name}={value}" for name, value in group["rayStartParams"].items()]
        start.make_context("start", flags)


def test_workers_go_from_none_to_many_and_the_head_runs_no_tasks(job: dict[str, Any]) -> None:
    head, *workers = groups_of(job)
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["enableInTreeAutoscaling"]
    assert {(group["minReplicas"], group["replicas"]) for group in workers} == {(0, 0)}
    assert all(group["maxReplicas"] > 0 for group in workers)
    assert (head["rayStartParams"]["num-cpus"], head["rayStartParams"]["num-gpus"]) == ("0", "0")
    assert "nvidia.com/gpu" not in head["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert 0 < cluster["autoscalerOptions"]["idleTimeoutSeconds"] <= 900


def test_nothing_is_left_running(job: dict[str, Any]) -> None:
    spec = job["spec"]
    assert spec["shutdownAfterJobFinishes"]
    assert spec["ttlSecondsAfterFinished"] <= 3600
    assert spec["activeDeadlineSeconds"] > 0


def test_no_pod_has_rights_that_it_does_not_need(job: dict[str, Any]) -> None:
    head, *others = pods_of(job)[1], pods_of(job)[0], *pods_of(job)[2:]
    for pod in pods_of(job):
        assert pod["spec"]["securityContext"]["runAsNonRoot"]
        assert pod["spec"]["securityContext"]["runAsUser"] == 1000
        assert not {"hostNetwork", "hostPID", "hostIPC"} & pod["spec"].keys()
        assert not any("hostPath" in volume for volume in pod["spec"].get("volumes", []))
    scaler = job["spec"]["rayClusterSpec"]["autoscalerOptions"]
    for container in [*containers_of(job), scaler]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
        assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    assert all(pod["spec"]["automountServiceAccountToken"] is False for pod in others)
    assert "automountServiceAccountToken" not in head["spec"]  # its autoscaler asks Kubernetes for workers


def test_ray_asks_for_a_token_and_is_not_reached_from_outside_the_cluster(job: dict[str, Any]) -> None:
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"


def test_credentials_come_from_a_secret_and_stand_nowhere_in_the_file(job: dict[str, Any]) -> None:
    for group in groups_of(job):
        (container,) = group["template"]["spec"]["containers"]
        assert container["envFrom"] == [{"secretRef": {"name": "diffusionclip-credentials"}}]
        assert not any(word in entry["name"] for entry in container["env"] for word in ("KEY", "TOKEN", "SECRET"))


def test_spilled_objects_have_a_disk_of_known_size(job: dict[str, Any]) -> None:
    for group in groups_of(job):
        spec = group["template"]["spec"]
        (container,) = spec["containers"]
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        room = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"]}
        top = "/" + group["rayStartParams"]["object-spilling-directory"].split("/")[1]
        assert gibibytes(room[mounts[top]]) < gibibytes(container["resources"]["limits"]["ephemeral-storage"])  # it counts towards it
        assert spec["securityContext"]["fsGroup"] == spec["securityContext"]["runAsGroup"]  # or it would be root's


def gibibytes(quantity: str) -> int:
    assert quantity.endswith("Gi")
    return int(quantity.removesuffix("Gi"))


def test_all_pods_have_the_image_of_this_version_with_the_ray_that_is_stated(job: dict[str, Any]) -> None:
    assert {container["image"] for container in containers_of(job)} == {f"<registry>/diffusionclip-ray:{version('diffusionclip-ray')}"}
    assert job["spec"]["rayClusterSpec"]["rayVersion"] == ray.__version__
