"""Artifacts that someone changed, with checksums that fit and without.

Nothing but an ArtifactError may come of them, or a network whose outputs are
finite, within 5 seconds of CPU time.
"""

import collections
import copy
import hashlib
import json
import random
import shutil
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx

from dr_jax import deploy, models, nn, quant
from dr_jax.deploy.artifact import manifest_digest

OPTIONS = {"depth": 8, "num_classes": 3, "channels": 1, "widths": (2, 2, 2)}
METHODS = {
  "double_rounding": quant.double_rounding((8, 4)),
  "lsq": quant.lsq((8, 4)),
  "bitwave": quant.bitwave((8, 4)),
  "matquant": quant.truncation((8, 4), scheme="matquant"),
  "adabits": quant.adabits((8, 4), rescale=True),
  "term_quantization": quant.term_quantization((8, 4)),
}
# What a field may be changed to.
VALUES = (
  *(None, True, False, 0, -1, 1, 2, 3, 8, 2**31, 2**33, 2**63, 10**30),
  *(0.5, -1.0, 1e300, "", "x", "lsq", "float32", "../../x", "\x00", "8"),
  *([], [0], [1, 0], [2**31, 2**31], [[[[]]]], {}, {"x": 1}, {"name": "lsq"}),
)
DTYPES = ("int8", "uint8", "int32", "float32", "float64", "float16", "bool")


def images():
  return jax.random.normal(jax.random.key(0), (2, 8, 8, 1))


@pytest.fixture(scope="module", params=METHODS)
def original(request, tmp_path_factory):
  weight = METHODS[request.param]
  network = nn.quantize(
    models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS),
    weight=weight,
    activation=quant.lsq_activation(weight.bits),
    sample=images(),
  )
  path = tmp_path_factory.mktemp("original") / "model"
  deploy.save(path, network, architecture=("resnet", OPTIONS))
  return path


def places(value, path=()):
  """Every place in nested JSON."""
  yield path
  if isinstance(value, dict | list):
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in items:
      yield from places(inner, (*path, key))


def changed_manifest(manifest, rng):
  """A manifest with one to three changes."""
  manifest = copy.deepcopy(manifest)
  for _ in range(rng.randint(1, 3)):
    *path, key = rng.choice(list(places(manifest))[1:])
    parent = manifest
    for step in path:
      parent = parent[step]
    match rng.randrange(5):
      case 0:
        del parent[key]
      case 1 if isinstance(parent, list):
        parent.insert(key, copy.deepcopy(rng.choice(parent)))
      case 2 if isinstance(parent, dict):
        parent[rng.choice(["x", "name", "order", ""])] = rng.choice(VALUES)
      case 3 if type(parent[key]) is int:
        parent[key] += rng.choice([-1, 1, 2**31, 2**40])
      case _:
        parent[key] = copy.deepcopy(rng.choice(VALUES))
  return manifest


def changed_tensors(tensors, rng):
  """Tensors of which one is of another type, shape, content, or name."""
  tensors = dict(tensors)
  name = rng.choice(sorted(tensors))
  tensor = tensors[name]
  match rng.randrange(6):
    case 0:
      del tensors[name]
    case 1:
      tensors[rng.choice(["x", "float/x", f"{name}/x"])] = tensor
    case 2:
      tensors[name] = tensor.astype(rng.choice(DTYPES))
    case 3:
      tensors[name] = tensor.reshape(-1)[: rng.randrange(tensor.size + 1)]
    case 4:
      tensors[name] = np.concatenate([tensor.reshape(-1)] * 2)
    case _:
      content = bytearray(tensor.tobytes())
      for _ in range(rng.randint(1, 4)):
        content[rng.randrange(len(content))] = rng.randrange(256)
      flat = np.frombuffer(bytes(content), tensor.dtype)
      tensors[name] = flat.reshape(tensor.shape)
  return tensors


