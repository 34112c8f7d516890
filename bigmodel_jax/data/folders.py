"""Image files in class folders, decoded on demand by threads."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import numpy as np

from bigmodel_jax.errors import InputError

_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


def fit_image(image: object, size: tuple[int, int], channels: int, fit: str = "cover") -> np.ndarray:
    """PIL image -> uint8 [H, W, channels].

    fit "cover" keeps proportions: scaled until it covers H x W, then centre-cropped. "stretch" ignores them.
    """
    from PIL import Image

    height, width = size
    image = image.convert("RGB" if channels == 3 else "L")  # type: ignore[attr-defined]
    if image.size != (width, height):
        scale = max(width / image.size[0], height / image.size[1])
        wide = (width, height) if fit == "stretch" else tuple(
            max(round(side * scale), least) for side, least in zip(image.size, (width, height), strict=True)
        )  # fmt: skip
        image = image.resize(wide, Image.Resampling.BILINEAR, reducing_gap=2.0)
        left, top = (wide[0] - width) // 2, (wide[1] - height) // 2
        image = image.crop((left, top, left + width, top + height))
    return np.asarray(image, np.uint8).reshape(height, width, channels)


class ImageFolder:
    """folder/<class>/<image>: image [n, H, W, C] uint8, label [n] int32 in sorted order of class names.

    Fingerprint: relative names and sizes. Errors: InputError for a missing or empty folder, and, naming
    the file, for an image that cannot be decoded.
    """

    def __init__(
        self, folder: str, size: tuple[int, int], channels: int = 3, fit: str = "cover", threads: int = 0,
        classes: Sequence[str] | None = None,
    ):  # fmt: skip
        self.folder = os.fspath(folder)
        self.size, self.channels, self.fit = (int(size[0]), int(size[1])), channels, fit
        if channels not in (1, 3) or fit not in ("cover", "stretch") or min(self.size) < 1:
            raise InputError(f"image folder: size {size}, channels {channels} (1 or 3), fit '{fit}' (cover or stretch)")
        if not os.path.isdir(self.folder):
            raise InputError(f"image folder: {folder} does not exist; it should hold one folder per class")
        found = sorted(entry.name for entry in os.scandir(self.folder) if entry.is_dir() and entry.name[0] != ".")
        self.classes = tuple(classes or found)
        absent = [name for name in self.classes if name not in found]
        if absent:
            raise InputError(f"image folder: {folder} has no class folder '{absent[0]}'")
        self._files: list[str] = []
        labels, self._sizes = [], []
        for label, name in enumerate(self.classes):
            entries = sorted(os.scandir(os.path.join(self.folder, name)), key=lambda entry: entry.name)
            for entry in entries:
                if entry.is_file() and entry.name.lower().endswith(_SUFFIXES):
                    self._files.append(f"{name}/{entry.name}")
                    self._sizes.append(entry.stat().st_size)
                    labels.append(label)
        if not self._files:
            raise InputError(f"image folder: {folder} holds no images; expected <class>/<name>.jpg, .png ...")
        self._labels = np.array(labels, np.int32)
        self._threads = threads or min(16, os.cpu_count() or 1)

    def __len__(self) -> int:
        return len(self._files)

    @cached_property
    def fingerprint(self) -> str:
        h = hashlib.sha256(f"{self.size} {self.channels} {self.fit} {self.classes}\n".encode())
        for name, size in zip(self._files, self._sizes, strict=True):
            h.update(f"{name} {size}\n".encode())
        return h.hexdigest()

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(self._threads, thread_name_prefix="decode")

    def _decode(self, index: int) -> np.ndarray:
        from PIL import Image

        path = os.path.join(self.folder, self._files[index])
        try:
            with Image.open(path) as image:
                return fit_image(image, self.size, self.channels, self.fit)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"image folder: {path} cannot be decoded ({error}); repair or remove it") from error

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        images = list(self._pool.map(self._decode, index.tolist()))
        shape = (len(index), *self.size, self.channels)
        stacked = np.stack(images) if images else np.zeros(shape, np.uint8)
        return {"image": stacked, "label": self._labels[index]}
