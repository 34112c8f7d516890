"""Recurrent cells against the ONNX cases of RNN, LSTM and GRU, and against plain numpy."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from onnx.backend.test.case.node import collect_testcases

from bigmodel_jax.models.cells import CELLS, Options, run, segment_flags, zero_state

# Compiling without LLVM's expensive passes halves the time of this file.
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
OPERATORS = ("RNN", "LSTM", "GRU")
# Every case of the three operators is expressed.
INEXPRESSIBLE: dict[str, str] = {}


def _cases():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    for case in found:
        nodes = case.model.graph.node if case.model is not None else []
        if len(nodes) == 1 and nodes[0].op_type in OPERATORS:
            node = nodes[0]
            values = {a.name: {1: a.f, 2: a.i, 3: a.s}[a.type] for a in node.attribute}
            inputs, outputs = case.data_sets[0]
            given = dict(zip([n for n in node.input if n], inputs, strict=True))
            yield case.name, node.op_type, given, values, dict(zip([n for n in node.output if n], outputs, strict=True))


CASES = {case[0]: case[1:] for case in _cases()}


def onnx_weights(op, given, direction, reset_after=False):
    """One direction of ONNX weights under our names."""
    cell = CELLS[op.lower()]
    hidden = given["R"].shape[-1]
    w = {"kernel": given["W"][direction], "recurrent": given["R"][direction]}
    w = {name: jnp.reshape(value, (cell.gates, hidden, -1)).swapaxes(1, 2) for name, value in w.items()}
    if "B" in given:
        b, rb = jnp.reshape(given["B"][direction], (2, cell.gates, hidden))
        if op == "GRU" and reset_after:
            w["recurrent_bias"], rb = rb[2], rb.at[2].set(0)
        w["bias"] = b + rb
    if "P" in given:
        w["peephole"] = jnp.reshape(given["P"][direction], (3, hidden))
    return {name: jnp.asarray(value) for name, value in w.items()}


def onnx_run(op, given, values):
    """{"Y": [L, dirs, B, H], "Y_h": [dirs, B, H], "Y_c"} or the batch-first forms, as the standard has them."""
    cell, batch_first = CELLS[op.lower()], values.get("layout", 0) == 1
    x = given["X"] if batch_first else jnp.swapaxes(given["X"], 0, 1)
    directions = {b"forward": (False,), b"reverse": (True,), b"bidirectional": (False, True)}
    options = Options(reset_after=bool(values.get("linear_before_reset", 0)), clip=values.get("clip", 0.0))
    valid = None
    if "sequence_lens" in given:
        valid = jnp.arange(x.shape[1]) < jnp.asarray(given["sequence_lens"])[:, None]
    outputs, finals = [], []
    for d, reverse in enumerate(directions[values.get("direction", b"forward")]):
        state = list(zero_state(cell, x.shape[0], given["R"].shape[-1], jnp.float32))
        for n, name in enumerate(("initial_h", "initial_c")[: cell.states]):
            if name in given:
                first = given[name][:, d] if batch_first else given[name][d]
                state[n] = jnp.asarray(first)
        w = onnx_weights(op, given, d, options.reset_after)
        every, last = run(cell, w, jnp.asarray(x), tuple(state), valid=valid, reverse=reverse, options=options)
        outputs.append(every[0])
        finals.append(last)
    y = jnp.stack(outputs, 2)  # [B, L, dirs, H]
    final = [jnp.stack(f, 1) for f in zip(*finals, strict=True)]  # [B, dirs, H]
    if not batch_first:
        y, final = y.transpose(1, 2, 0, 3), [f.swapaxes(0, 1) for f in final]
    return {"Y": y} | dict(zip(("Y_h", "Y_c"), final, strict=False))


CONTROLS = {
    "test_lstm_with_peepholes": lambda g, v: (g | {"P": 3 * g["P"]}, v),
    "test_lstm_reverse": lambda g, v: (g, v | {"direction": b"forward"}),
    "test_gru_with_initial_bias": lambda g, v: (g, v | {"linear_before_reset": 1, "clip": 0.1}),
    "test_gru_seq_length": lambda g, v: (g, v | {"linear_before_reset": 1}),
    "test_rnn_seq_length": lambda g, v: (g | {"sequence_lens": np.array([1, 1, 2])}, v),
}


def every_case(options, given):
    right = {name: onnx_run(CASES[name][0], given[name], options[name]) for name in given}
    wrong = {n: onnx_run(CASES[n][0], *change(given[n], options[n])) for n, change in CONTROLS.items()}
    return right, wrong


@pytest.fixture(scope="module")
def computed():
    """{case: outputs} and {case: outputs with something changed}, in one program."""
    given = {name: CASES[name][1] for name in CASES if name not in INEXPRESSIBLE}
    options = {name: CASES[name][2] for name in given}
    return jax.jit(functools.partial(every_case, options), compiler_options=QUICK)(given)


@pytest.mark.parametrize("name", sorted(set(CASES) - set(INEXPRESSIBLE)))
def test_onnx_case(name, computed):
    for output, value in CASES[name][3].items():
        np.testing.assert_allclose(computed[0][name][output], value, rtol=1e-5, atol=2e-6)


def test_every_case_is_there_and_the_options_matter(computed):
    assert len(CASES) == 18 and set(INEXPRESSIBLE) <= set(CASES)
    for name, got in computed[1].items():
        expected = CASES[name][3]
        assert max(np.abs(got[k] - expected[k]).max() for k in expected) > 1e-3, name


# --- an independent numpy: batch of one, a loop over steps, ONNX's formulas with ONNX's weights ---


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def np_run(op, w, x, state, reset_after=True, clip=np.inf):
    """x [L, D], state list of [H]; w: {"W" [A, H, D], "R" [A, H, H], "Wb", "Rb" [A, H]}, P [3, H]."""
    out = []
    state = [s.copy() for s in state]

    def bound(a):
        return np.clip(a, -clip, clip)

    for row in x:
        a = [w["W"][g] @ row + w["Wb"][g] for g in range(len(w["W"]))]
        r = [w["R"][g] @ state[0] + w["Rb"][g] for g in range(len(w["W"]))]
        if op == "rnn":
            state = [np.tanh(bound(a[0] + r[0]))]
        elif op == "lstm":
            h, c = state
            i, f = (sigmoid(bound(a[g] + r[g] + w["P"][p] * c)) for g, p in ((0, 0), (2, 2)))
            c = f * c + i * np.tanh(bound(a[3] + r[3]))
            o = sigmoid(bound(a[1] + r[1] + w["P"][1] * c))
            state = [o * np.tanh(c), c]
        else:
            z, reset = (sigmoid(bound(a[g] + r[g])) for g in (0, 1))
            inner = reset * r[2] if reset_after else w["R"][2] @ (reset * state[0]) + w["Rb"][2]
            state = [(1 - z) * np.tanh(bound(a[2] + inner)) + z * state[0]]
        out.append(state)
    return out


def random_weights(op, inputs, hidden, seed=0):
    rng, gates = np.random.default_rng(seed), CELLS[op].gates
    shapes = {"W": (gates, hidden, inputs), "R": (gates, hidden, hidden), "Wb": (gates, hidden), "Rb": (gates, hidden)}
    return {name: rng.normal(size=s) for name, s in (shapes | {"P": (3, hidden)}).items()}


def ours(op, w, reset_after):
    bias = w["Wb"] + w["Rb"]
    own = {"kernel": w["W"].swapaxes(1, 2), "recurrent": w["R"].swapaxes(1, 2)}
    if op == "lstm":
        own["peephole"] = w["P"]
    if op == "gru" and reset_after:
        bias = bias.copy()
        bias[2], own["recurrent_bias"] = w["Wb"][2], w["Rb"][2]
    return {name: jnp.asarray(v) for name, v in (own | {"bias": bias}).items()}


@pytest.mark.parametrize(
    ("op", "options"),
    [("rnn", Options()), ("lstm", Options(clip=0.4)), ("gru", Options()), ("gru", Options(False, 0.5, 3))],
)
def test_segments_and_padding_equal_numpy_row_by_row(op, options, x64):
    """Rows [aaabb_] and [_cccc_] hold three documents: each as if alone, padding 0, both directions."""
    segments = np.array([[1, 1, 1, 2, 2, 0], [0, 1, 1, 1, 1, 0]])
    x = np.random.default_rng(1).normal(size=(2, 6, 3))
    w, cell = random_weights(op, 3, 4), CELLS[op]
    start = [np.zeros(4)] * cell.states
    own = ours(op, w, options.reset_after)

    def both(x):
        zeros = zero_state(cell, 2, 4, x.dtype)
        flags = [segment_flags(jnp.asarray(segments), reverse) for reverse in (False, True)]
        return [
            run(cell, own, x, zeros, reverse=reverse, options=options, **f)
            for reverse, f in zip((False, True), flags, strict=True)
        ]

    got = jax.jit(both, compiler_options=QUICK)(x)
    clip = options.clip or np.inf
    for reverse, (every, last) in zip((False, True), got, strict=True):
        for row, document in ((0, 1), (0, 2), (1, 1)):
            where = np.flatnonzero(segments[row] == document)[:: -1 if reverse else 1]
            expected = np_run(op, w, x[row, where], start, options.reset_after, clip)
            for n in range(cell.states):
                np.testing.assert_allclose(np.asarray(every[n])[row, where], [s[n] for s in expected], atol=1e-12)
        final = {False: 2, True: 1}[reverse]
        where = np.flatnonzero(segments[0] == final)[:: -1 if reverse else 1]
        expected = np_run(op, w, x[0, where], start, options.reset_after, clip)[-1]
        np.testing.assert_allclose(last[0][0], expected[0], atol=1e-12)
        assert not np.asarray(every[0])[segments == 0].any()
    # Control: without the border between documents 1 and 2 the second one sees the first.
    merged, _ = run(cell, own, jnp.asarray(x), zero_state(cell, 2, 4, x.dtype), options=options)
    assert np.abs(np.asarray(merged[0])[0, 3:5] - np.asarray(got[0][0][0])[0, 3:5]).max() > 1e-3
