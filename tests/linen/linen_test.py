"""Linen modules, quantized: against NNX, in transformations, and stored."""

import flax.linen as fl
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dr_jax import deploy, linen, nn, quant
from dr_jax.train import make_optimizer, make_trainer

BITS = (8, 4, 2)


def random(*shape, seed=0):
  return jax.random.normal(jax.random.key(seed), shape)


def quantize(module, variables, x, **options):
  options = {
    "weight": quant.double_rounding(BITS),
    "activation": quant.lsq_activation(BITS),
    "skip": (),
  } | options
  return linen.quantize(module, variables, sample=x, **options)


class Block(fl.Module):
  features: int

  @fl.compact
  def __call__(self, x, train=False):
    x = fl.Conv(self.features, (3, 3), strides=2, use_bias=False)(x)
    return fl.relu(fl.BatchNorm(use_running_average=not train)(x))


class Net(fl.Module):
  @fl.compact
  def __call__(self, x, train=False):
    x = Block(4)(x, train)
    x = Block(6)(x, train)
    x = fl.LayerNorm()(x.mean((1, 2)))
    return fl.Dense(3)(x)


class NnxBlock(nnx.Module):
  def __init__(self, c_in, c_out):
    rngs = nnx.Rngs(0)
    self.Conv_0 = nnx.Conv(
      c_in, c_out, (3, 3), strides=2, use_bias=False, rngs=rngs
    )
    self.BatchNorm_0 = nnx.BatchNorm(c_out, rngs=rngs)

  def __call__(self, x):
    return nnx.relu(self.BatchNorm_0(self.Conv_0(x)))


class NnxNet(nnx.Module):
  """The same network, with the same names."""

  def __init__(self, variables):
    rngs = nnx.Rngs(0)
    self.Block_0, self.Block_1 = NnxBlock(2, 4), NnxBlock(4, 6)
    self.LayerNorm_0 = nnx.LayerNorm(6, rngs=rngs)
    self.Dense_0 = nnx.Linear(6, 3, rngs=rngs)
    nn.update(
      self,
      params=variables["params"],
      batch_stats=variables.get("batch_stats", {}),
    )

  def __call__(self, x):
    x = self.LayerNorm_0(self.Block_1(self.Block_0(x)).mean((1, 2)))
    return self.Dense_0(x)


@pytest.fixture(scope="module")
def twins():
  """A Linen network and the NNX network, both quantized; and their input."""
  x, module = random(4, 8, 8, 2), Net()
  variables = module.init(jax.random.key(1), x)
  other = nn.quantize(
    NnxNet(variables),
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=x,
    skip=(),
  )
  other.eval()
  return x, quantize(module, variables, x), other


def test_tables_and_parameters_are_those_of_nnx(twins):
  _, network, other = twins
  assert nn.layer_table(network) == nn.layer_table(other)
  got, want = nn.functional(network), nn.functional(other)
  assert got.param_labels == want.param_labels
  jax.tree.map(np.testing.assert_array_equal, got.params, want.params)
  jax.tree.map(np.testing.assert_array_equal, got.batch_stats, want.batch_stats)


@pytest.mark.parametrize("bits", [*BITS, (4, 8, 2)])
def test_outputs_are_those_of_nnx_bit_for_bit(bits, twins):
  x, network, other = twins
  names = [row.name for row in nn.layer_table(network)]
  bits = dict(zip(names, bits, strict=True)) if bits not in BITS else bits
  nn.set_bits(network, bits)
  nn.set_bits(other, bits)
  np.testing.assert_array_equal(network(x), other(x))


