"""Error of networks that are quantized and not trained, by initial scales.

  python -m dr_jax.benchmarks.post_training [--seeds=4]

Of three kinds of float networks with random parameters, as public NNX code
writes them: a VGG19, a variational autoencoder and a U-Net, narrow ones. The
error is that of the outputs, |quantized - float| / |float|, over inputs that
calibration did not see, relative to that of a plain quantizer with the same
layers: weights max|w| / (2^(b-1) - 1) per output channel, inputs max|x| per
layer. Means over the seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from flax import nnx

from dr_jax import nn, quant
from dr_jax.benchmarks.rows import Rows, turns
from dr_jax.runtime import command

_SEEDS = flags.DEFINE_integer("seeds", 4, "Networks of each kind.")

BITS = (8, 6, 4, 2)
METHODS = ("double_rounding", "lsq")
_VGG = (1, 1, 0, 2, 2, 0, 4, 4, 4, 4, 0, 4, 4, 4, 4, 0, 4, 4, 4, 4)


class Vgg(nnx.Module):
  """VGG19 with a quarter of the channels, for 32 x 32 images; no norms."""

  def __init__(self, rngs: nnx.Rngs):
    start = nnx.initializers.he_normal()
    layers, c_in = [], 3
    for width in _VGG:
      if not width:
        layers.append(_pooled)
        continue
      c_out = 16 * width
      conv = nnx.Conv(c_in, c_out, (3, 3), kernel_init=start, rngs=rngs)
      layers += [conv, nnx.relu]
      c_in = c_out
    self.features = nnx.Sequential(*layers)
    linear = functools.partial(nnx.Linear, rngs=rngs)
    self.head = nnx.Sequential(
      *(linear(4 * c_in, 128), nnx.relu, linear(128, 128), nnx.relu),
      linear(128, 1000),
    )

  def __call__(self, x):
    x = self.features(x)
    return self.head(x.reshape(len(x), -1))


class Block(nnx.Module):
  """Two convolutions behind group norms, added to what they see."""

  def __init__(self, c_in: int, c_out: int, rngs: nnx.Rngs):
    norm = functools.partial(nnx.GroupNorm, num_groups=4, rngs=rngs)
    self.norm1, self.norm2 = norm(c_in), norm(c_out)
    self.conv1 = nnx.Conv(c_in, c_out, (3, 3), rngs=rngs)
    self.conv2 = nnx.Conv(c_out, c_out, (3, 3), rngs=rngs)
    self.shortcut = nnx.Sequential()
    if c_in != c_out:
      self.shortcut.layers.append(nnx.Conv(c_in, c_out, (1, 1), rngs=rngs))

  def __call__(self, x):
    h = self.conv1(nnx.silu(self.norm1(x)))
    h = self.conv2(nnx.silu(self.norm2(h)))
    return h + self.shortcut(x)


class Autoencoder(nnx.Module):
  """The mean of a variational autoencoder, decoded: 30 layers."""

  def __init__(self, rngs: nnx.Rngs):
    conv = functools.partial(nnx.Conv, rngs=rngs)
    blocks = lambda c: [Block(c, c, rngs) for _ in range(3)]  # noqa: E731
    self.encoder = nnx.Sequential(
      *(conv(3, 16, (3, 3)), *blocks(16)),
      *(conv(16, 32, (3, 3), strides=2), *blocks(32), conv(32, 8, (1, 1))),
    )
    self.decoder = nnx.Sequential(
      *(conv(8, 32, (1, 1)), *blocks(32), _doubled),
      *(conv(32, 16, (3, 3)), *blocks(16), conv(16, 3, (3, 3))),
    )

  def __call__(self, x):
    return self.decoder(self.encoder(x))


class Unet(nnx.Module):
  """One level down and up again, with a skip connection."""

  def __init__(self, rngs: nnx.Rngs):
    conv = functools.partial(nnx.Conv, rngs=rngs)
    self.first = nnx.Sequential(conv(3, 16, (3, 3)), Block(16, 16, rngs))
    self.inner = nnx.Sequential(
      conv(16, 32, (3, 3), strides=2),
      *(Block(32, 32, rngs), _doubled, conv(32, 16, (3, 3))),
    )
    self.last = nnx.Sequential(Block(32, 16, rngs), conv(16, 3, (1, 1)))

  def __call__(self, x):
    x = self.first(x)
    return self.last(jnp.concatenate([x, self.inner(x)], -1))


NETWORKS: dict[str, Callable[[nnx.Rngs], nnx.Module]] = {
  "vgg": Vgg,
  "autoencoder": Autoencoder,
  "unet": Unet,
}


def _pooled(x):
  return nnx.max_pool(x, (2, 2), (2, 2))


def _doubled(x):
  return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)


def plain(
  bits: int,
) -> tuple[quant.WeightQuantizer, quant.ActivationQuantizer]:
  """The max-abs quantizers of one bit-width; nothing is learned or stored."""
  top = 2 ** (bits - 1) - 1

  def rounded(x, largest, low, high):
    scale = jnp.maximum(largest, 1e-9) / high
    return jnp.clip(jnp.round(x / scale), low, high) * scale

  def weight(params, w, index):
    axes = tuple(range(w.ndim - 1))
    return rounded(w, jnp.abs(w).max(axes, keepdims=True), -top, top)

  def activation(signed):
    low, high = (-top, top) if signed else (0, 2**bits - 1)
    return quant.ActivationQuantizer(
      bits=(bits,),
      init=lambda x: {"scale": jnp.abs(x).max()},
      fake_quantize=lambda params, x, i: rounded(x, params["scale"], low, high),
      signed=signed,
      with_sign=activation,
    )

  weights = quant.float_weight((bits,))._replace(fake_quantize=weight)
  return weights, activation(None)


def errors(
  kind: str, seed: int, inits: Sequence[str] = quant.INITS
) -> dict[tuple[str, str], np.ndarray]:
  """Returns {(method, init): errors [bits] over those of the plain quantizer}.

  Args:
    kind: one of NETWORKS.
    seed: of the network.
    inits: of quant.INITS.
  """
  keys = jax.random.split(jax.random.key(0))
  sample = jax.random.normal(keys[0], (16, 32, 32, 3))
  x = jax.random.normal(keys[1], (24, 32, 32, 3))
  model = NETWORKS[kind](nnx.Rngs(seed))
  y = nnx.jit(lambda m, x: m(x))(model, x)

  def quantized(weight, activation, **options):
    network = nn.quantize(
      model,
      weight=weight,
      activation=activation,
      sample=sample,
      skip=(),
      **options,
    )
    split = nn.functional(network)
    apply = jax.jit(split.apply)
    found = []
    for index in range(len(weight.bits)):
      state = (split.params, split.batch_stats, jnp.int32(index))
      found.append(jnp.linalg.norm(apply(*state, x)[0] - y))
    return np.array(found)

  base = np.concatenate([quantized(*plain(b)) for b in BITS])
  found = {}
  for method in METHODS:
    weight = quant.find(method)(BITS)
    for init in inits:
      inputs = quant.lsq_activation(BITS)
      found[method, init] = quantized(weight, inputs, init=init) / base
  return found


def main():
  title = "error over that of max-abs quantization"
  columns = ("network", "method", "init", *(f"{b} bits" for b in BITS))
  rows = Rows(title, columns, left=3)
  for kind in NETWORKS:
    by_seed = [
      errors(kind, seed) for seed in turns(_SEEDS.value, f"{kind}: seed")
    ]
    for method, init in by_seed[0]:
      mean = np.mean([found[method, init] for found in by_seed], 0)
      rows.add(kind, method, init, *(f"{value:.2f}" for value in mean))
  rows.end()


if __name__ == "__main__":
  command.start(main)
