"""What a run is made of: its data, devices, networks, training and scores.

Training is spread over all processes and devices (`sharding`, `processes`);
all else is done by the first process, on its own devices. A stage is done when
its `result.json` is there; until then its checkpoints say where it stands.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import time
import warnings

import jax
import optax
from flax import nnx

from dr_jax import data, models, nn, quant, train
from dr_jax.checkpoint.checkpoints import Checkpoints, disk_bytes
from dr_jax.config import ConfigError, QuantConfig, TrainConfig, quantizers
from dr_jax.pipeline.workdir import Workdir
from dr_jax.runtime import processes, sharding
from dr_jax.runtime.metrics import MetricsWriter

# Batches from which statistics of batch norm are estimated anew.
_RECALIBRATION = 10


class Run:
  """One run: its configuration, directory, data and networks.

  Attributes:
    config, workdir, bits: what is run, where, and the candidate bit-widths.
    data: without `held_out`, which searches alone see.
    layout: where training lives; `local` where this process does the rest.
    interrupted: names a signal that this process received, or None; `agreed`
      one that any process received, and all of them must ask.
    shape: the float network, without any numbers.
    trained: networks by stage, once trained or restored.
  """

  def __init__(self, config, workdir, interrupted, *, start=None):
    self.config = config
    self.start = start
    self.workdir = Workdir(workdir)
    self.interrupted = interrupted
    self.agreed = processes.agreed(interrupted)
    self.layout, self.local = _layouts(config)
    options = dataclasses.asdict(config.data)
    for name in ("batch_size", "holdout", "workers"):
      options.pop(name)
    self.data = data.load(**options)
    self.held_out = None
    if config.data.holdout:
      kept, self.held_out = data.hold_out(self.data.train, config.data.holdout)
      self.data = self.data._replace(train=kept)
    self.bits = config.quant.bits
    self.trained: dict[str, nnx.Module] = {}
    # Before anything is written: values that only the library can judge.
    self.batches(config.seed)
    quantizers(config.quant)
    try:
      self.shape = nn.functional(nnx.eval_shape(self._model))
    except ValueError as error:
      raise ConfigError(f"model.options: {error}") from None
    if config.model.weights:
      self.untrained()

  def check_space(self) -> None:
    """Checks the disk before hours of training fill it.

    An estimate from the float network, which lacks the scales and norms of
    every bit-width; each phase of training asks again for its own state.

    Raises:
      ConfigError: if its disk has too little room for the checkpoints of all
        stages and the artifact.
    """

    def checkpoints(recipe):
      def state(params, batch_stats):
        network = self.shape._replace(params=params, batch_stats=batch_stats)
        return train.init_state(
          network,
          train.make_optimizer(recipe.optimizer, kinds=network.kinds),
          jax.random.key(0),
          distillation=recipe.distillation,
          num_classes=self.data.num_classes,
        )

      # As many sets of them as the curriculum has phases.
      phases = train.CURRICULA[recipe.curriculum].phases
      shapes = jax.eval_shape(state, self.shape.params, self.shape.batch_stats)
      return len(phases) * disk_bytes(shapes)

    config = self.config
    sizes = {
      "pretrain": checkpoints(config.pretrain),
      "multi_precision": checkpoints(config.train),
      "separate": len(self.bits) * checkpoints(config.train),
      "supernet": checkpoints(config.supernet),
      # No more than the float network, and a manifest.
      "export": self.float_bytes() + 2**20,
    }
    self.workdir.check_space(
      {stage: sizes[stage] for stage in config.stages if stage in sizes}
    )

  def float_bytes(self) -> int:
    """Bytes of the float network's parameters."""
    leaves = jax.tree.leaves(self.shape.params)
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)

  def float_network(self) -> nnx.Module:
    """The float network, trained if there is such a stage."""
    if self.start is not None:
      return self.start
    if "pretrain" not in self.config.stages:
      return self.untrained()
    if "pretrain" not in self.trained:
      model = self.untrained()
      started = time.monotonic()
      steps, recipe = 0, self.config.pretrain
      if recipe.epochs:
        steps = self.train("pretrain", model, (None,), recipe)
      self.score("pretrain", model, (None,), steps, started)
      self.trained["pretrain"] = model
    return self.trained["pretrain"]

  def stop_if_asked(self, stage) -> None:
    """Raises train.InterruptedRun if a signal asked to stop."""
    name = self.interrupted()
    if name:
      raise train.InterruptedRun(
        f"{stage}: {name}; the same command goes on from there", name
      )

  def multi_precision_network(self) -> nnx.Module:
    """The multi-precision network, trained; restored if its stage is done."""
    config = self.config
    return self.quantized("multi_precision", config.quant, config.train)

  def quantize(self, model, config: QuantConfig):
    weight, activation = quantizers(config)
    return nn.quantize(
      model,
      weight=weight,
      activation=activation,
      sample=self.batches(self.config.seed)[0]["image"],
      norm=config.norm,
    )

  def quantized(self, stage, config: QuantConfig, recipe: TrainConfig):
    """A quantized network, trained; restored if its stage is done."""
    if stage in self.trained:
      return self.trained[stage]
    weight, _ = quantizers(config)
    network = self.quantize(self.float_network(), config)
    started = time.monotonic()
    curriculum = train.CURRICULA[recipe.curriculum]
    present, steps = weight, 0
    for number, phase in enumerate(curriculum.phases):
      wanted = weight
      if phase.weight is not None:
        wanted = quant.get(phase.weight, bits=weight.bits)
      network = nn.requantize(
        network,
        weight=None if wanted is present else wanted,
        norm=phase.norm or config.norm,
      )
      present = wanted
      steps = self.train(
        "/".join(filter(None, (stage, phase.name))),
        network,
        weight.bits,
        dataclasses.replace(recipe, sampling=phase.sampling or recipe.sampling),
        phase=(number, len(curriculum.phases)),
      )
    # Norms that all bit-widths share have the statistics of all of them.
    if curriculum.recalibrate and config.norm != "shared":
      batches = self.batches(self.config.seed)
      images = [batches[step]["image"] for step in range(_RECALIBRATION)]
      for bits in weight.bits:
        nn.set_bits(network, bits)
        nn.recalibrate(network, images)
    self.score(stage, network, weight.bits, steps, started)
    self.trained[stage] = network
    return network

  def train(
    self,
    stage,
    model,
    bits,
    recipe: TrainConfig,
    *,
    phase=(0, 1),
    sampling=None,
  ):
    """Trains a model in place to the end of a phase, from where it is.

    Args:
      stage: directory and name of the phase.
      model: changed in place.
      bits: candidate bit-widths, (None,) for a float network.
      recipe: how to train.
      phase: number of the phase, and how many there are.
      sampling: number of steps -> train.Sampling, in place of the recipe's.

    Returns:
      The number of steps of the phase.
    """
    network = nn.functional(model)
    optimizer = train.make_optimizer(
      recipe.optimizer,
      kinds=network.kinds,
      weight_decay=recipe.weight_decay,
      momentum=recipe.momentum,
    )
    batch_size = self.config.data.batch_size
    number, count = phase
    images = recipe.epochs * len(self.data.train)
    steps = max(images // (batch_size * count), 1)
    drawn = train.SAMPLINGS[recipe.sampling]
    if sampling is not None:
      drawn = sampling(steps)
    state = train.init_state(
      network,
      optimizer,
      jax.random.fold_in(jax.random.key(self.config.seed), number),
      distillation=recipe.distillation,
      num_classes=self.data.num_classes,
    )
    labels = bits if bits == (None,) else drawn.labels(bits)
    layout = self._layout_of(recipe, len(labels))
    state = train.place(layout, state)
    table = nn.layer_table(model)
    self.workdir.tell(
      stage, {"bits": bits, "layers": [row.name for row in table]}
    )
    directory = self.workdir.path / stage / "checkpoints"
    with (
      Checkpoints(directory) as checkpoints,
      self._metrics() as metrics,
    ):
      if checkpoints.latest() is not None:
        state = checkpoints.restore(like=state)
      if int(state.step) < steps:
        self.workdir.check_space({stage: disk_bytes(state)})
        if metrics is not None:
          metrics.resume(stage, int(state.step))
        share, shares = layout.share
        candidates = tuple(32 if b is None else b for b in bits)
        loop = train.Loop(
          stage=stage,
          steps=steps,
          labels=labels,
          step=train.make_step(
            network,
            candidates,
            optimizer,
            optax.cosine_decay_schedule(recipe.learning_rate, steps),
            schedule=recipe.schedule,
            vectorize=recipe.vectorize,
            alrs=recipe.alrs,
            sampling=drawn,
            distillation=recipe.distillation,
            loss_weights=recipe.loss_weights,
            steps=steps,
            layout=layout,
          ),
          batches=data.batches(
            self.data.train,
            batch_size=batch_size,
            seed=self.config.seed,
            process_index=share,
            process_count=shares,
            workers=self.config.data.workers,
          ),
          checkpoints=checkpoints,
          metrics=metrics,
          checkpoint_every=self.config.checkpoint_every,
          log_every=self.config.log_every,
          interrupted=self.agreed,
          put=layout.put,
          shows=processes.is_first(),
        )
        before = self._unreadable()
        state = loop.run(state)
        self._tell_of_unreadable(stage, before, share)
      params, stats = train.collect(layout, (state.params, state.batch_stats))
      nn.update(model, params=params, batch_stats=stats)
    return steps

  def _layout_of(self, recipe, visits):
    """The layout, flat for a stage that does not visit bit-widths at once."""
    mode = train.resolve_vectorize(recipe.vectorize, recipe.schedule)
    at_once = mode == "vmap" and visits % self.layout.bits == 0
    return self.layout if at_once else self.layout.flat()

  def _metrics(self):
    """The file of numbers, in the process that writes it."""
    if processes.is_first():
      return MetricsWriter(self.workdir.metrics)
    return contextlib.nullcontext()

  def _unreadable(self):
    """How often images could not be read in this process, by name."""
    return collections.Counter(getattr(self.data.train, "unreadable", ()))

  def _tell_of_unreadable(self, stage, before, share):
    """Warns, in the first process, of what all have met in a stage."""
    mine = self._unreadable() - before
    # Processes that feed the same share have met the same ones.
    shares = dict(processes.gathered([share, mine]))
    count = sum(
      map(collections.Counter, shares.values()), collections.Counter()
    )
    if count and processes.is_first():
      warnings.warn(
        f"{stage}: unreadable images: {len(count)}; the next readable one took "
        f"their place {count.total()} times since the stage began or went on",
        stacklevel=2,
      )

  def score(self, stage, model, bits, steps, started, **more):
    """Scores a trained network and ends its stage, unless that was done."""
    if self.workdir.result(stage) is None:
      processes.on_first(
        lambda: self._score(stage, model, bits, steps, started, more)
      )

  def _score(self, stage, model, bits, steps, started, more):
    scores = self.scores(self.served(model), bits)
    with MetricsWriter(self.workdir.metrics) as metrics:
      # A process killed right here has written some of them already.
      metrics.resume(stage, steps, names=("loss", "images_per_second"))
      for key, score in scores.items():
        named = {f"test_{name}": value for name, value in score.items()}
        metrics.write(stage, steps, named, bits=_bits_or_none(key))
      seconds = metrics.training_seconds(
        stage, images_per_step=self.config.data.batch_size
      )
    self.workdir.finish(
      stage,
      started,
      scores=scores,
      train_seconds=round(seconds, 1),
      **more,
    )

  def served(self, model):
    """A quantized network as it is deployed; a float one as it is.

    Folding norms before the program, and not inside, moves last bits that
    rounding to codes can amplify: what is scored is what will be served.
    """
    if not nn.layer_table(model):
      return model
    return nn.thaw(self._model(), nn.freeze(model))

  def scores(self, model, bits, *, indices=None):
    """{bit-width: {"accuracy": percent, "loss": cross-entropy}} on test.

    `indices` are the assignments that `bits` name; by default the positions.
    """
    network = nn.functional(model)
    evaluate = train.make_evaluate(network, self.local)
    scores = {}
    for index, b in zip(indices or range(len(bits)), bits, strict=True):
      batches = self.epoch(self.data.test)
      score = evaluate(network.params, network.batch_stats, index, batches)
      scores["float" if b is None else str(b)] = score._asdict()
    return scores

  def epoch(self, source, *, batch_size=512):
    """All examples, in batches that this process's devices can share."""
    count = self.local.data
    size = min(len(source), batch_size)
    return data.epoch(
      source,
      batch_size=-(-size // count) * count,
      workers=self.config.data.workers,
    )

  def spread(self, batch):
    """A batch over this process's devices, if they can share it."""
    fits = len(batch["label"]) % self.local.data == 0
    return self.local.put(batch) if fits else batch

  def batches(self, seed):
    """Whole training batches, the same in every process."""
    return data.batches(
      self.data.train,
      batch_size=self.config.data.batch_size,
      seed=seed,
      workers=self.config.data.workers,
    )

  def untrained(self):
    """The float network before any training: random, or with given weights."""
    model, path = self._model(), self.config.model.weights
    if path and self.start is None:
      try:
        models.load_torchvision(model, path)
      except ValueError as error:
        raise ConfigError(f"model.{error}") from None
    return model

  def _model(self):
    rngs = nnx.Rngs(self.config.seed)
    options = self.model_options()
    return models.build(self.config.model.name, rngs=rngs, **options)

  def model_options(self):
    return {
      **self.config.model.options,
      "dtype": self.config.model.dtype,
      "num_classes": self.data.num_classes,
      "channels": self.data.image_shape[-1],
    }


def _layouts(config):
  """Where training lives, and what this process does alone."""
  wanted = config.devices
  try:
    layout = sharding.layout(**dataclasses.asdict(wanted))
  except ValueError as error:
    raise ConfigError(str(error)) from None
  # Also where a stage has all devices along the axis data.
  if config.data.batch_size % layout.mesh.size:
    raise ConfigError(
      f"data.batch_size={config.data.batch_size}: allowed are multiples of "
      f"{layout.mesh.size}, the number of devices (see devices.data)"
    )
  mine = jax.process_index()
  local = [d for d in layout.mesh.devices.flat if d.process_index == mine]
  return layout, sharding.layout(devices=local)


def _bits_or_none(key):
  return None if key == "float" else int(key)
