"""The stages of a run, each resumable and skipped when done.

  pretrain         the float network
  multi_precision  joint quantization-aware training of all bit-widths
  separate         one LSQ run per bit-width, for comparison
  export           the integer artifact, and its accuracy read back from disk
  report           the table, and summary.json

A stage is done when its `result.json` is there; until then its checkpoints
say where it stands.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import importlib.metadata
import json
import os
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx

from dr_jax import data, deploy, models, nn, quant, train
from dr_jax.checkpoint import Checkpoints
from dr_jax.config import Config, ConfigError, TrainConfig
from dr_jax.metrics import MetricsWriter


def run(
  config: Config,
  workdir: str | os.PathLike,
  *,
  interrupted: Callable[[], str | None] = lambda: None,
) -> dict[str, Any]:
  """Runs the stages that a configuration names, in order.

  Args:
    config: what to run.
    workdir: directory of this run; the same configuration goes on where it
      stopped.
    interrupted: returns the name of a signal that asks to stop, else None.

  Returns:
    The summary: what summary.json holds.

  Raises:
    ConfigError: if the configuration does not fit the data, or the directory
      belongs to another configuration; nothing is overwritten.
    ValueError: from the library, for values that are not allowed.
    train.NonFiniteError, train.InterruptedRun: see `train.Loop`.
  """
  job = Run(config, pathlib.Path(workdir), interrupted)
  job.claim()
  with job.alone():
    for stage in config.stages:
      getattr(job, stage)()
    return job.summary()


class Run:
  """One run: its configuration, directory, data and stages."""

  def __init__(self, config, workdir, interrupted):
    self.config = config
    self.workdir = workdir
    self.interrupted = interrupted
    self.data = data.load(config.data.name)
    self.trained: dict[str, nnx.Module] = {}
    # Before anything is written: values that only the library can judge.
    self._batches(config.seed)
    self._model()
    self.bits = quant.check_bits(config.quant.bits)
    self._quantizers(self.bits)
    for name in ("pretrain", "train"):
      recipe = getattr(config, name)
      try:
        train.resolve_vectorize(recipe.vectorize, recipe.schedule)
      except ValueError as error:
        raise ConfigError(f"{name}.{error}") from None

  def claim(self) -> None:
    """Writes config.json, or checks that it is this run's."""
    path = self.workdir / "config.json"
    mine = json.loads(json.dumps(dataclasses.asdict(self.config)))
    if path.exists():
      try:
        theirs = json.loads(path.read_text())
      except ValueError:
        raise ConfigError(
          f"{path}: damaged, no JSON; allowed is a new directory"
        ) from None
      if theirs != mine:
        raise ConfigError(
          f"workdir={self.workdir}: holds another configuration "
          f"({_first_difference(theirs, mine)}); allowed is a new directory, "
          "or the same configuration"
        )
      return
    draft = _draft(path)
    if any(p != draft for p in _entries(self.workdir)):
      raise ConfigError(
        f"workdir={self.workdir}: is not empty and holds no run; allowed is a "
        "new or empty directory"
      )
    self.workdir.mkdir(parents=True, exist_ok=True)
    _write_json(path, mine)

  @contextlib.contextmanager
  def alone(self):
    """Keeps other processes out of the directory; a kill lets them in."""
    with (self.workdir / "lock").open("w") as file:
      try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
      except OSError:
        raise ConfigError(
          f"workdir={self.workdir}: another process is at work in it; allowed "
          "is one at a time"
        ) from None
      yield

  def pretrain(self) -> None:
    """Trains the float network."""
    if self._result("pretrain") is None:
      self._float()

  def multi_precision(self) -> None:
    """Trains one network at all bit-widths jointly, from the float one."""
    if self._result("multi_precision") is None:
      weight, activation = self._quantizers(self.bits)
      self._quantized("multi_precision", weight, activation, self.config.train)

  def separate(self) -> None:
    """Trains one LSQ network per bit-width with the same recipe."""
    recipe = dataclasses.replace(self.config.train, alrs="none")
    for bits in self.bits:
      stage = f"separate/{bits}"
      if self._result(stage) is None:
        weight = quant.lsq((bits,))
        self._quantized(stage, weight, quant.lsq_activation((bits,)), recipe)

  def export(self) -> None:
    """Writes the artifact and evaluates it, read back from disk."""
    path = self.workdir / "export" / "model"
    done = self._result("export")
    if done is not None:
      deploy.read(path)
      return
    started = time.monotonic()
    weight, activation = self._quantizers(self.bits)
    network = self._quantized(
      "multi_precision", weight, activation, self.config.train
    )
    architecture = (self.config.model.name, self._model_options())
    if not path.exists():
      deploy.save(path, network, architecture=architecture)
    scores = self._scores(deploy.load(path), self.bits)
    trained = self._result("multi_precision")["scores"]
    if scores != trained:
      raise deploy.ArtifactError(
        f"{path}: scores {scores}, but the trained network {trained}"
      )
    self._finish(
      "export",
      scores,
      started,
      bytes_at={str(b): n for b, n in deploy.sizes(path).items()},
      stored_bytes=sum(file.stat().st_size for file in path.iterdir()),
      float_bytes=sum(
        leaf.nbytes
        for leaf in jax.tree.leaves(nn.functional(self._model()).params)
      ),
    )

  def report(self) -> None:
    """Writes summary.json."""
    _write_json(self.workdir / "summary.json", self.summary())

  def summary(self) -> dict[str, Any]:
    """What has been reached so far, by stage, and the environment."""
    stages = ["pretrain", "multi_precision", "export"]
    stages += [f"separate/{bits}" for bits in self.bits]
    results = {stage: self._result(stage) for stage in stages}
    return {
      "name": self.config.name,
      "bits": self.bits,
      "stages": {s: r for s, r in results.items() if r is not None},
      "environment": environment(),
    }

  def _float(self):
    """The float network, trained if there is such a stage."""
    if "pretrain" not in self.config.stages:
      return self._model()
    if "pretrain" not in self.trained:
      model = self._model()
      self._train("pretrain", model, (None,), self.config.pretrain)
      self.trained["pretrain"] = model
    return self.trained["pretrain"]

  def _quantized(self, stage, weight, activation, recipe):
    """A quantized network, trained; restored if its stage is done."""
    if stage in self.trained:
      return self.trained[stage]
    sample = self._batches(self.config.seed)[0]["image"]
    network = nn.quantize(
      self._float(),
      weight=weight,
      activation=activation,
      sample=sample,
      norm=self.config.quant.norm,
    )
    self._train(stage, network, weight.bits, recipe)
    self.trained[stage] = network
    return network

  def _train(self, stage, model, bits, recipe: TrainConfig):
    """Trains a model in place to the end of its stage, from where it is."""
    started = time.monotonic()
    network = nn.functional(model)
    optimizer = train.make_optimizer(
      recipe.optimizer,
      kinds=network.kinds,
      weight_decay=recipe.weight_decay,
      momentum=recipe.momentum,
    )
    batch_size = self.config.data.batch_size
    steps = max(recipe.epochs * len(self.data.train) // batch_size, 1)
    state = train.init_state(
      network, optimizer, jax.random.key(self.config.seed)
    )
    directory = self.workdir / stage / "checkpoints"
    with (
      Checkpoints(directory) as checkpoints,
      MetricsWriter(self.workdir / "metrics.jsonl") as metrics,
    ):
      if checkpoints.latest() is not None:
        state = checkpoints.restore(like=state)
      if int(state.step) < steps:
        metrics.resume(stage, int(state.step))
        loop = train.Loop(
          stage=stage,
          steps=steps,
          bits=bits,
          step=train.make_step(
            network,
            tuple(32 if b is None else b for b in bits),
            optimizer,
            optax.cosine_decay_schedule(recipe.learning_rate, steps),
            schedule=recipe.schedule,
            vectorize=recipe.vectorize,
            alrs=recipe.alrs,
          ),
          batches=self._batches(self.config.seed),
          checkpoints=checkpoints,
          metrics=metrics,
          checkpoint_every=self.config.checkpoint_every,
          log_every=self.config.log_every,
          interrupted=self.interrupted,
        )
        state = loop.run(state)
      nn.update(model, params=state.params, batch_stats=state.batch_stats)
      if self._result(stage) is None:
        scores = self._scores(self._served(model), bits)
        # A process killed right here has written some of them already.
        metrics.resume(stage, steps, names=("loss", "images_per_second"))
        for key, score in scores.items():
          named = {f"test_{name}": value for name, value in score.items()}
          metrics.write(stage, steps, named, bits=_bits_or_none(key))
        self._finish(stage, scores, started)

  def _served(self, model):
    """A quantized network as it is deployed; a float one as it is.

    Folding norms before the program, and not inside, moves last bits that
    rounding to codes can amplify: what is scored is what will be served.
    """
    if not nn.layer_table(model):
      return model
    return nn.thaw(self._model(), nn.freeze(model))

  def _scores(self, model, bits):
    """{bit-width: {"accuracy": percent, "loss": cross-entropy}} on test."""
    network = nn.functional(model)
    evaluate = train.make_evaluate(network)
    size = min(len(self.data.test), 512)
    scores = {}
    for index, b in enumerate(bits):
      batches = data.epoch(self.data.test, batch_size=size)
      score = evaluate(network.params, network.batch_stats, index, batches)
      scores["float" if b is None else str(b)] = score._asdict()
    return scores

  def _batches(self, seed):
    batch_size = self.config.data.batch_size
    return data.batches(self.data.train, batch_size=batch_size, seed=seed)

  def _model(self):
    rngs = nnx.Rngs(self.config.seed)
    options = self._model_options()
    return models.build(self.config.model.name, rngs=rngs, **options)

  def _model_options(self):
    return {
      **self.config.model.options,
      "num_classes": self.data.num_classes,
      "channels": self.data.image_shape[-1],
    }

  def _quantizers(self, bits):
    config = self.config.quant
    chosen = {k: v for k, v in config.weight_options.items() if v is not None}
    try:
      weight = quant.get(config.weight, bits=bits, **chosen)
    except ValueError as error:
      raise ConfigError(f"quant.weight_options: {error}") from None
    activation = quant.get(config.activation, bits=bits)
    for field, quantizer, role in (
      ("weight", weight, quant.WeightQuantizer),
      ("activation", activation, quant.ActivationQuantizer),
    ):
      if not isinstance(quantizer, role):
        raise ConfigError(
          f"quant.{field}={quantizer.name!r}: is a "
          f"{type(quantizer).__name__}; allowed is a {role.__name__}"
        )
    return weight, activation

  def _result(self, stage):
    path = self.workdir / stage / "result.json"
    return json.loads(path.read_text()) if path.exists() else None

  def _finish(self, stage, scores, started, **more):
    seconds = round(time.monotonic() - started, 1)
    result = {"scores": scores, "seconds": seconds, **more}
    _write_json(self.workdir / stage / "result.json", result)


def environment() -> dict[str, str]:
  """Versions and device of this process."""
  packages = ("dr_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint")
  versions = {}
  for package in packages:
    try:
      versions[package] = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
      versions[package] = "not installed"
  return {
    "python": platform.python_version(),
    "numpy": np.__version__,
    **versions,
    "device": jax.devices()[0].device_kind,
    "backend": jax.default_backend(),
    "cpus": str(os.cpu_count()),
  }


def _bits_or_none(key):
  return None if key == "float" else int(key)


def _write_json(path, value):
  """Writes a file that is complete or absent."""
  path.parent.mkdir(parents=True, exist_ok=True)
  draft = _draft(path)
  draft.write_text(json.dumps(value, indent=2) + "\n")
  draft.replace(path)


def _draft(path):
  return path.with_name(path.name + ".partial")


def _entries(directory):
  return directory.iterdir() if directory.is_dir() else ()


def _first_difference(theirs, mine, prefix=""):
  for key in [*mine, *theirs]:
    a, b = theirs.get(key), mine.get(key)
    if isinstance(a, dict) and isinstance(b, dict) and a != b:
      return _first_difference(a, b, f"{prefix}{key}.")
    if a != b:
      return f"{prefix}{key} is {a!r} there, {b!r} here"
  return "they differ"
