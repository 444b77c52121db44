"""Dashboard and alerts ask for what the code exports, in queries that parse, and every alert has its page."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import yaml

from moleblend_ray.orchestration.progress.metrics import METRICS, PREFIX

REPOSITORY = Path(__file__).resolve().parents[2]
COMPONENT = REPOSITORY / "infra" / "kuberay" / "components" / "monitoring"
DASHBOARD = json.loads((COMPONENT / "moleblend.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
RULES = [
    rule
    for group in yaml.safe_load((COMPONENT / "rules.yaml").read_text())["spec"]["groups"]
    for rule in group["rules"]
]
PAGE = (REPOSITORY / "docs" / "monitoring.md").read_text()

# Of Ray itself. Those of a machine without GPUs are looked for on a live head (tests/ray/test_metrics.py).
RAY_METRICS = {
    "ray_node_cpu_count",
    "ray_node_cpu_utilization",
    "ray_node_disk_free",
    "ray_node_mem_total",
    "ray_node_mem_used",
    "ray_node_network_receive_speed",
    "ray_node_network_send_speed",
    "ray_object_store_available_memory",
    "ray_object_store_memory",
    "ray_object_store_used_memory",
    "ray_resources",
}
RAY_GPU_METRICS = {"ray_node_gpus_utilization", "ray_node_gram_used"}
SCRAPE_LABELS = {"namespace", "instance", "ray_io_cluster", "ray_io_group"}
# Of KubeRay's operator (ray-operator/controllers/ray/metrics/ray_job_metrics.go, 1.4 and later), with its labels.
OPERATOR_METRICS = {"kuberay_job_deployment_status": {"namespace", "name", "deployment_status"}}
RAY_LABELS = {"RayNodeType", "GpuIndex", "Location", "Name", "State"}


def panel_queries() -> Iterator[tuple[str, str]]:
    """(where, query) of everything that the dashboard asks Prometheus for."""
    for panel in PANELS:
        for target in panel["targets"]:
            yield panel["title"], target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        yield f"annotation {annotation['name']}", annotation["expr"]


def variable_queries() -> Iterator[tuple[str, str]]:
    for variable in DASHBOARD["templating"]["list"]:
        if variable["type"] == "query":
            yield f"variable {variable['name']}", variable["query"]["query"]


def alert_queries() -> Iterator[tuple[str, str]]:
    for rule in RULES:
        yield rule["alert"], rule["expr"]


QUERIES = [*panel_queries(), *variable_queries(), *alert_queries()]


def problems_of(query: str) -> list[str]:
    """What is wrong with the names, labels and functions of a query."""
    problems = []
    for name, selector in re.findall(r"\b(ray_\w+)(\{[^}]*\})?", re.sub(r"ray_io_\w+", "", query)):
        if name in RAY_METRICS | RAY_GPU_METRICS:
            continue
        metric = METRICS.get(name.removeprefix(PREFIX))
        if metric is None:
            problems.append(f"{name} is not exported")
            continue
        labels = set(re.findall(r"(\w+)\s*[=!]~?", selector))
        problems += [
            f"{name} has no label {label}" for label in labels - {*metric.labels} - SCRAPE_LABELS
        ]
    for name, selector in re.findall(r"\b(kuberay_\w+)(\{[^}]*\})?", query):
        labels = set(re.findall(r"(\w+)\s*[=!]~?", selector))
        if not labels <= OPERATOR_METRICS.get(name, set()):
            problems.append(f"{name} has no such labels: {sorted(labels)}")
    for call, name in re.findall(r"\b(rate|increase)\((ray_\w+)", query):
        metric = METRICS.get(name.removeprefix(PREFIX))
        if metric is not None and metric.kind != "counter":
            problems.append(f"{call} of the gauge {name}")
    if any(query.count(left) != query.count(right) for left, right in ("()", "[]", "{}")):
        problems.append("brackets do not match")
    known = {label for metric in METRICS.values() for label in metric.labels}
    known.update(*OPERATOR_METRICS.values())
    for grouping in re.findall(r"\b(?:by|on)\s*\(([^)]*)\)", query):
        for label in re.findall(r"\w+", grouping):
            if label not in known | SCRAPE_LABELS | RAY_LABELS:
                problems.append(f"nothing has a label {label}")
    return problems


@pytest.mark.parametrize(("where", "query"), QUERIES)
def test_queries_ask_for_what_is_exported(where: str, query: str) -> None:
    assert problems_of(query) == [], where


@pytest.mark.parametrize(
    ("query", "problem"),
    [
        ("ray_moleblend_train_stpe", "ray_moleblend_train_stpe is not exported"),
        (
            'ray_moleblend_train_step{rank="0"}',
            "ray_moleblend_train_step has no label rank",
        ),
        (
            "rate(ray_moleblend_train_step[5m])",
            "rate of the gauge ray_moleblend_train_step",
        ),
        (
            'kuberay_job_deployment_status{status="Failed"}',
            "kuberay_job_deployment_status has no such labels: ['status']",
        ),
        ("max by (rnu) (ray_moleblend_train_step)", "nothing has a label rnu"),
        ("max by (run) (ray_moleblend_train_step", "brackets do not match"),
    ],
)
def test_the_check_of_queries_sees_mistakes(query: str, problem: str) -> None:
    assert problems_of(query) == [problem]


def test_every_metric_is_looked_at_somewhere() -> None:
    asked = " ".join(query for _, query in QUERIES)
    assert [name for name in METRICS if not re.search(rf"\b{PREFIX}{name}\b", asked)] == []


@pytest.mark.parametrize("name", sorted(RAY_GPU_METRICS))
def test_the_gpu_metrics_are_those_of_the_installed_ray(name: str) -> None:
    found = importlib.util.find_spec("ray")
    assert found is not None
    assert found.origin is not None
    agent = Path(found.origin).parent / "dashboard" / "modules" / "reporter" / "reporter_agent.py"
    assert f'"{name.removeprefix(PREFIX)}"' in agent.read_text()


def test_queries_are_promql() -> None:
    parser = pytest.importorskip("promql_parser", reason="promql-parser is not installed")
    for where, query in QUERIES:
        found = re.fullmatch(r"label_values\((.+), \w+\)", query)
        text = found[1] if found else query
        for variable, value in {"$__rate_interval": "1m", "$cluster": ".*", "$run": ".*"}.items():
            text = text.replace(variable, value)
        assert "$" not in text, where
        parser.parse(text)


@pytest.mark.parametrize("panel", PANELS, ids=lambda panel: panel["title"])
def test_panels_say_what_they_show_of_the_chosen_runs(panel: dict[str, Any]) -> None:
    assert panel["description"].endswith(".")
    assert panel["fieldConfig"]["defaults"]["unit"]
    for target in panel["targets"]:
        assert target["legendFormat"]
        selectors = re.findall(r"ray_\w+(\{[^}]*\})", target["expr"])
        assert selectors
        for selector in selectors:
            assert 'ray_io_cluster=~"$cluster"' in selector
        if "ray_moleblend" in target["expr"]:
            assert all('run=~"$run"' in selector for selector in selectors)


def test_the_dashboard_fits_any_grafana() -> None:
    assert "uid" not in DASHBOARD, "the one that imports it chooses"
    assert DASHBOARD.get("id") is None
    assert set(re.findall(r'"uid": "([^"]*)"', json.dumps(DASHBOARD))) == {"${datasource}"}
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == [
        "datasource",
        "cluster",
        "run",
    ]


def test_panels_lie_side_by_side() -> None:
    places = {panel["id"]: panel["gridPos"] for panel in DASHBOARD["panels"]}
    assert len(places) == len(DASHBOARD["panels"]), "ids are used twice"
    for one, other in combinations(places.values(), 2):
        apart_x = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        apart_y = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert apart_x or apart_y
    assert all(place["x"] + place["w"] <= 24 for place in places.values())


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule["alert"])
def test_alerts_wait_and_have_a_text_for_whoever_is_woken(rule: dict[str, Any]) -> None:
    assert re.fullmatch(r"\d+m", rule["for"])
    assert rule["labels"]["severity"] in ("warning", "critical")
    # What is wrong with what: the operator's states are no amounts.
    assert re.search(r"\{\{ \$(value|labels\.name)", rule["annotations"]["summary"])
    heading = rule["alert"]
    assert rule["annotations"]["runbook"] == f"docs/monitoring.md#{heading.lower()}"
    section = re.search(rf"^### {heading}\n(.+?)(?=^#|\Z)", PAGE, re.M | re.S)
    assert section is not None, f"docs/monitoring.md has no section {heading}"
    assert "Do:" in section[1]


def test_the_page_lists_every_metric_with_its_labels() -> None:
    listed = dict(re.findall(r"^\| `ray_(moleblend_\w+)` \| ([^|]*) \|", PAGE, re.M))
    assert set(listed) == set(METRICS)
    for name, labels in listed.items():
        assert re.findall(r"\w+", labels) == list(METRICS[name].labels), name


def test_the_component_names_files_that_exist_and_ports_that_pods_have() -> None:
    component = yaml.safe_load((COMPONENT / "kustomization.yaml").read_text())
    files = [*component["resources"], *component["configMapGenerator"][0]["files"]]
    assert {path.name for path in COMPONENT.iterdir()} == {*files, "kustomization.yaml"}
    monitors = list(yaml.safe_load_all((COMPONENT / "podmonitor.yaml").read_text()))
    *of_pods, of_operator = monitors
    kinds = {monitor["spec"]["selector"]["matchLabels"]["ray.io/node-type"] for monitor in of_pods}
    assert kinds == {"head", "worker"}
    ports = set(
        re.findall(
            r"containerPort: \d+, name: ([\w-]+)",
            (REPOSITORY / "infra" / "kuberay" / "base" / "cluster.yaml").read_text(),
        )
    )
    for monitor in of_pods:
        (endpoint,) = monitor["spec"]["podMetricsEndpoints"]
        assert endpoint["port"] in ports
        dropped = [rule["regex"] for rule in endpoint["metricRelabelings"]]
        asked = {name for _, query in QUERIES for name in re.findall(r"\bray_\w+", query)}
        assert not [name for name in asked for regex in dropped if re.fullmatch(regex, name)]
    # By the labels of KubeRay's chart, as for the network policy of the head pods.
    assert of_operator["spec"]["selector"]["matchLabels"] == {
        "app.kubernetes.io/name": "kuberay-operator"
    }
    (endpoint,) = of_operator["spec"]["podMetricsEndpoints"]
    (kept,) = endpoint["metricRelabelings"]
    for job in ("pretrain-base-1", "embed-run"):
        assert re.fullmatch(kept["regex"], f"kuberay_job_deployment_status;moleblend-{job}")
    assert endpoint["honorLabels"], "or the namespace of a job is replaced by the operator's"


# Alert -> (series that fire it, series that do not), one value a minute for 40 minutes; time() begins at 0.
STORIES: dict[str, tuple[dict[str, str], dict[str, str]]] = {
    "MoleblendNoProgress": (
        {'job_progress_timestamp_seconds{run="a", stage="pretrain"}': "0x40"},
        {'job_progress_timestamp_seconds{run="a", stage="pretrain"}': "0+60x40"},
    ),
    "MoleblendSearchNoProgress": (
        {'job_progress_timestamp_seconds{run="a", stage="esol trials"}': "-9999x40"},
        {'job_progress_timestamp_seconds{run="a", stage="esol trials"}': "0x40"},
    ),
    "MoleblendDataStarvation": (
        {
            'train_data_wait_seconds_total{run="a", rank="0"}': "0+30x40",
            'train_data_wait_seconds_total{run="a", rank="1"}': "0+1x40",
            'train_step_seconds_total{run="a", rank="0"}': "0+60x40",
            'train_step_seconds_total{run="a", rank="1"}': "0+60x40",
        },
        {
            'train_data_wait_seconds_total{run="a", rank="0"}': "0+5x40",
            'train_step_seconds_total{run="a", rank="0"}': "0+60x40",
        },
    ),
    "MoleblendCheckpointTooOld": (
        {'checkpoint_timestamp_seconds{run="a"}': "-7000x40"},
        {'checkpoint_timestamp_seconds{run="a"}': "-7000+600x40"},
    ),
    "MoleblendCheckpointOverdue": (
        {
            'train_step{run="a"}': "0+10x40",
            'checkpoint_step{run="a"}': "0x40",
            'checkpoint_interval_steps{run="a"}': "100x40",
        },
        {
            'train_step{run="a"}': "0+10x40",
            'checkpoint_step{run="a"}': "0+9x40",
            'checkpoint_interval_steps{run="a"}': "100x40",
        },
    ),
    "MoleblendQuarantine": (
        {
            'prepare_quarantined_rows_total{run="a", reason="unparsable_smiles"}': "0+100x40",
            'prepare_rows_total{run="a"}': "0+1000x40",
        },
        {
            'prepare_quarantined_rows_total{run="a", reason="unparsable_smiles"}': "0+1x40",
            'prepare_rows_total{run="a"}': "0+10x40",
        },
    ),
    "MoleblendRecoveriesPilingUp": (
        {'train_recoveries_total{run="a"}': "0+0x10 1+1x10 10+0x20"},
        {'train_recoveries_total{run="a"}': "0+0x10 1+0x30"},
    ),
    "MoleblendStepsSkipped": (
        {'train_skipped_steps_total{run="a"}': "0+0x10 1+1x10 10+0x20"},
        {'train_skipped_steps_total{run="a"}': "0+0x10 1+0x30"},
    ),
}


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_alerts_fire_when_they_should_and_not_otherwise(alert: str, tmp_path: Path) -> None:
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool, of Prometheus, is not installed")
    spill = 'ray_object_store_memory{Location="SPILLED"}'
    state = 'kuberay_job_deployment_status{name="moleblend-pretrain-a", deployment_status="%s"}'
    stories = {
        **{
            name: tuple(
                {f"ray_moleblend_{key}": value for key, value in story.items()} for story in both
            )
            for name, both in STORIES.items()
        },
        "MoleblendJobFailed": (
            {state % "Running": "1x20", state % "Failed": "_x20 1x19"},
            {
                state % "Running": "1x10",
                state % "Retrying": "_x10 1x5",
                state % "Complete": "_x16 1x23",
            },
        ),
        "MoleblendObjectStoreSpills": ({spill: "2000000000x40"}, {spill: "1000x40"}),
    }
    groups = yaml.safe_load((COMPONENT / "rules.yaml").read_text())["spec"]
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(groups))
    labels = {"severity": next(r["labels"]["severity"] for r in RULES if r["alert"] == alert)}
    for story, count in zip(stories[alert], (1, 0), strict=True):
        series = [{"series": key, "values": value} for key, value in story.items()]
        fired = f'count(ALERTS{{alertname="{alert}", alertstate="firing", severity="{labels["severity"]}"}})'
        expected = [{"value": count, "labels": "{}"}] if count else []
        test = {
            "interval": "1m",
            "input_series": series,
            "promql_expr_test": [{"expr": fired, "eval_time": "35m", "exp_samples": expected}],
        }
        content = {"rule_files": ["rules.yaml"], "evaluation_interval": "1m", "tests": [test]}
        (tmp_path / "test.yaml").write_text(yaml.safe_dump(content))
        done = subprocess.run(
            [promtool, "test", "rules", "test.yaml"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
