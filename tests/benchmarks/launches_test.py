"""How kernels of a compiled step are counted, and how many there are."""

import functools

import jax
import optax
import training_network as net
from flax import nnx
from tables import cells, printed

from dr_jax import nn
from dr_jax.benchmarks import hlo, launches
from dr_jax.train import make_optimizer, make_trainer

# As XLA writes programs: a fused sum, a convolution of cuDNN, another layout.
TEXT = """HloModule jit_step, is_scheduled=true

FileNames
1 "/site/dr_jax/train/gradients.py"
2 "/site/dr_jax/nn/norm.py"
3 "/site/flax/nnx/nn/linear.py"

FunctionNames
1 "_loss"
2 "BatchNorm.__call__"
3 "Conv.__call__"

FileLocations
1 {file_name_id=1 function_name_id=1 line=7}
2 {file_name_id=2 function_name_id=2 line=8}
3 {file_name_id=3 function_name_id=3 line=9}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=2}

%fused (p: f32[8,4]) -> f32[4] {
  %p = f32[8,4]{1,0} parameter(0)
  %c = f32[] constant(0)
  ROOT %r = f32[4]{0} reduce(%p, %c), dimensions={0}, to_apply=%add
}

ENTRY %main (x: f32[8,4]) -> (f32[4], f32[8,4]) {
  %x = f32[8,4]{1,0} parameter(0), metadata={op_name="x"}
  %sum = f32[4]{0} fusion(%x), kind=kInput, calls=%fused, \
metadata={op_name="jit(step)/jvp()/reduce_sum" stack_frame_id=2}
  %cudnn = (f32[8,4]{1,0}, u8[0]{0}) custom-call(%x), \
custom_call_target="__cudnn$convBackwardInput", \
metadata={op_name="jit(step)/transpose(jvp())/conv" stack_frame_id=3}
  %dx = f32[8,4]{1,0} get-tuple-element(%cudnn), index=0
  %layout = f32[8,4]{0,1} copy(%dx)
  ROOT %out = (f32[4]{0}, f32[8,4]{0,1}) tuple(%sum, %layout)
}
"""


def test_kernels_have_their_kind_and_the_traceback_of_their_last_operation():
  norm, convolution, copy = hlo.kernels(TEXT)
  loss = "/site/dr_jax/train/gradients.py, _loss"
  assert norm == hlo.Kernel(
    "reduction", False, ("/site/dr_jax/nn/norm.py, BatchNorm.__call__", loss)
  )
  assert convolution == hlo.Kernel(
    "convolution", True, ("/site/flax/nnx/nn/linear.py, Conv.__call__", loss)
  )
  assert copy == hlo.Kernel("copy", False, ())
  assert list(map(launches.part_of, (norm, convolution, copy))) == [
    *("norms", "network, backward", "layouts")
  ]


@functools.cache
def _kernels(quantized):
  model = net.quantized() if quantized else net.Net(nnx.Rngs(0))
  network = nn.functional(model)
  trainer = make_trainer(
    network,
    make_optimizer("sgd", param_labels=network.param_labels),
    optax.constant_schedule(0.1),
    vectorize="unroll",
    alrs="eta" if quantized else "none",
  )
  state = jax.eval_shape(trainer.init, jax.random.key(0))
  text = trainer.lower(state, net.batch(0)).compile().as_text()
  return hlo.kernels(text)


def test_a_joint_step_takes_a_tenth_more_kernels_than_its_float_passes():
  floating, joint = len(_kernels(False)), len(_kernels(True))
  assert joint <= 1.1 * len(net.BITS) * floating


def test_statistics_of_a_norm_are_updated_once_for_all_passes():
  updates = [
    kernel
    for kernel in _kernels(True)
    if kernel.frames and "BatchNorm._update" in kernel.frames[0]
  ]
  # Mean and variance of two norms.
  assert len(updates) <= 4


def test_kernels_are_counted_by_kind_and_by_part():
  names = ("float", "single 8", "joint alternate", "joint accumulate")
  found = dict.fromkeys(names, ["copy"] * 3) | {names[2]: ["copy"] * 4}
  kinds = ("product", "copy")
  table = printed(launches.print_counts, "title", "kind", kinds, found, 2)
  assert cells(table, "product") == ["0", "0", "0", "0", ""]
  for row in ("copy", "all"):
    assert cells(table, row) == ["3", "3", "4", "3", "0.67"]
