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
