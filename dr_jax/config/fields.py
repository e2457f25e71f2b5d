"""The fields of a configuration: frozen dataclasses with their constraints.

What a field means is said once, under "Attributes" of its group, which
`python -m dr_jax.main --help` shows; what it allows, in its metadata
(`constraints`), which is checked and shown.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from dr_jax.config.constraints import field, mapping


class ConfigError(ValueError):
  """A field of the configuration is wrong: one line with field and value."""

  exit_code = 2

  def __init__(self, message: object):
    text = " ".join(str(message).split())
    # A value of any length may be quoted near the end.
    super().__init__(
      text if len(text) < 1000 else f"{text[:800]}...{text[-99:]}"
    )


def shown(value: Any) -> str:
  """Returns a value for a message: its repr, in at most 80 characters.

  >>> shown("x"), shown(10**5000)
  ("'x'", '<int>')
  """
  try:
    text = repr(value)
  # Of an integer of thousands of digits, or of an object that cannot.
  except Exception:
    return f"<{type(value).__name__}>"
  return text if len(text) <= 80 else f"{text[:77]}..."


def prefixed(group: str, error: ValueError) -> ConfigError:
  """The library's error about an argument, as one about a field.

  A message that starts with the name of a field of the group gets the group's
  name in front, as "data." in front of "batch_size must be >= 1, got 0".
  """
  names = {f.name for f in dataclasses.fields(getattr(Config(), group))}
  first = str(error).split(" ")[0]
  prefix = f"{group}." if first in names else ""
  return ConfigError(f"{prefix}{error}")


_NUMBER = (int, float)
# One directory, and one word of a command line.
FILE_NAME = (
  r"\w[\w .,=+@-]{0,59}",
  "a file name of letters, digits and .,=+@-_, at most 60, the first one a "
  "letter or digit",
)
_FILES = ("name", ("folder", "tfds", "idx", "text"))
_STORED_IMAGES = ("name", ("folder", "tfds"))
_IMAGES = ("name", ("folder", "tfds", "synthetic"))
_TEXT = ("name", ("text",))
_SYNTHETIC = ("name", ("synthetic",))


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which data, and how many examples a step sees; see `data.load`.

  Attributes:
    name: the data set, or the kind of files that hold it.
    batch_size: examples per step, over all devices together.
    holdout: fraction of the training examples that no training sees; searches
      and validations are scored on it.
    path: directory of the files; "" for the default of the data set.
    dataset: name of the data set in TFDS.
    train_split: name of the split to train on.
    test_split: name of the split to test on.
    augment: random augmentation of the training images.
    image_size: side of the images after augmentation, in pixels; 0 leaves them
      as they are.
    mean: subtracted from images in [0, 1], per channel; () for 0.
    std: divisor of images after that, per channel; () for 1.
    workers: processes that decode images; 0 decodes between the steps.
    on_decode_error: whether an image that cannot be read stops the run, or the
      next one takes its place.
    orient: turn images as their EXIF orientation says.
    classes: number of classes of synthetic images.
    examples: number of synthetic images in each split.
    channels: channels of synthetic images.
    length: bytes of a sequence of text.
    bytes: bytes of each split of a text to use; 0 for all.
  """

  name: str = field("digits", one_of="dr_jax.data:NAMES")
  batch_size: int = field(128, at_least=1, at_most=2**20)
  holdout: float = field(0.0, at_least=0, below=1)
  path: str = field("", only_with=_FILES)
  dataset: str = field("", only_with=("name", ("tfds",)))
  train_split: str = field("train", nonempty=True, only_with=_FILES)
  test_split: str = field("test", nonempty=True, only_with=_FILES)
  augment: str = field("none", one_of="dr_jax.data:AUGMENT", only_with=_IMAGES)
  image_size: int = field(0, at_least=0, at_most=4096, only_with=_IMAGES)
  mean: tuple = field(
    (), each=_NUMBER, at_least=-1000, at_most=1000, only_with=_IMAGES
  )
  std: tuple = field(
    (), each=_NUMBER, at_least=1e-6, at_most=1000, only_with=_IMAGES
  )
  workers: int = field(0, at_least=0, at_most=256, only_with=_IMAGES)
  on_decode_error: str = field(
    "raise", one_of=("raise", "skip"), only_with=_STORED_IMAGES
  )
  orient: bool = field(True, only_with=_STORED_IMAGES)
  classes: int = field(10, at_least=1, at_most=10**5, only_with=_SYNTHETIC)
  examples: int = field(64, at_least=1, at_most=10**7, only_with=_SYNTHETIC)
  channels: int = field(3, one_of=(1, 3), only_with=_SYNTHETIC)
  length: int = field(128, at_least=1, at_most=2**16, only_with=_TEXT)
  bytes: int = field(0, at_least=0, only_with=_TEXT)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A network of `models.build`; classes and sizes come from the data.

  Attributes:
    name: architecture of the network.
    options: keyword arguments of the network, as `models.build` takes them.
    weights: path of a state dict of PyTorch in safetensors
      (`interop.torch.load_weights`), from which the float network starts. It
      may then be trained no further, with no stage pretrain, or with
      pretrain.epochs=0 to have it scored.
    dtype: type in which the network computes; its parameters are float32.
  """

  name: str = field("resnet20", one_of="dr_jax.models:NAMES")
  options: dict = mapping()
  weights: str = ""
  dtype: str = field("float32", one_of=("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class QuantConfig:
  """Candidate bit-widths and the quantizers of `quant.get`.

  Attributes:
    bits: candidate bit-widths, highest first.
    weight: quantizer of the weights.
    weight_options: keyword arguments of the weight quantizer; those without a
      value are the method's.
    activation: quantizer of the layers' inputs; "none" leaves them float.
    activation_options: keyword arguments of the activation quantizer, likewise.
    norm: what a batch norm has parameters for: each bit-width (switchable),
      each pair of bit-widths of successive layers (transitional), or all
      (shared).
    init: where scales start; see `quant.fit`.
    backend: how layers compute forward in training; see `nn.set_backend`.
  """

  bits: tuple = field((8, 6, 4, 2), each=int)
  weight: str = field("double_rounding", one_of="dr_jax.quant:weight_names")
  weight_options: dict = mapping()
  activation: str = field(
    "lsq_activation", one_of=("none", "dr_jax.quant:activation_names")
  )
  activation_options: dict = mapping()
  norm: str = field("switchable", one_of="dr_jax.nn:NORMS")
  init: str = field("published", one_of="dr_jax.quant:INITS")
  backend: str = field("float", one_of="dr_jax.nn:BACKENDS")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training recipe.

  For `Config.train`, `from_dict` takes what is not set from the method.

  Attributes:
    epochs: passes over the training set.
    optimizer: the optimizer.
    learning_rate: peak learning rate, which falls to zero as a cosine.
    warmup: fraction of the steps in which the learning rate rises to its peak.
    weight_decay: weight decay of the kernels; scales and norms have none.
    momentum: momentum of SGD.
    schedule: one update after each bit-width (alternate), or one after all of
      them (accumulate).
    vectorize: how the passes of a step become programs; see
      `train.make_trainer`.
    alrs: how learning rates of scales depend on the bit-width; see
      `train.alrs`.
    sampling: which bit-widths a step trains; see `train.sampling`.
    distillation: what lower bit-widths learn from; see `train.distill`.
    loss_weights: one factor for the loss of each bit-width; () for 1.
    curriculum: phases with other quantizers or norms; see `train.curricula`.
    validation_every: epochs between validations, which score every bit-width
      on the examples that `data.holdout` keeps out; 0 for never.
    keep_best: end with the state that validated best, not with the last one.
    steps_per_call: steps in one call of a compiled program, so that an
      accelerator need not wait for the host; 1 with vectorize=sequential. Last
      bits may change; checkpoints and validations keep their steps. On a CPU
      convolutions are some twenty times slower with more than 1.
  """

  epochs: int = field(10, at_least=0, at_most=10**6)
  optimizer: str = field("adam", one_of="dr_jax.train:OPTIMIZERS")
  learning_rate: float = field(5e-4, at_least=0, at_most=1000)
  warmup: float = field(0.0, at_least=0, below=1)
  weight_decay: float = field(5e-5, at_least=0, at_most=1000)
  momentum: float = field(
    0.9, at_least=0, below=1, only_with=("optimizer", ("sgd",))
  )
  schedule: str = field("alternate", one_of="dr_jax.train:SCHEDULES")
  vectorize: str = field("auto", one_of="dr_jax.train:VECTORIZE")
  alrs: str = field("none", one_of="dr_jax.train.alrs:MODES")
  sampling: str = field("all", one_of="dr_jax.train:SAMPLINGS")
  distillation: str = field("none", one_of="dr_jax.train:DISTILLATIONS")
  loss_weights: tuple = field((), each=_NUMBER, at_least=0, at_most=10**6)
  curriculum: str = field("none", one_of="dr_jax.train:CURRICULA")
  validation_every: int = field(0, at_least=0, at_most=10**6)
  keep_best: bool = False
  steps_per_call: int = field(1, at_least=1, at_most=1024)


