"""What an evaluation reads: chats, and files that are damaged."""

import json

import pytest

from helpers.tiny_folder import save
from pop_mm.evaluation.texts import TextError, pieces, read_dataset, read_files, windows

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'tool' %}{{ raise_exception('no tools') }}{% endif %}"
    "{{ 'w3' if m['role'] == 'user' else 'w4' }} {{ m['content'] }} {% endfor %}"
)


def turns(*contents):
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


@pytest.fixture
def write(tmp_path):
    def write(text, name="a.jsonl"):
        (tmp_path / name).write_text(text if isinstance(text, str) else "".join(json.dumps(r) + "\n" for r in text))
        return str(tmp_path / name)

    return write


@pytest.fixture
def tokenizer(tmp_path):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(save(tmp_path / "model", template=TEMPLATE))


PARTS = [{"type": "text", "text": "w5"}, {"type": "text", "text": "w6"}]
CHATS = [turns("w5 w6", "w7"), None, [], turns(PARTS, "w9"), [{**turns("w8")[0], "tool_calls": None}]]


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet"])
def test_chats_are_written_with_the_template(write, tokenizer, tmp_path, kind):
    if kind == "parquet":
        pytest.importorskip("datasets")
        import pyarrow
        import pyarrow.parquet

        chats = [
            row and [{"content": str(m["content"]), "role": m["role"]} for m in row] for row in CHATS if row != CHATS[3]
        ]
        chats.insert(3, turns("w5 w6", "w9"))
        pyarrow.parquet.write_table(pyarrow.table({"messages": chats}), tmp_path / "a.parquet")
        file = str(tmp_path / "a.parquet")
    else:
        rows = [{"id": i, "messages": row} for i, row in enumerate(CHATS)]
        file = write(json.dumps(rows, indent=1), "a.json") if kind == "json" else write(rows)
    found = read_dataset(file, "test", "messages")
    (name, chats) = found.popitem()
    assert name == f"{file}:test"
    expected = "w3 w5 w6 w4 w7 w3 w5 w6 w4 w9 w3 w8"
    assert chats.render(tokenizer).split() == expected.split()
    (window,) = windows({name: chats}, tokenizer, 10)
    assert tokenizer.decode(window.ids).split() == expected.split()[:10]
    assert sum(len(piece.ids) for piece in pieces({name: chats}, tokenizer, 5)) >= 10


def test_a_start_token_is_not_written_twice(write, tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokenizer.bos_token = "<s>"
    tokenizer.chat_template = "{{ bos_token }}" + TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    found = read_dataset(write([{"messages": turns("w5 w6 w7")}]), "test", "messages")
    (window,) = windows(found, tokenizer, 5)
    assert tokenizer.decode(window.ids).split() == ["<s>", "w3", "w5", "w6", "w7"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            [{"from": "human", "value": "w5"}],
            "Row 2 of the column 'messages' .* no chat: .* role and content; found from, value",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "Row 2 .* has a part of type 'image'"),
        ([{"role": "user", "content": 3}], "Row 2 .* has a part of type 'int'"),
        ([{"role": "user", "content": "w5"}, "w6"], "Row 2 .* no chat: .* found str"),
        ([{"role": "tool", "content": "w5"}], "Row 2 .* does not fit the tokenizer's chat template: no tools"),
    ],
)
def test_a_chat_that_cannot_be_written(write, tokenizer, row, message):
    found = read_dataset(write([{"messages": turns("w5")}, {"messages": row}]), "test", "messages")
    with pytest.raises(TextError, match=message):
        windows(found, tokenizer, 3)


