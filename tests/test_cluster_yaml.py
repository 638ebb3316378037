"""What would be lost: a cluster that comes up on the first try, costs nothing when idle, and that no one else can reach.

``cluster.yaml`` is given to Ray's own launcher, as far as it goes without machines: its schema, its defaults, the options of
``ray start``, and its AWS provider against a simulated EC2.
"""

import json
import re
import shlex
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import boto3
import botocore.client
import cfnlint.api
import pyarrow as pa
import pytest
import ray.autoscaler._private.util as launcher
import yaml
from conftest import TinyDomain
from moto import mock_aws
from ray.autoscaler.tags import NODE_KIND_WORKER, TAG_RAY_NODE_KIND, TAG_RAY_NODE_NAME, TAG_RAY_USER_NODE_TYPE
from ray.scripts.scripts import start

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "cluster.yaml").read_text()
PORTS = re.compile(r"(?<!\d)(?:8265|10001)(?!\d)")
PLACES = {"REGION": "us-west-2", "ACCOUNT": "123456789012", "INPUT-BUCKET": "faces", "OUTPUT-BUCKET": "edits"}


@pytest.fixture
def config() -> dict[str, Any]:
    """With the defaults that Ray fills in."""
    return launcher.prepare_config(yaml.safe_load(TEXT))


def head_of(config: dict[str, Any]) -> dict[str, Any]:
    return config["available_node_types"][config["head_node_type"]]


def workers_of(config: dict[str, Any]) -> dict[str, Any]:
    return {name: kind for name, kind in config["available_node_types"].items() if name != config["head_node_type"]}


def start_options(command: str) -> dict[str, Any]:
    """As ``ray start`` itself understands them. Raises click's error for an option that it does not have."""
    words = shlex.split(command.rpartition(";")[2])
    words = words[words.index("ray") :]
    assert words[:2] == ["ray", "start"]
    return start.make_context("start", [word.replace("$RAY_HEAD_IP", "10.0.0.1") for word in words[2:]]).params


def test_the_launcher_accepts_it(config: dict[str, Any]) -> None:
    launcher.validate_config(config)
    with pytest.raises(Exception, match="Additional properties"):
        launcher.validate_config({**config, "idle_timeout": 10})


def test_the_head_runs_no_tasks_and_without_work_there_is_nothing_but_the_head(config: dict[str, Any]) -> None:
    assert head_of(config)["resources"] == {"CPU": 0, "GPU": 0}
    assert head_of(config)["max_workers"] == 0
    assert {kind["min_workers"] for kind in workers_of(config).values()} == {0}
    assert all(0 < kind["max_workers"] <= config["max_workers"] for kind in workers_of(config).values())
    assert 0 < config["idle_timeout_minutes"] <= 15


def test_workers_are_spot_machines_that_are_ended_and_the_head_is_not_one(config: dict[str, Any]) -> None:
    assert all(kind["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"} for kind in workers_of(config).values())
    assert "InstanceMarketOptions" not in head_of(config)["node_config"]
    assert config["provider"]["cache_stopped_nodes"] is False
    assert config["provider"]["availability_zone"].count(",") >= 1


def test_nothing_of_rays_defaults_is_installed_or_run(config: dict[str, Any]) -> None:
    """They would install a nightly build of Ray where there is none on the path."""
    assert [config[name] for name in ("setup_commands", "head_setup_commands", "worker_setup_commands")] == [[], [], []]
    assert [re.sub(r"/mnt/\S+", "DIR", command) for command in config["initialization_commands"]] == [
        "sudo mkdir -p DIR && sudo chown 1000:1000 DIR"
    ]
    for role in ("head", "worker"):
        stop, begin = config[f"{role}_start_ray_commands"]
        assert stop == "ray stop"
        assert begin.startswith("ulimit -n 65536; RAY_AUTH_MODE=token ray start ")


