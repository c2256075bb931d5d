"""Where the job finds itself, by the variables that the platforms set."""

from __future__ import annotations

import pytest

from crowdlayer.errors import SettingsError
from crowdlayer.inputs import processes_to_start
from crowdlayer.machine.launch import Launch, Peers, array_index, hosts_the_store, recognise
from crowdlayer.settings import Settings

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node-0",
    "MASTER_PORT": "29400",
    "TORCHELASTIC_USE_AGENT_STORE": "True",
}
KUBEFLOW = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "train-master-0", "MASTER_PORT": "23456"}
BATCH_MAIN = {
    "AWS_BATCH_JOB_NUM_NODES": "3",
    "AWS_BATCH_JOB_NODE_INDEX": "1",
    "AWS_BATCH_JOB_MAIN_NODE_INDEX": "1",
}
BATCH_CHILD = BATCH_MAIN | {
    "AWS_BATCH_JOB_NODE_INDEX": "0",
    "AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": "10.0.0.7",
}
SLURM = {
    "SLURM_JOB_ID": "1234",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
}
SLURM_SHELL = {
    "SLURM_JOB_ID": "4",
    "SLURM_NNODES": "1",
    "SLURM_STEP_ID": "4294967290",
    "SLURM_STEP_NUM_TASKS": "1",
    "SLURM_STEP_NUM_NODES": "1",
    "SLURM_STEP_NODELIST": "n0",
    "SLURM_STEP_TASKS_PER_NODE": "1",
}
"""Of salloc, where LaunchParameters has use_interactive_step."""
SLURM_PER_GPU = SLURM | {
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_PROCID": "6",
    "SLURM_LOCALID": "2",
}


@pytest.mark.parametrize(
    ("variables", "launch"),
    [
        ({}, Launch()),
        ({"MASTER_ADDR": "elsewhere", "MASTER_PORT": "1"}, Launch()),  # left over from something else
        ({"NNODES": "1"}, Launch("explicit")),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "1234"},
            Launch("explicit", 2, 1, "a", 1234),
        ),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "a"}, Launch("explicit", 2, 0, "a", 29500)),
        (TORCHRUN, Launch("torchrun", 2, 1, "node-0", 29400, Peers(3, 4, 1, 2))),
        (TORCHRUN | {"NNODES": "2", "NODE_RANK": "1"}, Launch("torchrun", 2, 1, "node-0", 29400, Peers(3, 4, 1, 2))),
        (
            TORCHRUN | {"TORCHELASTIC_RUN_ID": "a"},
            Launch("torchrun", 2, 1, "node-0", 29400, Peers(3, 4, 1, 2), run="a"),
        ),
        ({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}, Launch("torchrun", port=29500, peers=Peers(0, 1, 0, 1))),
        (KUBEFLOW, Launch("explicit", 2, 1, "train-master-0", 23456)),
        (KUBEFLOW | {"WORLD_SIZE": "1", "RANK": "0"}, Launch()),
        (
            {"NNODES": "4", "JOB_COMPLETION_INDEX": "2", "MASTER_ADDR": "train-0.train"},
            Launch("kubernetes", 4, 2, "train-0.train", 29500),
        ),
        ({"JOB_COMPLETION_INDEX": "2"}, Launch()),  # an array: every pod a run of its own
        (BATCH_MAIN, Launch("aws-batch", 3, 0, "127.0.0.1", 29500)),
        (BATCH_CHILD, Launch("aws-batch", 3, 2, "10.0.0.7", 29500)),
        (SLURM, Launch("slurm", 2, 1, "gpu07", 21234, run="slurm-1234.0")),
        (SLURM | {"SLURM_STEP_ID": "3"}, Launch("slurm", 2, 1, "gpu07", 24261, run="slurm-1234.3")),
        (
            SLURM | {"MASTER_ADDR": "b", "MASTER_PORT": "5000"},
            Launch("slurm", 2, 1, "b", 5000, run="slurm-1234.0"),
        ),
        (SLURM_PER_GPU, Launch("slurm", 2, 1, "gpu07", 21234, Peers(6, 8, 2, 4), run="slurm-1234.0")),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "1"}, Launch("slurm")),  # a batch script without srun
        (SLURM_SHELL, Launch("slurm")),
        (SLURM | {"SLURM_JOB_ID": "3221225473"}, Launch("slurm", 2, 1, "gpu07", 25473, run="slurm-3221225473.0")),
        (
            SLURM | {"SLURM_STEP_NUM_NODES": "1", "SLURM_STEP_NUM_TASKS": "1", "SLURM_NODEID": "0"},
            Launch("slurm", 1, 0, "gpu07", run="slurm-1234.0"),
        ),
    ],
)
def test_the_platform_is_recognised(variables: dict[str, str], launch: Launch) -> None:
    assert recognise(variables) == launch


