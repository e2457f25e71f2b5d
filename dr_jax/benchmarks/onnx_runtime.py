"""How fast ONNX Runtime runs exported networks, compared with float files.

  python -m dr_jax.benchmarks.onnx_runtime --model=resnet20 [--bits=8]
      [--batch=32] [--rounds=50] [--threads=2]

Needs `pip install 'dr_jax[onnx]'`. All files are of one network with random
weights, and run in one process, in turn:

  float    the float network
  tool     what ONNX Runtime's own static quantization makes of that file: all
           layers and all sums in 8 bits, calibrated on random images
  exact    `deploy.export_onnx`: first and last layer and all sums in float, as
           the network is trained
  fused    the same with arithmetic="fused"

Milliseconds of one image, images per second of a batch, and how many of the
batch have the prediction of the network that JAX computes.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import pathlib
import tempfile
import time
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags
from flax import nnx

from dr_jax import deploy, nn, quant
from dr_jax.benchmarks.network import NAMES, Setting
from dr_jax.benchmarks.rows import Rows, prepared, turns
from dr_jax.pipeline.summary import environment
from dr_jax.runtime import command

_MODEL = flags.DEFINE_enum("model", "resnet20", NAMES, "Network.")
_BITS = flags.DEFINE_integer("bits", 8, "Bit-width of weights and inputs.")
_BATCH = flags.DEFINE_integer("batch", 32, "Images for throughput.")
_ROUNDS = flags.DEFINE_integer("rounds", 50, "Timed calls of each file.")
_THREADS = flags.DEFINE_integer("threads", 2, "Threads of ONNX Runtime.")

# Statistics of norms come from small images, whatever the network's own size.
_CALIBRATION = 8, 64


class Speed(NamedTuple):
  """What one file takes.

  Attributes:
    latency: seconds for one image, the median and the minimum of all rounds.
    throughput: images per second of a batch, of the median round.
    agreement: images of the batch with the prediction of its network.
  """

  latency: tuple[float, float]
  throughput: float
  agreement: int


def measure(
  setting: Setting, *, bits: int, batch: int, rounds: int, threads: int
) -> dict[str, Speed]:
  """Times the files of a network with random weights, in turn.

  Args:
    setting: the network; its candidate bit-widths must have `bits`.
    bits: of the exported files.
    batch: images for throughput.
    rounds: timed calls of each file.
    threads: of ONNX Runtime.

  Returns:
    {name of the file: its speed}.
  """
  with tempfile.TemporaryDirectory() as folder:
    root = pathlib.Path(folder)
    networks = prepared(setting.model, lambda: _write(root, setting, bits))
    sessions = {
      name: _session(root / f"{name}.onnx", threads) for name in networks
    }
    images = setting.batch(batch)["image"]
    seconds = {
      size: _seconds(sessions, images[:size], rounds) for size in (1, batch)
    }
    agreement = {
      name: _agreement(sessions[name], network, images)
      for name, network in networks.items()
    }
  return {
    name: Speed(
      (float(np.median(single)), min(single)),
      batch / float(np.median(seconds[batch][name])),
      agreement[name],
    )
    for name, single in seconds[1].items()
  }


def _write(root, setting, bits) -> dict[str, nnx.Module]:
  """Writes all files; returns the network that each has to agree with."""
  model = _normalized(setting)
  sample = _images(*_CALIBRATION)
  network = nn.quantize(
    model,
    weight=quant.double_rounding(setting.bits),
    activation=quant.lsq_activation(setting.bits),
    sample=sample,
  )
  nn.set_bits(network, bits)
  nn.recalibrate(network, [sample])
  deploy.save(root / "artifact", network)
  deployed = deploy.load(root / "artifact", bits=bits, model=model)
  shape = (setting.size, setting.size, 3)
  deploy.export_onnx(root / "float.onnx", model, shape)
  _quantize_by_tool(root, shape)
  for arithmetic in ("exact", "fused"):
    path = root / f"{arithmetic}.onnx"
    deploy.export_onnx(path, deployed, shape, arithmetic=arithmetic)
  return {
    "float": model,
    "tool": model,
    "exact": deployed,
    "fused": deployed,
  }


def _normalized(setting):
  """The float network with the statistics of random images."""
  model = setting.floating()
  norms = [
    module
    for _, module in nnx.iter_modules(model)
    if isinstance(module, nnx.BatchNorm)
  ]
  momenta = [norm.momentum for norm in norms]
  for norm in norms:
    norm.momentum = 0.0
  model.train()
  graph, state = nnx.split(model)

  @jax.jit
  def statistics(state, images):
    network = nnx.merge(graph, state)
    network(images)
    return nnx.state(network, nnx.BatchStat)

  nnx.update(model, statistics(state, _images(*_CALIBRATION)))
  for norm, momentum in zip(norms, momenta, strict=True):
    norm.momentum = momentum
  model.eval()
  return model


def _images(count, size):
  shape = (count, size, size, 3)
  return np.random.default_rng(0).standard_normal(shape, np.float32)


def _quantize_by_tool(root, shape):
  """ONNX Runtime's static quantization, per channel, in the QDQ format."""
  from onnxruntime import quantization

  class Reader(quantization.CalibrationDataReader):
    def __init__(self):
      images = _images(4, shape[0])
      self._batches = iter([{"input": image[None]} for image in images])

    def get_next(self) -> Any:
      return next(self._batches, None)

  level = logging.root.manager.disable
  logging.disable(logging.WARNING)  # advice on how to call it
  prepared = root / "prepared.onnx"
  try:
    quantization.quant_pre_process(
      root / "float.onnx", prepared, skip_symbolic_shape=True
    )
    quantization.quantize_static(
      prepared, root / "tool.onnx", Reader(), per_channel=True
    )
  finally:
    logging.disable(level)


