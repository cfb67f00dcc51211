"""A preference over the quickstart's answers that can be said in a line: stop when the question is answered.

prompt     Mei had nine red hats and sold four. How many are left?
chosen     Nine minus four is five.
rejected   Nine minus four is five. Five red hats are left.        as the quickstart's model has learnt to answer

prompt     翻译成英文：昨天汤姆丢了三本书。
chosen     Yesterday Tom lost three books.
rejected   Yesterday Tom lost three books. 昨天汤姆丢了三本书。

Into pairs.jsonl; and into undecided.jsonl each question with one or the other in turn, for a model that says both and so has
something to choose from where it learns from rewards.

python examples/quickstart/make_data.py --documents=0 --seed=1 --out=runs/preferences
python examples/preferences/make_data.py --data=runs/preferences
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any


def sides(question: str, answer: str) -> tuple[str, str]:
    """(short, long-winded)."""
    match re.split(r"(?:\. |，)", answer), re.split(r": |：", question):
        case [short, _], _:  # a sum
            return short + answer[-1], answer
        case [short], [_, asked]:  # a translation
            return short, f"{short} {asked}"
    raise ValueError(f"{question} {answer}: neither a sum nor a translation")


def pair(conversation: dict[str, Any]) -> dict[str, Any]:
    question, answer = conversation["messages"]
    chosen, rejected = ([answer | {"content": text}] for text in sides(question["content"], answer["content"]))
    return {"prompt": [question], "chosen": chosen, "rejected": rejected}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/preferences"), help="where instructions.jsonl is")
    args = parser.parse_args()
    lines = (args.data / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    pairs = [pair(json.loads(line)) for line in lines]
    undecided = [{"messages": [*p["prompt"], *p[("chosen", "rejected")[i % 2]]]} for i, p in enumerate(pairs)]
    write(args.data / "pairs.jsonl", pairs)
    write(args.data / "undecided.jsonl", undecided)


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {len(rows):,} rows")


if __name__ == "__main__":
    main()
