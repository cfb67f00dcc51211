"""Chinese among other text: it has no spaces between words, so its characters are counted instead."""

from __future__ import annotations

import re
from collections.abc import Iterable

HAN = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"


def chinese(texts: Iterable[str]) -> bool:
    """Whether most of the letters are Chinese characters, one counting as half a word of five letters."""
    text = "".join(texts)
    han = len(re.findall(HAN, text))
    return 2.5 * han > sum(c.isalpha() for c in text) - han
