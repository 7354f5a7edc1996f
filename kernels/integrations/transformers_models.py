"""Run an encoder of transformers on the tokens of a batch, without its padding.

:class:`PackedModel` takes the tokens out of the padded inputs, and :class:`PaddedEncoder` puts its
hidden states back, once; transformers_packing.py says how.

Hidden states at padding are zeros.  The first place of a row is computed even where it is padding,
since poolers and classifiers read it: a query that is no key.  Question answering heads read tokens
alone, and tell them by their hidden states, so that theirs is padding like any other.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from operator import attrgetter
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..task_gradients.task_layers import sees_several_tasks
from .class_exchange import Exchanged
from .packing_collator import NO_LABEL
from .transformers_packing import Boundaries, Packing, packing_of, restarts

# ---- positions ----------------------------------------------------------------------------------


def count_from_zero(_embeddings: nn.Module, inputs: Tensor) -> Tensor:
    """Positions of a padded batch: ``[1, S]``, from 0."""
    return torch.arange(inputs.shape[1], device=inputs.device)[None]


def read_positions(embeddings: nn.Module, inputs: Tensor) -> Tensor:
    """BERT's positions: ``[1, S]``, the first of a buffer, which counts from 0 unless changed."""
    own = getattr(embeddings, "position_ids", None)
    if isinstance(own, Tensor) and own.shape[-1] >= inputs.shape[1]:
        return own.view(1, -1)[:, : inputs.shape[1]]
    return count_from_zero(embeddings, inputs)


def count_tokens(embeddings: nn.Module, inputs: Tensor) -> Tensor:
    """RoBERTa's positions: tokens other than padding are counted from ``padding_idx + 1``.

    Args:
        embeddings: whose ``padding_idx`` it is.
        inputs: ids ``[B, S]``, or embedded ones ``[B, S, H]``, whose places are all counted.
    """
    padding = embeddings.padding_idx
    assert isinstance(padding, int)
    if inputs.dim() == 3:
        return count_from_zero(embeddings, inputs) + padding + 1
    is_token = (inputs != padding).int()
    return (is_token.cumsum(1) * is_token).long() + padding


# ---- models -------------------------------------------------------------------------------------


IMPLEMENTATION = "superbert"
"""Of attention, in transformers' registry and in configs."""


class PackedOutput(Enum):
    """When an encoder's hidden states stay packed."""

    ALWAYS = "always"
    AS_GIVEN = "where the inputs are packed"
    NEVER = "never"
    REFUSED = "never, and packed inputs are refused"


_TOKEN_INPUTS = ("input_ids", "inputs_embeds", "token_type_ids", "position_ids")
_BOUNDARY_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")
_DROPPED_ARGUMENTS = ("attention_mask", *_BOUNDARY_ARGUMENTS)


