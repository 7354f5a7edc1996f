"""Rotary position embedding on the CPU: numbers, positions, gradients, what is overwritten."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import kernels
from kernels import RotaryEmbedding, apply_rotary_emb, apply_rotary_emb_qkv_, rotary_tables
from kernels.rotary.rotary import positions_reference, rotary_reference

from .tolerance import assert_within_twice

POSITIONS = 40
CU_SEQLENS = torch.tensor([0, 7, 7, 20], dtype=torch.int32)
# Width and rotary width: all, a part, one pair, no power of two, an odd width.
WIDTHS = [(64, 64), (64, 32), (64, 2), (80, 80), (31, 30)]


def reference(x: Tensor, positions: Tensor, interleaved: bool, width: int) -> Tensor:
    """Of ``x [T, H, D]``, in its dtype."""
    cos, sin = rotary_tables(POSITIONS, width)
    return rotary_reference(x[:, None], cos, sin, positions, interleaved)[:, 0]


def packed_positions(tokens: int, **places: Any) -> Tensor:
    """Of one packed stream ``[T]``."""
    given = {"cu_seqlens": CU_SEQLENS, "seqlen_offsets": None, "offset": 0} | places
    return positions_reference(torch.device("cpu"), 1, tokens, None, **given)[0]


# ---- numbers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("width", "rotary_width"), WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_against_float64(
    dtype: torch.dtype, width: int, rotary_width: int, interleaved: bool
) -> None:
    tables = rotary_tables(POSITIONS, rotary_width)
    for tokens in (1, 37):
        wide = torch.randn(tokens, 3, 5, width + 3).to(dtype).requires_grad_()
        positions = torch.randint(0, POSITIONS, (tokens,))
        x, grad = wide[:, 1, 1:4, :width], torch.randn(tokens, 3, width).to(dtype)
        options = (interleaved, rotary_width)
        exact = reference(x.double(), positions, *options)
        torchs = reference(x, positions, *options)
        out = apply_rotary_emb(x, *tables, interleaved, position_ids=positions)
        assert out.is_contiguous()
        assert out.dtype == dtype
        assert_within_twice(out, torchs, exact)
        of_64 = wide.detach().double().requires_grad_()
        of_64_out = reference(of_64[:, 1, 1:4, :width], positions, *options)
        exact_grad = torch.autograd.grad(of_64_out, of_64, grad.double())[0]
        torchs_grad, own_grad = (torch.autograd.grad(y, wide, grad)[0] for y in (torchs, out))
        assert_within_twice(own_grad, torchs_grad, exact_grad)
        written = x.detach().clone()
        apply_rotary_emb(written, *tables, interleaved, True, position_ids=positions.int())
        assert torch.equal(written, out)


@pytest.mark.parametrize("interleaved", [False, True])
def test_float64_takes_the_reference(interleaved: bool) -> None:
    x = torch.randn(20, 2, 10, dtype=torch.float64, requires_grad=True)
    tables = rotary_tables(POSITIONS, 8)

    def both(x: Tensor) -> tuple[Tensor, Tensor]:
        options = {"cu_seqlens": CU_SEQLENS // 3}
        return (
            apply_rotary_emb(x, *tables, interleaved, **options),
            apply_rotary_emb(2 * x, *tables, interleaved, True, **options),
        )

    out, doubled = both(x)
    torch.testing.assert_close(doubled, 2 * out)
    assert torch.autograd.gradcheck(both, (x[:9, :1].detach().requires_grad_(),))


@pytest.mark.parametrize("base", [10_000.0, 160_000.0])
def test_tables_are_those_of_transformers(base: float) -> None:
    modernbert = pytest.importorskip("transformers.models.modernbert.modeling_modernbert")
    config = modernbert.ModernBertConfig(hidden_size=128, num_attention_heads=2)
    for layer in config.rope_parameters.values():
        layer["rope_theta"] = base
    rope = modernbert.ModernBertRotaryEmbedding(config)
    ids = torch.arange(8192)[None]
    cos, sin = rope(torch.zeros(1), ids, "full_attention")
    tables = rotary_tables(8192, 64, base)
    torch.testing.assert_close(tables[0], cos[0, :, :32], rtol=0, atol=0)
    torch.testing.assert_close(tables[1], sin[0, :, :32], rtol=0, atol=0)
    q, k = torch.randn(2, 1, 2, 8192, 64)
    expected = modernbert.apply_rotary_pos_emb(q, k, cos, sin)
    for x, turned in zip((q, k), expected, strict=True):
        out = apply_rotary_emb(x.transpose(1, 2), *tables)
        torch.testing.assert_close(out.transpose(1, 2), turned, rtol=0, atol=1e-6)


# ---- positions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"seqlen_offsets": 3}, {"offset": 3}),
        (
            {"seqlen_offsets": torch.tensor([5, 90, 1])},  # nobody looks at an empty one's
            {"seqlen_offsets": torch.tensor([5, 90, 1])},
        ),
        (
            {"seqlen_offsets": torch.tensor([5, 0, 1], dtype=torch.int32)},
            {"seqlen_offsets": torch.tensor([5, 0, 1])},
        ),
    ],
)
def test_packed_sequences(given: dict, expected: dict) -> None:
    x = torch.randn(29, 2, 16)
    out = apply_rotary_emb(x, *rotary_tables(POSITIONS, 16), cu_seqlens=CU_SEQLENS, **given)
    positions = packed_positions(29, **expected)
    torch.testing.assert_close(out, reference(x, positions, False, 16))
    assert torch.equal(out[20:], x[20:])  # behind the last sequence


def test_a_batch_is_its_sequences() -> None:
    x, tables = torch.randn(3, 11, 2, 16), rotary_tables(POSITIONS, 16)
    offsets = torch.tensor([4, 0, 29])
    out = apply_rotary_emb(x, *tables, seqlen_offsets=offsets)
    for own, entry, offset in zip(out, x, offsets.tolist(), strict=True):
        ids = torch.arange(offset, offset + 11)
        assert torch.equal(own, apply_rotary_emb(entry, *tables, position_ids=ids))
    ids = offsets[:, None] + torch.arange(11)
    assert torch.equal(out, apply_rotary_emb(x, *tables, position_ids=ids))


def test_no_tokens() -> None:
    tables = rotary_tables(0, 16)
    out = apply_rotary_emb(torch.zeros(0, 2, 16), *tables, cu_seqlens=CU_SEQLENS[:1])
    assert out.shape == (0, 2, 16)
    x = torch.randn(3, 2, 16)
    assert torch.equal(apply_rotary_emb(x, *tables, cu_seqlens=CU_SEQLENS[:1]), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arguments_that_do_not_fit(dtype: torch.dtype) -> None:
    x, tables = torch.randn(20, 2, 16, dtype=dtype), rotary_tables(10, 16)
    ids = torch.zeros(20, dtype=torch.int64)
    cases: list[tuple[str, dict]] = [
        ("position_ids: expected 0 <= index < 10", {"position_ids": ids + 10}),
        ("position_ids: expected 0 <= index < 10", {"position_ids": ids - 1}),
        ("position_ids: expected int64", {"position_ids": ids[1:]}),
        ("position_ids: with them", {"position_ids": ids, "seqlen_offsets": 1}),
        ("seqlen_offsets: expected to end", {"cu_seqlens": CU_SEQLENS}),
        ("max_seqlen: expected", {"cu_seqlens": CU_SEQLENS, "max_seqlen": 11}),
        ("cu_seqlens: expected to end", {"cu_seqlens": CU_SEQLENS + CU_SEQLENS.sign()}),
        ("cu_seqlens: expected int32", {"cu_seqlens": CU_SEQLENS.long()}),
        ("x: expected .batch", {}),
    ]
    for message, places in cases:
        for inplace in (False, True):
            before = x.clone()
            with pytest.raises(ValueError, match=f"^{message}"):
                apply_rotary_emb(x, *tables, inplace=inplace, **places)
            assert torch.equal(x, before)
    with pytest.raises(ValueError, match=r"^cos: expected 1 to 8 columns"):
        apply_rotary_emb(x, *rotary_tables(10, 18), position_ids=ids)
    with pytest.raises(NotImplementedError, match=r"^cos: has no gradient"):
        apply_rotary_emb(x, tables[0].requires_grad_(), tables[1], position_ids=ids)
    with pytest.raises(NotImplementedError, match=r"^cos_k: not supported"):
        apply_rotary_emb_qkv_(x, *tables, tables[0], None)
    if dtype == torch.float32:
        with pytest.raises(ValueError, match=r"^x: written in place, expected elements that lie"):
            apply_rotary_emb(
                x[:1].expand(20, 2, 16), *rotary_tables(10, 16), inplace=True, position_ids=ids
            )


# ---- in place -----------------------------------------------------------------------------------

QKV = torch.randn(29, 6)
TABLES = rotary_tables(POSITIONS, 8)
Rotate = Callable[[Tensor], Tensor]


def rotate_(qkv: Tensor) -> Tensor:
    """Queries and keys of ``[T, 3, H, D]``, in place."""
    return apply_rotary_emb_qkv_(qkv, *TABLES, cu_seqlens=CU_SEQLENS)


def rotate_by_torch(qkv: Tensor) -> Tensor:
    """The same by the reference."""
    positions = packed_positions(len(qkv))
    turned = rotary_reference(qkv[:, :2], *TABLES, positions)
    return torch.cat((turned, qkv[:, 2:]), 1)


def rotate_and_keep_view(qkv: Tensor) -> Tensor:
    """In place; what was given is gone on with."""
    rotate_(qkv)
    return qkv


def rotate_heads(qkv: Tensor) -> Tensor:
    """With all heads in one dimension."""
    heads = qkv.flatten(1, 2)
    out = apply_rotary_emb_qkv_(heads, *TABLES, num_heads_q=2, cu_seqlens=CU_SEQLENS)
    return out.view(qkv.shape)


def rotate_parts(qkv: Tensor) -> Tensor:
    """Queries and keys one after the other: views of a part."""
    for part in (0, 1):
        apply_rotary_emb(qkv[:, part], *TABLES, inplace=True, cu_seqlens=CU_SEQLENS)
    return qkv


def assert_near(found: Tensor | None, expected: Tensor | None) -> None:
    """Sums of some 30 terms in another order, of values as large as the largest."""
    assert found is not None
    assert expected is not None
    allowed = 64 * torch.finfo(found.dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=allowed)


def attention(qkv: Tensor) -> Tensor:
    """Of ``[T, 3, H, D]``."""
    out = kernels.flash_attn_varlen_qkvpacked_func(qkv, CU_SEQLENS, 13)
    assert isinstance(out, Tensor)
    return out


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 48, requires_grad=True)


def product(weight: Tensor) -> Tensor:
    return (QKV @ weight).view(-1, 3, 2, 8)


def gradient(weight: Tensor, rotate: Rotate) -> Tensor:
    return torch.autograd.grad(attention(rotate(product(weight))).square().sum(), weight)[0]


@pytest.mark.parametrize(
    "rotate", [rotate_, rotate_and_keep_view, rotate_heads, rotate_parts], ids=lambda f: f.__name__
)
def test_gradients_in_place(weight: Tensor, rotate: Rotate) -> None:
    expected = gradient(weight, rotate_by_torch)
    assert_near(gradient(weight, rotate), expected)
    with torch.no_grad():
        assert_near(rotate(product(weight)), rotate_by_torch(product(weight)))
    whole = (2 * product(weight)).detach().requires_grad_()
    assert_near(
        torch.autograd.grad(rotate(1 * whole).pow(3).sum(), whole)[0],
        torch.autograd.grad(rotate_by_torch(whole).pow(3).sum(), whole)[0],
    )


@pytest.mark.parametrize("holder", ["hook", "hook of the view", "view", "storage", "grad", "twice"])
def test_a_gradient_that_others_hold_is_kept(holder: str, weight: Tensor) -> None:
    expected = gradient(weight, rotate_by_torch)
    base = QKV @ weight
    turned = rotate_(base.view(-1, 3, 2, 8))
    out = attention(turned)
    (right,) = torch.autograd.grad(out.square().sum(), turned, retain_graph=True)
    held: list[Any] = []
    if holder == "hook":
        base.register_hook(held.append)
    elif holder == "hook of the view":
        turned.register_hook(held.append)
    elif holder == "view":
        turned.register_hook(lambda grad: held.append(grad[0]))
    elif holder == "storage":
        turned.register_hook(lambda grad: held.append(grad.untyped_storage()))
    if holder == "grad":
        grad, *held = torch.autograd.grad(out.square().sum(), (weight, turned, base))
    else:
        (grad,) = torch.autograd.grad(out.square().sum(), weight, retain_graph=holder == "twice")
    if holder == "twice":  # the same graph again: nothing that is saved was overwritten
        (grad,) = torch.autograd.grad(out.square().sum(), weight)
    assert_near(grad, expected)
    for kept in held:
        if isinstance(kept, Tensor):
            assert torch.equal(kept.view(-1), right.reshape(-1)[: kept.numel()])


def test_a_retained_gradient_is_right(weight: Tensor) -> None:
    turned, by_torch = rotate_(product(weight)), rotate_by_torch(product(weight))
    for x in (turned, by_torch):
        x.retain_grad()
        attention(x).square().sum().backward()
    assert_near(turned.grad, by_torch.grad)


@pytest.mark.parametrize("view", [lambda x: x, lambda x: x.view(x.shape), lambda x: x[:, :1]])
def test_a_leaf_is_refused_before_it_is_written(view: Rotate) -> None:
    leaf = torch.randn(29, 2, 8, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
        apply_rotary_emb(view(leaf), *TABLES, inplace=True, cu_seqlens=CU_SEQLENS)
    assert torch.equal(leaf, before)


@pytest.mark.parametrize("needs_grad", [True, False])
def test_versions_are_counted(needs_grad: bool) -> None:
    leaf = torch.randn(29, 2, 8, requires_grad=True)
    saved = leaf.exp() if needs_grad else torch.randn(29, 2, 8)
    product = saved * leaf if not needs_grad else saved
    apply_rotary_emb(saved, *TABLES, inplace=True, cu_seqlens=CU_SEQLENS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()


def test_returns_what_was_given() -> None:
    x = torch.randn(29, 2, 8)
    assert apply_rotary_emb(x, *TABLES, inplace=True, cu_seqlens=CU_SEQLENS) is x
    grown = 1 * x.requires_grad_()
    out = apply_rotary_emb(grown.view(29, 2, 8), *TABLES, inplace=True, cu_seqlens=CU_SEQLENS)
    assert out.data_ptr() == grown.data_ptr()
    with torch.inference_mode():
        rotate_(product(torch.randn(6, 48)))


def test_second_derivatives(weight: Tensor) -> None:
    def second(rotate: Rotate) -> Tensor:
        loss = rotate(product(weight)).pow(3).sum()
        (first,) = torch.autograd.grad(loss, weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), weight)[0]

    assert_near(second(rotate_), second(rotate_by_torch))


def test_within_torch_func() -> None:
    x = torch.randn(29, 3, 2, 8)

    def loss(rotate: Rotate) -> Callable[[Tensor], Tensor]:
        return lambda x: rotate(1 * x).pow(3).sum()

    expected = torch.func.grad(loss(rotate_by_torch))(x)
    assert_near(torch.func.grad(loss(rotate_))(x), expected)
    with pytest.raises(NotImplementedError, match=r"^apply_rotary_emb: cannot differentiate in"):
        torch.func.jvp(loss(rotate_), (x,), (x,))


def test_checkpointed(weight: Tensor) -> None:
    def block(weight: Tensor) -> Tensor:
        return attention(rotate_(product(weight)))

    out = checkpoint(block, weight, use_reentrant=False)
    (grad,) = torch.autograd.grad(out.square().sum(), weight)
    assert_near(grad, gradient(weight, rotate_by_torch))


def test_compiled_code_rotates_in_place(weight: Tensor) -> None:
    """Forward and backward, without a copy: what Inductor allocates is the product alone."""
    from torch._inductor.utils import run_and_get_code

    def block(weight: Tensor) -> Tensor:
        return attention(rotate_(product(weight)))

    compiled = torch.compile(block, fullgraph=True)

    def step() -> Tensor:
        return torch.autograd.grad(compiled(weight).square().sum(), weight)[0]

    grad, codes = run_and_get_code(step)
    assert_near(grad, gradient(weight, rotate_by_torch))
    assert len(codes) == 2
    for code in codes:
        assert code.count("torch.ops.superbert.rotary_.default(") == 1
        assert code.count("empty_strided_cpu(") <= 2  # imported, and the matrix product's


# ---- the module ---------------------------------------------------------------------------------


def test_module_grows_its_tables() -> None:
    rotary = RotaryEmbedding(8).bfloat16()
    assert not rotary.state_dict()
    for length, offset in ((5, 0), (9, 3), (2, 0)):
        qkv = torch.randn(2, length, 3, 2, 8)
        expected = apply_rotary_emb_qkv_(
            qkv.clone(), *rotary_tables(length + offset, 8), seqlen_offsets=offset
        )
        assert torch.equal(rotary(qkv, seqlen_offset=offset), expected)
        assert rotary.tables(0, qkv.device)[0].dtype == torch.float32
    assert len(rotary.tables(0, qkv.device)[0]) == 12
    qkv, ids = torch.randn(29, 3, 2, 8), torch.arange(29)
    assert torch.equal(rotary(qkv.clone(), cu_seqlens=CU_SEQLENS), rotate_(qkv.clone()))
    with pytest.raises(ValueError, match=r"^max_seqlen: needed"):
        rotary(qkv, position_ids=ids)
    whole = rotary(qkv.clone(), position_ids=ids, max_seqlen=29)
    assert torch.equal(whole[None], rotary(qkv[None].clone()))
    with pytest.raises(NotImplementedError, match=r"^kv: not supported"):
        rotary(qkv, qkv)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [((-1, 8), "num_positions"), ((5, 7), "rotary_dim"), ((5, 0), "rotary_dim")],
)
def test_tables_of_wrong_numbers(arguments: tuple[int, int], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        rotary_tables(*arguments)
    with pytest.raises(ValueError, match=r"^base: expected"):
        rotary_tables(5, 8, 0.0)
