"""Plain Flax NNX networks; they know nothing of quantization."""

from dr_jax.models.resnet import ResNet, resnet20, resnet32, resnet44, resnet56

__all__ = ["ResNet", "resnet20", "resnet32", "resnet44", "resnet56"]
