"""The launch recipes, run with engines that only note what they are asked: what they would start is parsed as we do."""

import configparser
import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from nextllm_jax.cli import main as cli
from nextllm_jax.cli.help import parse
from nextllm_jax.cli.serve import KEY_VARIABLE, ServeArguments
from nextllm_jax.config.files import config_of_arguments
from nextllm_jax.distributed.rendezvous import ProcessInfo, find_process_info
from tests.conftest import ROOT

DEPLOY = ROOT / "deploy"
SHELL = ("tpu_vm.sh", "gke_xpk.sh", "slurm.sbatch")
YAML = ("gke_jobset.yaml", "gke_serve.yaml", "skypilot.yaml")
IMAGES = {"Dockerfile": "gcs,hf", "serve.Containerfile": "serve,interop,grammar,gcs"}
UNIT = "nextllm-serve.service"

# What an engine does with a command: gcloud and xpk run what --command holds, srun the words after its options.
ENGINES = {
    "gcloud": 'for word; do case $word in --command=*) bash -c "${word#--command=}";; esac; done',
    "xpk": 'for word; do case $word in --command=*) bash -c "${word#--command=}";; esac; done',
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; "$@"',
    "scontrol": "true",
    "nohup": '"$@"',
}


class Machine:
    """A directory in which the engines, and python, only write down how they were called."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.calls = directory / "calls"
        self.calls.touch()
        (directory / "bin").mkdir()
        for place in (".venv/bin", "nextllm/.venv/bin"):
            (directory / place).mkdir(parents=True)
            (directory / place / "activate").touch()
        for name, behaviour in ENGINES.items():
            self._program(name, behaviour)

    def _program(self, name: str, behaviour: str) -> None:
        note = f'{{ echo {name}; printf "%s\\n" "$@"; echo END; }} >> {self.calls}'
        path = self.directory / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{note}\n{behaviour}\n")
        path.chmod(0o755)

    def run(self, *command: str, exit_codes=(0,), **environment: str) -> int:
        """Run a recipe, whose trainings end with these exit codes one after the other; its own exit code."""
        codes = self.directory / "codes"
        codes.write_text("".join(f"{code}\n" for code in exit_codes))
        self._program("python", f"code=$(head -n 1 {codes}); sed -i 1d {codes}; exit $code")
        path = f"{self.directory / 'bin'}:{os.environ['PATH']}"
        done = subprocess.run(command, cwd=self.directory, env={"PATH": path, **environment}, timeout=60, check=False)
        deadline = time.monotonic() + 60
        while codes.read_text():  # what a recipe leaves running in the background
            assert time.monotonic() < deadline, f"{command} ended with {done.returncode}"
            time.sleep(0.01)
        return done.returncode

    def called(self, name: str) -> list[list[str]]:
        """The arguments of each call of a program."""
        lines, calls = self.calls.read_text().splitlines(), []
        for start, line in enumerate(lines):
            if line == name and (start == 0 or lines[start - 1] == "END"):
                calls.append(lines[start + 1 : lines.index("END", start)])
        return calls

    def trainings(self) -> list[cli.TrainArguments]:
        """What the calls of python train.py ask for, as our own command line reads it, from the repository."""
        found = []
        for script, *arguments in self.called("python"):
            assert script == "train.py"
            found.append(cli.parse_train(arguments, config_of_arguments(arguments)))
        return found


@pytest.fixture
def machine(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)  # the configs that the recipes name
    return Machine(tmp_path)


def check_mesh(arguments: cli.TrainArguments, chips: int, slices: int) -> None:
    sizes = arguments.run.mesh.sizes(chips)
    assert arguments.run.mesh.slices == slices
    assert sizes[1] == chips // slices, "parameters are divided over all chips of a slice"
    assert arguments.run.training.global_batch_size % (sizes[0] * sizes[1]) == 0


def test_every_file_is_tested_here():
    assert {path.name for path in DEPLOY.iterdir()} == {*SHELL, *YAML, *IMAGES, UNIT}


@pytest.mark.parametrize("name", SHELL)
def test_scripts_are_valid(name):
    subprocess.run(["bash", "-n", DEPLOY / name], check=True)


def check_needs_only_a_bucket(arguments: cli.TrainArguments, name: str, bucket: str = "my-bucket") -> None:
    assert arguments.run.workdir == f"gs://{bucket}/runs/{name}"
    assert arguments.run.data.path == f"gs://{bucket}/data"


@pytest.mark.parametrize(("slices", "engine"), [(1, "tpu-vm"), (2, "queued-resources")])
def test_tpu_vms(machine, slices, engine):
    """A training that was interrupted and saved is started again; another failure is not."""
    code = machine.run(str(DEPLOY / "tpu_vm.sh"), "train", exit_codes=(75, 75, 1), SLICES=str(slices), NAME="mine")
    assert code == 0  # it goes on in the background
    trainings = machine.trainings()
    assert len(trainings) == 3
    check_mesh(trainings[0], chips=16 * slices, slices=slices)
    check_needs_only_a_bucket(trainings[0], "mine")
    assert (trainings[0].run.platform, trainings[0].run.training.preemption_seconds) == ("tpu", 25)
    (call,) = machine.called("gcloud")
    assert call[:5] == ["compute", "tpus", engine, "ssh", "mine"]
    assert "--worker=all" in call
    assert ("--node=all" in call) == (slices > 1)


# Cloud TPUs in the directory $CLOUD: the state of the request, the files of a bucket, and the home of the slice's VM.
CLOUD = r"""
case "$*" in
*"queued-resources list"*)
    state=$(cat $CLOUD/request 2> /dev/null); echo $state
    case $state in
    WAITING_FOR_RESOURCES) echo PROVISIONING > $CLOUD/request;;
    PROVISIONING) echo ACTIVE > $CLOUD/request; mkdir -p $CLOUD/vm/.local/bin; cp $CLOUD/uv $CLOUD/vm/.local/bin;;
    esac;;
