"""Write a trained model, or one task of it, as an ONNX graph that serves without torch.

model.onnx       from ``input_ids``, ``attention_mask`` and, where pairs have segments,
                 ``token_type_ids``, int64 [n, T], to sentence vectors or the outputs of a task
config.json      the encoder's shape; with a task the names of its classes
tokenizer.json   the package ``tokenizers`` reads it
README.md        the model card

transformers' model of the same encoder is the one that is traced: ONNX has no packed sequences.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from os.path import realpath
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..checkpoints.manifest import Progress
from ..models.context import Context
from ..models.heads import LinearHead
from ..models.hf_weights import to_huggingface_state
from ..models.multitask import MultitaskModel
from ..models.pooling import pool
from ..models.registry import spec_of
from ..runs.predictor import schema
from ..runs.run import Run
from ..utils.errors import InputError
from ..utils.files import whole_folder
from ..utils.json_text import dump_json
from .card_sections import Scores
from .folder import check_exportable, check_free
from .onnx_card import onnx_card
from .task_folder import label_entries, linear_head
from .tokenizer_files import write_tokenizer

_PACKAGES = ("onnx", "onnxruntime", "onnxscript", "transformers")
_INPUTS = ("input_ids", "attention_mask", "token_type_ids")
_MOST_BYTES = (1 << 31) - (1 << 26)
"""A file of protocol buffers has at most 2 GiB; the rest is for the graph without its weights."""
_TOLERANCE = 1e-4
"""Of the check, relative to the largest output, or to 1."""


def check_packages() -> None:
    """Check that the packages that make and check a graph are installed.

    Raises:
        InputError: some are not.
    """
    missing = [name for name in _PACKAGES if find_spec(name) is None]
    if missing:
        raise InputError(f"--onnx needs {', '.join(missing)}; pip install {' '.join(missing)}")


def write_onnx_folder(
    run: Run,
    model: MultitaskModel,
    task: str | None,
    progress: Progress,
    scores: Scores | None,
    to: Path,
) -> None:
    """Write the folder; it appears under its name when it is complete.

    Args:
        run: what was trained.
        model: with the trained weights, fp32, on the CPU.
        task: one of the run's tasks; None for sentence vectors.
        progress: of the checkpoint that they come from.
        scores: dev scores of that checkpoint, by task, or None.
        to: the folder, new or empty.

    Raises:
        InputError: a package is missing, there is no such task, its head is more than a linear
            layer, the model is too large or has adapters, ``to`` holds something already or cannot
            be written, or the graph does not compute what the engine does.
    """
    check_packages()
    check_free(to)
    check_exportable(run, model)
    head = None if task is None else linear_head(run, model, task)
    served = _Served(_padded_encoder(run, model), run.recipe.pooling, head).eval()
    if sum(weight.nbytes for weight in served.parameters()) > _MOST_BYTES:
        raise InputError(
            f"{run.folder}: its weights take more than 2 GiB, which one ONNX file holds"
        )
    inputs = _INPUTS if _has_segments(run, task) else _INPUTS[:2]
    output = "sentence_embedding" if head is None else "logits"
    with whole_folder(Path(realpath(to))) as folder:
        _write_graph(folder / "model.onnx", served, inputs, output)
        _check_graph(folder / "model.onnx", run, model, head, inputs)
        config = run.config.to_huggingface() | {"pad_token_id": run.tokenizer.pad_id}
        if task is not None and head is not None:
            config |= label_entries(run, task, head)
        text = dump_json(config, indent=2) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
        write_tokenizer(folder, run)
        card = onnx_card(run, task, head, inputs, progress, scores)
        (folder / "README.md").write_text(card, encoding="utf-8")


def _has_segments(run: Run, task: str | None) -> bool:
    """Return whether a graph tells the sentences of a pair apart."""
    is_pair = task is not None and len(schema(run, task).sentences) == 2
    return is_pair and spec_of(run.config).has_token_types and run.tokenizer.pair_separators == 1


def _padded_encoder(run: Run, model: MultitaskModel) -> nn.Module:
    """Return transformers' encoder with the trained weights.

    Raises:
        InputError: transformers has none of this type.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModel

    entries = run.config.to_huggingface()
    model_type = entries.pop("model_type")
    if model_type not in CONFIG_MAPPING:
        raise InputError(
            f"{run.folder}: an encoder of type {model_type}, which transformers lacks, and so "
            "--onnx; export without it"
        )
    config = AutoConfig.for_model(model_type, **entries, attn_implementation="eager")
    encoder: nn.Module = AutoModel.from_config(config)
    state = {name: tensor.float().cpu() for name, tensor in model.encoder.state_dict().items()}
    untrained = spec_of(run.config).untrained(run.config)
    encoder.load_state_dict(to_huggingface_state(state, run.config) | untrained)
    return encoder


