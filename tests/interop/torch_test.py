"""Transformers and CIFAR ResNets with the weights of their PyTorch kind."""

import re

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from torch_networks import Tensors, Torch

from dr_jax import models
from dr_jax.interop import torch_names
from dr_jax.interop.torch import load_weights

VIT = {"depth": 2, "width": 12, "heads": 3}
LLAMA = {
  **{"depth": 2, "width": 24, "heads": 6, "kv_heads": 2},
  **{"hidden": 20, "vocabulary": 11},
}


def draw(*shape):
  return np.random.default_rng(1).normal(size=shape).astype(np.float32)


def vit():
  """Network, its inputs, tensors of the reference, and its outputs."""
  tensors, images = Tensors(), draw(2, 3, 8, 8)
  expected = tensors.vit(images, patch=4, classes=5, **VIT)
  model = models.ViT(
    **VIT, image_size=8, patch_size=4, num_classes=5, rngs=nnx.Rngs(0)
  )
  return model, images.transpose(0, 2, 3, 1), tensors, expected


def llama():
  tensors = Tensors()
  tokens = np.random.default_rng(1).integers(0, 11, (2, 7))
  expected = tensors.llama(tokens, **LLAMA)
  model = models.Transformer(context=8, **LLAMA, rngs=nnx.Rngs(0))
  return model, tokens.astype(np.int32), tensors, expected


def cifar_resnet():
  torch, images = Torch(), draw(2, 3, 8, 8)
  expected = torch.cifar_resnet(jnp.asarray(images), 2, (4, 6, 8), 5)
  model = models.ResNet(14, widths=(4, 6, 8), num_classes=5, rngs=nnx.Rngs(0))
  return model, images.transpose(0, 2, 3, 1), torch.tensors, expected


# Names and shapes as the state dicts have them.
CASES = {
  "vit": (vit, 4 + 2 * 12 + 4, {"blocks.1.attn.qkv.weight": (36, 12)}),
  "llama": (
    llama,
    1 + 2 * 9 + 2,
    {"model.layers.1.self_attn.k_proj.weight": (8, 24)},
  ),
  # A norm has five tensors, one of them a counter.
  "cifar_resnet": (
    cifar_resnet,
    1 + 6 * 12 + 2 + 5 + 2,
    {"layer2.0.shortcut.0.weight": (6, 4)},
  ),
}


def save(path, tensors):
  safetensors.numpy.save_file(dict(tensors), path)
  return path


@pytest.mark.parametrize("name", CASES)
def test_a_network_gives_the_outputs_of_its_pytorch_kind(name, tmp_path):
  make, count, shapes = CASES[name]
  model, inputs, tensors, expected = make()
  assert len(tensors) == count
  for tensor, shape in shapes.items():
    assert tensors[tensor].shape[: len(shape)] == shape
  load_weights(model, save(tmp_path / "w.safetensors", tensors))
  model.eval()
  outputs = nnx.jit(lambda m, x: m(x))(model, jnp.asarray(inputs))
  # float32 sums in another order than the reference's.
  np.testing.assert_allclose(
    outputs, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )


def of_timm():
  timm = pytest.importorskip("timm", reason="needs timm")
  sizes = {"img_size": 32, "patch_size": 8, "num_classes": 7}
  network = timm.create_model(
    "vit_tiny_patch16_224", embed_dim=24, num_heads=3, depth=2, **sizes
  )
  model = models.ViT(
    **{"depth": 2, "width": 24, "heads": 3, "image_size": 32},
    **{"patch_size": 8, "num_classes": 7, "rngs": nnx.Rngs(0)},
  )
  images = draw(2, 3, 32, 32)
  return network, model, images, images.transpose(0, 2, 3, 1)


def of_hugging_face():
  transformers = pytest.importorskip(
    "transformers", reason="needs transformers"
  )
  network = transformers.LlamaForCausalLM(
    transformers.LlamaConfig(
      **{"vocab_size": 11, "hidden_size": 24, "intermediate_size": 20},
      **{"num_hidden_layers": 2, "num_attention_heads": 6},
      **{"num_key_value_heads": 2, "rms_norm_eps": 1e-6},
    )
  )
  tokens = np.random.default_rng(0).integers(0, 11, (2, 7))
  model = models.Transformer(context=8, **LLAMA, rngs=nnx.Rngs(0))
  return network, model, tokens, tokens.astype(np.int32)


