"""Balancing methods: weights of the task gradients, as functions of their Gram matrix and losses.

Every method here computes weights ``c [K]`` from ``G = J Jᵀ [K, K]``, and some from the tasks'
losses ``[K]``; the update is ``sum_k c_k g_k``.  Of the Gram matrices ``[G, K, K]`` of several
parameter groups they compute the weights ``[G, K]`` of each, all at once; other arguments are one
for all groups or, with a first dimension of their own, one for each.  They run where G lies, never
wait for the device, and can be part of a CUDA graph.  None has an absolute epsilon: gradients times
1e-12 or 1e12 give the same weights (with :func:`nash_mtl`'s ``max_norm``: the same update).

A method that divides by a task's norm gives a task with zero gradient the weight 0, one that
divides by its loss a task with zero loss; where all are zero the weights are finite.  Weights that
the dtype of G cannot hold are all made smaller alike, until it holds the largest.  Where the
diagonal of G is not finite (a gradient holds a NaN or an infinity, or float32 cannot hold its
squared norm, from 1.8e19 on), all weights are NaN, by every method: such a step has no update, and
:func:`.update_guard` skips it.  So they are where a loss is not finite, or negative and the method
takes its logarithm.  Squared norms below 1e-38 have fewer digits in a float32 G, and below 1e-45
none: such gradients count as zero.

Methods with a state take that of the step before, None at first, and return the next one
(:mod:`.states`).

The problems are solved in float64; the small solvers (eigenvalues, quadratic programs, Newton's
method) are C++ and CUDA from one source, csrc/balancing_solvers.h.  K has no limit but memory, for
a few ``[K, K]`` matrices, or one for each row that :func:`upgrad` solves at a time.  Time grows
with K³, :func:`upgrad`'s with K⁴; on CUDA a problem is solved by one thread, so that beyond a
hundred or so tasks G is better taken to the CPU first.

Each method has one file here, with its paper and equation; :mod:`.gram_matrix`, :mod:`.solvers`,
:mod:`.losses`, :mod:`.states` and :mod:`.learned` have what they share.
"""

from ..registration.deprecation import renamed_attribute
from .aligned_mtl import aligned_mtl
from .cagrad import cagrad
from .config import config
from .db_mtl import db_mtl
from .dual_projection import dual_projection
from .dwa import dwa
from .fairgrad import fairgrad
from .famo import famo
from .gls import gls
from .gradnorm import gradnorm
from .gradvac import gradvac
from .imtl import imtl
from .imtl_g import imtl_g
from .imtl_l import imtl_l
from .krum import krum
from .main_aux import main_aux
from .mean import mean
from .mgda import mgda
from .nash_mtl import nash_mtl
from .pcgrad import pcgrad_weights as pcgrad
from .proportional import proportional
from .rlw import rlw
from .stch import stch
from .sum import sum
from .upgrad import upgrad
from .uw import uw

__all__ = [
    "aligned_mtl",
    "cagrad",
    "config",
    "db_mtl",
    "dual_projection",
    "dwa",
    "fairgrad",
    "famo",
    "gls",
    "gradnorm",
    "gradvac",
    "imtl",
    "imtl_g",
    "imtl_l",
    "krum",
    "main_aux",
    "mean",
    "mgda",
    "nash_mtl",
    "pcgrad",
    "proportional",
    "rlw",
    "stch",
    "sum",
    "upgrad",
    "uw",
]

_OLD_NAMES = {"auxiliary_pcgrad": "main_aux", "total": "sum"}


def __getattr__(name: str) -> object:
    if name not in _OLD_NAMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return renamed_attribute(name, globals(), _OLD_NAMES)
