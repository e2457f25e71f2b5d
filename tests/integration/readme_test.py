"""The examples in the READMEs, run as they stand there."""

import functools
import pathlib
import re
import tomllib
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from torch_networks import Tensors

from dr_jax import (
  config,
  data,
  deploy,
  models,
  nn,
  pipeline,
  quant,
  search,
  train,
)
from dr_jax.pipeline.stages import STAGES
from dr_jax.train import alrs

ROOT = pathlib.Path(__file__).parents[2]
PAGES = {
  str(page.relative_to(ROOT)): page
  for page in [ROOT / "README.md", *ROOT.glob("*/**/README.md")]
  if ".venv" not in page.parts
}


@pytest.fixture(scope="module", autouse=True)
def method():
  """Runs the block of the section on own methods; returns its source."""
  source = block("Your own method")
  exec(compile(source, "fixed_point.py", "exec"), {})
  return source


def block(title):
  """The first Python block of a section, on whatever page it is."""
  for page in PAGES.values():
    _, found, rest = page.read_text().partition(f"\n## {title}\n")
    if found:
      section = rest.split("\n## ")[0]
      return re.search(r"```python\n(.*?)```", section, re.DOTALL)[1]
  raise KeyError(title)


def test_the_readme_has_at_most_250_lines():
  assert len(PAGES["README.md"].read_text().splitlines()) <= 250


@pytest.mark.parametrize("name", PAGES)
def test_links_between_pages_resolve(name):
  text = PAGES[name].read_text()
  for target in re.findall(r"\]\(([^)#]*)(?:#[\w-]+)?\)", text):
    if target and "://" not in target:
      assert (PAGES[name].parent / target).exists(), target


def test_the_table_of_methods_lists_every_weight_quantizer():
  rows = re.findall(r"^\| (`.*?) \|", PAGES["README.md"].read_text(), re.M)
  listed = set(re.findall(r"`(\w+)`", " ".join(rows)))
  weights = {
    name
    for name in quant.NAMES
    if isinstance(quant.get(name), quant.WeightQuantizer)
  } - {"fixed_point"}
  assert weights <= listed


def extras():
  text = (ROOT / "pyproject.toml").read_text()
  found = tomllib.loads(text)["project"]["optional-dependencies"]
  return [name for name in found if name != "test-foreign"]


def commands(folder):
  for file in (ROOT / folder).glob("*.py"):
    if "__main__" in file.read_text():
      yield file.stem


@pytest.mark.parametrize(
  "page, names",
  [
    ("README.md", extras()),
    ("configs/README.md", [f.name for f in (ROOT / "configs").glob("*.py")]),
    ("dr_jax/benchmarks/README.md", commands("dr_jax/benchmarks")),
    ("dr_jax/data/README.md", data.NAMES),
    ("dr_jax/nn/README.md", nn.BACKENDS),
    ("dr_jax/search/README.md", search.SEARCHES),
    ("dr_jax/train/README.md", STAGES),
    ("dr_jax/train/README.md", alrs.MODES),
    ("dr_jax/train/README.md", train.CURRICULA),
    ("dr_jax/train/README.md", train.DISTILLATIONS),
    ("dr_jax/train/README.md", train.OPTIMIZERS),
    ("dr_jax/train/README.md", train.SAMPLINGS),
    ("dr_jax/train/README.md", train.VECTORIZE),
  ],
)
def test_a_page_names_everything_that_it_lists(page, names):
  text = PAGES[page].read_text()
  listed = set(re.findall(r"[`\[]([\w.-]+)[`\]]", text))
  assert not {*names} - listed


@functools.cache
def small_network(bits, widths=(4, 4, 4)):
  """A float network for 8x8 digits and its quantized form."""
  model = models.ResNet(
    8, num_classes=10, widths=widths, channels=1, rngs=nnx.Rngs(0)
  )
  stream = data.batches(data.load("digits").train, batch_size=128, seed=0)
  network = nn.quantize(
    model,
    weight=quant.double_rounding(bits),
    activation=quant.lsq_activation(bits),
    sample=stream[0]["image"],
  )
  return model, network, stream


def test_the_example_of_the_front_page_quantizes_saves_and_loads(
  monkeypatch, tmp_path
):
  monkeypatch.chdir(tmp_path)
  source = block("Use it in your own Flax project")
  source = source.replace("(16, 32, 32, 3)", "(2, 8, 8, 3)")
  source = source.replace(
    "models.resnet20(num_classes=10, rngs=nnx.Rngs(0))",
    "models.ResNet(8, num_classes=10, widths=(2, 2, 2), rngs=nnx.Rngs(0))",
  )
  names = {}
  exec(compile(source, "front.py", "exec"), names)
  assert {row.bits for row in nn.layer_table(names["network"])} == {4}
  assert {row.bits for row in nn.layer_table(names["stored"])} == {2}
  code = [x for x in source.splitlines() if x and "import" not in x]
  assert len(code) <= 20
  names = {"deploy": deploy}
  artifact = block("Artifacts").replace(
    '{"conv1": 8, "conv2": 4}', "dict.fromkeys(artifact.layer_bytes, 8)"
  )
  artifact = artifact.replace("artifact.load(bits=4)", "artifact")
  exec(compile(artifact, "artifact.py", "exec"), names)


