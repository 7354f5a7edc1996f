"""Collate examples without padding, for the models that :func:`.accelerate` runs packed.

A batch of S examples with T tokens in all is one stream ``[1, T]``, example after example, and
``cu_seq_lens_q`` ``[S + 1]`` says where each one starts: what transformers' flash attention takes.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

_LABELS = ("label", "label_ids", "labels")
_INT64 = ("token_type_ids", "position_ids")
_PLACES = ("start_positions", "end_positions")
NO_LABEL = -100
"""What transformers' losses leave out."""


class PackingCollator:
    """Make a packed batch of a list of examples, as a tokenizer gives them.

    For `torch.utils.data.DataLoader`, transformers' ``Trainer(data_collator=...)`` and accelerate,
    with a model that `accelerate` made run packed::

        kernels.accelerate(model)
        Trainer(model, ..., data_collator=kernels.PackingCollator())

    Where a collator makes the labels out of a padded batch, pack what it returns::

        padded = DataCollatorForLanguageModeling(tokenizer)(features)
        batch = PackingCollator()([dict(zip(padded, row)) for row in zip(*padded.values())])

    accelerate cannot cut these batches apart, which it does with iterable datasets unless it is
    given ``dispatch_batches=False`` (``TrainingArguments(accelerator_config=...)``); it then raises
    a TypeError about batch sizes.  The model refuses `torch.nn.DataParallel`; start a process for
    each GPU instead.  The Trainer's evaluation counts a batch with labels of tokens as one example.
    A model that was restored takes such a batch for one long sequence, so evaluate before that.
    """

    @staticmethod
    def token_counts(batch: Mapping[str, Any], examples: Iterable[int]) -> list[int]:
        """Return how many tokens each task has, for ``TaskGradients.batch(examples, tokens=...)``.

        Args:
            batch: as the collator made it, not yet moved to a GPU.
            examples: how many examples each task has, in the order in which they lie.

        Raises:
            ValueError: other examples than the batch has.
        """
        starts, examples = batch["cu_seq_lens_q"].tolist(), list(examples)
        if min(examples, default=0) < 0 or sum(examples) != len(starts) - 1:
            raise ValueError(
                f"examples: expected counts of {len(starts) - 1} examples in all, got {examples}"
            )
        ends = list(accumulate(examples, initial=0))
        return [starts[end] - starts[begin] for begin, end in pairwise(ends)]

    def __call__(self, features: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """Collate examples.

        Args:
            features: S examples with the same keys.  Values are numbers, lists of them, numpy
                arrays or tensors on the CPU; a key that is None in every example is left out.
                ``input_ids`` are an example's token ids.  Places at which its ``attention_mask`` is
                zero are left out of it, so that what a tokenizer padded may be given.  ``label``,
                ``label_ids`` and ``labels`` are three names for the labels: a number for each
                example, a list of floats (of several labels), or a list of integers, one for each
                token, to which -100 is added behind where it is shorter.  Other values are taken
                for those of tokens if all are as long as their examples.

        Returns:
            ``max_length_q`` and ``max_length_k``, the tokens of the longest example as an int.  Of
            the tensors first those of examples, in which the Trainer sees how many there are:
            ``[S, ...]``, labels in int64 or float32.  Then those of tokens: ``input_ids``
            ``[1, T]`` in int64 and others ``[1, T, ...]``.  At last ``cu_seq_lens_q`` and
            ``cu_seq_lens_k``, one tensor ``[S + 1]`` in int32.

        Raises:
            ValueError: no examples, examples without tokens or with other keys than the first one,
                several choices for an example, values that make no tensor, such as strings, or
                whose lengths fit neither the tokens nor each other, or answers' places in examples
                with padding ahead of tokens.
        """
        columns = _columns(features)
        ids = [_ids(i, value) for i, value in enumerate(columns.pop("input_ids"))]
        masks = _masks(columns.pop("attention_mask", None), ids)
        tokens = {"input_ids": _kept(ids, masks)}
        lengths = [len(one) for one in tokens["input_ids"]]
        if 0 in lengths:
            raise ValueError(
                f"features[{lengths.index(0)}]['input_ids']: no tokens; leave the example out"
            )
        examples: dict[str, Tensor] = {}
        for key, column in columns.items():
            values = [_tensor(i, key, value) for i, value in enumerate(column)]
            if key == "labels":
                values = _labels(values, ids, masks)
            is_float_label = key == "labels" and values[0].is_floating_point()
            if not is_float_label and _fit(values, ids):
                tokens[key] = _kept(values, masks)
            else:
                _check_shapes(key, values, 0)
                if key in _PLACES and masks is not None:
                    _check_padding_is_behind(key, masks)
                examples[key] = torch.stack(values)
        for key, values in tokens.items():
            _check_shapes(key, values, 1)
        cu_seqlens = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)
        return {
            # First, for accelerate to refuse to cut the batch apart instead of doing it wrongly.
            **{"max_length_q": max(lengths), "max_length_k": max(lengths)},
            **examples,
            **{key: torch.cat(values)[None] for key, values in tokens.items()},
            **{"cu_seq_lens_q": cu_seqlens, "cu_seq_lens_k": cu_seqlens},
        }


# ---- columns ------------------------------------------------------------------------------------


