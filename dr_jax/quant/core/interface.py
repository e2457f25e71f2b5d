"""The one interface of every method: a quantizer is a value of functions.

As in optax, a method is a factory that returns a NamedTuple of pure
functions. Two laws hold for every WeightQuantizer and are tested for each:

  decode(encode(params, w), i) == fake_quantize(params, w, i)   bit for bit
  fake_quantize(params, w, 2) == fake_quantize(params, w, jnp.int32(2))

(except for the sign of a zero, which integer codes do not have). `index` is
always a position in `bits`, a Python int or an int32 scalar; both work under
jit, vmap over the index, shard_map and every kind of mesh.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

Params = dict[str, jax.Array]
Encoded = dict[str, jax.Array]
Options = tuple[tuple[str, Any], ...]


class Storage(NamedTuple):
  """How the encoded arrays of one weight become bytes in a file, and back.

  Host functions on numpy arrays; `quant.storage` builds the usual one.

  Attributes:
    pack: `pack(encoded) -> packed`, a dict of arrays as a file holds them.
    unpack: `unpack(packed, shape) -> encoded`, the inverse; `shape` is that of
      the weight. ValueError for a stream of another length than it must have.
    size: `size(encoded, index) -> bytes` of a copy of the weight that serves
      only the bit-width at `index`.
    layout: `layout(encoded) -> packed`, both dicts of jax.ShapeDtypeStruct:
      what `pack` returns for arrays of these shapes. A stream whose length
      depends on the values is None: uint8 [bytes].
    ranges: (name, smallest, largest) of encoded arrays with bounds that their
      dtype does not have: what comes from a file is checked against them.
    planes: how many of the most significant bit-planes of "codes" the bit-width
      at each position needs; () where lower codes are not made of the top bits
      of the highest ones. Where they are, packed "codes" is uint8 [planes,
      bytes] (`quant.pack_planes`), and `unpack` takes the first ones alone:
      decoding what they need is then the same, bit for bit.
  """

  pack: Callable[[Encoded], dict[str, np.ndarray]]
  unpack: Callable[[dict[str, np.ndarray], tuple[int, ...]], Encoded]
  size: Callable[[Encoded, int], int]
  layout: Callable[[dict[str, Any]], dict[str, Any]]
  ranges: tuple[tuple[str, float, float], ...] = ()
  planes: tuple[int, ...] = ()


class Integers(NamedTuple):
  """An array as integers times a scale: what integer arithmetic computes with.

  `codes * scale` is the array that fake quantization gives, up to one rounding
  of the float product.

  Attributes:
    codes: int8 or uint8, in the shape of the array; int16 where the codes of
      some bit-width do not fit.
    scale: float32, broadcastable to the codes.
  """

  codes: jax.Array
  scale: jax.Array


class WeightQuantizer(NamedTuple):
  """A multi-precision weight quantizer.

  Attributes:
    bits: candidate bit-widths, highest first.
    init: `init(w) -> params`, the learned quantization parameters of a weight
      `w` [..., c_in, c_out]: a dict of float32 arrays, possibly empty. An
      entry named "scale" is positive: training keeps it in [SCALE_MIN,
      SCALE_MAX].
    fake_quantize: `fake_quantize(params, w, index) -> w_hat`, shape and dtype
      of w, differentiable in params and w.
    encode: `encode(params, w) -> encoded`, a dict of arrays: all that a
      deployed model stores.
    decode: `decode(encoded, index) -> w_hat` in float32, equal to
      fake_quantize bit for bit (after a cast to the dtype of w).
    stored_bits: bits per stored weight, without what a channel or layer costs;
      32 if a method must keep floats.
    storage: how encoded arrays become bytes.
    name: key in the registry: `get(name, **dict(options))` rebuilds this.
    options: keyword arguments of the factory, hashable and JSON-friendly.
    from_range: `from_range(low, high) -> params`, the parameters whose codes
      reach from `low` to `high`: floats that broadcast to w as a scale does.
      None where nothing is learned that depends on the range.
    integers: `integers(encoded, index) -> Integers`, the weight that `decode`
      returns. None where weights are not integers times one scale a channel.
  """

  bits: tuple[int, ...]
  init: Callable[[jax.Array], Params]
  fake_quantize: Callable[[Params, jax.Array, Any], jax.Array]
  encode: Callable[[Params, jax.Array], Encoded]
  decode: Callable[[Encoded, Any], jax.Array]
  stored_bits: int
  storage: Storage
  name: str = ""
  options: Options = ()
  from_range: Callable[[jax.Array, jax.Array], Params] | None = None
  integers: Callable[[Encoded, Any], Integers] | None = None


def _no_other_sign(signed: bool) -> ActivationQuantizer:
  raise NotImplementedError(
    "this activation quantizer has no with_sign: decorate its factory with "
    "quant.method, or pass with_sign"
  )


class ActivationQuantizer(NamedTuple):
  """A multi-precision activation quantizer.

  Attributes:
    bits: candidate bit-widths, highest first.
    init: `init(x) -> params` from one calibration batch; "scale" as above.
    fake_quantize: `fake_quantize(params, x, index) -> x_hat`, shape and dtype
      of x, differentiable in params and x.
    signed: True for codes -2^(b-1)..2^(b-1)-1, False for 0..2^b-1, None if
      undecided: `nn.quantize` decides it per layer by calibration.
    with_sign: `with_sign(signed) -> ActivationQuantizer`, the same method with
      that sign.
    name: key in the registry.
    options: keyword arguments of the factory.
    from_range: as in WeightQuantizer, of two scalars.
    integers: `integers(params, x, index) -> Integers`, codes and scale of what
      `fake_quantize` returns. None where inputs are not integers times one
      scale.
    dynamic: True where every row, the last axis of x, has a scale of its own,
      computed from it: that of `integers` is [..., 1] then. Layers pass inputs
      with everything that one of their sums runs over as the last axis.
  """

  bits: tuple[int, ...]
  init: Callable[[jax.Array], Params]
  fake_quantize: Callable[[Params, jax.Array, Any], jax.Array]
  signed: bool | None
  with_sign: Callable[[bool], ActivationQuantizer] = _no_other_sign
  name: str = ""
  options: Options = ()
  from_range: Callable[[jax.Array, jax.Array], Params] | None = None
  integers: Callable[[Params, jax.Array, Any], Integers] | None = None
  dynamic: bool = False
