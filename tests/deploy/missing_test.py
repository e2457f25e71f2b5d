"""Tests of reading what is missing while requests are served."""

import collections
import concurrent.futures
import gc
import os
import shutil
import threading
import weakref

import numpy as np
import pytest
from small_artifact import SERVED, images, save

from dr_jax import deploy, quant
from dr_jax.deploy.missing import Missing


def test_more_bits_read_the_planes_that_are_missing(nested, mixed, compiled):
  whole = deploy.Switchable(nested)
  served = deploy.Switchable(nested, bits=2, sample=images())
  compiled.clear()
  for bits in (2, 4, mixed, 2, 8, 4, mixed):
    whole.switch(bits)
    served.switch(bits)
    np.testing.assert_array_equal(
      served.predict(images()),
      whole.predict(images()),
    )
  assert served.bits == mixed
  assert compiled["jit(serve)"] == 1  # that of `whole`


@pytest.mark.slow
def test_more_bits_read_the_rows_of_norms_of_pairs(tmp_path, mixed):
  weight = quant.double_rounding(SERVED, rounding="half_up")
  save(tmp_path / "model", weight, "transitional")
  whole = deploy.Switchable(tmp_path / "model")
  served = deploy.Switchable(tmp_path / "model", bits=4)
  for bits in (mixed, 8, 2, 4):
    whole.switch(bits)
    served.switch(bits)
    np.testing.assert_array_equal(
      served.predict(images()), whole.predict(images())
    )


def test_only_planes_that_are_missing_are_read_and_only_once(
  nested, monkeypatch
):
  tensors = deploy.open(nested).store.header.tensors
  read = collections.Counter()
  pread = os.pread

  def reading(descriptor, count, start):
    for name, tensor in tensors.items():
      bytes_of = min(start + count, tensor.end) - max(start, tensor.start)
      read[name] += max(bytes_of, 0)
    return pread(descriptor, count, start)

  served = deploy.Switchable(nested, bits=4)
  monkeypatch.setattr(os, "pread", reading)
  served.switch(4)
  assert not read
  served.switch(8)
  sizes = {f"planes/{p}": tensors[f"planes/{p}"] for p in range(8)}
  # Four bits of half-up rounding need five.
  expected = {n: (t.end - t.start) * (n > "planes/4") for n, t in sizes.items()}
  assert {name: read[name] for name in sizes} == expected
  read.clear()
  for bits in (4, 8):
    served.switch(bits)
  assert not read


def test_reading_planes_replaces_codes_layer_by_layer(
  nested, monkeypatch, live_bytes
):
  served = deploy.Switchable(nested, bits=2)
  x, position_bytes = images(), 4 * 8
  old = np.array(served.predict(x))
  before, peak = live_bytes(), 0
  answers, reads, read = [], 0, Missing.read
  layers = deploy.open(nested).encoded.values()
  largest = max(layer["codes"].nbytes for layer in layers)
  del layers

  def reading(*args):
    nonlocal peak, reads
    # Every answer is that of another program.
    if reads % 4 == 0:
      answers.append(np.array(served.predict(x)))
    reads += 1
    arrays = read(*args)
    peak = max(peak, live_bytes())
    return arrays

  monkeypatch.setattr(Missing, "read", reading)
  served.switch(8)
  # In between, some layers have all planes, and the bit-width is the old one.
  assert reads > 8 and len(answers) > 2
  for answer in answers:
    np.testing.assert_array_equal(answer, old)
  assert not np.array_equal(served.predict(x), old)
  assert peak - before <= largest + position_bytes
  assert live_bytes() == before


def test_requests_during_an_upgrade_are_of_the_old_or_the_new_bits(nested):
  x = images()
  served = deploy.Switchable(nested)
  expected = []
  for bits in (2, 8):
    served.switch(bits)
    expected.append(np.asarray(served.predict(x)))
  served = deploy.Switchable(nested, bits=2, sample=x)
  ended = threading.Event()

  def ask(_):
    answers = []
    while not ended.is_set() or len(answers) < 3:
      answers.append(np.asarray(served.predict(x)))
    return answers

  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    asked = [pool.submit(ask, n) for n in range(3)]
    served.switch(8)
    ended.set()
    answers = [answer for future in asked for answer in future.result()]
  assert all(any(np.array_equal(a, y) for y in expected) for a in answers)
  np.testing.assert_array_equal(served.predict(x), expected[1])


def test_damaged_planes_raise_and_leave_the_old_bits_serving(nested, tmp_path):
  path = tmp_path / "model"
  shutil.copytree(nested, path)
  served = deploy.Switchable(path, bits=4)
  before = np.asarray(served.predict(images()))
  data = (path / "model.safetensors").read_bytes()
  # The last plane of the last layer, before what follows the sections.
  tensor = deploy.open(path).store.header.tensors["planes/7"]
  damaged = bytearray(data)
  damaged[tensor.end - 1] ^= 1
  (path / "model.safetensors").write_bytes(damaged)
  for _ in range(2):
    with pytest.raises(deploy.ArtifactError, match="planes/7 is damaged"):
      served.switch(8)
    assert served.bits == 4
    np.testing.assert_array_equal(served.predict(images()), before)
  served.switch(2)
  (path / "model.safetensors").write_bytes(data)
  served.switch(8)
  whole = deploy.Switchable(nested)
  np.testing.assert_array_equal(
    served.predict(images()), whole.predict(images())
  )


def test_what_is_stored_is_not_kept_besides_the_codes(path, nested):
  for stored in (path, nested):
    artifact = deploy.open(stored)
    arrays = [*artifact.store.pieces.values()]
    arrays += [a for n, a in artifact.store.tensors.items() if "codes" in n]
    kept = [weakref.ref(array) for array in arrays]
    assert kept
    served = deploy.Switchable(artifact)
    del artifact, arrays
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    served.predict(images())
