"""Self-contained pages of HTML: no server, no network, no script.

A page is a tree of elements, so all text is escaped without the caller's doing. Its policy forbids the browser
everything but the page's own style and embedded images.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

Element = ElementTree.Element

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# Characters that no page may have: control characters except tab and newline, and halves of surrogate pairs.
NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def element(tag: str, *children: "Element | str", **attributes: str) -> Element:
    """Returns an element that contains text and other elements. class_ is the attribute class."""
    made = Element(tag, {name.rstrip("_"): _text(value) for name, value in attributes.items()})
    for child in children:
        if not isinstance(child, str):
            made.append(child)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + _text(child)
        else:
            made.text = (made.text or "") + _text(child)
    return made


def _text(text: str) -> str:
    return NO_TEXT.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def picture(content: bytes, kind: str, alt: str) -> Element:
    """Returns an image that is embedded in the page. kind: png or svg+xml."""
    data = base64.b64encode(content).decode()
    return element("img", src=f"data:image/{kind};base64,{data}", alt=alt)


def preformatted(text: str) -> Element:
    """Returns text that keeps its lines and spaces."""
    return element("pre", element("code", text))  # a newline right after <pre> would be lost


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Element:
    """Returns a table. Numbers are right-aligned."""
    body = [element("tr", *(element("td", cell, **_kind(cell)) for cell in row)) for row in rows]
    return element(
        "div",
        element(
            "table", element("thead", element("tr", *(element("th", name) for name in head))), element("tbody", *body)
        ),
        class_="wide",
    )


def _kind(cell: str) -> dict[str, str]:
    return dict(class_="number") if re.fullmatch(r"-?[\d.,]+(e[-+]?\d+)?%?", cell) else {}


def page(title: str, style: str, body: Sequence[Element]) -> str:
    """Returns the text of a page. style: CSS, which must be ours alone since it is not escaped."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", **{"http-equiv": "Content-Security-Policy", "content": POLICY}),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        element("style", style),
    )
    made = element("html", head, element("body", *body), lang="en")
    return "<!DOCTYPE html>\n" + ElementTree.tostring(made, encoding="unicode", method="html") + "\n"
