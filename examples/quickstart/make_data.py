"""The quickstart's world: a bilingual market, small enough to learn in a minute and too large to memorise.

A `Deed` is a meaning ("yesterday, Mei, at the market, bought, three, red, apple") and renders as an English and as a
Chinese sentence; a `Stock` is one of the form "had seven, sold three". Chinese wants the place before the verb and a
measure word for each noun (三顶绿帽子), English an order and a plural of its own: there is grammar to learn.

    text.txt             plain prose, a meaning told in both languages a line; for pretraining, never a question or a chat
    instructions.jsonl   conversations: translate either way, or say how many are left and show the sum

A meaning belongs to the prose or to the conversations, never to both, and is asked about once: whichever rows are held
out of the second file, what they ask about is told nowhere else. There are three million meanings; the files tell 23,000.

    python examples/quickstart/make_data.py --out=runs/quickstart
"""

from __future__ import annotations

import argparse
import json
import random
import zlib
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from pathlib import Path

NUMBERS = [  # counting things, in a sum
    ("one", "一", "一"), ("two", "两", "二"), ("three", "三", "三"), ("four", "四", "四"), ("five", "五", "五"),
    ("six", "六", "六"), ("seven", "七", "七"), ("eight", "八", "八"), ("nine", "九", "九"), ("ten", "十", "十"),
]  # fmt: skip
TIMES = [("", ""), ("yesterday", "昨天"), ("this morning", "今天早上"), ("on Monday", "星期一"), ("last year", "去年")]
PEOPLE = [
    ("Mei", "小美"), ("Tom", "汤姆"), ("Anna", "安娜"), ("Grandpa", "爷爷"),
    ("my sister", "我妹妹"), ("the teacher", "老师"), ("the doctor", "医生"), ("the farmer", "农夫"),
]  # fmt: skip
PLACES = [("", ""), ("at the market", "在市场"), ("at school", "在学校"), ("in the park", "在公园"), ("by the river", "在河边")]
VERBS = [
    ("bought", "买了"), ("sold", "卖了"), ("found", "找到了"), ("lost", "丢了"),
    ("saw", "看见了"), ("drew", "画了"), ("counted", "数了"), ("borrowed", "借了"),
]  # fmt: skip
LOOKS = [
    ("", ""), ("red", "红"), ("green", "绿"), ("blue", "蓝"), ("white", "白"),
    ("black", "黑"), ("yellow", "黄"), ("big", "大"), ("small", "小"),
]  # fmt: skip
THINGS = [  # singular, plural, measure word, Chinese
    ("apple", "apples", "个", "苹果"), ("pear", "pears", "个", "梨"), ("cup", "cups", "个", "杯子"),
    ("book", "books", "本", "书"), ("hat", "hats", "顶", "帽子"), ("pen", "pens", "支", "笔"),
    ("cat", "cats", "只", "猫"), ("dog", "dogs", "只", "狗"), ("bird", "birds", "只", "鸟"),
    ("fish", "fish", "条", "鱼"), ("boat", "boats", "条", "船"), ("shirt", "shirts", "件", "衬衫"),
    ("chair", "chairs", "把", "椅子"), ("umbrella", "umbrellas", "把", "雨伞"), ("table", "tables", "张", "桌子"),
    ("map", "maps", "张", "地图"), ("flower", "flowers", "朵", "花"), ("car", "cars", "辆", "车"),
    ("lamp", "lamps", "盏", "灯"), ("horse", "horses", "匹", "马"), ("tree", "trees", "棵", "树"),
]  # fmt: skip


@dataclass(frozen=True)
class Deed:
    """Who did what to how many of which things, where and when: an index into each list above (`number` counts from 1)."""

    time: int
    who: int
    place: int
    verb: int
    number: int
    look: int
    thing: int

    def english(self) -> str:
        words = [TIMES[self.time][0], PEOPLE[self.who][0], VERBS[self.verb][0], things(self.number, self.look, self.thing)[0]]
        return sentence(" ".join(filter(None, [*words, PLACES[self.place][0]])))

    def chinese(self) -> str:
        words = [TIMES[self.time][1], PEOPLE[self.who][1], PLACES[self.place][1], VERBS[self.verb][1]]
        return "".join(words) + things(self.number, self.look, self.thing)[1] + "。"


