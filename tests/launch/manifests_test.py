"""Manifests for Kubernetes, against the schemas and the command's flags."""

import json
import pathlib
import re

import kubernetes_validate
import pytest
import yaml
from kubeflow_trainer_api.models import JobsetV1alpha2JobSet as JobSet

MANIFESTS = sorted(
  (pathlib.Path(__file__).parents[2] / "launch").glob("*.yaml")
)


def jobs(manifest):
  return [x["template"]["spec"] for x in manifest["spec"]["replicatedJobs"]]


def check_schemas(manifest):
  """Holds a manifest against the schemas of JobSet and of Kubernetes."""
  # What the schema does not know does not come back.
  assert JobSet.from_dict(manifest).to_dict() == manifest
  for spec in jobs(manifest):
    job = {
      "apiVersion": "batch/v1",
      "kind": "Job",
      "metadata": {"name": "job"},
      "spec": spec,
    }
    kubernetes_validate.validate(job, "1.31", strict=True)


@pytest.fixture(params=MANIFESTS, ids=lambda p: p.name)
def manifest(request):
  return yaml.safe_load(request.param.read_text())


def test_manifests_fit_the_schemas(manifest):
  check_schemas(manifest)


@pytest.mark.parametrize(
  "damage",
  [
    lambda m: m["spec"].update(failurePolicies={}),
    lambda m: m["spec"]["failurePolicy"].update(maxRestarts="five"),
    lambda m: jobs(m)[0].update(backofLimit=0),
    lambda m: jobs(m)[0].update(parallelism="2"),
    lambda m: jobs(m)[0]["template"]["spec"].update(containers={}),
  ],
)
def test_a_damaged_manifest_does_not_fit(manifest, damage):
  damage(manifest)
  with pytest.raises((AssertionError, ValueError, AttributeError)):
    check_schemas(manifest)


def test_manifests_start_the_command_with_what_they_promise(parsed, manifest):
  (replicated,) = manifest["spec"]["replicatedJobs"]
  (job,) = jobs(manifest)
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  environment = {x["name"]: x for x in container.get("env", ())}
  on_gpu = "nvidia.com/gpu" in container["resources"]["limits"]

  assert container["command"][0] == "python"
  workdir, code, detect = parsed(container["command"][1:])
  assert detect == (not on_gpu)

  # Preemption, and nothing else, starts again without end.
  exit_codes, disrupted = job["podFailurePolicy"]["rules"]
  assert exit_codes["onExitCodes"]["values"] == [code] == [143]
  assert exit_codes["onExitCodes"]["containerName"] == container["name"]
  assert disrupted["onPodConditions"][0]["type"] == "DisruptionTarget"
  (rule,) = manifest["spec"]["failurePolicy"]["rules"]
  assert rule["action"] == "RestartJobSetAndIgnoreMaxRestarts"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]

  # Run, data and compiled programs are on a volume.
  mounts = {x["mountPath"]: x["name"] for x in container["volumeMounts"]}
  assert {x["name"] for x in pod["volumes"]} == set(mounts.values())
  paths = [workdir, environment["XDG_CACHE_HOME"]["value"]]
  paths += [x.partition("=")[2] for x in container["command"] if ".path=" in x]
  assert len(paths) == 3
  assert all(path.startswith("/shared/") for path in paths)
  assert "/shared" in mounts

  assert job["parallelism"] == job["completions"] > 1
  if on_gpu:
    assert (
      manifest["spec"]["coordinator"]["replicatedJob"] == replicated["name"]
    )
    count = environment["JAX_NUM_PROCESSES"]["value"]
    assert count == str(job["completions"])
    assert "job-completion-index" in json.dumps(environment["JAX_PROCESS_ID"])
    address = environment["JAX_COORDINATOR_ADDRESS"]["value"]
    assert re.fullmatch(r"\$\(COORDINATOR\):\d+", address)
    # Expanded only if it was named before.
    names = list(environment)
    assert names.index("COORDINATOR") < names.index("JAX_COORDINATOR_ADDRESS")
