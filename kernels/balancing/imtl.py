"""IMTL: IMTL-G of the gradients of the losses that IMTL-L scales."""

from torch import Tensor

from .gram_matrix import in_dtype
from .imtl_g import equal_projections
from .imtl_l import imtl_l
from .losses import read_losses, weights_of
from .states import Learned, Step, in_float64, read_state


def imtl(
    gram: Tensor, losses: Tensor, state: Learned | None = None, lr: float = 0.025
) -> Step[Learned]:
    """IMTL: :func:`imtl_g` of the gradients of the losses that :func:`imtl_l` scales.

    Liu et al., "Towards Impartial Multi-task Learning", ICLR 2021, Algorithm 1.  The update has the
    direction of :func:`imtl_g`, which does not depend on the gradients' lengths; the factors of the
    losses decide its length.

    Args:
        gram: ``[K, K]``, floating point.
        losses: ``[K]``, of any sign, as for :func:`imtl_l`.
        state: of the step before; None at first.
        lr: of the factors, as for :func:`imtl_l`.

    Returns:
        The weights and the next state.  All weights are NaN, and the state is the present one,
        where the diagonal of ``gram`` or a loss is not finite.

    Raises:
        TypeError: ``state`` is none.
        ValueError: a shape, dtype or number is not as above.
        NotImplementedError: when the weights are differentiated.
    """
    own = read_losses(gram, losses, logarithmic=False)
    state = read_state(gram, state, Learned)
    # Weights w of scaled gradients exp(s) g that add up to 1 are weights exp(s) w of the gradients.
    scales = (-in_float64(state).values).exp()
    weights = in_dtype(equal_projections(gram.detach(), scales), gram.dtype)
    weights = weights_of("imtl", weights, gram, losses, own.known)
    return Step(weights, imtl_l(gram, losses, state, lr).state)
