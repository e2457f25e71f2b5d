"""Every layer that meets a kernel: values, gradients, costs, artifacts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dr_jax import deploy, nn, quant

BITS = (8, 4, 2)


def random(*shape, seed=1):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def rngs():
  return nnx.Rngs(0)


class Holder(nnx.Module):
  """A network of one layer."""

  def __init__(self, layer):
    self.layer = layer

  def __call__(self, *args, **kwargs):
    return self.layer(*args, **kwargs)


class Subclass(nnx.Linear):
  """A user's layer that computes as nnx.Linear."""

  def __init__(self):
    super().__init__(4, 6, rngs=rngs())


class Tied(nnx.Module):
  """A language model of nothing but its embedding."""

  def __init__(self):
    self.layer = nnx.Embed(11, 6, rngs=rngs())

  def __call__(self, tokens):
    return self.layer.attend(self.layer(tokens))


TOKENS = np.arange(8).reshape(2, 4)

# Network, its input, and by hand: output channels, multiply-accumulates.
CASES = {
  "linear": (
    lambda: Holder(nnx.Linear(4, 6, rngs=rngs())),
    random(3, 4),
    *(6, 4 * 6),
  ),
  "subclass": (lambda: Holder(Subclass()), random(3, 4), 6, 4 * 6),
  "conv": (
    lambda: Holder(nnx.Conv(4, 6, (3, 3), feature_group_count=2, rngs=rngs())),
    random(2, 5, 5, 4),
    *(6, 25 * 9 * 2 * 6),
  ),
  "general": (
    lambda: Holder(
      nnx.LinearGeneral((4, 3), (2, 5), axis=(-2, -1), rngs=rngs())
    ),
    random(2, 7, 4, 3),
    *(10, 7 * 12 * 10),
  ),
  "general, batch axis": (
    lambda: Holder(
      nnx.LinearGeneral(4, (2, 5), batch_axis={0: 3}, rngs=rngs())
    ),
    random(3, 7, 4),
    *(30, 7 * 4 * 10),
  ),
  "einsum": (
    lambda: Holder(nnx.Einsum("btd,dhk->bthk", (6, 2, 3), (2, 3), rngs=rngs())),
    random(2, 5, 6),
    *(6, 5 * 6 * 6),
  ),
  "einsum, groups": (
    lambda: Holder(nnx.Einsum("btgd,gdk->btgk", (3, 4, 5), rngs=rngs())),
    random(2, 5, 3, 4),
    *(15, 5 * 3 * 4 * 5),
  ),
  "einsum, axes in turn": (
    lambda: Holder(nnx.Einsum("btd,hkd->bthk", (2, 3, 6), (2, 3), rngs=rngs())),
    random(2, 5, 6),
    *(6, 5 * 6 * 6),
  ),
  "transpose": (
    lambda: Holder(nnx.ConvTranspose(4, 5, (3, 3), strides=2, rngs=rngs())),
    random(2, 6, 6, 4),
    *(5, 36 * 9 * 4 * 5),
  ),
  "transpose, kernel": (
    lambda: Holder(
      nnx.ConvTranspose(
        4, 5, (3, 3), strides=2, transpose_kernel=True, rngs=rngs()
      )
    ),
    random(2, 6, 6, 4),
    *(5, 36 * 9 * 4 * 5),
  ),
  "embed": (lambda: Holder(nnx.Embed(11, 6, rngs=rngs())), TOKENS, 11, 0),
  "tied": (Tied, TOKENS, 11, 4 * 6 * 11),
  "lora": (
    lambda: Holder(nnx.LoRALinear(4, 6, lora_rank=2, rngs=rngs())),
    random(3, 4),
    *(6, 4 * 6),
  ),
}


# One axis of the kernel that the output has; the last one unless said here.
CHANNELS = {
  "einsum, axes in turn": 1,
  "transpose, kernel": 2,
  "embed": 0,
  "tied": 0,
}


def quantize(model, x, **options):
  options = {
    "weight": quant.double_rounding(BITS),
    "activation": quant.lsq_activation(BITS),
    "skip": (),
    "init": "mse",
  } | options
  return nn.quantize(model, sample=x, **options)


@pytest.fixture(scope="module", params=CASES)
def case(request):
  make, x, channels, macs = CASES[request.param]
  return make, x, channels, macs, quantize(make(), x)


