"""`bigmodel launch local|slurm|gke|tpu-vm`: render what runs, show or submit it, record the submission."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from bigmodel_jax.errors import InputError, RunError
from bigmodel_jax.launch import render
from bigmodel_jax.launch.hardware import HARDWARE, hardware
from bigmodel_jax.launch.supervisor import Job, Supervisor

DEVICES_FLAG = "--xla_force_host_platform_device_count"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the verb's options."""
    parser.add_argument("where", choices=("local", "slurm", "gke", "tpu-vm"))
    parser.add_argument("--config", required=True, help="FILE.py or FILE.py:ARG")
    parser.add_argument("--workdir", required=True, help="directory of the run, seen by all machines")
    parser.add_argument("--allow-config-change", action="store_true")
    parser.add_argument("--dry-run", action="store_true", help="show what would run, and nothing else")
    parser.add_argument("--hardware", default="cpu", help=f"of {', '.join(HARDWARE)}: decides flags")
    parser.add_argument("--name", default="", help="of the job, default from config and workdir")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="for every process")
    parser.add_argument("--grace", type=int, default=120, help="seconds to save and leave before a kill")
    parser.add_argument("--processes", type=int, default=1, help="local: processes on this machine")
    parser.add_argument("--devices-per-process", type=int, default=0, help="cpu: simulated devices of a process")
    parser.add_argument("--per-gpu", action="store_true", help="local, slurm: one process per GPU, not per machine")
    parser.add_argument("--nodes", type=int, default=1, help="slurm: machines; gke: hosts of a slice")
    parser.add_argument("--tasks-per-node", type=int, default=0, help="slurm: processes of a machine, default 1")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="slurm: a further #SBATCH")
    parser.add_argument("--sweep", action="append", default=[], metavar="LEAF=V,V", help="slurm: a job array")
    parser.add_argument("--parallel", type=int, default=0, help="slurm: array tasks at a time, 0 for all")
    parser.add_argument("--image", default="", help="gke: container image with this repository")
    parser.add_argument("--directory", default="", help="working directory there, default this one")
    parser.add_argument("--slices", type=int, default=1, help="gke: slices, or groups of machines")
    parser.add_argument("--topology", default="", help="gke: TPU topology, for example 4x4")
    parser.add_argument("--tpu", default="", help="tpu-vm: its name")
    parser.add_argument("--project", default="")
    parser.add_argument("--zone", default="")


