"""A study on a Slurm cluster: a job array of runners, each of which takes cells until none is left.

The store keeps them apart, so a task may be requeued or preempted like any other job, and more tasks may join later.
"""

from __future__ import annotations

import argparse
import shlex
import sys

from bigmodel_jax.errors import InputError
from bigmodel_jax.launch import command as launching
from bigmodel_jax.launch import render
from bigmodel_jax.launch.hardware import hardware
from bigmodel_jax.study.store import Store


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    parser.add_argument("--slurm", type=int, default=0, metavar="N", help="run: as a Slurm job array of N runners")
    parser.add_argument("--sbatch", action="append", default=[], metavar="OPTION", help="slurm: a further #SBATCH")
    parser.add_argument("--hardware", default="cpu", help="slurm: decides flags, as of `bigmodel launch`")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="slurm: for every process")
    parser.add_argument("--grace", type=int, default=120, help="slurm: seconds to save and leave before a kill")
    parser.add_argument("--dry-run", action="store_true", help="slurm: show the job script, and nothing else")


def script(args: argparse.Namespace, store: Store) -> str:
    """The batch script of the array; its tasks work in <workdir>/runners/<task>."""
    if args.slurm < 1:
        raise InputError(f"--slurm {args.slurm} must be at least 1")
    environment = dict(hardware(args.hardware).environment)
    for text in args.env:
        name, equals, value = text.partition("=")
        if not equals or not name.isidentifier():
            raise InputError(f"--env '{text}' is not NAME=VALUE")
        environment[name] = value
    command = [
        sys.executable, "-m", "bigmodel_jax.cli", "study", "run", args.study, "--processes", str(args.processes),
        "--together", str(args.together), *(["--record"] if args.record else []),
        *(word for variant in args.only for word in ("--only", variant)),
        *(["--pilot", str(args.pilot)] if args.pilot else []),
    ]  # fmt: skip
    directives = [*(f"#SBATCH {option}" for option in args.sbatch), f"#SBATCH --array=0-{args.slurm - 1}"]
    return launching.slurm_script(
        command, str(store.workdir / "runners"), name=render.job_name(f"study-{store.study.name}"),
        environment=environment, grace_s=args.grace, directives=directives,
    )  # fmt: skip


def run(args: argparse.Namespace, store: Store) -> None:
    """Submit the array, or show it.

    Raises:
      InputError, RunError: options that do not fit; Slurm refuses.
    """
    text = script(args, store)
    if args.dry_run:
        print(text)
        return
    folder = store.workdir / "runners"
    (folder / "logs").mkdir(parents=True, exist_ok=True)
    # The last --workdir counts: the study's, where the script would give each task a folder of its own.
    (folder / "sweep.txt").write_text(f"--workdir={store.workdir}\n" * args.slurm)
    out = launching.submit(str(folder), text, "job.sbatch", ["sbatch", "--parsable"])
    follow = shlex.join(["bigmodel", "study", "status", args.study, "--workdir", args.workdir])
    print(f"submitted job {out} of {args.slurm} runners; follow it with: {follow}")
