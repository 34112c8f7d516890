"""Tables of numbers: scaling from the training rows alone, files, and what is refused."""

import numpy as np
import pytest
from sklearn.datasets import load_diabetes, load_wine

from bigmodel_jax.data.datasets import DATASETS
from bigmodel_jax.data.numeric import BUNDLED, NumericTable
from bigmodel_jax.errors import InputError


def whole(pipeline):
    size = pipeline.size(0)
    parts = [pipeline.batch(step) for step in range(pipeline.num_eval_batches)]
    batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    assert size * len(parts) >= len(pipeline)
    real = batch["weights"] > 0
    return {name: value[real] for name, value in batch.items()}


def loaded(**options):
    return NumericTable(**options).load(seed=0, batch_size=8, eval_batch_size=8)


def test_scaled_by_the_training_rows_alone():
    data = loaded(source="wine")
    x, y = load_wine(return_X_y=True)
    train, held = data.train.source.gather(np.arange(len(data.train))), whole(data.evals["validation"])
    assert (len(train["label"]), len(held["label"])) == (142, 36) and data.num_classes == 3 and data.num_features == 13
    np.testing.assert_allclose(train["features"].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(train["features"].std(0), 1, atol=1e-6)
    assert np.abs(held["features"].mean(0)).max() > 0.05  # control: of its own it is not centred
    # Every row is there once, in the same scale.
    raw = loaded(source="wine", standardise=False)
    rows = raw.train.source.gather(np.arange(142))["features"].astype(np.float64)
    both = np.concatenate([rows, whole(raw.evals["validation"])["features"]])
    np.testing.assert_allclose(sorted(map(tuple, both)), sorted(map(tuple, x.astype(np.float32))))
    scaled = (whole(raw.evals["validation"])["features"] - rows.mean(0)) / rows.std(0)
    np.testing.assert_allclose(held["features"], scaled, atol=1e-4)
    share = np.bincount(held["label"]) / 36
    np.testing.assert_allclose(share, np.bincount(y) / 178, atol=0.02)


@pytest.mark.parametrize("source", sorted(BUNDLED))
def test_spec_is_what_comes(source):
    dataset = DATASETS["table"](source=source)
    data = dataset.load(seed=0, batch_size=4, eval_batch_size=4)
    batch = data.train.batch(0)
    assert {n: (v.shape[1:], str(v.dtype)) for n, v in batch.items()} == dataset.spec()


def test_targets_of_a_regression():
    data = loaded(source="diabetes", scale_target=True)
    target = data.train.source.gather(np.arange(len(data.train)))["target"]
    assert data.num_classes == 1 and target.shape == (353, 1)
    np.testing.assert_allclose([target.mean(), target.std()], [0, 1], atol=1e-5)
    plain = loaded(source="diabetes").train.source.gather(np.arange(3))["target"]
    assert plain.max() > 20 and plain[0, 0] in load_diabetes().target


def test_columns_of_a_file(tmp_path):
    file = tmp_path / "cars.csv"
    rows = [f"{i},{i * i},{'ab'[i % 2]}" for i in range(20)]
    file.write_text("\n".join(["x,y,kind", *rows]) + "\n")
    data = loaded(source=str(file), features=("x", "y"), label="kind", standardise=False)
    batch = data.train.source.gather(np.arange(len(data.train)))
    np.testing.assert_array_equal(batch["features"][:, 1], batch["features"][:, 0] ** 2)
    np.testing.assert_array_equal(batch["label"], batch["features"][:, 0].astype(int) % 2)
    file.write_text("\n".join(["x,y,kind", *rows[:3], "oops,1,a", *rows]) + "\n")
    with pytest.raises(InputError, match="cars.csv line 5: 'x' is 'oops', not a number"):
        loaded(source=str(file), features=("x",), label="kind")
    with pytest.raises(InputError, match="did you mean 'diabetes'"):
        NumericTable(source="diabetis")
    with pytest.raises(InputError, match="brings its own"):
        NumericTable(source="wine", label="x")
