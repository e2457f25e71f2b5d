"""Artifacts that were changed, with checksums that fit and without.

What disks and networks do leaves the checksums as they were, and these find it.
Whoever changes an artifact on purpose computes them again: then it is refused
with one error within 5 seconds, or gives the same outputs; where the values of
tensors, whose they are or the method were changed, other ones that are not NaN.
"""

import copy
import json
import random
import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dr_jax import deploy, models, nn, quant
from dr_jax.deploy.artifact.manifest import MANIFEST, TENSORS
from tests.support.forged import serialized, signed

BITS = (8, 4, 2)
# CPU seconds for one artifact, whatever it claims.
LONGEST = 5.0
OPTIONS = {"depth": 8, "num_classes": 3, "channels": 2, "widths": (2, 4, 4)}
METHODS = {
  "double_rounding": (quant.double_rounding(BITS), quant.lsq_activation(BITS)),
  "half_up": (
    quant.double_rounding(BITS, rounding="half_up"),
    quant.lsq_activation(BITS),
  ),
  "bitwave": (quant.bitwave(BITS), quant.term_activation(BITS)),
  "lsq": (quant.lsq(BITS), quant.lsq_plus_activation(BITS)),
  "matquant": (quant.truncation(BITS, scheme="matquant"), None),
  "adabits": (
    quant.adabits(BITS, rescale=True),
    quant.pact_activation(BITS),
  ),
  "any_precision": (quant.any_precision(BITS), quant.unit_activation(BITS)),
  "multi_resolution": (
    quant.multi_resolution(BITS),
    quant.multi_resolution_activation(BITS),
  ),
  "ternary": (quant.ternary(), quant.lsq_activation((2,))),
}

DEFAULT = ("half_up", "bitwave")


class Network(nnx.Module):
  """Convolutions with and without groups, norms, a linear layer, a table."""

  def __init__(self, rngs):
    self.first = nnx.Conv(2, 4, (3, 3), use_bias=False, rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)
    self.grouped = nnx.Conv(4, 4, (3, 1), feature_group_count=2, rngs=rngs)
    self.last = nnx.Linear(4, 3, rngs=rngs)
    self.table = np.float32([0.5, -np.inf, 2])

  def __call__(self, x):
    x = nnx.relu(self.norm(self.first(x)))
    x = self.last(self.grouped(x).mean((1, 2)))
    return jnp.where(self.table > 0, x, -1)


class Case(NamedTuple):
  """An artifact and what it must give.

  Attributes:
    manifest: without its own checksum.
    tensors: as in the file.
    files: names and bytes of the files.
    model: for `load`; None if the artifact names its architecture.
    outputs: of the network, by bit-width.
    state: of the network as it is loaded.
  """

  manifest: dict[str, Any]
  tensors: dict[str, np.ndarray]
  files: dict[str, bytes]
  model: nnx.Module | None
  outputs: dict[int, np.ndarray]
  state: tuple[Any, list[np.ndarray]]


def images(size=3):
  return jax.random.normal(jax.random.key(0), (size, 4, 4, 2))


def outputs_of(network):
  found = {}
  for bits in nn.candidates(network):
    nn.set_bits(network, bits)
    found[bits] = np.asarray(network(images()))
  return found


