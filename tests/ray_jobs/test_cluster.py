"""Whether a cluster can have a job's workers, and waiting for them, without Ray"""

from contextvars import copy_context
from types import SimpleNamespace

import pytest
import yaml

from addressvlm import InputError
from ray_jobs import cluster, progress
from ray_jobs.cluster import Workers, nodes_ahead, notify_progress, require_possible, room_for, wait_for_workers
from ray_jobs.progress import Display

TYPES = {
    "head_node_type": "head",
    "max_workers": 3,
    "available_node_types": {
        "head": {"resources": {"CPU": 0}, "max_workers": 0},
        "cpu": {"resources": {"CPU": 16}, "max_workers": 8},
        "gpu": {"resources": {"CPU": 8, "GPU": 4}, "max_workers": 2},
    },
}


class Ray:
    """A cluster whose nodes come while the job waits."""

    def __init__(self) -> None:
        self.nodes: list[dict[str, float]] = [{}]
        self.coming: list[list[dict[str, float]]] = []
        self.autoscaler: SimpleNamespace | None = SimpleNamespace(infeasible_gang_resource_requests=[])
        self.requested: list[list[dict[str, float]]] = []
        self.removed = 0
        self.busy = 0.0
        self.clock = 0.0

    def placement_group(self, bundles: list[dict[str, float]]) -> SimpleNamespace:
        self.requested.append(bundles)
        return SimpleNamespace(id=SimpleNamespace(hex=lambda: "abc"), wait=self.wait)

    def wait(self, seconds: float) -> None:
        self.clock += seconds
        if self.clock % 10 == 0:
            cluster.display.tick()
        if self.coming:
            self.nodes = self.coming.pop(0)

    def remove(self, group: object) -> None:
        self.removed += 1

    def refuse(self) -> None:
        self.autoscaler = SimpleNamespace(infeasible_gang_resource_requests=[SimpleNamespace(details="abc:PACK|PENDING")])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, tmp_path) -> Ray:
    fake = Ray()
    monkeypatch.setattr(cluster, "_node_resources", lambda: fake.nodes)
    monkeypatch.setattr(cluster, "_autoscaler", lambda: fake.autoscaler)
    monkeypatch.setattr(cluster, "placement_group", fake.placement_group)
    monkeypatch.setattr(cluster, "remove_placement_group", fake.remove)
    monkeypatch.setattr(cluster, "LAUNCHED_FROM", tmp_path / "ray_bootstrap_config.yaml")
    for module in (cluster, progress):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: fake.clock))
    monkeypatch.setattr(Display, "_watch", lambda self, ended: None)
    monkeypatch.setattr(cluster, "display", Display())
    sums = {"CPU": lambda: sum(node.get("CPU", 0) for node in fake.nodes)}
    monkeypatch.setattr(cluster.ray, "cluster_resources", lambda: {"CPU": sums["CPU"]()})
    monkeypatch.setattr(cluster.ray, "available_resources", lambda: {"CPU": sums["CPU"]() - fake.busy})
    return fake


def training(count: int = 2, cpus: float = 1, gpus: float = 1) -> Workers:
    return Workers("training 'a'", count, cpus, gpus, "train")


def test_workers_that_fit_ask_for_nothing(fake: Ray) -> None:
    fake.autoscaler, fake.nodes = None, [{"CPU": 4.0}, {"CPU": 1.0, "GPU": 0.5}]
    wait_for_workers(training(4, 1, 0), 1)
    wait_for_workers(training(1, 0.5, 0.5), 1)
    assert not fake.requested


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (
            training(9, 0.5, 0),
            r"training 'a' needs 4.5 CPUs and the cluster has 4: lower train.workers or train.cpus_per_worker",
        ),
        (training(2, 1, 1), "needs 2 GPUs and the cluster has 0: lower train.workers or train.gpus_per_worker, or add nodes"),
        (training(2, 2, 0), r"needs 2 times 2 CPUs and 0 GPUs, each on one node, and the cluster has room for 1 of them"),
        (Workers("graft", 9, 1, 0), r"^graft needs 9 CPUs and the cluster has 4: add nodes\.$"),
    ],
)
def test_where_no_node_can_come_the_job_is_refused(fake: Ray, workers: Workers, message: str) -> None:
    fake.autoscaler, fake.nodes = None, [{"CPU": 3.0}, {"CPU": 1.0}]
    with pytest.raises(InputError, match=message):
        wait_for_workers(workers, 100)
    assert not fake.requested


