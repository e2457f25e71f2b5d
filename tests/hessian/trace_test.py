import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from dr_jax import hessian

KEY = jax.random.key(0)


def diagonal(params, batch):
  """Hessian diag(1, 2, 3) for a, -2 I for b, times the mean of the batch."""
  a, b = params["a"], params["b"]
  curve = (jnp.arange(1, 4, dtype=a.dtype) * a**2).sum() / 2 - (b**2).sum()
  return curve * batch.mean()


def diagonal_params():
  return {"a": jnp.ones(3), "b": jnp.ones((2, 2))}


def regression(params, batch):
  """Mean over examples; its Hessian in one example is far from diagonal."""
  y = jnp.tanh(batch["x"] @ params["kernel"]) @ params["head"]
  return ((y - batch["y"]) ** 2).mean()


def regression_case(examples=24):
  rng = np.random.default_rng(0)
  draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
  params = {"head": draw(4), "kernel": draw(3, 4)}
  return params, {"x": draw(examples, 3), "y": draw(examples)}


def coupled(params, batch):
  """Hessian [[1, c], [c, 1]]: samples are 2 + 2 c or 2 - 2 c, by a coin."""
  del batch
  a = params["a"]
  return (a**2).sum() / 2 + 10 * a[0] * a[1]


def exact_traces(loss, params, batch):
  """{path: trace} of a flat dict of arrays, from the whole Hessian."""
  blocks = jax.hessian(loss)(params, batch)
  return {
    path: np.trace(np.reshape(blocks[path][path], (p.size, p.size)))
    for path, p in params.items()
  }


def test_a_diagonal_hessian_has_its_exact_trace_at_once_and_keeps_its_sign():
  estimates = hessian.trace(diagonal, diagonal_params(), KEY, [jnp.ones(2)])
  assert estimates == {"a": (6.0, 0.0, 8), "b": (-8.0, 0.0, 8)}
  assert isinstance(estimates["a"], hessian.TraceEstimate)


@pytest.mark.parametrize("mode", hessian.MODES)
def test_traces_agree_with_the_whole_hessian_within_their_error_bars(mode):
  params, batch = regression_case()
  estimates = hessian.trace(
    regression, params, KEY, [batch], rel_stderr=0.02, max_probes=800, mode=mode
  )
  for path, exact in exact_traces(regression, params, batch).items():
    mean, stderr, probes = estimates[path]
    assert 8 <= probes <= 800
    assert 0 < stderr <= 0.02 * abs(mean) or probes == 800
    # Four sigma, for a fixed key.
    assert abs(mean - exact) < 4 * stderr


def test_batches_of_unequal_size_give_the_trace_of_all_examples_together():
  params, batch = regression_case(24)
  together = hessian.trace(regression, params, KEY, [batch], max_probes=20)
  parts = [
    {name: array[a:b] for name, array in batch.items()}
    for a, b in ((0, 4), (4, 20), (20, 24))
  ]
  apart = hessian.trace(regression, params, KEY, parts, max_probes=20)
  for path, (mean, stderr, probes) in together.items():
    # The same probes on each batch: equal up to float32 sums.
    np.testing.assert_allclose(apart[path].mean, mean, rtol=1e-5)
    np.testing.assert_allclose(apart[path].stderr, stderr, rtol=1e-4)
    assert apart[path].probes == probes == 20


def test_mean_and_standard_error_are_those_of_the_samples():
  params, batch = regression_case()
  seen = []
  estimates = hessian.trace(
    regression,
    params,
    KEY,
    [batch],
    rel_stderr=1e-9,
    max_probes=12,
    on_probe=lambda number, so_far: seen.append((number, so_far)),
  )
  assert [number for number, _ in seen] == list(range(1, 13))
  assert seen[-1][1] == estimates
  for path in params:
    means = np.array([so_far[path].mean for _, so_far in seen])
    assert seen[0][1][path].stderr == np.inf
    samples = np.diff(np.arange(13) * np.concatenate([[0], means]))
    assert samples.std() > 0.1
    for n in range(2, 13):
      # Samples taken back from float64 means.
      np.testing.assert_allclose(
        seen[n - 1][1][path].stderr,
        samples[:n].std(ddof=1) / np.sqrt(n),
        rtol=1e-9,
      )
      assert seen[n - 1][1][path].probes == n