def test_the_dashboard_is_the_heads_own_and_ray_asks_everybody_for_the_token(config: dict[str, Any]) -> None:
    options = start_options(config["head_start_ray_commands"][-1])
    assert options["head"]
    assert options["dashboard_host"] == "127.0.0.1"
    assert options["autoscaling_config"] == "~/ray_bootstrap_config.yaml"
    assert options["ray_client_server_port"] is None
    assert start_options(config["worker_start_ray_commands"][-1])["address"] == "10.0.0.1:6379"
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "--env RAY_AUTH_MODE=token" in config["docker"]["run_options"]


def test_no_port_is_opened_but_by_security_groups_of_ones_own(config: dict[str, Any]) -> None:
    """Without them Ray makes one that lets the whole world knock at ssh."""
    assert all(kind["node_config"]["SecurityGroupIds"] for kind in config["available_node_types"].values())
    assert "security_group" not in config["provider"]
    settings = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#"))
    assert "0.0.0.0" not in settings
    assert not PORTS.search(settings)
    options = config["docker"]["run_options"]
    assert not any(word in option for option in options for word in ("--publish", "-p ", "--privileged", "docker.sock"))


def test_instances_answer_only_who_has_a_session_token_of_their_metadata(config: dict[str, Any]) -> None:
    assert all(kind["node_config"]["MetadataOptions"] == {"HttpTokens": "required"} for kind in config["available_node_types"].values())


def test_spilled_objects_go_to_a_disk_with_room_for_them(config: dict[str, Any]) -> None:
    """The container's own file system is no such place."""
    mounts = dict(re.findall(r"--volume (\S+):(\S+)", " ".join(config["docker"]["run_options"])))
    for role in ("head", "worker"):
        spill = start_options(config[f"{role}_start_ray_commands"][-1])["object_spilling_directory"]
        host = [where for where, inside in mounts.items() if spill.startswith(f"{inside}/")]
        assert len(host) == 1
        assert host[0] in config["initialization_commands"][0]  # or docker would make it, and root would own it
    assert all(disk_of(kind) >= 200 for kind in workers_of(config).values())


def disk_of(kind: dict[str, Any]) -> int:
    disks = [mapping["Ebs"] for mapping in kind["node_config"]["BlockDeviceMappings"]]
    assert all(disk["Encrypted"] for disk in disks)
    return sum(disk["VolumeSize"] for disk in disks)


def test_the_image_is_this_version_of_the_project(config: dict[str, Any]) -> None:
    assert config["docker"]["image"].endswith(f"/diffusionclip-ray:{version('diffusionclip-ray')}")
    assert config["docker"]["pull_before_run"]


def test_only_workers_with_gpus_are_given_gpus(config: dict[str, Any]) -> None:
    assert not any("gpu" in option for option in config["docker"]["run_options"])
    assert all("--gpus all" in kind["docker"]["worker_run_options"] for kind in workers_of(config).values())


# ---- permissions -----------------------------------------------------------------------------------------------------


def policy(name: str, fill: bool = True) -> dict[str, Any]:
    text = (ROOT / "deploy" / name).read_text()
    for place, value in PLACES.items() if fill else ():
        text = text.replace(place, value)
    return json.loads(text)


def actions_of(statements: list[dict[str, Any]]) -> set[str]:
    return {action for s in statements for action in ([s["Action"]] if isinstance(s["Action"], str) else s["Action"])}


POLICIES = ("iam-head.json", "iam-data.json")


@pytest.mark.parametrize("name", POLICIES)
def test_aws_knows_every_action_and_resource_of_a_policy(name: str) -> None:
    def complaints(document: dict[str, Any]) -> list[str]:
        resource = {"Type": "AWS::IAM::ManagedPolicy", "Properties": {"PolicyDocument": document}}
        found = cfnlint.api.lint_all(json.dumps({"Resources": {"Policy": resource}}))
        return [str(match) for match in found if match.rule.id != "I4010"]  # that one is about templates

    assert complaints(policy(name)) == []
    wrong = policy(name)
    wrong["Statement"][0]["Action"] = "ec2:DescribeInstance"
    assert complaints(wrong)


