"""Whoever else goes on, and whenever they come, a request's answer is the one that it would have alone."""

import queue
import random

import numpy as np
import pytest
import tiny

from sftjax.config import UserError
from sftjax.generate import flight
from sftjax.generate.engine import Engine, Generated
from sftjax.generate.live import Live, Request
from sftjax.generate.sampling import choose
from sftjax.models.decoder import Decoder

CONFIG = tiny.config(max_positions=128)
RNG = np.random.default_rng(0)
CHOICES = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.2, "top_p": 0.8},
    {"temperature": 1.0, "top_k": 5},
    {"repetition_penalty": 1.3},
    {"temperature": 0.9, "min_p": 0.1, "repetition_penalty": 1.2},
    {"temperature": 1.1, "top_k": 7, "top_p": 0.9, "min_p": 0.05},
]


class Letters:
    def decode(self, ids, **_):
        return "".join(chr(97 + i % 26) for i in ids)

    def convert_ids_to_tokens(self, i):
        return self.decode([i])


def asked(i):
    """Request i: (prompt, options of Engine.each)."""
    prompt = np.random.default_rng(i).integers(0, CONFIG.vocab, [3, 41, 1, 17, 8][i % 5]).tolist()
    stops = {"stop_strings": ("ab", "q")} if i % 3 == 2 else {}
    return prompt, {"max_new_tokens": [30, 7, 1][i % 3 if i > 3 else 0], "seed": 10 + i, **stops, **CHOICES[i % len(CHOICES)]}


@pytest.fixture(scope="module")
def engine():
    return Engine(Decoder(CONFIG), tiny.params(CONFIG), stop_ids=[5])


@pytest.fixture(scope="module")
def alone(engine):
    """What Engine.generate makes of request i as prompt number i % 3."""

    def one(i):
        prompt, options = asked(i)
        before = [[1]] * (i % 3)
        return engine.generate([*before, prompt], tokenizer=Letters(), **options)[-1]

    return [one(i) for i in range(14)]


def request(i, tell):
    prompt, options = asked(i)
    stops, seed, longest = options.pop("stop_strings", ()), options.pop("seed"), options.pop("max_new_tokens")
    return Request(prompt, longest, tell, i % 3, seed, choose(**options), stops)


class Heard:
    """What requests are told, by request."""

    def __init__(self):
        self.queue = queue.Queue()
        self.tokens, self.answers = {}, {}

    def teller(self, i):
        return lambda said: self.queue.put((i, said))

    def until(self, done):
        while not done(self):
            i, said = self.queue.get(timeout=120)
            if isinstance(said, list):
                self.tokens.setdefault(i, []).extend(said)
            else:
                assert i not in self.answers
                self.answers[i] = said


