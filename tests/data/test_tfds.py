"""TFDS by random access, on generated records of the real schemas: no network."""

import numpy as np
import pytest

from bigmodel_jax.data import tables
from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.data.tfds import Tfds, tensorflow, tfds_documents
from bigmodel_jax.errors import InputError


@pytest.fixture
def mocked():
    tensorflow()
    import tensorflow_datasets as tfds
    from tensorflow_datasets.testing import mocking

    # The mock's batched read is attached to an instance, so it is called without `self`.
    original = mocking._getitems
    mocking._getitems = lambda keys, generator, **kw: original(None, keys, generator, **kw)
    with tfds.testing.mock_data(num_examples=20):
        yield
    mocking._getitems = original


@pytest.mark.parametrize("name, shape", [("mnist", (28, 28, 1)), ("cifar10", (32, 32, 3))])
def test_images_by_number(mocked, name, shape):
    source = Tfds(name, "train", {"image": "image", "label": "label"})
    batch = source.gather(np.array([7, 0, 7, 19]))
    assert batch["image"].shape == (4, *shape) and batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32 and len(source.classes()) == 10 and len(source) == 20
    alone = source.gather(np.array([19]))
    assert np.array_equal(alone["image"][0], batch["image"][3]) and alone["label"][0] == batch["label"][3]
    assert np.array_equal(batch["image"][0], batch["image"][2])
    assert not np.array_equal(batch["image"][0], batch["image"][1])
    assert source.gather(np.zeros(0, np.int64))["image"].shape == (0, *shape)
    assert source.fingerprint != Tfds(name, "test", {"image": "image", "label": "label"}).fingerprint
    many = source.gather(np.arange(20))
    assert np.array_equal(many["image"][[7, 19]], batch["image"][[0, 3]])
    small = Tfds(name, "train", {"image": "image"}, size=(9, 5)).gather(np.arange(3))
    assert small["image"].shape == (3, 9, 5, shape[-1])


def test_pipeline_over_tfds_in_both_forms(mocked):
    pipe = Pipeline(Tfds("mnist", "train", {"image": "image", "label": "label"}), 6, seed=1)
    labels = np.concatenate([pipe.ids(step) for step in range(4)])[:20]
    assert sorted(labels) == list(range(20))
    for step, got in zip(range(2, 5), pipe.tfdata(2).as_numpy_iterator(), strict=False):
        want = pipe.batch(step)
        assert got.keys() == want.keys() and all(np.array_equal(got[k], want[k]) for k in want)


def test_text_comes_as_documents(mocked):
    documents = list(tfds_documents("imdb_reviews", "train"))
    assert len(documents) == 20 and all(isinstance(d, str) and d for d in documents)
    source = Tfds("imdb_reviews", "train", {"text": "text", "label": "label"})
    assert source.classes() == ["neg", "pos"]
    assert [t.decode() for t in source.gather(np.array([3, 11]))["text"]] == [documents[3], documents[11]]
    with pytest.raises(InputError, match="is not text"):
        list(tfds_documents("imdb_reviews", "train", field="label"))


def test_a_table_of_tfds_has_its_columns_of_one_value_per_row(mocked):
    table = tables.read("tfds:imdb_reviews:train")
    assert table.columns.keys() == {"text", "label"} and len(table) == 20
    assert table.texts("text") == list(tfds_documents("imdb_reviews", "train"))
    labels = Tfds("imdb_reviews", "train", {"label": "label"}).gather(np.arange(20))["label"]
    assert tables.label_ids(table, "label", ["0", "1"]).tolist() == labels.tolist()
    assert table.where(4) == "tfds:imdb_reviews:train line 5"
    assert tables.read("tfds:mnist:train").columns.keys() == {"label"}  # images are no column
    with pytest.raises(InputError, match="tfds:NAME:SPLIT"):
        tables.read("tfds:imdb_reviews")


def test_wrong_names_get_one_line(mocked):
    for args, words in [
        (("mnits", "train"), "did you mean 'mnist'"),
        (("mnist", "train", {"image": "imag"}), "did you mean 'image'"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=words) as error:
            Tfds(*args)
        assert "\n" not in str(error.value)


def test_unknown_split_is_named_where_splits_are_known(mocked, monkeypatch):
    import tensorflow_datasets as tfds

    # The mock knows no splits; prepared data does.
    monkeypatch.setattr(tfds.core.DatasetInfo, "splits", property(lambda self: {"train": None, "test": None}))
    with pytest.raises(InputError, match="only train, test; did you mean 'train'"):
        Tfds("mnist", "trian")
    assert len(Tfds("mnist", "train[:50%]+test")) == 20


@pytest.mark.parametrize("download", [False, True])
def test_unprepared_data_says_how_to_prepare_it(tmp_path, monkeypatch, download):
    tensorflow()
    import tensorflow_datasets as tfds

    def offline(self, **kwargs):
        raise ConnectionError("no route to host\nmore lines")

    monkeypatch.setattr(tfds.core.DatasetBuilder, "download_and_prepare", offline)
    with pytest.raises(InputError, match="tfds build mnist --file_format=array_record") as error:
        Tfds("mnist", "train", data_dir=str(tmp_path), download=download)
    assert "\n" not in str(error.value) and ("no route to host" in str(error.value)) == download
