"""Float weights from a safetensors file with torchvision's names.

  conv    [out, in/groups, kh, kw]  ->  kernel [kh, kw, in/groups, out]
  linear  [out, in]                 ->  kernel [in, out]
  norm    weight, bias, running_mean, running_var  ->  scale, bias, mean, var

Such a file is what `safetensors.torch.save_file(network.state_dict(), path)`
writes for a network of torchvision.models. Its running variances are unbiased
ones, which for batches of thousands of pixels is the same.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from dr_jax.models.imagenet_resnet import ImageNetResNet
from dr_jax.models.mobilenet import MobileNetV2

# torchvision's counter of batches, which averages do not need.
_IGNORED = ".num_batches_tracked"
# How many names an error lists.
_SHOWN = 3


def load_torchvision(model: nnx.Module, weights: str | os.PathLike) -> None:
  """Fills a float network with the weights of its torchvision counterpart.

  Every parameter and running statistic is set, and every tensor of the file is
  used exactly once. Tensors of other floating-point types become
  float32.

  Args:
    model: `MobileNetV2`, or `ImageNetResNet` with `preactivation=False`;
      changed in place, or not at all if something is wrong.
    weights: path of a safetensors file; a leading "~" is expanded.

  Raises:
    ValueError: if torchvision has no such network, or the file is missing,
      damaged, or of another network; one line names the tensors.
  """
  shown = f"weights={os.fspath(weights)!r}"
  weights = os.path.expanduser(weights)
  targets = _targets(model, shown)
  head = model.head  # pyrefly: ignore[missing-attribute]  # As _targets checks.
  tensors = _read(weights, shown)
  missing = [name for name in targets if name not in tensors]
  unknown = [name for name in tensors if name not in targets]
  wrong = [
    f"{name} {list(tensors[name].shape)} instead of {list(target.shape)}"
    for name, target in targets.items()
    if name in tensors and tensors[name].shape != target.shape
  ]
  bad = [
    name
    for name, tensor in tensors.items()
    if not jnp.issubdtype(tensor.dtype, jnp.floating)
    or not np.isfinite(tensor).all()
  ]
  faults = [
    f"{fault}: {_shortened(names)}"
    for fault, names in (
      ("missing", missing),
      ("unknown", unknown),
      ("of another shape", wrong),
      ("not finite floating-point numbers", bad),
    )
    if names
  ]
  if faults:
    raise ValueError(
      f"{shown} must have the tensors of torchvision's network with "
      f"{head.out_features} classes: {'; '.join(faults)}"
    )
  for name, target in targets.items():
    target.variable[...] = jnp.asarray(
      tensors[name].transpose(target.axes), target.variable[...].dtype
    )


class _Target(NamedTuple):
  """Where a tensor goes.

  Attributes:
    variable: of the network.
    shape: of the tensor.
    axes: transposition of the tensor to the variable's layout.
  """

  variable: nnx.Variable
  shape: tuple[int, ...]
  axes: tuple[int, ...]


def _targets(model: Any, shown: str) -> dict[str, _Target]:
  """Where each tensor goes, by torchvision's name."""
  if isinstance(model, MobileNetV2):
    name_of = _mobilenet_name
  elif isinstance(model, ImageNetResNet) and not model.preactivation:
    name_of = _resnet_name
  else:
    raise ValueError(
      f"{shown}: torchvision has no network like this {type(model).__name__}; "
      "it has MobileNetV2, and ImageNetResNet with preactivation=False"
    )
  targets = {}
  for path, module in nnx.iter_modules(model):
    if type(module) not in (nnx.Conv, nnx.Linear, nnx.BatchNorm):
      continue
    prefix = name_of(model, "/".join(map(str, path)))
    for suffix, variable, axes in _variables(module):
      shape = tuple(variable.shape[axes.index(n)] for n in range(len(axes)))
      targets[f"{prefix}.{suffix}"] = _Target(variable, shape, axes)
  return targets


def _variables(module: Any) -> list[tuple[str, Any, tuple[int, ...]]]:
  """(torch's name, variable, axes) of each array of a layer."""
  if type(module) is nnx.BatchNorm:
    names = ("weight", "bias", "running_mean", "running_var")
    variables = (module.scale, module.bias, module.mean, module.var)
    return [(n, v, (0,)) for n, v in zip(names, variables, strict=True)]
  axes: tuple[int, ...] = (1, 0)
  if type(module) is nnx.Conv:
    axes = (2, 3, 1, 0)
  found = [("weight", module.kernel, axes)]
  if module.bias is not None:
    found.append(("bias", module.bias, (0,)))
  return found


def _resnet_name(model, path):
  """stage1/block0/conv2 -> layer1.0.conv2."""
  names = {"stem": "conv1", "stem_norm": "bn1", "head": "fc"}
  if path in names:
    return names[path]
  stage, block, layer = path.split("/")
  layer = {"shortcut": "downsample.0", "shortcut_norm": "downsample.1"}.get(
    layer, layer.replace("norm", "bn")
  )
  return f"{stage.replace('stage', 'layer')}.{_number(block)}.{layer}"


def _mobilenet_name(model, path):
  """block3/project -> features.4.conv.2."""
  name = path.removesuffix("_norm")
  norm = int(name != path)
  if name == "head":
    return "classifier.1"
  if name in ("stem", "last"):
    return f"features.{0 if name == 'stem' else model.depth + 1}.{norm}"
  block, layer = name.split("/")
  order = ["expand", "depthwise", "project"]
  if getattr(model, block).expand is None:
    order.remove("expand")
  place = order.index(layer)
  # The projection and its norm stand by themselves, with no activation.
  inner = place + norm if layer == "project" else f"{place}.{norm}"
  return f"features.{_number(block) + 1}.conv.{inner}"


def _number(block):
  return int(block.removeprefix("block"))


def _read(weights, shown):
  """The tensors of a file by name, without the counters."""
  try:
    tensors = safetensors.numpy.load_file(weights)
  except (OSError, KeyError, TypeError, safetensors.SafetensorError) as error:
    raise ValueError(
      f"{shown} must be a safetensors file, and cannot be read: {error}"
    ) from None
  return {n: a for n, a in tensors.items() if not n.endswith(_IGNORED)}


def _shortened(names):
  more = len(names) - _SHOWN
  return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
