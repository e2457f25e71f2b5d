"""Names of our layers in PyTorch state dicts: one table per network.

A key is a regular expression for the path of a layer, or of a parameter that
stands alone; what it matches whole is named by the value. Layers with one name
lie in the same tensors, in the order of the table, along the first axis.
"""

from __future__ import annotations

import re
from typing import NamedTuple

from flax import nnx

from dr_jax import models


class Table(NamedTuple):
  """The names of one network.

  Attributes:
    owner: whose state dict it is, for messages.
    names: {path of a layer: its name there}.
  """

  owner: str
  names: dict[str, str]

  def name_of(self, path: str) -> tuple[str, int]:
    """The name of a layer, and its place among those of the table.

    >>> RESNET.name_of("stage1/block0/conv2")
    ('layer1.0.conv2', 3)
    """
    for place, (pattern, name) in enumerate(self.names.items()):
      if match := re.fullmatch(pattern, path):
        return match.expand(name), place
    raise LookupError(f"{path} is not in the table of {self.owner}")


# torchvision.models.resnet18 and its like.
RESNET = Table(
  "torchvision's ResNet",
  {
    "stem": "conv1",
    "stem_norm": "bn1",
    r"stage(\d+)/block(\d+)/norm(\d)": r"layer\1.\2.bn\3",
    r"stage(\d+)/block(\d+)/conv(\d)": r"layer\1.\2.conv\3",
    r"stage(\d+)/block(\d+)/shortcut": r"layer\1.\2.downsample.0",
    r"stage(\d+)/block(\d+)/shortcut_norm": r"layer\1.\2.downsample.1",
    "head": "fc",
  },
)

# Names as in github.com/kuangliu/pytorch-cifar, blocks as its PreActBlock; what
# comes after the last of three stages is "bn".
CIFAR_RESNET = Table(
  "a pre-activation CIFAR ResNet",
  {
    "stem": "conv1",
    r"stage(\d+)/block(\d+)/norm(\d)": r"layer\1.\2.bn\3",
    r"stage(\d+)/block(\d+)/conv(\d)": r"layer\1.\2.conv\3",
    r"stage(\d+)/block(\d+)/shortcut": r"layer\1.\2.shortcut.0",
    "norm": "bn",
    "head": "linear",
  },
)


# Of an inverted residual: the first of MobileNetV2 has no expansion.
_FIRST = {
  "depthwise": "0.0",
  "depthwise_norm": "0.1",
  "project": "1",
  "project_norm": "2",
}
_LATER = {
  "expand": "0.0",
  "expand_norm": "0.1",
  "depthwise": "1.0",
  "depthwise_norm": "1.1",
  "project": "2",
  "project_norm": "3",
}

# torchvision.models.mobilenet_v2.
MOBILENET = Table(
  "torchvision's MobileNetV2",
  {
    "stem": "features.0.0",
    "stem_norm": "features.0.1",
    **{
      f"block{number}/{layer}": f"features.{number + 1}.conv.{place}"
      for number in range(17)
      for layer, place in (_LATER if number else _FIRST).items()
    },
    "last": "features.18.0",
    "last_norm": "features.18.1",
    "head": "classifier.1",
  },
)

# timm's vit_tiny_patch16_224 and its like, and DeiT's without distillation.
VIT = Table(
  "timm's VisionTransformer",
  {
    "class_token": "cls_token",
    "positions": "pos_embed",
    "patches": "patch_embed.proj",
    r"blocks/(\d+)/attention_norm": r"blocks.\1.norm1",
    r"blocks/(\d+)/attention/query": r"blocks.\1.attn.qkv",
    r"blocks/(\d+)/attention/key": r"blocks.\1.attn.qkv",
    r"blocks/(\d+)/attention/value": r"blocks.\1.attn.qkv",
    r"blocks/(\d+)/attention/out": r"blocks.\1.attn.proj",
    r"blocks/(\d+)/up_norm": r"blocks.\1.norm2",
    r"blocks/(\d+)/up": r"blocks.\1.mlp.fc1",
    r"blocks/(\d+)/down": r"blocks.\1.mlp.fc2",
    "norm": "norm",
    "head": "head",
  },
)

# transformers.LlamaForCausalLM. It turns the pairs (x_i, x_{i + d/2}) of a
# head, as `models.transformer.rotate` does: queries and keys stay in order.
LLAMA = Table(
  "LlamaForCausalLM of Hugging Face",
  {
    "embed": "model.embed_tokens",
    r"blocks/(\d+)/attention_norm": r"model.layers.\1.input_layernorm",
    r"blocks/(\d+)/attention/query": r"model.layers.\1.self_attn.q_proj",
    r"blocks/(\d+)/attention/key": r"model.layers.\1.self_attn.k_proj",
    r"blocks/(\d+)/attention/value": r"model.layers.\1.self_attn.v_proj",
    r"blocks/(\d+)/attention/out": r"model.layers.\1.self_attn.o_proj",
    r"blocks/(\d+)/gated_norm": r"model.layers.\1.post_attention_layernorm",
    r"blocks/(\d+)/gated/gate": r"model.layers.\1.mlp.gate_proj",
    r"blocks/(\d+)/gated/up": r"model.layers.\1.mlp.up_proj",
    r"blocks/(\d+)/gated/down": r"model.layers.\1.mlp.down_proj",
    "norm": "model.norm",
    "head": "lm_head",
  },
)


def table_of(model: nnx.Module) -> Table | None:
  """The table of a network; None where there is none."""
  match model:
    case models.ImageNetResNet():
      return None if model.preactivation else RESNET
    case models.ResNet():
      return CIFAR_RESNET
    case models.MobileNetV2():
      return MOBILENET
    case models.ViT():
      return VIT
    case models.Transformer():
      return LLAMA
  return None
