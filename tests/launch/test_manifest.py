"""What `launch gke` renders, read by Kubernetes' own client and by the fields that JobSet has.

No cluster runs it here. The client's models hold every field of batch/v1 and core/v1, with its type; what they do not
know they drop, so a manifest that comes back as it went in has no field that the API would refuse or ignore.
"""

import copy
import json
import re

import pytest
import yaml
from kubernetes import client

from bigmodel_jax import cli

# jobset.x-k8s.io/v1alpha2: field -> its fields, "map" of strings, a type, values it may have, or the client's model.
# https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/
ACTIONS = ("FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts")
REASONS = ("BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy")
JOBSET = {
    "apiVersion": ("jobset.x-k8s.io/v1alpha2",),
    "kind": ("JobSet",),
    "metadata": {"name": str, "namespace": str, "labels": "map", "annotations": "map"},
    "spec": {
        "suspend": bool,
        "ttlSecondsAfterFinished": int,
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "successPolicy": {"operator": ("All", "Any"), "targetReplicatedJobs": [str]},
        "startupPolicy": {"startupPolicyOrder": ("AnyOrder", "InOrder")},
        "failurePolicy": {
            "maxRestarts": int,
            "restartStrategy": ("Recreate", "BlockingRecreate"),
            "rules": [
                {"name": str, "action": ACTIONS, "onJobFailureReasons": [REASONS], "targetReplicatedJobs": [str]}
            ],
        },
        "replicatedJobs": [{"name": str, "replicas": int, "template": "V1JobTemplateSpec"}],
    },
}
NAME = r"[a-z]([-a-z0-9]*[a-z0-9])?"
TARGETS = {
    "gpus": ["--hardware", "h100", "--nodes", "4"],
    "tpu slices": ["--hardware", "v5e", "--nodes", "4", "--slices", "2", "--topology", "4x4"],
}


def rendered(capsys, argv) -> dict:
    common = ["--workdir", "gs://b/My_Run.1", "--image", "i:1", "--config", "configs/lm_tiny.py", "--dry-run"]
    cli.run(["launch", "gke", *argv, *common])
    return yaml.safe_load(capsys.readouterr().out)


def faults(value, form, path="") -> list[str]:
    """Where `value` is not of `form`."""
    if isinstance(form, dict):
        if not isinstance(value, dict):
            return [f"{path} is no object"]
        unknown = [f"{path}.{key} is unknown" for key in value if key not in form]
        return unknown + [f for key in value if key in form for f in faults(value[key], form[key], f"{path}.{key}")]
    if isinstance(form, list):
        if not isinstance(value, list):
            return [f"{path} is no list"]
        return [f for n, item in enumerate(value) for f in faults(item, form[0], f"{path}[{n}]")]
    if form == "map":
        fine = isinstance(value, dict) and all(isinstance(item, str) for pair in value.items() for item in pair)
        return [] if fine else [f"{path} is no map of strings"]
    if isinstance(form, tuple):
        return [] if value in form else [f"{path} = {value!r} is not one of {form}"]
    if isinstance(form, type):
        return [] if type(value) is form else [f"{path} = {value!r} is no {form.__name__}"]
    try:
        return changed(value, returned(value, form), path)
    except ValueError as error:
        return [f"{path}: {error}"]


def returned(value, model: str) -> dict:
    """`value` read by the client as `model` and written again."""
    api = client.ApiClient()
    return api.sanitize_for_serialization(api.deserialize(json.dumps(value), model, "application/json"))


def changed(before, after, path: str) -> list[str]:
    """Where the client's copy differs."""
    if isinstance(before, dict) and isinstance(after, dict):
        lost = [f"{path}.{key} is unknown" for key in before if key not in after]
        return lost + [f for key in before if key in after for f in changed(before[key], after[key], f"{path}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [f for n, (a, b) in pairs for f in changed(a, b, f"{path}[{n}]")]
    return [] if before == after and type(before) is type(after) else [f"{path} = {before!r} became {after!r}"]


@pytest.mark.parametrize("target", TARGETS)
def test_every_field_is_one_of_the_api(capsys, target):
    assert faults(rendered(capsys, TARGETS[target]), JOBSET) == []


BREAKS = {
    "spec.replicatedJobs.0.template.spec.paralelism": 4,
    "spec.replicatedJobs.0.template.spec.backoffLimit": "none",
    "spec.replicatedJobs.0.template.spec.template.spec.containers.0.envs": [],
    "spec.replicatedJobs.0.template.spec.template.spec.containers.0.env.0.value": 3,
    "spec.failurePolicy.maxRestart": 1,
    "spec.failurePolicy.rules.0.action": "Fail",
    "metadata.annotations": ["a"],
}


@pytest.mark.parametrize("where", BREAKS)
def test_control_a_wrong_field_is_seen(capsys, where):
    wrong = copy.deepcopy(rendered(capsys, TARGETS["gpus"]))
    *way, last = where.split(".")
    place = wrong
    for key in way:
        place = place[int(key) if key.isdigit() else key]
    place[last] = BREAKS[where]
    assert faults(wrong, JOBSET)


@pytest.mark.parametrize("target", TARGETS)
def test_what_the_api_server_would_check_besides(capsys, target):
    manifest = rendered(capsys, TARGETS[target])
    name, (group,) = manifest["metadata"]["name"], manifest["spec"]["replicatedJobs"]
    job = returned(group["template"], "V1JobTemplateSpec")["spec"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    longest = f"{name}-{group['name']}-{group['replicas'] - 1}-{job['completions'] - 1}"
    assert all(re.fullmatch(NAME, label) for label in (name, group["name"], container["name"])) and len(longest) <= 63
    # A policy for failed pods needs pods that are not restarted, codes in order, none of them 0, of a container it has.
    (rule,) = job["podFailurePolicy"]["rules"]
    codes = rule["onExitCodes"]
    assert pod["restartPolicy"] == "Never" and codes["containerName"] == container["name"]
    assert codes["values"] == sorted(set(codes["values"]) - {0}) and codes["operator"] == "In"
    assert job["completionMode"] == "Indexed" and job["parallelism"] == job["completions"]
    assert len({entry["name"] for entry in container["env"]}) == len(container["env"])
    assert all(("value" in entry) != ("valueFrom" in entry) for entry in container["env"])
    env = {entry["name"]: entry.get("value") for entry in container["env"]}
    if target == "gpus":  # the first pod, under the name that the headless service of a JobSet gives it
        assert env["BIGMODEL_COORDINATOR"].split(":")[0] == f"{name}-{group['name']}-0-0.{name}"
    else:  # every slice on a pool of nodes of its own
        topology = manifest["metadata"]["annotations"]["alpha.jobset.sigs.k8s.io/exclusive-topology"]
        assert topology == "cloud.google.com/gke-nodepool"
