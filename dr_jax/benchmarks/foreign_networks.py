"""Small networks of public Flax NNX packages, each as its package builds it.

Packages are imported when a network is built. Some start layers at zero, so
that nothing of an input would reach the output: every parameter has 0.05 times
a normal draw added.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx


class Network(NamedTuple):
  """A network of a package.

  Attributes:
    package: its name in the package index.
    module: what is imported.
    build: build(module, rngs), with random parameters.
    inputs: inputs(key), all positional arguments, of random values.
    output: output(returned), the array of its result that is compared.
    skip: layers that the model holds and does not call.
  """

  package: str
  module: str
  build: Callable[[Any, nnx.Rngs], nnx.Module]
  inputs: Callable[[jax.Array], tuple[Any, ...]]
  output: Callable[[Any], jax.Array] = lambda y: y
  skip: tuple[str, ...] = ()

  def model(self, seed: int = 0) -> nnx.Module:
    """The float network in inference mode; ImportError without its package."""
    rngs = nnx.Rngs(seed, encode=seed)
    model = self.build(importlib.import_module(self.module), rngs)
    draw = np.random.default_rng(seed)

    def shaken(p):
      noise = 0.05 * draw.standard_normal(p.shape)
      return jnp.asarray(np.asarray(p) + noise, p.dtype)

    nnx.update(model, jax.tree.map(shaken, nnx.state(model, nnx.Param)))
    model.eval()
    return model

  def function(self, model: nnx.Module) -> Callable[..., jax.Array]:
    """A model as a function of its inputs that changes nothing."""
    graph, state = nnx.split(model)
    return lambda *inputs: self.output(nnx.merge(graph, state)(*inputs))


_BATCH, _LENGTH, _VOCABULARY = 32, 16, 128


def _normal(*shape):
  return lambda key: (jax.random.normal(key, (_BATCH, *shape)),)


def _tokens(key):
  shape = (_BATCH, _LENGTH)
  return (jax.random.randint(key, shape, 0, _VOCABULARY),)


def _decoding(key):
  """Tokens, positions, no cache, causal mask."""
  mask = jnp.tril(jnp.ones((_LENGTH, _LENGTH), bool))
  return (
    *_tokens(key),
    jnp.broadcast_to(jnp.arange(_LENGTH), (_BATCH, _LENGTH)),
    None,
    jnp.broadcast_to(mask, (_BATCH, _LENGTH, _LENGTH)),
  )


def _first(outputs):
  return outputs[0]


_DECODER = {
  **{"num_layers": 2, "vocab_size": _VOCABULARY, "embed_dim": 64},
  **{"hidden_dim": 128, "num_heads": 4, "head_dim": 16, "num_kv_heads": 2},
}
_LLAMA = _DECODER | {"rope_theta": 10_000, "norm_eps": 1e-5}
_GEMMA = _DECODER | {"num_embed": _VOCABULARY, "param_dtype": jnp.float32}
_GEMMA["sliding_window_size"] = 8
del _GEMMA["vocab_size"]
_SIGLIP = {
  **{"image_height": 32, "image_width": 32, "patch_size": (8, 8)},
  **{"width": 64, "depth": 2, "mlp_dim": 128, "num_heads": 4},
  **{"num_mm_tokens_per_image_prepool": 16, "num_mm_tokens_per_image": 16},
}
_MAMBA = {"d_model": 64, "n_layers": 2, "d_state": 16, "headdim": 16}
_GRAPH_NODES = 192


def _timesfm(module, rngs):
  configs = importlib.import_module("timesfm.configs")
  norms = ("rms", "rms", "rms")
  config = configs.TransformerConfig(
    64, 128, 4, *norms, False, True, "swish", False
  )
  return module.Transformer(config, rngs=rngs)


def _graph(key):
  """Features of nodes, and edges."""
  features, edges = jax.random.split(key)
  return (
    jax.random.normal(features, (_GRAPH_NODES, 16)),
    jax.random.randint(edges, (2, 768), 0, _GRAPH_NODES),
  )


def _joint(key):
  """Time, values, node numbers, mask of what is given."""
  nodes = jnp.broadcast_to(jnp.arange(6), (_BATCH, 6))
  given = jnp.zeros((_BATCH, 6, 1), bool)
  return (jnp.full((_BATCH,), 0.3), *_normal(6, 8)(key), nodes, given)


def _flow(key):
  """Time, observed values and their numbers, given ones and theirs."""
  keys = jax.random.split(key)
  numbers = jnp.broadcast_to(jnp.arange(6)[:, None], (_BATCH, 6, 1))
  values = [x for k in keys for x in (*_normal(6, 8)(k), numbers)]
  return (jnp.full((_BATCH,), 0.3), *values)


def _flux(module, rngs):
  params = module.Flux1Params(
    **{"in_channels": 8, "vec_in_dim": None, "context_in_dim": 8},
    **{"mlp_ratio": 2, "num_heads": 4, "depth": 1, "depth_single_blocks": 2},
    **{"qkv_bias": True, "dim_obs": 6, "dim_cond": 6, "axes_dim": [16]},
    param_dtype=jnp.float32,
    rngs=rngs,
  )
  return module.Flux1(params)


def _simformer(module, rngs):
  params = module.SimformerParams(
    **{"in_channels": 8, "val_emb_dim": 24, "id_emb_dim": 24},
    **{"cond_emb_dim": 16, "dim_joint": 6, "num_heads": 4, "depth": 2},
    fourier_features=32,
    rngs=rngs,
  )
  return module.Simformer(params)


def _autoencoder(module, rngs):
  params = module.AutoEncoderParams(
    **{"resolution": 16, "in_channels": 3, "ch": 32, "out_ch": 3},
    **{"ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4},
    **{"scale_factor": 1.0, "shift_factor": 0.0},
    param_dtype=jnp.float32,
    rngs=rngs,
  )
  return module.AutoEncoder2D(params)


def _unet(module, rngs):
  config = module.UNet1DBackboneConfig(
    name="unet",
    hidden_dims=(16, 32, 64),
    activation="gelu",
    in_channels=2,
    time_embedding_dim=32,
  )
  return module.UNet1D(config, rngs=rngs)


def _timed(*shape, labels=False):
  times = (jnp.arange(float(_BATCH)), jnp.arange(_BATCH))
  return lambda key: (*_normal(*shape)(key), *times[: 1 + labels])


NETWORKS = {
  "Llama3": Network(
    "google-tunix",
    "tunix.models.llama3.model",
    lambda m, rngs: m.Llama3(m.ModelConfig(**_LLAMA), rngs=rngs),
    _decoding,
    _first,
  ),
  "Qwen3": Network(
    "google-tunix",
    "tunix.models.qwen3.model",
    lambda m, rngs: m.Qwen3(m.ModelConfig(**_LLAMA), rngs=rngs),
    _decoding,
    _first,
  ),
  "Gemma3": Network(
    "google-tunix",
    "tunix.models.gemma3.model",
    lambda m, rngs: m.Gemma3(m.ModelConfig(**_GEMMA), rngs=rngs),
    _decoding,
    _first,
  ),
  "SigLiP": Network(
    "google-tunix",
    "tunix.models.gemma3.vision",
    lambda m, rngs: m.SigLiP(
      m.SigLIPConfig(**_SIGLIP),
      rngs=rngs,
      shd_config=m.SigLIPShardingConfig.get_default_sharding(),
      apply_stop_gradient=False,
    ),
    _normal(1, 32, 32, 3),
  ),
  "Mamba2": Network(
    "mamba2-jax",
    "mamba2_jax.modeling",
    lambda m, rngs: m.Mamba2Forecaster(8, chunk_size=8, **_MAMBA, rngs=rngs),
    _normal(_LENGTH, 8),
    skip=("*/embedder", "*/conv1d/conv"),
  ),
  "Mamba3": Network(
    "mamba3-jax",
    "mamba3_jax.modeling",
    lambda m, rngs: m.Mamba3Forecaster(8, chunk_size=8, **_MAMBA, rngs=rngs),
    _normal(_LENGTH, 8),
    skip=("*/embedder",),
  ),
  "TimesFM block": Network(
    "timesfm",
    "timesfm.flax.transformer",
    _timesfm,
    lambda key: (*_normal(8, 64)(key), jnp.zeros((_BATCH, 8), bool)),
    _first,
  ),
  "ConvNet": Network(
    "bijx",
    "bijx.nn.nets",
    lambda m, rngs: m.ConvNet(
      3, 8, kernel_size=(3, 3), hidden_channels=[16, 16], rngs=rngs
    ),
    _normal(16, 16, 3),
  ),
  "ResNet": Network(
    "bijx",
    "bijx.nn.nets",
    lambda m, rngs: m.ResNet(16, 8, width=64, depth=4, rngs=rngs),
    _normal(8, 16),
  ),
  "GAT": Network(
    "jraphx",
    "jraphx.nn.models",
    lambda m, rngs: m.GAT(16, 32, 2, out_features=8, rngs=rngs),
    _graph,
  ),
  "GIN": Network(
    "jraphx",
    "jraphx.nn.models",
    lambda m, rngs: m.GIN(16, 32, 2, out_features=8, rngs=rngs),
    _graph,
  ),
  "Flux1": Network("gensbi", "gensbi.models.flux1.model", _flux, _flow),
  "Simformer": Network(
    "gensbi", "gensbi.models.simformer.model", _simformer, _joint
  ),
  "AutoEncoder2D": Network(
    "gensbi",
    "gensbi.experimental.models.autoencoders.autoencoder_2d",
    _autoencoder,
    lambda key: (*_normal(16, 16, 3)(key), jax.random.key(0)),
  ),
  "DiT": Network(
    "avitai-artifex",
    "artifex.generative_models.models.backbones.dit",
    lambda m, rngs: m.DiffusionTransformer(
      16, 4, 3, 64, 2, 4, num_classes=_BATCH, rngs=rngs
    ),
    _timed(16, 16, 3, labels=True),
  ),
  "UNet1D": Network(
    "avitai-artifex",
    "artifex.generative_models.models.backbones.unet_1d",
    _unet,
    _timed(32, 2),
  ),
}
