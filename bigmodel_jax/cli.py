"""The `bigmodel` command. Imports live inside the verbs, so that a typo is answered at once.

Errors are one line on stderr and a distinct exit code (errors.py).
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence

from bigmodel_jax.errors import InputError, RunError, nearest


class _Parser(argparse.ArgumentParser):
    """argparse, with its errors in one line like every other."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser(chosen: str = "") -> _Parser:
    parser = _Parser(prog="bigmodel", description="Pretrain, evaluate and sample models in JAX.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, text: str, config: bool = True) -> argparse.ArgumentParser:
        sub = verbs.add_parser(name, help=text, description=text, allow_abbrev=False)
        if config:
            sub.add_argument("--config", required=name != "prepare", help="FILE.py or FILE.py:ARG")
        return sub

    train = verb("train", "Train an experiment, or continue it.")
    train.add_argument("--workdir", required=True, help="directory of the run")
    train.add_argument("--allow-config-change", action="store_true", help="go on although the config changed")
    lanes = train.add_mutually_exclusive_group()
    lanes.add_argument("--seeds", default="", metavar="N,N", help="as one program; each run is WORKDIR/seed-N")
    lanes.add_argument("--lanes", default="", metavar="FILE", help="runs as one program, see train_lanes.py")
    evaluate = verb("eval", "Evaluate the latest checkpoint of a run.", config=False)
    evaluate.add_argument("--workdir", required=True)
    evaluate.add_argument("--step", type=int, help="checkpoint step, default the latest")
    evaluate.add_argument("--out", default="", help="directory for eval.json, page and plots, default WORKDIR/eval")
    evaluate.add_argument("--json", action="store_true", help="print eval.json instead of a table")
    evaluate.add_argument("--context", type=int, default=0, help="causal LM: tokens of a window, default data.length")
    evaluate.add_argument("--stride", type=int, default=0, help="new tokens in each window, default half the context")
    evaluate.add_argument("--resamples", type=int, default=1000, help="of the bootstrap intervals")
    evaluate.add_argument("--length", type=int, default=0, help="new tokens of an answer, default of the targets")
    evaluate.add_argument("--bleu", default="13a", help="sacrebleu's tokenizer: 13a, intl, char, zh, none")
    evaluate.add_argument("--tasks", default="", help="names of lm-eval harness tasks, with commas between")
    evaluate.add_argument("--include", default="", help="folder of your own task files")
    evaluate.add_argument("--limit", type=int, default=0, help="first examples of each task, default all")
    generate = verb("generate", "Continue a prompt with a trained decoder.", config=False)
    _generate_arguments(generate)
    launch = verb("launch", "Run a training on a cluster, or as several processes here.", config=False)
    if chosen == "launch":
        from bigmodel_jax.launch import command

        command.arguments(launch)
    status = verb("status", "Progress, speed and last checkpoint of a running or dead job.", config=False)
    status.add_argument("workdir")
    status.add_argument("--json", action="store_true")
    convert = verb("convert", "Turn a published model into a run, or a run into a published model.", config=False)
    convert.add_argument("--from", dest="source", required=True, metavar="FROM", help="hf:FOLDER, or a run")
    convert.add_argument("--to", dest="target", required=True, metavar="TO", help="a new run, or hf:FOLDER")
    convert.add_argument("--family", default="", help="model_type to export as, default the first that fits")
    convert.add_argument("--dtype", default="", help="of exported tensors, default the parameters'")
    convert.add_argument("--shard-gb", type=float, default=5.0, help="largest exported file")
    probe = verb("probe", "Logistic regression on the frozen features that a config starts from.")
    probe.add_argument("--shots", default="0", help="examples per class, with commas between; 0 is all")
    probe.add_argument("--repeats", type=int, default=5, help="draws of the few examples")
    probe.add_argument("--out", default="", help="file for the numbers as JSON")
    certify = verb("certify", "Prove that two layouts of an experiment compute the same numbers.")
    certify.add_argument("--mesh", action="append", required=True, help="data=2,fsdp=4 or one; given twice")
    certify.add_argument("--steps", type=int, default=3)
    certify.add_argument("--float64", action="store_true", help="only in float64, not in the config's own precision")
    certify.add_argument("--full", action="store_true", help="the config as it is, instead of made small")
    certify.add_argument("--out", default="", help="file for the certificate as JSON")
    compare = verb("compare", "Where two runs differ: config, batches, losses.", config=False)
    compare.add_argument("first")
    compare.add_argument("second")
    compare.add_argument("--tolerance", type=float, default=1e-3, help="relative difference that is more than rounding")
    compare.add_argument("--out", default="", help="folder for a page with the curves")
    plan = verb("plan", "What a config needs on hardware: memory, time, money; compiled for it, from here.")
    plan.add_argument("--target", required=True, help="v5p:8x8x8, 2xv5e:16x16, h100:8x8, cpu:8, here")
    plan.add_argument("--search", action="store_true", help="look for the best mesh, remat policy and microbatch")
    plan.add_argument("--price", type=float, default=0.0, help="dollars per device-hour")
    plan.add_argument("--memory", type=float, default=0.0, help="GiB of one device, default the chip's")
    plan.add_argument("--out", default="", help="directory for plan.json and pictures")
    plan.add_argument("--limit", type=float, default=1200.0, help="seconds that one compilation may take")
    plan.add_argument("--again", action="store_true", help="compile even what was compiled before")
    prepare = verb("prepare", "Turn a corpus into token shards.", config=False)
    prepare.add_argument("--source", action="append", required=True, help="stdlib, files, folders, globs, tfds:...")
    prepare.add_argument("--out", required=True, help="directory for the shards")
    study = verb("study", "Run many cells that answer one question, and report what came out.", config=False)
    if chosen == "study":
        from bigmodel_jax.study import command

        command.arguments(study)
    scaling = verb("scaling", "A scaling law of a ladder of runs, and the run it leads to.", config=False)
    if chosen == "scaling":
        from bigmodel_jax.study import scaling as laws

        laws.arguments(scaling)
    return parser


def _generate_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--workdir", required=True)
    add("--prompt", action="append", help="may be given several times; an encoder-decoder reads it as its source")
    add("--length", type=int, default=200, help="new tokens at most")
    add("--temperature", type=float, default=0.8, help="0 is greedy")
    add("--top-k", type=int, default=0, help="the k most likely tokens; 0 for all")
    add("--top-p", type=float, default=0.95, help="the most likely tokens that together reach p")
    add("--min-p", type=float, default=0.0, help="tokens at least so likely, as a share of the most likely one")
    add("--repetition-penalty", type=float, default=1.0, help="above 1: tokens that were there become less likely")
    add("--beams", type=int, default=0, help="beam search of this width, without sampling")
    add("--length-penalty", type=float, default=1.0, help="beams are scored by log-probability / length ** penalty")
    add("--stop", action="append", default=[], help="text that ends an answer; may be given several times")
    add("--seed", type=int, default=0)
    add("--int8-cache", action="store_true", help="keep keys and values as int8, a quarter of their size")
    add("--stream", action="store_true", help="show text as it comes")
    add("--json", action="store_true", help="one object per prompt, with tokens and log-probabilities")
    add("--interactive", action="store_true", help="talk: Ctrl-C ends an answer, Ctrl-D leaves")


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """(arguments, overrides): --config.a.b=1 and "--config.a.b 1" both are overrides."""
    arguments, overrides = [], []
    rest = list(argv)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--config."):
            arguments.append(word)
        elif "=" in word or not rest:
            overrides.append(word)
        else:
            overrides.append(f"{word}={rest.pop(0)}")
    return arguments, overrides


def _check_verb(arguments: Sequence[str]) -> None:
    verbs = (
        "train", "eval", "probe", "generate", "prepare", "convert", "launch", "status", "study", "certify", "compare",
        "plan", "scaling",
    )  # fmt: skip
    if arguments and not arguments[0].startswith("-") and arguments[0] not in verbs:
        raise InputError(f"unknown verb '{arguments[0]}'{nearest(arguments[0], verbs)}; verbs: {', '.join(verbs)}")


def run(argv: Sequence[str]) -> None:
    """Carry out one command; raises what went wrong."""
    arguments, overrides = _split(argv)
    _check_verb(arguments)
    args = _parser(arguments[0] if arguments else "").parse_args(arguments)
    if args.verb == "train":
        from bigmodel_jax import experiment
        from bigmodel_jax.train import train

        raw = experiment.read(args.config)
        if args.seeds or args.lanes:
            from bigmodel_jax.train_lanes import train_together

            train_together(raw, overrides, args)
        else:
            train(experiment.resolve(raw, overrides), args.workdir, allow_config_change=args.allow_config_change)
    elif args.verb == "eval" and args.tasks:
        from bigmodel_jax.harness import evaluate_tasks

        evaluate_tasks(
            args.workdir, overrides, tasks=args.tasks.split(","), include=args.include, step=args.step, out=args.out,
            limit=args.limit,
        )  # fmt: skip
    elif args.verb == "eval":
        from bigmodel_jax.assess import Options, evaluate_run

        options = Options(
            context=args.context, stride=args.stride, resamples=args.resamples, length=args.length, bleu=args.bleu
        )
        evaluate_run(args.workdir, overrides, step=args.step, out=args.out, as_json=args.json, options=options)
    elif args.verb == "probe":
        from bigmodel_jax import experiment
        from bigmodel_jax.probe import probe_to_file

        if not all(word.isdigit() for word in args.shots.split(",")):
            raise InputError(f"--shots {args.shots!r} should be numbers with commas between, such as 1,8,0")
        config = experiment.resolve(experiment.read(args.config), overrides)
        probe_to_file(config, [int(word) for word in args.shots.split(",")], args.repeats, args.out)
    elif args.verb == "certify":
        from bigmodel_jax import experiment, schema
        from bigmodel_jax.certify import certify_config

        config = experiment.resolve(experiment.read(args.config), overrides)
        certify_config(
            config, args.mesh, kept=[schema.parse_override(word)[0] for word in overrides], steps=args.steps,
            float64=args.float64, full=args.full, out=args.out,
        )  # fmt: skip
    elif args.verb == "plan":
        from bigmodel_jax import experiment
        from bigmodel_jax.plan import plan

        config = experiment.resolve(experiment.read(args.config), overrides)
        plan(
            config, args.target, search=args.search, price=args.price, memory_gib=args.memory, out=args.out,
            limit_s=args.limit, again=args.again,
        )  # fmt: skip
    elif args.verb == "generate":
        from bigmodel_jax.talk import generate_from_run

        generate_from_run(args, overrides)
    elif args.verb == "convert":
        from bigmodel_jax.convert import convert

        convert(args.source, args.target, overrides, family=args.family, dtype=args.dtype, shard_gb=args.shard_gb)
    elif args.verb == "launch":
        from bigmodel_jax.launch.command import launch

        launch(args, overrides)
    elif args.verb == "compare":
        from bigmodel_jax.study.compare import compare_runs

        compare_runs(args.first, args.second, args.tolerance, args.out)
    elif args.verb == "study":
        from bigmodel_jax.study.command import carry_out

        carry_out(args, overrides)
    elif args.verb == "scaling":
        from bigmodel_jax.study import scaling

        scaling.carry_out(args, overrides)
    elif args.verb == "status":
        import json

        from bigmodel_jax import status

        found = status.read(args.workdir)
        print(json.dumps(found) if args.json else "\n".join(status.show(found)))
    else:
        from bigmodel_jax.offline import prepare_corpus

        prepare_corpus(args.source, args.out, overrides)


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the `bigmodel` command."""
    try:
        run(sys.argv[1:] if argv is None else argv)
    except RunError as error:
        code, message = error.exit_code, str(error)
    except OSError as error:
        full = error.errno == errno.ENOSPC
        code = 1
        message = f"{'disk full: ' if full else ''}{type(error).__name__}: {error}"
    except KeyboardInterrupt:
        code, message = 130, "interrupted"
    else:
        return
    print(f"bigmodel: {' '.join(message.split())}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # Daemon threads of the runtime may wait for work that will never come.
    os._exit(code)


if __name__ == "__main__":
    main()
