"""Register first derivatives in reverse mode, and refuse derivatives that torch would drop.

torch silently drops derivatives that an operator does not register: the tangents of forward mode,
and the second derivatives of a formula that runs without a graph.  Here either is an error that
names the function.  First derivatives also work within ``torch.func.grad``, ``vjp`` and the like,
and operators within ``torch.func.vmap``, one call for each entry; only a derivative within it is
refused.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._functorch.utils import enable_single_level_autograd_function
from torch.autograd import forward_ad

from .validation import check_data

_library = torch.library.Library("superbert", "FRAGMENT")

Backward = Callable[..., tuple[Tensor | None, ...]]


def in_forward_mode() -> bool:
    """Whether tensors may have tangents, of `torch.autograd.forward_ad` or `torch.func.jvp`."""
    return forward_ad._current_level >= 0


class _Undifferentiable(torch.autograd.Function):
    """Identity on the first ``count`` tensors; raises when they are differentiated in any way."""

    generate_vmap_rule = True

    @staticmethod
    def forward(_message: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(tensor.clone() for tensor in tensors[:count])

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:  # noqa: ARG004
        ctx.message = inputs[0]

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *_: Tensor) -> None:
        raise NotImplementedError(ctx.message)


def differentiable_once(name: str, instead: str) -> Callable[[Backward], Backward]:
    """Make a backward function whose gradients raise when they are differentiated.

    torch's ``once_differentiable`` does so only where ``grad_out`` needs a gradient; elsewhere it
    takes the gradients for constants.

    Args:
        name: of the public function, for the message.
        instead: what can be differentiated twice.

    Returns:
        A decorator of ``backward(ctx, saved, *grads)``, where ``saved`` is ``ctx.saved_tensors``,
        which may be unpacked but once.
    """
    message = f"{name}: cannot differentiate twice; use {instead}"

    def decorate(backward: Backward) -> Backward:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            is_compiling = torch.compiler.is_compiling()
            if not is_compiling and any(map(_is_batched, grads)):
                raise NotImplementedError(
                    f"{name}: cannot differentiate by a batch of gradients; use {instead}"
                )
            saved = ctx.saved_tensors
            if not is_compiling:
                check_copied(name, (*saved, *grads))
            with torch.no_grad():
                results = backward(ctx, saved, *grads)
            is_differentiated = torch.is_grad_enabled() or in_forward_mode()
            if is_compiling or not is_differentiated:
                return results
            given = [result for result in results if result is not None]
            sources = (*grads, *saved, *getattr(ctx, "transformed", ()))
            sources = tuple(source for source in sources if source is not None)
            passed = iter(_Undifferentiable.apply(message, len(given), *given, *sources))  # type: ignore[no-untyped-call]
            return tuple(None if result is None else next(passed) for result in results)

        return run

    return decorate


def check_copied(name: str, tensors: Iterable[Tensor | None]) -> None:
    """Check the data of what torch would copy before an operator sees it.

    To be called by backward functions where nothing is compiled.

    Raises:
        ValueError: a storage was freed since the forward pass.
    """
    for x in tensors:
        if x is not None and (x.is_neg() or not x.is_contiguous()):
            check_data(**{f"a tensor saved by {name}": x})


def _is_batched(grad: Tensor | None) -> bool:
    """Whether it stands for several, of ``is_grads_batched`` and the like."""
    return grad is not None and torch._C._functorch.is_legacy_batchedtensor(grad)


@contextmanager
def _differentiated_outside() -> Iterator[None]:
    """Let the transforms around one of `torch.func` see a call, in spite of its own ``forward``.

    An autograd function's ``forward`` runs without a graph, which would hide the call from them.
    """
    with torch.enable_grad(), forward_ad._set_fwd_grad_enabled(True):
        yield


def register_derivative(
    op: str,
    backward: Backward,
    setup_context: Callable[[Any, tuple[Any, ...], Any], None],
    *,
    name: str,
    instead: str,
) -> None:
    """Register a formula for reverse mode, as `torch.library.register_autograd` does.

    Args:
        op: the operator, without namespace.
        backward: from ``ctx`` and the gradients of the outputs to those of all arguments.
        setup_context: keeps in ``ctx`` what ``backward`` needs.
        name: of the public function, for the message.
        instead: what can be differentiated in forward mode.
    """
    overload = getattr(torch.ops.superbert, op).default

    def below_autograd(keyset: Any, arguments: tuple[Any, ...]) -> Any:
        return overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *arguments: Any) -> Any:
            *inputs, keyset = arguments
            outside: Any = nullcontext()
            if torch._C._are_functorch_transforms_active():
                outside = _differentiated_outside()
                # What a result that is saved was made of does not show outside of this transform.
                ctx.transformed = tuple(x for x in inputs if isinstance(x, Tensor))
            with torch._C._AutoDispatchBelowAutograd():
                with outside:
                    output = below_autograd(keyset, tuple(inputs))
                setup_context(ctx, tuple(inputs), output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
            return *backward(ctx, *grads), None

        @staticmethod
        def jvp(ctx: Any, *_: Tensor) -> None:
            raise NotImplementedError(
                f"{name}: cannot differentiate in forward mode; use {instead}"
            )

    # Named as profilers and graphs name its node.
    derivative: Any = type(f"{op}_derivative", (Formula,), {})

    def run(keyset: Any, *arguments: Any) -> Any:
        needs_graph = torch.is_grad_enabled() and torch._C._any_requires_grad(*arguments)
        if not (needs_graph or in_forward_mode()):
            with torch._C._AutoDispatchBelowAutograd():
                return below_autograd(keyset, arguments)
        if not torch._C._are_functorch_transforms_active():
            return derivative.apply(*arguments, keyset)
        with enable_single_level_autograd_function():  # torch.func has taken its own level off
            return super(torch.autograd.Function, derivative).apply(*arguments, keyset)

    _library.impl(op, run, "Autograd", with_keyset=True)


def register_inplace_derivative(
    op: str,
    backward: Callable[[Any, Tensor], Tensor],
    setup_context: Callable[[Any, tuple[Any, ...]], None],
    *,
    name: str,
    instead: str,
) -> None:
    """Register a formula for an operator that overwrites its first argument and returns nothing.

    `torch.library.register_autograd` takes functional operators alone, so the operator has a kernel
    of its own for autograd, an autograd function that marks the argument dirty: torch then counts
    its version, refuses leaves, and makes the function the node of the tensor, whichever way the
    operator was called.  The operator returns nothing since torch.compile makes functions of no
    other mutating operators.

    Of a view autograd would copy the gradient of the whole base, twice.  So where a view has all
    of a contiguous base the function overwrites the base, which is the same memory; the gradients
    of the base and of all its views are right.

    Args:
        op: the operator, without namespace.
        backward: from ``ctx`` and the gradient of what was written, of the argument's shape or its
            base's, to that of the argument, which has the same shape.
        setup_context: keeps in ``ctx`` what ``backward`` needs of the arguments.
        name: of the public function, for the message.
        instead: what can be differentiated in forward mode.
    """
    overload = getattr(torch.ops.superbert, op).default

    def below_autograd(keyset: Any, arguments: tuple[Any, ...]) -> None:
        with torch._C._AutoDispatchBelowAutograd():
            overload.redispatch(keyset & torch._C._after_autograd_keyset, *arguments)

    class Formula(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, written: Tensor, x: Tensor, *arguments: Any) -> Tensor:
            *others, keyset = arguments
            below_autograd(keyset, (x, *others))
            ctx.mark_dirty(written)
            setup_context(ctx, (x, *others))
            return written

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
            return backward(ctx, grad), *[None] * (len(ctx.needs_input_grad) - 1)

        @staticmethod
        def jvp(ctx: Any, *_: Tensor) -> None:
            raise NotImplementedError(
                f"{name}: cannot differentiate in forward mode; use {instead}"
            )

    # Named as profilers and graphs name its node.
    derivative: Any = type(f"{op}derivative", (Formula,), {})

    def run(keyset: Any, x: Tensor, *others: Any) -> None:
        if torch._C._are_functorch_transforms_active():
            raise NotImplementedError(f"{name}: cannot write in place within torch.func")
        needs_graph = torch.is_grad_enabled() and x.requires_grad
        if in_forward_mode() and _has_tangent(x):
            raise NotImplementedError(
                f"{name}: cannot differentiate in forward mode; use {instead}"
            )
        if not needs_graph:
            below_autograd(keyset, (x, *others))
            if not x.is_inference():
                torch.autograd.graph.increment_version(x)
            return
        base, written = x._base, x
        if base is not None and base.numel() == x.numel():
            written = base if base.is_contiguous() and x.is_contiguous() else x
        # Before anything is written, unlike autograd.
        if x.is_leaf or (base is not None and base.is_leaf and base.requires_grad):
            raise RuntimeError(
                f"{name}: a leaf Variable that requires grad is being used in an in-place operation"
            )
        derivative.apply(written, x.detach(), *others, keyset)

    _library.impl(op, run, "Autograd", with_keyset=True)


def refuse_derivative(op: str, *, name: str, instead: str) -> None:
    """Register that an operator has no derivative.

    Args:
        op: the operator, without namespace.
        name: of the public function, for the message.
        instead: what to do.
    """

    def backward(_ctx: Any, *_: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(f"{name}: has no derivative; use {instead}")

    register_derivative(op, backward, lambda *_: None, name=name, instead=instead)


def without_derivative(name: str, instead: str, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Pass on what a function written in torch is made of, and refuse any derivative by it.

    What `torch.compile` compiles is let alone.

    Args:
        name: of the public function, for the message.
        instead: what to do.
        tensors: its differentiable arguments.
    """
    if torch.compiler.is_compiling():
        return tensors
    message = f"{name}: has no derivative; use {instead}"
    return _Undifferentiable.apply(message, len(tensors), *tensors)  # type: ignore[no-untyped-call]


