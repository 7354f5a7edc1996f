"""Write a trained model as a folder that transformers and sentence-transformers load.

config.json, model.safetensors, tokenizer…   transformers.AutoModel, AutoTokenizer; of a run with a
                                             masked LM AutoModelForMaskedLM
modules.json, 1_Pooling/, …                  sentence_transformers.SentenceTransformer
heads.safetensors                            the task heads, laid out as the model card says
lora/                                        the low-rank updates alone, which PEFT loads
README.md                                    the model card
"""

from os.path import realpath
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..checkpoints.manifest import Progress
from ..models.heads import HeadExport
from ..models.hf_weights import to_huggingface_state
from ..models.multitask import MultitaskModel
from ..models.registry import spec_of
from ..runs.run import Run
from ..utils.errors import InputError
from ..utils.files import explained, whole_folder
from ..utils.json_text import dump_json
from .card_sections import Scores
from .model_card import model_card
from .peft_adapter import write_peft_adapter
from .tokenizer_files import write_tokenizer

# Libraries would put a head of random weights on the encoder, and answer from it.  There is no way
# to refuse, but the errors that these entries lead to name them; encoders do not read them.
_NO_HEAD = (  # without a full stop, which would end the name of a module
    "this export has no classification head (its model card shows how to use its tasks' heads)"
)
_NO_ANSWERS = {
    "id2label": {},  # transformers: a classifier has no labels, unless it is given them
    "label2id": {},
    "function_to_apply": _NO_HEAD,  # pipeline("text-classification"), for a model without labels
    "sentence_transformers": {"activation_fn": f"torch.nn.{_NO_HEAD}"},  # CrossEncoder
}


def write_model_folder(
    run: Run, model: MultitaskModel, progress: Progress, scores: Scores | None, to: Path
) -> None:
    """Write the folder; it appears under its name when it is complete.

    Args:
        run: what was trained.
        model: with the trained weights, low-rank updates merged.
        progress: of the checkpoint that they come from.
        scores: dev scores of that checkpoint, by task, or None.
        to: the folder, new or empty.

    Raises:
        InputError: ``to`` holds something already or cannot be written, or the model has adapters.
    """
    check_free(to)
    check_exportable(run, model)
    with whole_folder(Path(realpath(to))) as folder:
        if run.recipe.lora is not None:
            assert model.lora is None, "the updates are merged"
            write_peft_adapter(folder / "lora", run, model.merged_updates, run.recipe.lora)
        _write_transformers(folder, run, model)
        _write_sentence_transformers(folder, run)
        if run.recipe.tasks:
            save_file(head_tensors(model), folder / "heads.safetensors", head_layout(model))
        card = model_card(run, progress, scores)
        (folder / "README.md").write_text(card, encoding="utf-8")


def check_free(to: Path) -> None:
    """Check that a folder is new or empty.

    Raises:
        InputError: it is not, or cannot be looked into.
    """
    with explained("look into", to):
        real = Path(realpath(to))
        if real.exists() and (not real.is_dir() or any(real.iterdir())):
            raise InputError(f"--to {to}: holds something already; give another folder")


def check_exportable(run: Run, model: MultitaskModel) -> None:
    """Check that other libraries could load an export.

    Raises:
        InputError: the model has adapters.
    """
    if model.adapters:
        raise InputError(
            f"{run.folder}: trained with adapter_width = {run.recipe.adapter_width}; no model of "
            "transformers has adapters, so that no other library could load it"
        )


def head_tensors(model: MultitaskModel) -> dict[str, Tensor]:
    """Return the weights of the heads, ``{task}.{parameter}``, and of ``pair``, their shared layer.

    All are fp32; a head whose score is a similarity itself has none.  Heads of objectives, which
    predict no labels, stay behind.
    """
    state = {
        f"{task}.{name}": tensor
        for task, head in _exported_heads(model).items()
        for name, tensor in head.tensors.items()
    }
    if model.pair is not None:
        state |= {f"pair.{name}": tensor for name, tensor in model.pair.state_dict().items()}
    return {name: tensor.detach().float().cpu().contiguous() for name, tensor in state.items()}


def head_layout(model: MultitaskModel) -> dict[str, str]:
    """Return the metadata of ``heads.safetensors``: a JSON object a task, as the card explains."""
    return {name: dump_json(head.layout) for name, head in _exported_heads(model).items()}


def _exported_heads(model: MultitaskModel) -> dict[str, HeadExport]:
    exported = {name: model.head(name).exported() for name in model.heads}
    return {name: head for name, head in exported.items() if head is not None}


def _write_transformers(folder: Path, run: Run, model: MultitaskModel) -> None:
    encoder = {name: tensor.float().cpu() for name, tensor in model.encoder.state_dict().items()}
    state = to_huggingface_state(encoder, run.config)
    state |= spec_of(run.config).untrained(run.config) | _masked_lm(run, model)
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    known = {"dtype": "float32", "pad_token_id": run.tokenizer.pad_id}
    _write_json(folder / "config.json", run.config.to_huggingface() | known | _NO_ANSWERS)
    write_tokenizer(folder, run)


def _masked_lm(run: Run, model: MultitaskModel) -> dict[str, Tensor]:
    """Return the weights of a run's masked LM, which ``AutoModelForMaskedLM`` finds; often none."""
    if run.masked_lm is None:
        return {}
    weights = model.head(run.masked_lm).to_pretrained().items()
    stored = spec_of(run.config).store_head({name: weight.float() for name, weight in weights})
    return {name: weight.cpu().contiguous() for name, weight in stored.items()}


def _write_sentence_transformers(folder: Path, run: Run) -> None:
    """Write the layout that sentence-transformers has read since its version 2."""
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    _write_json(folder / "modules.json", modules)
    _write_json(
        folder / "sentence_bert_config.json",
        {"max_seq_length": run.max_length, "do_lower_case": False},
    )
    pooling = {
        "word_embedding_dimension": run.config.hidden_size,
        "pooling_mode_cls_token": run.recipe.pooling == "cls",
        "pooling_mode_mean_tokens": run.recipe.pooling == "mean",
        "pooling_mode_max_tokens": False,
        "pooling_mode_mean_sqrt_len_tokens": False,
    }
    (folder / "1_Pooling").mkdir()
    _write_json(folder / "1_Pooling" / "config.json", pooling)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(dump_json(value, indent=2) + "\n", encoding="utf-8")
