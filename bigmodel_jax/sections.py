"""The sections of a config that are plain leaves: what each means and its default.

A leaf is a field; its docstring is the reference. Sections that name a function (model, objective, data ...) take
their leaves from that function's signature, see schema.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from bigmodel_jax.learn import optim


@dataclass(frozen=True)
class Run:
    """Top-level leaves.

    batch_size: global rows per optimizer step, or a ramp ((first_step, rows), ...).
    microbatch: global rows per forward pass; 0 is the whole batch. Accumulation is derived.
    """

    seed: int = 0
    steps: int = 1000
    batch_size: int | tuple = 32
    microbatch: int = 0


@dataclass(frozen=True)
class Eval:
    """every: steps between evaluations (0: only at the end). batches: 0 is the whole set, once.

    batch_size is rounded up to fill the devices alike; the result does not depend on it.
    metric: "SET/METRIC", for example "validation/accuracy": the checkpoint where it was best is kept in the folder
    `best`. patience: stop after so many evaluations without a better one; 0 never stops. mode: "max", "min" or
    "auto" (losses less, scores more). min_delta: what counts as better. See stopping.py."""

    every: int = 0
    batch_size: int = 32
    batches: int = 0
    metric: str = ""
    mode: str = "auto"
    patience: int = 0
    min_delta: float = 0.0


@dataclass(frozen=True)
class MeshSize:
    """Devices per mesh axis (parallel/mesh.py says what each cuts); one may be -1, "the rest".

    slices: groups of devices with a slow network between them, which only the data axis crosses. The other
    leaves are those of `Layout` in parallel/rules.py: context_by: "ring" or "ulysses". microbatches, repeats: of a
    pipeline. weights_by: who scatters the gradients of weights over fsdp, the "compiler" or "rings", see
    parallel/rings.py. zero: 3, or 1 for optimizer state only. offload: "" or "optimizer". dispatch, room: of experts.
    """

    data: int = -1
    stage: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    slices: int = 1
    context_by: str = "ring"
    weights_by: str = "compiler"
    microbatches: int = 0
    repeats: int = 1
    zero: int = 3
    offload: str = ""
    dispatch: str = "bounded"
    room: float = 0.0


@dataclass(frozen=True)
class Checkpoint:
    """every: steps between saves (0: only at the end and on preemption). keep_every: steps whose
    checkpoints are never deleted (0: none)."""

    every: int = 0
    keep_last: int = 3
    keep_every: int = 0
    asynchronous: bool = True
    timeout_s: float = 1200.0


@dataclass(frozen=True)
class Guard:
    """policy: "skip" leaves the state as it was on a bad step, "crash" aborts (exit 76).

    A step is bad when loss or gradient norm is not finite, or above spike_factor times its running
    median (0: no spike check). limit: consecutive bad steps that abort a skipping run.
    noise_scale: decay of the averages of the gradient noise meter, for example 0.99 (0: off), see learn/noise.py;
    it measures steps that accumulate, so microbatch must be smaller than a batch.
    """

    policy: str = "skip"
    spike_factor: float = 0.0
    window: int = 64
    limit: int = 10
    noise_scale: float = 0.0


@dataclass(frozen=True)
class Log:
    """every: steps between metrics rows. norms: gradient, parameter and update norm per group. ledger: example ids
    and a hash of the batch of every step, by which `bigmodel compare` finds where two runs were fed differently."""

    every: int = 10
    norms: bool = False
    ledger: bool = False
    tensorboard: bool = True


@dataclass(frozen=True)
class Runtime:
    """How the program runs, not what it computes.

    platform: "cpu", "gpu" or "tpu" must be there, "" takes what there is. watchdog_s: seconds
    without a finished step after which stacks are dumped and the run exits 77; 0 is off, -1 is 600 in a
    job of several processes and off in one. Compiling, restoring and saving have time of their own.
    compilation_cache: directory, "" for the user's cache, "off" for none. profile: (first step,
    steps) of a profiler window, () for none. prefetch: batches made ahead. input: "numpy" or "tfdata"
    (the same batches, made in parallel); "auto" is tfdata for TFDS data sets. deterministic: on a GPU,
    bitwise repeatable kernels, at a price in speed that depends on the model; a CPU always is.
    """

    platform: str = ""
    x64: bool = False
    watchdog_s: float = -1.0
    compilation_cache: str = ""
    profile: tuple = ()
    prefetch: int = 2
    input: str = "auto"
    deterministic: bool = False


@dataclass(frozen=True)
class Sample:
    """Text printed at the end of a causal-LM run. length 0: none."""

    prompt: str = ""
    length: int = 0
    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95


@dataclass(frozen=True)
class InitFrom:
    """Parameters to start from, see inherit.py.

    path: a run or checkpoint directory, or "hf:FOLDER". rename: (regex, replacement) of stored names. skip: regexes of
    parameters to leave at their initial values. strict: refuse anything missing, unexpected or of another shape.
    ema: take the averaged parameters where kept. resize_vocab: "mean" or "initial" fills new rows of a vocabulary,
    "" refuses another size. resize_positions: "interpolate" or "initial", the same for a table of positions.
    """

    path: str = ""
    rename: tuple = ()
    skip: tuple = ()
    strict: bool = True
    ema: bool = False
    resize_vocab: str = ""
    resize_positions: str = ""


@dataclass(frozen=True)
class Optimizer:
    """Leaves of every optimizer; those of the named one join them. See learn/optim.py.

    layer_decay: factor of the learning rate per layer downwards. freeze_layers: the embeddings and so many first
    layers stay as they are. See learn/layers.py.
    """

    lr: float = 1e-3
    clip: float = 0.0
    decay: str = "decoupled"
    weight_decay: float = 0.0
    groups: tuple = optim.DEFAULT_GROUPS
    layer_decay: float = 1.0
    freeze_layers: int = 0
    ema: float = 0.0


@dataclass(frozen=True)
class Schedule:
    """Leaf of every schedule: updates of linear warm-up. See learn/schedules.py."""

    warmup: int = 0


@dataclass(frozen=True)
class Lora:
    """Low-rank updates of a model that stays as it is, see models/lora.py.

    rank: 0 trains the model itself. alpha: updates are scaled by alpha / rank. targets: regexes of the weights to
    update. train: regexes of parameters that are trained whole (a new head).
    """

    rank: int = 0
    alpha: float = 16.0
    targets: tuple = (r"attn/(q|v)$",)
    train: tuple = ()


PLAIN = {
    "eval": Eval, "mesh": MeshSize, "checkpoint": Checkpoint, "guard": Guard, "log": Log,
    "runtime": Runtime, "sample": Sample, "init_from": InitFrom, "lora": Lora,
}  # fmt: skip
