import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest

from dr_jax import hessian
from dr_jax.runtime.tree import fingerprint
from tests.support import disk

ESTIMATES = {
  "stage1/conv1/kernel": hessian.TraceEstimate(1 / 3, 1e-17, 8),
  "head/kernel": hessian.TraceEstimate(-2.5, 0.125, 8),
}


def test_saved_traces_come_back_in_the_same_bits(tmp_path):
  path = tmp_path / "traces.json"
  path.write_text("what was there before")
  hessian.save(path, ESTIMATES, fingerprint="f" * 64)
  for known in (None, "f" * 64):
    loaded = hessian.load(path, fingerprint=known)
    assert loaded == ESTIMATES
    assert list(loaded) == list(ESTIMATES)
    assert isinstance(loaded["head/kernel"], hessian.TraceEstimate)
  assert list(tmp_path.iterdir()) == [path]


def test_traces_of_another_network_raise_an_error(tmp_path):
  path = tmp_path / "traces.json"
  hessian.save(path, ESTIMATES, fingerprint="a" * 64)
  with pytest.raises(ValueError) as error:
    hessian.load(path, fingerprint="b" * 64)
  message = str(error.value)
  assert message.startswith(f"{path} must have traces of this network, bbbb")
  assert "got those of aaaa" in message
  assert "\n" not in message


def test_a_save_that_fails_leaves_the_old_file(tmp_path):
  path = tmp_path / "traces.json"
  hessian.save(path, ESTIMATES, fingerprint="a")
  before = path.read_bytes()
  unknown = {"a": hessian.TraceEstimate(float("nan"), 1.0, 8)}
  with pytest.raises(ValueError):
    hessian.save(path, unknown, fingerprint="b")
  assert path.read_bytes() == before

  with disk.full_after(1), pytest.raises(OSError, match="File too large"):
    hessian.save(path, ESTIMATES, fingerprint="c")
  assert path.read_bytes() == before


def test_a_damaged_file_is_named(tmp_path):
  path = tmp_path / "traces.json"
  hessian.save(path, ESTIMATES, fingerprint="a")
  content = path.read_bytes()
  whole = json.loads(content)
  damaged = [content[:-20], b"", b"[]", b"\xff\xfe", b"{}", b"null"]
  for change in ([], {"a": {"mean": 1.0}}, {"a": 3}):
    damaged.append(json.dumps({**whole, "traces": change}).encode())
  for number in ("NaN", '"x"', "null"):
    damaged.append(content.replace(b"-2.5", number.encode()))
  for text in damaged:
    path.write_bytes(text)
    with pytest.raises(ValueError, match="is damaged: ") as error:
      hessian.load(path)
    assert str(error.value).startswith(f"{path} is damaged")
  with pytest.raises(FileNotFoundError):
    hessian.load(tmp_path / "none.json")


def test_a_fingerprint_follows_every_path_dtype_shape_and_bit():
  x = np.arange(6, dtype=np.float32)
  trees = [
    {"a": x},
    {"b": x},
    {"a": {"b": x}},
    {"a": x.reshape(2, 3)},
    {"a": x.view(np.int32)},
    {"a": np.where(x == 3, np.nextafter(x, 9), x).astype(np.float32)},
    {"a": np.where(x == 0, -x, x)},
    {"a": x, "b": x},
    {"a": x[:3], "b": x[3:]},
  ]
  found = [fingerprint(tree) for tree in trees]
  assert all(len(one) == 64 for one in found)
  for one, other in itertools.combinations(found, 2):
    assert one != other
  assert fingerprint({"a": jnp.asarray(x)}) == found[0]
  transposed = np.asfortranarray(x.reshape(2, 3))
  assert fingerprint({"a": transposed}) == found[3]
