"""Runs on four simulated devices, in this process."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dr_jax import models, nn, pipeline, quant, train
from dr_jax.checkpoint.checkpoints import Checkpoints
from dr_jax.config import ConfigError, from_dict
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.workdir import Workdir


def config(dtype="float32", vectorize="auto", **devices):
  return from_dict(
    {
      "stages": ("pretrain", "multi_precision", "export"),
      "model": {
        "name": "resnet",
        "options": {"depth": 8, "widths": (4, 8, 32)},
        "dtype": dtype,
      },
      "quant": {"bits": (8, 4)},
      "devices": devices,
      "pretrain": {"epochs": 1, "optimizer": "sgd", "learning_rate": 0.05},
      "train": {
        "epochs": 1,
        "schedule": "accumulate",
        "vectorize": vectorize,
      },
      "checkpoint_every": 3,
      "log_every": 1,
    }
  )


def losses(workdir, stage):
  lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
  return np.array(
    [x["value"] for x in lines if (x["stage"], x["name"]) == (stage, "loss")]
  )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("alone") / "run"
  pipeline.run(config(data=1), workdir)
  return workdir


def stopping_after(count):
  calls = iter(range(10**6))
  return lambda: "SIGTERM" if next(calls) + 1 == count else None


@pytest.mark.slow
@pytest.mark.parametrize("parameters", ["replicated", "sharded"])
def test_a_run_resumes_with_another_number_of_devices(
  alone, tmp_path, parameters
):
  workdir = tmp_path / "run"
  with pytest.raises(train.InterruptedRun):
    pipeline.run(
      config(data=4, parameters=parameters),
      workdir,
      interrupted=stopping_after(5),
    )
  # What one number of devices saved, another reads, bit for bit.
  directory = workdir / "pretrain" / "checkpoints"
  before = restored(directory, config(data=4, parameters=parameters), workdir)
  after = restored(directory, config(data=2), workdir)
  for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
  summary = pipeline.run(config(data=2), workdir)
  assert summary["stages"]["export"]["scores"]
  # Sums in another order; a last bit can move a value to the next code.
  for stage, bound in (("pretrain", 1e-4), ("multi_precision", 2e-2)):
    expected = losses(alone, stage)
    found = losses(workdir, stage)
    assert len(found) == len(expected) > 5
    np.testing.assert_allclose(found, expected, rtol=bound)


def restored(directory, config, workdir):
  """The latest checkpoint, where a run on these devices has it."""
  run = RunContext(config, workdir, lambda: None)
  network = nn.functional(run.model())
  optimizer = train.make_optimizer(
    "sgd", param_labels=network.param_labels, weight_decay=5e-5, momentum=0.9
  )
  trainer = train.make_trainer(
    network, optimizer, optax.constant_schedule(0.0), layout=run.layout
  )
  state = trainer.init(jax.random.key(0))
  with Checkpoints(directory) as checkpoints:
    state = checkpoints.restore(like=state)
  assert int(state.step) == 5
  leaves = jax.tree.leaves(state.params)
  for leaf in leaves:
    assert leaf.sharding.device_set == set(run.layout.mesh.devices.flat)
  spread = not all(leaf.sharding.is_fully_replicated for leaf in leaves)
  assert spread == (config.devices.parameters == "sharded")
  return state.params, state.opt_state, state.batch_stats


@pytest.mark.slow
def test_bit_widths_spread_over_devices_train_as_in_sequence(alone, tmp_path):
  """The float stage, which has none, has all devices along the axis data."""
  workdir = tmp_path / "run"
  pipeline.run(config(data=2, bits=2, vectorize="vmap"), workdir)
  for stage, bound in (("pretrain", 1e-4), ("multi_precision", 2e-2)):
    found = losses(workdir, stage)
    np.testing.assert_allclose(found, losses(alone, stage), rtol=bound)


@pytest.mark.slow
def test_a_run_resumes_with_other_fields_that_change_nothing_trained(
  alone, tmp_path
):
  workdir = tmp_path / "run"
  shutil.copytree(alone, workdir)
  values = dataclasses.asdict(config(data=1))
  values |= {"checkpoint_every": 9, "log_every": 7}
  with Workdir(workdir).claim(from_dict(values)):
    pass
  values["data"]["batch_size"] = 64
  with pytest.raises(ConfigError, match=r"data\.batch_size is 128 there"):
    with Workdir(workdir).claim(from_dict(values)):
      pass


@pytest.mark.slow
def test_norms_per_device_make_another_configuration(alone, tmp_path):
  workdir = tmp_path / "run"
  pipeline.run(config(data=2, norm="per_device"), workdir)
  assert not np.allclose(
    losses(workdir, "pretrain"), losses(alone, "pretrain"), rtol=1e-3
  )
  with pytest.raises(ConfigError, match=r"devices\.norm is 'per_device' there"):
    pipeline.run(config(data=2), workdir)
  with pytest.raises(ConfigError, match=r"devices\.data is 2 there, 4 here"):
    pipeline.run(config(data=4, norm="per_device"), workdir)


@pytest.mark.parametrize(
  ("devices", "message"),
  [
    (
      {"data": 5},
      r"devices\.data must be in 0\.\.4 .* got 5",
    ),
    ({"bits": 2}, r"devices\.bits must be 1 with train\.vectorize='auto'"),
    ({"norm": "per_device"}, r"devices\.norm='per_device' needs .*data=0"),
    ({"data": 3}, r"data\.batch_size must be a multiple of 3"),
    ({"parameters": "split"}, r"devices\.parameters must be one of replicated"),
    ({"norm": "local"}, r"devices\.norm must be one of global, per_device"),
    ({"data": -1}, r"devices.data must be >= 0, got -1"),
  ],
)
def test_impossible_devices_raise_an_error_that_names_the_field(
  tmp_path, devices, message
):
  with pytest.raises(ConfigError, match=message):
    pipeline.run(config(**devices), tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.fixture
def mixed_types():
  """Networks that compute in bfloat16 mix it with their float32 parameters."""
  with jax.numpy_dtype_promotion("standard"):
    yield


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_types")
def test_bfloat16_computes_and_parameters_stay_float32():
  """Scales, statistics, parameters and losses stay float32."""
  bits = (8, 4)
  model = models.build(
    "resnet",
    rngs=nnx.Rngs(0),
    depth=8,
    widths=(4, 8, 16),
    num_classes=10,
    channels=1,
    dtype="bfloat16",
  )
  image = jax.random.uniform(jax.random.key(0), (8, 8, 8, 1))
  network = nn.functional(
    nn.quantize(
      model,
      weight=quant.double_rounding(bits),
      activation=quant.lsq_activation(bits),
      sample=image,
    )
  )
  optimizer = train.make_optimizer("adam", param_labels=network.param_labels)
  trainer = train.make_trainer(
    network, optimizer, optax.constant_schedule(1e-3), vectorize="sequential"
  )
  state = trainer.init(jax.random.key(0))
  batch = {"image": image, "label": jnp.arange(8)}
  text = jax.jit(network.apply, static_argnames="train").lower(
    state.params, state.batch_stats, 0, image, train=True
  )
  convolutions = [
    line for line in text.as_text().splitlines() if "convolution" in line
  ]
  assert len(convolutions) == 9
  assert all("xbf16>" in line and "xf32>" not in line for line in convolutions)
  state, losses = trainer.step(state, batch)
  assert losses.dtype == jnp.float32 and np.isfinite(losses).all()
  for leaf in jax.tree.leaves((state.params, state.batch_stats)):
    assert leaf.dtype == jnp.float32
  logits, _ = network.apply(state.params, state.batch_stats, 0, image)
  assert logits.dtype == jnp.float32


@pytest.mark.slow
@pytest.mark.usefixtures("mixed_types")
def test_the_artifact_of_a_bfloat16_run_scores_as_the_trained_network(tmp_path):
  workdir = tmp_path / "run"
  summary = pipeline.run(config("bfloat16", data=2), workdir)
  stages = summary["stages"]
  # Export itself compares; here that it did, and that training learned.
  assert stages["export"]["scores"] == stages["multi_precision"]["scores"]
  assert losses(workdir, "pretrain")[-1] < losses(workdir, "pretrain")[0]
