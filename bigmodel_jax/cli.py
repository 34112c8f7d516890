"""The `bigmodel` command. Imports live inside the verbs, so that a typo is answered at once.

Errors are one line on stderr and a distinct exit code (errors.py).
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from bigmodel_jax.errors import InputError, RunError, nearest

if TYPE_CHECKING:
    from bigmodel_jax.schema import Config


class _Parser(ArgumentParser):
    """argparse, with its errors in one line like every other."""

    def error(self, message: str) -> None:
        raise InputError(f"{message} (see {self.prog} --help)")


Argument = Callable[[ArgumentParser], object]
Action = Callable[[Namespace, Sequence[str]], None]


class _Verb(NamedTuple):
    """What `bigmodel NAME` says of itself, takes, and does with that and the --config overrides."""

    help: str
    arguments: tuple[Argument, ...]
    act: Action
    fixed: str  # why it takes no override; empty where it does


VERBS: dict[str, _Verb] = {}


def _verb(name: str, text: str, *arguments: Argument, fixed: str = "") -> Callable[[Action], Action]:
    def register(act: Action) -> Action:
        VERBS[name] = _Verb(text, arguments, act, fixed)
        return act

    return register


def _arg(*flags: str, **options: Any) -> Argument:
    return lambda parser: parser.add_argument(*flags, **options)


def _one_of(*arguments: Argument) -> Argument:
    def add(parser: ArgumentParser) -> None:
        group = parser.add_mutually_exclusive_group()
        for argument in arguments:
            argument(group)

    return add


def _arguments_of(module: str) -> Argument:
    """Those that a module declares itself, imported only when its verb is asked for."""
    return lambda parser: importlib.import_module(module).arguments(parser)


_CONFIG = _arg("--config", required=True, help="FILE.py or FILE.py:ARG")
_CHECKPOINT = _one_of(
    _arg("--step", type=int, metavar="N", help="checkpoint of this step, default the latest"),
    _arg("--best", dest="step", action="store_const", const="best", help="the one that eval.metric was best at"),
)
_NO_CONFIG = "it reads no config"
_STUDY = "what a study varies is in its file"


def _config(args: Namespace, overrides: Sequence[str]) -> Config:
    from bigmodel_jax import experiment

    return experiment.resolve(experiment.read(args.config), overrides)


@_verb(
    "train",
    "Train an experiment, or continue it.",
    _CONFIG,
    _arg("--workdir", required=True, help="directory of the run"),
    _arg("--allow-config-change", action="store_true", help="go on although the config changed"),
    _one_of(
        _arg("--seeds", default="", metavar="N,N", help="as one program; each run is WORKDIR/seed-N"),
        _arg("--lanes", default="", metavar="FILE", help="runs as one program, see train_lanes.py"),
    ),
)
def _train(args: Namespace, overrides: Sequence[str]) -> None:
    if args.seeds or args.lanes:
        from bigmodel_jax import experiment
        from bigmodel_jax.train_lanes import train_together

        train_together(experiment.read(args.config), overrides, args)
        return
    from bigmodel_jax.train import train

    train(_config(args, overrides), args.workdir, allow_config_change=args.allow_config_change)


@_verb(
    "eval",
    "Evaluate a checkpoint of a run.",
    _arg("--workdir", required=True),
    _CHECKPOINT,
    _arg("--out", default="", help="directory for eval.json, page and plots, default WORKDIR/eval"),
    _arg("--json", action="store_true", help="print eval.json instead of a table"),
    _arg("--context", type=int, default=0, help="causal LM: tokens of a window, default data.length"),
    _arg("--stride", type=int, default=0, help="new tokens in each window, default half the context"),
    _arg("--resamples", type=int, default=1000, help="of the bootstrap intervals"),
    _arg("--length", type=int, default=0, help="new tokens of an answer, default of the targets"),
    _arg("--bleu", default="13a", help="sacrebleu's tokenizer: 13a, intl, char, zh, none"),
    _arg("--tasks", default="", help="names of lm-eval harness tasks, with commas between"),
    _arg("--include", default="", help="folder of your own task files"),
    _arg("--limit", type=int, default=0, help="first examples of each task, default all"),
)
def _eval(args: Namespace, overrides: Sequence[str]) -> None:
    where = {"step": args.step, "out": args.out}
    if args.tasks:
        from bigmodel_jax.harness import evaluate_tasks

        tasks = args.tasks.split(",")
        evaluate_tasks(args.workdir, overrides, tasks=tasks, include=args.include, limit=args.limit, **where)
        return
    from bigmodel_jax.assess import Options, evaluate_run

    options = Options(
        context=args.context, stride=args.stride, resamples=args.resamples, length=args.length, bleu=args.bleu
    )
    evaluate_run(args.workdir, overrides, as_json=args.json, options=options, **where)


@_verb(
    "probe",
    "Logistic regression on the frozen features that a config starts from.",
    _CONFIG,
    _arg("--shots", default="0", help="examples per class, with commas between; 0 is all"),
    _arg("--repeats", type=int, default=5, help="draws of the few examples"),
    _arg("--out", default="", help="file for the numbers as JSON"),
)
def _probe(args: Namespace, overrides: Sequence[str]) -> None:
    from bigmodel_jax.probe import probe_to_file

    if not all(word.isdigit() for word in args.shots.split(",")):
        raise InputError(f"--shots {args.shots!r} should be numbers with commas between, such as 1,8,0")
    probe_to_file(_config(args, overrides), [int(word) for word in args.shots.split(",")], args.repeats, args.out)


@_verb(
    "generate",
    "Continue a prompt with a trained decoder.",
    _arg("--workdir", required=True),
    _CHECKPOINT,
    _arg("--prompt", action="append", help="may be given several times; an encoder-decoder reads it as its source"),
    _arg("--length", type=int, default=200, help="new tokens at most"),
    _arg("--temperature", type=float, default=0.8, help="0 is greedy"),
    _arg("--top-k", type=int, default=0, help="the k most likely tokens; 0 for all"),
    _arg("--top-p", type=float, default=0.95, help="the most likely tokens that together reach p"),
    _arg("--min-p", type=float, default=0.0, help="tokens at least so likely, as a share of the most likely one"),
    _arg("--repetition-penalty", type=float, default=1.0, help="above 1: tokens that were there become less likely"),
    _arg("--beams", type=int, default=0, help="beam search of this width, without sampling"),
    _arg("--length-penalty", type=float, default=1.0, help="beams are scored by log-probability / length ** penalty"),
    _arg("--stop", action="append", default=[], help="text that ends an answer; may be given several times"),
    _arg("--seed", type=int, default=0),
    _arg("--int8-cache", action="store_true", help="keep keys and values as int8, a quarter of their size"),
    _arg("--stream", action="store_true", help="show text as it comes"),
    _arg("--json", action="store_true", help="one object per prompt, with tokens and log-probabilities"),
    _arg("--interactive", action="store_true", help="talk: Ctrl-C ends an answer, Ctrl-D leaves"),
)
def _generate(args: Namespace, overrides: Sequence[str]) -> None:
    from bigmodel_jax.talk import generate_from_run

    generate_from_run(args, overrides)


@_verb(
    "prepare",
    "Turn a corpus into token shards.",
    _arg("--source", action="append", required=True, help="stdlib, files, folders, globs, tfds:..."),
    _arg("--out", required=True, help="directory for the shards"),
)
def _prepare(args: Namespace, overrides: Sequence[str]) -> None:
    from bigmodel_jax.offline import prepare_corpus

    prepare_corpus(args.source, args.out, overrides)


@_verb(
    "convert",
    "Turn a published model into a run, or a run into a published model.",
    _arg("--from", dest="source", required=True, metavar="FROM", help="hf:FOLDER, or a run"),
    _arg("--to", dest="target", required=True, metavar="TO", help="a new run, or hf:FOLDER"),
    _CHECKPOINT,
    _arg("--family", default="", help="model_type to export as, default the first that fits"),
    _arg("--dtype", default="", help="of exported tensors, default the parameters'"),
    _arg("--shard-gb", type=float, default=5.0, help="largest exported file"),
)
def _convert(args: Namespace, overrides: Sequence[str]) -> None:
    from bigmodel_jax.convert import convert

    options = {"family": args.family, "dtype": args.dtype, "shard_gb": args.shard_gb}
    convert(args.source, args.target, overrides, step=args.step, **options)


@_verb(
    "launch", "Run a training on a cluster, or as several processes here.", _arguments_of("bigmodel_jax.launch.command")
)
def _launch(args: Namespace, overrides: Sequence[str]) -> None:
    from bigmodel_jax.launch.command import launch

    launch(args, overrides)


@_verb(
    "status",
    "Progress, speed and last checkpoint of a running or dead job.",
    _arg("workdir"),
    _arg("--json", action="store_true"),
    fixed=_NO_CONFIG,
)
def _status(args: Namespace, _: Sequence[str]) -> None:
    import json

    from bigmodel_jax import status

    found = status.read(args.workdir)
    print(json.dumps(found) if args.json else "\n".join(status.show(found)))


@_verb(
    "study",
    "Run many cells that answer one question, and report what came out.",
    _arguments_of("bigmodel_jax.study.command"),
    fixed=_STUDY,
)
def _study(args: Namespace, _: Sequence[str]) -> None:
    from bigmodel_jax.study.command import carry_out

    carry_out(args)


@_verb(
    "scaling",
    "A scaling law of a ladder of runs, and the run it leads to.",
    _arguments_of("bigmodel_jax.study.scaling"),
    fixed=_STUDY,
)
def _scaling(args: Namespace, _: Sequence[str]) -> None:
    from bigmodel_jax.study import scaling

    scaling.carry_out(args)


@_verb(
    "certify",
    "Prove that two layouts of an experiment compute the same numbers.",
    _CONFIG,
    _arg("--mesh", action="append", required=True, help="data=2,fsdp=4 or one; given twice"),
    _arg("--steps", type=int, default=3),
    _arg("--float64", action="store_true", help="only in float64, not in the config's own precision"),
    _arg("--full", action="store_true", help="the config as it is, instead of made small"),
    _arg("--out", default="", help="file for the certificate as JSON"),
)
def _certify(args: Namespace, overrides: Sequence[str]) -> None:
    from bigmodel_jax import schema
    from bigmodel_jax.certify import certify_config

    kept = [schema.parse_override(word)[0] for word in overrides]
    choices = {"steps": args.steps, "float64": args.float64, "full": args.full, "out": args.out}
    certify_config(_config(args, overrides), args.mesh, kept=kept, **choices)


@_verb(
    "compare",
    "Where two runs differ: config, batches, losses.",
    _arg("first"),
    _arg("second"),
    _arg("--tolerance", type=float, default=1e-3, help="relative difference that is more than rounding"),
    _arg("--out", default="", help="folder for a page with the curves"),
    fixed=_NO_CONFIG,
)
def _compare(args: Namespace, _: Sequence[str]) -> None:
    from bigmodel_jax.study.compare import compare_runs

    compare_runs(args.first, args.second, args.tolerance, args.out)


@_verb(
    "plan",
    "What a config needs on hardware: memory, time, money; compiled for it, from here.",
    _CONFIG,
    _arg("--target", required=True, help="v5p:8x8x8, 2xv5e:16x16, h100:8x8, cpu:8, here"),
    _arg("--search", action="store_true", help="look for the best mesh, remat policy and microbatch"),
    _arg("--price", type=float, default=0.0, help="dollars per device-hour"),
    _arg("--memory", type=float, default=0.0, help="GiB of one device, default the chip's"),
    _arg("--out", default="", help="directory for plan.json and pictures"),
    _arg("--limit", type=float, default=1200.0, help="seconds that one compilation may take"),
    _arg("--again", action="store_true", help="compile even what was compiled before"),
)
def _plan(args: Namespace, overrides: Sequence[str]) -> None:
    from bigmodel_jax.plan import plan

    limits = {"price": args.price, "memory_gib": args.memory, "limit_s": args.limit}
    plan(_config(args, overrides), args.target, search=args.search, out=args.out, again=args.again, **limits)


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


def _parser(chosen: str) -> _Parser:
    """Every verb with its help; only the chosen one with its arguments, which may need imports."""
    parser = _Parser(prog="bigmodel", description="Pretrain, evaluate and sample models in JAX.")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.help, description=verb.help, allow_abbrev=False)
        for argument in verb.arguments if name == chosen else ():
            argument(sub)
    return parser


def run(argv: Sequence[str]) -> None:
    """Carry out one command; raises what went wrong."""
    arguments, overrides = _split(argv)
    chosen = arguments[0] if arguments else ""
    if chosen and not chosen.startswith("-") and chosen not in VERBS:
        raise InputError(f"unknown verb '{chosen}'{nearest(chosen, VERBS)}; verbs: {', '.join(VERBS)}")
    args = _parser(chosen).parse_args(arguments)
    verb = VERBS[args.verb]
    if overrides and verb.fixed:
        raise InputError(f"{args.verb} takes no override ({overrides[0]}): {verb.fixed}")
    verb.act(args, overrides)


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
