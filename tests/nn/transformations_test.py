"""Networks that call their layers inside transformations, or stack them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import deploy, nn, quant, search
from tests.support.stacked_network import (
  AXES,
  LAYERS,
  ConvBlock,
  Listed,
  Scanned,
  listed,
)

BITS = (8, 4, 2)


def random(*shape, seed=1):
  return jax.random.normal(jax.random.key(seed), shape)


def quantize(model, x, **options):
  options = {
    "weight": quant.double_rounding(BITS),
    "activation": quant.lsq_activation(BITS),
    "skip": (),
    "init": "mse",
  } | options
  network = nn.quantize(model, sample=x, **options)
  network.eval()
  return network


class Wrapped(nnx.Module):
  """Two layers and a norm, called as a function of (model, x) calls them."""

  def __init__(self, call):
    rngs = nnx.Rngs(0)
    self.a = nnx.Linear(6, 6, rngs=rngs)
    self.norm = nnx.BatchNorm(6, rngs=rngs)
    self.b = nnx.Linear(6, 6, rngs=rngs)
    self.call = call

  def __call__(self, x):
    return self.call(self, x)


def layers_of(model, x):
  return model.b(nnx.relu(model.norm(model.a(x))))


TRANSFORMATIONS = {
  "nnx.jit": lambda m, x: nnx.jit(layers_of)(m, x),
  "nnx.remat": lambda m, x: nnx.remat(layers_of)(m, x),
  "nnx.cond": lambda m, x: nnx.cond(
    x.sum() > -1e9, layers_of, lambda m, x: x, m, x
  ),
  "jax.jit": lambda m, x: jax.jit(lambda x: layers_of(m, x))(x),
  "jax.checkpoint": lambda m, x: jax.checkpoint(lambda x: layers_of(m, x))(x),
  "jax.vmap": lambda m, x: jax.vmap(lambda x: layers_of(m, x))(x),
  "jax.lax.map": lambda m, x: jax.lax.map(lambda x: layers_of(m, x), x),
  "jax.lax.cond": lambda m, x: jax.lax.cond(
    x.sum() > -1e9, lambda x: layers_of(m, x), lambda x: x, x
  ),
}


@pytest.fixture(scope="module")
def direct():
  x = random(5, 6)
  return x, quantize(Wrapped(layers_of), x)


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_a_transformation_changes_neither_scales_nor_costs_nor_values(
  name, direct
):
  x, expected = direct
  network = quantize(Wrapped(TRANSFORMATIONS[name]), x)
  nn.set_bits(expected, 8)
  assert nn.layer_table(network) == nn.layer_table(expected)
  for layer in ("a", "b"):
    for params in ("weight_params", "input_params"):
      got, want = (
        nn.bits.arrays_of(getattr(getattr(m, layer), params))
        for m in (network, expected)
      )
      jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), got, want
      )
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.set_bits(expected, bits)
    np.testing.assert_allclose(network(x), expected(x), rtol=1e-5, atol=1e-5)


def test_further_batches_count_where_layers_are_transformed(direct):
  x, _ = direct
  batches = [3 * random(4, 6, seed=2)]
  networks = [
    quantize(Wrapped(call), x, batches=batches)
    for call in (layers_of, TRANSFORMATIONS["nnx.remat"])
  ]
  scales = [n.a.input_params["scale"][...] for n in networks]
  np.testing.assert_allclose(*scales, rtol=1e-6)


def test_a_branch_that_no_sample_takes_is_an_error():
  def call(m, x):
    return nnx.cond(x.sum() > 1e9, layers_of, lambda m, x: x, m, x)

  with pytest.raises(ValueError, match="does not reach.*'a', 'b', 'norm'"):
    quantize(Wrapped(call), random(5, 6))


def test_a_layer_in_a_loop_counts_every_call():
  def call(m, x):
    body = lambda c, _: (layers_of(m, c), None)  # noqa: E731
    return jax.lax.scan(body, x, length=4)[0]

  network = quantize(Wrapped(call), random(5, 6))
  assert [row.macs for row in nn.layer_table(network)] == [4 * 36] * 2


@pytest.mark.parametrize(
  "cell", [nnx.LSTMCell, nnx.OptimizedLSTMCell, nnx.GRUCell, nnx.SimpleCell]
)
def test_recurrent_networks_are_quantized_in_all_their_products(cell):
  model = nnx.RNN(cell(4, 6, rngs=nnx.Rngs(0)))
  x = random(3, 5, 4)
  network = quantize(model, x)
  rows = nn.layer_table(network)
  gates = {nnx.LSTMCell: 4, nnx.OptimizedLSTMCell: 4, nnx.GRUCell: 3}
  macs = 5 * gates.get(cell, 1) * (4 * 6 + 6 * 6)
  assert sum(row.macs for row in rows) == macs
  assert jnp.abs(network(x) - model(x)).max() < 0.05


@pytest.fixture(scope="module", params=AXES)
def scanned(request):
  x, model = random(4, 5), Scanned(axes=request.param)
  return request.param, x, quantize(model, x), quantize(Listed(model), x)


def test_every_layer_of_a_stack_has_a_row_and_scales_of_its_own(scanned):
  _, _, network, expected = scanned
  rows = {row.name: row for row in nn.layer_table(network)}
  wanted = {row.name: row for row in nn.layer_table(expected)}
  assert list(rows) == ["stem"] + [
    f"blocks/{name}/{i}" for name in "ab" for i in range(LAYERS)
  ]
  for name, row in rows.items():
    assert row._replace(name="") == wanted[listed(name)]._replace(name="")
  for name in "ab":
    layer = getattr(network.blocks, name)
    for i in range(LAYERS):
      own = getattr(expected.blocks[i], name)
      for params in ("weight_params", "input_params"):
        np.testing.assert_allclose(
          getattr(layer, params)["scale"][i],
          getattr(own, params)["scale"][...],
          rtol=1e-6,
        )


def test_a_stack_computes_as_a_list_at_every_bit_width(scanned):
  _, x, network, expected = scanned
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.set_bits(expected, bits)
    np.testing.assert_allclose(network(x), expected(x), rtol=1e-5, atol=1e-5)


def mixed(names, shared):
  """Bits that differ from layer to layer; of a shared stack, its first's."""
  bits = {name: BITS[i % 3] for i, name in enumerate(names)}
  if shared:
    bits = {
      name: bits[name if name == "stem" else f"{name[:-1]}0"] for name in names
    }
  return bits


