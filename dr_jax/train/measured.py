"""What a step measures: the loss of every pass, and numbers for the log.

The magnitudes that ALRS is about (arXiv 2502.01199, section 3.2) are logged as

  scale_gradient_norm = sqrt(sum over all scales of weights of gradient^2)

of each pass, before ALRS and before the optimizer: the gradient of the loss as
it is weighted for that pass. A norm and not a mean: where every bit-width has
scales of its own, those of others have a gradient of zero.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import optax

from dr_jax.nn import Functional

# What `logged_of` may return.
LOGGED = ("scale_gradient_norm",)


class Measured(NamedTuple):
  """Of one pass; of the passes of a step, [passes] instead of [].

  Attributes:
    loss: float32 [], unweighted.
    logged: {name in metrics.jsonl: float32 []}.
  """

  loss: jax.Array
  logged: dict[str, jax.Array]


def logged_of(network: Functional, gradients: Any) -> dict[str, jax.Array]:
  """Returns what is logged of a pass besides its loss.

  Args:
    network: what is trained.
    gradients: of its parameters.

  Returns:
    {"scale_gradient_norm": float32 []}; {} where weights have no learned scale.
  """
  labels = jax.tree.leaves(network.param_labels)
  scales = [
    leaf
    for (path, leaf), label in zip(
      jax.tree.leaves_with_path(gradients), labels, strict=True
    )
    if label == "scale" and path[-2].key == "weight_params"
  ]
  return {"scale_gradient_norm": optax.tree.norm(scales)} if scales else {}
