import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree

from dr_jax import hessian

PROBES = 8


@pytest.fixture
def double():
  with jax.enable_x64(True):
    yield


def dense_net(dtype):
  """A tanh network of two layers; loss(params, x, labels), and arguments."""
  rng = np.random.default_rng(0)

  def array(*shape):
    return jnp.asarray(rng.normal(size=shape), dtype)

  params = {
    "first": {"bias": array(4), "kernel": array(3, 4)},
    "second": [array(4, 5), array(5)],
  }
  x, labels = array(7, 3), jnp.asarray(rng.integers(0, 5, 7))

  def loss(params, x, labels):
    first, (kernel, bias) = params["first"], params["second"]
    y = jnp.tanh(x @ first["kernel"] + first["bias"][None])
    return cross_entropy(y @ kernel + bias[None], labels)

  return (
    loss,
    params,
    (x, labels),
    jax.tree.map(lambda p: array(*p.shape), params),
  )


def cross_entropy(logits, labels):
  chosen = jnp.take_along_axis(logits, labels[:, None], 1)[:, 0]
  return (jax.nn.logsumexp(logits, 1) - chosen).mean()


def explicit(loss, params, args):
  """The Hessian as a matrix [n, n] of the raveled params."""
  flat, unravel = ravel_pytree(params)
  return jax.hessian(lambda flat: loss(unravel(flat), *args))(flat)


@pytest.mark.parametrize("mode", hessian.MODES)
def test_a_product_is_that_of_the_explicit_hessian(double, mode):
  loss, params, args, v = dense_net(jnp.float64)
  product = jax.jit(functools.partial(hessian.hvp, loss, mode=mode))(
    params, v, *args
  )
  assert jax.tree.structure(product) == jax.tree.structure(params)
  expected = explicit(loss, params, args) @ ravel_pytree(v)[0]
  assert np.abs(expected).max() > 0.1
  # float64 sums of some forty terms.
  np.testing.assert_allclose(
    ravel_pytree(product)[0], expected, rtol=1e-12, atol=1e-13
  )


def test_both_modes_agree_in_float32():
  loss, params, args, v = dense_net(jnp.float32)
  one, other = (
    hessian.hvp(loss, params, v, *args, mode=mode) for mode in hessian.MODES
  )
  # Rounding of float32 sums.
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
    one,
    other,
  )


def with_rule(function, backward):
  wrapped = jax.custom_vjp(lambda x: function(x))
  wrapped.defvjp(lambda x: (function(x), x), lambda x, g: (backward(x) * g,))
  return wrapped


@pytest.mark.parametrize("mode", hessian.MODES)
def test_through_a_custom_vjp_the_backward_rule_is_differentiated(mode):
  loss = with_rule(jnp.round, lambda x: 5 * x)
  assert hessian.hvp(loss, jnp.float32(3), jnp.float32(2), mode=mode) == 10


def test_rules_within_rules_need_reverse_over_reverse_not_the_default():
  slope = with_rule(jnp.square, lambda x: 7 * x)
  loss = with_rule(jnp.round, slope)
  x, v = jnp.float32(3), jnp.float32(2)
  with pytest.raises(TypeError, match="custom_vjp"):
    hessian.hvp(loss, x, v)
  assert hessian.hvp(loss, x, v, mode="reverse_over_reverse") == 42


@pytest.mark.parametrize("mode", hessian.MODES)
def test_quadratic_forms_are_inner_products_leaf_by_leaf(double, mode):
  loss, params, args, v = dense_net(jnp.float64)
  forms = hessian.quadratic_forms(loss, params, v, *args, mode=mode)
  product = hessian.hvp(loss, params, v, *args)
  assert list(forms) == ["first/bias", "first/kernel", "second/0", "second/1"]
  for form, a, b in zip(
    forms.values(), jax.tree.leaves(v), jax.tree.leaves(product), strict=True
  ):
    np.testing.assert_allclose(form, np.vdot(a, b), rtol=1e-12)
  whole = ravel_pytree(v)[0]
  np.testing.assert_allclose(
    sum(forms.values()),
    whole @ explicit(loss, params, args) @ whole,
    rtol=1e-12,
  )


def test_quadratic_forms_of_half_precision_are_summed_in_float32():
  # 2049 is no float16: a sum kept in float16 would stop at 2048.
  x = jnp.zeros(2049, jnp.float16)
  form = hessian.quadratic_forms(
    lambda x: (x**2 / 2).astype(jnp.float32).sum(), x, jnp.ones_like(x)
  )[""]
  assert form.dtype == jnp.float32
  assert form == 2049


def test_an_unknown_mode_is_named():
  with pytest.raises(ValueError, match="mode must be one of.*got 'sideways'"):
    hessian.hvp(jnp.sum, jnp.ones(2), jnp.ones(2), mode="sideways")