def test_layers_of_a_stack_have_bits_of_their_own_where_they_are_passed(
  scanned, tmp_path
):
  axes, x, network, expected = scanned
  names = [row.name for row in nn.layer_table(network)]
  bits = mixed(names, shared=False)
  if axes == "parameters":
    assert nn.tied_layers(network) == [tuple(names[1:4]), tuple(names[4:])]
    with pytest.raises(ValueError, match="bits of blocks/a/1 must be those of"):
      nn.set_bits(network, bits)
    bits = mixed(names, shared=True)
  else:
    assert nn.tied_layers(network) == []
  nn.set_bits(network, bits)
  nn.set_bits(expected, {listed(name): b for name, b in bits.items()})
  assert {r.name: r.bits for r in nn.layer_table(network)} == bits
  np.testing.assert_allclose(network(x), expected(x), rtol=1e-5, atol=1e-5)
  split = nn.functional(network)
  index = jnp.array([BITS.index(bits[name]) for name in names])
  y, _ = jax.jit(split.apply)(split.params, split.batch_stats, index, x)
  np.testing.assert_allclose(y, network(x), rtol=1e-5, atol=1e-5)


def test_a_stored_stack_has_bits_of_its_own_whatever_is_sliced(
  scanned, tmp_path
):
  axes, x, network, expected = scanned
  deploy.save(tmp_path / "model", network)
  loaded = deploy.load(tmp_path / "model", model=Scanned(axes=axes, seed=7))
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.set_bits(loaded, bits)
    np.testing.assert_array_equal(loaded(x), network(x))
  bits = mixed([row.name for row in nn.layer_table(loaded)], shared=False)
  nn.set_bits(loaded, bits)
  nn.set_bits(expected, {listed(name): b for name, b in bits.items()})
  np.testing.assert_allclose(loaded(x), expected(x), rtol=1e-5, atol=1e-5)


def test_gradients_of_a_stack_are_those_of_a_list(scanned):
  _, x, network, expected = scanned

  def gradient(network):
    split = nn.functional(network)
    return jax.jit(
      jax.grad(
        lambda p: jnp.square(split.apply(p, split.batch_stats, 1, x)[0]).sum()
      )
    )(split.params)

  got, want = gradient(network)["blocks"], gradient(expected)["blocks"]
  for i in range(LAYERS):
    jax.tree.map(
      lambda a, b, i=i: np.testing.assert_allclose(
        a[i], b, rtol=1e-4, atol=1e-4
      ),
      got,
      want[str(i)],
    )


