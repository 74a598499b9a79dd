"""Large JSON read piece by piece: the elements of an array one after another, and arrays within objects.

A value is decoded as a whole only while it is small, so that memory does not grow with the file.
"""

import json
from collections.abc import Iterator
from typing import Any, TextIO

_PIECE = 1 << 20  # characters read at a time
_LARGEST = 1 << 22  # characters of a value that is decoded as a whole
_NUMBER = 32  # characters after a number that tell whether it has ended
_SPACE = " \t\r\n\ufeff"


class JsonError(ValueError):
    """Not JSON; the message says where."""


class JsonStream:
    """A JSON text that is read from its start to its end.

    Parameters
    ----------
    file
        Open text file.
    """

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._text, self._at, self._before, self._ended = "", 0, 0, False
        self._decoder = json.JSONDecoder()

    def peek(self) -> str:
        """Next character that is no blank; empty at the end."""
        while True:
            text, at = self._text, self._at
            while at < len(text) and text[at] in _SPACE:
                at += 1
            self._at = at
            if at < len(text):
                return text[at]
            if self._ended:
                return ""
            self._more()

    def small(self) -> tuple[bool, Any]:
        """Decode the next value if it is small: (whether it was, the value); else nothing is read."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
            except RecursionError as error:
                raise JsonError(f"arrays nested too deep at character {self._before + self._at}") from error
            except json.JSONDecodeError as error:
                if len(self._text) - self._at > _LARGEST:
                    return False, None
                if self._ended:
                    raise JsonError(f"{error.msg} at character {self._before + error.pos}") from error
                self._more()
                continue
            except ValueError as error:  # Python refuses whole numbers of thousands of digits
                raise JsonError(f"{error} at character {self._before + self._at}") from error
            if isinstance(value, (int, float)) and len(self._text) - end < _NUMBER and not self._ended:
                self._more()  # the number may go on
                continue
            self._at = end
            return True, value

    def value(self) -> Any:
        """Decode the next value; it must be small."""
        whole, found = self.small()
        if not whole:
            raise JsonError(f"a value of more than {_LARGEST} characters at character {self._before + self._at}")
        return found

    def elements(self) -> Iterator[None]:
        """Step through the array that comes next; the caller reads one value in each step."""
        yield from self._steps("[", "]")

    def members(self) -> Iterator[str]:
        """Step through the object that comes next; the caller reads the value of each key."""
        for _ in self._steps("{", "}"):
            key = self.value()
            if not isinstance(key, str):
                raise JsonError(f"got {key!r} for a key before character {self._before + self._at}")
            self._expect(":")
            yield key

    def skip(self) -> None:
        """Read past the next value, whatever its size."""
        whole, _ = self.small()
        if whole:
            return
        if self.peek() == "[":
            for _ in self.elements():
                self.skip()
        elif self.peek() == "{":
            for _ in self.members():
                self.skip()
        else:
            raise JsonError(f"a text of more than {_LARGEST} characters at character {self._before + self._at}")

    def _steps(self, opening: str, closing: str) -> Iterator[None]:
        self._expect(opening)
        if self.peek() != closing:
            yield
            while self.peek() == ",":
                self._at += 1
                yield
        self._expect(closing)

    def _expect(self, character: str) -> None:
        found = self.peek()
        if found != character:
            got = repr(found) if found else "the end of the file"
            raise JsonError(f"got {got}, expected {character!r} at character {self._before + self._at}")
        self._at += 1

    def _more(self) -> None:
        new = self._file.read(max(_PIECE, len(self._text) - self._at))
        self._before += self._at
        self._text, self._at = self._text[self._at :] + new, 0
        self._ended = not new
