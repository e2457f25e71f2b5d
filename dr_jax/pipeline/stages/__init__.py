"""The stages of a run, in the order in which they are listed for users.

A stage is one file that defines `STAGE`, and one entry below. Order, checks,
disk space, summary and help text are derived from it.
"""

from dr_jax.pipeline.stages import (
  export,
  hessian,
  multi_precision,
  pretrain,
  report,
  search,
  separate,
  supernet,
)
from dr_jax.pipeline.stages.stage import Stage

STAGES: dict[str, Stage] = {
  module.STAGE.name: module.STAGE
  for module in (
    pretrain,
    multi_precision,
    separate,
    hessian,
    supernet,
    search,
    export,
    report,
  )
}

__all__ = ["STAGES", "Stage"]
