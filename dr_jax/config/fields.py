"""The fields of a configuration: frozen dataclasses with their constraints.

A constraint is said once, in the metadata of its field, and checked by
`checks.check_fields`. Names are looked up when they are checked
("dr_jax.models:NAMES"), so that this file imports nothing of the library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any


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


def field(
  default: Any,
  *,
  one_of: str | Sequence[Any] | None = None,
  at_least: float | None = None,
  above: float | None = None,
  at_most: float | None = None,
  below: float | None = None,
  each: type | tuple[type, ...] | None = None,
  pattern: tuple[str, str] | None = None,
  nonempty: bool | None = None,
  distinct: bool | None = None,
  only_with: tuple[str, tuple[str, ...]] | None = None,
) -> Any:
  """A field with constraints on its value, or on the entries of a tuple.

  Args:
    default: its default.
    one_of: values, or "module:NAME" of a collection of them.
    at_least, above, at_most, below: bounds, which NaN does not keep.
    each: type of the entries of a tuple.
    pattern: regular expression of a string, and what it means in words.
    nonempty: whether a string or tuple must have an entry.
    distinct: whether the entries of a tuple must differ.
    only_with: another field of the group, and its values with which this one
      has an effect; with others it must keep its default.
  """
  constraints = {
    "one_of": one_of,
    "at_least": at_least,
    "above": above,
    "at_most": at_most,
    "below": below,
    "each": each,
    "pattern": pattern,
    "nonempty": nonempty,
    "distinct": distinct,
    "only_with": only_with,
  }
  return dataclasses.field(
    default=default,
    metadata={k: v for k, v in constraints.items() if v is not None},
  )


def mapping() -> Any:
  """A field that is a dict, empty by default."""
  return dataclasses.field(default_factory=dict)


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

  `holdout` is the fraction of the training examples that no training sees and
  searches are scored on, `workers` the number of processes that decode images;
  0 decodes between the steps.
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

  `weights` is the path of a state dict of PyTorch in safetensors
  (`interop.torch.load_weights`), from which the float network starts; it may
  then be trained no further, with no stage pretrain, or with `pretrain.epochs`
  0 to have it scored. `dtype` is the type in which the network computes; its
  parameters are float32.
  """

  name: str = field("resnet20", one_of="dr_jax.models:NAMES")
  options: dict = mapping()
  weights: str = ""
  dtype: str = field("float32", one_of=("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class QuantConfig:
  """Candidate bit-widths and the quantizers of `quant.get`.

  An entry None of the options leaves that option to the method; activation
  "none" leaves the layers' inputs float. `init` says where scales start; see
  `quant.fit`. `backend` says how layers compute forward in training; see
  `nn.set_backend`.
  """

  bits: tuple = field((8, 6, 4, 2), each=int)
  weight: str = "double_rounding"
  weight_options: dict = mapping()
  activation: str = "lsq_activation"
  activation_options: dict = mapping()
  norm: str = field("switchable", one_of="dr_jax.nn:NORMS")
  init: str = field("published", one_of="dr_jax.quant:INITS")
  backend: str = field("float", one_of="dr_jax.nn:BACKENDS")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """A training recipe; the learning rate falls to zero as a cosine.

  `warmup` is the fraction of the steps in which it rises before.
  For `Config.train`, `from_dict` takes what is not set from the method.
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


@dataclasses.dataclass(frozen=True)
class HessianConfig:
  """Traces of the float network's Hessian; see `hessian.trace`.

  `images` of the training set are used, or all if there are fewer.
  """

  images: int = field(1024, at_least=1, at_most=10**7)
  batch_size: int = field(256, at_least=1, at_most=2**20)
  rel_stderr: float = field(0.05, above=0, at_most=10**9)
  min_probes: int = field(8, at_least=2, at_most=10**6)
  max_probes: int = field(512, at_least=2, at_most=10**6)


@dataclasses.dataclass(frozen=True)
class HasbConfig:
  """Stochastic bit-switching of the SuperNet; see `train.hasb.sampling`."""

  sigma: float = field(0.5, at_least=0, at_most=1)
  warmup: float = field(1 / 9, at_least=0, at_most=1)


@dataclasses.dataclass(frozen=True)
class SearchConfig:
  """Which searches look for an allocation, and under which budgets.

  A budget is a mean bit-width: the network may cost what it would with that
  bit-width everywhere, in each of `costs` ("stored_bits", "bops", "sum_bits",
  or "latency", with the file `latency` of `python -m dr_jax.benchmarks.latency`
  or any {layer: {bits: seconds}} in JSON).
  `strategies` are those of `search.SEARCHES`, all if empty, `options` their
  keyword arguments by strategy, `ties` groups of layer names that share a
  bit-width, `pinned` bit-widths by layer name. `eval_split` says which images
  assignments are scored on: "held_out" (`data.holdout`), "train", or "both";
  never the test set. `metric` decides between them.
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

  `data` devices along the axis "data", 0 for all there are; `bits` along the
  axis "bits" (for `vectorize="vmap"`); `parameters` "replicated" or "sharded";
  `norm` "global" or "per_device".
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

  `method` names a recipe of `quant.RECIPES`, from which `from_dict` takes the
  fields of `quant` and `train` that are not set.
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