def state_of(network):
  """All that the outputs of a network depend on."""
  graph, state = nnx.split(network)
  return graph, [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def is_same(state, other):
  return state[0] == other[0] and has_same_arrays(state, other)


def has_same_arrays(state, other):
  """Also where quantizers of equal options were built again in between."""
  return all(
    a.dtype == b.dtype and np.array_equal(a, b, equal_nan=a.dtype.kind == "f")
    for a, b in zip(state[1], other[1], strict=True)
  )


def case_of(path, method, architecture=False):
  weight, activation = METHODS[method]
  model = Network(nnx.Rngs(0))
  if architecture:
    model = models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS)
  network = nn.quantize(
    model,
    weight=weight,
    activation=activation,
    sample=images(),
    norm="transitional",
    skip=() if method == "lsq" else nn.first_and_last,
  )
  named = ("resnet", OPTIONS) if architecture else None
  deploy.save(path, network, architecture=named)
  files = {name: (path / name).read_bytes() for name in (MANIFEST, TENSORS)}
  manifest = json.loads(files[MANIFEST])
  del manifest["manifest_sha256"]
  # The library returns them in any order; the choice among them is seeded.
  tensors = dict(sorted(safetensors.numpy.load(files[TENSORS]).items()))
  given = None if architecture else model
  loaded = deploy.load(path, model=given)
  state = state_of(loaded)
  return Case(manifest, tensors, files, given, outputs_of(loaded), state)


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
  """Artifacts by name, each made once."""
  made = {}

  def case(name):
    if name not in made:
      path = tmp_path_factory.mktemp("artifacts") / "model"
      method = "double_rounding" if name == "resnet" else name
      made[name] = case_of(path, method, architecture=name == "resnet")
    return made[name]

  return case


def outcome(case, path, files):
  """None if refused, else whether the outputs are the same ones."""
  for name, content in files.items():
    file = path / name
    if not file.exists() or file.read_bytes() != content:
      file.write_bytes(content)
  started = time.process_time()
  try:
    artifact = deploy.open(path)
    sizes = [artifact.bytes_at(bits) for bits in artifact.bits]
    network = artifact.load(model=case.model)
  except deploy.ArtifactError as error:
    assert str(error).startswith(str(path)) and "\n" not in str(error)
    assert len(str(error)) < len(str(path)) + 400
    return None
  finally:
    assert time.process_time() - started < LONGEST
  assert all(0 < size <= 2**20 for size in sizes)
  if is_same(state_of(network), case.state):
    return True
  found = outputs_of(network)
  first = next(iter(case.outputs.values()))
  for output in found.values():
    assert output.shape == first.shape and output.dtype == first.dtype
    assert not np.isnan(output).any()
  return found.keys() == case.outputs.keys() and all(
    np.array_equal(output, case.outputs[bits]) for bits, output in found.items()
  )


def check_part(case, path, bits, whole):
  """Opens what some bits need: the network of these bits, or one error.

  `whole` is the outcome of the same files, opened as a whole.
  """
  started = time.process_time()
  try:
    artifact = deploy.open(path, bits)
    network = artifact.load(model=case.model)
  except deploy.ArtifactError as error:
    assert whole is None
    assert str(error).startswith(str(path)) and "\n" not in str(error)
    return
  except ValueError as error:  # Another method may not have these bits.
    assert str(error).startswith("bits must be one of ")
    return
  finally:
    assert time.process_time() - started < LONGEST
  output = np.asarray(network(images()))
  assert not np.isnan(output).any()
  try:
    complete = artifact.upgrade().load(model=case.model)
  except deploy.ArtifactError as error:
    assert whole is None
    assert str(error).startswith(str(path)) and "\n" not in str(error)
  else:
    # What is damaged can be what only a whole opening reads.
    assert whole is not None or has_same_arrays(state_of(complete), case.state)
    nn.set_bits(complete, bits)
    np.testing.assert_array_equal(output, complete(images()))
  assert artifact.holds(bits)


NUMBERS = (0, 1, 2, 3, 7, -1, 255, 2**31, 2**33, 2**63, 2**64, 10**30)
FLOATS = (0.5, -0.0, 1e-45, 1e308, float("inf"), float("nan"))
WORDS = (
  "",
  "x",
  "first",
  "first/codes",
  "../x",
  "\ud800",
  "int8",
  "F16",
  "lsq",
)
LISTS = ([], [1], [8, 4], [2, 4, 8], [[]], ["a"], [None] * 3, [0] * 3000)
DTYPES = "f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 ?".split()


def any_value(rng):
  nested: list = []
  for _ in range(rng.choice((3, 40, 200))):
    nested = [nested]
  group = rng.choice((NUMBERS, FLOATS, WORDS, LISTS, ({}, {"x": 1}, nested)))
  return copy.deepcopy(rng.choice((*group, None, True, False)))


