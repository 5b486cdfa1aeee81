"""The reliability diagram as inline SVG; colours come from the report's CSS."""

import math
from collections.abc import Mapping, Sequence

SIDE, LEFT, BOTTOM, TOP = 300.0, 34.0, 34.0, 8.0


def reliability_diagram(bins: Sequence[Mapping[str, float]]) -> str:
    """Confidence against the share that is right, from `addressvlm.answers.calibration.reliability`."""
    most = max((b["photos"] for b in bins), default=1)
    low, high = _xy(0, 0), _xy(1, 1)
    parts = [
        f'<rect class="frame" x="{low[0]}" y="{high[1]}" width="{high[0] - low[0]}" height="{low[1] - high[1]}"/>',
        f'<line class="ideal" x1="{low[0]}" y1="{low[1]}" x2="{high[0]}" y2="{high[1]}"/>',
    ]
    for percent in (0, 25, 50, 75, 100):
        x, y = _xy(percent / 100, percent / 100)
        parts.append(f'<text class="tick middle" text-anchor="middle" x="{x}" y="{low[1] + 14}">{percent}</text>')
        parts.append(f'<text class="tick end" x="{low[0] - 5}" y="{y + 4}">{percent}</text>')
    for b in bins:
        (x, y), (_, ideal) = _xy(b["confidence"], b["right"]), _xy(b["confidence"], b["confidence"])
        note = f"<title>{b['photos']:.0f} photos: confidence {b['confidence']:.0%}, right {b['right']:.0%}</title>"
        parts.append(f'<line class="gap" x1="{x}" x2="{x}" y1="{ideal}" y2="{y}"/>')
        parts.append(f'<circle class="bin" cx="{x}" cy="{y}" r="{3 + 7 * math.sqrt(b["photos"] / most):.1f}">{note}</circle>')
    parts.append(f'<text class="tick" text-anchor="middle" x="{(low[0] + high[0]) / 2}" y="{SIDE - 2}">confidence, %</text>')
    parts.append(f'<text class="tick" x="{low[0] + 8}" y="{high[1] + 16}">right, %</text>')
    return f'<svg class="reliability" viewBox="0 0 {SIDE} {SIDE}" role="img">{"".join(parts)}</svg>'


def _xy(confidence: float, right: float) -> tuple[float, float]:
    span = SIDE - LEFT - 10
    return round(LEFT + confidence * span, 1), round(TOP + (1 - right) * (SIDE - BOTTOM - TOP), 1)