def test_scales_of_a_stack_name_the_layers_that_they_belong_to(scanned):
  _, _, network, _ = scanned
  numbers = nn.functional(network).scale_layers
  shapes = sorted(np.shape(n) for n in numbers)
  assert shapes == [(), (), (3,), (3,), (3,), (3,)]
  assert sorted(np.hstack(numbers)) == sorted([*range(7), *range(7)])


def test_bits_of_a_stack_can_be_shared():
  x = random(4, 5)
  network = quantize(Scanned(), x, stack_bits="shared")
  groups = nn.tied_layers(network)
  assert [len(group) for group in groups] == [LAYERS, LAYERS]
  names = [row.name for row in nn.layer_table(network)]
  with pytest.raises(
    ValueError, match="bits of blocks/a/1 must be those of blocks/a/0"
  ):
    nn.set_bits(network, mixed(names, shared=False))
  nn.set_bits(network, mixed(names, shared=True))
  with pytest.raises(ValueError, match="stack_bits must be one of"):
    quantize(Scanned(), x, stack_bits="none")


@pytest.mark.parametrize("kind", ["switchable", "shared"])
def test_batch_norms_of_a_stack_have_rows_of_their_own(kind, tmp_path):
  x, model = random(4, 7, 5), Scanned(ConvBlock, features=4)
  network = quantize(model, x, norm=kind)
  expected = quantize(Listed(model), x, norm=kind)
  for bits in BITS:  # every row sees other statistics
    nn.set_bits(network, bits)
    nn.set_bits(expected, bits)
    for each in (network, expected):
      each.train()
      each(x)
      each.eval()
  rows = 1 if kind == "shared" else 3
  assert network.blocks.norm.mean.shape == (LAYERS, rows, 4)
  bits = mixed([row.name for row in nn.layer_table(network)], shared=False)
  nn.set_bits(network, bits)
  nn.set_bits(expected, {listed(name): b for name, b in bits.items()})
  np.testing.assert_allclose(network(x), expected(x), rtol=1e-4, atol=1e-4)
  deploy.save(tmp_path / "model", network)
  loaded = deploy.load(
    tmp_path / "model", model=Scanned(ConvBlock, features=4, seed=7)
  )
  nn.set_bits(loaded, bits)
  np.testing.assert_allclose(loaded(x), network(x), rtol=1e-5, atol=1e-5)


def test_transitional_norms_of_a_stack_are_an_error():
  model = Scanned(ConvBlock, features=4)
  with pytest.raises(ValueError, match="norms of stacked layers"):
    quantize(model, random(4, 7, 5), norm="transitional")


def test_an_ensemble_is_a_stack():
  @nnx.vmap(in_axes=0, out_axes=0)
  def stack(key):
    return nnx.Linear(6, 6, rngs=nnx.Rngs(key))

  class Ensemble(nnx.Module):
    def __init__(self):
      self.members = stack(jax.random.split(jax.random.key(0), LAYERS))

    def __call__(self, x):
      return nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(self.members, x)

  x = random(5, 6)
  network = quantize(Ensemble(), x)
  assert [row.macs for row in nn.layer_table(network)] == [36] * LAYERS
  nn.set_bits(network, {f"members/{i}": BITS[i] for i in range(LAYERS)})
  y, exact = network(x), Ensemble()(x)
  errors = jnp.abs(y - exact).max((1, 2))
  assert errors[0] < errors[1] < errors[2]


def test_a_stack_is_recalibrated_requantized_and_searched():
  x = random(4, 5)
  network = quantize(Scanned(), x)
  other = nn.requantize(network, weight=quant.lsq(BITS), init="mse")
  assert other.blocks.a.weight_params["scale"].shape[0] == LAYERS
  errors = search.quantization_errors(network)
  assert errors.shape == (1 + 2 * LAYERS, 3)
  assert (np.diff(errors, axis=1) > 0).all()


def test_a_stack_of_planes_is_switched(tmp_path):
  x = random(4, 5)
  network = quantize(
    Scanned(), x, weight=quant.double_rounding(BITS, rounding="floor")
  )
  deploy.save(tmp_path / "model", network)
  served = deploy.Switchable(tmp_path / "model", bits=2, model=Scanned(seed=7))
  names = [row.name for row in nn.layer_table(network)]
  for bits in (2, mixed(names, shared=False), 8):
    served.switch(bits)
    nn.set_bits(network, bits)
    np.testing.assert_allclose(
      served.predict(x), network(x), rtol=1e-5, atol=1e-6
    )