def places(value):
  """Every (container, key) inside a JSON value."""
  if isinstance(value, dict | list):
    keys = value if isinstance(value, dict) else range(len(value))
    for key in keys:
      yield value, key
      yield from places(value[key])


def changed_json(rng, value):
  """Changes a JSON value in place, at one place."""
  container, key = rng.choice(list(places(value)))
  old = container[key]
  match rng.randrange(6):
    case 0:
      del container[key]
    case 1 if isinstance(container, list):
      container.insert(key, copy.deepcopy(old))
    case 2 if isinstance(old, list):
      rng.shuffle(old)
    case 3 if type(old) is int:
      container[key] = old + rng.choice((-1, 1, old, -2 * old))
    case 4:
      other, place = rng.choice(list(places(value)))
      container[key] = copy.deepcopy(other[place])
    case _:
      container[key] = any_value(rng)


def changed_array(rng, array):
  """An array with other values, another shape or another dtype."""
  size = array.size
  match rng.randrange(8):
    case 0:
      return array.astype(rng.choice(DTYPES), casting="unsafe")
    case 1:
      return array.reshape(-1).view(np.uint8)
    case 2:
      return array[None] if rng.random() < 0.5 else array.reshape(-1)
    case 3:
      return array[:-1] if array.ndim else array.reshape(1)
    case 4:
      return np.concatenate([array, array]) if array.ndim else array[None]
    case 5:
      return array.T if array.ndim > 1 else array[:0]
    case 6 if size and array.dtype.kind == "f":
      array = array.copy()
      value = rng.choice((np.nan, np.inf, -np.inf, -1.0, 0.0, 3e38, 1e-45))
      if rng.random() < 0.5:
        array[...] = value
      else:
        array.flat[rng.randrange(size)] = value
      return array
    case _:
      data = bytearray(array.tobytes())
      for _ in range(rng.choice((1, 1, 4)) if data else 0):
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
      return np.frombuffer(bytes(data), array.dtype).reshape(array.shape)


def changed_tensors(rng, tensors):
  """Tensors of which one is another, missing, renamed or left over."""
  tensors = dict(tensors)
  name, other = rng.choice(list(tensors)), rng.choice(list(tensors))
  match rng.randrange(8):
    case 0:
      del tensors[name]
    case 1:
      tensors[rng.choice((*WORDS[:5], f"float/{name}", other))] = tensors.pop(
        name
      )
    case 2:
      tensors[rng.choice(("x", "float/x", f"{name}/x"))] = tensors[name]
    case 3:
      tensors[name], tensors[other] = tensors[other], tensors[name]
    case _:
      with np.errstate(all="ignore"):
        tensors[name] = changed_array(rng, tensors[name])
  return tensors


def changed_header(rng, data):
  """A safetensors file of which the header is another."""
  length = int.from_bytes(data[:8], "little")
  header, rest = bytearray(data[: 8 + length]), data[8 + length :]
  if rng.random() < 0.3:
    for _ in range(rng.choice((1, 1, 3))):
      header[rng.randrange(len(header))] ^= 1 << rng.randrange(8)
    return bytes(header) + rest
  content = json.loads(header[8:])
  changed_json(rng, content)
  text = json.dumps(content).encode()
  if rng.random() < 0.1:
    length = rng.choice((0, 1, len(text) + 1, 2**31, 2**63, 2**64 - 1))
    return length.to_bytes(8, "little") + text + rest
  return len(text).to_bytes(8, "little") + text + rest


