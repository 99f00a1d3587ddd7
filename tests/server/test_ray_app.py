"""The Ray Serve application, as far as it shows without a cluster; benchmarks/replicas.py runs a real one."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

pytest.importorskip("ray.serve")

from curkv.config import Settings
from curkv.server.ray_app import app


def test_arguments_are_split_into_scale_and_settings() -> None:
    deployment = app(
        {"min_replicas": "2", "max_replicas": "4", "cpus": "2", "kv_policy": "curdkv", "kv_budget": "25%"}
    )._bound_deployment
    scaling = deployment._deployment_config.autoscaling_config
    assert (scaling.min_replicas, scaling.max_replicas) == (2, 4)
    assert deployment.ray_actor_options == {"num_cpus": 2, "num_gpus": 0}
    assert deployment.init_args == (Settings(kv_policy="curdkv", kv_budget="25%"),)
    assert "ConsistentHashRouter" in str(deployment._deployment_config.request_router_config)


@pytest.mark.parametrize("wrong", [{"min_replicas": "0"}, {"replicas": "2"}, {"kv_cache_memory": "much"}])
def test_an_unknown_or_bad_argument_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValidationError):
        app(wrong)