def test_one_probe_covers_all_selected_leaves_and_no_others():
  def product(params, batch):
    return params["a"] * params["b"] * batch.mean()

  params = {"a": jnp.float32(1), "b": jnp.float32(1)}
  kwargs = {"rel_stderr": 1e-3, "max_probes": 50}
  # H = [[0, 1], [1, 0]]: samples of a are v_a v_b, a coin's 1 or -1.
  both = hessian.trace(product, params, KEY, [jnp.ones(1)], **kwargs)
  assert both["a"].stderr > 0.1
  assert both["a"] == both["b"]
  alone = hessian.trace(product, params, KEY, [jnp.ones(1)], select=["a"])
  assert alone == {"a": (0.0, 0.0, 8)}


def test_a_leaf_whose_trace_is_zero_runs_to_max_probes():
  def product(params, batch):
    return params["a"][0] * params["a"][1] * batch.mean()

  estimates = hessian.trace(
    product, {"a": jnp.ones(2)}, KEY, [jnp.ones(1)], max_probes=64
  )
  assert estimates["a"].probes == 64
  assert estimates["a"].stderr > 0.2


def test_a_constant_running_mean_does_not_stop_the_probes():
  seen = []
  estimates = hessian.trace(
    coupled,
    {"a": jnp.ones(2)},
    KEY,
    [jnp.ones(1)],
    rel_stderr=0.2,
    max_probes=5000,
    on_probe=lambda number, so_far: seen.append(so_far["a"]),
  )
  means = np.array([e.mean for e in seen])
  moves = np.abs(np.diff(means) / means[1:])
  # Samples are 22 or -18: the mean of 2 takes about 2,500 probes, though after
  # some dozens no probe moves it by a fifth.
  assert (moves[7:500] < 0.2).any()
  assert 500 < estimates["a"].probes < 5000
  assert abs(estimates["a"].mean - 2) < 4 * estimates["a"].stderr


def test_probes_end_when_the_last_layer_is_good_enough_and_not_before():
  def two(params, batch):
    a, b = params["a"], params["b"]
    curve = ((a**2).sum() + (b**2).sum()) / 2
    return (curve + a[0] * a[1] / 2 + 2 * b[0] * b[1]) * batch.mean()

  # Samples 2 +- 1 take about 6 probes, samples 2 +- 4 about 100.
  params = {"a": jnp.ones(2), "b": jnp.ones(2)}
  seen = []
  hessian.trace(
    two,
    params,
    KEY,
    [jnp.ones(1)],
    rel_stderr=0.2,
    on_probe=lambda number, so_far: seen.append(so_far),
  )
  good = np.array(
    [[e.stderr <= 0.2 * abs(e.mean) for e in s.values()] for s in seen]
  )
  assert good[20:50, 0].all() and not good[20:50, 1].any()
  assert list(np.flatnonzero(good[7:].all(1))) == [len(seen) - 8]
  assert len(seen) < 512


def test_a_small_error_bar_is_not_trusted_before_min_probes():
  run = lambda least: hessian.trace(  # noqa: E731
    diagonal, diagonal_params(), KEY, [jnp.ones(2)], min_probes=least
  )
  for least in (2, 11):
    assert run(least)["a"].probes == least


def test_results_depend_on_the_key_and_a_longer_run_extends_a_shorter_one():
  params, batch = regression_case()

  def run(key, probes):
    history = []
    hessian.trace(
      regression,
      params,
      key,
      [batch],
      rel_stderr=1e-9,
      min_probes=2,
      max_probes=probes,
      on_probe=lambda number, so_far: history.append(so_far),
    )
    return history

  long = run(KEY, 6)
  assert run(KEY, 4) == long[:4]
  assert run(jax.random.key(1), 4) != long[:4]


def test_the_loss_is_compiled_once_however_many_the_probes():
  params, batch = regression_case()
  traced = []

  def counted(params, batch):
    traced.append(1)
    return regression(params, batch)

  hessian.trace(
    counted, params, KEY, [batch, batch], rel_stderr=1e-9, max_probes=10
  )
  assert len(traced) == 1


