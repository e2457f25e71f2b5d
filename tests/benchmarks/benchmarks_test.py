"""Benchmarks of named networks and of scaling; what they time is not tested."""

import json
import os
import pathlib
import subprocess
import sys
import time
import types

import jax
import numpy as np
import pytest
import quick_compilation
import training_network
from tables import cells, printed

from dr_jax.benchmarks import (
  compilations,
  compile_time,
  concurrent_load,
  images,
  inference,
  loopback,
  network,
  on_disk,
  planes,
  post_training,
  scaling,
  throughput,
)
from dr_jax.benchmarks.peak import fraction_of_peak, peak
from dr_jax.checkpoint.checkpoints import Checkpoints
from dr_jax.data import batching
from dr_jax.runtime import sharding
from dr_jax.runtime.metrics import MetricsWriter
from dr_jax.train import loop

ROOT = pathlib.Path(__file__).parents[2]
SMALL = network.Setting("resnet8", image_size=8, bits=(4, 2))
# One column across: stem, head; three stages of 6 convolutions each, but two
# of them begin with half the channels and have a shortcut of one pixel.
RESNET20_MACS = (
  32 * 32 * 9 * 3 * 16
  + 6 * 32 * 32 * 9 * 16 * 16
  + 16 * 16 * (16 * 32 * (9 + 1) + 5 * 9 * 32 * 32)
  + 8 * 8 * (32 * 64 * (9 + 1) + 5 * 9 * 64 * 64)
  + 64 * 10
)


@pytest.mark.parametrize(
  ("kind", "dtype", "tera"),
  [
    ("NVIDIA A100-SXM4-40GB", "bfloat16", 312),
    ("NVIDIA A100 80GB PCIe", "float32", 156),
    ("NVIDIA H100 80GB HBM3", "bfloat16", 989),
    ("NVIDIA H100 80GB HBM3", "float32", 495),
    ("NVIDIA H100 PCIe", "bfloat16", 756),
    ("NVIDIA H100 NVL", "float32", 418),
    ("NVIDIA H200", "bfloat16", 989),
    ("NVIDIA L4", "bfloat16", 121),
    ("Tesla T4", "float32", 8.1),
    ("TPU v4", "bfloat16", 275),
    ("TPU v5 lite", "bfloat16", 197),
    ("TPU v5", "bfloat16", 459),
    ("TPU v5p", "float32", 459),
    ("TPU v6 lite", "bfloat16", 918),
  ],
)
def test_peaks_of_devices_are_found_by_their_names(kind, dtype, tera):
  assert peak(kind, dtype) == pytest.approx(tera * 1e12)


@pytest.mark.parametrize(
  ("kind", "dtype"),
  [
    ("cpu", "float32"),
    ("NVIDIA L40S", "bfloat16"),
    ("NVIDIA A1000", "bfloat16"),
    ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", "bfloat16"),
    ("Tesla T4", "bfloat16"),
    ("TPU v7x", "bfloat16"),
  ],
)
def test_devices_that_are_not_in_the_table_have_no_known_peak(kind, dtype):
  assert peak(kind, dtype) is None


def test_the_fraction_of_the_peak_counts_three_passes_at_every_bit_width():
  # 2 operations x 3 passes x 4 bit-widths x 10^9 x 100 per second = 2.4e12.
  assert fraction_of_peak(10**9, 100.0, 4, 1e13) == pytest.approx(0.24)


@pytest.mark.slow
def test_every_layer_counts_in_the_products_of_a_network():
  assert network.Setting("resnet20").macs() == RESNET20_MACS


@pytest.mark.parametrize(
  ("model", "size", "classes"),
  [("resnet8", 32, 10), ("resnet50", 224, 1000), ("mobilenetv2", 224, 1000)],
)
def test_each_network_has_its_image_size_and_classes(model, size, classes):
  setting = network.Setting(model)
  assert (setting.size, setting.classes) == (size, classes)
  batch = network.Setting(model, 16).batch(3)
  assert batch["image"].shape == (3, 16, 16, 3)
  assert batch["image"].dtype == np.float32


