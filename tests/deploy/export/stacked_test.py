"""Exports of a network with a stack of layers, as `nnx.scan` takes it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from jax import export

from dr_jax import deploy, nn, quant

BITS = (8, 4)
ASSIGNMENT = {"stack/0": 8, "stack/1": 4, "stack/2": 8, "head": 4}
IMAGES = np.asarray(jax.random.normal(jax.random.key(1), (4, 6)))


class Network(nnx.Module):
  def __init__(self):
    keys = jax.random.split(jax.random.key(0), 3)
    self.stack = nnx.vmap(lambda key: nnx.Linear(6, 6, rngs=nnx.Rngs(key)))(
      keys
    )
    self.head = nnx.Linear(6, 2, rngs=nnx.Rngs(1))

  def __call__(self, x):
    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def run(x, layer):
      return nnx.relu(layer(x))

    return self.head(run(x, self.stack))


@pytest.fixture(scope="module")
def network(tmp_path_factory):
  path = tmp_path_factory.mktemp("stacked") / "model"
  model = Network()
  network = nn.quantize(
    model,
    weight=quant.double_rounding(BITS),
    activation=quant.lsq_activation(BITS),
    sample=IMAGES,
    skip=(),
  )
  deploy.save(path, network)
  return deploy.load(path, model=model)


def test_a_program_of_all_bits_takes_those_of_each_layer_of_a_stack(
  network, tmp_path
):
  deploy.export_stablehlo(tmp_path / "program", network, IMAGES)
  data = (tmp_path / "program/program.jax_export").read_bytes()
  program = export.deserialize(bytearray(data))
  arrays = safetensors.numpy.load_file(tmp_path / "program/arrays.safetensors")
  outputs = []
  for bits in (8, 4, ASSIGNMENT):
    nn.set_bits(network, bits)
    given = ASSIGNMENT.values() if bits is ASSIGNMENT else [bits] * 4
    given = jnp.array(list(given), jnp.int32)
    outputs.append(jax.jit(program.call)(arrays, IMAGES, given))
    np.testing.assert_allclose(
      outputs[-1], network(IMAGES), rtol=1e-5, atol=1e-6
    )
  assert not np.array_equal(outputs[0], outputs[2])
  assert not np.array_equal(outputs[1], outputs[2])


def test_one_assignment_of_a_stack_is_refused_in_one_line(network, tmp_path):
  message = "layer stack must not be a stack of layers"
  with pytest.raises(ValueError, match=message):
    deploy.export_stablehlo(tmp_path / "program", network, IMAGES, bits=4)
  with pytest.raises(ValueError, match=message):
    deploy.export_onnx(tmp_path / "file.onnx", network, (6,), bits=4)
