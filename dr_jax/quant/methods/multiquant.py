"""MultiQuant: LSQ, trained at the lowest, a random and the highest bit-width.

Its quantizers are LSQ's; what is its own is the training: each step passes
through the lowest, a random and the highest bit-width, and lower ones learn
from labels made online. IJCAI 2022. The authors published no code, and the
abstract leaves open where the labels come from; both readings are recipes:

  multiquant          running means, by class, of the softmax of samples that
                      the highest bit-width classifies correctly
  multiquant_highest  the detached output of the highest bit-width
"""

from __future__ import annotations

from dr_jax.quant.registry import Recipe, register_recipe

for _name, _labels in (
  ("multiquant", "online_label_class_means"),
  ("multiquant_highest", "online_label_highest"),
):
  register_recipe(
    _name,
    Recipe(
      "lsq", schedule="accumulate", sampling="sandwich", distillation=_labels
    ),
  )
