"""Translations that the quickstart's model has not been trained on, by field, so that prompts can put them otherwise.

{"text": "昨天汤姆丢了三本书。", "question": "翻译成英文：昨天汤姆丢了三本书。", "answer": "Yesterday Tom lost three books."}

python examples/quickstart/make_data.py --documents=0 --seed=2 --out=runs/compare
python examples/compare/make_data.py --data=runs/compare --without=runs/quickstart
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path


def exchanges(folder: Path) -> list[tuple[str, str]]:
    """(question, answer) of every conversation there."""
    lines = (folder / "instructions.jsonl").read_text(encoding="utf-8").splitlines()
    return [(asked["content"], said["content"]) for asked, said in (json.loads(line)["messages"] for line in lines)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("runs/compare"))
    parser.add_argument("--without", type=Path, default=Path("runs/quickstart"))
    args = parser.parse_args()
    known = {text for exchange in exchanges(args.without) for text in exchange}
    rows = []
    for question, answer in exchanges(args.data):
        text = question.replace("：", ": ").partition(": ")[2]
        if text and not known & {question, answer, text}:
            rows.append({"text": text, "question": question, "answer": answer})
    out = args.data / "questions.jsonl"
    out.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{out}: {len(rows):,} translations")


if __name__ == "__main__":
    main()
