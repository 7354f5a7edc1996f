"""Triton's interpreter without what takes it half its time.

For every call of one jit function in another it replaces the builtins of ``triton.language`` anew,
though a kernel that runs has replaced them already.  Here that is done once a kernel.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from triton import language
from triton.runtime import interpreter


@contextmanager
def builtins_replaced_once() -> Iterator[None]:
    """Run kernels under the interpreter so within the block."""
    replace, run = interpreter._patch_lang, interpreter.GridExecutor.__call__
    replaced: set[str] = set()

    def replace_once(function: Any) -> Any:
        names = {
            value.__name__
            for value in function.__globals__.values()
            if value is language or value is language.core
        }
        if names <= replaced:
            return interpreter._LangPatchScope()  # with nothing to put back
        replaced.update(names)
        return replace(function)

    def run_kernel(executor: Any, *arguments: Any, **options: Any) -> None:
        replaced.clear()  # the kernel before has put them back
        run(executor, *arguments, **options)

    with (
        mock.patch.object(interpreter, "_patch_lang", replace_once),
        mock.patch.object(interpreter.GridExecutor, "__call__", run_kernel),
    ):
        yield
