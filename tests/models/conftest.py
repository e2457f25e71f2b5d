"""What networks cost, counted from shapes."""

import math

import jax
import pytest
from flax import nnx


@pytest.fixture
def cost():
  """Returns `cost(build, size) -> (parameters, multiply-accumulates)`.

  No array is made: `build()` is only traced, and so is one RGB image.
  """

  def of(build, size):
    model = nnx.eval_shape(build)
    model.eval()
    graph, state = nnx.split(model)
    image = jax.ShapeDtypeStruct((1, size, size, 3), "float32")
    traced = jax.make_jaxpr(lambda s, x: nnx.merge(graph, s)(x))(state, image)
    params = jax.tree.leaves(nnx.state(model, nnx.Param))
    return sum(p.size for p in params), sum(map(_macs, traced.eqns))

  return of


def _macs(equation):
  if equation.primitive.name == "conv_general_dilated":
    kernel = equation.invars[1].aval
    out = equation.params["dimension_numbers"].rhs_spec[0]
    return equation.outvars[0].aval.size * kernel.size // kernel.shape[out]
  if equation.primitive.name == "dot_general":
    (axes, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return equation.outvars[0].aval.size * math.prod(shape[a] for a in axes)
  return 0
