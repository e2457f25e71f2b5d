"""Methods on Fashion-MNIST, three seeds: do the paper's claims hold?

  python -m dr_jax.main --config=configs/fashion_mnist.py [--workdir=DIR]
  python -m dr_jax.main --config=configs/fashion_mnist.py:432
  python -m dr_jax.main --config=configs/fashion_mnist.py:separate,alrs
  python -m dr_jax.main --config=configs/fashion_mnist.py:resnet20,432

60,000 images to train on and 10,000 to test on, 28x28 pixels: an accuracy near
92 % has a standard error of 0.27 points. configs/README.md says where the files
are expected, and has the command that fetches them.

  separate  LSQ trained at each bit-width alone
  alrs      joint Double Rounding, with every mode of learning rates of scales
  distilled joint Double Rounding, the highest bit-width teaching the others
  rivals    AdaBits, Any-Precision, Bit-Mixer, MultiQuant, MatQuant, TruncQuant
  432       bits {4, 3, 2} instead of {8, 6, 4, 2}
  resnet20  the paper's network for CIFAR-10, instead of a pre-activation
            ResNet8 whose stem has stride 2; for a GPU

All start from the same float network and see the same batches; a joint network
takes as many updates at each bit-width as the one that is trained for it alone.
Each method trains with what belongs to it (`quant.RECIPES`) and shares the
rest: Adam with the paper's learning rate, scales that start where they have the
least squared error, and, but for the rows that compare it, alrs="proportional".
Nothing was tuned for a method.
"""

from ml_collections import ConfigDict

from dr_jax.config import DevicesConfig, ModelConfig, TrainConfig, files
from dr_jax.train import alrs

RIVALS = (
  "adabits",
  "any_precision",
  "bit_mixer",
  "multiquant",
  "matquant",
  "truncquant",
)
GROUPS = ("separate", "alrs", "distilled", "rivals")


def _entries(group, bits):
  """The methods of a group, by name."""
  if group == "separate":
    return {
      f"separate_lsq_{b}": {
        "method": "lsq",
        "row": "separate lsq",
        "quant": {"bits": (b,)},
      }
      for b in bits
    }
  if group == "alrs":
    return {
      f"double rounding, alrs={mode}": {
        "method": "double_rounding",
        "train": {"alrs": mode},
      }
      for mode in alrs.MODES
    }
  if group == "distilled":
    return {
      "double rounding, distillation=highest": {
        "method": "double_rounding",
        "train": {"distillation": "highest"},
      }
    }
  return {
    name: {"method": name, "row": name.replace("_", " ")} for name in RIVALS
  }


def get_config(arg=None):
  """Returns the comparison; the argument names bits, network and groups."""
  chosen = arg.split(",") if arg else []
  digits = next((word for word in chosen if word.isdecimal()), "")
  large = "resnet20" in chosen
  groups = [word for word in chosen if word not in (digits, "resnet20")]
  for word in groups:
    if word not in GROUPS:
      known = ", ".join(("432", "resnet20", *GROUPS))
      raise ValueError(f"argument must be of {known}, got {word!r}")
  bits = tuple(map(int, digits or "8642"))
  config = ConfigDict()
  # Groups of one table share a directory.
  network = "resnet20" if large else ""
  config.name = "_".join(filter(None, ("fashion_mnist", digits, network)))
  config.seeds = (0, 1, 2)
  config.checkpoint_every = 1000
  config.log_every = 50
  config.data = files.fashion_mnist(batch_size=128)
  config.devices = files.group(DevicesConfig)
  config.model = files.group(ModelConfig, name="resnet20")
  config.quant = ConfigDict({"bits": bits, "init": "mse"})
  config.pretrain = files.group(
    TrainConfig, epochs=6, optimizer="sgd", learning_rate=0.1, weight_decay=5e-4
  )
  # What a flag sets here holds for every method; else each has its own.
  config.train = files.train_group(epochs=3, learning_rate=5e-4)
  config.train.alrs = "proportional"
  if large:
    config.pretrain.epochs, config.train.epochs = 40, 20
  else:
    options = {"depth": 8, "widths": (16, 32, 64), "stem_stride": 2}
    config.model = files.group(ModelConfig, name="resnet", options=options)
  config.methods = ConfigDict()
  for group in groups or GROUPS:
    config.methods.update(_entries(group, bits))
  return config