def test_the_first_pod_is_found_by_the_name_of_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    pod = {"NNODES": "4", "JOB_COMPLETION_INDEX": "2"}
    monkeypatch.setattr("socket.getfqdn", lambda: "train-2.birds.default.svc.cluster.local")
    assert recognise(pod).address == "train-0.birds.default.svc.cluster.local"
    monkeypatch.setattr("socket.getfqdn", lambda: "train-2")  # no headless Service
    with pytest.raises(SettingsError, match="MASTER_ADDR: must be set, NNODES is 4"):
        recognise(pod)


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"NNODES": "two"}, "NNODES: must be a number, got 'two'"),
        ({"NODE_RANK": "1"}, "NNODES: must be set"),
        (
            {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "job-0..svc"},  # of a manifest with an empty variable
            "MASTER_ADDR: must be a host's name or address, got 'job-0..svc'",
        ),
        ({"NNODES": "2", "MASTER_ADDR": "a"}, "NODE_RANK: must be set"),
        ({"NNODES": "2", "NODE_RANK": "0"}, "MASTER_ADDR: must be set, NNODES is 2"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "explicit: node 2 must be one of 0 … 1"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a", "MASTER_PORT": "70000"}, "MASTER_PORT: must be from 1"),
        (
            {"NNODES": "3", "NODE_RANK": "1", "JOB_COMPLETION_INDEX": "2", "MASTER_ADDR": "a"},
            "NODE_RANK: must be JOB_COMPLETION_INDEX=2, got 1",
        ),
        (TORCHRUN | {"NNODES": "3"}, "NNODES: must agree with WORLD_SIZE=4 and LOCAL_WORLD_SIZE=2, got 3"),
        (TORCHRUN | {"MASTER_ADDR": ""}, "MASTER_ADDR: must be set beside RANK and WORLD_SIZE"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": ""}, "LOCAL_WORLD_SIZE: must be set"),
        (KUBEFLOW | {"MASTER_ADDR": ""}, "MASTER_ADDR: must be set beside RANK and WORLD_SIZE"),
        (KUBEFLOW | {"RANK": "2"}, "explicit: node 2 must be one of 0 … 1"),
        (TORCHRUN | {"RANK": "4"}, "must be one of its world"),
        (BATCH_CHILD | {"AWS_BATCH_JOB_MAIN_NODE_PRIVATE_IPV4_ADDRESS": ""}, "IPV4_ADDRESS: must be set"),
        ({"SLURM_JOB_ID": "7", "SLURM_NNODES": "2"}, "SLURM_NNODES: 2 nodes need srun"),
        (SLURM_SHELL | {"SLURM_NNODES": "2"}, "SLURM_NNODES: 2 nodes need srun"),
        (SLURM | {"SLURM_STEP_NUM_TASKS": "3", "SLURM_STEP_TASKS_PER_NODE": "2,1"}, "must be as many on each"),
    ],
)
def test_contradictions_are_refused(variables: dict[str, str], complaint: str) -> None:
    with pytest.raises(SettingsError, match=complaint):
        recognise(variables)


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, None),
        ({"AWS_BATCH_JOB_ARRAY_INDEX": "3"}, ("AWS_BATCH_JOB_ARRAY_INDEX", 3)),
        ({"SLURM_ARRAY_TASK_ID": "0"}, ("SLURM_ARRAY_TASK_ID", 0)),
        ({"JOB_COMPLETION_INDEX": "5"}, ("JOB_COMPLETION_INDEX", 5)),
        ({"JOB_COMPLETION_INDEX": "5", "NNODES": "6"}, None),
    ],
)
def test_an_element_of_an_array_knows_its_place(variables: dict[str, str], found: tuple[str, int] | None) -> None:
    assert array_index(variables) == found


def test_one_process_of_a_run_hosts_the_store_and_one_publishes() -> None:
    per_gpu = [
        recognise(SLURM_PER_GPU | {"SLURM_NODEID": str(n), "SLURM_PROCID": str(4 * n + i), "SLURM_LOCALID": str(i)})
        for n in range(2)
        for i in range(4)
    ]
    assert [launch.publishes for launch in per_gpu] == [True] + [False] * 7
    assert [launch.leads for launch in per_gpu] == [True, False, False, False] * 2
    assert [hosts_the_store(launch, {}) for launch in per_gpu] == [True] + [False] * 7
    first = recognise(TORCHRUN | {"RANK": "0", "LOCAL_RANK": "0", "GROUP_RANK": "0"})
    assert not hosts_the_store(first, TORCHRUN)  # torchrun's agent has one
    assert hosts_the_store(first, {})


@pytest.mark.parametrize("asked", ["auto", "1"])
def test_where_the_platform_starts_a_process_per_gpu_none_is_started(asked: str) -> None:
    settings = Settings(tasks="/data", n_processes=asked)
    assert processes_to_start(settings, Launch("slurm", 2, 1, "gpu07", 1, Peers(6, 8, 2, 4))) == 1


def test_processes_that_the_platform_has_started_cannot_be_asked_for() -> None:
    settings = Settings(tasks="/data", n_processes=4)
    with pytest.raises(SettingsError, match=r"N_PROCESSES: must be auto or 1 where slurm has started 8 .*, got 4"):
        processes_to_start(settings, Launch("slurm", 2, 1, "gpu07", 1, Peers(6, 8, 2, 4)))


def test_what_was_recognised_is_told_in_a_line() -> None:
    assert str(Launch()) == "alone: one node"
    assert str(recognise(SLURM_PER_GPU)) == "slurm: node 1 of 2, process 6 of 8, meeting at gpu07:21234"
