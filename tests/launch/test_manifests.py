"""Manifests for Kueue and SkyPilot. Their own packages are not installed here, so what they must agree on is checked:
with the JobSet, the table of chips, and what pods install. docs/launch.md says how the rest was validated."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest
import yaml

from launch import slices
from tests.launch.conftest import ROOT, write_program
from tvq_pod.run.preemption import PREEMPTED

SKYPILOT = yaml.safe_load((ROOT / "launch/skypilot.yaml").read_text())


def kueue() -> dict[str, dict]:
    """The objects, by their kinds."""
    found = list(yaml.safe_load_all((ROOT / "launch/kueue.yaml").read_text()))
    assert {one["apiVersion"] for one in found} == {"kueue.x-k8s.io/v1beta1"}
    return {one["kind"]: one for one in found}


def test_kueue_s_queue_admits_the_jobset():
    found = kueue()
    assert set(found) == {"ResourceFlavor", "ClusterQueue", "LocalQueue"}
    (group,) = found["ClusterQueue"]["spec"]["resourceGroups"]
    (flavor,) = group["flavors"]
    (resource,) = flavor["resources"]
    assert flavor["name"] == found["ResourceFlavor"]["metadata"]["name"]
    assert found["LocalQueue"]["spec"]["clusterQueue"] == found["ClusterQueue"]["metadata"]["name"]
    (replicated,) = yaml.safe_load((ROOT / "launch/jobset.yaml").read_text())["spec"]["replicatedJobs"]
    pod = replicated["template"]["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == found["ResourceFlavor"]["spec"]["nodeLabels"]
    requested = pod["containers"][0]["resources"]["limits"]
    # Kueue does not admit what requests a resource that no flavor covers.
    assert list(requested) == group["coveredResources"] == [resource["name"]]
    chips = replicated["replicas"] * replicated["template"]["spec"]["parallelism"] * requested[resource["name"]]
    assert resource["nominalQuota"] % chips == 0
    assert resource["nominalQuota"] >= chips
    assert (
        f"kueue.x-k8s.io/queue-name={found['LocalQueue']['metadata']['name']} "
        in (ROOT / "launch/kueue.yaml").read_text()
    )


def test_skypilot_boots_what_launch_boots_and_starts_again_what_was_preempted():
    resources = SKYPILOT["resources"]
    asked = slices.parse(resources["accelerators"].removeprefix("tpu-"))
    assert resources["accelerator_args"] == dict(tpu_vm=True, runtime_version=asked.chip.runtime_version)
    assert resources["job_recovery"]["recover_on_exit_codes"] == [PREEMPTED]
    assert SKYPILOT["envs"]["WORKDIR"] is None  # SkyPilot refuses to start without a value


@pytest.mark.parametrize("part", ["setup", "run"])
def test_shellcheck_finds_nothing_in_skypilot_s_commands(part):
    program = pathlib.Path(sys.executable).with_name("shellcheck")
    done = subprocess.run(
        [program, "--shell=bash", "-"], input=SKYPILOT[part], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


def test_skypilot_s_training_gets_its_arguments_and_signals(tmp_path):
    """Run by bash, as SkyPilot does, with a python that waits and says what it got."""
    python = tmp_path / "tvq_pod_venv/bin/python"
    python.parent.mkdir(parents=True)
    write_program(python, 'trap "echo saved; exit 75" TERM; printf "%s\\n" "$@" end; while :; do sleep 0.05; done')
    environment = os.environ | dict(HOME=str(tmp_path), WORKDIR="gs://bucket/a run", CONFIG="configs/c.py:x y")
    job = subprocess.Popen(["bash", "-c", SKYPILOT["run"]], env=environment, stdout=subprocess.PIPE, text=True)
    assert job.stdout
    lines = [job.stdout.readline().rstrip() for _ in range(6)]
    arguments = ["-m", "tvq_pod.main", "--multihost", "--config=configs/c.py:x y", "--workdir=gs://bucket/a run", "end"]
    assert lines == arguments
    job.send_signal(signal.SIGTERM)
    assert (job.communicate(timeout=20)[0], job.returncode) == ("saved\n", 75)


def test_skypilot_installs_what_pods_install(tmp_path):
    """The setup in a folder, with a python3 that says how it was called."""
    log = tmp_path / "log"
    make = f'last=${{!#}}; mkdir -p "$last/bin"; ln -sf {tmp_path}/python3 "$last/bin/python"'
    write_program(tmp_path / "python3", f'echo "$*" >> {log}; case $* in *venv*) {make} ;; esac')
    environment = dict(HOME=str(tmp_path), PATH=f"{tmp_path}:/usr/bin:/bin")
    subprocess.run(["bash", "-c", SKYPILOT["setup"]], env=environment, check=True, capture_output=True)
    *_, install = log.read_text().splitlines()
    worker = (ROOT / "launch/worker.sh").read_text()
    extras = worker.partition("$root/source[")[2].partition("]")[0]
    assert install == f"-m pip install --quiet --constraint launch/constraints.txt .[{extras}]"
