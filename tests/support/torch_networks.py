"""Networks of PyTorch, written out in its layout to compare with.

They know nothing of Flax: they draw the tensors that the definitions of
torchvision, kuangliu's pytorch-cifar, timm and Hugging Face ask for, by their
names, and compute with them as these do.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Torch:
  """Convolutional networks in inference mode; tensors are drawn when used."""

  def __init__(self, seed=0):
    self.rng = np.random.default_rng(seed)
    self.tensors = {}
    self.highest = 0.0

  def tensor(self, name, shape, low=None, high=None):
    if low is None:
      drawn = self.rng.normal(size=shape) / np.sqrt(np.prod(shape[1:]))
    else:
      drawn = self.rng.uniform(low, high, shape)
    return self.tensors.setdefault(name, drawn.astype(np.float32))

  def conv(self, x, name, c_out, size, stride=1, groups=1):
    shape = (c_out, x.shape[1] // groups, size, size)
    return lax.conv_general_dilated(
      x,
      jnp.asarray(self.tensor(f"{name}.weight", shape)),
      (stride, stride),
      [(size // 2, size // 2)] * 2,
      dimension_numbers=("NCHW", "OIHW", "NCHW"),
      feature_group_count=groups,
    )

  def norm(self, x, name):
    weight, bias, mean, var = (
      self.tensor(f"{name}.{suffix}", (x.shape[1],), *bounds).reshape(
        1, -1, 1, 1
      )
      for suffix, bounds in (
        ("weight", (0.5, 2.0)),
        ("bias", (-0.5, 0.5)),
        ("running_mean", (-0.5, 0.5)),
        ("running_var", (0.5, 2.0)),
      )
    )
    self.tensors[f"{name}.num_batches_tracked"] = np.asarray(7)
    x = np.asarray(x)
    return jnp.asarray((x - mean) / np.sqrt(var + 1e-5) * weight + bias)

  def linear(self, x, name, c_out):
    weight = self.tensor(f"{name}.weight", (c_out, x.shape[1]))
    return x @ weight.T + self.tensor(f"{name}.bias", (c_out,), -1, 1)

  def relu6(self, x):
    self.highest = max(self.highest, float(x.max()))
    return jnp.clip(x, 0.0, 6.0)

  def resnet(self, x, blocks, bottleneck, width, classes):
    x = jax.nn.relu(self.norm(self.conv(x, "conv1", width, 7, 2), "bn1"))
    pads = ((0, 0), (0, 0), (1, 1), (1, 1))
    x = lax.reduce_window(
      x, -jnp.inf, lax.max, (1, 1, 3, 3), (1, 1, 2, 2), pads
    )
    for stage, count in enumerate(blocks):
      planes = width * 2**stage
      for number in range(count):
        stride = 2 if stage and not number else 1
        x = self.block(
          x, f"layer{stage + 1}.{number}", planes, stride, bottleneck
        )
    return self.linear(np.asarray(x).mean((2, 3)), "fc", classes)

  def block(self, x, name, planes, stride, bottleneck):
    if bottleneck:
      c_out = 4 * planes
      y = self.norm(self.conv(x, f"{name}.conv1", planes, 1), f"{name}.bn1")
      y = self.conv(jax.nn.relu(y), f"{name}.conv2", planes, 3, stride)
      y = jax.nn.relu(self.norm(y, f"{name}.bn2"))
      y = self.norm(self.conv(y, f"{name}.conv3", c_out, 1), f"{name}.bn3")
    else:
      c_out = planes
      y = self.conv(x, f"{name}.conv1", planes, 3, stride)
      y = jax.nn.relu(self.norm(y, f"{name}.bn1"))
      y = self.norm(self.conv(y, f"{name}.conv2", planes, 3), f"{name}.bn2")
    if stride != 1 or x.shape[1] != c_out:
      x = self.conv(x, f"{name}.downsample.0", c_out, 1, stride)
      x = self.norm(x, f"{name}.downsample.1")
    return jax.nn.relu(x + y)

  def cifar_resnet(self, x, blocks, widths, classes):
    x = self.conv(x, "conv1", widths[0], 3)
    for stage, planes in enumerate(widths):
      for number in range(blocks):
        name = f"layer{stage + 1}.{number}"
        stride = 2 if stage and not number else 1
        y = jax.nn.relu(self.norm(x, f"{name}.bn1"))
        if stride != 1:
          x = self.conv(y, f"{name}.shortcut.0", planes, 1, stride)
        y = self.norm(
          self.conv(y, f"{name}.conv1", planes, 3, stride), f"{name}.bn2"
        )
        x += self.conv(jax.nn.relu(y), f"{name}.conv2", planes, 3)
    x = jax.nn.relu(self.norm(x, "bn"))
    return self.linear(np.asarray(x).mean((2, 3)), "linear", classes)

  def mobilenet(self, x, classes):
    """At width_mult=0.25: channels are multiples of 8, the last are 1280."""
    settings = [
      *((1, 8, 1, 1), (6, 8, 2, 2), (6, 8, 3, 2), (6, 16, 4, 2)),
      *((6, 24, 3, 1), (6, 40, 3, 2), (6, 80, 1, 1)),
    ]
    x = self.unit(x, "features.0", 8, 3, 2)
    place = 1
    for t, c, n, s in settings:
      for number in range(n):
        x = self.inverted(x, f"features.{place}.conv", t, c, 1 if number else s)
        place += 1
    x = self.unit(x, f"features.{place}", 1280, 1)
    return self.linear(np.asarray(x).mean((2, 3)), "classifier.1", classes)

  def unit(self, x, name, c_out, size, stride=1, groups=1):
    x = self.conv(x, f"{name}.0", c_out, size, stride, groups)
    return self.relu6(self.norm(x, f"{name}.1"))

  def inverted(self, x, name, t, c_out, stride):
    y, hidden = x, t * x.shape[1]
    if t != 1:
      y = self.unit(y, f"{name}.0", hidden, 1)
    at = int(t != 1)
    y = self.unit(y, f"{name}.{at}", hidden, 3, stride, hidden)
    y = self.norm(
      self.conv(y, f"{name}.{at + 1}", c_out, 1), f"{name}.{at + 2}"
    )
    return x + y if stride == 1 and x.shape[1] == c_out else y


class Tensors(dict):
  """float32 tensors of a transformer by name, drawn when used."""

  def __init__(self, seed=0):
    super().__init__()
    self.rng = np.random.default_rng(seed)

  def draw(self, name, *shape, scale=1.0):
    drawn = self.rng.normal(size=shape) * scale
    return self.setdefault(name, drawn.astype(np.float32)).astype(np.float64)

  def linear(self, x, name, c_out, bias=True):
    y = x @ self.draw(f"{name}.weight", c_out, x.shape[-1], scale=0.3).T
    return y + self.draw(f"{name}.bias", c_out) if bias else y

  def layer_norm(self, x, name):
    x = x - x.mean(-1, keepdims=True)
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    width = x.shape[-1]
    return x * self.draw(f"{name}.weight", width) + self.draw(
      f"{name}.bias", width
    )

  def rms_norm(self, x, name):
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
    return x * self.draw(f"{name}.weight", x.shape[-1])

  def vit(self, x, *, depth, width, heads, patch, classes):
    """timm's VisionTransformer: images [n, c, h, w] -> logits."""
    n, c, height, _ = x.shape
    grid = height // patch
    weight = self.draw("patch_embed.proj.weight", width, c, patch, patch)
    x = x.reshape(n, c, grid, patch, grid, patch)
    x = np.einsum("ncgphq,wcpq->nghw", x, weight).reshape(n, -1, width)
    x = x + self.draw("patch_embed.proj.bias", width)
    first = np.repeat(self.draw("cls_token", 1, 1, width), n, 0)
    x = np.concatenate([first, x], 1)
    x = x + self.draw("pos_embed", 1, x.shape[1], width)
    for number in range(depth):
      name = f"blocks.{number}"
      y = self.linear(
        self.layer_norm(x, f"{name}.norm1"), f"{name}.attn.qkv", 3 * width
      )
      q, k, v = y.reshape(n, -1, 3, heads, width // heads).transpose(
        2, 0, 3, 1, 4
      )
      x = x + self.linear(attention(q, k, v), f"{name}.attn.proj", width)
      y = self.layer_norm(x, f"{name}.norm2")
      y = np.asarray(
        jax.nn.gelu(self.linear(y, f"{name}.mlp.fc1", 4 * width), False)
      )
      x = x + self.linear(y, f"{name}.mlp.fc2", width)
    return self.linear(self.layer_norm(x, "norm")[:, 0], "head", classes)

  def llama(self, tokens, *, depth, width, heads, kv_heads, hidden, vocabulary):
    """LlamaForCausalLM of Hugging Face: tokens [n, t] -> logits."""
    n, t = tokens.shape
    d = width // heads
    x = self.draw("model.embed_tokens.weight", vocabulary, width)[tokens]
    angles = np.outer(np.arange(t), 10_000.0 ** (-np.arange(0, d, 2) / d))
    angles = np.concatenate([angles, angles], -1)

    def turned(x):
      half = np.concatenate([-x[..., d // 2 :], x[..., : d // 2]], -1)
      return x * np.cos(angles) + half * np.sin(angles)

    def split(x):
      return x.reshape(n, t, -1, d).transpose(0, 2, 1, 3)

    for number in range(depth):
      name = f"model.layers.{number}"
      y = self.rms_norm(x, f"{name}.input_layernorm")
      q, k, v = (
        split(self.linear(y, f"{name}.self_attn.{p}_proj", h * d, bias=False))
        for p, h in (("q", heads), ("k", kv_heads), ("v", kv_heads))
      )
      k, v = (np.repeat(a, heads // kv_heads, 1) for a in (turned(k), v))
      y = attention(turned(q), k, v, causal=True)
      x = x + self.linear(y, f"{name}.self_attn.o_proj", width, bias=False)
      y = self.rms_norm(x, f"{name}.post_attention_layernorm")
      gate, up = (
        self.linear(y, f"{name}.mlp.{part}_proj", hidden, bias=False)
        for part in ("gate", "up")
      )
      y = gate / (1 + np.exp(-gate)) * up
      x = x + self.linear(y, f"{name}.mlp.down_proj", width, bias=False)
    x = self.rms_norm(x, "model.norm")
    return self.linear(x, "lm_head", vocabulary, bias=False)


def attention(q, k, v, causal=False):
  """Of heads [n, heads, t, d]; their outputs in a row, [n, t, heads d]."""
  scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
  if causal:
    scores = np.where(np.tri(scores.shape[-1]) > 0, scores, -np.inf)
  scores = np.exp(scores - scores.max(-1, keepdims=True))
  y = scores / scores.sum(-1, keepdims=True) @ v
  return y.swapaxes(1, 2).reshape(len(y), y.shape[2], -1)
