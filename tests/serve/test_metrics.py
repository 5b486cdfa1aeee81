"""Prometheus metrics of several replicas."""

import pickle

import pytest

from serve.metrics import ServiceMetrics, render_metrics

pytestmark = pytest.mark.xdist_group("serve")


def test_metrics_of_several_replicas_have_a_label_each() -> None:
    from prometheus_client.parser import text_string_to_metric_families

    one, two = ServiceMetrics(), ServiceMetrics()
    one.count("addressvlm_requests", "GET", "/healthz", "200")
    two.count("addressvlm_requests", "GET", "/healthz", "200", by=2)
    two.observe("addressvlm_confidence", 0.75, "toytown")
    text = render_metrics({"a": pickle.loads(pickle.dumps(one.collect())), "b": two.collect()}).decode()
    families = {family.name: family for family in text_string_to_metric_families(text)}
    assert {s.labels["replica"]: s.value for s in families["addressvlm_requests"].samples} == {"a": 1, "b": 2}
    buckets = {s.labels["le"]: s.value for s in families["addressvlm_confidence"].samples if s.name.endswith("bucket")}
    assert (buckets["0.7"], buckets["0.8"], buckets["+Inf"]) == (0, 1, 1)


def test_seconds_are_those_of_the_block_also_if_it_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    metrics = ServiceMetrics()
    for start, end in ((100.0, 100.5), (7.0, 9.0)):
        monkeypatch.setattr("serve.metrics.time.perf_counter", iter([start, end]).__next__)
        with pytest.raises(KeyError), metrics.time("addressvlm_model_seconds", "chat"):
            raise KeyError
    samples = {s.name.rpartition("_")[2]: s.value for m in metrics.collect() for s in m.samples if s.labels.get("le") is None}
    assert {key: samples[key] for key in ("sum", "count")} == {"sum": 2.5, "count": 2}


def test_what_did_not_happen_is_left_out() -> None:
    metrics = ServiceMetrics()
    metrics.count("addressvlm_tokens", "prompt", by=0)
    assert metrics.collect() == []
