"""Tables are read strictly: right values from every form, and every damage named with its line."""

import bz2
import gzip

import numpy as np
import pytest

from bigmodel_jax.data import tables
from bigmodel_jax.errors import InputError

ROWS = {"text": ['a, "quoted" one', "two\nlines"], "label": ["1", "0"]}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_every_form_gives_the_same_columns(tmp_path):
    as_csv = '\ufefftext,label\r\n"a, ""quoted"" one",1\r\n"two\nlines",0\r\n'
    as_json = '{"text": "a, \\"quoted\\" one", "label": "1"}\n\n{"text": "two\\nlines", "label": "0"}\n'
    found = [
        tables.read(write(tmp_path / "a.csv", as_csv)),
        tables.read(write(tmp_path / "a.csv.gz", gzip.compress(as_csv.encode()))),
        tables.read(write(tmp_path / "a.jsonl.bz2", bz2.compress(as_json.encode()))),
    ]
    assert all(table.columns == ROWS for table in found)
    assert found[0].lines == [2, 3] and found[2].lines == [1, 3]  # an embedded newline does not shift them
    tsv = tables.read(write(tmp_path / "b.tsv", 'text\tlabel\n"he said\tx\n'))  # a quote is a character in TSV
    assert tsv.columns == {"text": ['"he said'], "label": ["x"]}
    quoted = tables.read(write(tmp_path / "q.tsv", 'text\tlabel\n"a\tb"\tx\n'), quotes="yes")
    assert quoted.columns["text"] == ["a\tb"]
    good, bad = write(tmp_path / "g.txt", "one\n\ntwo\n"), write(tmp_path / "b.txt", "three")
    lines = tables.read([("good", good), ("bad", bad)])
    assert lines.columns == {"text": ["one", "two", "three"], "label": ["good", "good", "bad"]}
    assert lines.where(1) == "g.txt line 3" and lines.take([2, 0]).columns["label"] == ["bad", "good"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "text,label\nx,1\ny\n", "line 3: 1 fields, the header has 2"),
        ("a.csv", 'text,label\nx,1\n"open,1\n', "line 3: unexpected end of data"),
        ("a.csv", 'text,label\n"x"y,1\n', "line 2: ',' expected after '\"'"),
        ("a.csv", "text,text\n", "line 1: column 'text' is there twice"),
        ("a.csv", "text,label\n", "has no rows"),
        ("a.csv", "", "is empty"),
        ("a.csv", b"text,label\nok,1\nna\xefve,1\n", "line 3: byte 0xef is not UTF-8"),
        ("a.csv.gz", b"not gzip", "not a whole .gz file"),
        ("a.csv.gz", gzip.compress(b"text\n" + bytes(range(32, 127)) * 50)[:-9], "not a whole .gz file"),
        ("a.jsonl", '{"text": "x"}\n{"text": \n', "line 2: not JSON .Expecting value"),
        ("a.jsonl", "[1]\n", "line 1: should be an object, not list"),
        ("a.parquet", "PAR1", "cannot tell the format from '.parquet'"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path, name, content, message):
    with pytest.raises(InputError, match=message):
        tables.read(write(tmp_path / name, content))


def test_columns_labels_and_missing_files(tmp_path):
    path = write(tmp_path / "data.jsonl", '{"text": "x", "label": 10}\n{"text": "", "label": 9}\n{"label": 2}\n')
    table = tables.read(path)
    with pytest.raises(InputError, match="no column 'texts'; did you mean 'text'"):
        table.column("texts")
    with pytest.raises(InputError, match="data.jsonl line 3: no value for 'text'"):
        table.texts("text")
    with pytest.raises(InputError, match="data.jsonl line 2: 'text' is empty"):
        table.take([0, 1]).texts("text")
    with pytest.raises(InputError, match="should be text, not int"):
        table.texts("label")
    names = tables.vocabulary(table.column("label"))
    assert names == ["2", "9", "10"] and tables.vocabulary(["b", "a", "10"]) == ["10", "a", "b"]
    np.testing.assert_array_equal(tables.label_ids(table, "label", names), [2, 1, 0])
    with pytest.raises(InputError, match="data.jsonl line 2: label '9' is not one of"):
        tables.label_ids(table, "label", ["10", "2"])
    with pytest.raises(InputError, match="no data file.*did you mean 'data.jsonl'"):
        tables.read(str(tmp_path / "date.jsonl"))
    with pytest.raises(InputError, match="package:NAME==VERSION:MEMBER:SHA256"):
        tables.read("package:a==1")