def changed_bytes(content, rng):
  """Bytes that are flipped, cut, doubled or filled up."""
  content = bytearray(content)
  match rng.randrange(4):
    case 0:
      return content[: rng.randrange(len(content))]
    case 1:
      start = rng.randrange(len(content))
      return content[:start] + content[start:][: rng.randrange(64)] * 2
    case 2:
      return content + bytes(rng.randrange(1, 64))
  for _ in range(rng.randint(1, 8)):
    content[rng.randrange(len(content))] = rng.randrange(256)
  return content


def sign(manifest, data):
  manifest = {k: v for k, v in manifest.items() if k != "manifest_sha256"}
  manifest["sha256"] = hashlib.sha256(data).hexdigest()
  digest = manifest_digest(manifest)
  return json.dumps(manifest | {"manifest_sha256": digest})


def outputs(path, model=None):
  artifact = deploy.open(path)
  assert all(artifact.bytes_at(b) > 0 for b in artifact.bits)
  network = artifact.load(model=model)
  logits = []
  for bits in artifact.bits:
    nn.set_bits(network, bits)
    split = nn.functional(network)
    state = (split.params, split.batch_stats)
    index = jnp.int32(artifact.bits.index(bits))
    logits.append(np.asarray(split.apply(*state, index, images())[0]))
  return np.stack(logits)


def mutants(original, path, rng):
  """Writes one damaged artifact after another; yields what was changed."""
  data = (original / "model.safetensors").read_bytes()
  text = (original / "manifest.json").read_text()
  manifest, tensors = json.loads(text), safetensors.numpy.load(data)
  while True:
    kind = rng.choice(["manifest", "tensors", "file"])
    new = manifest, data
    if kind == "manifest":
      new = changed_manifest(manifest, rng), data
    elif kind == "tensors":
      new = manifest, safetensors.numpy.save(changed_tensors(tensors, rng))
    else:
      new = manifest, bytes(changed_bytes(data, rng))
    (path / "model.safetensors").write_bytes(new[1])
    (path / "manifest.json").write_text(sign(*new))
    yield kind


def unsigned(original, path, rng):
  """As `mutants`, with checksums as they were."""
  while True:
    name = rng.choice(["model.safetensors", "manifest.json"])
    shutil.copytree(original, path, dirs_exist_ok=True)
    whole = (original / name).read_bytes()
    new = bytes(changed_bytes(whole, rng))
    if new != whole:
      (path / name).write_bytes(new)
      yield "unsigned"


def attack(original, path, make, count, seed):
  """Opens mutants; returns how each ended."""
  path.mkdir()
  ends = collections.Counter()
  model = models.build("resnet", rngs=nnx.Rngs(1), **OPTIONS)
  before = jax.tree.map(np.asarray, nnx.state(model))
  expected = outputs(original)
  assert (outputs(original, model) == expected).all()
  rng = random.Random(seed)
  for _, kind in zip(range(count), make(original, path, rng), strict=False):
    started = time.process_time()
    given = model if rng.random() < 0.5 else None
    try:
      got = outputs(path, given)
    except deploy.ArtifactError as error:
      assert str(path) in str(error) and "\n" not in str(error), error
      ends[kind, "error"] += 1
    else:
      assert kind != "unsigned"
      assert np.isfinite(got).all(), kind
      same = got.shape == expected.shape and (got == expected).all()
      ends[kind, "same" if same else "other"] += 1
    assert time.process_time() - started < 5, kind
  after = jax.tree.map(np.asarray, nnx.state(model))
  assert jax.tree.all(jax.tree.map(np.array_equal, before, after))
  return ends


@pytest.mark.parametrize("make", [mutants, unsigned])
def test_a_changed_artifact_ends_in_one_error(original, tmp_path, make):
  ends = attack(original, tmp_path / "model", make, 40, seed=0)
  assert sum(n for (_, end), n in ends.items() if end == "error") >= 25


@pytest.mark.slow
@pytest.mark.parametrize("make", [mutants, unsigned])
def test_many_changed_artifacts_end_in_one_error(original, tmp_path, make):
  ends = attack(original, tmp_path / "model", make, 200, seed=1)
  assert sum(ends.values()) == 200