@pytest.mark.parametrize("name", POLICIES)
def test_a_policy_names_what_it_is_about(name: str) -> None:
    for statement in policy(name)["Statement"]:
        assert not any("*" in action for action in actions_of([statement]))
        if statement["Resource"] == "*":  # AWS has no finer one for looking at machines
            assert all(action.startswith("ec2:Describe") for action in actions_of([statement]))


def test_what_ends_or_starts_machines_is_limited_to_those_of_this_cluster() -> None:
    name = yaml.safe_load(TEXT)["cluster_name"]
    for statement in policy("iam-head.json")["Statement"]:
        if actions_of([statement]) & {"ec2:TerminateInstances"} or statement["Resource"] == "arn:aws:ec2:us-west-2:123456789012:instance/*":
            tags = [value for key, value in statement["Condition"]["StringEquals"].items() if key.endswith("/ray-cluster-name")]
            assert tags == [name] or "ec2:CreateAction" in statement["Condition"]["StringEquals"]


NEEDS = {
    "HeadBucket": "s3:ListBucket",
    "ListObjectsV2": "s3:ListBucket",
    "HeadObject": "s3:GetObject",
    "GetObject": "s3:GetObject",
    "PutObject": "s3:PutObject",
    "CopyObject": "s3:PutObject",
    "CreateMultipartUpload": "s3:PutObject",
    "UploadPart": "s3:PutObject",
    "CompleteMultipartUpload": "s3:PutObject",
    "AbortMultipartUpload": "s3:AbortMultipartUpload",
    "DeleteObject": "s3:DeleteObject",
    "DeleteObjects": "s3:DeleteObject",
}
"""What S3 asks for before it does something."""