def launch(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Carry out the verb.

    Raises:
      InputError: options that do not fit. RunError: the job or the submission failed.
    """
    if args.sweep and args.where != "slurm":
        raise InputError("--sweep makes a job array, which only slurm has; for other places loop over overrides")
    _check(args, overrides)
    {"local": _local, "slurm": _slurm, "gke": _gke, "tpu-vm": _tpu_vm}[args.where](args, overrides)


def _check(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    """A typo is answered here, not by a job that has waited in a queue."""
    from bigmodel_jax import experiment

    raw = experiment.read(args.config)
    for point in render.sweep(args.sweep):
        experiment.resolve(raw, [*overrides, *point])


def _environment(args: argparse.Namespace) -> dict[str, str]:
    env = dict(hardware(args.hardware).environment)
    if args.devices_per_process:
        if args.hardware != "cpu":
            raise InputError("--devices-per-process simulates devices on cpu; other hardware has its own")
        env["XLA_FLAGS"] = f"{DEVICES_FLAG}={args.devices_per_process}"
    for text in args.env:
        name, equals, value = text.partition("=")
        if not equals or not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise InputError(f"--env '{text}' is not NAME=VALUE")
        env[name] = value
    return env


def _command(args: argparse.Namespace, overrides: Sequence[str], python: str) -> list[str]:
    change = ["--allow-config-change"] if args.allow_config_change else []
    return [python, "-m", "bigmodel_jax.cli", "train", "--config", args.config, *change, *overrides]


def _gpus(args: argparse.Namespace) -> int:
    """Processes of a machine: one, or one per GPU."""
    if not args.per_gpu:
        return 1
    if hardware(args.hardware).resource != "nvidia.com/gpu":
        raise InputError(f"--per-gpu needs GPU hardware, not '{args.hardware}'")
    return hardware(args.hardware).devices


def _local(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    if args.processes < 1:
        raise InputError(f"--processes {args.processes} must be at least 1")
    count = max(args.processes, _gpus(args))
    workdir = Path(args.workdir).absolute()
    command = [*_command(args, overrides, sys.executable), "--workdir", str(workdir)]
    own = {n: {"BIGMODEL_LOCAL_DEVICES": str(n)} for n in range(count)} if args.per_gpu else {}
    job = Job(command, count, workdir, _environment(args), own, stop_s=args.grace)
    if args.dry_run:
        print(f"{render.exports(job.environment)}\n{count} x {shlex.join(command)}")
        return
    code = Supervisor(job).run()
    if code:
        # The run has said why; the launcher only passes its status on.
        raise SystemExit(code)


def _slurm(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    tasks = args.tasks_per_node or _gpus(args)
    points = render.sweep(args.sweep)
    workdir = os.path.abspath(args.workdir)
    directives = [f"#SBATCH {option}" for option in args.sbatch]
    if args.sweep:
        limit = f"%{args.parallel}" if args.parallel else ""
        directives.append(f"#SBATCH --array=0-{len(points) - 1}{limit}")
    script = slurm_script(
        _command(args, overrides, sys.executable),
        workdir,
        name=_name(args),
        nodes=args.nodes,
        tasks=tasks,
        grace_s=args.grace,
        directives=directives,
        environment=_environment(args),
        directory=args.directory,
        per_gpu=args.per_gpu,
    )
    if args.dry_run:
        print(script)
        return
    (Path(workdir) / "logs").mkdir(parents=True, exist_ok=True)
    if args.sweep:
        (Path(workdir) / "sweep.txt").write_text("".join(" ".join(point) + "\n" for point in points))
    out = submit(args.workdir, script, "job.sbatch", ["sbatch", "--parsable"])
    print(f"submitted job {out}; follow it with: bigmodel status {shlex.quote(args.workdir)}")


def slurm_script(
    command: Sequence[str], workdir: str, *, name: str, environment: Mapping[str, str], nodes: int = 1, tasks: int = 1,
    grace_s: int = 120, directives: Sequence[str] = (), directory: str = "", per_gpu: bool = False,
) -> str:  # fmt: skip
    """The batch script that runs `command --workdir WORKDIR` as one job.

    Of a job array, each task runs in WORKDIR/<task> with the arguments of its line of WORKDIR/sweep.txt behind.
    """
    return render.fill("slurm.sbatch", {
        "name": name, "nodes": str(nodes), "tasks_per_node": str(tasks), "grace_s": str(grace_s),
        "logs": _plain(workdir) + "/logs", "directives": "\n".join(directives),
        "directory": shlex.quote(directory or os.getcwd()), "exports": render.exports(environment),
        "workdir": shlex.quote(workdir), "wait_s": "30", "command": shlex.join(command),
        "local_devices": "\n  export BIGMODEL_LOCAL_DEVICES=$SLURM_LOCALID" if per_gpu else "",
        "python": shlex.quote(sys.executable),
    })  # fmt: skip


# A slice of TPUs is a pool of nodes: each job of the set gets one for itself.
_OWN_POOL = "\n  annotations:\n    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool"


def _gke(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    machine = hardware(args.hardware)
    if not machine.resource or not args.image:
        raise InputError("gke needs --image and --hardware of GPUs or TPUs")
    selector = {"cloud.google.com/gke-accelerator": machine.accelerator}
    environment = _environment(args)
    if machine.resource == "google.com/tpu":
        if not args.topology:
            raise InputError("gke with TPUs needs --topology, for example 4x4")
        selector = {
            "cloud.google.com/gke-tpu-accelerator": machine.accelerator,
            "cloud.google.com/gke-tpu-topology": args.topology,
        }  # fmt: skip
        environment |= {"BIGMODEL_COORDINATOR": "auto"}
        fields, placement = "", _OWN_POOL
    else:
        name, placement = _name(args), ""
        environment |= {
            "BIGMODEL_COORDINATOR": f"{name}-worker-0-0.{name}:8476",
            "BIGMODEL_NUM_PROCESSES": str(args.nodes * args.slices),
        }  # fmt: skip
        if args.slices > 1:
            raise InputError("gke with GPUs: one group of --nodes machines; --slices is for TPUs")
        fields = _indent(
            "- name: BIGMODEL_PROCESS_ID\n  valueFrom:\n    fieldRef:\n"
            "      fieldPath: metadata.annotations['batch.kubernetes.io/job-completion-index']", 20,
        )  # fmt: skip
    pairs = "\n".join(f"- name: {key}\n  value: {json.dumps(value)}" for key, value in environment.items())
    text = render.fill("gke_jobset.yaml", {
        "name": _name(args), "placement": placement, "restarts": "100",
        "slices": str(args.slices), "hosts": str(args.nodes),
        "grace_s": str(args.grace), "image": args.image, "directory": args.directory or "/bigmodel_jax",
        "selector": _indent("\n".join(f"{key}: {value}" for key, value in selector.items()), 16),
        "command": shlex.join(_command(args, overrides, "python")), "workdir": shlex.quote(args.workdir),
        "environment": "\n".join(filter(None, (_indent(pairs, 20), fields))),
        "resource": machine.resource, "chips": str(machine.devices),
    })  # fmt: skip
    if args.dry_run:
        print(text)
        return
    print(submit(args.workdir, text, "jobset.yaml", ["kubectl", "apply", "-f"]))


def _tpu_vm(args: argparse.Namespace, overrides: Sequence[str]) -> None:
    if not (args.tpu and args.project and args.zone):
        raise InputError("tpu-vm needs --tpu, --project and --zone")
    command = shlex.join(_command(args, overrides, "python3"))
    if "'" in command + args.workdir + args.directory:
        raise InputError("tpu-vm passes the command through two shells: no quotes or spaces in it, please")
    text = render.fill("tpu_vm.sh", {
        "tpu": shlex.quote(args.tpu), "project": shlex.quote(args.project), "zone": shlex.quote(args.zone),
        "directory": args.directory or "~/bigmodel_jax", "workdir": args.workdir, "python": "python3",
        "exports": "\n".join(f'export {k}="{v}"' for k, v in _environment(args).items()), "command": command,
    })  # fmt: skip
    if args.dry_run:
        print(text)
        return
    print(submit(args.workdir, text, "tpu_vm.sh", ["bash"]))


def _name(args: argparse.Namespace) -> str:
    return render.job_name(args.name or f"{Path(args.config.partition(':')[0]).stem}-{Path(args.workdir).name}")


def _plain(path: str) -> str:
    """A path for a comment directive, where no quoting exists."""
    if re.search(r"[\s'\"\\]", path):
        raise InputError(f"--workdir '{path}': a job script needs a path without spaces or quotes")
    return path


def _indent(text: str, spaces: int) -> str:
    return "\n".join(" " * spaces + line for line in text.splitlines())


def submit(workdir: str, text: str, name: str, command: list[str]) -> str:
    """Write the file, hand it to the cluster's own command, record both; that command's answer."""
    folder = Path(workdir).absolute() / "launch" if "://" not in workdir else Path.cwd() / "launches"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(text)
    try:
        done = subprocess.run([*command, str(path)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise InputError(f"no '{command[0]}' on this machine; the file to submit is {path}") from None
    record = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "command": sys.argv,
        "submit": [*command, str(path)], "status": done.returncode, "answer": (done.stdout + done.stderr).strip(),
    }  # fmt: skip
    with open(folder / "submissions.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    if done.returncode:
        raise RunError(f"{command[0]} refused {path}: {' '.join(done.stderr.split())[:300]}")
    return done.stdout.strip()
