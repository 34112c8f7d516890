"""TensorFlow Datasets: random access for training, a stream of documents for `bigmodel prepare`.

Text corpora (C4, LM1B, Wikipedia) are not tokenised on the fly: `bigmodel prepare` reads them once through
`tfds_documents` and writes token shards, which are then read without tensorflow.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

import numpy as np

from bigmodel_jax.data.folders import fit_image
from bigmodel_jax.errors import InputError, nearest


def tensorflow() -> Any:
    """The tensorflow module with accelerators hidden from it, so that it takes none of their memory."""
    import tensorflow as tf

    try:
        for kind in ("GPU", "TPU"):
            tf.config.set_visible_devices([], kind)
    except RuntimeError as error:
        raise InputError(
            f"tensorflow was used before the data pipeline and holds the accelerators ({error})"
        ) from error
    return tf


def _library() -> Any:
    try:
        tensorflow()
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(f"tensorflow_datasets is not installed ({error}); pip install tensorflow-datasets") from error
    return tfds


def _opened(name: str, split: str, data_dir: str | None, download: bool) -> tuple[Any, Any]:
    """(tfds.data_source of the split, builder info)."""
    tfds = _library()
    where = f" --data_dir={data_dir}" if data_dir else ""
    how = f"prepare it where there is a network: tfds build {name} --file_format=array_record{where}"
    try:
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
    except tfds.core.DatasetNotFoundError as error:
        close = nearest(name.split("/")[0], tfds.list_builders())
        raise InputError(f"tfds has no data set '{name}'{close or '; see tfds.list_builders()'}") from error
    except Exception as error:
        raise InputError(f"tfds data set '{name}' cannot be opened ({_first_line(error)}); {how}") from error
    try:
        if download:
            builder.download_and_prepare(file_format="array_record")
        splits, base = dict(builder.info.splits), split.split("[")[0].split("+")[0]
        if splits and base not in splits and base != "all":
            close = nearest(base, splits)
            raise InputError(f"tfds data set '{name}' has no split '{split}', only {', '.join(splits)}{close}")
        return builder.as_data_source(split=split), builder.info
    except InputError:
        raise
    except Exception as error:
        # Whatever failed (no network, no space, files of another format), the way out is the same.
        raise InputError(f"tfds data set '{name}' is not prepared ({_first_line(error)}); {how}") from error


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:160]}" if lines else type(error).__name__


class Tfds:
    """A TFDS split by random access: {our name: [n, ...]} for `fields` {our name: TFDS feature}.

    Images of varying size (ImageNet) need `size` (H, W): they are scaled to cover it and centre-cropped.
    Labels become int32; text stays an object array of bytes. Fields that are None are all features.

    Errors: InputError for an unknown data set, split or feature, and, saying how to prepare it, for a
    data set that is not on disk and cannot be downloaded.
    """

    def __init__(
        self,
        name: str,
        split: str,
        fields: Mapping[str, str] | None = None,
        size: tuple[int, int] | None = None,
        data_dir: str | None = None,
        download: bool = True,
    ):
        self.name, self.split, self.size = name, split, size
        self._data, self.info = _opened(name, split, data_dir, download)
        features = list(self.info.features or {})
        self.fields = dict(fields) if fields is not None else {feature: feature for feature in features}
        for feature in self.fields.values():
            if feature not in features:
                raise InputError(f"tfds data set '{name}' has no feature '{feature}'{nearest(feature, features)}")
        if not len(self._data):
            raise InputError(f"tfds data set '{name}' split '{split}' is empty")

    def __len__(self) -> int:
        return len(self._data)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of name, version, configuration, split, its size and the fields."""
        parts = [self.info.full_name, self.split, len(self), sorted(self.fields.items()), self.size]
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def classes(self, feature: str = "label") -> list[str]:
        """Names of the classes of a label feature, numbers where it has none."""
        return list(self.info.features[feature].names)

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        # Decoding an image leaves the interpreter lock; 16 records are a task.
        return ThreadPoolExecutor(min(16, os.cpu_count() or 1), thread_name_prefix="tfds")

    def gather(self, index: np.ndarray) -> dict[str, np.ndarray]:
        if not len(index):
            return {name: value[:0] for name, value in self.gather(np.zeros(1, np.int64)).items()}
        parts = [part.tolist() for part in np.array_split(index, -(-len(index) // 16))]
        records = [record for part in self._pool.map(self._data.__getitems__, parts) for record in part]
        return {name: self._column([r[feature] for r in records], feature) for name, feature in self.fields.items()}

    def _column(self, values: list[Any], feature: str) -> np.ndarray:
        if isinstance(values[0], bytes | str):
            return np.array([v.encode() if isinstance(v, str) else v for v in values], object)
        arrays = [np.asarray(value) for value in values]
        if arrays[0].ndim == 3 and self.size is not None:
            arrays = [self._sized(value) for value in arrays]
        if len({value.shape for value in arrays}) > 1:
            raise InputError(f"tfds data set '{self.name}': '{feature}' varies in shape; give `size` (H, W)")
        stacked = np.stack(arrays)
        small = stacked.ndim == 1 and np.issubdtype(stacked.dtype, np.integer)
        return stacked.astype(np.int32) if small else stacked

    def _sized(self, value: np.ndarray) -> np.ndarray:
        from PIL import Image

        channels = value.shape[-1]
        image = Image.fromarray(value if channels == 3 else value[..., 0])
        return fit_image(image, self.size, channels)


def tfds_documents(
    name: str, split: str, field: str = "text", data_dir: str | None = None, download: bool = True
) -> Iterator[str]:
    """Documents of a TFDS text data set, in order: what `bigmodel prepare --source tfds:NAME` reads.

    Errors: InputError for an unknown or unprepared data set, a missing field, or text that is not UTF-8.
    """
    source = Tfds(name, split, {"text": field}, data_dir=data_dir, download=download)
    for start in range(0, len(source), 512):
        column = source.gather(np.arange(start, min(start + 512, len(source))))["text"]
        for offset, value in enumerate(column.tolist()):
            if not isinstance(value, bytes):
                raise InputError(f"tfds data set '{name}': feature '{field}' is not text")
            try:
                yield value.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"tfds data set '{name}': example {start + offset} is not UTF-8 ({error})") from error