def test_the_given_jit_compiles_the_program():
  compiled = []

  def jit(function):
    compiled.append(function)
    return jax.jit(function)

  hessian.trace(diagonal, diagonal_params(), KEY, [jnp.ones(2)], jit=jit)
  assert len(compiled) == 1


def test_the_mode_is_that_of_the_products():
  def with_rule(function, backward):
    wrapped = jax.custom_vjp(lambda x: function(x))
    wrapped.defvjp(lambda x: (function(x), x), lambda x, g: (backward(x) * g,))
    return wrapped

  rule = with_rule(jnp.round, with_rule(jnp.square, lambda x: 7 * x))
  run = lambda **kwargs: hessian.trace(  # noqa: E731
    lambda x, batch: rule(x) * batch.mean(),
    jnp.float32(3),
    KEY,
    [jnp.ones(2)],
    **kwargs,
  )
  with pytest.raises(TypeError, match="custom_vjp"):
    run()
  assert run(mode="reverse_over_reverse") == {"": (21.0, 0.0, 8)}


@pytest.mark.parametrize(
  ("select", "chosen"),
  [
    (None, ["a", "b"]),
    (["b"], ["b"]),
    (("b", "a"), ["a", "b"]),
    ("b", ["b"]),
    (lambda path: path > "a", ["b"]),
  ],
)
def test_leaves_are_selected_by_path_or_by_a_function_of_it(select, chosen):
  estimates = hessian.trace(
    diagonal, diagonal_params(), KEY, [jnp.ones(2)], select=select
  )
  assert list(estimates) == chosen


def test_leaves_that_are_not_selected_need_no_derivative():
  @jax.custom_vjp
  def stubborn(x):
    return x

  def refuse(*_):
    raise AssertionError("differentiated")

  stubborn.defvjp(refuse, refuse)

  def loss(params, batch):
    scale = stubborn(params["scale"]) * params["count"].astype(jnp.float32)
    return (params["net"]["kernel"] ** 2).sum() * scale * batch.mean()

  params = {
    "count": jnp.int32(3),
    "net": {"kernel": jnp.ones((2, 2))},
    "scale": jnp.float32(2),
  }
  estimates = hessian.trace(
    loss, params, KEY, [jnp.ones(2)], select=["net/kernel"]
  )
  assert estimates == {"net/kernel": (48.0, 0.0, 8)}
  with pytest.raises(
    ValueError, match="select must be of floating arrays, but count is"
  ):
    hessian.trace(loss, params, KEY, [jnp.ones(2)])


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"select": ["a", "c"]}, "select must be of a, b, got c"),
    ({"select": "c/d"}, "select must be of a, b, got c/d"),
    ({"select": []}, "select must select some of a, b, got"),
    ({"select": lambda path: False}, "select must select some of a, b"),
    ({"rel_stderr": 0}, "rel_stderr must be > 0, got 0"),
    ({"rel_stderr": float("nan")}, "rel_stderr must be > 0, got nan"),
    ({"min_probes": 1}, "min_probes must be >= 2, to have an error bar, got 1"),
    ({"max_probes": 7}, "max_probes must be >= min_probes=8, got 7"),
    ({"mode": "both"}, "mode must be one of.*got 'both'"),
    ({"batches": []}, "batches must not be empty"),
    (
      {"batches": [jnp.ones(2), jnp.ones(0)]},
      r"batches\[1\] must have the same number of examples,",
    ),
    (
      {"batches": [{"x": np.ones(2), "y": np.ones(3)}]},
      r"batches\[0\] must have the same number of examples,",
    ),
    (
      {"batches": [np.float32(1)]},
      r"batches\[0\] must have the same.*got leading axes \[\(\)\]",
    ),
    (
      {"batches": {"x": np.ones(2)}},
      r"batches\[0\] must have the same.*got leading axes \[\(\)\]",
    ),
    (
      {"batches": iter([jnp.ones(2)])},
      "batches must be a sequence,.*got list_iterator",
    ),
  ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
  arguments = {"batches": [jnp.ones(2)], **change}
  batches = arguments.pop("batches")
  with pytest.raises(ValueError, match=message):
    hessian.trace(diagonal, diagonal_params(), KEY, batches, **arguments)


