"""Whatever the file, a row comes with the line it starts on, and a bad row does not take the others with it."""

import gzip
import json
import time
import tracemalloc

import pytest

from sftjax.config import UserError
from sftjax.data.example import RowError
from sftjax.data.readers import read, read_hub, resolve

A, B, C = {"text": "a"}, {"text": "b"}, {"text": "c"}
JA, JB, JC = (json.dumps(row) for row in (A, B, C))


@pytest.fixture
def file(tmp_path):
    def write(name, data):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return str(path)

    return write


def rows(path, **options):
    return list(read(path, **options))


def good(path, **options):
    return [(line, row) for line, row in rows(path, **options) if not isinstance(row, RowError)]


def bad(path, **options):
    return [(line, str(row)) for line, row in rows(path, **options) if isinstance(row, RowError)]


@pytest.mark.parametrize(
    ("name", "data", "lines"),
    [
        ("a.jsonl", f"{JA}\n\n{JB}\r\n{JC}", (1, 3, 4)),
        ("array.jsonl", f"[{JA},\n{JB}, {JC}]", (1, 2, 2)),
        ("indented.jsonl", "\n".join(json.dumps(row, indent=1) for row in (A, B, C)), (1, 4, 7)),
        ("a.json", json.dumps([A, B, C], indent=1), (2, 5, 8)),
        ("flat.json", json.dumps([A, B, C]) + "\n", (1, 2, 3)),
        ("flat_wrapped.json", json.dumps({"n": 3, "data": [A, B, C]}), (1, 2, 3)),
        ("lines.json", f"{JA}\n{JB}\n{JC}\n", (1, 2, 3)),
        ("wrapped.json", json.dumps({"version": [1], "data": [A, B, C], "n": 3}, indent=1), (6, 9, 12)),
        ("a.csv", "text\na\n\nb\n c".replace(" ", ""), (2, 4, 5)),
        ("a.tsv", "text\na\nb\nc\n", (2, 3, 4)),
        ("lines.txt", "a\nb\nc\n\n", (1, 2, 3)),
        ("blocks.txt", "\na\n\nb\n \n\nc", (2, 4, 7)),
    ],
)
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
@pytest.mark.parametrize("zipped", [False, True])
def test_every_kind_of_file_gives_the_same_rows_with_their_lines(file, name, data, lines, mark, zipped):
    data = mark + data.encode()
    path = file(name + ".gz", gzip.compress(data)) if zipped else file(name, data)
    assert rows(path) == list(zip(lines, (A, B, C)))


def test_parquet_drops_what_arrow_filled_in(tmp_path):
    pa = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": "g", "arguments": {"y": "2"}}]
    parquet.write_table(pa.Table.from_pylist([{"calls": [call], "note": None} for call in calls]), tmp_path / "a.parquet")
    assert rows(str(tmp_path / "a.parquet")) == [(i, {"calls": [call], "note": None}) for i, call in enumerate(calls, 1)]


def test_hub_rows_are_numbered_and_absence_is_explained(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(f"{JA}\n{JB}\n")
    assert list(read_hub(str(tmp_path / "data"))) == [(1, A), (2, B)]
    with pytest.raises(UserError, match="no-one/nothing:main: no such file here, and not to be had from the hub"):
        list(read("no-one/nothing:main"))


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{bad}", "is not JSON: expecting property name enclosed in double quotes at column 2"),
        ('{"text": "a', "is not JSON: unterminated string at column 10"),
        (JA + " x", "is not JSON: something follows the first value, at column 15"),
        ('{"text": "a", "text": "b"}', "text: appears twice in one object"),
        ('{"text": "a", "in": [{"k": 1, "k": 2}]}', "k: appears twice in one object"),
        ('{"text": NaN}', "holds NaN, which is not JSON; write null or a number"),
        ('{"text": -Infinity}', "holds -Infinity, which is not JSON; write null or a number"),
        ('{"text": "\\ud83d"}', "holds half of a surrogate pair (\\ud800-\\udfff), which is no character"),
        ("[" * 100_000 + "]" * 100_000, "is not JSON: nested too deeply at column 1"),
        (
            b'{"text": "\xe4"}',
            "is not UTF-8: byte 0xe4 at offset 24 of the file; convert it: iconv -f ITS_ENCODING -t UTF-8 (latin1, cp1252, "
            "GB18030, ...)",
        ),
    ],
)
def test_a_bad_line_is_told_and_the_next_is_read(file, line, reason):
    path = file("a.jsonl", f"{JA}\n".encode() + (line if isinstance(line, bytes) else line.encode()) + f"\n{JC}".encode())
    assert [at for at, _ in good(path)] == [1, 3]
    assert bad(path) == [(2, reason)]


