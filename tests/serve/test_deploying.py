"""The files in deploy/ and the Dockerfile, against the server that they start."""

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.serving import RAW, ask, client, picture

from deit.cli.arguments import parser
from deit.serve.limits import Service

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
LONGEST_STOP = 3 * Service().timeout + 1
"""Seconds from SIGTERM to the end: uvicorn waits for twice the time limit and a second, then the batcher for one."""


def text_of(name):
    return (DEPLOY / name).read_text()


def options_of(command):
    """What the command line makes of a command, given as its words. The first one is the program."""
    assert Path(command[0]).name == "deit"
    return parser().parse_args(command[1:])


def entry_point():
    [found] = re.findall(r"^ENTRYPOINT (\[.*\])$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    return json.loads(found)


def pod():
    return kubernetes("Deployment")["spec"]["template"]


def container():
    [found] = pod()["spec"]["containers"]
    return found


def kubernetes(kind):
    [found] = [each for each in yaml.safe_load_all(text_of("kubernetes.yaml")) if each["kind"] == kind]
    return found


def unit():
    """Values of the unit by section and key; the last one of each key."""
    found, section = {}, None
    for line in text_of("deit.service").splitlines():
        if line.startswith("["):
            section = found.setdefault(line.strip("[]"), {})
        elif line and not line.startswith("#"):
            key, _, value = line.partition("=")
            section[key] = value
    return found


def of_pod():
    return options_of([*entry_point(), *container()["args"]])


def of_unit():
    return options_of(shlex.split(unit()["Service"]["ExecStart"]))


@pytest.fixture(scope="module")
def deployed(folder):
    """A server with the names and the host of the pod."""
    with client(folder, hosts=("0.0.0.0", *of_pod().allowed_host)) as found:
        yield found


@pytest.fixture(scope="module")
def metrics(deployed):
    """The metrics of a server that has answered a request, by name, with the labels of each."""
    assert ask(deployed, picture(0)).status_code == 200
    found = {}
    for name, labels in re.findall(r"^(deit_\w+)(\{.*\})? ", deployed.get("/metrics").text, re.MULTILINE):
        found.setdefault(name, set()).update(re.findall(r"(\w+)=", labels))
    return found


def test_the_image_starts_the_server():
    found = options_of(entry_point())
    assert (found.verb, found.model, found.host, found.port) == ("serve", "/model", "0.0.0.0", 8000)
    text = (ROOT / "Dockerfile").read_text()
    assert re.findall(r"^EXPOSE (\d+)$", text, re.MULTILINE) == [str(found.port)]
    assert re.findall(r"http://[^/]+/\w+", text.split("HEALTHCHECK")[1]) == [f"http://127.0.0.1:{found.port}/readyz"]
    for start in re.findall(r"^docker run .*$", (ROOT / "docs/deploying.md").read_text(), re.MULTILINE):
        assert options_of([*entry_point(), *shlex.split(start.split(" deit", 1)[1])]).port == found.port
        assert f"-p {found.port}:{found.port}" in start
        assert f":{found.model}:ro" in start


def test_the_pod_answers_its_probes(deployed):
    [port] = container()["ports"]
    assert port["containerPort"] == of_pod().port
    for name in ("startupProbe", "readinessProbe", "livenessProbe"):
        asked = container()[name]["httpGet"]
        assert asked["port"] == port["name"]
        for address in ("10.1.2.3", "[fd00::7]"):  # the kubelet asks by the pod's address
            answer = deployed.get(asked["path"], headers={"Host": f"{address}:{port['containerPort']}"})
            assert answer.status_code == 200, answer.text
    assert container()["livenessProbe"]["httpGet"]["path"] == "/healthz"
    assert container()["readinessProbe"]["httpGet"]["path"] == "/readyz"
    about = pod()["metadata"]["annotations"]
    assert about["prometheus.io/port"] == str(port["containerPort"])
    assert deployed.get(about["prometheus.io/path"]).text.startswith("# HELP deit_")


def test_the_names_of_the_service_and_of_people_are_allowed(deployed):
    service = kubernetes("Service")
    for name in (service["metadata"]["name"], *of_unit().allowed_host):
        assert deployed.get("/healthz", headers={"Host": name}).status_code == 200
    assert deployed.get("/healthz", headers={"Host": "evil.example"}).status_code == 421
    [port] = service["spec"]["ports"]
    assert port["targetPort"] == container()["ports"][0]["name"]


def test_the_objects_of_kubernetes_name_each_other():
    labels, name = pod()["metadata"]["labels"], kubernetes("Deployment")["metadata"]["name"]
    for selector in (
        kubernetes("Deployment")["spec"]["selector"]["matchLabels"],
        kubernetes("Service")["spec"]["selector"],
        kubernetes("PodDisruptionBudget")["spec"]["selector"]["matchLabels"],
    ):
        assert selector == labels
    assert kubernetes("HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]["name"] == name
    mounts, volumes = container()["volumeMounts"], {each["name"]: each for each in pod()["spec"]["volumes"]}
    assert {each["name"] for each in mounts} == volumes.keys()
    [keys] = [each["mountPath"] for each in mounts if "secret" in volumes[each["name"]]]
    assert of_pod().api_key_file.parent == Path(keys)
    assert f"--from-file={of_pod().api_key_file.name}" in (ROOT / "docs/deploying.md").read_text()
    limits = container()["resources"]["limits"]
    assert limits == container()["resources"]["requests"]
    [threads] = container()["env"]
    assert threads["valueFrom"]["resourceFieldRef"]["resource"].partition("limits.")[2] in limits


def test_pods_are_added_for_the_queue(metrics):
    [rule] = yaml.safe_load(text_of("prometheus-adapter.yaml"))["rules"]["custom"]
    scaler = kubernetes("HorizontalPodAutoscaler")["spec"]
    [metric] = scaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in metrics
    assert rule["name"]["matches"] == name
    assert rule["seriesQuery"].partition("{")[0] == name
    assert int(metric["pods"]["target"]["averageValue"]) == of_pod().max_batch < of_pod().queue
    assert 1 < scaler["minReplicas"] < scaler["maxReplicas"]
    assert kubernetes("PodDisruptionBudget")["spec"]["minAvailable"] < scaler["minReplicas"]


def test_nothing_is_killed_before_it_has_answered():
    [_, before] = container()["lifecycle"]["preStop"]["exec"]["command"]
    assert of_pod().timeout == of_unit().timeout == Service().timeout
    assert pod()["spec"]["terminationGracePeriodSeconds"] >= int(before) + LONGEST_STOP
    assert int(unit()["Service"]["TimeoutStopSec"]) >= LONGEST_STOP
    assert f"docker stop -t {LONGEST_STOP + 4:.0f}" in (ROOT / "docs/deploying.md").read_text()


def test_the_unit_starts_the_server(deployed):
    found, service = of_unit(), unit()["Service"]
    assert (found.verb, found.host) == ("serve", "127.0.0.1")
    [asked] = re.findall(r"http://(\S+)$", service["ExecStartPost"])
    address, _, path = asked.partition("/")
    assert address == f"{found.host}:{found.port}"
    assert deployed.get(f"/{path}").status_code == 200
    assert service["ExecReload"].split()[1:] == ["-HUP", "$MAINPID"]
    assert service["Environment"] == f"XDG_CACHE_HOME=/var/cache/{service['CacheDirectory']}"
    assert int(service["LimitNOFILE"]) > Service().connections + 200
    page = (ROOT / "docs/deploying.md").read_text()
    for place in (found.model, str(found.api_key_file), shlex.split(service["ExecStart"])[0].removesuffix("/deit")):
        assert place in page


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd")
def test_systemd_reads_the_unit(tmp_path):
    program, user = shlex.split(unit()["Service"]["ExecStart"])[0], f"User={unit()['Service']['User']}\n"
    there = text_of("deit.service").replace(program, sys.executable).replace(user, "")
    there = re.sub(r"^Exec(StartPost|Reload)=\S+", rf"Exec\1={sys.executable}", there, flags=re.MULTILINE)
    (tmp_path / "deit.service").write_text(there)
    done = subprocess.run(
        ["systemd-analyze", "verify", str(tmp_path / "deit.service")], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def seconds(text):
    assert text.endswith("s")
    return float(text[:-1])


@pytest.mark.parametrize("name", ["nginx.conf", "Caddyfile"])
def test_a_proxy_keeps_within_the_servers_limits(name):
    text = re.sub(r"#.*", "", text_of(name))
    assert text.count("{") == text.count("}") > 3
    found = of_unit()
    assert re.findall(r"\b127\.0\.0\.1:\d+", text) == [f"{found.host}:{found.port}"]
    assert set(re.findall(r"\bmodels[\w.]*\.org\b", text)) == set(found.allowed_host)
    values = dict(re.findall(r"\b([a-z_]+)[ =](\w+)", text))
    if name == "nginx.conf":
        assert re.search(r"location = /metrics \{\s*deny all;", text)
        assert "proxy_set_header Host $host;" in text
        size = int(values["client_max_body_size"].removesuffix("m")) * 2**20
        idle, longest, most = values["keepalive_timeout"], values["proxy_read_timeout"], values["max_conns"]
        [upstream] = re.findall(r"upstream (\w+) ", text)
        assert f"proxy_pass http://{upstream};" in text
    else:
        assert re.search(r"@inside path /metrics\s+respond @inside 403", text)
        size = int(values["max_size"].removesuffix("MiB")) * 2**20
        idle, longest, most = values["keepalive"], values["response_header_timeout"], values["max_conns_per_host"]
    assert size == found.max_bytes
    assert seconds(idle) < 5  # docs/serve.md, "idle connection"
    assert seconds(longest) > found.timeout
    assert int(most) < Service().connections / 4


def test_the_page_names_what_the_server_has(metrics, deployed):
    text = (ROOT / "docs/deploying.md").read_text()
    rows = dict(re.findall(r"^\| `(deit_\w+)` \| (.*) \|$", text, re.MULTILINE))
    kinds = {re.sub("_(bucket|count|sum|created)$", "", name) for name in metrics}
    kinds -= {name.removesuffix("_total") for name in kinds if name.endswith("_total")}  # left by their _created
    assert set(rows) == kinds
    for name, row in rows.items():
        labels = {label for each, labels in metrics.items() if each.startswith(name) for label in labels} - {"le"}
        assert set(re.findall(r"(?:by|and) `(\w+)`", row)) == labels
    for path in re.findall(r"`GET (/\w+)`", text):
        assert deployed.get(path, headers=RAW).status_code == 200
    assert set(re.findall(r"(?:deploy/)([\w.-]+)\)", text)) == {path.name for path in DEPLOY.iterdir()}
