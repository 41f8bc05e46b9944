"""Pages of HTML that need nothing but themselves: no server, no network, no script.

A page is a tree of elements, so that text is escaped wherever it comes from, and no caller has to think of it. Its
policy forbids the browser everything but its own style and images that are in the page.
"""

import base64
import re
from collections.abc import Iterable, Sequence
from xml.etree import ElementTree

Element = ElementTree.Element

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
# What no page may have: control characters but for tab and newline, and halves of surrogate pairs.
NO_TEXT = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def element(tag: str, *children: "Element | str", **attributes: str) -> Element:
    """An element with text and other elements in it. class_ is the attribute class."""
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
    """An image that is part of the page. kind: png or svg+xml."""
    data = base64.b64encode(content).decode()
    return element("img", src=f"data:image/{kind};base64,{data}", alt=alt)


def preformatted(text: str) -> Element:
    """Text with its own lines and spaces."""
    return element("pre", element("code", text))  # a newline right behind <pre> would be lost


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Element:
    """A table. Cells that are numbers are aligned at the right."""
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
    """The text of a page. style: CSS, of ours alone: it is not escaped."""
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
