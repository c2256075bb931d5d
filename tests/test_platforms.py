"""The files for Kubernetes, AWS Batch and Slurm: as strict as can be said without a cluster, and true to the job."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.request
import uuid
from collections.abc import Iterator
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import boto3
import botocore.session
import pytest
import yaml
from botocore.model import ListShape, Shape, StructureShape
from botocore.validate import ParamValidator

from crowdlayer.errors import (
    AccessError,
    DataError,
    DeviceMemoryError,
    InterruptedRunError,
    SettingsError,
    StoreError,
)
from crowdlayer.settings import PREFIX, Settings
from tests.conftest import QUICK, ROOT
from tests.servers import free_port

HOPELESS = sorted(error.exit_code for error in (DataError, DeviceMemoryError, AccessError, SettingsError))
"""Another try would end the same way."""
PASSING = sorted(error.exit_code for error in (StoreError, InterruptedRunError))

K8S, BATCH, SLURM = ROOT / "k8s", ROOT / "crowdlayer/platforms/aws_batch", ROOT / "crowdlayer/platforms/slurm"
OVERLAYS = sorted(path.name for path in (K8S / "overlays").iterdir())


def test_a_setting_that_a_platforms_file_names_is_one() -> None:
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    files = [path for folder in (K8S, BATCH, SLURM) for path in folder.rglob("*") if path.is_file()]
    named = {name for path in files for name in re.findall(rf"{PREFIX}[A-Z_]*[A-Z]", path.read_text())}
    assert f"{PREFIX}TASKS" in named
    assert named <= known


# --- several nodes ---------------------------------------------------------------------------------------------------


def run_pods(folder: Path, settings: dict[str, str]) -> list[tuple[int, str, str]]:
    """Two pods of an Indexed Job, each with a /tmp of its own: exit code, standard output, standard error."""
    together = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    together |= {f"{PREFIX}{name}": value for name, value in settings.items()}
    pods = []
    for index in ("0", "1"):
        (folder / index).mkdir(exist_ok=True)
        own = {"JOB_COMPLETION_INDEX": index, "TMPDIR": str(folder / index)}
        pods.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / "entrypoint.py")],
                env=dict(os.environ) | together | own,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    said = [pod.communicate(timeout=300) for pod in pods]
    return [(pod.returncode, out, err) for pod, (out, err) in zip(pods, said, strict=True)]


@pytest.mark.slow
def test_two_nodes_end_well_and_the_first_puts_the_results(shapes: Path, tmp_path: Path) -> None:
    settings = QUICK | {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out"), "N_EPOCHS": "1"}
    results = tmp_path / "out/results/crowdlayer.json"
    for attempt in ("trains", "finds it done"):
        (code, said, log), (other_code, other_said, other_log) = run_pods(tmp_path, settings)
        assert (code, other_code) == (0, 0), attempt + log + other_log
        assert (said, other_said) == (f"{results}\n", ""), attempt
    assert json.loads(results.read_text())["job"]["devices"] == ["cpu", "cpu"]


@pytest.mark.slow
def test_processes_that_torchrun_starts_train_and_are_started_again(shapes: Path, tmp_path: Path) -> None:
    """One is killed; torchrun starts all again, who meet at the same store. A run that is done they all find done."""
    settings = QUICK | {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out"), "N_EPOCHS": "40"}
    variables = {f"{PREFIX}{name}": value for name, value in settings.items()}
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=1", "--monitor-interval=0.2"]
    results = tmp_path / "out/results/crowdlayer.json"
    logs = []
    for attempt in ("trains", "finds it done"):
        log = ""
        with subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options, str(ROOT / "entrypoint.py")],
            env=dict(os.environ) | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as torchrun:
            assert torchrun.stdout is not None
            for line in torchrun.stdout:
                log += line
                if " epoch  3/40 " in line and "going on" not in log:
                    children = subprocess.run(["pgrep", "-P", str(torchrun.pid)], capture_output=True, text=True).stdout
                    os.kill(int(children.split()[-1]), signal.SIGKILL)
        assert torchrun.returncode == 0, attempt + log
        assert f"{results}\n" in log
        logs.append(log)
    assert "going on from checkpoint" in logs[0]
    assert "already done" in logs[1]


@pytest.mark.slow
def test_the_readmes_torchrun_on_two_nodes_trains(shapes: Path, tmp_path: Path) -> None:
    """Which find each other at an endpoint, and out which of them is the first; each with a place of its own."""
    (line,) = re.findall(r"^torchrun (.+) entrypoint.py$", (ROOT / "README.md").read_text(), re.MULTILINE)
    options = line.replace("10.0.0.1:29500", f"127.0.0.1:{free_port()}")
    options = options.replace("--nproc-per-node 8", "--nproc-per-node 1")
    settings = QUICK | {"TASKS": str(shapes), "OUTPUT": str(tmp_path / "out")}
    nodes = [
        subprocess.Popen(
            [sys.executable, "-m", "torch.distributed.run", *options.split(), str(ROOT / "entrypoint.py")],
            env=dict(os.environ) | {f"{PREFIX}{name}": value for name, value in settings.items()},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    try:
        logs = [node.communicate(timeout=300)[0] for node in nodes]
    finally:
        for node in nodes:
            node.kill()
    assert [node.returncode for node in nodes] == [0, 0], logs
    located = [f"{tmp_path}/out/results/crowdlayer.json\n" in log for log in logs]
    assert sorted(located) == [False, True]
    results = json.loads((tmp_path / "out/results/crowdlayer.json").read_text())
    assert results["job"]["devices"] == ["cpu", "cpu"]


# --- Kubernetes ------------------------------------------------------------------------------------------------------

KUBERNETES = ("1.31", "1.34", "1.37")
"""The oldest that has all we use, the oldest that is maintained, the newest."""


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What kustomize makes of each overlay, with the credentials of a secret and of a role."""
    if shutil.which("kubectl") is None:
        pytest.skip("no kubectl")
    copy = Path(shutil.copytree(K8S, tmp_path_factory.mktemp("k8s") / "k8s"))
    made = {}
    for name in OVERLAYS:
        for credentials in ("secret", "role"):
            overlay = copy / "overlays" / name / "kustomization.yaml"
            text = (K8S / "overlays" / name / "kustomization.yaml").read_text()
            overlay.write_text(text.replace("../../credentials/secret", f"../../credentials/{credentials}"))
            done = subprocess.run(["kubectl", "kustomize", str(overlay.parent)], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            made[f"{name}-{credentials}"] = list(yaml.safe_load_all(done.stdout))
    return made


def job_of(documents: list[dict[str, Any]]) -> dict[str, Any]:
    (job,) = (document for document in documents if document["kind"] == "Job")
    return job


def container_of(job: dict[str, Any]) -> dict[str, Any]:
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert isinstance(container, dict)
    return container


def test_every_document_has_the_schema_of_every_kubernetes_version(
    overlays: dict[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump_all(document for documents in overlays.values() for document in documents))
    validate = Path(sys.executable).parent / "kubernetes-validate"
    for version in KUBERNETES:
        done = subprocess.run(
            [str(validate), "--strict", "--no-warn", "-k", version, str(path)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_a_pod_failure_policy_knows_the_exit_codes(overlays: dict[str, list[dict[str, Any]]]) -> None:
    for name, documents in overlays.items():
        job = job_of(documents)
        rules = job["spec"]["podFailurePolicy"]["rules"]
        ends, drained, interrupted = rules
        assert ends["action"] == ("FailIndex" if name.startswith("array") else "FailJob")
        assert ends["onExitCodes"]["values"] == HOPELESS
        assert (drained["action"], interrupted["action"]) == ("Ignore", "Ignore")
        assert drained["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
        assert interrupted["onExitCodes"]["values"] == [InterruptedRunError.exit_code]
        assert {rule["onExitCodes"]["containerName"] for rule in (ends, interrupted)} == {container_of(job)["name"]}
        assert job["spec"]["template"]["spec"]["restartPolicy"] == "Never"  # or there is no such policy
        assert job["spec"]["podReplacementPolicy"] == "Failed"
        assert ("backoffLimitPerIndex" in job["spec"]) == name.startswith("array")  # FailIndex needs it


def test_pods_meet_the_restricted_profile_and_leave_the_root_alone(overlays: dict[str, list[dict[str, Any]]]) -> None:
    for documents in overlays.values():
        job = job_of(documents)
        pod, container = job["spec"]["template"]["spec"], container_of(job)
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "readOnlyRootFilesystem": True,
        }
        assert pod["automountServiceAccountToken"] is False
        assert pod["enableServiceLinks"] is False, "a Service named crowdlayer would set CROWDLAYER_SERVICE_HOST"
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert set(mounts.values()) == set(volumes)
        assert volumes[mounts["/dev/shm"]]["emptyDir"]["medium"] == "Memory"
        assert "/tmp" in mounts
        assert container["terminationMessagePath"] == "/dev/termination-log"


def test_a_pod_asks_for_what_it_may_use(overlays: dict[str, list[dict[str, Any]]]) -> None:
    """As many GPUs as it is limited to, or the API server refuses it; no more in volumes than the limits."""
    for documents in overlays.values():
        job = job_of(documents)
        resources = container_of(job)["resources"]
        requests, limits = resources["requests"], resources["limits"]
        assert all(requests[name] == limits[name] for name in ("cpu", "memory", "nvidia.com/gpu"))  # evicted last
        volumes = job["spec"]["template"]["spec"]["volumes"]
        size = {volume["name"]: int(volume["emptyDir"]["sizeLimit"].removesuffix("Gi")) for volume in volumes}
        assert size["shm"] < int(limits["memory"].removesuffix("Gi"))
        assert size["tmp"] < int(limits["ephemeral-storage"].removesuffix("Gi"))


def test_the_pods_of_a_run_find_each_other(overlays: dict[str, list[dict[str, Any]]]) -> None:
    documents = overlays["many-nodes-secret"]
    job, (service,) = job_of(documents), (document for document in documents if document["kind"] == "Service")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    environment = {item["name"]: item for item in container_of(job)["env"]}
    assert spec["completionMode"] == "Indexed"
    assert int(environment["NNODES"]["value"]) == spec["completions"] == spec["parallelism"]
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= job["spec"]["template"]["metadata"]["labels"].items()
    assert pod["subdomain"] == service["metadata"]["name"]


def test_an_array_has_a_pod_for_each_entry(overlays: dict[str, list[dict[str, Any]]]) -> None:
    documents = overlays["array-secret"]
    (settings,) = (document["data"] for document in documents if document["kind"] == "ConfigMap")
    job = job_of(documents)
    assert len(json.loads(settings["CROWDLAYER_SWEEP"])) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert "env" not in container_of(job)  # no NNODES: the index is that of a run, not of a node


def test_credentials_come_by_a_secret_or_by_a_role(overlays: dict[str, list[dict[str, Any]]]) -> None:
    for name, documents in overlays.items():
        job = job_of(documents)
        secrets = [source for source in container_of(job)["envFrom"] if "secretRef" in source]
        accounts = [document for document in documents if document["kind"] == "ServiceAccount"]
        named = job["spec"]["template"]["spec"].get("serviceAccountName")
        if name.endswith("secret"):
            assert (len(secrets), accounts, named) == (1, [], None)
        else:
            assert (secrets, [account["metadata"]["name"] for account in accounts]) == ([], [named])


def test_the_readme_shows_every_overlay() -> None:
    told = (K8S / "README.md").read_text()
    assert all(f"k8s/overlays/{name}" in told for name in OVERLAYS)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="no kubectl")
def test_the_readmes_patch_gives_a_second_run_another_name(tmp_path: Path) -> None:
    patch = re.search(r"`(patches: .*)`", (K8S / "README.md").read_text())
    assert patch is not None
    shutil.copytree(K8S, tmp_path / "k8s")
    own = tmp_path / "own" / "kustomization.yaml"
    own.parent.mkdir()
    own.write_text(f"resources: [../k8s/overlays/one-gpu]\n{patch[1]}\n")
    done = subprocess.run(["kubectl", "kustomize", str(own.parent)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert job_of(list(yaml.safe_load_all(done.stdout)))["metadata"]["name"] == "birds"


# --- AWS Batch -------------------------------------------------------------------------------------------------------

DEFINITIONS = ("job-definition.json", "job-definition-nodes.json")
SUBMISSIONS = ("submit.json", "submit-array.json", "submit-nodes.json")


def batch_file(name: str) -> dict[str, Any]:
    document = json.loads((BATCH / name).read_text())
    assert isinstance(document, dict)
    return document


def not_of_the_enums(value: Any, shape: Shape, path: str = "") -> Iterator[str]:
    """Texts that AWS would refuse and botocore lets pass."""
    if isinstance(shape, StructureShape):
        for key, item in value.items():
            yield from not_of_the_enums(item, shape.members[key], f"{path}.{key}")
    elif isinstance(shape, ListShape):
        for number, item in enumerate(value):
            yield from not_of_the_enums(item, shape.member, f"{path}[{number}]")
    elif (allowed := getattr(shape, "enum", None)) and value not in allowed:
        yield f"{path}: {value} is none of {allowed}"


@pytest.mark.parametrize("name", DEFINITIONS + SUBMISSIONS)
def test_a_batch_document_is_what_the_service_takes(name: str) -> None:
    operation = "RegisterJobDefinition" if name in DEFINITIONS else "SubmitJob"
    shape = botocore.session.Session().get_service_model("batch").operation_model(operation).input_shape
    assert shape is not None
    document = batch_file(name)
    report = ParamValidator().validate(document, shape)
    assert not report.has_errors(), report.generate_report()
    assert not list(not_of_the_enums(document, shape))
    assert re.fullmatch(r"[A-Za-z0-9][\w-]{0,127}", document.get("jobDefinitionName") or document["jobName"])
    assert 2 <= document.get("arrayProperties", {"size": 2})["size"] <= 10_000
    for override in document.get("nodeOverrides", {}).get("nodePropertyOverrides", []):
        assert re.fullmatch(r"\d+:\d*", override["targetNodes"])


def containers(definition: dict[str, Any]) -> list[dict[str, Any]]:
    """The container of a job definition, or those of its ranges of nodes."""
    if "containerProperties" in definition:
        return [definition["containerProperties"]]
    return [nodes["container"] for nodes in definition["nodeProperties"]["nodeRangeProperties"]]


@pytest.mark.parametrize("name", DEFINITIONS)
def test_a_batch_container_needs_no_rights_and_has_what_the_job_needs(name: str) -> None:
    definition = batch_file(name)
    assert definition["timeout"]["attemptDurationSeconds"] >= 60
    for container in containers(definition):
        kinds = [requirement["type"] for requirement in container["resourceRequirements"]]
        assert sorted(kinds) == ["GPU", "MEMORY", "VCPU"]
        assert container["readonlyRootFilesystem"] is True
        assert container["privileged"] is False
        assert [mount["containerPath"] for mount in container["mountPoints"]] == ["/tmp"]
        assert {m["sourceVolume"] for m in container["mountPoints"]} == {v["name"] for v in container["volumes"]}
        assert container["linuxParameters"]["sharedMemorySize"] >= 1024
        assert not [item for item in container["environment"] if item["name"].startswith("AWS_BATCH")]  # reserved


def decided(strategy: dict[str, Any], exit_code: int | None, reason: str = "", status: str = "") -> str:
    """What Batch does after an attempt: the first rule all of whose globs fit; with none it tries again."""
    seen = {"onExitCode": "" if exit_code is None else str(exit_code), "onReason": reason, "onStatusReason": status}
    for rule in strategy["evaluateOnExit"]:
        if all(fnmatchcase(seen[key], glob) for key, glob in rule.items() if key != "action"):
            return str(rule["action"])
    return "RETRY"


@pytest.mark.parametrize("name", DEFINITIONS)
def test_batch_tries_again_after_the_codes_that_may_go_well(name: str) -> None:
    strategy = batch_file(name)["retryStrategy"]
    assert 1 <= strategy["attempts"] <= 10
    assert len(strategy["evaluateOnExit"]) <= 5
    failed = "Essential container in task exited"
    assert {code: decided(strategy, code, status=failed) for code in (*PASSING, *HOPELESS)} == {
        **dict.fromkeys(PASSING, "RETRY"),
        **dict.fromkeys(HOPELESS, "EXIT"),
    }
    assert decided(strategy, None, status="Host EC2 (instance i-0123456789abcdef0) terminated.") == "RETRY"
    assert decided(strategy, None, reason="CannotPullContainerError: pull access denied") == "EXIT"


def test_batch_registers_and_runs_all_of_them(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through boto3, against moto's server, told to end jobs at once instead of running their image."""
    for name, value in {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_ENDPOINT_URL": endpoint}.items():
        monkeypatch.setenv(name, value)
    configuration = urllib.request.Request(
        f"{endpoint}/moto-api/config",
        data=b'{"batch": {"use_docker": false}}',
        headers={"Content-Type": "application/json"},
        method="POST",
    )
    urllib.request.urlopen(configuration).close()
    session = boto3.Session(region_name="us-east-1")
    batch, iam, ec2 = (session.client(service) for service in ("batch", "iam", "ec2"))
    unique = uuid.uuid4().hex[:8]
    role = iam.create_role(RoleName=f"batch-{unique}", AssumeRolePolicyDocument="{}")["Role"]["Arn"]
    profile = iam.create_instance_profile(InstanceProfileName=f"ecs-{unique}")["InstanceProfile"]["Arn"]
    batch.create_compute_environment(
        computeEnvironmentName=f"spot-{unique}",
        type="MANAGED",
        state="ENABLED",
        serviceRole=role,
        computeResources={
            "type": "SPOT",
            "minvCpus": 0,
            "maxvCpus": 192,
            "instanceTypes": ["g4dn.12xlarge"],
            "subnets": [ec2.describe_subnets()["Subnets"][0]["SubnetId"]],
            "securityGroupIds": [ec2.describe_security_groups()["SecurityGroups"][0]["GroupId"]],
            "instanceRole": profile,
        },
    )
    batch.create_job_queue(
        jobQueueName="crowdlayer",
        state="ENABLED",
        priority=1,
        computeEnvironmentOrder=[{"order": 1, "computeEnvironment": f"spot-{unique}"}],
    )
    for name in DEFINITIONS:
        definition = batch_file(name)
        batch.register_job_definition(**definition)
        found = batch.describe_job_definitions(jobDefinitionName=definition["jobDefinitionName"])["jobDefinitions"]
        assert len(found[0]["retryStrategy"]["evaluateOnExit"]) == len(definition["retryStrategy"]["evaluateOnExit"])
    submitted = {name: batch.submit_job(**batch_file(name))["jobId"] for name in SUBMISSIONS}
    jobs = {job["jobId"]: job for job in batch.describe_jobs(jobs=list(submitted.values()))["jobs"]}
    assert set(jobs) == set(submitted.values())
    overrides = batch_file("submit-array.json")["containerOverrides"]["environment"]
    (sweep,) = (json.loads(item["value"]) for item in overrides if item["name"] == "CROWDLAYER_SWEEP")
    assert jobs[submitted["submit-array.json"]]["arrayProperties"]["size"] == len(sweep)
    assert jobs[submitted["submit-nodes.json"]]["nodeProperties"]["numNodes"] == 2


# --- Slurm -----------------------------------------------------------------------------------------------------------


SRUN = """#!/bin/sh
echo "srun $*" >>"$ASKED"
while [ "${1#--}" != "$1" ]; do shift; done
highest=0
for CODE in $CODES; do
    export CODE
    "$@"
    code=$?
    [ $code -le $highest ] || highest=$code
done
exit $highest
"""
"""As Slurm's: runs every task, and ends with the highest of their codes."""


def run_sbatch(folder: Path, *codes: int, **environment: str) -> tuple[int, list[str]]:
    """The batch script whose tasks end with `codes`: its own code, and what it asked of Slurm."""
    asked = folder / "asked"
    programs = {
        "srun": SRUN,
        "scontrol": '#!/bin/sh\necho "scontrol $*" >>"$ASKED"\n',
        "python": "#!/bin/sh\nexit $CODE\n",
        "apptainer": "#!/bin/sh\nexit $CODE\n",
    }
    for name, script in programs.items():
        (folder / name).write_text(script)
        (folder / name).chmod(0o755)
    variables = {
        "PATH": f"{folder}:/usr/bin:/bin",
        "ASKED": str(asked),
        "CODES": " ".join(map(str, codes)),
        "SLURM_JOB_ID": "41",
        "SLURM_SUBMIT_DIR": "/app",
        "SLURM_CPUS_PER_TASK": "8",
    }
    done = subprocess.run(
        ["bash", str(SLURM / "crowdlayer.sbatch")], env=variables | environment, capture_output=True, text=True
    )
    assert done.stderr == ""
    return done.returncode, asked.read_text().splitlines()


@pytest.mark.parametrize("code", [0, *HOPELESS, 70, *PASSING])
def test_slurm_queues_again_what_may_go_well(tmp_path: Path, code: int) -> None:
    ended, asked = run_sbatch(tmp_path, code)
    assert ended == code
    assert ("scontrol requeue 41" in asked) == (code in PASSING)


@pytest.mark.parametrize("code", [*HOPELESS, 70])
def test_slurm_hears_of_the_task_that_failed_not_of_those_that_it_stopped(tmp_path: Path, code: int) -> None:
    ended, asked = run_sbatch(tmp_path, 75, code)
    assert ended == code
    assert "scontrol requeue 41" not in asked


def test_slurm_queues_the_element_of_an_array_again_not_all_of_them(tmp_path: Path) -> None:
    """An array and its last element have the same number."""
    element = {"SLURM_JOB_ID": "41", "SLURM_ARRAY_JOB_ID": "41", "SLURM_ARRAY_TASK_ID": "2"}
    assert run_sbatch(tmp_path, 75, **element)[1][1:] == ["scontrol requeue 41_2"]


def test_slurm_does_not_queue_for_ever(tmp_path: Path) -> None:
    assert "scontrol requeue 41" not in run_sbatch(tmp_path, PASSING[0], SLURM_RESTART_COUNT="20")[1]


def test_slurm_ends_all_tasks_with_the_first_that_fails(tmp_path: Path) -> None:
    _, (asked,) = run_sbatch(tmp_path, 0)
    assert asked.startswith("srun --kill-on-bad-exit=1 --cpus-per-task=8 ")
    assert asked.endswith(" python /app/entrypoint.py")


def test_slurm_runs_the_container_too(tmp_path: Path) -> None:
    _, (asked,) = run_sbatch(tmp_path, 0, IMAGE="crowdlayer.sif")
    assert asked.endswith(" apptainer exec --nv --no-home crowdlayer.sif python /app/entrypoint.py")