def test_dtype_is_that_of_the_computation():
  half = SMALL._replace(dtype="bfloat16").floating()
  assert half.stem.dtype == "bfloat16"


def test_modes_are_all_or_the_named_ones():
  assert throughput.modes([]) == list(throughput.MODES)
  assert throughput.modes([], quick=True, vmap=False) == [
    ("alternate", "sequential"),
    ("accumulate", "sequential"),
  ]
  assert throughput.modes(["accumulate/vmap"], quick=True, vmap=False) == [
    ("accumulate", "vmap")
  ]
  with pytest.raises(ValueError, match="modes must be of .* got fast"):
    throughput.modes(["fast"])


@pytest.mark.slow
def test_a_network_is_timed_on_all_devices():
  layout = sharding.layout()
  assert layout.data == 4  # by conftest
  measured = throughput.measure(
    SMALL, layout, 8, [("alternate", "sequential")], rounds=2, steps=3
  )
  assert [row.name for row in measured] == [
    "float",
    "joint alternate sequential",
  ]
  assert [row.passes for row in measured] == [1, 2]
  for row in measured:
    assert len(row.seconds) == 2
    assert 0 < min(row.seconds) < row.first_seconds  # which compiled
  text = printed(throughput.print_table, SMALL, layout, 8, measured)
  assert "4 x cpu, float32" in text
  assert "peak" not in text
  speed = 8 / np.median(measured[0].seconds)
  assert float(cells(text, "float")[0]) == pytest.approx(speed, abs=0.5)


def test_a_batch_that_devices_do_not_divide_raises():
  with pytest.raises(ValueError, match="batch_size must be a multiple.*got 6"):
    throughput.measure(SMALL, sharding.layout(), 6, [], rounds=1, steps=1)


def fake(kind):
  """A layout of two devices of a kind."""
  device = types.SimpleNamespace(platform="gpu", device_kind=kind)
  devices = np.array([device, device])
  return types.SimpleNamespace(mesh=types.SimpleNamespace(devices=devices))


MEASURED = [
  throughput.Measured("float", 1, [0.01, 0.02, 0.03], 5.0),
  throughput.Measured("joint", 4, [0.08], 5.0),
  throughput.Measured("large", 4, [], 0.0),
]


def test_fractions_are_of_the_peak_of_all_devices():
  setting = network.Setting("resnet20", dtype="bfloat16")
  layout = fake("NVIDIA L4")
  text = printed(throughput.print_table, setting, layout, 20_000, MEASURED)
  # 20,000 images in 0.02 s, and 20,000 at four bit-widths in 0.08 s.
  fraction = 6 * RESNET20_MACS * 1e6 / (2 * 121e12)
  assert cells(text, "float")[-1] == f"{100 * fraction:.1f} %"
  assert cells(text, "joint")[-1] == f"{100 * fraction:.1f} %"
  assert cells(text, "large")[0] == "out of memory"
  assert "242 TFLOP/s" in text


def test_a_device_without_a_published_peak_has_no_fraction():
  layout = fake("NVIDIA L40S")
  text = printed(throughput.print_table, SMALL, layout, 8, MEASURED)
  assert "unknown peak" in text
  assert "of peak" not in text


def test_a_step_out_of_memory_is_reported_in_the_table():
  def fails(message):
    def run(count):
      raise jax.errors.JaxRuntimeError(message)

    return run

  full = fails("RESOURCE_EXHAUSTED: Out of memory allocating 8 bytes")
  assert throughput._until_ready(full) is None
  with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
    throughput._until_ready(fails("INTERNAL: broken"))


@pytest.mark.slow
@pytest.mark.parametrize("devices", [1, 2])
def test_scaling_trains_equally_many_images_on_every_device(devices):
  layout = sharding.layout(devices=jax.devices()[:devices])
  speed = scaling.measure(SMALL, layout, 3, 2)
  images = speed.images_per_second * speed.step_seconds
  assert images == pytest.approx(3 * devices)
  assert (speed.sum_seconds > 0) == (devices > 1)


