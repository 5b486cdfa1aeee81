"""How tiles look: mapnik styles for the streets and for their names."""

from functools import cache
from pathlib import Path
from xml.sax.saxutils import quoteattr

import mapnik
import matplotlib
from matplotlib.ft2font import FT2Font, LoadFlags

from addressvlm.errors import InputError

UNIT_PX = 64  # size at which letters are measured
GROUND = "#f2efe9"
CASING = "#bdb6ac"
STREET = "#ffffff"
MAIN_STREET = "#fbe3a1"
MAIN_WIDTH_M = 9.0  # streets at least this wide have the main streets' colour
TEXT = "#1b1b1b"


class Lettering:
    """The faces that street names are written in: each letter in the first face that has it."""

    def __init__(self, font: str | None = None) -> None:
        """DejaVu Sans Bold (Latin, Greek, Cyrillic, Arabic and more), then a font file of your own for other scripts.

        Raises:
            InputError: the file is missing or is not a font.
        """
        files = [str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans-Bold.ttf")), *([font] if font else [])]
        self._fonts = [_font(file) for file in files]
        self._letters = [frozenset(map(chr, face.get_charmap())) for face in self._fonts]
        self.faces = [f"{face.family_name} {face.style_name}" for face in self._fonts]

    def has(self, name: str) -> bool:
        """Whether every letter of the name can be drawn."""
        return frozenset().union(*self._letters).issuperset(name.replace(" ", ""))

    def width(self, name: str) -> float:
        """Length of a name that `has` accepts, as a multiple of the font's size."""
        return sum(self._advance(letter) for letter in name)

    @cache  # noqa: B019 - there is one Lettering a renderer, and few letters
    def _advance(self, letter: str) -> float:
        number = next((i for i, letters in enumerate(self._letters) if letter in letters), 0)
        glyph = self._fonts[number].load_char(ord(letter), flags=LoadFlags.NO_HINTING)
        return float(glyph.linearHoriAdvance) / 65536 / UNIT_PX


def _font(file: str) -> FT2Font:
    try:
        face = FT2Font(file)
        face.set_size(UNIT_PX, 72)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"{file} is not a font ({' '.join(str(error).split())}): set tiles.font to a TTF or OTF file."
        ) from None
    mapnik.FontEngine.register_font(file)
    return face


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


def name_style(faces: list[str], font_px: float, on_line: bool) -> str:
    """A name from a source with `name`: along its line, or level at its point."""
    place = (
        'placement="line" spacing="0" max-char-angle-delta="35" label-position-tolerance="400" margin="2"'
        if on_line
        else 'placement="point" avoid-edges="true" margin="2"'
    )
    text = (
        f'<TextSymbolizer fontset-name="names" size="{font_px:g}" fill="{TEXT}" halo-fill="#ffffff" '
        f'halo-radius="{max(1.0, font_px * 0.14):.2f}" {place}>[name]</TextSymbolizer>'
    )
    fonts = "".join(f"<Font face-name={quoteattr(face)}/>" for face in faces)
    return _map("", {"names": f"<Rule>{text}</Rule>"}, f'<FontSet name="names">{fonts}</FontSet>')


def _map(attributes: str, styles: dict[str, str], fonts: str = "") -> str:
    """A mapnik map of one layer a style."""
    body = fonts + "".join(f'<Style name="{name}">{rules}</Style>' for name, rules in styles.items())
    layers = "".join(f'<Layer name="{name}" srs="epsg:3857"><StyleName>{name}</StyleName></Layer>' for name in styles)
    return f'<Map srs="epsg:3857" {attributes}>{body}{layers}</Map>'