def kernel_of(layer):
  return layer.embedding if isinstance(layer, nnx.Embed) else layer.kernel


def test_a_scale_belongs_to_each_output_channel(case):
  make, _, channels, macs, network = case
  layer = network.layer
  scale = layer.weight_params["scale"][...]
  assert scale.size == channels
  (row,) = nn.layer_table(network)
  assert (row.macs, row.parameters) == (macs, kernel_of(make().layer).size)


def test_a_channels_scale_depends_on_its_own_weights_alone(case, request):
  """Times 3 for all weights that one output feature is computed from."""
  make, x, _, _, network = case
  before = network.layer.weight_params["scale"][...].reshape(-1)
  model = make()
  kernel = kernel_of(model.layer)
  name = request.node.callspec.params["case"]
  axis = CHANNELS.get(name, kernel.ndim - 1)
  first = (slice(None),) * axis + (0,)
  kernel[...] = kernel[...].at[first].multiply(3.0)
  after = quantize(model, x).layer.weight_params["scale"][...].reshape(-1)
  ratio = np.asarray(after / before)
  changed = np.isclose(ratio, 3, rtol=1e-4)
  # The other axes of a channel (heads, groups) have a scale each.
  assert changed.sum() == changed.size // kernel.shape[axis]
  np.testing.assert_allclose(ratio[~changed], 1, rtol=1e-5)


def test_it_computes_with_its_quantized_kernel_and_input(case):
  """The float layer, given fake-quantized arrays, returns the same bits."""
  make, x, _, _, network = case
  layer, model = network.layer, make()
  params = nn.bits.arrays_of(layer.weight_params)
  kernel = kernel_of(model.layer)
  columns = layer.columns.of(kernel[...])
  for index, bits in enumerate(BITS):
    nn.set_bits(network, bits)
    quantized = layer.weight_quantizer.fake_quantize(params, columns, index)
    float_model = make()
    kernel_of(float_model.layer)[...] = layer.columns.back(quantized)
    promote = float_model.layer.promote_dtype

    def with_input(arrays, index=index, promote=promote, **options):
      if layer.input_quantizer is not None and len(arrays) > 1:
        inputs = layer.input_quantizer.fake_quantize(
          nn.bits.arrays_of(layer.input_params), arrays[0], index
        )
        arrays = (inputs, *arrays[1:])
      return promote(arrays, **options)

    float_model.layer.promote_dtype = with_input
    np.testing.assert_array_equal(network(x), float_model(x))


def test_gradients_pass_straight_through_to_the_kernel(case):
  """As its method differentiates columns, and the float layer all else."""
  make, x, _, _, _ = case
  network = quantize(make(), x, activation=None, init="max")
  split = nn.functional(network)

  def loss(params, index):
    y, _ = split.apply(params, split.batch_stats, index, x)
    return jnp.square(y).sum()

  def float_loss(kernel):
    model = make()
    kernel_of(model.layer)[...] = kernel
    return jnp.square(model(x)).sum()

  layer = network.layer
  params = nn.bits.arrays_of(layer.weight_params)
  fake_quantize = layer.weight_quantizer.fake_quantize

  @jax.jit
  def through_columns(kernel, index):
    quantized, back = jax.vjp(
      lambda w: fake_quantize(params, w, index), layer.columns.of(kernel)
    )
    slope = jax.grad(float_loss)(layer.columns.back(quantized))
    (expected,) = back(layer.columns.of(slope))
    return layer.columns.back(expected)

  name = "embedding" if isinstance(layer, nnx.Embed) else "kernel"
  kernel = kernel_of(make().layer)[...]
  gradient_of = jax.jit(jax.grad(loss))
  for index in range(2):
    gradient = gradient_of(split.params, index)["layer"][name]
    expected = through_columns(kernel, index)
    assert (expected != 0).mean() > 0.5
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-4)


def test_what_is_stored_gives_the_same_bits(case, tmp_path):
  make, x, _, _, network = case
  deploy.save(tmp_path / "model", network)
  loaded = deploy.load(tmp_path / "model", model=make())
  for bits in BITS:
    nn.set_bits(network, bits)
    nn.set_bits(loaded, bits)
    np.testing.assert_array_equal(loaded(x), network(x))


