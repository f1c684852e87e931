"""Writes malicious files: headers that claim more than the content, and pickles that run code when loaded."""

import io
import struct

import numpy as np
import pytest


class Evil:
    """An object that runs code when it is unpickled."""

    def __reduce__(self):
        return pytest.fail, ("unpickled",)


def npy(shape=(), kind="<i8", content=b"", columnwise=False):
    """Returns the bytes of a .npy file whose header claims a shape and a dtype."""
    header = repr({"descr": kind, "fortran_order": columnwise, "shape": shape}).encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + content


def pickled():
    """Returns the bytes of a .npy file with a pickled object, which must not be unpickled."""
    file = io.BytesIO()
    np.save(file, np.array([Evil()], object), allow_pickle=True)
    return file.getvalue()
