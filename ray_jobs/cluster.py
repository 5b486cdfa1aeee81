"""Nodes for a job's workers: whether the cluster can have them, and waiting for those that its autoscaler starts.

What is needed is asked for with a placement group. `ray.autoscaler.sdk.request_resources` holds one request for the whole
cluster, which Ray Data and Ray Train overwrite every 20 seconds; placement groups add up, and the autoscaler answers each.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path

import ray
import yaml
from ray._raylet import GcsClient
from ray.core.generated.autoscaler_pb2 import AutoscalingState, GetClusterStatusReply
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from addressvlm import InputError
from ray_jobs.progress import display

LAUNCHED_FROM = Path("~/ray_bootstrap_config.yaml")  # on the head of a cluster of `ray up`: the autoscaler's configuration
POLL_S = 1.0

Resources = Mapping[str, float]  # CPU and GPU -> how many


@dataclass(frozen=True)
class Workers:
    """Workers that a job starts together.

    Attributes:
        what: the subject of messages, such as "training 'AddressVLM' with 2 workers".
        cpus, gpus: of each worker.
        section: of the configuration that holds `cpus_per_worker` and `gpus_per_worker`, if there are such settings.
        count_key: the setting of their number; default: `<section>.workers`.
    """

    what: str
    count: int
    cpus: float
    gpus: float
    section: str = ""
    count_key: str = ""

    def fit_on(self, node: Resources) -> int:
        """How many of them an empty node holds."""
        need = {"CPU": self.cpus, "GPU": self.gpus}
        return min((int(node.get(name, 0) / amount + 1e-9) for name, amount in need.items() if amount), default=self.count)

    def lack(self, nodes: Sequence[Resources], has: str = "has") -> str | None:
        """Why these nodes can't hold them, as a sentence; None if they can."""
        room = sum(map(self.fit_on, nodes))
        if room >= self.count:
            return None
        for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)):
            there = sum(node.get(name, 0) for node in nodes)
            if self.count * amount > there:
                return (
                    f"{self.what} needs {self.count * amount:g} {name}s and the cluster {has} {there:g}: "
                    f"{self.remedy(name)}add nodes."
                )
        return (
            f"{self.what} needs {self.count} times {self.cpus:g} CPUs and {self.gpus:g} GPUs, each on one node, and the "
            f"cluster {has} room for {room} of them: {self.remedy('GPU' if self.gpus else 'CPU')}take larger nodes."
        )

    def remedy(self, resource: str) -> str:
        """The settings to lower, as the beginning of a sentence's last part."""
        each = f"{self.section}.{resource.lower()}s_per_worker"
        return f"lower {self.count_key or self.section + '.workers'} or {each}, or " if self.section else ""

    def request(self) -> PlacementGroup:
        """Ask the autoscaler for their nodes; removing the group takes the request back."""
        bundle = {name: amount for name, amount in (("CPU", self.cpus), ("GPU", self.gpus)) if amount}
        return placement_group([bundle] * self.count)


def require_possible(workers: Workers) -> None:
    """Stop if the cluster neither has room for the workers nor, as far as it says so beforehand, can get it.

    Raises:
        InputError: no autoscaler runs, or its node types are too small or too few.
    """
    if lack := workers.lack(_node_resources()):
        types = LAUNCHED_FROM.expanduser()
        if types.is_file():
            lack = workers.lack(_most_nodes(yaml.safe_load(types.read_text()), workers), "can have at most")
        elif _autoscaler():
            lack = None  # it says only once nodes are requested
        if lack:
            raise InputError(lack)


def wait_for_workers(workers: Workers, wait_s: float) -> None:
    """Wait until the cluster has room for the workers, used or not; shows what is there meanwhile.

    Args:
        wait_s: deadline, in seconds.

    Raises:
        InputError: as `require_possible`; the autoscaler can't bring the nodes; they are not there in time.
    """
    require_possible(workers)
    if not workers.lack(_node_resources()):
        return
    began, group = time.monotonic(), workers.request()
    name, needed = ("GPU", workers.count * workers.gpus) if workers.gpus else ("CPU", workers.count * workers.cpus)
    try:
        with display.show(f"waiting for {needed:g} {name}s") as progress:
            while workers.lack(nodes := _node_resources()):
                waited, there = time.monotonic() - began, min(needed, sum(node.get(name, 0) for node in nodes))
                is_first, progress.note = not progress.note, f"{there:g} of {needed:g} there"
                if is_first:
                    display.tick()
                if _is_refused(group) and _is_settled(workers, nodes):
                    raise InputError(
                        f"{workers.what} needs {workers.count} times {workers.cpus:g} CPUs and {workers.gpus:g} GPUs, and the "
                        "autoscaler has no node types for it, or not enough of their nodes: "
                        f"{workers.remedy(name)}change the node types."
                    )
                if waited >= wait_s:
                    raise InputError(
                        f"{workers.what} waited {waited:.0f} s for {needed:g} {name}s and {there:g} are there: see "
                        "`ray status` for what the autoscaler does, raise cluster.wait_s, and rerun to resume."
                    )
                group.wait(POLL_S)
    finally:
        remove_placement_group(group)


