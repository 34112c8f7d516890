"""The noise meter on a linear model, whose gradients are the rows themselves: exact over all batches there are."""

import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bigmodel_jax import experiment
from bigmodel_jax.errors import InputError
from bigmodel_jax.learn import noise, objectives, optim
from bigmodel_jax.learn import state as states
from bigmodel_jax.learn import step as steps
from tests.tiny import raw

PEOPLE = np.random.default_rng(0).normal(size=(3, 2)) + 0.4
MEAN, TRACE = PEOPLE.mean(0), PEOPLE.var(0).sum()  # gradient and covariance of the whole distribution
DECAY = 0.8


def sums(apply, variables, batch, rngs, train):
    del apply, rngs, train
    return {"loss": jnp.sum(batch["x"] @ variables["params"]["w"])}, {}, {}


def rows_of(batch):
    return {"loss": jnp.asarray(batch["x"].shape[0] * batch["x"].shape[1], float)}


LINEAR = objectives.Objective(rows_of, sums)


def init(key=None):
    return {"params": {"w": jnp.zeros(2, float)}, "stats": {}}


def machine(noise_scale=DECAY):
    """(state, step) of plain descent on the mean of x . w."""
    tx = optim.make(init()["params"], name="sgd", lr=lambda s: jnp.float32(0.1))
    guard = steps.Guard(noise_scale=noise_scale)
    step = steps.make_train_step(SimpleNamespace(), lambda s, u: s, LINEAR, tx, guard=guard)
    return states.create(init, tx, jax.random.key(0), noise=noise_scale > 0), step


@pytest.mark.parametrize("steps_, rows", [(2, 2), (4, 1)])
def test_estimates_are_unbiased(steps_, rows, x64):
    draws = np.array(list(itertools.product(PEOPLE, repeat=steps_ * rows)))  # every batch, each as likely
    batches = draws.reshape(-1, steps_, rows, 2)
    state, step = machine()
    said = jax.jit(jax.vmap(lambda x: step(state, {"x": x}, jax.random.key(0))[1]))(batches)
    assert np.mean(said["noise/signal"]) == pytest.approx((MEAN**2).sum(), rel=1e-10)
    assert np.mean(said["noise/trace"]) == pytest.approx(TRACE, rel=1e-10)
    # The control: the gradient's own square is not, by TRACE over the rows.
    assert np.mean(said["grad_norm"] ** 2) == pytest.approx((MEAN**2).sum() + TRACE / (steps_ * rows), rel=1e-10)


def test_averages_go_on_over_a_ramp_and_skip_bad_steps(x64):
    rng = np.random.default_rng(1)
    state, step = machine()
    step = jax.jit(step)
    books, shown = np.zeros(2), []
    for steps_, rows in [(2, 4), (1, 4), (4, 4), (4, 4), (2, 4)]:  # a ramp: 8, 4 (no accumulation), 16 rows
        x = PEOPLE[rng.integers(0, 3, (steps_, rows))]
        poisoned = len(shown) == 3
        state, said = step(state, {"x": x * np.nan if poisoned else x}, jax.random.key(0))
        if steps_ > 1 and not poisoned:
            small, big = (x.mean(1) ** 2).sum(-1).mean(), (x.mean((0, 1)) ** 2).sum()
            b, s = rows * steps_, rows
            signal, trace = (b * big - s * small) / (b - s), (small - big) / (1 / s - 1 / b)  # A.2 and A.3 as printed
            books = DECAY * books + (1 - DECAY) * np.array([signal, trace])
            assert said["noise/signal"] == pytest.approx(signal) and said["noise/trace"] == pytest.approx(trace)
        assert ("noise/trace" in said) == (steps_ > 1)
        shown.append(float(said["noise/scale"]))
        assert shown[-1] == pytest.approx(max(books[1], 0) / books[0] if books[0] > 0 else 0, rel=1e-5)
    np.testing.assert_allclose(state["guard"]["noise"], books, rtol=1e-6)
    assert shown[1] == shown[0] and shown[3] == shown[2] and shown[4] != shown[3]


def test_the_ratio_of_averages_finds_the_noise_scale():
    rng = np.random.default_rng(2)
    x = PEOPLE[rng.integers(0, 3, (20_000, 2, 2))]
    found = noise.estimates((x.mean(2) ** 2).sum(-1).mean(1), (x.mean((1, 2)) ** 2).sum(-1), 2, 2)
    books = jnp.stack([jnp.mean(f) for f in found])
    assert float(noise.scale(books)) == pytest.approx(TRACE / (MEAN**2).sum(), rel=0.05)
    single = np.asarray(found[1] / found[0])  # of one step each: what dividing first would average
    assert abs(np.mean(single) / (TRACE / (MEAN**2).sum()) - 1) > 0.2
    assert float(noise.scale(jnp.array([-1.0, 2.0]))) == 0


def test_off_it_leaves_no_trace_and_without_accumulation_it_is_refused(tmp_path):
    state, step = machine(0.0)
    new, said = step(state, {"x": np.ones((2, 2, 2))}, jax.random.key(0))
    assert not any(name.startswith("noise") for name in said) and "noise" not in new["guard"]
    config = raw("resnet", tmp_path) | {"guard": {"noise_scale": 0.9}, "batch_size": ((0, 8), (5, 16))}
    with pytest.raises(InputError, match="noise_scale 0.9 .* microbatch smaller"):
        experiment.build(experiment.resolve(config))