def test_a_training_step_is_that_of_nnx_bit_for_bit(twins):
  x, *networks = twins
  batch = {"image": x, "label": jnp.arange(4) % 3}
  trained = []
  for network in networks:
    split = nn.functional(network)
    optimizer = make_optimizer(
      "sgd", param_labels=split.param_labels, weight_decay=0.1
    )
    trainer = make_trainer(
      split, optimizer, optax.constant_schedule(0.1), alrs="relative"
    )
    state, _ = trainer.step(trainer.init(jax.random.key(0)), batch)
    trained.append((state.params, state.batch_stats))
  jax.tree.map(np.testing.assert_array_equal, *trained)


def test_split_is_an_apply_that_one_compilation_serves_at_all_bits(twins):
  x, network, other = twins
  apply, _ = linen.split(network)
  traces = []

  @jax.jit
  def run(variables, x):
    traces.append(None)
    return apply(variables, x)

  for bits in BITS:
    nn.set_bits(network, bits)
    nn.set_bits(other, bits)
    np.testing.assert_allclose(
      run(linen.split(network)[1], x), other(x), rtol=1e-5, atol=1e-5
    )
  assert len(traces) == 1


def test_apply_returns_mutable_collections_alone_and_changes_nothing(twins):
  x, network, _ = twins
  nn.set_bits(network, 4)
  apply, variables = linen.split(network)
  _, updates = apply(variables, x, train=True, mutable=True)
  assert set(updates) == {"params", "batch_stats", "bits"}
  _, updates = apply(variables, x, train=True, mutable=["batch_stats"])
  assert set(updates) == {"batch_stats"}
  old = variables["batch_stats"]["Block_0"]["BatchNorm_0"]["mean"]
  new = updates["batch_stats"]["Block_0"]["BatchNorm_0"]["mean"]
  assert [bool((a != b).any()) for a, b in zip(old, new, strict=True)] == [
    *(False, True, False)  # the row of 4 bits
  ]
  np.testing.assert_array_equal(
    linen.split(network)[1]["batch_stats"]["Block_0"]["BatchNorm_0"]["mean"],
    old,
  )


def test_update_writes_back_and_names_what_is_wrong(twins):
  _, network, _ = twins
  network = nnx.clone(network)
  _, variables = linen.split(network)
  params = jax.tree.map(lambda p: p + 1, variables["params"])
  linen.update(network, {"params": params})
  jax.tree.map(
    np.testing.assert_array_equal, linen.split(network)[1]["params"], params
  )
  params["Dense_0"]["kernel"] = jnp.zeros((3, 6))
  with pytest.raises(
    ValueError, match=r"params/Dense_0/kernel must have shape"
  ):
    linen.update(network, {"params": params})
  del params["Dense_0"]
  with pytest.raises(ValueError, match="params/Dense_0/bias must be an array"):
    linen.update(network, {"params": params})


class Residual(fl.Module):
  """A block as nnx.scan takes it."""

  @fl.compact
  def __call__(self, x, _=None):
    y = fl.relu(fl.Dense(12)(fl.LayerNorm()(x)))
    return x + fl.Dense(6)(y), None


class NormBlock(fl.Module):
  @fl.compact
  def __call__(self, x, _=None):
    y = fl.BatchNorm(use_running_average=True)(
      fl.Conv(6, (3,))(x[..., None, :])
    )
    return x + y[..., 0, :], None


class Scanned(fl.Module):
  """A stem and blocks, scanned."""

  block: type = Residual
  collections: tuple[str, ...] = ("params",)

  @fl.compact
  def __call__(self, x):
    blocks = fl.scan(
      self.block,
      variable_axes=dict.fromkeys(self.collections, 0),
      split_rngs={"params": True},
      length=3,
    )
    return blocks(name="blocks")(fl.Dense(6)(x), None)[0]


class Twice(fl.Module):
  """Two blocks inside a transformation."""

  transformation: object

  @fl.compact
  def __call__(self, x):
    block = self.transformation(Residual)
    x = fl.Dense(6)(x)
    return block(name="second")(block(name="first")(x)[0])[0]


