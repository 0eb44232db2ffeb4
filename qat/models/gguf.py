"""GGUF files as transformers reads them, without reading them again and again.

transformers opens a file anew for the config, the weights, the tokenizer's class and the tokenizer, and every time the
`gguf` package parses the header into a few hundred thousand arrays: a vocabulary is a field for each token.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import gguf
import numpy as np


class Reader(gguf.GGUFReader):
    """`gguf`'s reader on a plain array: numpy runs Python code at every slice of a `memmap`."""

    @property
    def data(self) -> Any:
        """The bytes of the file, mapped."""
        return self._data

    @data.setter
    def data(self, value: Any) -> None:
        self._data = value.view(np.ndarray)


@contextmanager
def parsed_once() -> Iterator[None]:
    """While open, a file is parsed once, however often it is opened, and an architecture's names are listed once.

    Nobody writes to either. transformers imports both names from `gguf` when it uses them.
    """
    names = functools.cache(gguf.get_tensor_name_map)
    with mock.patch.multiple(gguf, GGUFReader=functools.cache(Reader), get_tensor_name_map=names):
        yield
