"""Job specs that TorchX would hand to a cluster's scheduler."""

import shlex

import pytest
import yaml
from torchx.runner import get_runner

from launch.train import py

SPOT = ["--nnodes", "2", "--nproc", "4", "--gpu", "4", "--max_restarts", "3", "--max_retries", "5", "--memory_mb", "64000"]
OVERRIDES = ["data.path=/shared/dataset", "output=/shared/run", "trainer.resume=true", "+model.options={num_heads: 2}"]


def dryrun(scheduler: str, *arguments: str, **options: str) -> str:
    """What ``torchx run --dryrun -s SCHEDULER launch/train.py …`` prints of the request."""
    with get_runner() as runner:
        return str(runner.dryrun_component("launch/train.py", list(arguments), scheduler, options))


def agent_of(command: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split the command of a machine into torchelastic's options and what each rank runs."""
    assert command[:4] == ["exec", "python", "-m", "torch.distributed.run"]
    end = command.index("-m", 4)
    return dict(option.removeprefix("--").split("=", 1) for option in command[4:end]), command[end:]


def test_slurm():
    script = dryrun("slurm", *SPOT, *OVERRIDES, partition="gpu", time="24:00:00")
    machines = [line for line in script.splitlines() if line.startswith("#SBATCH --job-name")]
    assert len(machines) == 2
    for option in ("--partition=gpu", "--time=24:00:00", "--requeue", "--cpus-per-task=4", "--mem=64000", "--gpus-per-task=4"):
        assert all(f" {option}" in line for line in machines)
    assert "TORCHX_MAX_RETRIES=5" in script
    start = script.index("\nsrun ")
    srun = script[start : script.index("\nexitcode=")].replace("\\\n", " ").replace('"$SLURM_JOB_ID"', "123")
    words = shlex.split(srun)
    commands = [shlex.split(words[place + 2]) for place, word in enumerate(words) if word == "bash"]
    assert len(commands) == 2
    for command in commands:
        options, program = agent_of(command)
        assert options == {
            "nnodes": "2",
            "nproc-per-node": "4",
            "max-restarts": "3",
            "rdzv-backend": "c10d",
            "rdzv-id": "123",
            "rdzv-endpoint": "${SLURM_JOB_NODELIST_HET_GROUP_0:=localhost}:29500",
        }
        assert program == ["-m", "launch.train", *OVERRIDES]


def test_kubernetes():
    mounts = "type=bind,src=/data,dst=/shared/dataset,readonly,type=volume,src=runs,dst=/shared/run"
    arguments = [*SPOT, "--image", "registry/glintru_rec:1", "--mounts", mounts, *OVERRIDES]
    job = yaml.safe_load(dryrun("kubernetes", *arguments, queue="default"))
    assert job["spec"]["queue"] == "default"
    assert job["spec"]["maxRetry"] == 5
    assert len(job["spec"]["tasks"]) == 2
    for number, task in enumerate(job["spec"]["tasks"]):
        pod = task["template"]["spec"]
        (container,) = pod["containers"]
        shell, flag, line = container["command"]
        assert (shell, flag) == ("bash", "-c")
        options, program = agent_of(shlex.split(line))
        assert (options["nnodes"], options["nproc-per-node"], options["max-restarts"]) == ("2", "4", "3")
        assert options["rdzv-id"] == job["metadata"]["name"]
        host = "TORCHX_RANK0_HOST" if number == 0 else "VC_TRAIN_0_HOSTS"
        assert options["rdzv-endpoint"] == f"${{{host}:=localhost}}:29500"
        assert program == ["-m", "launch.train", *OVERRIDES]
        assert container["image"] == "registry/glintru_rec:1"
        assert container["resources"]["limits"] == {"cpu": "4000m", "memory": "64000M", "nvidia.com/gpu": "4"}
        mounted = {mount["mountPath"]: mount["readOnly"] for mount in container["volumeMounts"] if "readOnly" in mount}
        assert mounted == {"/shared/dataset": True, "/shared/run": False}
        sources = {volume["name"]: volume for volume in pod["volumes"]}
        assert sources["mount-0"]["hostPath"]["path"] == "/data"
        assert sources["mount-1"]["persistentVolumeClaim"]["claimName"] == "runs"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"nproc": 0}, "nproc is 0"),
        ({"nnodes": 0}, "nnodes 0"),
        ({"max_restarts": -1}, "max_restarts is -1"),
        ({"max_retries": 2}, "max_retries is 2: give trainer.resume=true"),
    ],
)
def test_refused(options, message):
    with pytest.raises(ValueError, match=message):
        py("data.path=x", "output=y", **options)
