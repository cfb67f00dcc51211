"""The launch files: their shells parse, their JobSets hold together, and `sftjax train` knows every option that they give it."""

import re
import subprocess
from math import prod
from pathlib import Path

import pytest
import yaml

from sftjax import config
from sftjax.options import build_parser

ROOT = Path(__file__).parent.parent
LAUNCH = ROOT / "examples" / "launch"
JOBSETS = sorted(LAUNCH.glob("jobset_*.yaml"))


def given(file):
    """What the file gives to `sftjax train`."""
    text = file.read_text()
    if file.suffix == ".yaml":
        command = containers(yaml.safe_load(text))[0]["command"]
        assert command[:2] == ["sftjax", "train"]
        return command[2:]
    _, _, rest = text.partition("sftjax train")
    return [item.replace('"', "") for item in re.findall(r"^ +(--[\w.-]+=\S+)", rest, re.MULTILINE)]


def containers(jobset):
    return jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]


@pytest.mark.parametrize("file", [*LAUNCH.glob("*.sbatch"), *LAUNCH.glob("*.sh")], ids=lambda f: f.name)
def test_shells_parse(file):
    subprocess.run(["bash", "-n", str(file)], check=True)


@pytest.mark.parametrize("file", [*LAUNCH.glob("*.sbatch"), *LAUNCH.glob("*.sh"), *JOBSETS], ids=lambda f: f.name)
def test_every_option_is_known(file):
    args, rest = build_parser().parse_known_args(["train", *given(file)])
    assert args.workdir and all(item.startswith("--config.") for item in rest)
    config.load(ROOT / args.config, [item.removeprefix("--config.") for item in rest])


@pytest.mark.parametrize("file", JOBSETS, ids=lambda f: f.name)
def test_jobsets_hold_together(file):
    jobset = yaml.safe_load(file.read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name, (jobs,) = jobset["metadata"]["name"], jobset["spec"]["replicatedJobs"]
    job = jobs["template"]["spec"]
    hosts, pod = job["parallelism"], job["template"]["spec"]
    assert job["completions"] == hosts and job["completionMode"] == "Indexed" and job["backoffLimit"] == 0
    assert pod["restartPolicy"] == "Never"
    mounts, volumes = pod["containers"][0].get("volumeMounts", ()), pod.get("volumes", ())
    assert {mount["name"] for mount in mounts} == {volume["name"] for volume in volumes}
    env = {each["name"]: each["value"] for each in pod["containers"][0].get("env", ())}
    limits = pod["containers"][0]["resources"]["limits"]
    if "google.com/tpu" in limits:
        shape = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"]
        assert hosts * limits["google.com/tpu"] == prod(map(int, shape.split("x"))) and not env
    else:
        assert env["JAX_NUM_PROCESSES"] == str(hosts * jobs["replicas"])
        assert env["JAX_COORDINATOR_ADDRESS"].partition(":")[0] == f"{name}-{jobs['name']}-0-0.{name}"


def test_ray_gives_what_train_takes():
    text = (LAUNCH / "ray_train.py").read_text()
    compile(text, "ray_train.py", "exec")
    for flag in re.findall(r'f"(--[\w-]+)=\{', text):
        assert build_parser().parse_args(["train", f"{flag}=1"])