@dataclasses.dataclass(frozen=True)
class HessianConfig:
  """Traces of the float network's Hessian; see `hessian.trace`.

  Attributes:
    images: training images that are used, or all if there are fewer.
    batch_size: images of one product with the Hessian.
    rel_stderr: relative standard error at which an estimate stops.
    min_probes: minimum number of random vectors.
    max_probes: maximum number of random vectors.
  """

  images: int = field(1024, at_least=1, at_most=10**7)
  batch_size: int = field(256, at_least=1, at_most=2**20)
  rel_stderr: float = field(0.05, above=0, at_most=10**9)
  min_probes: int = field(8, at_least=2, at_most=10**6)
  max_probes: int = field(512, at_least=2, at_most=10**6)


@dataclasses.dataclass(frozen=True)
class HasbConfig:
  """Stochastic bit-switching of the SuperNet; see `train.hasb.sampling`.

  Attributes:
    sigma: fraction of the layers that draw their bits in the last epoch.
    warmup: fraction of the epochs in which none does.
  """

  sigma: float = field(0.5, at_least=0, at_most=1)
  warmup: float = field(1 / 9, at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """Which searches look for an allocation, and under which budgets.

  Attributes:
    strategies: the searches; all if empty.
    costs: what a budget limits: bits of the weights, bit operations, the sum of
      the layers' bit-widths, seconds.
    budgets: mean bit-widths: the network may cost what it would with that
      bit-width everywhere, in each of the costs.
    options: keyword arguments of searches, by strategy.
    eval_split: the images that assignments are scored on: those of
      data.holdout, of the training set, or both; never the test set.
    metric: what decides between assignments.
    latency: for the cost latency, the file of
      `python -m dr_jax.benchmarks.latency`, or any {layer: {bits: seconds}} in
      JSON.
    ties: groups of names of layers that share a bit-width.
    pinned: bit-widths of layers that are not searched, by name.
  """

  strategies: tuple = field(
    (), each=str, one_of="dr_jax.search:SEARCHES", distinct=True
  )
  costs: tuple = field(
    ("stored_bits",),
    each=str,
    nonempty=True,
    distinct=True,
    one_of=("stored_bits", "bops", "sum_bits", "latency"),
  )
  budgets: tuple = field(
    (3.0, 4.0, 5.0, 6.0), each=_NUMBER, above=0, at_most=64, nonempty=True
  )
  options: dict = mapping()
  eval_split: str = field("held_out", one_of=("held_out", "train", "both"))
  metric: str = field("loss", one_of=("loss", "accuracy"))
  latency: str = ""
  ties: tuple = field((), each=(list, tuple))
  pinned: dict = mapping()


@dataclasses.dataclass(frozen=True)
class DevicesConfig:
  """How training is spread over devices; see `runtime.sharding.Layout`.

  Attributes:
    data: devices that share a batch; 0 for all there are.
    bits: devices that share the bit-widths, for train.vectorize=vmap.
    parameters: whether each device holds all of them, or a part.
    norm: whether batch norms see the whole batch, or that of their device.
  """

  data: int = field(0, at_least=0, at_most=10**6)
  bits: int = field(1, at_least=1, at_most=64)
  parameters: str = field(
    "replicated", one_of="dr_jax.runtime.sharding:PARAMETERS"
  )
  norm: str = field("global", one_of="dr_jax.runtime.sharding:NORMS")


@dataclasses.dataclass(frozen=True)
class Config:
  """A run.

  Attributes:
    name: name of the run; its directory is runs/NAME unless --workdir is given.
    method: recipe of `quant.RECIPES`, which sets the fields of quant and train
      that are left open.
    seed: seed of the initial parameters, the order of the data, and all draws.
    stages: stages to run, in this order.
    data: which data, and how many examples a step sees.
    model: the float network.
    quant: bit-widths and quantizers.
    pretrain: recipe of the stage pretrain.
    train: recipe of the stages multi_precision and separate.
    hessian: how traces of the Hessian are estimated.
    supernet: recipe of the stage supernet.
    hasb: how the stage supernet draws bit-widths.
    search: which searches, under which budgets.
    devices: how training is spread over devices.
    checkpoint_every: steps between checkpoints.
    log_every: steps between lines of metrics.jsonl.
  """

  name: str = field("run", pattern=FILE_NAME)
  method: str = field("double_rounding", one_of="dr_jax.quant:RECIPES")
  # JAX makes keys of 32 bits.
  seed: int = field(0, at_least=0, at_most=2**32 - 1)
  stages: tuple = field(
    ("pretrain", "multi_precision", "export", "report"),
    each=str,
    nonempty=True,
    distinct=True,
  )
  data: DataConfig = DataConfig()
  model: ModelConfig = ModelConfig()
  quant: QuantConfig = QuantConfig()
  pretrain: TrainConfig = TrainConfig()
  train: TrainConfig = TrainConfig(alrs="eta")
  hessian: HessianConfig = HessianConfig()
  supernet: TrainConfig = TrainConfig(alrs="eta", vectorize="sequential")
  hasb: HasbConfig = HasbConfig()
  search: SearchConfig = SearchConfig()
  devices: DevicesConfig = DevicesConfig()
  checkpoint_every: int = field(100, at_least=1, at_most=10**9)
  log_every: int = field(10, at_least=1, at_most=10**9)
