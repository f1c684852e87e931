"""`Tensor`: one tensor of a checkpoint, which is read on demand."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np


class Tensor(NamedTuple):
    """One tensor of a file, which is read on demand.

    Attributes:
        shape: its shape.
        dtype: name of its dtype in the file.
        file: the file.
        read: reads and returns it; floating-point numbers of any width become float32.
    """

    shape: tuple[int, ...]
    dtype: str
    file: Path
    read: Callable[[], np.ndarray]


def plain(value: np.ndarray) -> np.ndarray:
    """Returns floating-point arrays of any width as float32, and other arrays unchanged."""
    return value.astype(np.float32) if value.dtype in (np.float16, np.float64, ml_dtypes.bfloat16) else value