class Conditional(fl.Module):
  @fl.compact
  def __call__(self, x):
    layer = fl.Dense(5)
    if self.is_initializing():
      layer(x)
    run = lambda layer, x: layer(x)  # noqa: E731
    return fl.cond(x.sum() > -1e9, run, lambda layer, x: x, layer, x)


class Sequence(fl.Module):
  """One layer."""

  make: object

  @fl.compact
  def __call__(self, x):
    return self.make()(x)


class Attention(fl.Module):
  @fl.compact
  def __call__(self, x):
    return fl.MultiHeadDotProductAttention(2, qkv_features=6)(x, x)


class Language(fl.Module):
  """A language model of nothing but its embedding."""

  @fl.compact
  def __call__(self, tokens):
    embed = fl.Embed(11, 6)
    return embed.attend(embed(tokens))


STACK = [f"blocks/Dense_{k}/{i}" for k in (0, 1) for i in range(3)]
TWICE = [f"{b}/Dense_{k}" for b in ("first", "second") for k in (0, 1)]
NORMS = ("params", "batch_stats")
SLOW = pytest.mark.slow


def vmapped(block):
  return fl.vmap(
    block, variable_axes={"params": None}, split_rngs={"params": False}
  )


# Module, shape of its input, names of its layers.
CASES = {
  "scan": (Scanned(), (4, 5), ["Dense_0", *STACK]),
  "scan, bits": (
    Scanned(collections=("params", "bits")),
    *((4, 5), ["Dense_0", *STACK]),
  ),
  "scan, norms": (
    Scanned(NormBlock, (*NORMS, "bits")),
    *((4, 5), ["Dense_0", *(f"blocks/Conv_0/{i}" for i in range(3))]),
  ),
  "jit": (Twice(fl.jit), (4, 5), ["Dense_0", *TWICE]),
  "remat": (Twice(fl.remat), (4, 5), ["Dense_0", *TWICE]),
  "vmap": (Twice(vmapped), (4, 5), ["Dense_0", *TWICE]),
  "cond": (Conditional(), (4, 5), ["Dense_0"]),
  "attention": (
    Attention(),
    (2, 3, 4),
    [
      f"MultiHeadDotProductAttention_0/{n}"
      for n in "query key value out".split()
    ],
  ),
  "embed": (Language(), None, ["Embed_0"]),
  "gru": (
    Sequence(lambda: fl.RNN(fl.GRUCell(6))),
    (2, 3, 4),
    [f"GRUCell_0/{n}" for n in "ir hr iz hz in hn".split()],
  ),
  "einsum": (
    Sequence(lambda: fl.Einsum((5, 3, 2), "btd,dhk->bthk")),
    *((2, 3, 5), ["Einsum_0"]),
  ),
  "transpose": (
    Sequence(
      lambda: fl.ConvTranspose(4, (3,), strides=(2,), transpose_kernel=True)
    ),
    *((2, 3, 5), ["ConvTranspose_0"]),
  ),
}


def built(name, seed=1):
  module, shape, layers = CASES[name]
  x = jnp.arange(8).reshape(2, 4) if shape is None else random(*shape)
  return module, module.init(jax.random.key(seed), x), x, layers


@pytest.mark.parametrize(
  "name",
  [pytest.param(name, marks=[] if name == "jit" else [SLOW]) for name in CASES],
)
def test_layers_in_transformations_are_found_quantized_and_stored(
  name, tmp_path
):
  module, variables, x, layers = built(name)
  exact = module.apply(variables, x)
  np.testing.assert_array_equal(
    linen.from_linen(module, variables, x)(x), exact
  )
  network = quantize(module, variables, x, init="mse")
  assert [row.name for row in nn.layer_table(network)] == layers
  deploy.save(tmp_path / "model", network)
  _, others, *_ = built(name, seed=2)
  loaded = deploy.load(
    tmp_path / "model", model=linen.from_linen(module, others, x)
  )
  errors = []
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.set_bits(loaded, bits)
    y = network(x)
    np.testing.assert_array_equal(loaded(x), y)
    errors.append(np.abs(y - exact).max())
  assert errors[0] < errors[1] < errors[2]
  split = nn.functional(network)

  def loss(params):
    return jnp.square(split.apply(params, split.batch_stats, 1, x)[0]).sum()

  for gradient in jax.tree.leaves(jax.jit(jax.grad(loss))(split.params)):
    assert np.isfinite(gradient).all() and np.any(gradient)


