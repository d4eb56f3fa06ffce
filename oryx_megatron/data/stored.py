"""A dataset on object storage as megatron-core's samples read it.

megatron-core itself reads s3:// through boto3, without a bound or a copy on disk; this reads what fsspec does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from megatron.core.datasets.indexed_dataset import IndexedDataset, _BinReader, _IndexReader

from oryx_megatron.errors import DataError
from oryx_megatron.storage import Ranges, StorageError


class _Reader(_BinReader):
    def __init__(self, ranges: Ranges) -> None:
        self.ranges = ranges

    def read(self, dtype: type[np.number], count: int, offset: int) -> np.ndarray:
        start = int(offset)
        try:
            return np.frombuffer(self.ranges.read(start, start + int(count) * np.dtype(dtype).itemsize), dtype)
        except StorageError as error:
            raise DataError(str(error)) from error


class StoredIndexedDataset(IndexedDataset):
    """An indexed dataset whose tokens are read in blocks.

    Args:
        url: Prefix of its files.
        ranges: The .bin.
        index: A copy of the .idx.
    """

    def __init__(self, url: str, ranges: Ranges, index: Path) -> None:
        self.path_prefix, self.multimodal, self.mmap = url, False, False
        self._made_of = (url, ranges, index)
        self.bin_reader = _Reader(ranges)
        self.index = _IndexReader(str(index), False)

    def __getstate__(self) -> Any:
        return self._made_of

    def __setstate__(self, state: Any) -> None:
        self.__init__(*state)  # type: ignore[misc]