def test_efficiency_is_speed_per_device_relative_to_one():
  speeds = [scaling.Speed(100, 0.16, 0), scaling.Speed(150, 0.21, 0.0314)]
  text = printed(
    scaling.print_table,
    SMALL,
    16,
    "processes",
    zip([1, 2], speeds, strict=True),
  )
  assert cells(text, "1") == ["100.0", "100.0", "1.00", "0.160", ""]
  assert cells(text, "2") == ["150.0", "75.0", "0.75", "0.210", "0.031"]


@pytest.mark.parametrize("text", ["0", "two", "-1"])
def test_counts_are_whole_numbers_from_one(text):
  assert scaling.numbers("processes", ["1", "4"]) == [1, 4]
  with pytest.raises(
    ValueError, match=f"processes must be integers >= 1, got {text}"
  ):
    scaling.numbers("processes", ["1", text])


@pytest.fixture
def program(tmp_path, monkeypatch):
  """Writes a module that processes can run; returns its name."""

  def write(source):
    (tmp_path / "program.py").write_text(source)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return "program"

  return write


def test_every_process_has_its_core_and_all_addresses(program):
  name = program(
    "import json, os, sys, time\n"
    "names = 'JAX_COORDINATOR_ADDRESS JAX_NUM_PROCESSES JAX_PROCESS_ID'\n"
    "seen = [os.environ[name] for name in names.split()]\n"
    "cores = sorted(os.sched_getaffinity(0))\n"
    "open(sys.argv[1] + seen[2], 'w').write(json.dumps([seen, cores]))\n"
    "print('number', seen[2])\n"
  )
  folder = pathlib.Path(os.environ["PYTHONPATH"])
  before = loopback.cores()
  count = len(before) + 1
  assert loopback.run(name, [f"{folder}/"], count) == "number 0\n"
  assert loopback.cores() == before
  found = [json.loads((folder / str(n)).read_text()) for n in range(count)]
  assert [seen[1:] for seen, _ in found] == [
    [str(count), str(n)] for n in range(count)
  ]
  assert len({seen[0] for seen, _ in found}) == 1
  assert [cores for _, cores in found] == [[c] for c in (*before, before[0])]


def test_a_single_process_gets_no_addresses(program, monkeypatch):
  monkeypatch.setenv("JAX_NUM_PROCESSES", "3")
  name = program("import os; print(repr(os.environ['JAX_NUM_PROCESSES']))")
  assert loopback.run(name, [], 1) == "''\n"


def test_one_failed_process_ends_the_others(program, tmp_path):
  name = program(
    "import os, pathlib, sys, time\n"
    "here = pathlib.Path(__file__).parent / 'pid'\n"
    "if os.environ['JAX_PROCESS_ID'] == '0':\n"
    "  (here.parent / 'part').write_text(str(os.getpid()))\n"
    "  (here.parent / 'part').rename(here)\n"
    "  time.sleep(600)\n"
    "while not here.exists(): time.sleep(0.01)\n"
    "sys.exit('first\\nno room')\n"
  )
  with pytest.raises(ValueError, match="processes=2: .* code 1 .*: no room$"):
    loopback.run(name, [], 2)
  with pytest.raises(ProcessLookupError):
    os.kill(int((tmp_path / "pid").read_text()), 0)


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
  root = tmp_path_factory.mktemp("photographs")
  assert len(images.write(root)) == images.COUNT
  return root


@pytest.fixture(scope="module")
def trained(photographs):
  """With all its programs compiled."""
  network = concurrent_load.Trained(SMALL, batch_size=2, workers=1)
  network.looped(1, concurrent_load.KINDS[-1], photographs)
  return network