def test_the_wait_for_nodes_is_told(fake: Ray, capsys: pytest.CaptureFixture[str]) -> None:
    one = {"CPU": 8.0, "GPU": 4.0}
    fake.coming = [[{}]] * 14 + [[{}, one]] * 9 + [[{}, one, one]]
    wait_for_workers(training(8), 100)
    assert capsys.readouterr().out.splitlines() == [
        "waiting for 8 GPUs: 0 of 8 there, 0 s",
        "waiting for 8 GPUs: 0 of 8 there, 10 s",
        "waiting for 8 GPUs: 4 of 8 there, 20 s",
    ]
    assert fake.requested == [[{"CPU": 1, "GPU": 1}] * 8]
    assert fake.removed == 1


def test_nodes_that_never_come_end_the_job_at_the_deadline(fake: Ray) -> None:
    with pytest.raises(InputError, match=r"waited 60 s for 2 GPUs and 0 are there: .* raise cluster.wait_s"):
        wait_for_workers(training(), 60)
    assert fake.removed == 1


def test_what_no_node_type_serves_is_refused_by_the_autoscaler(fake: Ray) -> None:
    fake.refuse()
    with pytest.raises(InputError, match="the autoscaler has no node types for it, or not enough of their nodes: lower train"):
        wait_for_workers(training(), 60)
    assert fake.clock == 0


@pytest.mark.parametrize("state", ["another node may be given back", "something runs"])
def test_a_refusal_that_may_change_is_waited_for(fake: Ray, state: str) -> None:
    """Nodes of other types may use up the limit of nodes, and running work the nodes themselves."""
    fake.refuse()
    if state == "something runs":
        fake.nodes, fake.busy = [{"CPU": 2.0, "GPU": 1.0}], 1
    else:
        fake.nodes = [{}, {"CPU": 16.0}]
    fake.coming = [fake.nodes] * 5 + [[{"CPU": 2.0, "GPU": 2.0}]]
    wait_for_workers(training(), 60)
    assert fake.clock == 6


@pytest.mark.parametrize(("workers", "possible"), [(training(8), True), (training(9), False), (training(4, 5, 2), False)])
def test_a_cluster_that_was_launched_here_says_beforehand_what_it_can_have(fake: Ray, workers: Workers, possible: bool) -> None:
    cluster.LAUNCHED_FROM.write_text(yaml.safe_dump(TYPES))
    if possible:
        require_possible(workers)
    else:
        with pytest.raises(InputError, match=r"the cluster can have at most .*: lower train.workers"):
            require_possible(workers)
    assert not fake.requested


def test_the_limit_of_all_nodes_together_counts(fake: Ray) -> None:
    cluster.LAUNCHED_FROM.write_text(yaml.safe_dump({**TYPES, "max_workers": 1}))
    with pytest.raises(InputError, match="needs 8 GPUs and the cluster can have at most 4"):
        require_possible(training(8))


@pytest.mark.parametrize(
    ("cpus", "gpus", "node", "fit"),
    [
        (0.1, 0, {"CPU": 0.3}, 3),
        (1, 0.25, {"CPU": 9, "GPU": 1}, 4),
        (2, 0.25, {"CPU": 3, "GPU": 1}, 1),
        (1, 1, {"CPU": 4}, 0),
        (1, 0, {}, 0),
        (0, 0, {}, 5),
    ],
)
def test_how_many_workers_a_node_holds(cpus: float, gpus: float, node: dict[str, float], fit: int) -> None:
    assert Workers("x", 5, cpus, gpus).fit_on(node) == fit


