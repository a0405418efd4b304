"""Reads the visible text of web pages, from the tree that a browser builds.

The parser turbohtml builds the tree. Its own text renderer is not used, because it pads table columns to equal width:
a table with one long cell becomes a text whose size grows with the square of the page.
"""

from __future__ import annotations

import re
from collections import Counter

from turbohtml import Document, Element, Namespace, Node, Text, parse

from .charsets import decode_page, has_mark
from .reading import Reading, UnreadableFileError

MAX_ROOTS = 100  # tags <html> and <body> of one page
MAX_OPEN_STYLES = 50  # tags such as <b> that are open at once

_HIDDEN = frozenset({
    "annotation", "annotation-xml", "audio", "canvas", "datalist", "desc", "head", "iframe", "nav", "noembed",
    "noframes", "noscript", "rp", "script", "style", "template", "title", "video"
})  # fmt: skip
_BLOCKS = frozenset({
    "address", "article", "aside", "blockquote", "body", "caption", "center", "dd", "details", "dialog", "div",
    "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4", "h5", "h6",
    "header", "hgroup", "hr", "legend", "li", "main", "menu", "ol", "option", "p", "pre", "section", "summary",
    "table", "tbody", "tfoot", "thead", "tr", "ul"
})  # fmt: skip
_SPACES = re.compile(r"\s+")
_NOT_DISPLAYED = re.compile(r"display\s*:\s*none", re.IGNORECASE)
_ROOT_TAG = re.compile(r"<(?:html|body)(?=[\s/>])", re.IGNORECASE)
_STYLE_TAG = re.compile(
    r"<(/?)(a|b|big|code|em|font|i|nobr|s|small|strike|strong|tt|u)(?=[\s/>])[^<>]*>?", re.IGNORECASE
)
_SELF_CLOSING = re.compile(r"<(?!br\b)([A-Za-z][\w:-]*+)([^<>]*)/>", re.IGNORECASE)


def read_page(data: bytes) -> Reading:
    """Return the visible text with a blank line between blocks, and the title or first heading.

    Raises:
        UnreadableFileError: it is binary.
    """
    if b"\x00" in data and not has_mark(data):
        raise UnreadableFileError("binary, not HTML")
    decoded = decode_page(data)
    text, title = page_text(decoded.text)
    return Reading(text, title, decoded.note())


def page_text(source: str) -> tuple[str, str]:
    """Return the visible text of a decoded page, and its title or first heading."""
    tree = parse(_parsable(source), positions=False, scripting=True)
    titles = [one for one in tree.select("title") if one.namespace is Namespace.HTML]
    heading = titles[0] if titles else tree.select_one("h1")
    return _visible_text(tree), heading.text if heading else ""


def read_chapter(data: bytes) -> tuple[str, str]:
    """Return the visible text of a chapter, and its first heading, because its title is often that of the book."""
    tree = parse(_parsable(decode_page(data).text), positions=False, scripting=True)
    heading = tree.select_one("h1, h2, h3")
    return _visible_text(tree), heading.text if heading else ""


def _visible_text(tree: Document) -> str:
    return _tidy_lines("".join(_pieces(tree)))


def _parsable(source: str) -> str:
    """Return the source without tags that would make the tree far larger than the page, or HTML misread XHTML."""
    roots = [tag.start() for tag in _ROOT_TAG.finditer(source)]
    if len(roots) > MAX_ROOTS:
        # Repeated roots only add attributes to the first, in time that grows with the square of their number.
        first = roots[MAX_ROOTS]
        source = source[:first] + _ROOT_TAG.sub("<wbr", source[first:])
    if _has_many_open_styles(source):
        source = _STYLE_TAG.sub("", source)  # each block would repeat all open styles
    if source.lstrip("\ufeff \t\r\n").startswith("<?xml"):
        source = _SELF_CLOSING.sub(r"<\1\2></\1>", source)  # HTML would read <script/> as a start without an end
    return source


def _has_many_open_styles(source: str) -> bool:
    """Return whether more than MAX_OPEN_STYLES tags of text styles are open somewhere."""
    open_styles: Counter[str] = Counter()
    total = 0
    for tag in _STYLE_TAG.finditer(source):
        name = tag[2].lower()
        if not tag[1]:
            open_styles[name] += 1
            total += 1
        elif open_styles[name]:
            open_styles[name] -= 1
            total -= 1
        if total > MAX_OPEN_STYLES:
            return True
    return False


def _pieces(root: Node) -> list[str]:
    """Return the visible texts below ``root`` and the white space that separates them, without recursion."""
    pieces: list[str] = []
    open_pres = 0
    waiting: list[Node | str | None] = [root]
    while waiting:
        node = waiting.pop()
        if isinstance(node, str):  # the end of an element
            pieces.append(node)
        elif node is None:  # the end of <pre>
            open_pres -= 1
        elif isinstance(node, Text):
            pieces.append(node.data if open_pres else _SPACES.sub(" ", node.data))
        elif isinstance(node, Document):
            waiting.extend(reversed(node.children))
        elif isinstance(node, Element) and not _is_hidden(node):
            if node.tag == "br":
                pieces.append("\n")
            elif node.tag in _BLOCKS:
                pieces.append("\n\n")
                waiting.append("\n\n")
            elif node.tag in ("td", "th"):
                waiting.append(" ")
            if node.tag == "pre":
                open_pres += 1
                waiting.append(None)
            waiting.extend(reversed(node.children))
    return pieces


def _is_hidden(element: Element) -> bool:
    """Return whether browsers do not show the element, or it only leads to other pages."""
    if element.tag in _HIDDEN:
        return True
    attributes = element.attrs
    if not attributes:
        return False
    hidden = "hidden" in attributes and attributes["hidden"] != "until-found"
    style = attributes.get("style")
    return (
        hidden
        or (isinstance(style, str) and bool(_NOT_DISPLAYED.search(style)))
        or attributes.get("role") == "navigation"
    )


def _tidy_lines(text: str) -> str:
    """Strip the ends of lines, and reduce several blank lines to one."""
    text = "\n".join(line.rstrip() for line in text.splitlines())
    text = re.sub(r"\n{3,}", "\n\n", text)
    return re.sub(r"(?m)^ (?=\S)", "", text).strip()