def _columns(features: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the values of each key, labels under the name that models know, first."""
    if len(features) == 0:
        raise ValueError("features: expected one example or more, got none")
    rows: list[dict[str, Any]] = []
    for i, feature in enumerate(features):
        if not isinstance(feature, Mapping):
            raise ValueError(
                f"features[{i}]: expected a mapping such as a tokenizer gives, got "
                f"{type(feature).__name__}"
            )
        rows.append({key: value for key, value in feature.items() if value is not None})
        if rows[i].keys() != rows[0].keys():
            key = min(rows[i].keys() ^ rows[0].keys(), key=str)
            with_key, without = (i, 0) if key in rows[i] else (0, i)
            raise ValueError(
                f"features[{without}]: has no {key!r}, but features[{with_key}] does; give it to "
                "all or to none"
            )
    if "input_ids" not in rows[0]:
        keys = ", ".join(map(repr, rows[0]))
        raise ValueError(f"features: expected 'input_ids', got {keys or 'nothing'}")
    labels = [key for key in _LABELS if key in rows[0]]
    if len(labels) > 1:
        raise ValueError(f"features: {' and '.join(map(repr, labels))} both are labels; keep one")
    order = [*labels, *(key for key in rows[0] if key not in _LABELS)]
    return {"labels" if key in _LABELS else key: [row[key] for row in rows] for key in order}


# ---- values -------------------------------------------------------------------------------------


def _tensor(i: int, key: str, value: Any) -> Tensor:
    """Return the numbers of a value, in the dtype that it has."""
    try:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        text = repr(value)
        text = text if len(text) <= 40 else text[:37] + "..."
        raise ValueError(
            f"features[{i}][{key!r}]: expected numbers, got {type(value).__name__} {text}; remove "
            "the column or convert it"
        ) from error
    return tensor.long() if key in _INT64 and not tensor.is_floating_point() else tensor


def _ids(i: int, value: Any) -> Tensor:
    """Check an example's token ids: int64 ``[L]``."""
    first = value[0] if isinstance(value, Sequence) and len(value) else None
    is_nested = isinstance(first, Sequence | Tensor) and not isinstance(first, str)
    ids = None if is_nested else _tensor(i, "input_ids", value)
    if ids is None or ids.dim() != 1:
        raise ValueError(
            f"features[{i}]['input_ids']: expected the ids of one sequence, got "
            f"{'several' if ids is None else list(ids.shape)}; several choices for an example "
            "cannot be packed, give them padded"
        )
    if ids.numel() and (ids.is_floating_point() or ids.dtype == torch.bool):
        raise ValueError(f"features[{i}]['input_ids']: expected integers, got {ids.dtype}")
    return ids.long()


def _masks(column: list[Any] | None, ids: list[Tensor]) -> list[Tensor] | None:
    """Return which of an example's places are tokens, bool ``[L]``; None where all are."""
    if column is None:
        return None
    masks = [_tensor(i, "attention_mask", value) != 0 for i, value in enumerate(column)]
    for i, (mask, one) in enumerate(zip(masks, ids, strict=True)):
        if mask.shape != one.shape:
            raise ValueError(
                f"features[{i}]['attention_mask']: expected {list(one.shape)} as input_ids, got "
                f"{list(mask.shape)}"
            )
    return masks


def _kept(values: list[Tensor], masks: list[Tensor] | None) -> list[Tensor]:
    if masks is None:
        return values
    return [value[mask] for value, mask in zip(values, masks, strict=True)]


def _fit(values: list[Tensor], ids: list[Tensor]) -> bool:
    """Whether all values are as long as their examples."""
    pairs = zip(values, ids, strict=True)
    return all(value.dim() > 0 and len(value) == len(one) for value, one in pairs)


def _labels(values: list[Tensor], ids: list[Tensor], masks: list[Tensor] | None) -> list[Tensor]:
    """Return labels in the dtype that losses take, lists of integers as long as their examples."""
    if any(value.is_floating_point() and value.numel() for value in values):
        return [value.float() for value in values]
    values = [value.long() for value in values]
    if any(value.dim() != 1 for value in values):
        return values
    for i, (value, one) in enumerate(zip(values, ids, strict=True)):
        if len(value) == len(one):
            continue
        places = torch.arange(len(one)) if masks is None else masks[i].nonzero().squeeze(1)
        if len(value) > len(places):
            raise ValueError(
                f"features[{i}]['labels']: expected one label for each of {len(places)} tokens, "
                f"got {len(value)}"
            )
        values[i] = one.new_full(one.shape, NO_LABEL)
        values[i][places[: len(value)]] = value
    return values


def _check_shapes(key: str, values: list[Tensor], dim: int) -> None:
    """Check that values have one shape, from ``dim`` on."""
    for i, value in enumerate(values):
        if value.shape[dim:] != values[0].shape[dim:]:
            raise ValueError(
                f"features[{i}][{key!r}]: expected {list(values[0].shape)} as in features[0], or "
                f"one for each token in all examples, got {list(value.shape)}"
            )


def _check_padding_is_behind(key: str, masks: list[Tensor]) -> None:
    """Check that places in an example are the same without its padding."""
    for i, mask in enumerate(masks):
        if not mask[: int(mask.sum())].all():
            raise ValueError(
                f"features[{i}][{key!r}]: places in an example with padding ahead of tokens; leave "
                "padding to the collator"
            )
