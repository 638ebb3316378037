"""cluster.yaml is what ``ray up`` reads on a bad day: it must fit the launcher's own schema."""

import json
from pathlib import Path

import jsonschema
import ray.autoscaler
import yaml

ROOT = Path(__file__).parent.parent


def test_cluster_yaml_fits_the_schema_of_rays_cluster_launcher():
    schema = json.loads((Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text())
    jsonschema.validate(yaml.safe_load((ROOT / "cluster.yaml").read_text()), schema)


def test_the_head_runs_no_gpu_work_and_workers_can_go_to_zero():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    types = config["available_node_types"]
    assert types[config["head_node_type"]]["resources"]["GPU"] == 0
    assert [t["min_workers"] for t in types.values()] == [0, 0]


def test_the_dashboard_listens_on_loopback_only_and_ray_asks_for_a_token():
    config = yaml.safe_load((ROOT / "cluster.yaml").read_text())
    start = config["head_start_ray_commands"][-1]
    assert "--dashboard-host=127.0.0.1" in start
    assert all("RAY_AUTH_MODE=token" in c for c in (start, config["worker_start_ray_commands"][-1]))