def test_a_stack_has_bits_of_its_own_where_its_scan_passes_them():
  module, variables, x, layers = built("scan, bits")
  network = quantize(module, variables, x, init="mse")
  assert nn.tied_layers(network) == []
  nn.set_bits(network, dict(zip(layers, (8, 8, 4, 2) + (2, 8, 4), strict=True)))
  shared = quantize(Scanned(), variables, x, init="mse")
  assert [len(group) for group in nn.tied_layers(shared)] == [3, 3]
  outputs = []
  for i in range(3):  # one layer at a time, the others as they were
    nn.set_bits(network, dict.fromkeys(layers, 8) | {STACK[i]: 2})
    outputs.append(np.asarray(network(x)))
  nn.set_bits(network, 8)
  nn.set_bits(shared, 8)
  np.testing.assert_array_equal(network(x), shared(x))
  outputs.append(np.asarray(network(x)))
  assert len({o.tobytes() for o in outputs}) == 4


JitScanned = fl.jit(Scanned)
JitResidual = fl.jit(Residual)


@pytest.mark.parametrize(
  "make",
  [
    lambda: JitScanned(),
    pytest.param(lambda: Scanned(JitResidual), marks=SLOW),
  ],
  ids=["scan in jit", "jit in scan"],
)
def test_programs_that_linens_own_jit_keeps_serve_their_bits_and_network(make):
  x = random(4, 5)
  variables = Scanned().init(jax.random.key(1), x)
  for rounding in ("half_up", "floor"):
    weight = quant.double_rounding(BITS, rounding=rounding)
    exact = quantize(Scanned(), variables, x, weight=weight, activation=None)
    network = quantize(make(), variables, x, weight=weight, activation=None)
    run = jax.jit(linen.split(network)[0])
    for bits in (8, 2, 8):
      nn.set_bits(exact, bits)
      nn.set_bits(network, bits)
      np.testing.assert_allclose(network(x), exact(x), rtol=1e-5, atol=1e-5)
      _, split = linen.split(network)
      np.testing.assert_allclose(run(split, x), exact(x), rtol=1e-5, atol=1e-5)


class Halved(fl.Dense):
  """A user's layer with a computation of its own."""

  def __call__(self, x):
    return super().__call__(x) / 2


class Two(fl.Module):
  first: type = Halved

  @fl.compact
  def __call__(self, x):
    return fl.Dense(3)(self.first(4)(x))


def test_a_layer_with_a_computation_of_its_own_stays_float():
  x, module = random(2, 5), Two()
  variables = module.init(jax.random.key(0), x)
  with pytest.warns(UserWarning, match=r"Halved_0 \(Halved, is none of them\)"):
    network = quantize(module, variables, x, init="mse")
  assert [row.name for row in nn.layer_table(network)] == ["Dense_0"]
  nn.set_bits(network, 8)
  np.testing.assert_allclose(network(x), module.apply(variables, x), atol=0.1)


class Normalized(fl.Module):
  wrapper: type

  @fl.compact
  def __call__(self, x):
    options = {"update_stats": False} if self.wrapper is fl.SpectralNorm else {}
    return fl.Dense(3)(self.wrapper(fl.Dense(4, name="inside"))(x, **options))


