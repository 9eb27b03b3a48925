"""What elements a page has, for the tests of all pages."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = ("br", "img", "input", "link", "meta")


class Tags(HTMLParser):
    """Reads a whole page. Fails where elements are not closed in order, or not at all.

    seen: every element's tag and attributes, in order; texts: the text of the page, scripts and styles included.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind."""
        return [attributes for name, attributes in self.seen if name == tag]
