"""What cleaning changes in a text: HTML, Unicode forms, control characters, widths, scripts and personal data.

Each change takes a text and gives a text; it knows nothing of documents.
"""

from __future__ import annotations

import html
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from ipaddress import ip_address

from raylm.config.cleaning import CleaningSection
from raylm.errors import UserError

Change = Callable[[str], str]

# Elements that stand on lines of their own.
BLOCK_ELEMENTS = (
    "address,article,aside,blockquote,br,dd,div,dl,dt,figcaption,footer,form,h1,h2,h3,h4,h5,h6,header,hr,li,main,nav,ol,"
    "p,pre,section,table,td,th,tr,ul"
)
_NOT_CONTENT = "script,style,noscript,template,svg,head"
_TAG = re.compile(r"<(/?)([A-Za-z][A-Za-z0-9]*)[^<>]*>")
# Elements that hold none, or end where the next one begins.
_FLAT_ELEMENTS = (
    "area,base,br,col,dd,dt,embed,hr,img,input,li,link,meta,option,p,param,source,tbody,td,tfoot,th,thead,tr,track,wbr"
)
# As browsers have it. A parser looks through the open elements at each tag, so that depth costs its square.
MOST_DEPTH = 512
_CONTROL = re.compile(
    # C0 without tab and line feed, C1, soft hyphen, zero-width and direction marks, byte order mark, noncharacters.
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb\ufffe\uffff]"
)
_SPACES = re.compile(r"[ \t]+\n|\n[ \t]+|[ \t]{2,}")
# Matches what might be a local part in any case, so that its end is never looked for again from within it.
_EMAIL = re.compile(r"[A-Za-z0-9._%+-]++(@[A-Za-z0-9-]++(?:\.[A-Za-z0-9-]+)*\.[A-Za-z]{2,})?")
_IP = re.compile(r"(?<![\w.:])(?:\d{1,3}(?:\.\d{1,3}){3}|[0-9A-Fa-f]{0,4}(?::[0-9A-Fa-f]{0,4}){2,7})(?![\w:]|\.\d)")
# International and national forms with separators, and Chinese mobile numbers.
# Dates do not match: their middle is short.
_PHONE = re.compile(
    r"(?<![\w.+-])(?:\+\d{1,3}[ .-]?)?(?:\(\d{2,4}\) ?|\d{2,4}[ .-])\d{3,4}[ .-]?\d{3,4}(?![\w-]|\.\d)"
    r"|(?<![\w.+-])\+\d{8,14}(?!\w)"
    r"|(?<!\d)1[3-9]\d{9}(?!\d)"
)
# Letters, digits and signs that belong to Latin text; Chinese punctuation (，！？：；（）) stays as it is.
_KEPT = "！（），：；？～"
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code) not in _KEPT} | {0x3000: 0x20}


def changes_of(section: CleaningSection) -> dict[str, Change]:
    """The changes that are asked for, by name, in their order.

    Raises:
        UserError: a library is missing.
    """
    found: dict[str, Change] = {}
    if section.html:
        found["html"] = html_to_text
    if section.unicode is not None:
        form = section.unicode
        found["unicode"] = lambda text: text if text.isascii() else unicodedata.normalize(form, text)
    if section.control_characters:
        found["control_characters"] = without_control_characters
    if section.full_width:
        found["full_width"] = lambda text: text if text.isascii() else text.translate(_FULL_WIDTH)
    if section.chinese is not None:
        found["chinese"] = chinese_converter(section.chinese)
    for kind in section.pii:
        found[f"pii {kind}"] = _MASKS[kind]
    return found


def html_to_text(text: str) -> str:
    """The text that a browser would show, block elements on lines of their own."""
    if "<" not in text and "&" not in text:
        return text
    if _is_deep(text):
        return _collapsed(_without_tags(text))
    from selectolax.lexbor import LexborHTMLParser

    tree = LexborHTMLParser(text)
    tree.strip_tags(_NOT_CONTENT.split(","), recursive=True)
    for node in tree.css(BLOCK_ELEMENTS):
        node.insert_before("\n")
        node.insert_after("\n")
    root = tree.body or tree.root
    return _collapsed(root.text(deep=True) if root is not None else "")


def _is_deep(text: str) -> bool:
    """Whether elements are nested deeper than any page of use."""
    open_elements: Counter[str] = Counter()
    flat, depth = set(_FLAT_ELEMENTS.split(",")), 0
    for match in _TAG.finditer(text):
        name = match[2].lower()
        if name in flat:
            continue
        if not match[1]:
            open_elements[name] += 1
            depth += 1
            if depth > MOST_DEPTH:
                return True
        elif open_elements[name]:
            open_elements[name] -= 1
            depth -= 1
    return False


def _without_tags(text: str) -> str:
    """The text between the tags, each on a line of its own, without a tree of the elements."""
    hidden, pieces, place, inside = set(_NOT_CONTENT.split(",")), [], 0, ""
    for match in _TAG.finditer(text):
        if not inside:
            pieces.append(text[place : match.start()])
        name = match[2].lower()
        if not match[1] and not inside and name in hidden:
            inside = name
        elif match[1] and name == inside:
            inside = ""
        place = match.end()
    if not inside:
        pieces.append(text[place:])
    return html.unescape("\n".join(pieces))


def _collapsed(content: str) -> str:
    content = _SPACES.sub(lambda match: "\n" if "\n" in match[0] else " ", content)
    return re.sub(r"\n{3,}", "\n\n", content).strip()


def without_control_characters(text: str) -> str:
    """``text`` with line feeds as its only line ends, and without what cannot be seen."""
    return _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))


def chinese_converter(target: str) -> Change:
    """Converts to simplified or traditional characters.

    Raises:
        UserError: OpenCC is not installed.
    """
    try:
        import opencc
    except ImportError:
        raise UserError("data.cleaning.chinese: needs OpenCC; install raylm[chinese]") from None
    return opencc.OpenCC("t2s" if target == "simplified" else "s2t").convert


def mask_emails(text: str) -> str:
    """``text`` with <email> for e-mail addresses."""
    return _EMAIL.sub(lambda match: "<email>" if match[1] else match[0], text) if "@" in text else text


def mask_addresses(text: str) -> str:
    """``text`` with <ip> for IPv4 and IPv6 addresses."""
    return _IP.sub(_mask_address, text)


def _mask_address(match: re.Match[str]) -> str:
    try:
        ip_address(match[0])
    except ValueError:
        return match[0]
    return "<ip>" if match[0] != "::" else match[0]


def mask_phones(text: str) -> str:
    """``text`` with <phone> for telephone numbers."""
    return _PHONE.sub("<phone>", text)


_MASKS: dict[str, Change] = {"email": mask_emails, "ip": mask_addresses, "phone": mask_phones}
