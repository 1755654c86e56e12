"""Pickles are data: everything that could run code, or take all memory, is refused."""

import io
import os
import pickle

import pytest

from qsv.interop.data_pickle import UnsafePickleError, Vocabulary, read_pickle


class Runs:
    """Runs a shell command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


def refuse(*arguments):
    raise ValueError("refused")


def read(data, **names):
    return read_pickle(io.BytesIO(data), Vocabulary(names, persistent=refuse, build=refuse))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_data_is_read_as_pickle_reads_it(protocol):
    value = {
        "none": None,
        "logical": [True, False],
        "integers": [0, 1, 255, 256, 65536, -1, -(2**31), 2**31, 2**62, -(2**200)],
        "floats": [0.5, -1e300, float("inf")],
        "text": ["", "a", "é\n\\\U0001f600", "long" * 100],
        "tuples": [(), (1,), (1, 2), (1, 2, 3), (1, 2, 3, 4)],
        ("a", 1): [[[]], {}, {1: {2.5: {}}}],
    }
    value["again"] = value["text"]
    found = read(pickle.dumps(value, protocol))
    assert found == value
    assert found["again"] is found["text"]


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_bytes_are_read(protocol):
    value = [b"", b"short", b"long" * 100]
    assert read(pickle.dumps(value, protocol)) == value


def test_the_stream_ends_behind_the_pickle():
    stream = io.BytesIO(pickle.dumps("first", 2) + pickle.dumps("second", 2) + b"rest")
    vocabulary = Vocabulary({}, refuse, refuse)
    assert [read_pickle(stream, vocabulary) for _ in range(2)] == ["first", "second"]
    assert stream.read() == b"rest"


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_commands_are_not_run(tmp_path, protocol):
    touched = tmp_path / "touched"
    data = pickle.dumps({"weights": [Runs(f"touch '{touched}'")]}, protocol)
    pickle.loads(data)
    assert touched.exists(), "the pickle must be a dangerous one"
    touched.unlink()
    with pytest.raises(UnsafePickleError, match=r"asks for (posix|nt)\.system, .*save the weights alone") as caught:
        read(data)
    assert caught.value.name == f"{os.name}.system"
    assert not touched.exists()


@pytest.mark.parametrize(
    "name",
    [
        "builtins.eval",
        "builtins.getattr",
        "torch.load",
        "torch.storage._load_from_bytes",
        "__main__.Net",
        "ok.__init__",
    ],
)
def test_unknown_globals_are_named(name):
    module, _, own = name.rpartition(".")
    for opcodes in (f"c{module}\n{own}\n", f"\x8c{chr(len(module))}{module}\x8c{chr(len(own))}{own}\x93"):
        with pytest.raises(UnsafePickleError) as caught:
            read(b"\x80\x04" + opcodes.encode("latin1") + b")R.", **{"ok.make": dict})
        assert caught.value.name == name


def test_long_names_are_cut_in_the_message():
    with pytest.raises(UnsafePickleError) as caught:
        read(b"cos\n" + b"a" * 10**6 + b"\n.")
    assert len(str(caught.value)) < 500


def test_globals_are_names_until_called():
    assert read(b"cok\nmake\n.", **{"ok.make": refuse}).name == "ok.make"
    assert read(b"cok\nmake\n)R.", **{"ok.make": lambda: "made"}) == "made"
    assert read(b"cok\nmake\n)\x81.", **{"ok.make": lambda: "made"}) == "made"


@pytest.mark.parametrize(
    ("opcodes", "message"),
    [
        (b"(cok\nmake\no.", "uses the opcode OBJ"),
        (b"(iok\nmake\n.", "uses the opcode INST"),
        (b"\x82\x01.", "uses the opcode EXT1"),
        (b"cok\nmake\n)}\x92.", "uses the opcode NEWOBJ_EX"),
        (b"P1\n.", "uses the opcode PERSID"),
        (b"\x8f.", "uses the opcode EMPTY_SET"),
        (b"\x97.", "uses the opcode NEXT_BUFFER"),
        (b"cok\nname\n)R.", "calls ok.name, which is only a name"),
        (b"cok\nmake\nK\x01\x85R.", "calls ok.make with 1 arguments that don't fit"),
        (b"cok\nmake\n]R.", "list where a tuple belongs"),
        (b"X\x02\x00\x00\x00os)R.", "str where a Global belongs"),
        (b"cok\nmake\n)R)R.", "dict where a Global belongs"),
        (b"cok\nmake\n}b.", "refused"),
        (b"]}b.", "refused"),
        (b"K\x01Q.", "refused"),
        (b"K\x01K\x02\x93.", "int where a str belongs"),
        (b"}K\x01a.", "dict where a list belongs"),
        (b"]K\x01K\x02s.", "list where a dict belongs"),
        (b"cok\nmake\nK\x01K\x02s.", "Global where a dict belongs"),
        (b"}(K\x01u.", "a dict's key has no value"),
        (b"}]K\x01s.", "a dict with a list as key"),
        (b"}cok\nmake\nK\x01s.", "a dict with a Global as key"),
        (b"h\x05.", "nothing there to BINGET"),
        (b"q\x05.", "nothing there to BINPUT"),
        (b"a.", "nothing there to APPEND"),
        (b"t.", "nothing there to TUPLE"),
        (b".", "nothing there to STOP"),
        (b"K\x01(0.", "nothing there to POP"),
        (b"\xff.", "opcode b'\\\\xff' unknown"),
        (b"K\x01", "exhausted before seeing STOP"),
        (b"", "exhausted before seeing STOP"),
        (b"X\xff\xff\xff\xffab.", "expected 4294967295 bytes"),
        (b"\x8d\xff\xff\xff\xff\xff\xff\xff\x7fab.", "expected 9223372036854775807 bytes"),
        (b"\x8a\xff" + b"\x01" * 255 + b".", "an integer of 2033 bits"),
    ],
)
def test_what_data_does_not_need_is_refused(opcodes, message):
    with pytest.raises(ValueError, match=message):
        read(opcodes, **{"ok.make": dict.copy, "ok.name": None} | {"ok.make": lambda: {}})


def test_a_memo_with_huge_numbers_takes_no_memory():
    data = b"](" + b"".join(b"K\x01r" + (2**32 - 1 - i).to_bytes(4, "little") for i in range(100)) + b"e."
    assert read(data) == [1] * 100


def test_keys_that_take_forever_to_hash_are_refused():
    # Each tuple holds the one before twice: 2**60 values.
    doubled = b")" + b"q\x00h\x00\x86" * 60
    with pytest.raises(ValueError, match="a dict with a tuple as key"):
        read(b"}" + doubled + b"K\x01s.")
    with pytest.raises(ValueError, match="a dict with a tuple as key"):
        read(b"}" + b")" + b"\x85" * 100_000 + b"K\x01s.")


def test_integers_chosen_to_collide_are_refused_as_keys():
    colliding = 16 * (2**61 - 1)
    assert hash(colliding) == 0
    with pytest.raises(ValueError, match="a dict with a int as key"):
        read(pickle.dumps({colliding: 1}, 2))


def test_too_many_opcodes_are_refused(monkeypatch):
    monkeypatch.setattr("qsv.interop.data_pickle._MAX_OPCODES", 100)
    assert read(b"N0" * 49 + b"N.") is None
    with pytest.raises(ValueError, match="larger than 100 opcodes"):
        read(b"N0" * 50 + b"N.")


def test_too_many_bytes_are_refused(monkeypatch):
    monkeypatch.setattr("qsv.interop.data_pickle._MAX_BYTES", 1000)
    with pytest.raises(ValueError, match="or 1,000 bytes"):
        read(pickle.dumps(["a" * 900, "b" * 100], 2))
