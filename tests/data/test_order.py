"""The computed order is a permutation, looks shuffled, and depends on nothing but integers."""

import numpy as np
import pytest

from bigmodel_jax.data.order import BatchRamp, Order, Permutation, RowRng, mix, mix_ints
from bigmodel_jax.errors import InputError

SIZES = [1, 2, 3, 4, 5, 7, 13, 16, 17, 97, 100, 256, 257, 1000, 4093, 4096]


def is_permutation(values, n):
    return np.array_equal(np.sort(values), np.arange(n))


@pytest.mark.parametrize("block, window", [(1, 64), (4, 2), (7, 3), (16, 64), (3, 1)])
def test_every_epoch_is_a_permutation(block, window):
    for n in SIZES:
        for epoch in (0, 1, 5):
            assert is_permutation(Permutation(n, 11, epoch, block, window).index(np.arange(n)), n), (n, epoch)


def test_the_permutation_test_can_fail():
    assert not is_permutation(np.random.default_rng(0).integers(0, 100, 100), 100)


def test_large_n_costs_no_memory_and_stays_in_range():
    n = (1 << 61) - 1
    got = Permutation(n, 3, 0).index(np.arange(n - 5000, n))
    assert got.min() >= 0 and got.max() < n and len(np.unique(got)) == 5000
    assert abs(got.astype(np.float64).mean() / n - 0.5) < 5 * np.sqrt(1 / 12 / 5000)


def test_epochs_and_seeds_differ_and_repeat():
    n = 1000
    base = Permutation(n, 1, 0).index(np.arange(n))
    assert np.array_equal(base, Permutation(n, 1, 0).index(np.arange(n)))
    for other in (Permutation(n, 1, 1), Permutation(n, 2, 0), Permutation(n, 0, 1)):
        # Two random permutations agree in about one place.
        assert (base == other.index(np.arange(n))).sum() < 10


def test_order_is_pinned():
    """Changing these numbers breaks the resume of every run that exists."""
    assert Permutation(10, 0, 0).index(np.arange(10)).tolist() == PINNED_FULL
    assert Permutation(10, 0, 0, block=3, window=2).index(np.arange(10)).tolist() == PINNED_BLOCKS
    assert RowRng(0, np.arange(3)).integers(1000, salt="a").tolist() == PINNED_ROWS


PINNED_FULL = [1, 0, 7, 8, 4, 9, 6, 5, 3, 2]
PINNED_BLOCKS = [4, 7, 3, 8, 5, 6, 9, 1, 2, 0]
PINNED_ROWS = [102, 453, 563]


def chi_square(permute, n, trials):
    """Statistic of the n x n table "example e came at place p", (n - 1)^2 degrees of freedom."""
    counts = np.zeros((n, n))
    for trial in range(trials):
        counts[np.arange(n), permute(trial)] += 1
    return ((counts - trials / n) ** 2 / (trials / n)).sum()


@pytest.mark.parametrize("n", [5, 12, 31])
def test_positions_are_uniform(n):
    freedom = (n - 1) ** 2
    bound = freedom + 5 * np.sqrt(2 * freedom)
    trials = 3000
    assert chi_square(lambda t: Permutation(n, 0, t).index(np.arange(n)), n, trials) < bound
    assert chi_square(lambda t: Permutation(n, t, 0).index(np.arange(n)), n, trials) < bound
    rotations = np.random.default_rng(0).integers(0, n - 1, trials)
    assert chi_square(lambda t: (np.arange(n) + rotations[t]) % n, n, trials) > bound


def test_neighbours_are_not_kept():
    """Differences of consecutive examples are spread like those of a random permutation."""
    n = 1 << 12
    got = Permutation(n, 9, 2).index(np.arange(n))
    assert (np.diff(got) == 1).sum() < 10
    assert abs(np.corrcoef(got[:-1], got[1:])[0, 1]) < 5 / np.sqrt(n)
    assert abs(np.corrcoef(np.arange(n), got)[0, 1]) < 5 / np.sqrt(n)


