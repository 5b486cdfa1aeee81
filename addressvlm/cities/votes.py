"""Votes of neighbouring places on which of two near streets a place is on (in the spirit of paper 002, A.2)."""

import numpy as np
from numpy.typing import NDArray

MOST_VOTERS = 64  # to each side


def vote(
    x: NDArray[np.float64], y: NDArray[np.float64], own: NDArray[np.int32], rival: NDArray[np.int32], reach_m: float
) -> NDArray[np.int32]:
    """The street of each place after its neighbours have voted.

    A photo taken in passing a corner is often nearer to the crossing street than to the one it was taken on. The places
    before and after it on the same drive tell. They are those that come next to it in the order of the rows, to each side as
    long as they stay within reach; each votes for its own nearest street. The rival wins if most voters of one side are for
    it and those of the other side are not against it: a drive that goes straight on has it on both sides, one that turns
    the corner has not. A tie, or no voter, keeps the own. Neighbours from elsewhere in the table have no vote, since those
    on the crossing street would carry the corner as often as not; so rows in a random order are left as they are.

    Args:
        x, y: (N,) metres, in the order of the rows.
        own: (N,) code of the nearest street of each place, -1 where there is none (that place has no vote).
        rival: (N,) code of the other street that a place may be on, -1 where its own is beyond doubt.
        reach_m: how far a voter may be.
    """
    before, after = (_lead(x, y, own, rival, reach_m, side) for side in (-1, 1))
    return np.where((before >= 0) & (after >= 0) & (before + after > 0), rival, own)


def _lead(
    x: NDArray[np.float64], y: NDArray[np.float64], own: NDArray[np.int32], rival: NDArray[np.int32], reach_m: float, side: int
) -> NDArray[np.int64]:
    """By how many votes of one side (-1 before, 1 after) the rival is ahead of each place's own street."""
    lead = np.zeros(len(x), dtype=np.int64)
    place = np.flatnonzero(rival >= 0)
    for step in range(1, MOST_VOTERS + 1):
        voter = place + side * step
        inside = (voter >= 0) & (voter < len(x))
        place, voter = place[inside], voter[inside]
        near = np.hypot(x[place] - x[voter], y[place] - y[voter]) <= reach_m
        place, voter = place[near], voter[near]
        if not len(place):
            break
        lead[place] += (own[voter] == rival[place]).astype(np.int64) - (own[voter] == own[place])
    return lead
