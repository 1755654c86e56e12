"""Pickles read as data: nothing that a pickle names is ever imported or called."""

import dataclasses
import pickletools
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

# Of a whole checkpoint with optimizer state, 1 MB and 200,000 opcodes are typical.
_MAX_BYTES = 64 * 2**20
_MAX_OPCODES = 4_000_000
_MAX_INTEGER_BITS = 1024

_LITERALS = frozenset(
    (
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "SHORT_BINBYTES", "BINBYTES", "BINBYTES8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    )
)
_CONSTANTS: dict[str, Any] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
_TUPLE_SIZES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class UnsafePickleError(ValueError):
    """A pickle that asks for a function or class that could run code.

    Attributes:
        name: what it asks for, such as `posix.system`.
    """

    def __init__(self, message: str, name: str) -> None:
        self.name = name
        super().__init__(message)


@dataclasses.dataclass(frozen=True)
class Global:
    """A function or class that a pickle names; only the name is kept.

    Attributes:
        name: `module.name`.
    """

    name: str


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """What a pickle may say, and what becomes of it.

    Attributes:
        globals: `module.name` -> the function that makes data of the arguments of its call, None where it may only
            be mentioned. The functions get whatever the pickle holds, and raise ValueError or TypeError.
        persistent: a persistent id -> data; raises ValueError.
        build: (object, state), where a pickle sets an object's attributes; raises ValueError.
    """

    globals: Mapping[str, Callable[..., Any] | None]
    persistent: Callable[[Any], Any]
    build: Callable[[Any, Any], None]


def read_pickle(stream: BinaryIO, vocabulary: Vocabulary) -> Any:
    """The value of the pickle that begins at the stream's position, which moves to the pickle's end.

    The opcodes are decoded by `pickletools` and interpreted here, on lists, dicts, tuples and scalars. What calls a
    function takes it from the vocabulary, and dict keys are scalars or tuples of scalars; so neither code nor a
    method of any class can be reached. Size, number of opcodes and integers are bounded.

    Args:
        stream: seekable, and in memory: a length that the pickle claims is read at once.
        vocabulary: the globals it may name, and their meaning.

    Raises:
        UnsafePickleError: it names a global that isn't in the vocabulary.
        ValueError: it is damaged, too large, or does something that data doesn't need.
    """
    machine = _Machine(vocabulary)
    start = stream.tell()
    for count, (opcode, argument, position) in enumerate(pickletools.genops(stream)):
        if count >= _MAX_OPCODES or (position or 0) - start > _MAX_BYTES:
            raise ValueError(f"its pickle is larger than {_MAX_OPCODES:,} opcodes or {_MAX_BYTES:,} bytes")
        if isinstance(argument, int) and argument.bit_length() > _MAX_INTEGER_BITS:
            raise ValueError(f"its pickle holds an integer of {argument.bit_length()} bits")
        try:
            if opcode.name == "STOP":
                return machine.pop()
            machine.step(opcode.name, argument)
        except (IndexError, KeyError) as error:
            raise ValueError(f"its pickle is damaged: nothing there to {opcode.name} at byte {position}") from error
    raise ValueError("its pickle has no end")


class _Machine:
    """The stack and the memo of a pickle that is being read."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self.vocabulary = vocabulary
        self.stack: list[Any] = []
        self.below_marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below_marks.pop()
        return items

    def step(self, opcode: str, argument: Any) -> None:
        """Carry out one opcode; IndexError or KeyError where stack or memo lacks what it needs."""
        if opcode in _LITERALS:
            self.push(argument)
        elif opcode in _CONSTANTS:
            self.push(_CONSTANTS[opcode])
        elif opcode in _TUPLE_SIZES:
            items = [self.pop() for _ in range(_TUPLE_SIZES[opcode])]
            self.push(tuple(reversed(items)))
        elif not self._keep(opcode, argument) and not self._fill(opcode) and not self._call(opcode, argument):
            raise ValueError(f"its pickle uses the opcode {opcode}, which checkpoints don't need")

    def _keep(self, opcode: str, argument: Any) -> bool:
        """Opcodes of framing, marks and the memo; false for others."""
        match opcode:
            case "PROTO" | "FRAME":
                pass
            case "MARK":
                self.below_marks.append(self.stack)
                self.stack = []
            case "POP":
                self.pop()
            case "POP_MARK":
                self.pop_to_mark()
            case "DUP":
                self.push(self.stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = self.stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = self.stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                self.push(self.memo[argument])
            case _:
                return False
        return True

    def _fill(self, opcode: str) -> bool:
        """Opcodes that make and fill containers; false for others."""
        match opcode:
            case "EMPTY_LIST":
                self.push([])
            case "EMPTY_DICT":
                self.push({})
            case "LIST":
                self.push(self.pop_to_mark())
            case "TUPLE":
                self.push(tuple(self.pop_to_mark()))
            case "DICT":
                self.push(_filled({}, self.pop_to_mark()))
            case "APPEND":
                item = self.pop()
                _exact(self.stack[-1], list).append(item)
            case "APPENDS":
                items = self.pop_to_mark()
                _exact(self.stack[-1], list).extend(items)
            case "SETITEM":
                item, key = self.pop(), self.pop()
                _filled(_exact(self.stack[-1], dict), [key, item])
            case "SETITEMS":
                items = self.pop_to_mark()
                _filled(_exact(self.stack[-1], dict), items)
            case _:
                return False
        return True

    def _call(self, opcode: str, argument: Any) -> bool:
        """Opcodes that name globals and make objects of them; false for others."""
        match opcode:
            case "GLOBAL":
                module, _, name = argument.partition(" ")
                self.push(self._known(f"{module}.{name}"))
            case "STACK_GLOBAL":
                name, module = self.pop(), self.pop()
                self.push(self._known(f"{_exact(module, str)}.{_exact(name, str)}"))
            case "REDUCE" | "NEWOBJ":
                arguments, callee = self.pop(), self.pop()
                self.push(self._made(_exact(callee, Global).name, _exact(arguments, tuple)))
            case "BUILD":
                state = self.pop()
                self.vocabulary.build(self.stack[-1], state)
            case "BINPERSID":
                self.push(self.vocabulary.persistent(self.pop()))
            case _:
                return False
        return True

    def _known(self, name: str) -> Global:
        if name not in self.vocabulary.globals:
            shown = name if len(name) < 200 else f"{name[:200]}..."
            raise UnsafePickleError(
                f"its pickle asks for {shown}, which isn't data and could run code, so it isn't read; save the "
                f"weights alone, as torch.save(model.state_dict(), ...) does",
                name,
            )
        return Global(name)

    def _made(self, name: str, arguments: tuple[Any, ...]) -> Any:
        make = self.vocabulary.globals[name]
        if make is None:
            raise ValueError(f"its pickle calls {name}, which is only a name here")
        try:
            return make(*arguments)
        except TypeError as error:
            raise ValueError(f"its pickle calls {name} with {len(arguments)} arguments that don't fit") from error


def _exact(value: Any, kind: type) -> Any:
    """The value; raises ValueError unless it is of this very type, not of one derived from it."""
    if type(value) is not kind:
        raise ValueError(f"its pickle is damaged: {type(value).__name__} where a {kind.__name__} belongs")
    return value


def _filled(target: dict[Any, Any], items: list[Any]) -> dict[Any, Any]:
    """The dict with keys and values added that follow each other in the list."""
    if len(items) % 2:
        raise ValueError("its pickle is damaged: a dict's key has no value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if not (_is_scalar(key) or (type(key) is tuple and all(map(_is_scalar, key)))):
            raise ValueError(f"its pickle has a dict with a {type(key).__name__} as key")
        target[key] = value
    return target


def _is_scalar(key: Any) -> bool:
    # Larger integers can be chosen so that all of them have the same hash.
    return key is None or type(key) in (str, bytes, bool, float) or (type(key) is int and key.bit_length() <= 64)
