"""Status badges: a label and a message as an SVG, made without network or font files."""

from __future__ import annotations

from xml.sax.saxutils import escape, quoteattr

COLOURS = {"good": "#17703a", "bad": "#b3261e", "soft": "#5b6470"}  # white on each has a contrast of at least 4.5
LABEL = "#3d434b"
HEIGHT, PAD = 20, 7  # px
NARROW, WIDE = set("iljtfrI.,:;|!'()[]- ·"), set("mwMW@%")
MOST = 60  # characters of a side


def svg(label: str, message: str, tone: str) -> str:
    """`tone` is one of COLOURS."""
    sides = [(_short(label), LABEL), (_short(message), COLOURS[tone])]
    widths = [_width(text) + 2 * PAD for text, _ in sides]
    total, parts, at = sum(widths), [], 0
    for (text, colour), width in zip(sides, widths, strict=True):
        parts.append(f'<rect x="{at}" width="{width}" height="{HEIGHT}" fill="{colour}"/>')
        parts.append(f'<text x="{at + PAD}" y="14" textLength="{width - 2 * PAD}">{escape(text)}</text>')
        at += width
    title = f"{sides[0][0]}: {sides[1][0]}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{total}" height="{HEIGHT}" role="img" '
        f"aria-label={quoteattr(title)}><title>{escape(title)}</title>"
        f'<clipPath id="round"><rect width="{total}" height="{HEIGHT}" rx="3"/></clipPath>'
        '<g clip-path="url(#round)" fill="#ffffff" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
        f"{''.join(parts)}</g></svg>\n"
    )


def _short(text: str) -> str:
    shown = "".join(c if c.isprintable() else "�" for c in text)
    return shown if len(shown) <= MOST else f"{shown[: MOST - 1]}…"


def _width(text: str) -> int:
    """The approximate width in Verdana at 11 px; textLength corrects the rest."""
    return round(sum(4.3 if c in NARROW else 10.5 if c in WIDE else 7.0 for c in text))