def room_for(workers: Workers) -> int:
    """How often the cluster holds the workers, as it is or as large as it says that it grows; at least once."""
    types = LAUNCHED_FROM.expanduser()
    nodes = [_node_resources(), *([_most_nodes(yaml.safe_load(types.read_text()), workers)] if types.is_file() else [])]
    return max(1, *(sum(map(workers.fit_on, some)) // workers.count for some in nodes))


_progress_listener: ContextVar[Callable[[str, int, int], None] | None] = ContextVar("_progress_listener", default=None)


def notify_progress(step: str, done: int, total: int) -> None:
    """Tell an enclosing `nodes_ahead` how far a step is."""
    if listener := _progress_listener.get():
        listener(step, done, total)


@contextmanager
def nodes_ahead(workers: Workers, step: str, boot_s: float) -> Iterator[None]:
    """Inside the block, ask for the workers' nodes as soon as a step is `boot_s` seconds from its end; hold them to its end.

    Args:
        step: beginning of its name in the progress lines.
    """
    group: PlacementGroup | None = None
    first: tuple[float, int] | None = None  # when the step was first seen, and what was done then
    lock, has_ended = threading.Lock(), False  # several threads look at the progress, one perhaps after the block

    def listen(name: str, done: int, total: int) -> None:
        nonlocal group, first
        with lock:
            if has_ended or group is not None or not name.startswith(step):
                return
            now = time.monotonic()
            first = first or (now, done)
            if done <= first[1] and done < total:
                return  # its speed is not known yet
            left_s = (total - done) * (now - first[0]) / max(1, done - first[1])
            if left_s <= boot_s and workers.lack(_node_resources()):
                group = workers.request()

    token = _progress_listener.set(listen)
    try:
        yield
    finally:
        _progress_listener.reset(token)
        with lock:
            has_ended = True
        if group is not None:
            remove_placement_group(group)


def _node_resources() -> list[Resources]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _most_nodes(config: Mapping[str, object], workers: Workers) -> list[Resources]:
    """The nodes that a cluster of this configuration of Ray's launcher grows to, if it grows for these workers."""
    types = config["available_node_types"]
    assert isinstance(types, dict)
    head, room = types[config["head_node_type"]], int(str(config.get("max_workers", 0)))
    nodes: list[Resources] = [head.get("resources", {})]
    for kind in sorted(types.values(), key=lambda kind: -workers.fit_on(kind.get("resources", {}))):
        count = 0 if kind is head else min(int(kind.get("max_workers", 0)), room)
        nodes += [kind.get("resources", {})] * count
        room -= count
    return nodes


def _autoscaler() -> AutoscalingState | None:
    """The state that the autoscaler (version 2) last reported; None where none runs."""
    client = GcsClient(ray.get_runtime_context().gcs_address)
    state = GetClusterStatusReply.FromString(client.get_cluster_status(timeout_s=30)).autoscaling_state
    return state if state.autoscaler_state_version else None


def _is_refused(group: PlacementGroup) -> bool:
    state = _autoscaler()
    return state is not None and any(
        request.details.startswith(group.id.hex()) for request in state.infeasible_gang_resource_requests
    )


def _is_settled(workers: Workers, nodes: Sequence[Resources]) -> bool:
    """Whether no node of another type can be given back, and nothing runs whose end makes room."""
    if any(node.get("CPU", 0) + node.get("GPU", 0) and not workers.fit_on(node) for node in nodes):
        return False
    total, free = ray.cluster_resources(), ray.available_resources()
    return all(free.get(name, 0) >= total.get(name, 0) for name in ("CPU", "GPU"))
