"""Reports: one file, escaped, the same each time, and nothing in it that is loaded from outside."""

import os
import re
from html.parser import HTMLParser

from tinyllama.report import Page, new_figure


class Reader(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.text, self.addresses = [], "", []

    def handle_starttag(self, tag, attrs):
        if tag not in ("meta", "link", "br"):
            self.open.append(tag)
        self.addresses += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def page_with_everything():
    page = Page("A <run> & more")
    page.text("<script>alert(1)</script>")
    page.quote("a story\nof two lines")
    page.table(["what", "how many"], [["tokens", 1234567], ["<b>", 0.5], ["yes", True]], "counts")
    for height in (3, 4):
        figure = new_figure(5, height)
        figure.subplots().plot([1, 2, 3], [3, 1, 2], label="loss")
        page.figure(figure, "a curve")
    return page


def test_a_page_is_whole_escaped_and_loads_nothing(tmp_path):
    page_with_everything().write(tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    reader = Reader()
    reader.feed(page)
    assert reader.open == []
    assert "<script>" not in page and "<script>alert(1)</script>" in reader.text
    assert "1,234,567" in reader.text and "a story\nof two lines" in reader.text
    assert all(address.startswith("#") for address in reader.addresses)
    assert not re.search(r"url\((?!#)|@import", page)


def test_a_name_that_is_no_utf8_does_not_lose_the_page(tmp_path):
    page = Page(os.fsdecode(b"model-\xff.gguf"))
    page.write(tmp_path / "page.html")
    assert "<h1>model-&#56575;.gguf</h1>" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_the_same_page_is_the_same_bytes_and_no_two_drawings_share_a_name(tmp_path):
    for name in ("one.html", "two.html"):
        page_with_everything().write(tmp_path / name)
    page = (tmp_path / "one.html").read_text(encoding="utf-8")
    assert page == (tmp_path / "two.html").read_text(encoding="utf-8")
    clips = re.findall(r'<clipPath id="(\w+)"', page)
    assert len(clips) == len(set(clips)) >= 2