def test_a_pair_of_surrogates_is_a_character(file):
    assert rows(file("a.jsonl", '{"text": "\\ud83d\\ude00"}')) == [(1, {"text": "\U0001f600"})]


def test_bad_elements_of_an_array_are_told_and_the_others_are_read(file):
    raw = '[{"text": "a"},\n{"text": 1, "text": 2},\n{"text": "\u4f60'.encode() + b'\xff"},\n{"text": "c"}]'
    path = file("a.json", raw)
    assert good(path) == [(1, A), (4, C)]
    assert [(line, reason.split(";")[0]) for line, reason in bad(path)] == [
        (2, "text: appears twice in one object"),
        (3, f"is not UTF-8: byte 0xff at offset {raw.index(255)} of the file"),
    ]


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("cut.json", f'[{JA},\n{{"te', "cut.json:2: is not JSON: unterminated string"),
        ("flat.json", f'[{JA}, {JB}, {{"te', "flat.json:3: is not JSON: unterminated string"),
        ("comma.json", f"[{JA}\n{JB}]", "comma.json:2: is not JSON: a comma or ] is missing"),
        ("twice.json", f"[{JA}]\n[{JB}]", "twice.json:2: is not JSON: something follows the array"),
        ("quote.csv", 'text,n\n"a\n,1\nb,2\n', "quote.csv:2: a quote opened in this row is never closed"),
        ("twice.csv", "a,b,a\n1,2,3\n", "names a column twice: 'a'"),
        ("wide.csv", "text\na\n".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("wide.json", f"[{JA}]".encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        ("cut.jsonl.gz", gzip.compress(JA.encode() * 99, mtime=0)[:-20], "cut.jsonl.gz: cannot be read: Compressed file ended"),
        ("no.parquet", b"none", "is not a Parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_to_its_end_is_refused(file, name, data, message):
    path = file(name, data)
    with pytest.raises(UserError) as e:
        rows(path)
    assert message in str(e.value) and name in str(e.value)


@pytest.mark.parametrize("data", ["", " \n\n", "\ufeff"])
@pytest.mark.parametrize("kind", ["json", "jsonl", "csv", "tsv", "txt"])
def test_an_empty_file_is_told(file, kind, data):
    assert bad(file(f"a.{kind}", data)) == [(1, "the file is empty")]


@pytest.mark.parametrize(
    ("name", "data", "has"),
    [
        ("head.csv", "text,label\n", "a header line and no rows"),
        ("a.json", "[]", "no rows"),
        ("b.json", '{"data": []}', "no rows"),
    ],
)
def test_a_file_without_rows_is_told(file, name, data, has):
    assert bad(file(name, data)) == [(1, f"the file has {has}")]


def test_csv_records_know_the_line_they_start_on(file):
    path = file("a.csv", 'text,n\n"a\nb, ""c""",1\nd,2,3\n"e" f,4\ng\n\n"h\ni",5\n')
    assert good(path) == [(2, {"text": 'a\nb, "c"', "n": "1"}), (8, {"text": "h\ni", "n": "5"})]
    assert [line for line, _ in bad(path)] == [4, 5, 6]


def test_csv_field_that_is_not_utf8_takes_its_record_only(file):
    assert [line for line, _ in bad(file("a.csv", b'text\n"a\n\xff"\nb\n'))] == [2]
    assert good(file("a.csv", b'text\n"a\n\xff"\nb\n')) == [(4, {"text": "b"})]


def test_csv_with_semicolons(file):
    assert rows(file("a.csv", "text;n\na,b;1\n")) == [(2, {"text": "a,b", "n": "1"})]


def test_a_quote_in_tsv_is_a_character_unless_it_wraps_a_field(file):
    data = 'text\tn\n"half a quote\t1\n2\t"open\n"whole ""one"""\t3\n"two\nlines"\t4\nonly one\n'
    path = file("a.tsv", data)
    assert good(path) == [
        (2, {"text": '"half a quote', "n": "1"}),
        (3, {"text": "2", "n": '"open'}),
        (4, {"text": 'whole "one"', "n": "3"}),
        (5, {"text": "two\nlines", "n": "4"}),
    ]
    assert [line for line, _ in bad(path)] == [7]


def test_columns_by_number_read_a_file_without_a_header(file):
    path = file("a.tsv", "good film\t1\nbad film\t0\n")
    assert good(path, numbers=("0", "1")) == [(1, {"0": "good film", "1": "1"}), (2, {"0": "bad film", "1": "0"})]
    assert good(file("b.csv", "0,1\nfilm,1\n"), numbers=("0", "1")) == [(2, {"0": "film", "1": "1"})]


@pytest.mark.parametrize(
    ("name", "head", "tail"), [("a.jsonl", '{"text": "', '"}\n' + JB), ("a.csv", "text\n", "\nb\n"), ("a.txt", "", "\nb")]
)
def test_a_line_of_20_mb_is_a_row_like_any_other(file, name, head, tail):
    path = file(name, head + "x" * 20_000_000 + tail)
    start = time.perf_counter()
    (_, long), (_, short) = rows(path)
    assert (len(long["text"]), short["text"]) == (20_000_000, "b")
    assert time.perf_counter() - start < 10  # seconds where it is linear, hours where it is not


@pytest.mark.parametrize(("join", "most"), [("\n", 0.1), (",\n", 1.1)], ids=["lines stream", "a document is held once, as text"])
def test_what_reading_a_json_file_holds(file, join, most):
    rows = join.join([JA, json.dumps({"text": "x" * 10_000})] * 400)
    path = file("a.json", rows if join == "\n" else f"[{rows}]")
    tracemalloc.start()
    held = 0
    for _ in read(path):
        held = max(held, tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert held < most * len(rows)


def test_a_directory_is_read_sorted_and_in_depth(file, tmp_path):
    for name in ("d/b.jsonl", "d/a/z.json", "d/.cache/x.jsonl", "d/README.md", "d/c.csv.gz"):
        file(name, "")
    found = [path.removeprefix(f"{tmp_path}/d/") for path in resolve(str(tmp_path / "d"))]
    assert found == ["a/z.json", "b.jsonl", "c.csv.gz"]
    assert resolve(str(tmp_path / "d" / "**" / "*.json*")) == resolve(str(tmp_path / "d"))[:2]


@pytest.mark.parametrize(
    ("splits", "told"),
    [(("",), "d: holds a dataset saved with"), (("train", "test"), r"d: holds datasets \(test, train\) saved")],
)
def test_a_dataset_saved_to_disk_is_refused_by_the_names_of_its_splits(file, tmp_path, splits, told):
    file("d/dataset_dict.json", json.dumps({"splits": splits}))
    for split in splits:
        file(f"d/{split}/dataset_info.json", "{}")
        file(f"d/{split}/data-00000-of-00001.arrow", "")
    with pytest.raises(UserError, match=told):
        resolve(str(tmp_path / "d"))


def test_a_remote_file_is_read_like_a_local_one():
    import fsspec

    fsspec.filesystem("memory").pipe({"/bucket/a.jsonl": JA.encode(), "/bucket/b.txt.gz": gzip.compress(b"b")})
    found = resolve("memory://bucket")
    assert found == ["memory://bucket/a.jsonl", "memory://bucket/b.txt.gz"]
    assert [rows(path) for path in found] == [[(1, A)], [(1, B)]]
    with pytest.raises(UserError, match="no data files there"):
        resolve("memory://nothing")


def test_what_is_not_there_is_named_with_what_is_near(file, tmp_path):
    file("train.jsonl", JA)
    file("notes.pdf", "")
    for spec, message in (
        ("trian.jsonl", "no such file; did you mean .*train.jsonl"),
        ("*.csv", "no data files there"),
        ("notes.pdf", "not a kind of file that is read"),
    ):
        with pytest.raises(UserError, match=message):
            resolve(str(tmp_path / spec))
    assert resolve("owner/name") == ["owner/name"]
