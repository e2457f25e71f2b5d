"""The state of a run: configuration, directory, data, devices, networks.

It neither trains (`training`) nor scores (`scoring`). Training is spread over
all processes and devices (`runtime.sharding`, `runtime.processes`); the first
process does everything else, on its own devices.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dr_jax import data, models, nn, train
from dr_jax.config import Config, ConfigError, prefixed, quantizers
from dr_jax.interop import torch
from dr_jax.pipeline.workdir import Workdir
from dr_jax.runtime import processes, sharding, tree
from dr_jax.runtime.sinks import Sink

Batch = dict[str, Any]


class RunContext:
  """What the stages of one run share.

  Attributes:
    config, workdir, bits: the configuration, the directory and the candidate
      bit-widths.
    weight, activation: the quantizers of `config.quant`.
    start: a trained float network that replaces the stage pretrain, or None.
    profile: how many steps of each training stage are profiled.
    sinks: where the numbers in metrics.jsonl go as well.
    data: training and test sets, without `held_out`, which only searches
      and validations see.
    layout: devices of training; `local`: those of this process, for the rest.
    interrupted: returns the name of a signal that this process received, or
      None; `agreed`: that of a signal that any process received. All processes
      must call `agreed` together.
    shape: the float network as `nn.functional`, with shapes for arrays.
    networks: networks by stage, once trained or restored.
    results: results of the stages so far, by name and in order.
  """

  def __init__(
    self,
    config: Config,
    workdir: str | os.PathLike,
    interrupted: Callable[[], str | None] = lambda: None,
    *,
    start: nnx.Module | None = None,
    profile: int = 0,
    sinks: Sequence[Sink] = (),
  ):
    """Builds the values that the configuration describes; writes nothing.

    Raises:
      ConfigError: if the configuration does not fit the data, the devices or
        the model.
      ValueError: from the library, for values that only it can check.
    """
    self.config = config
    self.start, self.profile, self.sinks = start, profile, sinks
    self.workdir = Workdir(workdir, config.quant.bits)
    self.interrupted = interrupted
    self.agreed = processes.agreed(interrupted)
    self.layout, self.local = _layouts(config)
    try:
      self.data, self.held_out = _datasets(config)
      _check_size(config, self.data)
      _check_task(config, self.data)
      self.sample = self.batches()[0]["image"]
    except ValueError as error:
      raise prefixed("data", error) from error
    self.bits = config.quant.bits
    self.weight, self.activation = quantizers(config.quant)
    _check_backend(config.quant.backend, self.weight, self.activation)
    self.networks: dict[str, nnx.Module] = {}
    self.results: dict[str, dict[str, Any]] = {}
    try:
      self.shape = nn.functional(nnx.eval_shape(self.model))
    except ValueError as error:
      raise ConfigError(f"model.options: {error}") from None
    _check_memory("model.options", "its parameters", self.float_bytes())

  def model(self) -> nnx.Module:
    """The float network with random parameters."""
    rngs = nnx.Rngs(self.config.seed)
    return models.build(
      self.config.model.name, rngs=rngs, **self.model_options()
    )

  def zeros(self) -> nnx.Module:
    """The float network with zeros for parameters.

    What depends on shapes alone takes a second with it, instead of ten.
    """
    graph, shapes = nnx.split(nnx.eval_shape(self.model))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return nnx.merge(graph, zeros)

  def model_options(self) -> dict[str, Any]:
    """Keyword arguments of `models.build`, with those that the data imply."""
    taken = models.options_of(self.config.model.name)
    implied = self.data.model_options.items()
    return {
      **self.config.model.options,
      "dtype": self.config.model.dtype,
      **{name: value for name, value in implied if name in taken},
    }

  def untrained(self) -> nnx.Module:
    """The float network before any training: random, or with given weights."""
    model, path = self.model(), self.config.model.weights
    if path and self.start is None:
      try:
        torch.load_weights(model, path)
      except ValueError as error:
        raise ConfigError(f"model.{error}") from None
    return model

  def float_bytes(self) -> int:
    """Bytes of the float network's parameters."""
    return tree.array_bytes(self.shape.params)

  def batches(self, shard: int = 0, shards: int = 1) -> Any:
    """Training batches by step, or one shard of each; whole by default."""
    return data.batches(
      self.data.train,
      batch_size=self.config.data.batch_size,
      seed=self.config.seed,
      process_index=shard,
      process_count=shards,
      workers=self.config.data.workers,
    )

  def epoch(self, source: Any, *, batch_size: int = 512) -> Any:
    """All examples, in batches that divide among this process's devices.

    A batch has at most 2^16 labels, if an example has not more.
    """
    count = self.local.data
    most = max(2**16 // self.data.labels, 1)
    size = min(len(source), batch_size, most)
    return data.epoch(
      source,
      batch_size=-(-size // count) * count,
      workers=self.config.data.workers,
    )

  def spread(self, batch: Batch) -> Batch:
    """A batch sharded over this process's devices, if it divides among them."""
    fits = len(batch["label"]) % self.local.data == 0
    return self.local.shard_batch(batch) if fits else batch

  def stop_if_asked(self, stage: str) -> None:
    """Raises train.InterruptedRun if this process received a signal."""
    name = self.interrupted()
    if name:
      raise train.InterruptedRun(f"{stage}: stopped by {name}", name)


def _check_backend(name, weight, activation):
  """Before anything is trained: whether quantized layers can compute so."""
  if name == "float":
    return
  layer = nn.quantize(
    nnx.Linear(2, 2, rngs=nnx.Rngs(0)),
    weight=weight,
    activation=activation,
    sample=np.ones((1, 2), np.float32),
    skip=(),
  )
  try:
    nn.set_backend(layer, name)
  except ValueError as error:
    raise ConfigError(f"quant.{error}") from None


def _datasets(config):
  """The data set without its held-out part, and that part or None."""
  options = dataclasses.asdict(config.data)
  for name in ("batch_size", "holdout", "workers"):
    options.pop(name)
  dataset = data.load(**options)
  if not config.data.holdout:
    return dataset, None
  kept, held_out = data.hold_out(dataset.train, config.data.holdout)
  return dataset._replace(train=kept), held_out


def _check_size(config, dataset):
  """Counts of steps fit an int32, and a batch fits in memory."""
  batch = 4 * config.data.batch_size * math.prod(dataset.shape)
  _check_memory("data.batch_size", "its inputs", batch)
  for name in ("pretrain", "train", "supernet"):
    epochs = getattr(config, name).epochs
    steps = epochs * len(dataset.train) // config.data.batch_size
    if steps >= 2**31:
      raise ConfigError(
        f"{name}.epochs must make less than 2^31 steps, got {epochs}, which "
        f"makes {steps:,}"
      )


def _check_task(config, dataset):
  """Whether the network can do what the data are for."""
  known = models.TASKS[dataset.task]
  if config.model.name not in known:
    raise ConfigError(
      f"model.name must be one of {', '.join(known)} with data.name="
      f"{config.data.name!r}, got {config.model.name!r}"
    )


def _check_memory(field, what, size):
  memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
  if size > memory:
    raise ConfigError(
      f"{field} must be such that {what} fit in {memory / 2**30:,.1f} GiB of "
      f"memory, got {size / 2**30:,.1f} GiB"
    )


def _layouts(config):
  """The layout of training, and that of this process's devices alone."""
  try:
    layout = sharding.layout(**dataclasses.asdict(config.devices))
  except ValueError as error:
    raise prefixed("devices", error) from None
  # The mesh's size: a stage may have all devices along the axis "data".
  if config.data.batch_size % layout.mesh.size:
    raise ConfigError(
      "data.batch_size must be a multiple of "
      f"{layout.mesh.size}, the number of devices (see devices.data), got "
      f"{config.data.batch_size}"
    )
  mine = jax.process_index()
  local = [d for d in layout.mesh.devices.flat if d.process_index == mine]
  return layout, sharding.layout(devices=local)
