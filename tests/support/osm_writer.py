"""Small OpenStreetMap files and Overpass answers for tests."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import osmium
from osmium.osm.mutable import Node, Relation, Way

STEP = 0.001  # degrees between grid points, about 111 m at the equator
EDGE = 0.01
SUBURBS = {"name": "Old Town", "place": "suburb"}, {"name": "New Town", "place": "suburb"}


class OsmWriter:
    """Collects objects whose nodes are on a grid of STEP, and writes them as a file or as an Overpass answer."""

    def __init__(self) -> None:
        self.nodes: dict[tuple[float, float], int] = {}
        self.places: list[tuple[float, float, dict]] = []
        self.ways: list[tuple[list[int], dict]] = []
        self.relations: list[tuple[list[tuple[int, str]], dict]] = []

    def way(self, *points: tuple[float, float], **tags: str) -> int:
        """Add a way through grid points, return its id."""
        refs = [self.nodes.setdefault(point, 1 + len(self.nodes)) for point in points]
        self.ways.append((refs, {key.replace("__", ":"): value for key, value in tags.items()}))
        return len(self.ways)

    def box(self, west: float, south: float, east: float, north: float, **tags: str) -> int:
        return self.way((west, south), (east, south), (east, north), (west, north), (west, south), **tags)

    def relation(self, *members: tuple[int, str], **tags: str) -> None:
        self.relations.append((list(members), tags))

    def save(self, path: Path, bounds: bool = True, nodes_last: bool = False) -> Path:
        header = osmium.io.Header()
        if bounds:
            header.add_box(osmium.osm.Box(0.0, 0.0, EDGE, EDGE))

        def objects() -> Iterator[Any]:
            nodes: list[Any] = [Node(id=i, location=(x * STEP, y * STEP)) for (x, y), i in self.nodes.items()]
            nodes += [Node(id=9000 + i, location=(x * STEP, y * STEP), tags=t) for i, (x, y, t) in enumerate(self.places)]
            others: list[Any] = [Way(id=i, nodes=refs, tags=tags) for i, (refs, tags) in enumerate(self.ways, 1)]
            others += [
                Relation(id=i, members=[("w", ref, role) for ref, role in members], tags=tags)
                for i, (members, tags) in enumerate(self.relations, 1)
            ]
            yield from others + nodes if nodes_last else nodes + others

        path.unlink(missing_ok=True)
        with osmium.SimpleWriter(str(path), header=header) as out:
            for item in objects():
                out.add(item)
        return path

    def overpass(self, path: Path, geom: bool) -> Path:
        """As `out geom` writes it, or with the nodes as elements after the ways."""
        at = {i: {"lat": y * STEP, "lon": x * STEP} for (x, y), i in self.nodes.items()}

        def line(refs: list[int]) -> dict:
            return {"nodes": refs} | ({"geometry": [at[ref] for ref in refs]} if geom else {})

        elements: list[dict] = [{"type": "way", "id": i, "tags": t} | line(refs) for i, (refs, t) in enumerate(self.ways, 1)]
        for i, (members, tags) in enumerate(self.relations, 1):
            way_members = [
                {"type": "way", "ref": ref, "role": role}
                | ({"geometry": line(self.ways[ref - 1][0])["geometry"]} if geom else {})
                for ref, role in members
            ]
            elements.append({"type": "relation", "id": i, "tags": tags, "members": way_members})
        elements += [
            {"type": "node", "id": 9000 + i, "lat": y * STEP, "lon": x * STEP, "tags": t}
            for i, (x, y, t) in enumerate(self.places)
        ]
        elements += [] if geom else [{"type": "node", "id": i, **place} for i, place in at.items()]
        path.write_text(json.dumps({"version": 0.6, "elements": elements}), encoding="utf-8")
        return path