def changed_both(rng, manifest, tensors):
  """A layer that is another in the manifest and in the tensors."""
  layer = rng.choice(manifest["layers"])
  count = len(manifest["layers"])
  match rng.randrange(4):
    case 0:
      # Of tensors whose layers are equally long, the last one is cut off.
      manifest["layers"].pop()
      tensors = {
        name: array[: array.size - array.size // count]
        if name.startswith(("layers/", "inputs/", "planes/"))
        else array
        for name, array in tensors.items()
      }
    case 1:
      layer["name"] = rng.choice(
        ("x", "norm", *(n["name"] for n in manifest["layers"]))
      )
    case 2:
      rng.shuffle(layer["shape"])
    case _:
      layer["shape"] = rng.choice(
        (
          [2**33, 2**31],
          [1] * 40,
          [2**20, 2],
          [1, int(np.prod(layer["shape"]))],
        )
      )
  return manifest, tensors


def resigned(rng, case):
  """(files, whether other outputs can be right) of a damaged artifact."""
  manifest = copy.deepcopy(case.manifest)
  tensors, data = case.tensors, case.files[TENSORS]
  match rng.randrange(8):
    case 0 | 1 | 2:
      changed_json(rng, manifest)
    case 3:
      data = changed_header(rng, data)
    case 4:
      manifest, tensors = changed_both(rng, manifest, tensors)
      data = serialized(manifest, tensors)
    case _:
      data = serialized(manifest, changed_tensors(rng, tensors))
  files = signed(manifest, data)
  return files, data != case.files[TENSORS] or _is_another_network(
    case, manifest
  )


def _is_another_network(case, manifest):
  keys = ("method", "activation")
  if any(manifest.get(key) != case.manifest[key] for key in keys):
    return True
  try:
    return any(
      [entry(layer) for layer in manifest["layers"]]
      != [entry(layer) for layer in case.manifest["layers"]]
      for entry in (lambda layer: layer["signed"], lambda layer: layer["name"])
    )
  except (TypeError, KeyError):
    return False  # It is refused.


def unsigned(rng, case):
  """Files with changed bytes."""
  name = rng.choice(list(case.files))
  data = bytearray(case.files[name])
  start = rng.randrange(len(data))
  end = min(len(data), start + rng.choice((1, 2, 16, 512)))
  match rng.randrange(6):
    case 0:
      data = data[:start]
    case 1:
      data[start:end] = b""
    case 2:
      data[start:start] = rng.randbytes(end - start)
    case 3:
      data[start:end] = bytes(end - start)
    case _:
      data[start] ^= 1 << rng.randrange(8)
  return case.files | {name: bytes(data)}


def check_signed(cases, path, names, count, seed=0):
  rng = random.Random(seed)
  before = {name: arrays_in(cases(name).model) for name in names}
  refused = 0
  for number in range(count):
    name = names[number % len(names)]
    files, other = resigned(rng, cases(name))
    try:
      same = outcome(cases(name), path, files)
      if number % 4 == 0 and BITS[0] in cases(name).outputs:
        check_part(cases(name), path, rng.choice(BITS), same)
    except Exception as error:
      raise AssertionError(f"number {number}, {name}") from error
    assert same or same is None or other, f"number {number}, {name}"
    refused += same is None
  assert refused > count / 2  # Else the damage would be too slight.
  for name in names:
    assert all(
      a is b
      for a, b in zip(before[name], arrays_in(cases(name).model), strict=True)
    )


def arrays_in(model):
  return [] if model is None else jax.tree.leaves(nnx.state(model))


def check_unsigned(cases, path, names, count, seed=0):
  rng = random.Random(seed)
  refused = 0
  for number in range(count):
    case = cases(names[number % len(names)])
    files = unsigned(rng, case)
    # A space between two words of JSON changes nothing.
    same = outcome(case, path, files)
    if number % 4 == 0 and BITS[0] in case.outputs:
      check_part(case, path, rng.choice(BITS), same)
    assert same is None or same, f"number {number}"
    refused += same is None
  assert refused > 0.9 * count


def test_change_with_new_checksums_is_refused_or_changes_nothing(
  cases, tmp_path
):
  check_signed(cases, tmp_path, DEFAULT, 80)


def test_change_without_new_checksums_is_refused(cases, tmp_path):
  check_unsigned(cases, tmp_path, DEFAULT, 200)


# Several hundred of each of the nine methods, some of a network that is named.
@pytest.mark.slow
@pytest.mark.parametrize("name", [*METHODS, "resnet"])
def test_many_changes_with_new_checksums(cases, tmp_path, name):
  check_signed(cases, tmp_path, (name,), 400 if name in METHODS else 100, 1)


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_many_changes_without_new_checksums(cases, tmp_path, name):
  check_unsigned(cases, tmp_path, (name,), 400, 1)
