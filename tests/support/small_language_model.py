"""The artifact of a small language model with a context of 16 bytes."""

import jax
import jax.numpy as jnp
from flax import nnx

from dr_jax import deploy, models, nn, quant

OPTIONS = {"context": 16, "width": 16, "depth": 1, "heads": 2, "kv_heads": 1}
BITS = (8, 4, 2)


def save(path, **changes):
  """Saves a network whose bit-widths make different texts.

  Args:
    path: of the artifact.
    **changes: to the options of the network.
  """
  options = OPTIONS | changes
  model = models.build("transformer", rngs=nnx.Rngs(0), **options)
  # Initial weights are so small that blocks change nothing.
  params = nnx.state(model, nnx.Param)
  nnx.update(model, jax.tree.map(lambda p: 10 * p, params))
  tokens = jax.random.randint(jax.random.key(0), (4, 16), 0, 32, jnp.int32)
  network = nn.quantize(
    model,
    # Codes of which fewer bits take fewer planes.
    weight=quant.double_rounding(BITS, rounding="half_up"),
    activation=quant.lsq_activation(BITS),
    sample=tokens,
  )
  deploy.save(path, network, architecture=("transformer", options))
