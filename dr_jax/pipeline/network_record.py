"""Measures what report/network.json says; see `report.network_record`."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax import nn, train
from dr_jax.nn.bits import arrays_of
from dr_jax.nn.kernels import computed_kernels
from dr_jax.nn.quantized import layer_rows
from dr_jax.pipeline.context import RunContext
from dr_jax.runtime.compilation import jit

# A picture takes no whole batch, whose gradients may not fit on one device.
_EXAMPLES = 64
_BINS = 64


def measure(run: RunContext, stage: str, model: nnx.Module) -> dict[str, Any]:
  """Returns the record of a trained network.

  Args:
    run: the run.
    stage: that trained it.
    model: quantized, with float kernels; not changed.
  """
  kernels = computed_kernels(model)
  return {
    "stage": stage,
    "gradients": _scale_gradients(run, model),
    "weights": {
      row.name: _histograms(row, kernels[id(row.layer)])
      for row in layer_rows(model)
    },
  }


def _scale_gradients(run, model):
  """Largest |gradient| of every scale at every bit-width, on one batch."""
  network = nn.functional(model)
  batch = jax.tree.map(lambda a: a[:_EXAMPLES], run.batches()[0])
  leaves, treedef = jax.tree_util.tree_flatten_with_path(network.params)
  labels = jax.tree.leaves(network.param_labels)
  places = [n for n, label in enumerate(labels) if label == "scale"]

  def loss(scales, params, batch_stats, index, batch):
    arrays = list(params)
    for place, scale in zip(places, scales, strict=True):
      arrays[place] = scale
    logits, _ = network.apply(
      treedef.unflatten(arrays), batch_stats, index, batch["image"], train=True
    )
    return train.cross_entropy(logits, batch["label"])

  @jit
  def sizes(scales, *others):
    return [jnp.abs(g).max() for g in jax.grad(loss)(scales, *others)]

  arrays = [leaf for _, leaf in leaves]
  scales = [arrays[place] for place in places]
  by_bits = {
    str(b): sizes(scales, arrays, network.batch_stats, jnp.int32(i), batch)
    for i, b in enumerate(run.bits)
    if scales
  }
  return {
    "examples": len(batch["label"]),
    "scales": [
      _named(leaves[place][0])
      | {"gradient": _finite({b: s[n] for b, s in by_bits.items()})}
      for n, place in enumerate(places)
    ],
  }


def _named(path):
  """The layer of a scale, and what it scales."""
  *layer, params, _ = (key.key for key in path)
  of = "weight" if params == "weight_params" else "input"
  return {"layer": "/".join(layer), "of": of}


def _finite(sizes):
  return {b: float(s) for b, s in sizes.items() if np.isfinite(s)}


def _histograms(row, kernel):
  """A histogram of a layer's weights, and the grid, at every bit-width."""
  quantizer, at = row.layer.weight_quantizer, row.position
  params = {k: a[at] for k, a in arrays_of(row.layer.weight_params).items()}
  w = kernel[at]
  quantized = [np.asarray(q) for q in _quantized(quantizer, params, w)]
  w, scale = np.asarray(w), np.asarray(params.get("scale", 1.0))
  # A method may normalize weights: then these are what it rounds.
  shown = w if _are_near(w, quantized[0]) else quantized[0]
  # Some have a scale per bit-width, as the first axis.
  units = scale if scale.ndim > w.ndim else [scale] * len(quantized)
  return {
    str(b): _histogram(shown / unit, values / unit, b)
    for b, values, unit in zip(quantizer.bits, quantized, units, strict=True)
  }


@functools.partial(jax.jit, static_argnums=0)
def _quantized(quantizer, params, w):
  positions = range(len(quantizer.bits))
  return [quantizer.fake_quantize(params, w, i) for i in positions]


def _are_near(w, quantized):
  return np.square(w - quantized).mean() < np.square(w).mean() / 4


def _histogram(weights, values, bits):
  levels = np.unique(np.round(values, 4))
  if len(levels) > 2**bits + 1:  # Of channels with different grids.
    levels = levels[:0]
  ends = np.concatenate([weights.ravel(), levels])
  low, high = float(ends.min()), float(ends.max())
  counts, _ = np.histogram(weights, _BINS, (low, high))
  return {
    "low": low,
    "high": high,
    "counts": counts.tolist(),
    "levels": levels.tolist(),
  }
