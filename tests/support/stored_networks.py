"""Small stored networks after a hundred joint steps, and all test images."""

import functools
import gzip
import pathlib

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from dr_jax import data, models, nn, quant, train

BITS = (8, 4, 2)
FASHION = pathlib.Path(__file__).parents[3] / "shared/data/fashion-mnist"


def digits():
  """Training images and labels, and all test images."""
  found = data.load(name="digits")
  train, test = (
    [source[i] for i in range(len(source))]
    for source in (found.train, found.test)
  )
  return (
    np.stack([example["image"] for example in train]),
    np.array([example["label"] for example in train]),
    np.stack([example["image"] for example in test]),
  )


def fashion():
  if not FASHION.exists():
    pytest.skip("shared/data has no Fashion-MNIST")

  def read(name, header):
    return np.frombuffer(gzip.open(FASHION / name).read(), np.uint8)[header:]

  def images(name):
    pixels = read(name, 16).reshape(-1, 28, 28, 1).astype(np.float32)
    return pixels / 127.5 - 1

  return (
    images("train-images-idx3-ubyte.gz")[:5000],
    read("train-labels-idx1-ubyte.gz", 8)[:5000].astype(np.int64),
    images("t10k-images-idx3-ubyte.gz"),
  )


@functools.cache
def stored_network(name):
  """The network trained on "digits" or "fashion", and all its test images."""
  images, labels, test = {"digits": digits, "fashion": fashion}[name]()
  float_network = models.build(
    "resnet",
    depth=8,
    num_classes=10,
    channels=1,
    widths=(8, 12, 16),
    rngs=nnx.Rngs(0),
  )
  network = nn.quantize(
    float_network,
    weight=quant.double_rounding(BITS, rounding="half_up"),
    activation=quant.lsq_activation(BITS),
    sample=images[:64],
  )
  split = nn.functional(network)
  trainer = train.make_trainer(
    split,
    train.make_optimizer("adam", param_labels=split.param_labels),
    optax.constant_schedule(3e-3),
    vectorize="sequential",
  )
  state = trainer.init(jax.random.key(0))
  for step in range(100):
    rows = slice(step * 100 % 1200, step * 100 % 1200 + 100)
    batch = {"image": images[rows], "label": labels[rows].astype(np.int32)}
    state, _ = trainer.step(state, batch)
  nn.update(network, params=state.params, batch_stats=state.batch_stats)
  return (
    nn.deployed.assemble(float_network, nn.deployed.parts_of(network)),
    test,
  )
