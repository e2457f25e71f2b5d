"""A network whose blocks are stacked and scanned, and its equal with a list."""

import jax
from flax import nnx

LAYERS = 3


class Block(nnx.Module):
  def __init__(self, rngs):
    self.norm = nnx.LayerNorm(6, rngs=rngs)
    self.a = nnx.Linear(6, 12, rngs=rngs)
    self.b = nnx.Linear(12, 6, rngs=rngs)

  def __call__(self, x):
    return x + self.b(nnx.relu(self.a(self.norm(x))))


class ConvBlock(nnx.Module):
  """One with a batch norm."""

  def __init__(self, rngs):
    self.conv = nnx.Conv(4, 4, (3,), rngs=rngs)
    self.norm = nnx.BatchNorm(4, rngs=rngs)

  def __call__(self, x):
    return x + nnx.relu(self.norm(self.conv(x)))


# What nnx.scan slices: all variables of a block, or its parameters alone.
AXES = {
  "all": lambda: 0,
  "parameters": lambda: nnx.StateAxes({nnx.Param: 0, ...: None}),
}


class Scanned(nnx.Module):
  """A stem and blocks, scanned."""

  def __init__(self, block=Block, axes="all", features=6, seed=0):
    @nnx.split_rngs(splits=LAYERS)
    @nnx.vmap(in_axes=(0,), out_axes=0)
    def stack(rngs):
      return block(rngs)

    self.stem = nnx.Linear(5, features, rngs=nnx.Rngs(seed + 1))
    self.blocks = stack(nnx.Rngs(seed))
    self.axes = axes

  def __call__(self, x):
    @nnx.scan(in_axes=(nnx.Carry, AXES[self.axes]()), out_axes=nnx.Carry)
    def run(x, block):
      return block(x)

    return run(self.stem(x), self.blocks)


class Listed(nnx.Module):
  """The same network with a list of blocks."""

  def __init__(self, scanned):
    graph, state = nnx.split(scanned.blocks)
    self.stem = nnx.clone(scanned.stem)
    self.blocks = nnx.List(
      nnx.merge(graph, jax.tree.map(lambda x, i=i: x[i], state))
      for i in range(LAYERS)
    )

  def __call__(self, x):
    x = self.stem(x)
    for block in self.blocks:
      x = block(x)
    return x


def listed(name):
  """The name of a layer of `Scanned` in `Listed`."""
  *path, last = name.split("/")
  return "/".join([path[0], last, *path[1:]]) if path else name