@pytest.mark.parametrize("make", [of_timm, of_hugging_face])
def test_a_network_of_another_library_gives_the_same_outputs(make, tmp_path):
  torch = pytest.importorskip("torch", reason="needs PyTorch")
  torch.manual_seed(0)
  network, model, theirs, ours = make()
  with torch.no_grad():
    for value in network.state_dict().values():
      if value.ndim == 1:  # norms that are not ones, biases that are not zeros
        value += 0.5 * torch.rand(value.shape)
    expected = network.eval()(torch.from_numpy(theirs))
    expected = getattr(expected, "logits", expected).numpy()
  tensors = {key: value.numpy() for key, value in network.state_dict().items()}
  load_weights(model, save(tmp_path / "w.safetensors", tensors))
  outputs = nnx.jit(lambda m, x: m(x))(model, jnp.asarray(ours))
  np.testing.assert_allclose(
    outputs, expected, rtol=0, atol=1e-5 * np.abs(expected).max()
  )


@pytest.mark.parametrize(
  ("name", "tensor", "message"),
  [
    (
      "vit",
      "blocks.0.attn.qkv.bias",
      r"timm's VisionTransformer in the sizes of this ViT: of another shape: "
      r"blocks.0.attn.qkv.bias \[35\] instead of \[36\]$",
    ),
    ("vit", "pos_embed", r"pos_embed \[0, 5, 12\] instead of \[1, 5, 12\]$"),
    (
      "llama",
      "lm_head.weight",
      r"LlamaForCausalLM .* lm_head.weight \[10, 24\] instead of \[11, 24\]$",
    ),
    ("cifar_resnet", "bn.weight", r"CIFAR ResNet .* bn.weight \[7\] instead"),
  ],
)
def test_a_tensor_of_another_shape_is_named(name, tensor, message, tmp_path):
  model, _, tensors, _ = CASES[name][0]()
  tensors[tensor] = np.ascontiguousarray(tensors[tensor][:-1])
  path = save(tmp_path / "w.safetensors", tensors)
  with pytest.raises(ValueError, match=message) as caught:
    load_weights(model, path)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
  ("name", "missing"),
  [
    # An output that shares the embedding is not in the file.
    ("llama", "lm_head.weight"),
    ("vit", "cls_token"),
    # Post-activation networks have a norm after the first convolution alone.
    ("cifar_resnet", "bn.weight"),
  ],
)
def test_missing_and_unknown_tensors_are_named(name, missing, tmp_path):
  model, _, tensors, _ = CASES[name][0]()
  tensors[f"{missing}.of_another"] = tensors.pop(missing)
  path = save(tmp_path / "w.safetensors", tensors)
  pattern = f"missing: {missing}; unknown: {missing}.of_another$"
  with pytest.raises(ValueError, match=pattern):
    load_weights(model, path)


@pytest.mark.parametrize(
  "build",
  [
    lambda rngs: models.ResNet(8, num_classes=10, rngs=rngs),
    lambda rngs: models.ImageNetResNet(50, width=1, rngs=rngs),
    lambda rngs: models.MobileNetV2(width=0.1, rngs=rngs),
    lambda rngs: models.ViT(1, width=3, heads=1, rngs=rngs),
    lambda rngs: models.Transformer(
      depth=1, width=4, heads=1, kv_heads=1, rngs=rngs
    ),
  ],
)
def test_every_line_of_a_table_names_a_layer_of_its_network(build):
  model = nnx.eval_shape(lambda: build(nnx.Rngs(0)))
  table = torch_names.table_of(model)
  paths = ["/".join(map(str, path)) for path, _ in nnx.iter_graph(model)]
  for pattern in table.names:
    assert any(re.fullmatch(pattern, path) for path in paths), pattern
