"""Artifacts of which only the bit-planes and rows are read that bits need."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import deploy, models, nn, quant
from dr_jax.deploy.artifact import reader
from dr_jax.deploy.export.specialize import specialize
from tests.support.artifact_reader import Reader

BITS = (8, 6, 4, 2)
OPTIONS = {"depth": 8, "num_classes": 3, "channels": 1, "widths": (2, 3, 5)}
METHODS = {
  "half_up": quant.double_rounding(BITS, rounding="half_up"),
  "floor": quant.double_rounding(BITS, rounding="floor"),
  "half_even": quant.double_rounding(BITS),
  "five": quant.double_rounding((5, 3, 2), rounding="half_up"),
  "bit_mixer": quant.bit_mixer((8, 4, 2)),
  "truncquant": quant.truncation((8, 4, 2)),
  "adabits": quant.adabits((8, 4, 2), rescale=True),
  "matquant": quant.truncation((8, 4, 2), scheme="matquant"),
}
# Their planes are those of another method above.
OTHERS = ("five", "bit_mixer", "truncquant")
NESTED = [name for name in METHODS if METHODS[name].storage.planes]


def images(size=4):
  return jax.random.normal(jax.random.key(1), (size, 8, 8, 1))


def stored(path, weight, norm="switchable"):
  """Saves a network whose rows of norms all differ."""
  network = nn.quantize(
    models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS),
    weight=weight,
    activation=quant.lsq_activation(weight.bits),
    sample=images(),
    norm=norm,
  )
  rng = np.random.default_rng(0)
  rows = nnx.state(network, nnx.Any(nn.NormParam, nnx.BatchStat))
  for _, variable in nnx.to_flat_state(rows):
    variable[...] = jnp.asarray(rng.uniform(0.5, 1.5, variable.shape), "f4")
  nnx.update(network, rows)
  deploy.save(path, network, architecture=("resnet", OPTIONS))
  return path


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
  """Artifacts by method and norm, each saved once."""
  made = {}

  def path(name, norm="switchable"):
    if (name, norm) not in made:
      directory = tmp_path_factory.mktemp("artifact") / "model"
      made[name, norm] = stored(directory, METHODS[name], norm)
    return made[name, norm]

  return path


@pytest.fixture
def reads(monkeypatch):
  """Byte ranges that are read, as the system sees them."""
  found = []
  plain = os.pread

  def pread(descriptor, count, offset):
    data = plain(descriptor, count, offset)
    file = os.readlink(f"/proc/self/fd/{descriptor}")
    found.append((os.path.basename(file), offset, offset + len(data)))
    return data

  monkeypatch.setattr(reader.os, "pread", pread)
  return found


def octets(reads, artifact, prefix):
  """Bytes that were read of tensors whose names begin so, by name."""
  counts = {}
  for name, tensor in artifact.store.header.tensors.items():
    if name.startswith(prefix):
      counts[name] = sum(
        max(0, min(end, tensor.end) - max(start, tensor.start))
        for file, start, end in reads
        if file == "model.safetensors"
      )
  return {name: count for name, count in counts.items() if count}


def state_of(network):
  return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(network))]


def kernels(network):
  return {
    name: np.asarray(layer.kernel)
    for name, layer in nn.quantized.quantized_layers(network).items()
  }


@pytest.mark.parametrize(
  "name",
  [
    pytest.param(name, marks=[pytest.mark.slow] * (name in OTHERS))
    for name in METHODS
  ],
)
def test_opened_at_some_bits_it_has_the_kernels_of_these_bits(paths, name):
  whole = deploy.load(paths(name))
  for bits in METHODS[name].bits:
    artifact = deploy.open(paths(name), bits)
    nn.set_bits(whole, bits)
    opened = kernels(artifact.load())
    for layer, kernel in kernels(whole).items():
      np.testing.assert_array_equal(opened[layer], kernel)
    assert set(artifact.opened.values()) == {bits}


def test_opened_at_some_bits_it_is_the_network_of_these_bits(paths):
  whole = deploy.load(paths("half_up"))
  for bits in BITS:
    network = deploy.open(paths("half_up"), bits).load()
    nn.set_bits(whole, bits)
    np.testing.assert_array_equal(network(images()), whole(images()))


@pytest.mark.parametrize("name", ["half_up", "floor"])
@pytest.mark.parametrize("bits", BITS)
def test_only_the_planes_of_the_bits_are_read(paths, reads, name, bits):
  artifact = deploy.open(paths(name), bits)
  needed = min(bits + (name == "half_up"), 8)
  parameters = [row.parameters for row in nn.layer_table(artifact.load())]
  size = sum(-(-count // 8) for count in parameters)
  assert octets(reads, artifact, "planes/") == {
    f"planes/{p}": size for p in range(needed)
  }
  rows = octets(reads, artifact, "norms/")
  assert list(rows) == [f"norms/{BITS.index(bits)}"]
  assert not octets(reads, artifact, "subchecksums")
  assert artifact.read_bytes == sum(end - start for _, start, end in reads)
  assert deploy.open(paths(name)).bytes_read_at(bits) == artifact.read_bytes


@pytest.mark.parametrize("name", METHODS)
def test_opened_as_a_whole_it_reads_every_byte_once(paths, name):
  artifact = deploy.open(paths(name))
  assert artifact.read_bytes == artifact.stored_bytes
  assert all(artifact.holds(bits) for bits in artifact.bits)


@pytest.mark.parametrize("norm", ["switchable", "transitional", "shared"])
def test_mixed_bits_read_what_each_layer_needs(paths, reads, norm):
  path = paths("floor", norm)
  whole = deploy.load(path)
  table = nn.layer_table(whole)
  allocation = {row.name: BITS[i % 4] for i, row in enumerate(table)}
  reads.clear()
  artifact = deploy.open(path, allocation)
  sizes = {row.name: -(-row.parameters // 8) for row in table}
  assert octets(reads, artifact, "planes/") == {
    f"planes/{p}": sum(sizes[n] for n in sizes if allocation[n] > p)
    for p in range(8)
  }
  norms = artifact.manifest["norms"].values()
  assert sum(octets(reads, artifact, "norms/").values()) == sum(
    2 * 4 * entry["channels"] for entry in norms
  )
  assert artifact.bytes_read_at(allocation) == artifact.read_bytes
  network = artifact.load()
  nn.set_bits(whole, allocation)
  np.testing.assert_array_equal(network(images()), whole(images()))
  assert {row.name: row.bits for row in nn.layer_table(network)} == allocation


@pytest.mark.parametrize("norm", ["switchable", "transitional", "shared"])
def test_upgrade_reads_what_is_missing_and_nothing_twice(paths, reads, norm):
  path = paths("half_up", norm)
  artifact = deploy.open(path, 2)
  first = len(reads)
  upgraded = artifact.upgrade(6)
  sizes = octets(reads[first:], artifact, "planes/")
  assert list(sizes) == ["planes/3", "planes/4", "planes/5", "planes/6"]
  assert upgraded.read_bytes == sum(end - start for _, start, end in reads)
  assert upgraded.holds(2) and upgraded.holds(6) and not artifact.holds(6)
  assert set(upgraded.opened.values()) == {6}
  assert set(artifact.opened.values()) == {2}
  network, whole = upgraded.load(), deploy.load(path)
  for bits in (6, 2):
    nn.set_bits(network, bits)
    nn.set_bits(whole, bits)
    np.testing.assert_array_equal(network(images()), whole(images()))
  before = len(reads)
  assert upgraded.upgrade(2).read_bytes == upgraded.read_bytes
  assert len(reads) == before
  complete = upgraded.upgrade()
  everything = deploy.load(path)
  for got, expected in zip(
    state_of(complete.load()), state_of(everything), strict=True
  ):
    np.testing.assert_array_equal(got, expected)


def test_upgrade_completes_mixed_bits(paths, reads):
  path = paths("floor", "transitional")
  names = [layer["name"] for layer in deploy.open(path).manifest["layers"]]
  mixed = {name: BITS[i % 4] for i, name in enumerate(names)}
  other = {name: BITS[(i + 1) % 4] for i, name in enumerate(names)}
  artifact = deploy.open(path, mixed).upgrade(other)
  assert artifact.holds(mixed) and artifact.holds(other)
  assert not artifact.holds(8)
  complete = artifact.upgrade()
  assert all(complete.holds(bits) for bits in BITS)
  for got, expected in zip(
    state_of(complete.load()), state_of(deploy.load(path)), strict=True
  ):
    np.testing.assert_array_equal(got, expected)


def test_a_network_switches_to_nothing_that_was_not_read(paths):
  artifact = deploy.open(paths("half_up"), 4)
  network = artifact.load()
  before = {row.name: row.bits for row in nn.layer_table(network)}
  with pytest.raises(
    ValueError,
    match=r"bits of stage1/block0/conv1 must be at most 4, for which its "
    r"codes were read, got 8; read more with artifact.upgrade$",
  ):
    nn.set_bits(network, 8)
  with pytest.raises(
    ValueError,
    match=r"bits of stage1/block0/conv1 must be one of \(4,\), for which the "
    r"norm after it was read, got 2; read more with artifact.upgrade$",
  ):
    nn.set_bits(network, 2)
  assert {row.name: row.bits for row in nn.layer_table(network)} == before
  nn.set_bits(artifact.upgrade(2).load(), 4)


def test_a_pair_of_bits_that_was_not_read_is_named(paths):
  artifact = deploy.open(paths("floor", "transitional"), 4).upgrade(2)
  network = artifact.load()
  nn.set_bits(network, 4)
  table = nn.layer_table(network)
  mixed = {row.name: (4, 2)[i % 2] for i, row in enumerate(table)}
  first, second = table[0].name, table[1].name
  with pytest.raises(
    ValueError,
    match=rf"bits of {first} and {second} must be one of "
    r"\(\(4, 4\), \(2, 2\)\), for which .* got \(4, 2\); read more",
  ):
    nn.set_bits(network, mixed)


@pytest.mark.parametrize("norm", ["switchable", "shared"])
def test_an_index_that_was_not_read_gives_no_numbers(paths, norm):
  network = deploy.open(paths("floor", norm), 4).load()
  split = nn.functional(network)

  @jax.jit
  def run(index):
    return split.apply(split.params, split.batch_stats, index, images())[0]

  assert np.isfinite(run(2)).all()
  for index in (0, 1):
    assert np.isnan(run(index)).all()
  if norm == "switchable":
    assert np.isnan(run(3)).all()
  with pytest.raises(ValueError, match="got 6; read more with|got 1; read"):
    split.apply(split.params, split.batch_stats, 1, images())


@pytest.mark.parametrize("name", ["half_up", "floor"])
def test_codes_of_a_network_with_one_norm_serve_all_lower_bits(paths, name):
  path = paths(name, "shared")
  network, whole = deploy.open(path, 6).load(), deploy.load(path)
  for bits in (6, 4, 2):
    nn.set_bits(network, bits)
    nn.set_bits(whole, bits)
    np.testing.assert_array_equal(network(images()), whole(images()))
  with pytest.raises(ValueError, match="must be at most 6"):
    nn.set_bits(network, 8)


@pytest.mark.parametrize("norm", ["switchable", "transitional"])
@pytest.mark.parametrize("name", ["half_up", "floor", "half_even"])
def test_a_reader_without_the_library_gets_the_same_weights(paths, name, norm):
  path = paths(name, norm)
  foreign, network = Reader(path), deploy.load(path)
  for bits in BITS:
    nn.set_bits(network, bits)
    for layer, kernel in kernels(network).items():
      np.testing.assert_array_equal(foreign.weight(layer, bits), kernel)
  parts = deploy.open(path).parts
  for name in parts.norms:
    for row, (gain, offset) in enumerate(foreign.rows(name)):
      np.testing.assert_array_equal(parts.norms[name].gain[row], gain)
      np.testing.assert_array_equal(parts.norms[name].offset[row], offset)
  for layer, part in parts.layers.items():
    scales = part.input_params["scale"]
    np.testing.assert_array_equal(foreign.input_scales(layer), scales)


def damage(path, copy, name, place=0):
  """A copy of an artifact in which one byte of a tensor is another."""
  copy.mkdir()
  artifact = deploy.open(path)
  tensor = artifact.store.header.tensors[name]
  for file in path.iterdir():
    data = bytearray(file.read_bytes())
    if file.suffix == ".safetensors":
      data[tensor.start + place] ^= 1
    (copy / file.name).write_bytes(data)
  return copy


@pytest.mark.parametrize("name", ["planes/3", "norms/2", "subchecksums"])
def test_damage_that_is_read_is_named(paths, tmp_path, name):
  path = damage(paths("floor"), tmp_path / "model", name)
  with pytest.raises(
    deploy.ArtifactError, match=rf"model.safetensors: {name} is damaged: "
  ):
    deploy.open(path)
  if name != "subchecksums":
    with pytest.raises(deploy.ArtifactError, match=f"{name} is damaged"):
      deploy.open(path, 4)
  assert deploy.open(path, 2)


def test_damage_that_is_not_read_is_found_by_the_upgrade(paths, tmp_path):
  path = damage(paths("floor"), tmp_path / "model", "planes/5")
  artifact = deploy.open(path, 4)
  before = state_of(artifact.load())
  with pytest.raises(deploy.ArtifactError, match="planes/5 is damaged"):
    artifact.upgrade(6)
  assert artifact.holds(4) and not artifact.holds(6)
  for got, expected in zip(state_of(artifact.load()), before, strict=True):
    np.testing.assert_array_equal(got, expected)
  os.truncate(path / "model.safetensors", 2000)
  with pytest.raises(
    deploy.ArtifactError, match=r"safetensors: is damaged: it ends at byte"
  ):
    artifact.upgrade(8)
  (path / "model.safetensors").unlink()
  with pytest.raises(deploy.ArtifactError, match="safetensors: No such file"):
    artifact.upgrade(8)


def test_damage_of_one_layer_is_named_where_others_are_not_read(
  paths, tmp_path
):
  path = damage(paths("floor"), tmp_path / "model", "planes/7")
  names = [
    layer["name"] for layer in deploy.open(paths("floor")).manifest["layers"]
  ]
  mixed = dict.fromkeys(names, 2) | {names[0]: 8}
  with pytest.raises(
    deploy.ArtifactError,
    match=f"planes/7 is damaged: the checksum of {names[0]} differs",
  ):
    deploy.open(path, mixed)
  assert deploy.open(path, dict.fromkeys(names, 2) | {names[1]: 8})


def test_bits_that_the_artifact_does_not_have_are_one_line(paths):
  path = paths("half_up")
  names = [layer["name"] for layer in deploy.open(path).manifest["layers"]]
  artifact = deploy.open(path, 2)
  for call in (
    lambda b: deploy.open(path, b),
    artifact.upgrade,
    artifact.holds,
  ):
    with pytest.raises(
      ValueError, match=r"^bits must be one of \(8, 6, 4, 2\), got 5$"
    ):
      call(5)
    with pytest.raises(ValueError, match="unknown layers .'other'"):
      call(dict.fromkeys(names, 4) | {"other": 4})
    with pytest.raises(ValueError, match=rf"missing layers .'{names[1]}'"):
      call({name: 4 for name in names if name != names[1]})
    with pytest.raises(ValueError, match="must be one of .8, 6, 4, 2., got 3"):
      call(dict.fromkeys(names, 4) | {names[1]: 3})


def test_backends_and_programs_take_what_was_read(paths):
  artifact, whole = (deploy.open(paths("floor"), bits) for bits in (4, None))
  part, network = artifact.load(), whole.load(bits=4)
  alone = specialize(part, 4)
  np.testing.assert_allclose(
    alone(images()), network(images()), rtol=1e-5, atol=1e-5
  )
  for loaded in (part, network):
    nn.set_backend(loaded, "integer")
  np.testing.assert_array_equal(part(images()), network(images()))
  split = nn.functional(part)
  apply = jax.jit(split.apply)
  found, _ = apply(split.params, split.batch_stats, jnp.int32(1), images())
  assert np.isnan(found).all()


def test_sizes_of_a_part_are_those_of_the_whole(paths):
  whole, part = (deploy.open(paths("floor"), bits) for bits in (None, 2))
  assert whole.layer_bytes == part.layer_bytes
  assert whole.tensor_bytes == part.tensor_bytes
  assert [whole.bytes_at(b) for b in BITS] == [part.bytes_at(b) for b in BITS]


def test_float_dtypes_must_agree_between_norms(tmp_path):
  network = nn.quantize(
    models.build("resnet", rngs=nnx.Rngs(0), **OPTIONS),
    weight=METHODS["floor"],
    sample=images(),
  )
  for statistic in (network.norm.mean, network.norm.var):
    statistic.set_value(statistic[...].astype(jnp.bfloat16))
  with pytest.raises(
    ValueError,
    match="norms/0 must have one dtype for all layers and norms, got bfloat16 "
    "and float32",
  ):
    deploy.save(tmp_path / "model", network)
  assert not list(tmp_path.iterdir())