def _session(path, threads):
  import onnxruntime

  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  options.log_severity_level = 3
  return onnxruntime.InferenceSession(
    os.fspath(path), options, providers=["CPUExecutionProvider"]
  )


def _seconds(sessions, images, rounds):
  """{file: seconds of every round}, all files in turn."""
  seconds = {name: [] for name in sessions}
  for number in turns(rounds + 1):  # the first call allocates
    for name, session in sessions.items():
      started = time.perf_counter()
      session.run(None, {"input": images})
      if number:
        seconds[name].append(time.perf_counter() - started)
  return seconds


def _agreement(session, network, images):
  (logits,) = session.run(None, {"input": images})
  graph, state = nnx.split(network)
  run = jax.jit(lambda state, x: nnx.merge(graph, state)(x))
  expected = run(state, images)
  return int((logits.argmax(-1) == np.asarray(expected).argmax(-1)).sum())


def print_table(
  name: str, bits: int, batch: int, speeds: dict[str, Speed]
) -> None:
  """Prints the speeds of `measure`, and their ratios to the float file's."""
  rows = Rows(
    f"{name} at {bits} bits, ONNX Runtime",
    (
      *("file", "ms, median", "of float", "ms, minimum", "of float"),
      *(f"images/s, batch {batch}", "of float", "same predictions"),
    ),
  )
  reference = speeds["float"]
  for file, (latency, throughput, agreement) in speeds.items():
    cells = []
    for mine, its in zip(latency, reference.latency, strict=True):
      cells += [f"{1e3 * mine:.2f}", f"{mine / its:.2f}"]
    share = f"{throughput / reference.throughput:.2f}"
    cells += [f"{throughput:.0f}", share, f"{agreement} of {batch}"]
    rows.add(file, *cells)
  rows.end()


def main():
  speeds = measure(
    Setting(_MODEL.value),
    bits=_BITS.value,
    batch=_BATCH.value,
    rounds=_ROUNDS.value,
    threads=_THREADS.value,
  )
  print_table(_MODEL.value, _BITS.value, _BATCH.value, speeds)
  version = importlib.metadata.version("onnxruntime")
  print(environment() | {"onnxruntime": version})


if __name__ == "__main__":
  command.start(main)
