"""Stage hessian: traces of the float network's Hessian, one per layer.

arXiv 2502.01199, section 3.3.
"""

from __future__ import annotations

import time
import warnings

import jax

from dr_jax import data, hessian, nn, train
from dr_jax.config import ConfigError
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.multi_precision import multi_precision_network
from dr_jax.pipeline.stages.pretrain import float_network
from dr_jax.pipeline.stages.stage import Stage
from dr_jax.pipeline.work import HESSIAN, Work
from dr_jax.runtime import compilation, tree

Traces = dict[str, hessian.TraceEstimate]


def traces(run: RunContext) -> Traces:
  """Traces by layer name: read if the stage is done, else estimated.

  Raises:
    ConfigError: if the file is damaged, or has traces of other layers or of
      another float network.
  """
  network = nn.functional(float_network(run))
  fingerprint = tree.fingerprint((network.params, network.batch_stats))
  path = run.workdir.path / STAGE.name / "traces.json"
  kernels = nn.kernel_paths(multi_precision_network(run))
  if path.exists() and run.workdir.result(STAGE.name) is not None:
    return _load(path, fingerprint, list(kernels))
  started = time.monotonic()
  estimates = _estimate(run, network, kernels)
  _warn_of_uncertain(estimates, run.config.hessian)
  path.parent.mkdir(parents=True, exist_ok=True)
  hessian.save(path, estimates, fingerprint=fingerprint)
  run.workdir.finish(
    STAGE.name,
    started,
    traces={name: e._asdict() for name, e in estimates.items()},
    sensitivity=_per_parameter(run, estimates),
  )
  return estimates


def sensitivity(run: RunContext) -> dict[str, float]:
  """Trace per parameter of every layer, by name; see `hessian.sensitivity`."""
  return _per_parameter(run, traces(run))


def _per_parameter(run, estimates):
  table = nn.layer_table(multi_precision_network(run))
  parameters = {row.name: row.parameters for row in table}
  return hessian.sensitivity(estimates, parameters)


def _load(path, fingerprint, layers):
  try:
    estimates = hessian.load(path, fingerprint=fingerprint)
  except ValueError as error:
    raise ConfigError(f"{error}; delete it and run again") from None
  if list(estimates) != layers:
    raise ConfigError(
      f"{path} must have traces of layers {layers}, got {list(estimates)}"
    )
  return estimates


def _estimate(run, network, kernels):
  config = run.config.hessian

  def loss(state, batch):
    logits, _ = network.apply(
      state["params"], state["batch_stats"], 0, batch["image"]
    )
    return train.cross_entropy(logits, batch["label"])

  names = {name: f"params/{path}" for name, path in kernels.items()}
  estimates = hessian.trace(
    loss,
    {"params": network.params, "batch_stats": network.batch_stats},
    jax.random.key(run.config.seed),
    _batches(run),
    select=list(names.values()),
    rel_stderr=config.rel_stderr,
    min_probes=config.min_probes,
    max_probes=config.max_probes,
    jit=compilation.jit,
    on_probe=lambda *_: run.stop_if_asked(STAGE.name),
  )
  return {layer: estimates[path] for layer, path in names.items()}


def _work(run, table):
  del table
  config = run.config.hessian
  least, most = config.min_probes, config.max_probes
  return [Work(STAGE.name, "probes", least, most, _images(run), HESSIAN)]


def _images(run):
  return min(run.config.hessian.images, len(run.data.train))


def _batches(run):
  config, count = run.config.hessian, _images(run)
  images = data.batches(run.data.train, batch_size=count, seed=run.config.seed)
  whole = images[0]
  return [
    run.spread(
      {
        name: array[start : start + config.batch_size]
        for name, array in whole.items()
      }
    )
    for start in range(0, count, config.batch_size)
  ]


def _warn_of_uncertain(estimates, config):
  uncertain = [
    f"{name} ({e.mean:.3g} +- {e.stderr:.2g})"
    for name, e in estimates.items()
    if e.stderr > config.rel_stderr * abs(e.mean)
  ]
  if uncertain:
    warnings.warn(
      f"hessian: after max_probes={config.max_probes} the relative standard "
      f"error is above rel_stderr={config.rel_stderr:g} at "
      f"{', '.join(uncertain)}",
      stacklevel=3,
    )


STAGE = Stage(
  name="hessian",
  help="estimate the trace of the float network's Hessian for every layer",
  run=traces,
  needs=("pretrain", "multi_precision"),
  work=_work,
  single_process=True,
)
