"""Reads artifacts of Double Rounding as dr_jax/deploy/artifact/README.md says.

Nothing of dr_jax is imported here: only the format page was used.
"""

import hashlib
import json
import pathlib
import struct

import numpy as np

DTYPES = {"F32": np.float32, "U8": np.uint8, "I32": np.int32}


class Reader:
  """One artifact, of which each array is read when it is asked for."""

  def __init__(self, path):
    path = pathlib.Path(path)
    self.manifest = json.loads((path / "manifest.json").read_bytes())
    signed = {k: v for k, v in self.manifest.items() if k != "manifest_sha256"}
    text = json.dumps(signed, sort_keys=True).encode()
    check(self.manifest["manifest_sha256"], text)
    self.file = path / "model.safetensors"
    with self.file.open("rb") as file:
      (length,) = struct.unpack("<Q", file.read(8))
      header = file.read(length)
    self.begin = 8 + length
    self.tensors = json.loads(header)
    names = sorted(
      self.tensors, key=lambda name: self.tensors[name]["data_offsets"]
    )
    whole = [
      name
      for name in names
      if not name.startswith(("norms/", "planes/")) and name != "subchecksums"
    ]
    content = b"".join(self.tensor(name).tobytes() for name in whole)
    prefix = struct.pack("<Q", length) + header
    check(self.manifest["sha256"], prefix + content)
    options = self.manifest["method"]["options"]
    self.bits, self.rounding = options["bits"], options["rounding"]

  def tensor(self, name):
    """A whole tensor."""
    entry = self.tensors[name]
    start, end = entry["data_offsets"]
    with self.file.open("rb") as file:
      file.seek(self.begin + start)
      data = file.read(end - start)
    return np.frombuffer(data, DTYPES[entry["dtype"]]).reshape(entry["shape"])

  def sections(self):
    """{section: {layer or norm: number of entries}}, in order."""
    found = {}
    norms = self.manifest["norms"]
    pairs = any(len(norm["follows"]) == 2 for norm in norms.values())
    for name, norm in norms.items():
      for row in range(norm["rows"]):
        single = pairs and len(norm["follows"]) == 1
        number = row * (norm["rows"] + 1) if single else row
        found.setdefault(number, {})[name] = 2 * norm["channels"]
    found = {f"norms/{number}": found[number] for number in sorted(found)}
    if self.rounding != "half_even" and len(self.bits) > 1:
      sizes = {
        layer["name"]: (int(np.prod(layer["shape"])) + 7) // 8
        for layer in self.manifest["layers"]
      }
      found |= {f"planes/{p}": sizes for p in range(self.bits[0])}
    return found

  def piece(self, section, name):
    """What one layer or norm has in a section, verified."""
    sections = self.sections()
    sizes = sections[section]
    start = sum(list(sizes.values())[: list(sizes).index(name)])
    array = self.tensor(section)[start : start + sizes[name]]
    before = list(sections)[: list(sections).index(section)]
    first = sum(len(sections[other]) for other in before)
    rows = self.tensor("subchecksums")[first : first + len(sizes)]
    check(self.tensor("checksums")[len(before)].tobytes().hex(), rows.tobytes())
    number = list(sizes).index(name)
    check(rows[number].tobytes().hex(), array.tobytes())
    return array

  def codes(self, name, bits):
    """Codes of the highest bit-width, int64, from the planes that it needs."""
    shape = next(
      layer["shape"]
      for layer in self.manifest["layers"]
      if layer["name"] == name
    )
    size, high = int(np.prod(shape)), self.bits[0]
    if "planes/0" in self.tensors:
      needed = min(bits + (self.rounding == "half_up"), high)
      total = np.zeros(size, np.int64)
      for p in range(needed):
        octets = self.piece(f"planes/{p}", name)
        stream = (octets[:, None] >> np.arange(8)) & 1
        total += stream.reshape(-1)[:size].astype(np.int64) << (high - 1 - p)
    else:
      start = 0
      for layer in self.manifest["layers"]:
        end = start + (int(np.prod(layer["shape"])) * high + 7) // 8
        if layer["name"] == name:
          break
        start = end
      octets = self.tensor("layers/codes")[start:end]
      stream = ((octets[:, None] >> np.arange(8)) & 1).reshape(-1)
      stream = stream[: size * high].reshape(size, high).astype(np.int64)
      total = (stream << np.arange(high)).sum(1)
    total[total >= 2 ** (high - 1)] -= 2**high
    return total.reshape(shape)

  def scale(self, name):
    """Scale of a layer, [c_out] or [1]."""
    start, per_channel = 0, self.manifest["method"]["options"]["per_channel"]
    for layer in self.manifest["layers"]:
      end = start + (layer["shape"][-1] if per_channel else 1)
      if layer["name"] == name:
        return self.tensor("layers/scale")[start:end]
      start = end
    raise KeyError(name)

  def input_scales(self, name):
    """Scales of a layer's inputs, one per bit-width."""
    layers = self.manifest["layers"]
    names = [layer["name"] for layer in layers if layer["signed"] is not None]
    scales = self.tensor("inputs/scale").reshape(len(names), len(self.bits))
    return scales[names.index(name)]

  def operand_scales(self, name):
    """Scales of an operand of a product, one per bit-width."""
    names = list(self.manifest["operands"])
    scales = self.tensor("operands/scale").reshape(len(names), len(self.bits))
    return scales[names.index(name)]

  def rows(self, name):
    """Yields gain and offset of each row of a norm."""
    norms = self.manifest["norms"]
    pairs = any(len(norm["follows"]) == 2 for norm in norms.values())
    for row in range(norms[name]["rows"]):
      if pairs and len(norms[name]["follows"]) == 1:
        row *= len(self.bits) + 1
      yield self.piece(f"norms/{row}", name).reshape(2, -1)

  def weight(self, name, bits):
    """The float32 weight of a layer at a bit-width."""
    shift = self.bits[0] - bits
    q = self.codes(name, bits)
    half = (1 << shift) >> 1
    if self.rounding == "half_up":
      q = (q + half) >> shift
    elif self.rounding == "floor":
      q = q >> shift
    elif shift:
      q = (q + half - 1 + ((q >> shift) & 1)) >> shift
    q = np.clip(q, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1).astype(np.float32)
    return q * (self.scale(name) * np.float32(2**shift))


def check(expected, content):
  assert hashlib.sha256(content).hexdigest() == expected