@pytest.mark.parametrize(("slots", "draft_tokens"), [(16, 0), (3, 0), (1, 2), (16, 3)])
def test_each_answer_is_the_one_it_has_alone(engine, alone, slots, draft_tokens, monkeypatch):
    monkeypatch.setattr(flight, "AHEAD", 8)  # the cache grows on the way
    order = list(range(len(alone)))
    random.Random(slots).shuffle(order)
    heard = Heard()
    live = Live(engine, Letters(), slots=slots, draft_tokens=draft_tokens)
    for n, i in enumerate(order):  # some together, some when others have been told a little
        live.ask([request(i, heard.teller(i))])
        if n % 4 == 3:
            heard.until(lambda h, least=n // 2: len(h.tokens) >= least)
    heard.until(lambda h: len(h.answers) == len(order))
    live.end()
    assert [heard.answers[i] for i in range(len(order))] == alone
    for i, answer in enumerate(alone):
        assert heard.tokens[i][: len(answer.ids)] == answer.ids
        assert heard.tokens[i] == answer.ids or "stop_strings" in asked(i)[1]
    assert len({tuple(a.ids) for a in alone}) == len(alone) and any(a.stopped for a in alone)


def test_slots_are_moved_together_and_made_anew(engine, alone):
    """Between any two looks the rows under way may sit elsewhere."""
    flight = engine.flight(2, None, 0)
    rows = {i: engine.row(p, o["max_new_tokens"], 0, o["seed"], choose()) for i in (0, 1, 2, 3) for p, o in [asked(i)]}
    seats = dict(zip(flight.join([rows[0], rows[1]]), (0, 1)))
    made = {i: [] for i in rows}

    def go(n):
        for slot, tokens in flight.next(n).items():
            made[seats[slot]] += tokens

    go(3)
    seats = {new: seats[old] for old, new in flight.reseat(5).items()}
    seats |= zip(flight.join([rows[2], rows[3]]), (2, 3))
    go(4)
    flight.end([slot for slot, i in seats.items() if i in (0, 2)])
    seats = {new: seats[old] for old, new in flight.reseat(2).items()}
    assert set(seats.values()) == {1, 3}
    while len(flight.free) < 2:
        go(5)
    for i in rows:
        expected = engine.generate([rows[i].ids], max_new_tokens=asked(i)[1]["max_new_tokens"])[0].ids
        assert made[i] == expected if i in (1, 3) else made[i] == expected[: len(made[i])] and made[i]


def test_who_no_longer_waits_makes_room(engine, alone):
    heard = Heard()
    live = Live(engine, Letters(), slots=1)
    gone = [Request([7], 100, heard.teller(name)) for name in ("first", "second")]
    live.ask([*gone, request(0, heard.teller(0))])
    heard.until(lambda h: "first" in h.tokens)
    live.drop(gone)
    heard.until(lambda h: 0 in h.answers)
    live.end()
    live.thread.join()
    assert heard.answers == {0: alone[0]} and "second" not in heard.tokens and not live.under_way


@pytest.mark.parametrize("where", ["join", "next"])
def test_a_failure_is_told_and_the_next_is_answered(engine, alone, monkeypatch, where):
    heard = Heard()
    live = Live(engine, Letters(), slots=4)
    whole = getattr(flight.Flight, where)

    def fails(self, *args, **options):
        if args == ([],):
            return whole(self, *args)
        monkeypatch.setattr(flight.Flight, where, whole)
        raise RuntimeError("RESOURCE_EXHAUSTED")

    monkeypatch.setattr(flight.Flight, where, fails)
    live.ask([request(i, heard.teller(i)) for i in (0, 1)])
    heard.until(lambda h: len(h.answers) == 2)
    assert [str(heard.answers.pop(i)) for i in (0, 1)] == ["RESOURCE_EXHAUSTED"] * 2
    live.ask([request(0, heard.teller(0))])
    heard.until(lambda h: h.answers)
    live.end()
    assert heard.answers == {0: alone[0]} and isinstance(alone[0], Generated)


def test_who_waits_when_it_ends_is_told(engine):
    heard = Heard()
    live = Live(engine, Letters(), slots=1)
    live.ask([Request([7], 100, heard.teller(i)) for i in range(3)])
    heard.until(lambda h: 0 in h.tokens)
    live.end()
    heard.until(lambda h: {1, 2} <= h.answers.keys())
    assert all(str(heard.answers[i]) == "no more answers are made" for i in (1, 2))
    with pytest.raises(UserError, match="no more answers"):
        live.ask([Request([7], 1, print)])


def test_what_cannot_be_answered_is_refused_when_it_is_asked(engine):
    live = Live(engine, Letters(), slots=4)
    for bad in (Request([], 4, print), Request([1] * 128, 4, print), Request([1], 0, print), Request([1], 4, print, seed=-1)):
        with pytest.raises(UserError):
            live.ask([Request([1], 4, print), bad])
    assert not live.waiting
    live.end()
    with pytest.raises(UserError, match="slots=0"):
        Live(engine, Letters(), slots=0)
