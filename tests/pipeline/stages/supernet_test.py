"""Tests of the stage supernet: what trains it, and what it can be."""

import json

import jax
import numpy as np
import pytest
from flax import nnx
from mixed_job import BITS, config

from dr_jax import models, nn, pipeline, quant, train
from dr_jax.checkpoint.checkpoints import CheckpointError, Checkpoints
from dr_jax.config import ConfigError
from dr_jax.pipeline.context import RunContext
from dr_jax.pipeline.stages.supernet import supernet


def test_hasb_gets_sensitivity_and_the_configured_sigma_and_warmup(
  copied, monkeypatch
):
  (copied / "supernet" / "result.json").unlink()
  given = {}

  class Called(Exception):
    pass

  def sampling(sensitivity, bits, **options):
    given.update(options, sensitivity=sensitivity, bits=bits)
    raise Called

  monkeypatch.setattr(train.hasb, "sampling", sampling)
  with pytest.raises(Called):
    supernet(RunContext(config(hasb={"sigma": 0.25, "warmup": 0.5}), copied))
  result = json.loads((copied / "hessian" / "result.json").read_text())
  assert given == {
    "sensitivity": list(result["sensitivity"].values()),
    "bits": BITS,
    "steps": 2 * 1006 // 128,
    "epochs": 2,
    "start": 0.25,
    "warmup": 0.5,
  }


def test_a_directory_with_other_candidate_bits_raises_an_error(finished):
  workdir, _ = finished
  with pytest.raises(ConfigError, match=r"quant\.bits is \[8, 4, 2\] there"):
    pipeline.run(config(quant={"bits": (8, 2)}), workdir)


def test_a_supernet_checkpoint_does_not_fit_other_candidate_bits(finished):
  workdir, _ = finished
  bits = (8, 4)
  network = nn.functional(
    nn.quantize(
      models.build(
        "resnet",
        depth=8,
        widths=(2, 3, 4),
        num_classes=10,
        channels=1,
        rngs=nnx.Rngs(0),
      ),
      weight=quant.double_rounding(bits),
      activation=quant.lsq_activation(bits),
      sample=np.ones((2, 8, 8, 1), np.float32),
      norm="transitional",
    )
  )
  optimizer = train.make_optimizer("adam", param_labels=network.param_labels)
  trainer = train.make_trainer(network, optimizer, lambda step: 0.0)
  state = trainer.init(jax.random.key(0))
  directory = workdir / "supernet" / "checkpoints"
  with Checkpoints(directory) as checkpoints:
    with pytest.raises(
      CheckpointError,
      match=r"another state: .*float32\[9, \d\], not float32\[4, ",
    ):
      checkpoints.restore(like=state)