@pytest.mark.parametrize("wrapper", [fl.WeightNorm, fl.SpectralNorm])
def test_a_layer_whose_kernel_a_wrapper_normalizes_stays_float(wrapper):
  x, module = random(2, 5), Normalized(wrapper)
  variables = module.init(jax.random.key(0), x)
  kernel = variables["params"]["inside"]["kernel"]
  variables["params"]["inside"]["kernel"] = 100 * kernel
  with pytest.warns(UserWarning, match=r"inside \(Dense, is none of them\)"):
    network = quantize(module, variables, x, init="mse")
  assert [row.name for row in nn.layer_table(network)] == ["Dense_0"]
  exact = module.apply(variables, x)
  np.testing.assert_allclose(
    network(x), exact, rtol=0.02, atol=0.02 * np.abs(exact).max()
  )


class Streams(fl.Module):
  @fl.compact
  def __call__(self, x):
    return fl.Dense(3)(fl.Dropout(0.5, deterministic=False)(x))


def test_streams_of_random_numbers_are_those_that_are_given():
  x, module = random(64, 5), Streams()
  variables = module.init(
    {"params": jax.random.key(0), "dropout": jax.random.key(1)}, x
  )
  network = quantize(module, variables, x, rngs=nnx.Rngs(dropout=0))
  assert np.any(network(x) != network(x))
  apply, variables = linen.split(network)
  outputs = [
    apply(variables, x, rngs={"dropout": jax.random.key(seed)})
    for seed in (0, 0, 1)
  ]
  np.testing.assert_array_equal(outputs[0], outputs[1])
  assert np.any(outputs[0] != outputs[2])


class Named(fl.Module):
  @fl.compact
  def __call__(self, x):
    return fl.Dense(3, name="train")(x)


class Optional(fl.Module):
  @fl.compact
  def __call__(self, x, auxiliary=False):
    y = fl.Dense(3)(x)
    return (y, fl.Dense(2, name="extra")(x)) if auxiliary else y


def test_what_cannot_be_converted_is_an_error():
  x = random(2, 5)
  layer = fl.Dense(3)
  with pytest.raises(ValueError, match="module must contain its layers, got"):
    quantize(layer, layer.init(jax.random.key(0), x), x)
  with pytest.raises(ValueError, match="name 'train' of a variable must not"):
    quantize(Named(), Named().init(jax.random.key(0), x), x)
  variables = Optional().init(jax.random.key(0), x, auxiliary=True)
  with pytest.raises(ValueError, match=r"does not reach \['extra'\]"):
    quantize(Optional(), variables, x)


def test_what_are_no_variables_of_a_module_is_an_error():
  x, module = random(2, 5), Two(fl.Dense)
  variables = module.init(jax.random.key(0), x)
  params = variables["params"]
  for bad, match in (
    (params, r"with 'params', got \['Dense_0', 'Dense_1'\]"),
    (None, "with 'params', got NoneType"),
    (variables | {"bits": {}}, "float module, got a collection 'bits'"),
    (variables | {"losses": {"h": (x,)}}, "losses/h must be an array, got tup"),
    (
      {"params": {"Dense_0": params["Dense_0"]}},
      "module.apply takes: .*Dense_1",
    ),
    (jax.tree.map(jnp.transpose, variables), "module.apply takes: .*kernel"),
  ):
    with pytest.raises(ValueError, match=match):
      quantize(module, bad, x)
  with pytest.raises(ValueError, match="got the class Two"):
    quantize(Two, variables, x)
  with pytest.raises(ValueError, match="flax.linen.Module, got Linear"):
    quantize(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), variables, x)
  with pytest.raises(ValueError, match="from_linen returned, got Two"):
    linen.split(module)


def test_variables_that_are_not_the_networks_are_an_error(twins):
  x, network, _ = twins
  apply, variables = linen.split(network)
  del variables["bits"]
  with pytest.raises(ValueError, match="bits/Block_0/Conv_0/bits must be an"):
    apply(variables, x)
  with pytest.raises(ValueError, match="parms/x: not in this network"):
    linen.update(network, {"parms": {"x": x}})
