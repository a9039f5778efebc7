"""Rejects invalid Kubernetes manifests and Dockerfiles: manifests.py FILE...

Core kinds and pod templates are checked strictly against the schemas of Kubernetes itself (kubernetes-validate); the
envelope of an MPIJob against the fields of its definition kubeflow.org/v2beta1, written down below; a Dockerfile line
by line, and every source of its COPY against the repository. No image is built and no cluster is contacted.
"""

import pathlib
import re
import shlex
import sys

import jsonschema
import kubernetes_validate
import yaml

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
LATEST = kubernetes_validate.latest_version()


def only(properties, required=()):
    return {"type": "object", "properties": properties, "required": [*required], "additionalProperties": False}


COUNT = {"type": "integer", "minimum": 0}
REPLICAS = only({"replicas": COUNT, "restartPolicy": {"enum": ["Never", "OnFailure"]}, "template": {"type": "object"}},
                ["replicas", "template"])
MPIJOB = only(
    {
        "apiVersion": {"const": "kubeflow.org/v2beta1"},
        "kind": {"const": "MPIJob"},
        "metadata": {"type": "object", "required": ["name"]},
        "spec": only(
            {
                "slotsPerWorker": COUNT,
                "runLauncherAsWorker": {"type": "boolean"},
                "launcherCreationPolicy": {"enum": ["AtStartup", "WaitForWorkersReady"]},
                "mpiImplementation": {"enum": ["OpenMPI", "Intel", "MPICH"]},
                "sshAuthMountPath": {"type": "string"},
                "runPolicy": only(
                    {
                        "cleanPodPolicy": {"enum": ["All", "Running", "None"]},
                        "ttlSecondsAfterFinished": COUNT,
                        "activeDeadlineSeconds": COUNT,
                        "backoffLimit": COUNT,
                        "schedulingPolicy": {"type": "object"},
                        "suspend": {"type": "boolean"},
                        "managedBy": {"type": "string"},
                    }
                ),
                "mpiReplicaSpecs": only({"Launcher": REPLICAS, "Worker": REPLICAS}, ["Launcher", "Worker"]),
            },
            ["mpiReplicaSpecs"],
        ),
    },
    ["apiVersion", "kind", "metadata", "spec"],
)


def need(holds, text):
    if not holds:
        raise SystemExit(text)


def after(words, name):
    return words[words.index(name) + 1]


def grace(pod):
    """A save must fit between the warning and the kill."""
    words = [str(word) for word in pod["containers"][0].get("args", []) + pod["containers"][0].get("command", [])]
    need(int(after(words, "--grace")) < pod["terminationGracePeriodSeconds"], "--grace outlasts the pod")
    return words


def mpijob(job):
    jsonschema.validate(job, MPIJOB)
    spec = job["spec"]
    pods = {}
    for role, replicas in spec["mpiReplicaSpecs"].items():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": role.lower()}, **replicas["template"]}
        kubernetes_validate.validate(pod, LATEST, strict=True)
        pods[role] = pod["spec"]
    need(len({pod["containers"][0]["image"] for pod in pods.values()}) == 1, "launcher and workers differ in image")
    words = grace(pods["Launcher"])
    need(after(words, "--hostfile") == "/etc/mpi/hostfile", "Open MPI 5 must be told the operator's host file")
    ranks = int(re.fullmatch(r"ppr:(\d+):node", after(words, "--map-by"))[1])
    need(ranks == spec["slotsPerWorker"], "ranks of a worker are not its slots")
    threads = next(int(item["value"]) for item in pods["Launcher"]["containers"][0]["env"]
                   if item["name"] == "OMP_NUM_THREADS")
    need(str(ranks * threads) == pods["Worker"]["containers"][0]["resources"]["limits"]["cpu"],
         "ranks x threads are not a worker's processors")
    need(pods["Worker"]["terminationGracePeriodSeconds"] > pods["Launcher"]["terminationGracePeriodSeconds"],
         "workers end before the launcher has saved")


def manifest(path):
    for document in yaml.safe_load_all(path.read_text()):
        if document["kind"] == "MPIJob":
            mpijob(document)
        else:
            kubernetes_validate.validate(document, LATEST, strict=True)
            grace(document["spec"]["template"]["spec"])


def dockerfile(path):
    known = set("FROM RUN COPY WORKDIR USER CMD ENV ARG".split())
    text = re.sub(r"^\s*#.*\n", "", path.read_text(), flags=re.M)
    stages, user, last = [], None, None
    for line in filter(str.strip, text.replace("\\\n", " ").splitlines()):
        instruction, *words = shlex.split(line)
        need(instruction in known, f"no instruction: {line}")
        need(stages or instruction in ("FROM", "ARG"), f"before FROM: {line}")
        if instruction == "FROM":
            need(len(words) in (1, 3) and ":" in words[0], f"an image without a tag: {line}")
            stages.append(words[2] if len(words) == 3 else "")
            user = None
        elif instruction == "COPY" and words[0].startswith("--from="):
            need(words[0].removeprefix("--from=") in stages[:-1], f"no such stage: {line}")
        elif instruction == "COPY":
            for source in words[:-1]:
                need((ROOT / source).exists(), f"no such source: {source}")
            need(len(words) == 2 or words[-1].endswith("/"), f"several sources and no folder: {line}")
        elif instruction == "USER":
            user = words[0]
        elif instruction == "RUN":
            for script in re.findall(r"(?<=\s)launch/[\w/]+", line):
                need((ROOT / script).exists(), f"no such script: {script}")
        last = instruction
    need(len(stages) == 2 and last == "CMD", "two stages, and the command last")
    need(user not in (None, "root", "0"), "the image runs as root")
    need("torch==2.11.0" in text, "not the torch that the program is built for")


for name in sys.argv[1:]:
    path = pathlib.Path(name)
    (dockerfile if path.name == "Dockerfile" else manifest)(path)