def test_a_loss_or_a_product_that_is_not_finite_is_named_by_batch_and_layer():
  batches = [jnp.ones(2), jnp.full(2, jnp.inf)]
  with pytest.raises(
    ValueError, match="loss of batch 1 must be finite, got -inf"
  ):
    hessian.trace(diagonal, diagonal_params(), KEY, batches)

  def kink(params, batch):
    root = jnp.sqrt(params["b"]).sum()  # no curvature at 0
    return ((params["a"] ** 2).sum() + root) * batch.mean()

  params = {"a": jnp.ones(2), "b": jnp.zeros(2)}
  with pytest.raises(
    ValueError, match=r"b: v\.Hv of batch 0 must be finite, got -inf"
  ):
    hessian.trace(kink, params, KEY, [jnp.ones(2)])


@pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit])
@pytest.mark.parametrize("mode", hessian.MODES)
def test_batches_sharded_over_a_mesh_give_the_numbers_of_one_device(
  axis_type, mode
):
  params, batch = regression_case()
  kwargs = {"rel_stderr": 1e-9, "max_probes": 8, "mode": mode}
  expected = hessian.trace(regression, params, KEY, [batch], **kwargs)
  mesh = jax.make_mesh((4,), ("data",), axis_types=(axis_type,))
  with jax.set_mesh(mesh):
    params = jax.device_put(params, NamedSharding(mesh, P()))
    batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
    assert len(batch["x"].sharding.device_set) == 4
    found = hessian.trace(regression, params, KEY, [batch], **kwargs)
  for path, (mean, stderr, probes) in expected.items():
    # Sums over the batch in another order.
    np.testing.assert_allclose(found[path].mean, mean, rtol=1e-5)
    np.testing.assert_allclose(found[path].stderr, stderr, rtol=1e-5)
    assert found[path].probes == probes


def test_traces_match_the_exact_ones_of_pytorch(golden):
  arrays = golden("hessian.npz")
  names, weights = arrays["mlp/param_names"], {}
  probes = 400
  with jax.enable_x64(True):
    for name in names:
      weights[name] = jnp.asarray(arrays[f"mlp/torch/{name}"].T)
    batches = [
      {
        "x": jnp.asarray(arrays["inputs_nhw"][part], jnp.float64),
        "y": jnp.asarray(arrays["labels"][part]),
      }
      for part in (slice(0, 100), slice(100, 256))
    ]

    def loss(params, batch):
      y = batch["x"].reshape(-1, 64)
      for n in (1, 2, 3):
        y = y @ params[f"dense{n}.weight"] + params[f"dense{n}.bias"][None]
        y = y if n == 3 else jnp.tanh(y)
      chosen = jnp.take_along_axis(y, batch["y"][:, None], 1)[:, 0]
      return (jax.nn.logsumexp(y, 1) - chosen).mean()

    estimates = hessian.trace(
      loss, weights, KEY, batches, rel_stderr=1e-9, max_probes=probes
    )
  for name, exact, variance in zip(
    names,
    arrays["mlp/exact_trace_block"],
    arrays["mlp/rademacher_var_block_joint_probe"],
    strict=True,
  ):
    mean, stderr, made = estimates[name]
    assert made == probes
    sigma = np.sqrt(variance / probes)
    # Four sigma, for a fixed key; the trace itself is many of them away.
    assert abs(mean - exact) < 4 * sigma < abs(exact)
    # The error of a standard deviation of 400 samples is about 1/28, more
    # where their tails are heavy.
    np.testing.assert_allclose(stderr, sigma, rtol=0.2)


def test_sensitivity_is_the_trace_per_parameter_with_its_sign():
  estimates = {
    "a": hessian.TraceEstimate(6.0, 0.1, 8),
    "b": hessian.TraceEstimate(-8.0, 0.1, 8),
  }
  sizes = {"a": 3, "b": 4, "c": 5}
  assert hessian.sensitivity(estimates, sizes) == {"a": 2.0, "b": -2.0}
  for wrong in ({"a": 3}, {"a": 3, "b": 0}):
    with pytest.raises(ValueError, match=r"parameters\['b'\] must be >= 1"):
      hessian.sensitivity(estimates, wrong)
