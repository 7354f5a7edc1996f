"""Count what torch.compile compiles."""

from typing import Any

from torch._dynamo.backends.registry import lookup_backend
from torch._guards import CompileContext


class Compilations:
    """The backend ``aot_eager``, which counts the graphs that it compiles, each once.

    Where torch 2.11 starts a graph over, to turn Python numbers into tensors, it calls the backend
    again: torch's own counter counts that, too.
    """

    def __init__(self) -> None:
        self._graphs: set[tuple[Any, ...]] = set()

    def __len__(self) -> int:
        return len(self._graphs)

    def __call__(self, module: Any, inputs: Any) -> Any:
        compiled = CompileContext.current_compile_id()
        assert compiled is not None
        self._graphs.add((compiled.frame_id, compiled.frame_compile_id))
        return lookup_backend("aot_eager")(module, inputs)
