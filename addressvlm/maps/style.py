"""How tiles look: mapnik styles for the streets and for their names."""

from functools import cache
from pathlib import Path

import mapnik
import matplotlib
from matplotlib.ft2font import FT2Font

FACE = "DejaVu Sans Bold"
GROUND = "#f2efe9"
CASING = "#bdb6ac"
STREET = "#ffffff"
MAIN_STREET = "#fbe3a1"
MAIN_WIDTH_M = 9.0  # streets at least this wide have the main streets' colour
TEXT = "#1b1b1b"


@cache
def glyphs() -> frozenset[str]:
    """The characters that the face of the street names can draw; makes the face known to mapnik."""
    file = str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf"))
    mapnik.FontEngine.register_font(file)
    return frozenset(map(chr, FT2Font(file).get_charmap()))


def map_style(pixels_per_m: float, over_imagery: bool) -> str:
    """Streets from a source with `width` in metres: casing and fill, or thin lines where imagery shows the rest."""
    if over_imagery:
        line = '<LineSymbolizer stroke="#ffffff" stroke-width="1" stroke-opacity="0.55" stroke-linecap="round"/>'
        return _map("", {"lines": f"<Rule>{line}</Rule>"})
    width = f"[width] * {pixels_per_m:.6f}"
    join = 'stroke-linecap="round" stroke-linejoin="round"'
    casing = f'<LineSymbolizer stroke="{CASING}" stroke-width="{width} + 2" {join}/>'
    fill = f'<LineSymbolizer stroke="{{}}" stroke-width="{width}" {join}/>'
    fills = (
        f"<Rule><Filter>[width] &lt; {MAIN_WIDTH_M}</Filter>{fill.format(STREET)}</Rule>"
        f"<Rule><Filter>[width] &gt;= {MAIN_WIDTH_M}</Filter>{fill.format(MAIN_STREET)}</Rule>"
    )
    return _map(f'background-color="{GROUND}"', {"casing": f"<Rule>{casing}</Rule>", "fill": fills})


def name_style(font_px: float, on_line: bool) -> str:
    """A name from a source with `name`: along its line, or level at its point."""
    place = (
        'placement="line" spacing="0" max-char-angle-delta="35" label-position-tolerance="400" margin="2"'
        if on_line
        else 'placement="point" avoid-edges="true" margin="2"'
    )
    text = (
        f'<TextSymbolizer face-name="{FACE}" size="{font_px:g}" fill="{TEXT}" halo-fill="#ffffff" '
        f'halo-radius="{max(1.0, font_px * 0.14):.2f}" {place}>[name]</TextSymbolizer>'
    )
    return _map("", {"names": f"<Rule>{text}</Rule>"})


def _map(attributes: str, styles: dict[str, str]) -> str:
    """A mapnik map of one layer a style."""
    body = "".join(f'<Style name="{name}">{rules}</Style>' for name, rules in styles.items())
    layers = "".join(f'<Layer name="{name}" srs="epsg:3857"><StyleName>{name}</StyleName></Layer>' for name in styles)
    return f'<Map srs="epsg:3857" {attributes}>{body}{layers}</Map>'
