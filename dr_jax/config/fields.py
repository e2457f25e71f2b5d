"""The fields of a configuration, as frozen dataclasses."""

from __future__ import annotations

import dataclasses

from dr_jax import search
from dr_jax.train import hasb

STAGES = (
  "pretrain",
  "multi_precision",
  "separate",
  "hessian",
  "supernet",
  "search",
  "export",
  "report",
)
DTYPES = ("float32", "bfloat16")


class ConfigError(ValueError):
  """A field of the configuration is wrong: one line with field and value."""


@dataclasses.dataclass(frozen=True)
class DataConfig:
  """Which data, and how many examples a step sees; see `data.load`.

  `holdout` is the share of the training examples that no training sees and
  searches are judged on, `workers` the number of processes that decode images;
  0 decodes between the steps.
  """

  name: str = "digits"
  batch_size: int = 128
  holdout: float = 0.0
  path: str = ""
  dataset: str = ""
  train_split: str = "train"
  test_split: str = "test"
  augment: str = "none"
  image_size: int = 0
  mean: tuple = ()
  std: tuple = ()
  workers: int = 0
  damaged: str = "raise"
  classes: int = 10
  examples: int = 64
  channels: int = 3


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """A network of `models.build`; classes and channels come from the data.

  `weights` is the path of a safetensors file with torchvision's names, from
  which the float network starts; it may then be trained no further, with no
  stage pretrain, or with `pretrain.epochs` 0 to have it scored. `dtype` is the
  type in which the network computes; its parameters are float32.
  """

  name: str = "resnet20"
  options: dict = dataclasses.field(default_factory=dict)
  weights: str = ""
  dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class QuantConfig:
  """Candidate bit-widths and the quantizers of `quant.get`.

  An entry None of the options leaves that option to the method; activation
  "none" leaves the layers' inputs float.
  """

  bits: tuple = (8, 6, 4, 2)
  weight: str = "double_rounding"
  weight_options: dict = dataclasses.field(default_factory=dict)
  activation: str = "lsq_activation"
  activation_options: dict = dataclasses.field(default_factory=dict)
  norm: str = "switchable"


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training recipe; the learning rate falls to zero as a cosine.

  For `Config.train`, `from_dict` takes what is not set from the method.
  """

  epochs: int = 10
  optimizer: str = "adam"
  learning_rate: float = 5e-4
  weight_decay: float = 5e-5
  momentum: float = 0.9
  schedule: str = "alternate"
  vectorize: str = "auto"
  alrs: str = "none"
  sampling: str = "all"
  distillation: str = "none"
  loss_weights: tuple = ()
  curriculum: str = "none"


@dataclasses.dataclass(frozen=True)
class HessianConfig:
  """Traces of the float network's Hessian; see `hessian.trace`.

  `images` of the training set are used, or all if there are fewer.
  """

  images: int = 1024
  batch_size: int = 256
  rel_stderr: float = 0.05
  min_probes: int = 8
  max_probes: int = 512


@dataclasses.dataclass(frozen=True)
class HasbConfig:
  """Stochastic bit-switching of the SuperNet; see `train.hasb.sampling`."""

  sigma: float = 0.5
  warmup: float = hasb.WARMUP


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """Which searches look for an allocation, and under which budgets.

  A budget is a mean bit-width: the network may cost what it would with that
  bit-width everywhere, in each of `costs` ("stored_bits", "bops", "sum_bits",
  or "latency", with a table {layer: {bits: seconds}} in a JSON file).
  `options` are keyword arguments by strategy, `ties` groups of layer names
  that share a bit-width, `pinned` bit-widths by layer name. `judge` says which
  images assignments are scored on: "held_out" (`data.holdout`), "train", or
  "both"; never the test set.
  """

  strategies: tuple = tuple(search.SEARCHES)
  costs: tuple = ("stored_bits",)
  budgets: tuple = (3.0, 4.0, 5.0, 6.0)
  options: dict = dataclasses.field(default_factory=dict)
  judge: str = "held_out"
  prefer: str = "loss"
  latency: str = ""
  ties: tuple = ()
  pinned: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class DevicesConfig:
  """How training is spread over devices; see `sharding.Layout`.

  `data` devices along the axis "data", 0 for all there are; `bits` along the
  axis "bits" (for `vectorize="vmap"`); `parameters` "replicated" or "sharded";
  `norm` "global" or "per_device".
  """

  data: int = 0
  bits: int = 1
  parameters: str = "replicated"
  norm: str = "global"


@dataclasses.dataclass(frozen=True)
class Config:
  """A run.

  `method` names a recipe of `train.RECIPES`, from which `from_dict` takes the
  fields of `quant` and `train` that are not set.
  """

  name: str = "run"
  method: str = "double_rounding"
  seed: int = 0
  stages: tuple = ("pretrain", "multi_precision", "export", "report")
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
  checkpoint_every: int = 100
  log_every: int = 10