def refuse_derivative_by(name: str, instead: str, result: Tensor, *arguments: Tensor) -> Tensor:
    """Pass on what a function made of its arguments' values, and refuse its derivatives by them.

    What `torch.compile` compiles is let alone: there it is a constant.

    Args:
        name: of the public function, for the message.
        instead: what to do.
        result: computed from the arguments, without a graph.
        arguments: of the function.
    """
    if torch.compiler.is_compiling():
        return result
    message = f"{name}: has no derivative; use {instead}"
    (result,) = _Undifferentiable.apply(message, 1, result, *arguments)  # type: ignore[no-untyped-call]
    return result


def refuse_vmap(op: str, *, name: str, instead: str) -> None:
    """Register that an operator of a backward pass cannot run within `torch.func.vmap`.

    Args:
        op: the operator, without namespace, which writes into its arguments.
        name: of the public function, for the message.
        instead: what to do.
    """

    def run(*_: object) -> None:
        raise NotImplementedError(
            f"{name}: cannot differentiate within torch.func.vmap, jacrev or hessian; use {instead}"
        )

    _library.impl(op, run, "FuncTorchBatched")


def refuse_transforms(name: str, *tensors: Tensor | None) -> None:
    """Refuse the transforms that a layer cannot support that writes task rows in its backward pass.

    Not said by a ``jvp`` of its `torch.autograd.Function`, which torch.compile cannot trace.

    Args:
        name: of the public function, for the message.
        tensors: its differentiable arguments.

    Raises:
        NotImplementedError: within `torch.func.grad`, ``vmap`` and the like, or a tensor has a
            tangent.
    """
    if torch.compiler.is_compiling():
        return
    message = f"{name} with task rows: cannot {{}}; use the layer without rows"
    if torch._C._are_functorch_transforms_active():
        raise NotImplementedError(message.format("run within torch.func"))
    if in_forward_mode() and any(map(_has_tangent, tensors)):
        raise NotImplementedError(message.format("differentiate in forward mode"))


def _has_tangent(tensor: Tensor | None) -> bool:
    return tensor is not None and forward_ad.unpack_dual(tensor).tangent is not None
