"""Update directions: an optax optimizer, split by what a parameter is.

Kernels and biases have a plain optimizer. Learned quantization parameters and
rows of switchable norms belong to single bit-widths, so that only some of them
are in use at a time: there every number has its own optimizer, which
rests while the number is not used, as separate parameters would in PyTorch.
Weight decay acts on kernels only.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

NAMES = ("adam", "adamw", "sgd")


def make_optimizer(
  name: str,
  *,
  param_labels: Any,
  weight_decay: float = 0.0,
  momentum: float = 0.9,
) -> optax.GradientTransformation:
  """Builds the optimizer of a network; the learning rate is applied outside.

  Args:
    name: "adam" (L2 decay added to the gradient, as torch.optim.Adam), "adamw"
      (decay added to the direction, arXiv 1711.05101), or "sgd".
    param_labels: what each parameter is; `nn.Functional.param_labels`.
    weight_decay: factor on the kernels.
    momentum: of SGD, 0 for none; Adam's moments are 0.9 and 0.999.

  Returns:
    A transformation of gradients to directions: the update is minus the
    learning rate times the direction.

  Raises:
    ValueError: for an unknown name.
  """
  if name in ("adam", "adamw"):
    inner = optax.scale_by_adam()
  elif name == "sgd":
    inner = optax.trace(momentum) if momentum else optax.identity()
  else:
    raise ValueError(f"optimizer must be one of {NAMES}, got {name!r}")
  decay = optax.add_decayed_weights(weight_decay)
  decayed = (inner, decay) if name == "adamw" else (decay, inner)
  transforms = {
    "weight": optax.chain(*decayed),
    "vector": inner,
    "norm": elementwise(inner),
    "scale": elementwise(inner),
    "offset": elementwise(inner),
  }
  present = set(jax.tree.leaves(param_labels))
  return optax.partition({k: transforms[k] for k in present}, param_labels)


def cosine_schedule(
  peak: float, steps: int, *, warmup: float = 0.0
) -> optax.Schedule:
  """Returns a learning rate that falls to zero as a cosine.

  Args:
    peak: the highest.
    steps: length of the run.
    warmup: fraction of the steps, rounded to whole ones, in which it rises to
      the peak.

  >>> rate = cosine_schedule(1.0, 10, warmup=0.2)
  >>> [round(float(rate(step)), 2) for step in (0, 1, 2, 6, 10)]
  [0.5, 0.75, 1.0, 0.5, 0.0]
  """
  rising = round(warmup * steps)
  if not rising:
    return optax.cosine_decay_schedule(peak, steps)
  return optax.warmup_cosine_decay_schedule(peak / rising, peak, rising, steps)


def elementwise(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformation:
  """Gives every number its own optimizer; it steps only where gradient != 0.

  Where all gradients are nonzero this equals `inner`.
  """

  def init(params: optax.Params) -> optax.OptState:
    return jax.vmap(inner.init)(ravel_pytree(params)[0])

  def update(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, optax.OptState]:
    flat, unravel = ravel_pytree(updates)
    values = None if params is None else ravel_pytree(params)[0]
    direction, stepped = jax.vmap(inner.update)(flat, state, values)
    used = flat != 0
    keep = lambda new, old: jnp.where(used, new, old)  # noqa: E731
    state = jax.tree.map(keep, stepped, state)
    return unravel(keep(direction, jnp.zeros_like(flat))), state

  return optax.GradientTransformation(init, update)