@pytest.mark.slow
@pytest.mark.parametrize(
  ("kind", "owner", "method", "delay"),
  [
    (0, loop._Losses, "_take", 0.4),
    (1, MetricsWriter, "write", 0.2),
    (2, Checkpoints, "save", 4.0),
    (3, batching.Batches, "stream", 0.5),
  ],
)
def test_waiting_in_a_step_shows_in_its_time(
  trained, photographs, monkeypatch, kind, owner, method, delay
):
  """Of eight timed steps, the second is saved; one writes three numbers.

  Waits are longer than steps, which may go on meanwhile.
  """
  before = trained.looped(8, concurrent_load.KINDS[kind], photographs)
  plain = getattr(owner, method)

  def slow(*args, **kwargs):
    result = plain(*args, **kwargs)
    if method == "stream":
      return (time.sleep(delay) or batch for batch in result)
    time.sleep(delay)
    return result

  monkeypatch.setattr(owner, method, slow)
  assert (
    trained.looped(8, concurrent_load.KINDS[kind], photographs) > before + 0.15
  )


def test_ratios_are_of_the_same_round():
  shown = printed(
    concurrent_load.print_table,
    {"alone": [1.0, 2.0], "loop": [2.0, 2.0]},
    "title",
  )
  assert cells(shown, "loop") == ["2000.0", "1.50"]


def test_products_with_planes_are_compared_with_float_products():
  rows = planes.measured((1, 64, 32), [4, 2], "half_up", rounds=1)
  names = ["bfloat16", "float32", "4 bits, xla", "2 bits, xla"]
  assert [row.name for row in rows] == names
  codes = 64 * 32 // 8  # bytes of one plane
  others = 4 * 32 + 2 * (64 + 32)
  assert [row.moved for row in rows] == [
    *(2 * (64 + 64 * 32 + 32), 4 * (64 + 64 * 32 + 32)),
    *(5 * codes + others, 3 * codes + others),
  ]
  rows = [
    planes.Row(name, seconds, 10**6)
    for name, seconds in zip(names, (1e-3, 2e-3, 5e-4, 4e-4), strict=True)
  ]
  shown = printed(planes.print_table, rows, "title")
  assert cells(shown, names[0]) == ["1.0000", "1.00", "1.0", "1.00", "0.50"]
  assert cells(shown, names[2]) == ["0.5000", "1.00", "2.0", "0.50", "0.25"]


def test_compilation_is_measured_of_all_programs_of_a_first_step():
  model, batch = training_network.quantized(), training_network.batch()
  first = compile_time.measure(model, batch, "accumulate", "sequential")
  assert (first.layers, first.passes, first.auto) == (2, 2, True)
  # Zeros, one pass, the update, and the stack of losses if it was not yet.
  for seconds in first.compilations:
    assert len(seconds) in (3, 4) and min(seconds) > 0
  assert first.cpu_seconds > sum(map(sum, first.compilations))
  assert first.seconds > 0


def test_a_row_has_the_sums_of_all_programs():
  programs = compilations.Compilations([1.0, 2.0], [0.2, 0.3], [3.5, 0.0])
  first = compile_time.FirstStep(52, 4, programs, 8.0, 40.0, False)
  expected = ["52", "4", "2", "3.0", "0.5", "3.5", "8.0", "40.0"]
  assert compile_time.cells(first) == [*expected, ""]
  assert compile_time.cells(first._replace(auto=True)) == [*expected, "yes"]


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("8x", "bits must be like 8642, got '8x'"),
    ("48", r"bits must be .* highest first, got \[4, 8\]"),
  ],
)
def test_sets_of_bits_are_digits_from_high_to_low(text, message):
  assert compile_time.numbers("842") == (8, 4, 2)
  with pytest.raises(ValueError, match=message):
    compile_time.numbers(text)


@pytest.mark.parametrize(
  ("texts", "message"),
  [
    (["8", "x"], "bits must be integers, got 'x'"),
    (["8", ""], "bits must be integers, got ''"),
    (["2", "8"], "bits must be .* highest first, got"),
  ],
)
def test_lists_of_bits_are_integers_from_high_to_low(texts, message):
  with pytest.raises(ValueError, match=message):
    network.bit_widths(texts)