def _by_name(model: Exchanged, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    names = model.argument_names
    if len(args) > len(names):
        raise TypeError(f"{type(model).__name__}: expected {len(names)} arguments, got {len(args)}")
    named = dict(zip(names, args, strict=False))
    if twice := named.keys() & kwargs.keys():
        raise TypeError(f"{type(model).__name__}: {min(twice)} is given twice")
    return {**named, **kwargs}


def _refuse(inputs: Mapping[str, Any], config: Any) -> None:
    """Raise ValueError for what an accelerated model does not do."""
    probabilities = inputs.get("output_attentions")
    if probabilities is None:
        probabilities = getattr(config, "output_attentions", False)
    if probabilities:
        raise ValueError("output_attentions: the probabilities are never stored here")
    if inputs.get("past_key_values") is not None or inputs.get("use_cache"):
        raise ValueError("past_key_values, use_cache: caches are not supported by accelerate")
    for name in ("encoder_hidden_states", "encoder_attention_mask"):
        if inputs.get(name) is not None:
            raise ValueError(f"{name}: cross attention is not supported by accelerate")


def _positions(family: "Family", embeddings: nn.Module, given: Tensor, packing: Packing) -> Tensor:
    """Return the positions of inputs that come without: ``[B or 1, S]``, or ``[1, T]`` packed."""
    if not packing.from_packed_inputs:
        return family.positions(embeddings, given)
    assert packing.indices is not None
    if family.positions is count_tokens and given.dim() == 2:  # which looks at the ids
        return packing.pack(count_tokens(embeddings, packing.pad(given)))
    of_any = family.positions(embeddings, given.new_empty(1, packing.max_seqlen, 0))
    return of_any[:, packing.indices % max(packing.max_seqlen, 1)]


class PackedModel(Exchanged):
    """An encoder of transformers, such as a `BertModel`, that runs on packed tokens.

    Attributes:
        packed_output: when hidden states stay packed, ``[1, T, H]``.
        with_first_places: whether the first place of a row is computed where it is padding.
        output_classes: by transformers' classes of outputs, those of :class:`WithBoundaries`.
    """

    packed_output: PackedOutput
    with_first_places: bool
    output_classes: ClassVar[dict[type, Any]]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "original_class" in vars(cls):
            cls.output_classes = _output_classes_of(cls.original_class)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on the tokens; arguments and outputs are transformers'.

        Raises:
            ValueError: a mask other than ``[B, S]``, or what is not supported: attention
                probabilities, caches, cross attention.
        """
        inputs = _by_name(self, args, kwargs)
        config: Any = self.config
        _refuse(inputs, config)
        given = inputs.get("input_ids")
        if given is None:
            given = inputs.get("inputs_embeds")
        elif inputs.get("inputs_embeds") is not None:
            given = None
        if given is None or given.dim() < 2:
            return super().forward(**inputs)  # transformers' error
        family = FAMILIES[config.model_type]
        self._check_since(family)
        packing = packing_of(inputs, given, family.whole_rows, self.with_first_places)
        if packing.from_packed_inputs and getattr(self, "_is_replica", False):
            raise ValueError(
                "input_ids: torch.nn.DataParallel cuts packed inputs apart; start a process for "
                "each GPU, show this one a single GPU, or give padded inputs"
            )
        if packing.from_packed_inputs and self.packed_output is PackedOutput.REFUSED:
            raise ValueError(
                "input_ids: packed inputs are refused under this head, which looks at places of "
                "the padded ones or takes their mean; expected [batch, length], for multiple "
                "choice [batch, choices, length]"
            )
        if inputs.get("position_ids") is None:
            embeddings: Any = self.embeddings
            inputs["position_ids"] = _positions(family, embeddings, given, packing)
        return_dict = inputs.pop("return_dict", None)
        if return_dict is None:
            return_dict = getattr(config, "return_dict", True)
        outputs = self.run(self._on_stream(inputs, packing, family), packing)
        stays_packed = self.packed_output is PackedOutput.ALWAYS or (
            self.packed_output is PackedOutput.AS_GIVEN and packing.from_packed_inputs
        )
        _convert_outputs(outputs, packing, family.encoder is not None, stays_packed)
        if not return_dict:  # heads put the rest of this tuple behind their logits
            return outputs.to_tuple()
        return self._with_boundaries(outputs, packing) if stays_packed else outputs

    def _check_since(self, family: "Family") -> None:
        """Raise ValueError for what was set since :func:`accelerate` and does not go with it."""
        model: Any = self
        named = getattr(model.config, "_attn_implementation", None)
        if not family.own_attention and named != IMPLEMENTATION:
            raise ValueError(
                f"model: its config names the attention {named!r} since it was accelerated; "
                "`accelerate` it again, or `restore` it"
            )
        if not family.joins_tasks and sees_several_tasks():
            raise NotImplementedError(
                f"model: {model.config.model_type} has layers that see more than a task's tokens, "
                "so that a joined batch has no task gradients; run each task alone, within `task`"
            )
        words = model.get_input_embeddings()
        if self.training and getattr(words, "neftune_noise_alpha", None) is not None:
            raise ValueError(
                "neftune_noise_alpha: the noise depends on the length of padded rows, which an "
                "accelerated model does not have; train without"
            )

    def run(self, inputs: dict[str, Any], packing: Packing) -> Any:
        """Run on the stream, with arguments ``[1, T, ...]``, and return transformers' outputs."""
        return super().forward(**inputs, packing=packing, return_dict=True)

    def _with_boundaries(self, outputs: Any, packing: Packing) -> Any:
        """Return packed outputs that say where their sequences begin."""
        kind = self.output_classes.get(type(outputs)) or _output_class(type(outputs))
        found = kind(**outputs, cu_seqlens=packing.cu_seqlens_k)
        found.max_seqlen = packing.max_seqlen
        return found

    def _on_stream(
        self, inputs: Mapping[str, Any], packing: Packing, family: "Family"
    ) -> dict[str, Any]:
        """Return the arguments of a forward pass on the stream."""
        packed = {name: x for name, x in inputs.items() if name not in _DROPPED_ARGUMENTS}
        if "use_cache" in self.argument_names:
            packed["use_cache"] = False
        for name in (*_TOKEN_INPUTS, *family.inputs):
            value = packed.get(name)
            if value is None:
                continue
            if value.dim() == 1 and name in family.inputs:  # of whole sequences
                packed[name] = packing.pack(value[:, None])
            elif value.dim() == 1:  # of places, in all rows
                packed[name] = (
                    value[None] if packing.from_packed_inputs else packing.pack(value[None])
                )
            elif not packing.from_packed_inputs:
                packed[name] = packing.pack(value)
        return packed


def _convert_outputs(outputs: Any, packing: Packing, is_padded: bool, stays_packed: bool) -> None:
    """Give all hidden states the same form; the last one may come padded from the encoder."""

    def converted(stream: Tensor) -> Tensor:
        return packing.tokens(stream) if stays_packed else packing.pad(packing.cleared(stream))

    last = outputs.last_hidden_state
    if not is_padded:
        outputs.last_hidden_state = converted(last)
    elif last.shape[:2] != (packing.batch_size, packing.length):
        raise ValueError(
            "model: its last layer is another since it was accelerated; `restore` it before layers "
            "are taken out"
        )
    elif stays_packed:
        outputs.last_hidden_state = packing.tokens(packing.pack(last))
    states = outputs.get("hidden_states")
    if states is not None:
        outputs.hidden_states = tuple(
            outputs.last_hidden_state
            if state is last
            else (state if state is None else converted(state))
            for state in states
        )


# ---- packed outputs -----------------------------------------------------------------------------


class WithBoundaries:
    """Outputs of transformers, and where the sequences of packed hidden states begin.

    Attributes:
        cu_seqlens: int32 ``[S + 1]``, the last field: frameworks make outputs anew of their fields.
        plain_class: transformers' own.
    """

    cu_seqlens: Tensor
    plain_class: ClassVar[type]

    @cached_property
    def max_seqlen(self) -> int:
        """Rows of the longest sequence, or more.

        The model sets it.  Outputs made anew of these look for it when it is first asked for, which
        waits for the device: it is no field, since what gathers outputs takes tensors alone.
        """
        lengths = self.cu_seqlens.diff()
        return int(lengths.max()) if len(lengths) else 0

    def __reduce__(self) -> Any:
        reduced: Any = super().__reduce__()
        _, args, *state = reduced
        return _new_output, (self.plain_class, *args), *state


_output_classes: dict[type, Any] = {}


def _output_class(plain: type) -> Any:
    """Return a subclass of a class of outputs with ``cu_seqlens`` behind, always the same one."""
    if plain not in _output_classes:
        members = {
            **{"__module__": plain.__module__, "__doc__": plain.__doc__, "plain_class": plain},
            **{"__annotations__": {"cu_seqlens": Tensor | None}, "cu_seqlens": None},
        }
        made = type(f"Packed{plain.__name__}", (WithBoundaries, plain), members)
        _output_classes.setdefault(plain, dataclass(made))  # another thread may be here, too
    return _output_classes[plain]


def _output_classes_of(model_class: type[nn.Module]) -> dict[type, Any]:
    """Return those of all outputs that a model's code knows, for torch.compile, which makes none.

    The dict stays as it is, so that other models cause no graphs to be compiled anew.
    """
    from transformers.utils.generic import ModelOutput

    known = list(vars(sys.modules[model_class.forward.__module__]).values())
    outputs = [x for x in known if isinstance(x, type) and issubclass(x, ModelOutput)]
    return {x: _output_class(x) for x in outputs if hasattr(x, "last_hidden_state")}


def _new_output(plain: type, *args: Any) -> Any:
    """Make outputs for the unpickler."""
    return _output_class(plain)(*args)


# ---- other classes that stand in ----------------------------------------------------------------


class NormedModel(PackedModel):
    """A model with a norm behind its encoder, which makes its bias of the zeros at padding."""

    def run(self, inputs: dict[str, Any], packing: Packing) -> Any:
        """Run on the stream, and give padding zeros."""
        outputs = super().run(inputs, packing)
        last = outputs.last_hidden_state
        if packing.indices is not None:
            outputs.last_hidden_state = packing.pad(packing.pack(last))
        states = outputs.get("hidden_states")
        if states is not None:
            outputs.hidden_states = tuple(
                outputs.last_hidden_state if state is last else state for state in states
            )
        return outputs


class BoundaryHead(Exchanged):
    """A model with a head whose code hands its encoder a mask, but no boundaries of sequences."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run, with the boundaries of packed inputs in place of a mask.

        Raises:
            ValueError: there is a mask, too.
        """
        inputs = _by_name(self, args, kwargs)
        given = {name: inputs.pop(name, None) for name in _BOUNDARY_ARGUMENTS}
        boundaries = given["cu_seq_lens_q"]
        if boundaries is not None:
            if inputs.get("attention_mask") is not None:
                raise ValueError("attention_mask: packed inputs have no padding; leave it out")
            inputs["attention_mask"] = Boundaries(boundaries, given["max_length_q"])
        return super().forward(**inputs)


class PaddedHead(Exchanged):
    """A model with a head whose code makes padded inputs of its encoder's."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run on padded inputs.

        Raises:
            ValueError: inputs are packed.
        """
        if given := [name for name in _BOUNDARY_ARGUMENTS if kwargs.get(name) is not None]:
            raise ValueError(
                f"{given[0]}: packed inputs are refused by {type(self).__name__}, whose code takes "
                "padded ones; give these, or packed ones to the encoder itself"
            )
        return super().forward(*args, **kwargs)


class CausalHead(Exchanged):
    """A language model whose labels are of the next tokens: none is the first of a sequence."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run, without the labels that the last token of another sequence would predict."""
        inputs = _by_name(self, args, kwargs)
        labels, given = inputs.get("labels"), inputs.get("input_ids")
        if given is None:
            given = inputs.get("inputs_embeds")
        if labels is not None and given is not None and given.shape[0] == 1:
            cu_seqlens = inputs.get("cu_seq_lens_q")
            if cu_seqlens is None and inputs.get("attention_mask") is None:
                cu_seqlens, _ = restarts(inputs.get("position_ids")) or (None, None)
            if cu_seqlens is not None:
                # One place more, since sequences without tokens may begin behind the last.
                longer = nn.functional.pad(labels, (0, 1))
                longer = longer.index_fill(1, cu_seqlens[1:].long(), NO_LABEL)
                inputs["labels"] = longer[:, :-1]
        return super().forward(**inputs)


class PaddedEncoder(Exchanged):
    """The module within an encoder that gives the last hidden state, which it pads."""

    def forward(self, *args: Any, packing: Packing | None = None, **kwargs: Any) -> Any:
        """Run on the stream ``[1, T, H]`` and put the hidden states back into the batch."""
        outputs = super().forward(*args, packing=packing, **kwargs)
        if packing is None:
            return outputs
        if isinstance(outputs, Tensor):
            return packing.pad(packing.cleared(outputs))
        outputs.last_hidden_state = packing.pad(packing.cleared(outputs.last_hidden_state))
        return outputs


# ---- families -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """How the models of one ``model_type`` are packed.

    Attributes:
        positions: makes the position ids that a model gives a padded batch, of its embeddings and
            its input ids or embedded inputs.
        encoder: returns the module within a model whose output is the last hidden state, to be
            padded there, since the model goes on with it; None where that is the model's output.
        inputs: arguments ``[B, S]`` or ``[B]`` of the model, besides the usual ones, that are of
            tokens.
        layers: for classes of modules, by name, those that stand in for them.
        model: stands in for the class of the model.
        padded: stands in for the class of ``encoder``, and pads.
        own_attention: whether the model does not look up its attention in transformers' registry,
            so that one of ``layers`` has to be it.
        whole_rows: whether rows that begin with padding are computed whole, since their first place
            sees padding.
        joins_tasks: whether all of its layers see a batch of several tasks token by token, so that
            task gradients of such a batch can be told apart.
        drops_boundaries: whether the code of models with a head hands their encoder no boundaries
            of packed inputs.
        span_logits: name of the linear layer that gives a question answering head's logits.
        span_states: name of the module that makes its inputs of hidden states; None where it takes
            these.
    """

    positions: Callable[[nn.Module, Tensor], Tensor] = read_positions
    encoder: Callable[[Any], nn.Module] | None = attrgetter("encoder")
    inputs: tuple[str, ...] = ()
    layers: Mapping[str, type[Exchanged]] = field(default_factory=dict)
    model: type[PackedModel] = PackedModel
    padded: type[Exchanged] = PaddedEncoder
    own_attention: bool = False
    whole_rows: bool = False
    joins_tasks: bool = True
    drops_boundaries: bool = False
    span_logits: str = "qa_outputs"
    span_states: str | None = None


FAMILIES: dict[str, Family] = {}
"""By ``model_type``; transformers_families.py fills it."""