def test_workers_without_gpus_ask_for_none(fake: Ray) -> None:
    fake.coming = [[{"CPU": 4.0}]]
    wait_for_workers(training(3, 0.5, 0), 60)
    assert fake.requested == [[{"CPU": 0.5}] * 3]


def test_the_setting_of_their_number_is_named_where_it_has_another_name() -> None:
    other = Workers("labels", 2, 1, 1, "labels", "labels.endpoints")
    assert other.lack([]) == (
        "labels needs 2 CPUs and the cluster has 0: lower labels.endpoints or labels.cpus_per_worker, or add nodes."
    )
    assert "lower labels.endpoints or labels.gpus_per_worker, or take larger nodes" in str(
        other.lack([{"CPU": 2.0}, {"GPU": 2.0}])
    )


@pytest.mark.parametrize(
    ("nodes", "launched", "workers", "times"),
    [
        ([{"CPU": 8.0}, {"CPU": 4.0}], False, training(2, 1, 0), 6),
        ([{"CPU": 8.0}, {"CPU": 5.0}], False, training(3, 2, 0), 2),  # six workers
        ([{"CPU": 1.0}], False, training(2, 1, 0), 1),
        ([{"CPU": 1.0}], True, training(2, 1, 1), 4),  # two nodes of four GPUs can come
        ([{"CPU": 90.0}], True, training(2, 1, 0), 45),  # more than can come
    ],
)
def test_how_many_trainings_a_cluster_has_room_for(
    fake: Ray, nodes: list[dict[str, float]], launched: bool, workers: Workers, times: int
) -> None:
    fake.nodes = nodes
    if launched:
        cluster.LAUNCHED_FROM.write_text(yaml.safe_dump(TYPES))
    assert room_for(workers) == times


def test_the_time_left_follows_from_what_was_done_since_the_job_began(fake: Ray) -> None:
    """Half was done before, and a row takes a second."""
    asked = []
    with nodes_ahead(training(), "label", 10.0):
        for done in range(50, 101):
            notify_progress("label: graz", done, 100)
            asked.append(bool(fake.requested))
            fake.clock += 1
    assert 50 + asked.index(True) == 90


@pytest.mark.parametrize(
    ("boot_s", "seconds_a_row", "asked_at"),
    [(30.0, 1.0, 70), (300.0, 1.0, 1), (0.0, 1.0, 100)],
)
def test_nodes_are_asked_for_when_labels_are_nearly_done(fake: Ray, boot_s: float, seconds_a_row: float, asked_at: int) -> None:
    asked: list[int] = []
    with nodes_ahead(training(), "label", boot_s):
        notify_progress("graft", 100, 100)
        for done in range(101):
            notify_progress("label", done, 100)
            if fake.requested and not asked:
                asked.append(done)
            fake.clock += seconds_a_row
        assert not fake.removed
    assert asked == [asked_at]
    assert (len(fake.requested), fake.removed) == (1, 1)
    notify_progress("label", 100, 100)
    assert len(fake.requested) == 1


def test_progress_that_is_told_late_asks_for_no_nodes_that_nobody_gives_back(fake: Ray) -> None:
    """The thread that shows it has the context of the block, and may be in the middle of a look when that ends."""
    with nodes_ahead(training(), "label", 300.0):
        shown = copy_context()
    shown.run(notify_progress, "label", 1, 1)
    assert not fake.requested


def test_nodes_that_are_there_are_not_asked_for(fake: Ray) -> None:
    fake.nodes = [{"CPU": 2.0, "GPU": 2.0}]
    with nodes_ahead(training(), "label", 300.0):
        notify_progress("label", 1, 1)
    assert not fake.requested