@dataclass(frozen=True)
class Stock:
    """Someone had some things and parted with fewer (by selling or losing them): the rest are left."""

    who: int
    verb: int
    number: int
    gone: int
    look: int
    thing: int

    def english(self) -> str:
        had, _ = things(self.number, self.look, self.thing)
        return sentence(f"{PEOPLE[self.who][0]} had {had} and {VERBS[self.verb][0]} {NUMBERS[self.gone - 1][0]}")

    def chinese(self) -> str:
        _, had = things(self.number, self.look, self.thing)
        gone = NUMBERS[self.gone - 1][1] + THINGS[self.thing][2]
        return f"{PEOPLE[self.who][1]}有{had}，{VERBS[self.verb][1]}{gone}。"

    def english_answer(self) -> str:
        rest = self.number - self.gone
        number, gone, left = (NUMBERS[n - 1][0] for n in (self.number, self.gone, rest))
        remain = f"{things(rest, self.look, self.thing)[0]} {'is' if rest == 1 else 'are'} left"
        return f"{sentence(f'{number} minus {gone} is {left}')} {sentence(remain)}"

    def chinese_answer(self) -> str:
        rest = self.number - self.gone
        number, gone, left = (NUMBERS[n - 1][2] for n in (self.number, self.gone, rest))
        return f"{number}减{gone}是{left}，还剩{things(rest, self.look, self.thing)[1]}。"


def things(number: int, look: int, thing: int) -> tuple[str, str]:
    """`three green hats` and `三顶绿帽子`."""
    singular, plural, measure, chinese = THINGS[thing]
    english = " ".join(filter(None, [NUMBERS[number - 1][0], LOOKS[look][0], singular if number == 1 else plural]))
    return english, NUMBERS[number - 1][1] + measure + LOOKS[look][1] + chinese


def sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def deed(rng: random.Random) -> Deed:
    r = rng.randrange
    return Deed(
        r(len(TIMES)), r(len(PEOPLE)), r(len(PLACES)), r(len(VERBS)), r(1, len(NUMBERS) + 1), r(len(LOOKS)), r(len(THINGS))
    )


def stock(rng: random.Random) -> Stock:
    r = rng.randrange
    number = r(2, len(NUMBERS) + 1)
    verb = 1 + 2 * r(2)  # sold or lost
    return Stock(r(len(PEOPLE)), verb, number, r(1, number), r(len(LOOKS)), r(len(THINGS)))


def for_instructions(meaning: Deed | Stock) -> bool:
    """Whether the meaning is kept for the conversations: a fifth is, chosen by its content."""
    return zlib.crc32(repr(astuple(meaning)).encode()) % 5 == 0


def prose(rng: random.Random) -> str:
    """A document: one meaning in both languages, in either order."""
    while True:
        m = deed(rng) if rng.random() < 0.6 else stock(rng)
        if not for_instructions(m):
            break
    pair = [m.english(), m.chinese()]
    if isinstance(m, Stock):
        pair = [f"{pair[0]} {m.english_answer()}", pair[1] + m.chinese_answer()]
    return " ".join(rng.sample(pair, 2))


def exchange(m: Deed | Stock, chinese: bool) -> tuple[str, str]:
    """A question about the meaning, asked in Chinese or in English, and its answer."""
    match m, chinese:
        case Deed(), True:
            return f"翻译成英文：{m.chinese()}", m.english()
        case Deed(), False:
            return f"Translate into Chinese: {m.english()}", m.chinese()
        case Stock(), True:
            return f"{m.chinese()}还剩多少？", m.chinese_answer()
        case Stock(), False:
            return f"{m.english()} How many are left?", m.english_answer()


def instructions(rng: random.Random, rows: int) -> Iterator[dict[str, list[dict[str, str]]]]:
    """Conversations of one exchange, each about a meaning of its own."""
    seen: set[Deed | Stock] = set()
    while len(seen) < rows:
        m = stock(rng) if rng.random() < 1 / 3 else deed(rng)
        if m in seen or not for_instructions(m):
            continue
        seen.add(m)
        question, answer = exchange(m, chinese=rng.random() < 0.5)
        yield {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write(out: Path, *, documents: int, rows: int, seed: int) -> tuple[Path, Path]:
    """Writes both files into `out` and returns their paths. The same arguments write the same bytes."""
    out.mkdir(parents=True, exist_ok=True)
    text, instruct = out / "text.txt", out / "instructions.jsonl"
    rng = random.Random(seed)
    text.write_text("".join(prose(rng) + "\n" for _ in range(documents)), encoding="utf-8")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in instructions(rng, rows)]
    instruct.write_text("".join(lines), encoding="utf-8")
    return text, instruct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--documents", type=int, default=20_000, help="lines of prose")
    parser.add_argument("--rows", type=int, default=3_000, help="conversations, before the split into train, eval and test")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for path in write(args.out, documents=args.documents, rows=args.rows, seed=args.seed):
        print(f"{path}: {sum(1 for _ in path.open(encoding='utf-8')):,} lines, {path.stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