class _Served(nn.Module):
    """What a graph computes of padded sequences."""

    def __init__(self, encoder: nn.Module, pooling: str, head: LinearHead | None) -> None:
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.reads_tokens = head is not None and head.reads_tokens
        self.share_of = None if head is None else head.share_of
        self.output = None
        if head is not None:
            self.output = nn.Linear(head.weight.shape[1], len(head.bias))
            self.output.load_state_dict({"weight": head.weight, "bias": head.bias})

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> Tensor:
        """Map ``[n, T]`` to vectors ``[n, H]``, or outputs ``[n, L]`` or ``[n, T, L]``."""
        segments = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        found = self.encoder(input_ids=input_ids, attention_mask=attention_mask, **segments)
        hidden: Tensor = found.last_hidden_state
        if not self.reads_tokens:
            if self.pooling == "cls":
                hidden = hidden[:, 0]
            else:
                mask = attention_mask[:, :, None].to(hidden.dtype)
                hidden = (hidden * mask).sum(1) / mask.sum(1)
        return self.scored(hidden)

    def scored(self, read: Tensor) -> Tensor:
        """Return the outputs of what the head reads."""
        if self.output is None:
            return read
        scores: Tensor = self.output(read)
        if self.share_of is None:
            return scores
        low, high = self.share_of
        return low + (high - low) * scores.sigmoid()


def _write_graph(path: Path, served: _Served, inputs: Sequence[str], output: str) -> None:
    """Trace a model and write its graph, for any number of sequences of any length."""
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence")
    example = tuple(torch.ones(2, 6, dtype=torch.int64) for _ in inputs)
    with _quiet():
        program = torch.onnx.export(
            served,
            example,
            dynamo=True,
            verbose=False,
            input_names=inputs,
            output_names=[output],
            dynamic_shapes=tuple({0: batch, 1: sequence} for _ in inputs),
        )
        assert program is not None
        ClearMetadataAndDocStringPass()(program.model)  # paths of the code that was traced
        program.save(path, external_data=False)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch says about its own exporter from the user."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check_graph(
    path: Path,
    run: Run,
    model: MultitaskModel,
    head: LinearHead | None,
    inputs: Sequence[str],
) -> None:
    """Hold a graph's outputs against the engine's, on sequences of random tokens.

    Raises:
        InputError: they differ.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    rest = _Served(nn.Identity(), run.recipe.pooling, head)
    longest = min(run.max_length, 96)
    for lengths in ([3], [longest, 1, max(1, longest // 2)]):
        given, packed = _random_batch(run, lengths, has_segments="token_type_ids" in inputs)
        (found,) = session.run(None, {name: given[name].numpy() for name in inputs})
        with torch.inference_mode():
            hidden = model.encoder(packed[0], packed[1])
            if head is None or not head.reads_tokens:
                expected = rest.scored(pool(hidden, packed[1].cu_seqlens, run.recipe.pooling))
            else:
                expected = rest.scored(hidden)
                found = found[given["attention_mask"].bool().numpy()]
        difference = float(np.abs(found - expected.numpy()).max())
        if not difference <= _TOLERANCE * max(1.0, float(expected.abs().max())):
            raise InputError(
                f"{run.folder}: outputs of the ONNX graph differ from the engine's by "
                f"{difference:.1e}; report it, with the versions of torch and onnxscript"
            )


def _random_batch(
    run: Run, lengths: Sequence[int], *, has_segments: bool
) -> tuple[dict[str, Tensor], tuple[Tensor, Context]]:
    """Return sequences of random tokens, padded, and the same packed."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(lengths), max(lengths))
    place = torch.arange(shape[1]).expand(shape)
    mask = place < torch.tensor(lengths)[:, None]
    ids = torch.randint(run.tokenizer.vocab_size, shape, generator=generator)
    ids = ids.where(mask, run.tokenizer.pad_id)
    types = (place > 2).long() * mask if has_segments else torch.zeros(shape, dtype=torch.int64)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    context = Context(
        cu_seqlens=offsets.int(),
        max_seqlen=max(lengths),
        position_ids=place[mask],
        token_type_ids=types[mask],
    )
    given: dict[str, Any] = dict(zip(_INPUTS, (ids, mask.long(), types), strict=True))
    return given, (ids[mask], context)