def test_the_examples_for_arrays_keep_what_they_say():
  w = np.random.default_rng(0).normal(size=(3, 3, 4, 8)).astype("f4")
  exec(compile(block("Arrays"), "arrays.py", "exec"), {"w": w})


def test_the_example_of_few_bits_reads_five_planes():
  stored = {"codes": jnp.array([[100, -9], [8, 7]], jnp.int8)}
  stored["scale"] = jnp.ones((1, 2))
  names = {"quant": quant, "stored": stored, "x": jnp.array([[1.0, 2.0]])}
  exec(block("Products with few bits"), names)
  assert names["y"].tolist() == [[128.0, -16.0]]
  assert len(names["part"]) == 5


def test_the_example_of_bit_planes_serves_what_was_saved(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  rngs = nnx.Rngs(0)
  model = nnx.Sequential(*(nnx.Linear(8, 8, rngs=rngs) for _ in range(3)))
  names = {"deploy": deploy, "nn": nn, "quant": quant, "model": model}
  x = names["x"] = jnp.ones((2, 8))
  exec(block("From bit-planes"), names)
  stored, network = names["stored"], names["network"]
  nn.set_bits(network, 4)
  np.testing.assert_allclose(stored(x), network(x), rtol=1e-5, atol=1e-6)
  (layer,) = nn.quantized.quantized_layers(stored).values()
  assert "planes" in layer.encoded


def test_it_has_ten_to_twenty_lines_without_imports_and_blanks(method):
  lines = [x for x in method.splitlines() if x and "import" not in x]
  assert 10 <= len(lines) <= 20


@pytest.mark.slow
def test_the_examples_for_linen_serve_what_was_saved(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  names = {}
  text = PAGES["dr_jax/linen/README.md"].read_text()
  for source in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
    exec(compile(source, "linen.py", "exec"), names)
  stored, images = names["stored"], names["images"]
  nn.set_bits(stored, 4)
  np.testing.assert_array_equal(stored(images), names["network"](images))


@pytest.mark.slow
def test_the_training_example_lowers_the_loss_at_every_bit_width():
  bits = (8, 4)
  _, network, stream = small_network(bits)
  names, seen = {"nn": nn, "network": network, "bits": bits}, []

  def batches():
    for number in range(20):
      yield stream[number]
      seen.append(names["losses"])

  # The section on devices trains it again, from where this one ends.
  for section in ("Training", "Devices"):
    seen.clear()
    names["batches"] = batches()
    exec(compile(block(section), f"{section}.py", "exec"), names)
    assert (np.mean(seen[-5:], 0) < np.mean(seen[:5], 0)).all()
    names["split"] = nn.functional(network)
  kernel = names["params"]["stage1"]["block0"]["conv1"]["kernel"]
  assert (kernel != network.stage1.block0.conv1.kernel[...]).any()


@pytest.mark.slow
def test_the_mixed_precision_example_finds_and_sets_an_allocation(capsys):
  bits = (8, 4, 2)
  stream = data.batches(data.load("digits").train, batch_size=64, seed=0)
  float_network = models.ResNet(
    8, num_classes=10, widths=(2, 3, 4), channels=1, rngs=nnx.Rngs(0)
  )
  network = nn.quantize(
    float_network,
    weight=quant.double_rounding(bits),
    activation=quant.lsq_activation(bits),
    sample=stream[0]["image"],
  )
  names = {
    "float_network": float_network,
    "network": network,
    "bits": bits,
    "batches": [stream[0], stream[1]],
    "images": stream[2]["image"],
    "labels": stream[2]["label"],
  }
  # Enough for an example: many probes make an error bar smaller.
  source = block("Mixed precision")
  assert "  select=" in source
  source = source.replace("  select=", "  max_probes=8, select=")
  exec(compile(source, "mixed.py", "exec"), names)
  table = nn.layer_table(network)
  parameters = [row.parameters for row in table]
  stored = sum(
    row.bits * size for row, size in zip(table, parameters, strict=True)
  )
  assert stored == names["solution"].usage["bits"] <= 4 * sum(parameters)
  assert {row.name: row.bits for row in table} == dict(names["allocation"])
  # Traces come in the order of names, layers in that of calls.
  paths = [f"params/{row.name}/kernel" for row in table]
  assert list(names["traces"]) != paths
  for row, path, line in zip(
    table, paths, names["tables"]["bits"], strict=True
  ):
    mean = max(names["traces"][path].mean, 0) / row.parameters
    np.testing.assert_allclose(line, [-mean * b for b in bits])
  at = names["front"].at(4 * sum(parameters))
  assert at.objective == names["solution"].objective
  result = names["found"]
  assert result.cost["bits"] <= 4 * sum(parameters)
  assert result.evaluations > len(parameters)
  assert table[0].name in capsys.readouterr().out


def test_it_keeps_the_laws_of_the_interface():
  w = np.random.default_rng(0).normal(size=(3, 3, 4, 8)).astype("f4") / 2
  quantizer = quant.get("fixed_point")
  encoded = quantizer.encode({}, w)
  packed = quantizer.storage.pack(encoded)
  assert 8 * packed["codes"].nbytes == quantizer.stored_bits * w.size
  for index, bits in enumerate(quantizer.bits):
    w_hat = quantizer.fake_quantize({}, w, index)
    traced = jax.jit(quantizer.fake_quantize)({}, w, jnp.int32(index))
    np.testing.assert_array_equal(traced, w_hat)
    np.testing.assert_array_equal(quantizer.decode(encoded, index), w_hat)
    assert len(np.unique(w_hat)) <= 2**bits
    inside = np.abs(w) < 0.9
    assert np.abs(w_hat - w)[inside].max() <= 2.0 ** (1 - bits) * 1.01


@pytest.mark.slow
def test_a_run_trains_and_exports_it(tmp_path):
  values = {
    "name": "own",
    "model": {"name": "resnet", "options": {"depth": 8, "widths": (4, 4, 4)}},
    "quant": {"weight": "fixed_point", "bits": (8, 4)},
    "train": {"epochs": 1, "vectorize": "sequential"},
    "pretrain": {"epochs": 1},
  }
  summary = pipeline.run(config.from_dict(values), tmp_path)
  export = summary["stages"]["export"]
  assert export["scores"] == summary["stages"]["multi_precision"]["scores"]
  network = deploy.load(tmp_path / "export" / "model", bits=4)
  assert nn.layer_table(network)[0].bits == 4
  assert isinstance(network, models.ResNet) and isinstance(network, nnx.Module)


def test_the_example_of_weights_from_pytorch_fills_a_network(
  tmp_path, monkeypatch
):
  monkeypatch.chdir(tmp_path)
  tensors = Tensors()
  sizes = {"depth": 1, "width": 4, "heads": 2}
  tensors.vit(np.ones((1, 3, 8, 8)), patch=4, classes=10, **sizes)
  safetensors.numpy.save_file(tensors, "deit_tiny.safetensors")
  sizes |= {"image_size": 8, "patch_size": 4, "num_classes": 10}
  source = block("Weights from PyTorch")
  assert "models.vit_tiny(" in source
  small = ", ".join(f"{name}={size}" for name, size in sizes.items())
  source = source.replace("vit_tiny(", f"ViT({small}, ")
  names = {}
  exec(source, names)
  np.testing.assert_array_equal(
    names["network"].head.kernel[...], tensors["head.weight"].T
  )


def test_the_example_for_qwix_exchanges_integers_and_rules():
  qwix = pytest.importorskip("qwix", reason="needs qwix")
  x = jax.random.normal(jax.random.key(0), (4, 8))
  layers = [nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(2)]
  names = {"model": nnx.Sequential(*layers), "x": x}
  with warnings.catch_warnings(), jax.numpy_dtype_promotion("standard"):
    warnings.simplefilter("ignore", DeprecationWarning)  # qwix's
    exec(block("Integers and rules for qwix"), names)
  assert names["array"].qtype == "int4"
  kernel = qwix.dequantize(names["array"])
  np.testing.assert_allclose(names["y"], x @ kernel, rtol=0, atol=1e-5)
  assert isinstance(names["by_qwix"].layers[1].kernel, nnx.Param)


def test_the_example_without_training_fits_scales_to_batches():
  images = jax.random.normal(jax.random.key(0), (4, 8))
  names = {
    "nn": nn,
    "quant": quant,
    "bits": (8, 4),
    "images": images,
    "more_images": [2 * images],
    "network": nnx.Sequential(
      *(nnx.Linear(8, 8, rngs=nnx.Rngs(i)) for i in range(3))
    ),
  }
  model = names["network"]
  exec(block("Without training"), names)
  error = jnp.abs(names["network"](images) - model(images)).max()
  assert error < 0.05
