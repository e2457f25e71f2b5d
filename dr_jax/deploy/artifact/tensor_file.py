"""The safetensors format: an 8-byte length, a JSON header, and the arrays.

https://github.com/huggingface/safetensors, read by ranges: from the header
follows where each array lies, and nothing else has to be read to read one.
Written here, because the order of the arrays decides what lies side by side,
and because numpy has no bfloat16 of its own.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from dr_jax.deploy.artifact.manifest import NAME, Broken
from dr_jax.deploy.artifact.reader import Reader
from dr_jax.runtime import schema
from dr_jax.runtime.schema import COUNT, Where

_DTYPES = {
  name: np.dtype(dtype)
  for name, dtype in {
    "F64": np.float64,
    "I64": np.int64,
    "U64": np.uint64,
    "F32": np.float32,
    "I32": np.int32,
    "U32": np.uint32,
    "F16": np.float16,
    "BF16": jnp.bfloat16,
    "I16": np.int16,
    "U16": np.uint16,
    "F8_E4M3": jnp.float8_e4m3fn,
    "F8_E5M2": jnp.float8_e5m2,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
  }.items()
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_OFFSETS = Where([COUNT], lambda pair: len(pair) == 2, "two offsets")
_TENSOR = {"dtype": str, "shape": [COUNT], "data_offsets": _OFFSETS}
_LARGEST_HEADER = 2**22  # of forty thousand tensors
_LENGTH = 8  # bytes of the header's own length


class Tensor(NamedTuple):
  """Where an array lies: its bytes are `start` to `end` of the file."""

  dtype: np.dtype
  shape: tuple[int, ...]
  start: int
  end: int


class Header(NamedTuple):
  """What a file says of itself.

  Attributes:
    data: its first bytes, up to the arrays.
    tensors: by name, in the order of the file.
  """

  data: bytes
  tensors: dict[str, Tensor]


def dumps(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, bytes]:
  """Returns header and arrays as bytes, the widest dtypes first.

  Raises:
    ValueError: if the format has no such dtype.
  """
  # Each array then starts at a multiple of its item size.
  ordered = sorted(arrays.items(), key=lambda item: -item[1].dtype.itemsize)
  entries, chunks, end = {}, [], 0
  for name, array in ordered:
    if array.dtype not in _NAMES:
      raise ValueError(
        f"{name} must have a dtype that safetensors has, got {array.dtype}"
      )
    chunks.append(array.tobytes())
    start, end = end, end + array.nbytes
    entries[name] = {
      "dtype": _NAMES[array.dtype],
      "shape": array.shape,
      "data_offsets": [start, end],
    }
  text = json.dumps(entries, separators=(",", ":")).encode()
  text += b" " * (-len(text) % 8)
  return len(text).to_bytes(_LENGTH, "little") + text, b"".join(chunks)


def read_header(reader: Reader) -> Header:
  """Reads and checks the header of a file, and nothing else.

  Raises:
    ValueError: if it is damaged, or does not fit the size of the file.
  """
  length = reader.size - _LENGTH
  if length >= 2:
    data = reader.read(0, _LENGTH)
    length = min(length, _LARGEST_HEADER)
    if 2 <= int.from_bytes(data, "little") <= length:
      data += reader.read(_LENGTH, _LENGTH + int.from_bytes(data, "little"))
      return parse_header(data, reader.size)
  raise Broken("is damaged: it is not a safetensors file")


def parse_header(data: bytes, size: int) -> Header:
  """Parses the first bytes of a file of that size.

  Raises:
    ValueError: if they are not a header, or not that of such a file.
  """
  try:
    entries = schema.parse(data[_LENGTH:])
    schema.check(entries, {...: object})
    entries.pop("__metadata__", None)
    schema.check(entries, {...: _TENSOR})
    tensors = {
      name: _tensor(name, entry, len(data)) for name, entry in entries.items()
    }
  except ValueError as error:
    raise Broken(f"is damaged: its header: {error}") from None
  tensors = dict(sorted(tensors.items(), key=lambda item: item[1][2:]))
  end = len(data)
  for name, tensor in tensors.items():
    if tensor.start != end:
      raise Broken(
        f"is damaged: its header: {name} must begin at byte {end}, got "
        f"{tensor.start}"
      )
    end = tensor.end
  if size != end:
    raise Broken(f"is damaged: it must have {end} bytes, got {size}")
  return Header(data, tensors)


def _tensor(name, entry, offset):
  schema.check(name, NAME, "tensor")
  dtype, shape = _DTYPES.get(entry["dtype"]), tuple(entry["shape"])
  if dtype is None:
    raise ValueError(
      f"dtype of {name} must be one of {', '.join(_DTYPES)}, got "
      f"{schema.shown(entry['dtype'])}"
    )
  if len(shape) > 32:
    raise ValueError(f"{name} must have at most 32 axes, got {len(shape)}")
  start, end = entry["data_offsets"]
  size = math.prod(shape) * dtype.itemsize
  if end - start != size:
    raise ValueError(f"{name} must have {size} bytes, got {end - start}")
  return Tensor(dtype, shape, offset + start, offset + end)
