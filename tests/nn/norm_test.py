"""Batch norm with rows: which row, which layer, which numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from dr_jax import nn, quant

BITS = (8, 4, 2)


class Post(nnx.Module):
  """conv, norm, relu, conv, norm: each norm after its convolution."""

  def __init__(self, rngs, **options):
    self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.norm1 = nnx.BatchNorm(4, rngs=rngs, **options)
    self.conv2 = nnx.Conv(4, 5, (3, 3), rngs=rngs)
    self.norm2 = nnx.BatchNorm(5, rngs=rngs, **options)

  def __call__(self, x):
    x = nnx.relu(self.norm1(self.conv1(x)))
    return self.norm2(self.conv2(x))


class Pre(nnx.Module):
  """norm, relu, conv, norm, relu, conv: the first norm sees the input."""

  def __init__(self, rngs):
    self.norm1 = nnx.BatchNorm(3, rngs=rngs)
    self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.norm2 = nnx.BatchNorm(4, rngs=rngs)
    self.conv2 = nnx.Conv(4, 5, (3, 3), rngs=rngs)

  def __call__(self, x):
    x = self.conv1(nnx.relu(self.norm1(x)))
    return self.conv2(nnx.relu(self.norm2(x)))


def images(n=4, seed=0):
  x = np.random.default_rng(seed).normal(size=(n, 6, 6, 3))
  return jnp.asarray(x, jnp.float32)


def quantize(model, *, bits=BITS, x=None, **options):
  options = {
    "weight": quant.double_rounding(bits),
    "activation": quant.lsq_activation(bits),
    "skip": (),
    **options,
  }
  return nn.quantize(
    model,
    sample=images() if x is None else x,
    norm=options.pop("norm", "switchable"),
    **options,
  )


def norm_pair(*, rows_of=(8,), norm_dtype=None, shape=(4, 5, 5, 3), **options):
  """A float norm with random parameters, and its quantized counterpart."""

  class Net(nnx.Module):
    def __init__(self, rngs):
      self.norm = nnx.BatchNorm(
        shape[options.get("axis", -1)], rngs=rngs, dtype=norm_dtype, **options
      )
      self.linear = nnx.Linear(shape[-1], 2, rngs=rngs)

    def __call__(self, x):
      return self.linear(self.norm(x))

  net = Net(nnx.Rngs(0))
  rng = np.random.default_rng(1)
  for variable in (net.norm.scale, net.norm.bias, net.norm.mean, net.norm.var):
    if variable is not None:
      value = 1 + np.abs(rng.normal(size=variable.shape))
      variable[...] = jnp.asarray(value, jnp.float32)
  with jax.numpy_dtype_promotion("standard"):
    quantized = quantize(net, bits=rows_of, x=jnp.ones(shape))
  return net.norm, quantized.norm


def data(shape, seed=2):
  x = 3 + 2 * np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def step(norm, x, **kwargs):
  """Output, gradients of a weighted sum, and running statistics after."""
  graph, params, rest = nnx.split(norm, nnx.Param, ...)
  weights = data(x.shape, seed=3)

  @jax.jit
  def run(params, x):
    def loss(params, x):
      merged = nnx.merge(graph, params, rest, copy=True)
      y = merged(x, **kwargs)
      stats = merged.mean[...], merged.var[...]
      return (y.astype(jnp.float32) * weights).sum(), (y, stats)

    return jax.grad(loss, argnums=(0, 1), has_aux=True)(params, x)

  (dparams, dx), (y, stats) = run(params, x)
  leaves = {
    path[-1]: np.asarray(v[...]) for path, v in nnx.to_flat_state(dparams)
  }
  return y, stats, leaves, dx


def assert_same_norm(reference, ours, x, **kwargs):
  y, (mean, var), dparams, dx = step(reference, x, **kwargs)
  y2, (mean2, var2), dparams2, dx2 = step(ours, x, **kwargs)
  assert y2.dtype == y.dtype and dx2.dtype == dx.dtype
  # float32 sums over some hundred elements, in another order.
  close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-4)
  close(y2, y)
  close(mean2[0], mean)
  close(var2[0], var)
  close(dx2, dx)
  assert set(dparams2) == set(dparams)
  for name in dparams:
    close(dparams2[name][0], dparams[name])
  assert np.abs(np.asarray(dx)).max() > 1e-2


@pytest.mark.parametrize("shape", [(4, 5, 5, 3), (16, 3)])
@pytest.mark.parametrize("training", [True, False])
def test_one_bit_width_is_nnx_batch_norm(shape, training):
  reference, ours = norm_pair(shape=shape)
  x = data(shape)
  assert_same_norm(reference, ours, x, use_running_average=not training)


@pytest.mark.parametrize(
  "options",
  [
    dict(use_scale=False),
    dict(use_bias=False),
    dict(use_scale=False, use_bias=False),
    dict(momentum=0.5, epsilon=0.1),
    dict(use_fast_variance=False),
  ],
  ids=str,
)
@pytest.mark.parametrize("training", [True, False])
def test_options_of_nnx_batch_norm_are_kept(options, training):
  reference, ours = norm_pair(**options)
  x = data((4, 5, 5, 3))
  assert_same_norm(reference, ours, x, use_running_average=not training)


@pytest.mark.parametrize("training", [True, False])
def test_any_feature_axis_is_allowed(training):
  reference, ours = norm_pair(shape=(4, 3, 5, 3), axis=1)
  x = data((4, 3, 5, 3))
  assert_same_norm(reference, ours, x, use_running_average=not training)


def test_masked_positions_do_not_enter_the_statistics():
  reference, ours = norm_pair()
  x = data((4, 5, 5, 3))
  mask = np.ones((4, 5, 5, 1), bool)
  mask[1:, 2:] = False
  keep = jnp.asarray(mask)
  assert_same_norm(reference, ours, x, use_running_average=False, mask=keep)
  _, (mean, _), _, _ = step(ours, x, use_running_average=False, mask=keep)
  seen = np.asarray(x)[mask[..., 0]].mean(0)
  before = np.asarray(ours.mean[...])
  # nnx.BatchNorm's default momentum is 0.99.
  np.testing.assert_allclose(mean, 0.99 * before + 0.01 * seen[None], rtol=1e-5)


@pytest.mark.parametrize("x_dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("norm_dtype", [None, jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_output_dtype_is_that_of_nnx_batch_norm(x_dtype, norm_dtype, training):
  reference, ours = norm_pair(norm_dtype=norm_dtype)
  x = data((4, 5, 5, 3)).astype(x_dtype)
  with jax.numpy_dtype_promotion("standard"):
    y = reference(x, use_running_average=not training)
  with jax.numpy_dtype_promotion("standard"):
    ours_y = ours(x, use_running_average=not training)
  assert ours_y.dtype == y.dtype
  tolerance = 2**-6 if y.dtype == jnp.bfloat16 else 1e-4
  np.testing.assert_allclose(
    ours_y.astype(jnp.float32),
    y.astype(jnp.float32),
    rtol=tolerance,
    atol=2 * tolerance,
  )
  assert ours.mean[...].dtype == ours.var[...].dtype == jnp.float32


def test_a_constant_channel_does_not_make_a_nan():
  _, ours = norm_pair()
  x = jnp.full((4, 5, 5, 3), 1000.1, jnp.float32)
  y, (_, var), dparams, dx = step(ours, x, use_running_average=False)
  for value in (y, var, dx, *dparams.values()):
    assert np.isfinite(value).all()
  assert (np.asarray(var) >= 0).all()


def shard(function, mesh, specs, out):
  return jax.jit(
    jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=out)
  )


def test_axis_name_averages_statistics_over_the_devices():
  reference, ours = norm_pair(shape=(8, 4, 3), axis_name="data")
  mesh = jax.make_mesh(
    (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  x = data((8, 4, 3))
  graph, state = nnx.split(ours)

  def run(state, x):
    merged = nnx.merge(graph, state, copy=True)
    y = merged(x, use_running_average=False)
    return y, merged.mean[...], merged.var[...]

  y, mean, var = shard(run, mesh, (P(), P("data")), (P("data"), P(), P()))(
    state, x
  )
  flat = np.asarray(x).reshape(-1, 3)
  gain = np.asarray(reference.scale[...]) / np.sqrt(flat.var(0) + 1e-5)
  expected = (np.asarray(x) - flat.mean(0)) * gain
  expected += np.asarray(reference.bias[...])
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-4)
  for got, old, new in (
    (mean, reference.mean[...], flat.mean(0)),
    (var, reference.var[...], flat.var(0)),
  ):
    expected = 0.99 * np.asarray(old) + 0.01 * new
    np.testing.assert_allclose(got[0], expected, rtol=1e-5)


@pytest.mark.parametrize("axis_name", ["data", None])
def test_gradients_under_shard_map_are_those_of_nnx(axis_name):
  reference, ours = norm_pair(shape=(8, 4, 3), axis_name=axis_name)
  mesh = jax.make_mesh(
    (4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  x, weights = data((8, 4, 3)), data((8, 4, 3), seed=3)

  def gradients(norm):
    graph, params, rest = nnx.split(norm, nnx.Param, ...)

    def run(params, rest, x, weights):
      def loss(params):
        merged = nnx.merge(graph, params, rest, copy=True)
        y = merged(x, use_running_average=False)
        return jax.lax.psum((y * weights).sum(), "data")

      return jax.grad(loss)(params)

    run = jax.shard_map(
      run,
      mesh=mesh,
      in_specs=(P(), P(), P("data"), P("data")),
      out_specs=P(),
    )
    grads = jax.jit(run)(params, rest, x, weights)
    return [np.asarray(g).reshape(-1) for g in jax.tree.leaves(grads)]

  for a, b in zip(gradients(ours), gradients(reference), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


def rows_that_change(before, after):
  return [
    row
    for row in range(len(BITS))
    if not np.array_equal(np.asarray(before)[row], np.asarray(after)[row])
  ]


@pytest.mark.parametrize("traced", [True, False])
def test_training_at_one_bit_width_changes_only_its_row(traced):
  split = nn.functional(quantize(Post(nnx.Rngs(0))))

  def loss(params, i):
    y, stats = split.apply(params, split.batch_stats, i, images(), train=True)
    return jnp.square(y - 1).sum(), stats

  static = () if traced else (1,)
  step = jax.jit(jax.grad(loss, has_aux=True), static_argnums=static)
  for index in range(len(BITS)) if traced else (1,):
    grads, stats = step(split.params, jnp.int32(index) if traced else index)
    for norm in ("norm1", "norm2"):
      for name in ("mean", "var"):
        before, after = split.batch_stats[norm][name], stats[norm][name]
        assert rows_that_change(before, after) == [index]
      for name in ("scale", "bias"):
        gradient = grads[norm][name]
        assert rows_that_change(np.zeros_like(gradient), gradient) == [index]


def test_rows_start_as_copies_of_the_float_norm():
  model = Post(nnx.Rngs(0))
  model.norm1.scale[...] = jnp.arange(4.0)
  model.norm1.mean[...] = jnp.arange(4.0) - 2
  quantized = quantize(model)
  for name in ("scale", "bias", "mean", "var"):
    rows = np.asarray(getattr(quantized.norm1, name)[...])
    value = np.asarray(getattr(model.norm1, name)[...])
    np.testing.assert_array_equal(rows, np.stack([value] * 3))


def test_shared_norms_have_one_row_for_all_bit_widths():
  model = quantize(Post(nnx.Rngs(0)), norm="shared")
  assert model.norm1.scale.shape == model.norm1.mean.shape == (1, 4)
  model.train()
  seen = []
  for bits in BITS:
    nn.set_bits(model, bits)
    model(images())
    seen.append(np.asarray(model.norm1.mean[...]))
  assert not np.array_equal(seen[0], seen[1])
  assert not np.array_equal(seen[1], seen[2])


@pytest.mark.parametrize(
  ("model", "followed"),
  [
    (Post, {"norm1": "conv1", "norm2": "conv2"}),
    (Pre, {"norm1": "conv1", "norm2": "conv1"}),
  ],
)
def test_a_norm_follows_the_layer_called_last_before_it(model, followed):
  quantized = quantize(model(nnx.Rngs(0)))
  for norm, layer in followed.items():
    for bits in BITS:
      other = BITS[0] if bits != BITS[0] else BITS[1]
      assignment = dict.fromkeys(("conv1", "conv2"), other)
      nn.set_bits(quantized, assignment | {layer: bits})
      assert int(getattr(quantized, norm).bits[...]) == BITS.index(bits)


class Crossed(nnx.Module):
  """Both convolutions come before both norms."""

  def __init__(self, rngs):
    self.conv1 = nnx.Conv(3, 4, (3, 3), rngs=rngs)
    self.conv2 = nnx.Conv(3, 4, (1, 1), rngs=rngs)
    self.norm1 = nnx.BatchNorm(4, rngs=rngs)
    self.norm2 = nnx.BatchNorm(4, rngs=rngs)

  def __call__(self, x):
    left, right = self.conv1(x), self.conv2(x)
    return self.norm1(left) + self.norm2(right)


def test_a_norm_follows_the_layer_whose_output_it_sees():
  model = quantize(Crossed(nnx.Rngs(0)))
  nn.set_bits(model, {"conv1": BITS[1], "conv2": BITS[2]})
  assert int(model.norm1.bits[...]) == 1
  assert int(model.norm2.bits[...]) == 2


def test_a_norm_after_a_skipped_layer_follows_the_quantized_one_before():
  quantized = quantize(Post(nnx.Rngs(0)), skip="conv2")
  nn.set_bits(quantized, {"conv1": 2})
  assert int(quantized.norm1.bits[...]) == 2
  assert int(quantized.norm2.bits[...]) == 2
  assert type(quantized.conv2) is nnx.Conv


def test_views_and_modes_set_the_use_of_running_averages():
  model = quantize(Post(nnx.Rngs(0)))
  model.eval()
  assert model.norm1.use_running_average is True
  model.train()
  assert model.norm1.use_running_average is False
  view = nnx.view(model, use_running_average=True)
  assert view.norm1.use_running_average is True


def test_an_open_mode_is_an_error_as_in_nnx():
  model = quantize(Post(nnx.Rngs(0), use_running_average=None))
  with pytest.raises(ValueError, match="use_running_average"):
    model(images())
  model.eval()
  assert model(images()).shape == (4, 6, 6, 5)


def test_recalibration_finds_the_statistics_of_the_batches():
  model = Post(nnx.Rngs(0))
  model = quantize(model, weight=quant.double_rounding(BITS), activation=None)
  nn.set_bits(model, 2)
  model.eval()
  batches = [images(4, seed) for seed in (1, 2, 3)]
  before = nnx.clone(model)
  nn.recalibrate(model, batches)
  # norm1 sees conv1 of the images: from its two-bit kernel directly.
  scale = np.asarray(model.conv1.weight_params["scale"][...])
  codes = np.clip(
    np.round(np.asarray(model.conv1.kernel[...]) / scale), -128, 127
  )
  codes = np.clip(np.round(codes / 64), -2, 1)
  conv = nnx.Conv(3, 4, (3, 3), rngs=nnx.Rngs(0))
  conv.kernel[...] = jnp.asarray(codes * scale * 64, jnp.float32)
  conv.bias[...] = model.conv1.bias[...]
  seen = [np.asarray(conv(x)).reshape(-1, 4) for x in batches]
  expected = {
    "mean": np.mean([y.mean(0) for y in seen], 0),
    "var": np.mean([y.var(0) for y in seen], 0),
  }
  for name, value in expected.items():
    rows = np.asarray(getattr(model.norm1, name)[...])
    np.testing.assert_allclose(rows[2], value, rtol=1e-4, atol=1e-5)
    old = np.asarray(getattr(before.norm1, name)[...])
    assert rows_that_change(old, rows) == [2]
  assert model.norm1.momentum == before.norm1.momentum
  assert model.norm1.use_running_average is True


def test_recalibration_leaves_everything_else_bit_identical():
  model = quantize(Post(nnx.Rngs(0)))
  rng = np.random.default_rng(0)
  for norm in (model.norm1, model.norm2):
    for statistic in (norm.mean, norm.var):
      value = rng.uniform(0.1, 1, statistic.shape)
      statistic[...] = jnp.asarray(value, jnp.float32)
  nn.set_bits(model, {"conv1": 4, "conv2": 2})
  before = dict(nnx.to_flat_state(nnx.state(nnx.clone(model))))
  # Seven sums of the same float are not seven times it.
  nn.recalibrate(model, [images(2, seed) for seed in range(7)])
  changed = {}
  for path, variable in nnx.to_flat_state(nnx.state(model)):
    old, new = np.asarray(before[path][...]), np.asarray(variable[...])
    if not np.array_equal(old, new):
      changed["/".join(map(str, path))] = rows_that_change(old, new)
  assert changed == {
    "norm1/mean": [1],
    "norm1/var": [1],
    "norm2/mean": [2],
    "norm2/var": [2],
  }


def test_recalibration_takes_tuples_of_all_inputs_and_shared_norms():
  class Scaled(Post):
    def __call__(self, x, factor):
      return super().__call__(x * factor)

  model = quantize(
    Scaled(nnx.Rngs(0)),
    x=(images(), jnp.float32(2.0)),
    norm="shared",
    activation=None,
  )
  nn.recalibrate(model, [(images(), jnp.float32(0.0))])
  np.testing.assert_allclose(
    model.norm1.mean[0], model.conv1.bias[...], atol=1e-6
  )
  np.testing.assert_allclose(model.norm1.var[0], 0, atol=1e-6)


def test_recalibration_without_batches_is_an_error():
  model = quantize(Post(nnx.Rngs(0)))
  with pytest.raises(ValueError, match="batches must not be empty"):
    nn.recalibrate(model, [])


class AlwaysFrozen(Post):
  """Passes use_running_average itself, so that nobody else can."""

  def __call__(self, x):
    x = self.norm1(self.conv1(x), use_running_average=True)
    return self.norm2(self.conv2(x))


def test_recalibrating_a_norm_that_does_not_listen_is_an_error():
  model = quantize(AlwaysFrozen(nnx.Rngs(0)))
  with pytest.raises(
    ValueError, match="norm norm1 must update its statistics, but the"
  ):
    nn.recalibrate(model, [images()])


@pytest.mark.parametrize("norm_dtype", [None, jnp.bfloat16])
def test_folded_norms_equal_inference_at_every_bit_width(norm_dtype):
  with jax.numpy_dtype_promotion("standard"):
    model = quantize(Post(nnx.Rngs(0), dtype=norm_dtype))
  rng = np.random.default_rng(0)
  for name in ("mean", "var", "scale", "bias"):
    variable = getattr(model.norm1, name)
    value = rng.uniform(0.5, 2, variable.shape)
    variable[...] = jnp.asarray(value, jnp.float32)
  gain, offset = model.norm1.fold()
  x = data((4, 3, 3, 4))
  for index, bits in enumerate(BITS):
    nn.set_bits(model, bits)
    with jax.numpy_dtype_promotion("standard"):
      y = model.norm1(x, use_running_average=True)
    expected = np.asarray(x) * np.asarray(gain)[index]
    expected += np.asarray(offset)[index]
    tolerance = 2**-6 if norm_dtype else 1e-5
    np.testing.assert_allclose(
      y.astype(jnp.float32), expected, rtol=tolerance, atol=4 * tolerance
    )
    ours = {
      n: np.asarray(getattr(model.norm1, n)[index])
      for n in ("mean", "var", "scale", "bias")
    }
    hand = (np.asarray(x) - ours["mean"]) / np.sqrt(ours["var"] + 1e-5)
    np.testing.assert_allclose(
      expected, hand * ours["scale"] + ours["bias"], rtol=1e-4, atol=1e-4
    )


def test_two_passes_are_kept_where_the_float_norm_asks_for_them():
  """A mean far from zero: one pass in float32 loses the variance."""
  norm = nnx.BatchNorm(4, use_fast_variance=False, rngs=nnx.Rngs(0))

  class Net(nnx.Module):
    def __init__(self):
      self.conv = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
      self.norm = norm

    def __call__(self, x):
      return self.norm(self.conv(x))

  x = jnp.reshape(images(64), (-1, 4)) + 1e4
  quantized = nn.quantize(
    Net(), weight=quant.double_rounding(BITS), sample=x, skip=()
  )
  norm.train()
  quantized.norm.train()
  np.testing.assert_allclose(quantized.norm(x), norm(x), rtol=1e-3, atol=1e-3)