def test_chats_need_a_template(write, tmp_path, call, monkeypatch):
    file = write([{"messages": turns("w5 w6 w7 w8 w9", "w10 w11 w12")}])
    asked = ("eval", "--dataset", file, "--column", "messages", "--prompt", 4, "--continuation", 2, "--generate", 0)
    asked = (*asked, "--scope", "ffn", "--ratio", 0.4, "--method", "pop")
    code, _, err = call(*asked, "--model", save(tmp_path / "plain"))
    assert code == 2
    assert "holds chats, and the model's tokenizer has no chat template" in err and err.count("\n") == 1
    code, out, err = call(*asked, "--model", save(tmp_path / "chat", template=TEMPLATE))
    assert (code, err) == (0, "")
    assert "pop" in out


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"text": "a"}\n{"text": "b"}\n{"text": "c',
            r"'.*a.jsonl' is damaged in line 3, column 10: unterminated string; as .* last line, the file may be cut off\.$",
        ),
        ('{"text": "a"}\n\n{"text": "b"', "damaged in line 3, column 13: expecting ',' delimiter; .* may be cut off"),
        ('{"text": "a"}\n{"text": \n{"text": "b"}\n', r"damaged in line 2, column \d+: expecting value\.$"),
        ('{"text": "a"}\n{"text": "b", "text": "c"}\n', "damaged in line 2: the key 'text' is given more than once"),
        ('{"text": "a"}\n"b"\n', "holds a str in line 2; every line must be an object"),
        ('{"text": "a"}\nplain text\n', "damaged in line 2, column 1: expecting value"),
        ("", "is empty"),
        (" \n", "is empty"),
        ('{"text": 3}\n{"text": null}\n', "holds no text but int; its columns are text"),
        ('{"text": ["a"]}\n', "holds no text but list"),
        ('{"body": "a"}\n', "no column 'text'; it has body. Choose with --column"),
    ],
)
def test_what_is_wrong_with_json_lines(write, text, message):
    with pytest.raises(TextError, match=message):
        read_dataset(write(text), "test", "text")


def test_json_of_every_shape(write):
    for text in (
        '[{"text": "a"}, {"text": "b"}]',
        '[\n{"text": "a"},\n{"text": "b"}\n]',
        '{"text": "a"}\n{"text": "b"}\n',
    ):
        (found,) = read_dataset(write(text, "a.json"), "test", "text").values()
        assert found == "a\n\nb"
    (found,) = read_dataset(write('{\n"text": "a"\n}', "a.json"), "test", "text").values()
    assert found == "a"
    with pytest.raises(TextError, match="damaged in line 3, column 1"):
        read_dataset(write('[\n{"text": "a"},\n', "a.json"), "test", "text")
    (found,) = read_dataset(write('\ufeff{"text": "a\u2028b"}\r\n{"other": 1}\n{"text": "c"}'), "test", "text").values()
    assert found == "a\u2028b\n\nc"


def test_files_that_cannot_be_read(tmp_path, write):
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    for name, message in (("latin.jsonl", "no UTF-8"), ("none.jsonl", "no such file"), ("none.csv", "no such file")):
        with pytest.raises(TextError, match=message):
            read_dataset(str(tmp_path / name), "test", "text")
    with pytest.raises(TextError, match=r"unknown kind: give \.jsonl"):
        read_dataset(write("x", "a.xyz"), "test", "text")
    for name in ("", " ", "~nobodyhere/a.jsonl", "x" * 300, "a\0b"):
        with pytest.raises(TextError, match=r"empty|neither a file nor|cannot be loaded"):
            read_dataset(name, "test", "text")
    for name in ("~nobodyhere/a.txt", "a\0b", "x" * 300):
        with pytest.raises(TextError, match=r"The text .* cannot be read: [^:]*\.$"):
            read_files([name])
    pytest.importorskip("datasets")
    with pytest.raises(TextError, match=r"cannot be loaded: .*EOF inside string"):
        read_dataset(write('text,n\n"a', "a.csv"), "test", "text")
    (found,) = read_dataset(write("text,n\na,1\nb,2\n", "b.csv"), "test", "text").values()
    assert found == "a\n\nb"