*"tpu-vm list"*) echo READY;;
*"queued-resources create"*) [ ! -e $CLOUD/request ] && echo WAITING_FOR_RESOURCES > $CLOUD/request;;
*"queued-resources delete"*) rm -r $CLOUD/request $CLOUD/vm;;
*" ssh "*)
    cd $CLOUD/vm
    for word; do case $word in --command=*) HOME=$CLOUD/vm bash -c "${word#--command=}";; esac; done;;
"storage cp - "*"--if-generation-match=0") [ ! -e $CLOUD/pin ] && cat > $CLOUD/pin;;
"storage cp - "*) cat > $CLOUD/pin;;
"storage cat "*) cat $CLOUD/pin;;
esac
"""
GIT = r"""
case $1 in
rev-parse) cat $CLOUD/head; echo later > $CLOUD/head;;
clone) mkdir -p $3/.venv/bin; touch $3/.venv/bin/activate;;
checkout) echo "$4" > commit;;
esac
"""
# A training notes its commit, and ends with the next of the codes, or because its slice is taken away.
PYTHON = r"""
cat commit >> $CLOUD/trained
code=$(head -n 1 $CLOUD/codes); sed -i 1d $CLOUD/codes
case $code in
lost) echo SUSPENDED > $CLOUD/request; kill -9 $PPID;;
stop) touch stop; exit 75;;
*) exit $code;;
esac
"""


@pytest.mark.parametrize(
    ("codes", "exit_code", "slices"),
    [
        (["75", "lost", "1", "lost", "75", "0"], 0, 3),
        (["2"], 2, 1),
        (["75", "stop"], 75, 1),
        (["1", "lost", "1", "1", "1"], 1, 2),
    ],
)
def test_watching_tpu_vms(machine, codes, exit_code, slices):
    """Lost slices are replaced and train the same commit, until the training ends or fails too often on one slice."""
    for name, behaviour in (("gcloud", CLOUD), ("git", GIT), ("python", PYTHON), ("curl", "true")):
        machine._program(name, f"CLOUD={machine.directory}\n{behaviour}")
    for name, content in (("codes", "\n".join(codes) + "\n"), ("head", "first\n"), ("uv", "#!/bin/sh\n")):
        (machine.directory / name).write_text(content)
    (machine.directory / "uv").chmod(0o755)
    path = f"{machine.directory / 'bin'}:{os.environ['PATH']}"
    settings = {"PATH": path, "POLL_SECONDS": "0.05", "FAILURES": "2", "BUCKET": "mine"}
    done = subprocess.run([str(DEPLOY / "tpu_vm.sh"), "watch"], env=settings, timeout=120, check=False)
    assert done.returncode == exit_code
    assert (machine.directory / "trained").read_text().split() == ["first"] * len(codes)
    assert len([call for call in machine.called("gcloud") if "create" in call]) == slices
    check_needs_only_a_bucket(machine.trainings()[0], "nextllm", bucket="mine")


def test_xpk(machine):
    assert machine.run(str(DEPLOY / "gke_xpk.sh"), SLICES="2", WORKLOAD="mine") == 0
    (training,), (call,) = machine.trainings(), machine.called("xpk")
    check_mesh(training, chips=32, slices=2)
    check_needs_only_a_bucket(training, "mine")
    assert {"--num-slices=2", "--restart-on-exit-codes=1,75"} <= set(call)


@pytest.mark.parametrize(("code", "requeued"), [(0, False), (1, False), (75, True)])
def test_slurm(machine, code, requeued):
    assert machine.run("bash", str(DEPLOY / "slurm.sbatch"), exit_codes=(code,), SLURM_JOB_ID="17") == code
    assert machine.called("scontrol") == ([["requeue", "17"]] if requeued else [])
    (training,) = machine.trainings()
    check_mesh(training, chips=16, slices=1)
    options = re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?", (DEPLOY / "slurm.sbatch").read_text(), re.MULTILINE)
    assert dict(options)["ntasks-per-node"] == dict(options)["gpus-per-node"]


def test_jobset(machine):
    content = yaml.safe_load((DEPLOY / "gke_jobset.yaml").read_text())
    (job,) = content["spec"]["replicatedJobs"]
    spec = job["template"]["spec"]
    pod = spec["template"]["spec"]
    (container,) = pod["containers"]
    assert machine.run(*container["command"]) == 0
    (training,) = machine.trainings()
    chips = int(spec["parallelism"]) * container["resources"]["limits"]["google.com/tpu"] * job["replicas"]
    check_mesh(training, chips=chips, slices=job["replicas"])
    check_needs_only_a_bucket(training, "llama3_1b")
    assert "volumes" not in pod
    # The Job fails at once for exit code 75, with a reason for which the JobSet starts all again without counting it.
    rules = spec["podFailurePolicy"]["rules"]
    assert rules[0]["onExitCodes"] == {"containerName": container["name"], "operator": "In", "values": [75]}
    assert (spec["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    (rule,) = content["spec"]["failurePolicy"]["rules"]
    assert rule == {"action": "RestartJobSetAndIgnoreMaxRestarts", "onJobFailureReasons": ["PodFailurePolicy"]}


def test_skypilot(machine):
    content = yaml.safe_load((DEPLOY / "skypilot.yaml").read_text())
    count, gpus = content["num_nodes"], int(content["resources"]["accelerators"].split(":")[1])
    nodes = {"SKYPILOT_NODE_IPS": "10.0.0.4\n10.0.0.7", "SKYPILOT_NUM_NODES": str(count), "SKYPILOT_NODE_RANK": "1"}
    assert machine.run("bash", "-c", content["run"], **nodes) == 0
    (training,) = machine.trainings()
    check_mesh(training, chips=count * gpus, slices=1)
    check_needs_only_a_bucket(training, "llama3_8b")
    assert "volumes" not in content
    assert find_process_info(training.distributed) == ProcessInfo("10.0.0.4:8476", count, 1)
    assert content["resources"]["job_recovery"]["recover_on_exit_codes"] == [75]


@pytest.mark.parametrize("name", IMAGES)
def test_images_have_what_they_need(name):
    text = (DEPLOY / name).read_text()
    for copied in re.findall(r"^COPY (.*)$", text, re.MULTILINE):
        *sources, _ = copied.split()
        assert all((ROOT / source).exists() for source in sources)
    assert "FROM python:3.12" in text
    extras = IMAGES[name]
    assert f"[${{EXTRA}},{extras}]" in text
    known = re.findall(r"^([\w-]+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert set(extras.split(",")) <= set(known)


def serve_arguments(command: list[str]) -> ServeArguments:
    """The arguments of a command that serves, as it reads them."""
    program, name, *arguments = command
    assert (Path(program).name, name) == ("nextllm", "serve")
    return parse(ServeArguments, arguments, prog="nextllm serve")


def test_serving_in_gke():
    deployment, service = yaml.safe_load_all((DEPLOY / "gke_serve.yaml").read_text())
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    entry = re.findall(r"^ENTRYPOINT (.*)$", (DEPLOY / "serve.Containerfile").read_text(), re.MULTILINE)
    arguments = serve_arguments(json.loads(entry[0]) + container["args"])
    assert (arguments.host, arguments.checkpoint) == ("0.0.0.0", ("model=gs://my-bucket/runs/llama3_1b",))
    (variable,) = container["env"]
    assert variable["name"] == KEY_VARIABLE
    assert variable["valueFrom"].keys() == {"secretKeyRef"}
    paths = {name: container[f"{name}Probe"]["httpGet"]["path"] for name in ("startup", "liveness", "readiness")}
    assert paths == {"startup": "/health", "liveness": "/health", "readiness": "/ready"}
    assert container["ports"] == [{"name": "http", "containerPort": arguments.port}]
    pause = int(container["lifecycle"]["preStop"]["exec"]["command"][1])
    assert pod["spec"]["terminationGracePeriodSeconds"] >= pause + arguments.drain_seconds + 10
    assert deployment["spec"]["selector"]["matchLabels"] == pod["metadata"]["labels"] == service["spec"]["selector"]
    assert service["spec"]["ports"][0]["targetPort"] == "http"


def unit() -> configparser.SectionProxy:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # pyright: ignore[reportAttributeAccessIssue]
    parser.read(DEPLOY / UNIT)
    return parser["Service"]


def test_serving_with_systemd(tmp_path):
    arguments = serve_arguments(shlex.split(unit()["ExecStart"]))
    assert arguments.host == "127.0.0.1"
    assert f":{arguments.port}/ready;" in unit()["ExecStartPost"]
    assert int(unit()["TimeoutStopSec"]) >= arguments.drain_seconds + 10
    assert unit()["EnvironmentFile"].startswith("/etc/")
    assert KEY_VARIABLE not in "".join(value for key, value in unit().items() if key != "EnvironmentFile")
    if shutil.which("systemd-analyze"):
        program = unit()["ExecStart"].split()[0]
        (tmp_path / UNIT).write_text((DEPLOY / UNIT).read_text().replace(program, "/bin/true"))
        command = ["systemd-analyze", "verify", "--man=no", tmp_path / UNIT]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert UNIT not in done.stderr, done.stderr


@pytest.mark.parametrize(("answers", "code"), [("0", 0), ("7", 1)])
def test_systemd_waits_until_the_server_is_ready_or_has_ended(machine, answers, code):
    machine._program("curl", f"exit {answers}")
    ended = subprocess.Popen("true")
    ended.wait()
    words = [word.replace("$$", "$") for word in shlex.split(unit()["ExecStartPost"])]
    assert machine.run(*words, exit_codes=(), MAINPID=str(ended.pid)) == code
    (call,) = machine.called("curl")
    assert call[-1].endswith("/ready")