def test_blocks_stay_near_and_rows_inside_windows_are_mixed():
    n, block, window = 4096, 16, 4
    order = Permutation(n, 5, 0, block, window).index(np.arange(n)).reshape(-1, block * window)
    for part in order:
        blocks, counts = np.unique(part // block, return_counts=True)
        assert len(blocks) == window and (counts == block).all()
        assert not np.array_equal(part, np.sort(part))
    assert np.array_equal(np.sort(order[:, 0] // block), (order[:, 0] // block)) is False
    full = Permutation(n, 5, 0).index(np.arange(n)).reshape(-1, block * window)
    assert max(len(np.unique(part // block)) for part in full) > 40


def test_short_last_block_does_not_break_locality():
    n, block, window = 1001, 16, 4
    order = Permutation(n, 5, 3, block, window).index(np.arange(n))
    for start in range(0, n, block * window):
        # The short block moves a window's edge by part of one block at most.
        assert len(np.unique(order[start : start + block * window] // block)) <= window + 1


def test_endless_order_joins_epochs_whatever_is_asked_for():
    n = 37
    order = Order(n, 4, block=5, window=2)
    run = order.index(np.arange(10 * n))
    for epoch in range(10):
        want = Permutation(n, 4, epoch, 5, 2).index(np.arange(n))
        assert np.array_equal(run[epoch * n : (epoch + 1) * n], want)
    fresh = Order(n, 4, block=5, window=2)
    scattered = np.array([10**12 + 3, 0, 360, 5, 5])
    assert np.array_equal(fresh.index(scattered)[1:], run[[0, 360, 5, 5]])
    # Chunked and direct mapping agree far from the start, and across a chunk's edge.
    far = np.arange(4096 * 7 - 20, 4096 * 7 + 20)
    assert np.array_equal(fresh.index(far), [fresh.index(np.array([p, 0]))[0] for p in far])
    assert Order(n, 4, shuffle=False).index(np.array([0, 36, 37])).tolist() == [0, 36, 0]


def test_chunks_kept_are_few():
    order = Order(10**6, 0)
    for start in range(0, 10**6, 4096):
        order.index(np.arange(start, start + 8))
    assert len(order._chunks) <= 4


@pytest.mark.parametrize("make", [
    lambda: Permutation(0, 0, 0), lambda: Permutation(5, 0, 0, block=0), lambda: Order(-1, 0),
    lambda: Permutation(5, 0, 0).index(np.array([5])), lambda: Permutation(5, 0, 0).index(np.array([-1])),
])  # fmt: skip
def test_impossible_orders_are_refused(make):
    with pytest.raises(InputError):
        make()


def test_array_and_integer_mixers_are_good_and_deterministic():
    x = np.arange(1 << 12, dtype=np.uint64)
    flips = np.unpackbits((mix(x) ^ mix(x ^ np.uint64(1))).view(np.uint8)).mean()
    assert abs(flips - 0.5) < 0.01
    assert len({mix_ints(a, b) for a in range(-20, 20) for b in range(-20, 20)}) == 1600
    assert mix_ints(1, 2) != mix_ints(2, 1) and mix_ints(2**64) != mix_ints(0) and mix_ints(-1) != mix_ints(2**64 - 1)


def test_rows_do_not_depend_on_who_else_is_asked_for():
    everyone = RowRng(7, np.arange(100))
    few = RowRng(7, np.array([42, 3]))
    for draw in (
        lambda r: r.uniform((3, 2), salt="u"), lambda r: r.integers(10, 5), lambda r: r.normal(4, salt=1),
    ):  # fmt: skip
        assert np.array_equal(draw(everyone)[[42, 3]], draw(few))
    assert not np.array_equal(everyone.uniform(3)[0], few.uniform(3)[0])
    # More numbers per row begin with the same ones.
    assert np.array_equal(everyone.uniform(8)[:, :3], everyone.uniform(3))


def test_distributions():
    rng, n = RowRng(1, np.arange(40)), 40 * 5000
    u = rng.uniform(5000)
    assert u.dtype == np.float32 and u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, 50, (0, 1))[0]
    assert ((counts - n / 50) ** 2 / (n / 50)).sum() < 49 + 5 * np.sqrt(98)
    k = rng.integers(7, 5000, salt="k")
    counts = np.bincount(k.ravel(), minlength=7)
    assert len(counts) == 7 and ((counts - n / 7) ** 2 / (n / 7)).sum() < 6 + 5 * np.sqrt(12)
    z = rng.normal(5000, salt="z").astype(np.float64)
    assert abs(z.mean()) < 5 / np.sqrt(n) and abs(z.var() - 1) < 5 * np.sqrt(2 / n)
    assert abs((z**4).mean() - 3) < 5 * np.sqrt(96 / n)
    wide = rng.uniform(5000, low=-2.0, high=4.0)
    assert -2 <= wide.min() < -1.99 and 3.99 < wide.max() <= 4 and abs(wide.mean() - 1) < 0.05


def test_rows_salts_positions_and_seeds_are_independent():
    n = 20000
    a = RowRng(1, np.arange(n)).uniform(2)
    others = [
        RowRng(1, np.arange(n)).uniform(2, salt="b"), RowRng(2, np.arange(n)).uniform(2),
        RowRng(1, np.arange(n) + 1).uniform(2), RowRng(1, np.arange(n) + n).uniform(2), a[:, ::-1],
    ]  # fmt: skip
    for other in others:
        assert abs(np.corrcoef(a[:, 0], other[:, 0])[0, 1]) < 5 / np.sqrt(n)
    assert np.corrcoef(a[:, 0], RowRng(1, np.arange(n)).uniform()[:])[0, 1] > 0.999
    assert len(np.unique(RowRng(1, np.arange(n)).bits(20))) == 20 * n


def test_fixed_is_keyed_by_example():
    first = RowRng(1, np.array([0, 1]), np.array([8, 9]))
    later = RowRng(1, np.array([501, 500]), np.array([9, 8]))
    assert np.array_equal(first.fixed.uniform(4), later.fixed.uniform(4)[::-1])
    assert not np.array_equal(first.uniform(4), later.uniform(4)[::-1])
    with pytest.raises(ValueError, match="ids"):
        RowRng(1, np.array([0])).fixed  # noqa: B018


def test_ramp_offsets_are_the_running_sum():
    ramp = BatchRamp(((0, 3), (5, 7), (6, 10)))
    sizes = [ramp.size(step) for step in range(20)]
    assert sizes[:7] == [3, 3, 3, 3, 3, 7, 10]
    sums = np.concatenate([[0], np.cumsum(sizes)])
    assert [ramp.offset(step) for step in range(20)] == sums[:20].tolist()
    for position in range(100):
        assert ramp.step_at(position) == int(np.searchsorted(sums, position)), position
    assert ramp.sizes == (3, 7, 10)
    assert ramp.offset(10**9) == 22 + 10 * (10**9 - 6)


@pytest.mark.parametrize("stages", [(), ((1, 4),), ((0, 4), (0, 8)), ((0, 4), (9, 8), (5, 2)), ((0, 0),)])
def test_impossible_ramps_are_refused(stages):
    with pytest.raises(InputError, match="ramp"):
        BatchRamp(stages)