@pytest.mark.parametrize("mode", hessian.MODES)
@pytest.mark.parametrize(
  ("change", "message"),
  [
    (
      {"kernel": jnp.ones((3, 2))},
      r"v/a/kernel must be float32.*got float32 \(3, 2\)",
    ),
    (
      {"kernel": jnp.ones((2, 3), jnp.int32)},
      r"v/a/kernel must be float32 \(2, 3\), got int32 \(2, 3\)",
    ),
    ({"kernel": None}, r"v/a/kernel must be float32 \(2, 3\), but is missing"),
    ({"scale": jnp.ones(3)}, "v/a/scale is not in params, which has a/bias,"),
  ],
)
def test_a_vector_that_does_not_fit_raises_an_error_that_names_the_leaf(
  mode, change, message
):
  params = {"a": {"bias": jnp.ones(3), "kernel": jnp.ones((2, 3))}}
  v = {"a": {**params["a"], **change}}
  with pytest.raises(ValueError, match=message):
    hessian.hvp(lambda p: p["a"]["kernel"].sum(), params, v, mode=mode)


def test_a_vector_in_another_container_raises_an_error():
  params = [jnp.ones(3)]
  with pytest.raises(
    ValueError, match=r"v must have the structure.*got PyTreeDef\(\(\*,\)\)"
  ):
    hessian.hvp(lambda p: p[0].sum(), params, (jnp.ones(3),))


def test_leaves_of_the_same_path_raise_an_error():
  params = {"a/b": jnp.ones(3), "a": {"b": jnp.ones(3)}}
  with pytest.raises(ValueError, match="a/b: two leaves"):
    hessian.hvp(lambda p: p["a/b"].sum(), params, params)


def golden_net(arrays):
  """The network of hessian.npz: loss(params, batch), params, batch."""
  params = {}
  for name, size in zip(
    arrays["mlp/param_names"], arrays["mlp/param_sizes"], strict=True
  ):
    layer, kind = name.split(".")
    kind = {"weight": "kernel"}.get(kind, kind)
    value = arrays[f"mlp/torch/{name}"].T  # (out, in) to (in, out)
    assert value.size == size
    params.setdefault(layer, {})[kind] = jnp.asarray(value)
  batch = {
    "image": jnp.asarray(arrays["inputs_nhw"], jnp.float64).reshape(256, 64),
    "label": jnp.asarray(arrays["labels"]),
  }

  def logits(params, batch):
    x = batch["image"]
    for layer in ("dense1", "dense2", "dense3"):
      p = params[layer]
      x = x @ p["kernel"] + p["bias"][None]
      x = x if layer == "dense3" else jnp.tanh(x)
    return x

  def loss(params, batch):
    return cross_entropy(logits(params, batch), batch["label"])

  return logits, loss, params, batch


def from_torch(arrays, flat):
  """A flat vector in torch's order and layout, as a tree like params."""
  tree, sizes = {}, arrays["mlp/param_sizes"]
  parts = np.split(flat.astype(np.float64), np.cumsum(sizes)[:-1])
  for name, part in zip(arrays["mlp/param_names"], parts, strict=True):
    layer, kind = name.split(".")
    part = part.reshape(arrays[f"mlp/torch/{name}"].shape).T
    kind = {"weight": "kernel"}.get(kind, kind)
    tree.setdefault(layer, {})[kind] = jnp.asarray(part)
  return tree


def assert_trees_close(tree, expected, tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance
    ),
    tree,
    expected,
  )


def test_products_match_pytorch_in_double_precision(golden, double):
  arrays = golden("hessian.npz")
  logits, loss, params, batch = golden_net(arrays)
  # Two programs of one float64 computation; all numbers are about 1.
  np.testing.assert_allclose(
    logits(params, batch)[:4], arrays["mlp/logits_first4"], rtol=1e-12
  )
  value, gradient = jax.value_and_grad(loss)(params, batch)
  np.testing.assert_allclose(value, arrays["mlp/loss"], rtol=1e-12)
  assert_trees_close(
    gradient, from_torch(arrays, arrays["mlp/grad_flat"]), 1e-12
  )
  v = from_torch(arrays, arrays["mlp/hvp_v"])
  expected = from_torch(arrays, arrays["mlp/hvp_Hv"])
  for mode in hessian.MODES:
    product = hessian.hvp(loss, params, v, batch, mode=mode)
    assert_trees_close(product, expected, 1e-9)


def test_quadratic_forms_match_pytorch_probe_by_probe(golden, double):
  arrays = golden("hessian.npz")
  _, loss, params, batch = golden_net(arrays)
  names = [
    name.replace(".", "/").replace("weight", "kernel")
    for name in arrays["mlp/param_names"]
  ]
  for mode in hessian.MODES:
    forms = jax.jit(functools.partial(hessian.quadratic_forms, loss, mode=mode))
    for number in range(PROBES):
      v = from_torch(arrays, arrays["mlp/probe_signs"][number])
      found = forms(params, v, batch)
      assert set(found) == set(names)
      np.testing.assert_allclose(
        [found[name] for name in names],
        arrays["mlp/probe_quad_block"][number],
        rtol=1e-9,
      )