def command(name, *arguments):
  return subprocess.run(
    [sys.executable, "-m", f"dr_jax.benchmarks.{name}", *arguments],
    cwd=ROOT,
    env=quick_compilation.environment(),
    capture_output=True,
    text=True,
  )


@pytest.mark.slow
def test_processes_connect_and_their_speeds_are_printed():
  ended = command(
    *("scaling", "--processes=2", "--steps=1", "--image-size=8"),
    "--batch-size=2",
  )
  assert ended.returncode == 0, ended.stderr
  assert cells(ended.stdout, "2")[2] == "1.00"
  assert all(float(cell) > 0 for cell in cells(ended.stdout, "2"))
  assert "warning" not in ended.stderr or len(loopback.cores()) < 2


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (("scaling", "--devices=2"), "error: devices must be in 1..1, got 2"),
    (
      ("sizes", "--model=resnet21"),
      "error: model must be one of 'resnet8', ",
    ),
    (
      ("joint_step", "--model=resnet20", "--torch"),
      "error: torch must not be set with --model",
    ),
    (
      ("joint_step", "--torch_compile"),
      "error: torch_compile must not be set without --torch",
    ),
    (
      ("planes", "--shapes=64"),
      "error: shapes must be like 4096x11008, got '64'",
    ),
  ],
)
def test_bad_arguments_end_with_one_line(arguments, message):
  ended = command(*arguments)
  assert ended.returncode == 2
  assert ended.stderr.startswith(message)
  assert len(ended.stderr.splitlines()) == 1


@pytest.mark.slow
def test_sizes_fall_with_bits_only_where_planes_are_left_out():
  found = on_disk.measure(SMALL, ["floor", "half_even"])
  floor, even = found["floor"], found["half_even"]
  assert floor.float_bytes == even.float_bytes
  assert floor.separate == even.separate
  assert floor.read[2] < floor.read[4] < floor.ours < floor.separate
  assert even.read[2] == even.read[4] < even.ours < even.separate
  # Of ResNet8's 75,000 quantized weights 2 bits of 4 are not read.
  saved = floor.read[4] - floor.read[2]
  assert saved == pytest.approx(75_000 * 2 / 8, rel=0.05)
  row = cells(printed(on_disk.print_table, "resnet8", found), "floor")
  assert row[0] == f"{floor.ours:,}"
  assert float(row[1]) == pytest.approx(floor.ours / floor.separate, abs=1e-3)
  percent = 100 * floor.read[2] / floor.float_bytes
  assert row[-1] == f"{floor.read[2]:,} ({percent:.1f} %)"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vgg", "unet"])
def test_without_training_fitted_scales_are_as_good_as_max_abs(kind):
  # The error of one network without norms is a rough number.
  seeds = 2 if kind == "vgg" else 1
  found = [post_training.errors(kind, seed, ["mse"]) for seed in range(seeds)]
  for method in post_training.METHODS:
    mean = np.mean([errors[method, "mse"] for errors in found], 0)
    at = dict(zip(post_training.BITS, mean, strict=True))
    assert at[8] <= 1.1 and at[4] < 1, (method, at)


def test_inference_is_timed_for_every_backend_and_bit_width():
  found = inference.programs(SMALL, ["float", "carrier", "planes"])
  rows = [(program.name, program.bits) for program in found]
  assert rows == [
    ("float32", None), ("bfloat16", None), ("float", 4), ("float", 2),
    ("carrier", 4), ("carrier", 2),
  ]  # fmt: skip
  images = SMALL.batch(1)["image"]
  logits = [np.asarray(program.call(images)) for program in found]
  np.testing.assert_allclose(logits[4], logits[2], rtol=1e-3, atol=1e-3)
  assert abs(logits[2] - logits[3]).max() > 1e-2
  seconds = np.array([[4, 5], [3, 3], [2, 2], [2, 2], [1, 1], [9, 9]]) / 1e3
  text = printed(inference.print_table, SMALL, found, {1: seconds})
  assert cells(text, "bfloat16") == ["", "3.00", "0.68"]
  assert inference.fastest(found, seconds) == "carrier"