def test_integers_serve_it_or_it_says_that_they_do_not(case, tmp_path):
  make, x, _, _, network = case
  deploy.save(tmp_path / "model", network)
  loaded = deploy.load(tmp_path / "model", model=make())
  nn.set_bits(loaded, 4)
  expected = loaded(x)
  names = ("Linear", "Subclass", "Conv", "LinearGeneral")
  name = type(make().layer).__name__
  serves = name in names and not getattr(make().layer, "batch_axis", None)
  assert nn.supports(loaded, "integer") == serves
  if serves:
    nn.set_backend(loaded, "integer")
    np.testing.assert_allclose(loaded(x), expected, rtol=1e-5, atol=1e-5)
  else:
    with pytest.raises(ValueError, match="compute layer layer: integers"):
      nn.set_backend(loaded, "integer")


def test_gradients_of_a_general_product_in_integers_are_the_float_layers():
  make, x, *_ = CASES["general"]
  network = quantize(make(), x)
  gradients = []
  for backend in ("float", "integer"):
    nn.set_backend(network, backend)
    split = nn.functional(network)
    gradients.append(
      jax.grad(
        lambda p, s=split: jnp.sin(s.apply(p, s.batch_stats, 1, x)[0]).sum()
      )(split.params)
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
    *gradients,
  )


def test_attention_is_quantized_in_its_four_projections():
  attention = nnx.MultiHeadAttention(2, 8, 16, decode=False, rngs=rngs())
  x = random(3, 5, 8)
  network = quantize(Holder(attention), x)
  rows = nn.layer_table(network)
  assert [row.name for row in rows] == [
    f"layer/{name}" for name in ("query", "key", "value", "out")
  ]
  assert [row.macs for row in rows] == [5 * 8 * 16] * 3 + [5 * 16 * 8]
  error = jnp.abs(network(x) - attention(x)).max()
  assert error < 0.02 * jnp.abs(attention(x)).max()


@pytest.mark.parametrize("name", ["__call__", "attend"])
def test_a_layer_that_overrides_its_computation_stays_float(name):
  kind = nnx.Embed if name == "attend" else nnx.Linear

  def own(self, x):
    return getattr(kind, name)(self, x) + 1

  other = type("Other", (kind,), {name: own})

  class Two(nnx.Module):
    def __init__(self):
      self.first = nnx.Linear(4, 4, rngs=rngs())
      self.other = other(4, 4, rngs=rngs())

    def __call__(self, x):
      return getattr(self.other, name)(self.first(x))

  with pytest.warns(UserWarning, match=rf"other \(Other, overrides {name}\)"):
    network = quantize(Two(), random(3, 4))
  assert [row.name for row in nn.layer_table(network)] == ["first"]


@pytest.mark.parametrize(
  ("einsum", "call", "reason"),
  [
    (None, "btd,dk->btk", "is given its einsum_str when it is called"),
    ("btd,...k->btk", None, "has an ellipsis among the axes of its kernel"),
  ],
)
def test_an_einsum_that_says_too_little_of_its_kernel_stays_float(
  einsum, call, reason
):
  class Two(nnx.Module):
    def __init__(self):
      self.first = nnx.Linear(4, 4, rngs=rngs())
      self.other = nnx.Einsum("btd,dk->btk", (4, 3), rngs=rngs())
      self.other.einsum_str = einsum

    def __call__(self, x):
      return self.other(self.first(x), *([call] if call else []))

  if call is None:
    Two.__call__ = lambda self, x: self.first(x)
  with pytest.warns(UserWarning, match=rf"other \(Einsum, {reason}\)"):
    network = quantize(Two(), random(2, 5, 4))
  assert [row.name for row in nn.layer_table(network)] == ["first"]


def test_adapters_stay_float_and_learn():
  make, x, *_ = CASES["lora"]
  network = quantize(make(), x)
  split = nn.functional(network)
  lora = split.params["layer"]["lora"]
  assert sorted(lora) == ["lora_a", "lora_b"]
  gradient = jax.grad(
    lambda p: split.apply(p, split.batch_stats, 2, x)[0].sum()
  )(split.params)["layer"]["lora"]
  assert jnp.abs(gradient["lora_b"]).max() > 0
