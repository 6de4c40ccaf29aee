"""examples/kubernetes: valid by Kubernetes' own schema, its exit codes those of the table, its command run by sh."""

import subprocess
from importlib.util import find_spec

import pytest
from commands import environment

from topt_deploy.errors import Exit

ABSENT = [name for name in ("kubernetes_validate", "yaml") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")


@pytest.fixture
def cronjob(examples):
    import yaml

    return yaml.safe_load((examples / "kubernetes/job.yaml").read_text(encoding="utf-8"))


@pytest.fixture
def job(cronjob):
    return cronjob["spec"]["jobTemplate"]["spec"]


@pytest.fixture
def pod(job):
    return job["template"]["spec"]


def test_the_schema_takes_it(cronjob):
    import kubernetes_validate

    kubernetes_validate.validate(cronjob, "1.37", strict=True)
    cronjob["spec"]["jobTemplate"]["spec"]["podFailurePolicy"]["rules"][0]["acton"] = "Ignore"
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(cronjob, "1.37", strict=True)


def test_exit_codes_lead_to_what_the_table_says(job, pod, told_codes):
    policy = {}
    for rule in job["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule:
            assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
            assert rule["onExitCodes"]["operator"] == "In"
            policy[rule["action"]] = rule["onExitCodes"]["values"]
    assert set(policy["Count"]) == told_codes["try again"]
    assert set(policy["FailJob"]) == told_codes["stop"]
    assert not {Exit.DONE, Exit.PARTIAL} & {code for codes in policy.values() for code in codes}


def test_what_the_schema_does_not_check(job, pod):
    """Rules that only the API server knows."""
    assert pod["restartPolicy"] == "Never", "a podFailurePolicy needs it"
    for rule in job["podFailurePolicy"]["rules"]:
        values = rule.get("onExitCodes", {}).get("values", [])
        assert values == sorted(set(values)), "they must be in order"
        assert 0 not in values
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_it_runs_without_privileges(pod):
    (container,) = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"]
    assert container["securityContext"]["readOnlyRootFilesystem"]
    assert not container["securityContext"]["allowPrivilegeEscalation"]
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
    assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
    workers = container["args"][0].split("--workers ")[1].split()[0]
    assert workers == container["resources"]["limits"]["cpu"], "more processes than the limit lets run"


@pytest.fixture
def run(pod, home):
    """The container's command, with the volumes' paths as they are here."""

    def call():
        (container,) = pod["containers"]
        (script,) = container["args"]
        script = script.replace("/data", str(home)).replace("/bundle", str(home))
        done = subprocess.run([*container["command"], script], env=environment(), capture_output=True, text=True)
        return done.returncode

    return call


def test_the_command_succeeds(run, home):
    assert run() == 0
    assert len(list(home.glob("out/city=*/predictions.parquet"))) == 2


def test_done_in_part_is_a_success(run, home, spoil):
    spoil()
    assert run() == 0
    assert (home / "out/city=B/predictions.quarantine.parquet").exists()


def test_other_codes_reach_kubernetes(run, home):
    (home / "model.topt/manifest.json").write_text("{}")
    assert run() == Exit.BAD_BUNDLE
