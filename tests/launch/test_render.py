"""What the launchers hand to a cluster: rendered, parsed back, and refused where it makes no sense."""

from __future__ import annotations

import json
import subprocess

import pytest
import yaml

from bigmodel_jax import cli
from bigmodel_jax.errors import InputError
from bigmodel_jax.launch import render
from bigmodel_jax.launch.hardware import HARDWARE, hardware

COMMON = ["--config", "configs/lm_tiny.py"]


def shown(capsys, *argv: str) -> str:
    cli.run(["launch", *argv, *COMMON, "--dry-run"])
    return capsys.readouterr().out


def test_slurm_script(capsys, tmp_path):
    text = shown(
        capsys, "slurm", "--workdir", str(tmp_path / "r"), "--nodes", "3", "--hardware", "h100",
        "--sbatch=--partition=big", "--config.optimizer.lr=1e-3", "--grace", "90", "--per-gpu",
    )  # fmt: skip
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    lines = text.splitlines()
    for line in (
        "#SBATCH --nodes=3", "#SBATCH --ntasks-per-node=8", "#SBATCH --requeue", "#SBATCH --signal=TERM@90",
        "#SBATCH --partition=big",
    ):  # fmt: skip
        assert line in lines
    assert "--config.optimizer.lr=1e-3" in text and "BIGMODEL_LOCAL_DEVICES=$SLURM_LOCALID" in text
    assert "export XLA_FLAGS='" + HARDWARE["h100"].environment["XLA_FLAGS"] + "'" in text
    assert not (tmp_path / "r").exists()  # a dry run touches nothing


def test_sweeps_are_a_grid_one_line_each():
    points = render.sweep(["optimizer.lr=1e-3,3e-4", "seed=0,1,2"])
    assert len(points) == 6
    assert points[0] == ["--config.optimizer.lr=1e-3", "--config.seed=0"]
    assert points[-1] == ["--config.optimizer.lr=3e-4", "--config.seed=2"]
    for wrong in (["lr"], ["seed=1", "seed=2"], ["a=1, 2"]):
        with pytest.raises(InputError, match="--sweep"):
            render.sweep(wrong)


def jobset(capsys, *argv: str) -> dict:
    return yaml.safe_load(shown(capsys, "gke", "--workdir", "gs://b/r", "--image", "i:1", *argv))


def test_gke_jobset_on_gpus(capsys):
    found = jobset(capsys, "--hardware", "h100", "--nodes", "4", "--name", "try")
    (group,) = found["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert (group["replicas"], job["parallelism"], job["completions"]) == (1, 4, 4)
    assert job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"] == [2, 76]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    env = {entry["name"]: entry for entry in container["env"]}
    assert env["BIGMODEL_COORDINATOR"]["value"] == "try-worker-0-0.try:8476"
    assert env["BIGMODEL_NUM_PROCESSES"]["value"] == "4"
    assert "job-completion-index" in env["BIGMODEL_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    assert pod["restartPolicy"] == "Never" and pod["nodeSelector"]["cloud.google.com/gke-accelerator"]
    assert "--workdir gs://b/r" in container["args"][0]


def test_gke_jobset_on_tpu_slices(capsys):
    found = jobset(capsys, "--hardware", "v5e", "--nodes", "4", "--slices", "2", "--topology", "4x4")
    (group,) = found["spec"]["replicatedJobs"]
    pod = group["template"]["spec"]["template"]["spec"]
    assert group["replicas"] == 2
    assert pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x4"
    assert {"name": "BIGMODEL_COORDINATOR", "value": "auto"} in pod["containers"][0]["env"]


def test_tpu_vm_script(capsys):
    text = shown(
        capsys, "tpu-vm", "--workdir", "gs://b/r", "--hardware", "v5p", "--tpu", "t", "--project", "p", "--zone", "z"
    )
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert "--worker=all" in text and "--workdir gs://b/r" in text and "LIBTPU_INIT_ARGS" in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["local", "--workdir", "r", "--processes", "0"], "at least 1"),
        (["local", "--workdir", "r", "--hardware", "h10"], "did you mean 'h100'"),
        (["local", "--workdir", "r", "--hardware", "h100", "--devices-per-process", "2"], "simulates"),
        (["local", "--workdir", "r", "--per-gpu"], "needs GPU hardware"),
        (["local", "--workdir", "r", "--sweep", "seed=1,2"], "only slurm"),
        (["local", "--workdir", "r", "--env", "A"], "NAME=VALUE"),
        (["slurm", "--workdir", "a b"], "without spaces"),
        (["gke", "--workdir", "r"], "--image"),
        (["gke", "--workdir", "r", "--image", "i", "--hardware", "v5e"], "--topology"),
        (["tpu-vm", "--workdir", "r"], "--tpu"),
        (["slurm", "--workdir", "r", "--config.optimizer.lrr=1"], "did you mean 'lr'"),
        (["slurm", "--workdir", "r", "--sweep", "optimizer.lr=1e-3,fast"], "optimizer.lr"),
    ],
)
def test_options_that_do_not_fit(argv, says):
    with pytest.raises(InputError, match=says):
        cli.run(["launch", *argv, *COMMON, "--dry-run"])


def test_templates_and_values_must_match(tmp_path, monkeypatch):
    monkeypatch.setattr(render, "TEMPLATES", tmp_path)
    (tmp_path / "t").write_text("a {{one}} {{two}}")
    assert render.fill("t", {"one": "1", "two": "2"}) == "a 1 2"
    with pytest.raises(KeyError, match="two"):
        render.fill("t", {"one": "1"})
    with pytest.raises(InputError, match="no template"):
        render.fill("missing", {})


def test_hardware_is_data():
    assert "latency_hiding" in hardware("h200").environment["XLA_FLAGS"]
    assert json.dumps({name: row.environment for name, row in HARDWARE.items()})
