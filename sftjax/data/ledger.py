"""The ledger: what becomes of every row that was read, and the sum that must add up.

read = kept + bad_row + overlong + trains_nothing + truncated_to_nothing + all_equal

A ranking that is read as pairs counts as the pairs it makes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from sftjax.config import UserError
from sftjax.data.cache import Store
from sftjax.data.formats import Rejected, counted
from sftjax.data.pairs import SLOTS
from sftjax.data.rows import Rows, with_others

KEPT, OVERLONG, UNTRAINED, CUT_SHORT, TIED = range(5)
NAMES = {OVERLONG: "overlong", UNTRAINED: "trains_nothing", CUT_SHORT: "truncated_to_nothing", TIED: "all_equal"}
SHOWN = 10  # rows named in an error; fewer where it is only said


class Ledger:
    """Every row of every store, side by side: where it is, how much of it is used, and its fate."""

    def __init__(
        self,
        stores: Sequence[Store],
        *,
        max_length: int,
        on_overlong: str,
        fill: bool,
        want: str = "answers",
        others: bool = True,
    ):
        """`others`: of labels, beside each answer its prompt with another row's, which KTO's baseline is made of."""
        self.others = others and want == "labels"
        self.stores, self.max_length, self.fill, self.want = stores, max_length, fill, want
        self.store = np.repeat(np.arange(len(stores)), [len(s) for s in stores])
        self.index = np.concatenate([np.arange(len(s)) for s in stores])
        self.key = np.concatenate([s.rows["key"] for s in stores])
        self.prompt = np.concatenate([s.rows["prompt"] for s in stores])
        self.terminated = np.concatenate([s.rows["terminated"] for s in stores])
        self.full = np.concatenate([s.lengths for s in stores])  # lengths before any cut
        self.trained = np.concatenate([s.rows["trained"] for s in stores])
        self.lengths = self.full.copy()
        self.fate = np.where((self.trained > 0) | (want == "prompts"), KEPT, UNTRAINED)
        self.fate[np.concatenate([s.rows["tied"] for s in stores])] = TIED
        self.bad = sum(len(s.rejected) for s in stores)
        self.long = (self.full > max_length) & (self.fate == KEPT) & (not fill)  # documents are cut to fill rows: none is long
        self.truncated = 0
        if on_overlong == "truncate":
            self.truncate()
        else:
            self.fate[self.long] = OVERLONG

    @property
    def limit(self) -> str:
        """What a row may not be longer than."""
        if self.want == "prompts":
            return f"the {self.max_length} tokens that data.max_length leaves for a prompt beside its answer"
        return f"data.max_length={self.max_length}"

    def truncate(self) -> None:
        """Cuts the end off long rows, with whatever of their answers stood there."""
        self.lengths[self.long] = self.max_length
        for i in np.flatnonzero(self.long).tolist():
            if self.want != "classes":  # whose label stays, whatever is cut
                self.trained[i] = np.count_nonzero(self.weights(i)[1 : self.max_length])
        self.fate[self.long & (self.trained == 0)] = CUT_SHORT
        self.truncated = int(np.count_nonzero(self.long & (self.fate == KEPT)))

    def weights(self, i: int) -> np.ndarray:
        return self.stores[self.store[i]].row(self.index[i])[1]

    def where(self, i: int) -> str:
        return self.stores[self.store[i]].where(self.index[i])

    def rows(self, chosen: np.ndarray, shares: Sequence[float]) -> Rows:
        """The kept ones of the chosen rows."""
        keep = np.flatnonzero(chosen & (self.fate == KEPT))
        store, index, lengths, trained = (column[keep] for column in (self.store, self.index, self.lengths, self.trained))
        most = max(int(np.diff(s.part_offsets).max(initial=1)) for s in self.stores)  # answers of a row
        rows = Rows(self.stores, store, index, lengths, trained, shares, self.fill, SLOTS.get(self.want, 2 * most))
        if self.want == "classes":
            return replace(rows, labelled=True)
        return with_others(rows, self.prompt[keep], self.max_length) if self.others else rows

    def counts(self) -> dict[str, Any]:
        """{"read", "kept", "dropped": {reason: rows}, "truncated", "unterminated"}; read is the sum of the others."""
        dropped = {"bad_row": self.bad} | {name: int(np.count_nonzero(self.fate == fate)) for fate, name in NAMES.items()}
        kept = int(np.count_nonzero(self.fate == KEPT))
        read = sum(len(s) + len(s.rejected) for s in self.stores)
        assert read == kept + sum(dropped.values()), (read, kept, dropped)
        return {
            "read": read,
            "kept": kept,
            "dropped": {name: n for name, n in dropped.items() if n},
            "truncated": self.truncated,
            "unterminated": int(np.count_nonzero(~self.terminated & (self.fate == KEPT))),
        }

    def dropped(self) -> list[Rejected]:
        """The usable rows that were dropped, each with its fate in words."""
        words = {
            OVERLONG: f"{{n}} tokens, more than {self.limit}",
            UNTRAINED: "no token of it is trained",
            CUT_SHORT: "no trained token is left of its {n} after cutting at data.max_length={limit}",
            TIED: "its answers are equally good or the same, which is no preference",
        }
        out = []
        for i in np.flatnonzero(self.fate != KEPT).tolist():
            source, _, line = self.where(i).rpartition(":")
            out.append(Rejected(source, int(line), "", words[int(self.fate[i])].format(n=self.full[i], limit=self.max_length)))
        return out

    @property
    def rejected(self) -> list[Rejected]:
        return [row for store in self.stores for row in store.rejected]

    def refuse_overlong(self) -> None:
        """Raises UserError where any row is longer than max_length."""
        if self.long.any():
            instead = "drop or truncate" if self.want in ("answers", "classes") else "drop"
            raise UserError(
                f"{rows_are(int(self.long.sum()))} longer than {self.limit} (the longest has "
                f"{self.full[self.long].max()} tokens): {self.some(self.long, SHOWN)}; raise it, or set "
                f"--config.data.on_overlong to {instead}"
            )

    def some(self, which: np.ndarray, most: int = 3) -> str:
        """`file:line` of the first few."""
        found = np.flatnonzero(which).tolist()
        return ", ".join(self.where(i) for i in found[:most]) + (", ..." if len(found) > most else "")

    def overlong(self) -> str:
        """Which rows were dropped as too long, and how to keep them; "" where none was."""
        long = self.fate == OVERLONG
        if not long.any():
            return ""
        mend = "data.on_overlong=truncate would cut their ends off"
        if self.want == "prompts":
            mend = "To keep them, raise data.max_length, which holds a prompt and its answer"
        elif self.want not in ("answers", "classes"):
            mend = "All the answers of a preference count, each with its prompt; to keep them, raise data.max_length"
        return (
            f"{rows_are(int(long.sum()))} longer than {self.limit} and dropped ({self.some(long)}); the "
            f"longest has {self.full[long].max()} tokens. {mend}"
        )

    def announce(self, say: Callable[[str], None]) -> None:
        """Says, with rows to look at, all that a user might not expect."""
        if self.bad:
            say(f"{rows_are(self.bad)} unusable and left out")
        if said := self.overlong():
            say(said)
        if self.truncated:
            cut = self.long & (self.fate == KEPT)
            lost = "is not read" if self.want == "classes" else "is not trained, nor the turn's terminator"
            say(
                f"{rows_are(self.truncated)} cut at data.max_length={self.max_length}: what stands beyond it {lost} "
                f"({self.some(cut)})"
            )
        if (short := self.fate == CUT_SHORT).any():
            say(f"{rows_are(int(short.sum()))} dropped: cut at data.max_length, nothing trained is left ({self.some(short)})")
        if (nothing := self.fate == UNTRAINED).any():
            say(f"{rows_are(int(nothing.sum()))} dropped: no token of them is trained ({self.some(nothing)})")
        if (tied := self.fate == TIED).any():
            say(f"{rows_are(int(tied.sum()))} dropped: their answers are equally good or the same ({self.some(tied)})")
        if (endless := ~self.terminated & (self.fate == KEPT)).any():
            say(
                f"warning: {rows_are(int(endless.sum()))} not ended by a trained terminator, so the model may not learn to stop "
                f"({self.some(endless)})"
            )


def rows_are(n: int) -> str:
    return f"{counted(n)} {'is' if n == 1 else 'are'}"
