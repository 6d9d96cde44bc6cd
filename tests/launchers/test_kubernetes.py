"""The manifests of examples/kubernetes: what a node is given is a right call of the launcher, on every node alike.

Their form was held against the published definitions of PyTorchJob (v1.9) and JobSet (v0.9), which are not kept here:
LLAVA_CRDS in the environment names a folder with those files, and the last test looks again.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.launchers.launching import ROOT, STAGE_1, Inputs, start

MANIFESTS = ROOT / "examples/kubernetes"
INDEX = "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def read(name: str) -> dict[str, Any]:
    return yaml.safe_load((MANIFESTS / name).read_text())


def nodes_of_pytorchjob() -> list[tuple[dict, dict[str, str]]]:
    """(container, what the operator adds to its environment) of each node, as envvar.go of the operator's v1.9 says."""
    replicas = read("pytorchjob.yaml")["spec"]["pytorchReplicaSpecs"]
    specs = [replicas[kind] for kind in ("Master", "Worker") for _ in range(replicas[kind]["replicas"])]
    assert "nprocPerNode" not in read("pytorchjob.yaml")["spec"], "WORLD_SIZE would be the number of processes"
    added = {"WORLD_SIZE": str(len(specs)), "MASTER_ADDR": "llava-master-0", "MASTER_PORT": "23456"}
    return [(spec["template"]["spec"]["containers"][0], added | {"RANK": str(rank)}) for rank, spec in enumerate(specs)]


def nodes_of_jobset() -> list[tuple[dict, dict[str, str]]]:
    manifest = read("jobset.yaml")
    (job,) = manifest["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    assert spec["completionMode"] == "Indexed" and spec["parallelism"] == spec["completions"]
    (container,) = spec["template"]["spec"]["containers"]
    given = {one["name"]: one for one in container["env"]}
    assert given["RANK"]["valueFrom"]["fieldRef"]["fieldPath"] == INDEX
    assert given["WORLD_SIZE"]["value"] == str(spec["completions"])
    name = manifest["metadata"]["name"]
    assert given["MASTER_ADDR"]["value"] == f"{name}-{job['name']}-0-0.{name}"
    return [(container, {"RANK": str(rank)}) for rank in range(spec["completions"])]


@pytest.mark.parametrize("nodes", [nodes_of_pytorchjob, nodes_of_jobset])
def test_every_node_is_a_right_call(nodes, inputs: Inputs, tmp_path: Path) -> None:
    data = tmp_path / "data"
    shutil.copytree(inputs.dataset, data / "LLaVA-Pretrain/wds")
    shutil.copytree(inputs.checkpoint, data / "llava-7b")
    found = nodes()
    assert len(found) == 2
    for rank, (container, added) in enumerate(found):
        assert container["command"] == ["bash", str(STAGE_1.relative_to(ROOT))]
        words = [word.replace("/data", str(data)) for word in container["args"]]
        environment = {one["name"]: one["value"] for one in container["env"] if "value" in one} | added
        gpus = container["resources"]["limits"]["nvidia.com/gpu"]
        assert environment["KUBERNETES_CONTAINER_RESOURCE_GPU"] == str(gpus)
        result = start(STAGE_1, words, DRY_RUN="1", ACCELERATOR="cuda", **environment)
        assert result.returncode == 0, result.stderr
        lines = result.stdout.splitlines()
        told = {name: lines[lines.index(f"--{name}") + 1] for name in ("nnodes", "node_rank", "nproc_per_node")}
        assert told == {"nnodes": "2", "node_rank": str(rank), "nproc_per_node": str(gpus)}


@pytest.mark.skipif("LLAVA_CRDS" not in os.environ, reason="LLAVA_CRDS names no folder of published definitions")
@pytest.mark.parametrize("name", ["pytorchjob.yaml", "jobset.yaml"])
def test_the_form_is_the_published_one(name: str) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    definition = yaml.safe_load(Path(os.environ["LLAVA_CRDS"], name).read_text())
    manifest = read(name)
    version = manifest["apiVersion"].rpartition("/")[2]
    (found,) = (one for one in definition["spec"]["versions"] if one["name"] == version)
    schema = closed(found["schema"]["openAPIV3Schema"])
    jsonschema.validate(manifest, schema)


def closed(schema: Any) -> Any:
    """The same, objects with named fields take no others: the server would leave them out without a word."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    inner = {name: closed(value) for name, value in schema.items()}
    if inner.get("type") == "object" and inner.get("properties") and "additionalProperties" not in inner:
        inner["additionalProperties"] = False
    if inner.get("x-kubernetes-int-or-string"):
        inner.pop("type", None)
    return inner
