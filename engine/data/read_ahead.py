"""The next item of an iterator, made in a thread while the one before is used."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, TypeVar

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """An iterator that is one item ahead of whoever asks.

    What an item raises is raised where it was asked for.  ``close`` waits for the thread.  An
    iterator that is forgotten does not: garbage is collected at any moment and in any thread, where
    locks may be held that a wait would need, as while another thread starts.  Its thread then ends
    by itself.

    Args:
        items: the iterator; only the thread asks it.
    """

    def __init__(self, items: Iterator[T]) -> None:
        self._items = items
        self._pool = ThreadPoolExecutor(1, "reading")
        self._coming = self._pool.submit(next, items)

    def __iter__(self) -> Iterator[T]:
        """Return the iterator."""
        return self

    def __next__(self) -> T:
        """Return the next item, and begin with the one behind it."""
        item = self._coming.result()
        self._coming = self._pool.submit(next, self._items)
        return item

    def close(self) -> None:
        """End the thread, once the item that it is making is made."""
        self._pool.shutdown(cancel_futures=True)