def test_a_run_on_s3_needs_no_more_than_the_permissions_for_data(
    s3: str, tiny_domain: TinyDomain, save_pictures: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    import fsspec
    from aiobotocore.client import AioBaseClient

    from pipeline.config import Run, Source
    from pipeline.dataset import audit
    from pipeline.plan import make_plan
    from pipeline.schema import latents_schema
    from pipeline.sources import read_block
    from pipeline.worker import write_file

    store, domain = fsspec.filesystem("s3"), tiny_domain()
    store.put(str(save_pictures("a.png", "b.png")), f"{s3}/iam/in", recursive=True)
    asked: dict[str, set[str]] = {"in": set(), "out": set()}
    plain = AioBaseClient._make_api_call

    async def counted(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        side = "in" if "iam/in" in str(arguments) else "out"
        asked[side].add(NEEDS.get(operation, operation))
        return await plain(client, operation, arguments)

    monkeypatch.setattr(AioBaseClient, "_make_api_call", counted)
    run = Run(source=Source(path=f"{s3}/iam/in"), output=f"{s3}/iam/out", domain=domain, recipe=domain.recipe, overwrite=True)
    for _ in range(2):
        store.invalidate_cache()
        plan = make_plan(run)
        (block,) = plan.blocks
        rows = read_block(plan.found, block).select(["id", "image"])
        columns = latents_schema(plan.found.user_columns, domain.image_size, {})
        nothing = {name: pa.nulls(len(rows), columns.field(name).type) for name in ("latent", "error")}
        write_file(
            run.output, "part-000000000000.parquet", pa.table({**dict(zip(rows.column_names, rows.columns, strict=True)), **nothing})
        )
        audit(plan.input_ids, run.output)

    data = policy("iam-data.json")["Statement"]
    allowed = {side: actions_of([s for s in data if bucket in str(s["Resource"])]) for side, bucket in (("in", "faces"), ("out", "edits"))}
    assert "s3:GetObject" in asked["in"]
    assert {"s3:PutObject", "s3:DeleteObject"} <= asked["out"]
    assert asked["in"] <= allowed["in"]
    assert asked["out"] <= allowed["out"]


Account = dict[str, Any]


@pytest.fixture
def account(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Account]:
    """``cluster.yaml`` in a simulated account where everything that it asks for is prepared."""
    monkeypatch.setenv("HOME", str(tmp_path))  # the launcher leaves a key for ssh there
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.delenv("AWS_ENDPOINT_URL", raising=False)
    simulated = mock_aws()
    simulated.start(reset=False)  # other tests have buckets in the same process
    try:
        ec2, iam = boto3.resource("ec2", "us-west-2"), boto3.client("iam")
        network = ec2.create_vpc(CidrBlock="10.0.0.0/16")
        subnet = network.create_subnet(CidrBlock="10.0.1.0/24", AvailabilityZone="us-west-2a")
        subnet.meta.client.modify_subnet_attribute(SubnetId=subnet.id, MapPublicIpOnLaunch={"Value": True})
        group = network.create_security_group(GroupName=tmp_path.name, Description="ours")
        machine = next(iter(ec2.images.all()))
        profiles = [iam.create_instance_profile(InstanceProfileName=f"{tmp_path.name}-{role}") for role in ("head", "worker")]
        arns = [profile["InstanceProfile"]["Arn"] for profile in profiles]
        text = TEXT
        for pattern, value in (
            (r"<subnet[^>]*>", subnet.id),
            (r"<security group[^>]*>", group.id),
            (r"<ami[^>]*>", machine.id),
            (r"<instance profile with deploy/iam-head[^>]*>", arns[0]),
            (r"<instance profile[^>]*>", arns[1]),
            (r"<registry>", "example"),
        ):
            text = re.sub(pattern, value, text)
        filled = yaml.safe_load(text)
        assert "<" not in json.dumps(filled)
        yield {"config": launcher.prepare_config(filled), "group": group.id, "profiles": arns}
    finally:
        simulated.stop(remove_data=False)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is asked of AWS, as IAM calls it."""
    made: list[str] = []
    plain = botocore.client.BaseClient._make_api_call

    def counted(client: Any, operation: str, arguments: dict[str, Any]) -> Any:
        made.append(f"{client.meta.service_model.service_name}:{operation}")
        return plain(client, operation, arguments)

    monkeypatch.setattr(botocore.client.BaseClient, "_make_api_call", counted)
    return made


def test_rays_provider_starts_and_ends_a_spot_worker_with_no_more_than_the_heads_permissions(account: Account, calls: list[str]) -> None:
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    ready = AWSNodeProvider.bootstrap_config(account["config"])
    ready = AWSNodeProvider.fillout_available_node_types_resources(ready)
    calls.clear()  # what came before is done by the person who runs ray up

    (name, worker), *_ = workers_of(ready).items()
    assert worker["resources"]["GPU"] == 1
    provider = AWSNodeProvider(ready["provider"], ready["cluster_name"])
    tags = {TAG_RAY_NODE_KIND: NODE_KIND_WORKER, TAG_RAY_USER_NODE_TYPE: name, TAG_RAY_NODE_NAME: "worker"}
    provider.create_node(worker["node_config"], tags, 1)
    (node,) = provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER})
    provider.set_node_tags(node, {"ray-node-status": "up-to-date"})
    machine = boto3.resource("ec2", "us-west-2").Instance(node)
    assert machine.instance_lifecycle == "spot"
    assert [group["GroupId"] for group in machine.security_groups] == [account["group"]]
    assert {tag["Key"]: tag["Value"] for tag in machine.tags}["ray-cluster-name"] == "diffusionclip"
    provider.terminate_node(node)
    assert provider.non_terminated_nodes({TAG_RAY_NODE_KIND: NODE_KIND_WORKER}) == []
    assert "ec2:RunInstances" in calls
    assert set(calls) <= actions_of(policy("iam-head.json")["Statement"])


def test_bringing_up_the_head_makes_no_role_and_opens_no_port(account: Account, calls: list[str]) -> None:
    """Ray's default role may do everything in EC2 and S3, its default security group lets everybody knock at ssh."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider

    ready = AWSNodeProvider.bootstrap_config(account["config"])
    changes = {call for call in calls if not call.startswith("ec2:Describe")}
    assert changes <= {"ec2:CreateKeyPair"}
    assert head_of(ready)["node_config"]["IamInstanceProfile"] == {"Arn": account["profiles"][0]}
