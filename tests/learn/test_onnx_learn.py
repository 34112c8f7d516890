"""The numpy cases of the ONNX test suite: optimizers and cross-entropies."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
from onnx.backend.test.case.node import collect_testcases

from bigmodel_jax.learn import losses, optim

INEXPRESSIBLE = {
    "test_adagrad": "Adagrad is not among our optimizers",
    "test_adagrad_multiple": "Adagrad is not among our optimizers",
}


@functools.cache
def onnx_cases(*operators):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = collect_testcases(None)
    found = [c for c in found if c.model and len(c.model.graph.node) == 1]
    return {c.name: c for c in found if c.model.graph.node[0].op_type in operators}


def test_onnx_cases_of_adam_and_momentum():
    ran = []
    for name, case in onnx_cases("Adam", "Momentum", "Adagrad").items():
        if name in INEXPRESSIBLE:
            continue
        node = case.model.graph.node[0]
        o = {a.name: a.f if a.type == 1 else a.s for a in node.attribute}
        inputs, outputs = case.data_sets[0]
        r, t, *tensors = (np.asarray(x) for x in inputs)
        assert t == 0, "ONNX corrects no bias and dampens nothing at T = 0"
        slots = ("mu", "nu") if node.op_type == "Adam" else ("momentum",)
        n = len(tensors) // (2 + len(slots))
        names = [str(i) for i in range(n)]
        groups = [dict(zip(names, tensors[k : k + n], strict=True)) for k in range(0, len(tensors), n)]
        options = dict(decay="l2", weight_decay=o["norm_coefficient"], groups=[(".*", {})])
        if node.op_type == "Adam":
            options |= dict(name="adam", b1=o["alpha"], b2=o["beta"], eps=o["epsilon"], bias_correction=False)
        else:
            nesterov = o["mode"] == b"nesterov"
            options |= dict(name="nesterov" if nesterov else "momentum", beta=o["alpha"])
        tx = optim.make(groups[0], lr=lambda step, r=r: jnp.asarray(r, jnp.float32), **options)
        state = tx.init(groups[0]) | dict(zip(slots, groups[2:], strict=True))
        change, state = tx.update(groups[1], state, groups[0])
        got = [optim.apply(groups[0], change)] + [state[s] for s in slots]
        flat = [np.asarray(tree[str(i)]) for tree in got for i in range(n)]
        for ours, theirs in zip(flat, outputs, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, err_msg=name)
        ran.append(name)
    assert len(ran) == 5, ran


@jax.jit
def per_position(logits, targets, weights):
    """losses.cross_entropy of each position alone: (loss, nll) [T]."""
    head = jax.tree_util.Partial(lambda hidden: hidden)

    def one(x, t, w):
        loss, aux = losses.cross_entropy(x[None], head, t[None], w[None])
        return loss, aux["nll"]

    return jax.vmap(one)(logits, targets, weights)


def test_onnx_cases_of_cross_entropy():
    """Class weights and the ignored index become weights of positions."""
    ran, cases = 0, onnx_cases("SoftmaxCrossEntropyLoss", "NegativeLogLikelihoodLoss")
    for name, case in cases.items():
        node = case.model.graph.node[0]
        o = {a.name: a.i if a.type == 2 else a.s for a in node.attribute}
        inputs, outputs = case.data_sets[0]
        x, targets = np.moveaxis(inputs[0], 1, -1), inputs[1]
        classes = x.shape[-1]
        inside = np.clip(targets, 0, classes - 1)
        w = inputs[2][inside] if len(inputs) > 2 else np.ones(targets.shape, np.float32)
        w = np.where(targets == o.get("ignore_index"), 0, w).astype(np.float32)
        flat = x.reshape(-1, classes)
        loss, _ = per_position(flat, targets.reshape(-1), w.reshape(-1))
        loss = np.asarray(loss).reshape(targets.shape)
        if node.op_type == "NegativeLogLikelihoodLoss":  # its input is not normalised
            z = np.log(np.exp(x.astype(np.float64)).sum(-1))
            loss = loss - w * z
        got = {b"none": loss, b"sum": loss.sum(), b"mean": loss.sum() / w.sum()}
        want = outputs[0]
        np.testing.assert_allclose(got[o["reduction"]], want, rtol=2e-5, atol=1e-5, err_msg=name)
        ran += 1
    assert ran == 52
