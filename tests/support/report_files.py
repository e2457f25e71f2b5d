"""Directories of runs and comparisons as pages are made of, written by hand."""

import json

BITS = (8, 4, 2)
LAYERS = ("stage1/conv1", "stage1/conv2", "head/<b>")


def score(accuracy):
  return {"accuracy": accuracy, "loss": 1 - accuracy / 100}


def scores(*accuracies):
  return {str(b): score(a) for b, a in zip(BITS, accuracies, strict=True)}


def trained(*accuracies):
  return {
    "scores": scores(*accuracies),
    "train_seconds": 7.5,
    "seconds": 20.0,
  }


def row(strategy, budget, allocation, accuracy):
  return {
    "strategy": strategy,
    "budget": budget,
    "allocation": dict(zip(LAYERS, allocation, strict=True)),
    "cost": {"stored_bits": 800 * sum(allocation), "bops": 10**6 * budget},
    "eval": score(accuracy),
    "test": score(accuracy),
    "evaluations": 7,
    "seconds": 0.25,
    "evaluation_seconds": 1.5,
  }


STAGES = {
  "pretrain": {
    "scores": {"float": score(97.0)}, "train_seconds": 3.0, "seconds": 5.0
  },
  "multi_precision": trained(96.0, 95.0, 90.0),
  **{
    f"separate/{b}": {**trained(96.5, 95.5, 91.0), "seconds": 9.0}
    for b in BITS
  },
  "hessian": {
    "traces": {
      name: {"mean": 10.0**-n, "stderr": 0.2 * 10.0**-n, "probes": 8}
      for n, name in enumerate(LAYERS)
    },
    "seconds": 2.0,
  },
  "supernet": {**trained(95.0, 95.0, 92.0), "network": "0123"},
  "search": {
    "request": {},
    "rows": [
      row("greedy", 4, (8, 2, 2), 93.0),
      row("uniform", 4, (4, 4, 4), 94.0),
      row("greedy", 6, (8, 8, 4), 96.0),
      row("uniform", 8, (8, 8, 8), 95.0),
    ],
    "seconds": 4.0,
  },
  "export": {
    "scores": scores(95.0, 95.0, 92.0),
    "bytes_at": {"8": 1000, "4": 600, "2": 400},
    "float_bytes": 4000,
    "stored_bytes": 1200,
    "tensor_bytes": 1100,
    "seconds": 1.0,
  },
}  # fmt: skip


def numbers(stage, labels, name="loss"):
  return [
    {
      "stage": stage,
      "step": step,
      "bits": bits,
      "name": name,
      "value": 2.0 / step + 0.1 * n if step < 30 else "NaN",
    }
    for step in (10, 20, 30)
    for n, bits in enumerate(labels)
  ]


METRICS = [
  *numbers("pretrain", [None]),
  *numbers("multi_precision/float_activations", BITS),
  *numbers("multi_precision", BITS),
  *numbers("multi_precision", BITS, "validation_loss"),
  *numbers("multi_precision/float_activations", BITS, "scale_gradient_norm"),
  *numbers("multi_precision", BITS, "scale_gradient_norm"),
  *(record for b in BITS for record in numbers(f"separate/{b}", [b])),
  *numbers("supernet", [8, "random", 2]),
  *numbers("supernet", [8, "random", 2], "scale_gradient_norm"),
]
NETWORK = {
  "stage": "supernet",
  "gradients": {
    "examples": 64,
    "scales": [
      {
        "layer": layer,
        "of": of,
        "gradient": {str(b): 10.0 ** (-b - n) for b in BITS},
      }
      for n, layer in enumerate(LAYERS)
      for of in ("weight", "input")
    ],
  },
  "weights": {
    layer: {
      str(b): {
        "low": -2.0,
        "high": 2.0,
        "counts": [1, 5, 9, 3],
        "levels": [] if b == 8 else [-2.0, -1.0, 0.0, 1.0],
      }
      for b in BITS
    }
    for layer in LAYERS
  },
}


def write_run(directory, *, without=(), name="small"):
  """Writes what a run leaves; `without` names stages, or files."""
  summary = {
    "name": name,
    "task": "classification",
    "bits": BITS,
    "stages": {k: v for k, v in STAGES.items() if k not in without},
    "environment": {"python": "3.11", "device": "cpu"},
  }
  (directory / "report").mkdir(parents=True)
  contents = {
    "summary.json": json.dumps(summary),
    "config.json": json.dumps({"name": name, "seed": 0}),
    "metrics.jsonl": "".join(json.dumps(m) + "\n" for m in METRICS),
    "report/network.json": json.dumps(NETWORK),
  }
  for file, text in contents.items():
    if file not in without:
      (directory / file).write_text(text)
  return directory


def _spread(mean):
  return {"mean": mean, "std": 0.5, "seeds": [mean - 0.5, mean + 0.5]}


def _method(accuracies, bytes_at):
  return {
    "scores": {
      b: {"accuracy": _spread(a), "loss": _spread(0.25)}
      for b, a in accuracies.items()
    },
    "bytes_at": bytes_at,
    "tensor_bytes": 1100,
    "train_seconds": 12.0,
  }


COMPARED = {
  "task": "classification",
  "rows": {
    "float": _method({"float": 97.0}, {"float": 4000}),
    "double rounding": _method(
      {"8": 96.0, "2": 92.0}, {"8": 1000, "2": 400}
    ),
    "binary": _method({"1": 80.0}, {"1": 200}),
  },
  "seeds": [0, 1],
  "environment": {"device": "cpu"},
}  # fmt: skip


def write_comparison(directory):
  directory.mkdir(parents=True)
  (directory / "compare.json").write_text(json.dumps(COMPARED))
  return directory
