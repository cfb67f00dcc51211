"""Chinese among other text: it has no spaces between words, so its characters are counted instead."""

from __future__ import annotations

import re
from collections.abc import Iterable

HAN = "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]"


def chinese(texts: Iterable[str]) -> bool:
    """Whether a tenth of the letters, or more, are Chinese characters."""
    text = "".join(texts)
    han = len(re.findall(HAN, text))
    return 10 * han >= sum(c.isalpha() for c in text) > 0
