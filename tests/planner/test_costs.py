"""FLOPs of real models: the walk over the program with its loops against the models' closed forms."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import flops
from bigmodel_jax.chips import Chip, chip
from bigmodel_jax.models import MODELS
from bigmodel_jax.planner.collectives import Collective
from bigmodel_jax.planner.costs import Costs, Op, costs
from bigmodel_jax.planner.hlo import read
from bigmodel_jax.planner.roofline import Links, predict

ROWS, LENGTH, SOURCE, IMAGE = 4, 32, 16, 64
TINY = dict(
    vocab_size=128, num_layers=3, embed_dim=64, num_heads=4, max_length=LENGTH, mlp_dim=128, attention="reference",
    remat="none",
)  # fmt: skip
PLAIN = dict(dropout=0.0, embed_dropout=0.0)
EXPERTS = dict(num_experts=4, experts_per_token=2, activation="swiglu", bias=False, capacity_factor=1.0)
IMAGES = dict(depth=18, blocks=(2, 2), channels=16, stem="cifar", bn_group=4, num_classes=8)
TOKENS = {"tokens": np.zeros((ROWS, LENGTH), np.int32)}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
FAMILIES = {
    "decoder": ("decoder", TINY, TOKENS, (LENGTH,)),
    "encoder": ("encoder", TINY | PLAIN | {"attention_dropout": 0.0}, TOKENS, (LENGTH,)),
    "experts": ("decoder", TINY | EXPERTS, TOKENS, (LENGTH,)),
    "pair": (
        "encoder_decoder", TINY | PLAIN, TOKENS | {"source": np.zeros((ROWS, SOURCE), np.int32)}, (SOURCE, LENGTH)
    ),
    "resnet": ("resnet", IMAGES, {"image": np.zeros((ROWS, IMAGE, IMAGE, 3), np.float32)}, (IMAGE, IMAGE)),
}  # fmt: skip


@functools.cache
def lowered(family: str, train: bool, **options):
    """(lowered program of a sum of logits, or of its gradient; closed-form forward FLOPs)."""
    maker, shape, inputs, size = FAMILIES[family]
    model = MODELS[maker](**shape | options)
    variables, _ = model.abstract()

    def total(variables):
        out = model.apply(variables, train=True, **inputs)
        return jnp.sum(out.head(out.hidden).astype(jnp.float32))

    examples = ROWS * (LENGTH if len(size) == 1 else 1)
    program = jax.jit(jax.grad(total) if train else total).lower(variables)
    return program, examples * model.flops(*size)


def walked(program) -> Costs:
    return costs(read(program.compiler_ir("hlo").as_hlo_text()), {"data": 1})


@pytest.mark.parametrize("family", FAMILIES)
def test_loops_walked_are_the_closed_form(family):
    forward, expected = lowered(family, train=False)
    step, _ = lowered(family, train=True)
    assert walked(forward).flops == pytest.approx(expected, rel=0.05)
    assert walked(step).flops == pytest.approx(flops.training(expected), rel=0.05)
    assert not walked(step).notes
    if family != "resnet":  # its stages are not scanned; the others need the loops
        once = read(step.compiler_ir("hlo").as_hlo_text().replace("direction=LT", "direction=EQ"))
        assert costs(once, {}).flops < 0.7 * flops.training(expected)


def test_full_remat_adds_the_forward_pass_of_the_layers_less_what_nobody_reads():
    plain, expected = lowered("decoder", train=True)
    full, _ = lowered("decoder", train=True, remat="full")
    added = walked(full).flops - walked(plain).flops
    tokens, d, f = ROWS * LENGTH, TINY["embed_dim"], TINY["mlp_dim"]
    head = 2 * tokens * d * TINY["vocab_size"]
    down = TINY["num_layers"] * 2 * tokens * f * d  # its result is only the next layer's input, which is kept
    assert added == pytest.approx(expected - head - down, rel=1e-6)
    # The rule of thumb, a third on top, for an encoder: its second norm reads what its layer returns.
    plain, expected = lowered("encoder", train=True)
    full, _ = lowered("encoder", train=True, remat="full")
    assert walked(full).flops / walked(plain).flops == pytest.approx(4 / 3, rel=0.05)


def test_closed_form_equals_an_unrolled_compile():
    program, expected = lowered("decoder", train=True, unroll=2, num_layers=2)
    text = program.compile(compiler_options=QUICK).as_text()
    assert " while(" not in text
    assert costs(read(text), {}).flops == pytest.approx(flops.training(expected), rel=0.02)


V5P = chip("TPU v5")
PRODUCT = Op("dot", "dot", count=10, flops=V5P.peaks["bfloat16"] / 1000, dtype="bf16", bytes=V5P.memory_rate / 4000)


def test_a_roofline_adds_up():
    said = predict(Costs((PRODUCT,), ()), V5P)
    assert said.step_s == pytest.approx(0.01) and said.bound == "compute"
    assert said.memory_s == pytest.approx(0.0025)
    assert said.mfu(10 * PRODUCT.flops, 1, V5P.peaks["bfloat16"]) == pytest.approx(1.0)
    assert said.per_second(512) == pytest.approx(51_200)
    assert said.sources["peaks"].startswith("Google Cloud") and "n/a" not in said.sources.values()


def reduced(kind: str, axes: tuple, size: int) -> Costs:
    payload = 6e9
    share = (2 if kind == "all-reduce" else 1) * (size - 1) / size
    return Costs((PRODUCT,), (Collective(kind, payload, payload * share, axes, size, 1, "c", ""),))


def test_gradients_hide_behind_arithmetic_and_activations_do_not():
    links = Links(torus=(8, 8, 8))
    hidden = predict(reduced("reduce-scatter", ("fsdp",), 512), V5P, links)
    assert hidden.hidden_s == pytest.approx(6e9 * 511 / 512 / V5P.link_rate) and hidden.exposed_s == 0
    assert hidden.step_s == pytest.approx(0.01)
    waited = predict(reduced("all-reduce", ("tensor",), 8), V5P, links)
    # Eight devices lie along one of three dimensions.
    assert waited.exposed_s == pytest.approx(2 * 6e9 * 7 / 8 / (V5P.link_rate / 3))
    assert waited.step_s == pytest.approx(0.01 + waited.exposed_s) and waited.bound == "communication"


def test_the_slow_network_carries_one_group():
    links = Links(torus=(16, 16), slow={"data": 2})
    said = predict(reduced("all-reduce", ("data",), 4), V5P, links)
    (row,) = said.networks
    assert row.fast_bytes == pytest.approx(6e9 * 2 * 1 / 2) and row.slow_bytes == pytest.approx(6e9 / 2 * 2 * 1 / 2)
    assert row.slow_s == pytest.approx(row.slow_bytes / V5P.slow_rate)
    within = predict(reduced("all-reduce", ("fsdp",), 4), V5P, links)
    assert within.networks[0].slow_bytes == 0


def test_what_is_not_known_is_said():
    said = predict(reduced("all-reduce", ("tensor",), 8), Chip("x", "x", {}))
    assert said.step_s == 0 and said.mfu(1.0, 1, None) is None and said.per_second(1.0) is None
    assert len(said.notes) == 3  # products, memory, the fast network
    unknown = predict(Costs((), (), {"kernel": 2}, ("a loop",)), V5P)
    assert unknown.notes[0] == "a loop" and "kernel" in unknown.notes[1]


def test_measured_rates_are_plausible_and_say_how():
    from bigmodel_jax.planner import here

    found = here._rate(here.CLOCKS["cpu"], 2, *here._products(256, "float32"))
    assert 1e8 < found < 1e14 and math.isfinite(found)


def test_a_machine_is_measured_once(monkeypatch, tmp_path):
    from bigmodel_jax.planner import here

    monkeypatch.setenv("BIGMODEL_CACHE", str(tmp_path))
    made = []

    def measure(clock):
        made.append(clock)
        return Chip("here", "cpu", {"float32": float(len(made))})

    monkeypatch.setattr(here, "measure", measure)
    first = here.here()
    assert here.here() == first and made == ["wall"] and first.peaks == {"float32": 1.0}
    assert here.here("cpu") != first and here.here(again=True) != first and made == ["wall", "cpu", "wall"]
