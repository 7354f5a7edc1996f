"""Write a run's tokenizer so that other libraries frame sentences and pairs as the engine does."""

from pathlib import Path
from typing import Any

from ..data.tokenizer import Tokenizer
from ..models.registry import spec_of
from ..runs.run import Run
from ..utils.json_text import dump_json
from ..utils.untrusted_io import parse_json


def write_tokenizer(folder: Path, run: Run) -> None:
    """Write ``tokenizer.json`` and its settings.

    The engine puts [CLS] and [SEP] around sentences itself, whatever the folder that the tokenizer
    came from said; other libraries do what ``tokenizer.json`` says.
    """
    run.tokenizer.save(folder)
    content = parse_json(run.tokenizer.to_json())
    framed = _framed(content.get("post_processor"), run.tokenizer)
    if framed != content.get("post_processor"):
        whole = dump_json(content | {"post_processor": framed}) + "\n"
        (folder / "tokenizer.json").write_text(whole, encoding="utf-8")
    settings = run.tokenizer.settings | {"model_max_length": run.max_length}
    if not spec_of(run.config).has_token_types:
        settings["model_input_names"] = ["input_ids", "attention_mask"]
    text = dump_json(settings, indent=2) + "\n"
    (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")


def _framed(processor: Any, tokenizer: Tokenizer) -> Any:
    """Return a post-processor that frames as the engine does: the same if it does so already.

    Args:
        processor: of ``tokenizer.json``, of any kind, or None.
        tokenizer: of the run.
    """
    wanted = _template(tokenizer)
    if not isinstance(processor, dict):
        return wanted
    kind = processor.get("type")
    if kind in ("BertProcessing", "RobertaProcessing"):
        separators = 1 if kind == "BertProcessing" else 2
        tokens = {"cls": tokenizer.cls_id, "sep": tokenizer.sep_id}
        if separators == tokenizer.pair_separators and all(
            processor.get(name, [None, None])[1] == number for name, number in tokens.items()
        ):
            return processor
    if kind == "TemplateProcessing":
        same = all(processor.get(part) == wanted[part] for part in ("single", "pair"))
        return processor if same and _numbers(processor) == _numbers(wanted) else wanted
    if kind == "Sequence":
        others = [p for p in processor.get("processors", ()) if p.get("type") == "ByteLevel"]
        templates = [p for p in processor.get("processors", ()) if p not in others]
        if len(templates) == 1 and _framed(templates[0], tokenizer) == templates[0]:
            return processor
        return {"type": "Sequence", "processors": [*others, wanted]}
    if kind in ("ByteLevel", "RobertaProcessing"):  # these also move the offsets of tokens
        offsets = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
        given = {name: processor[name] for name in offsets if name in processor}
        byte_level = {"type": "ByteLevel", **offsets, **given}
        return {"type": "Sequence", "processors": [byte_level, wanted]}
    return wanted


def _template(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return ``[CLS] A [SEP]`` and ``[CLS] A [SEP] B [SEP]``, as the engine joins pairs."""
    separators = tokenizer.pair_separators
    second = 1 if separators == 1 else 0
    _, _, first, last, _ = tokenizer.special_tokens

    def token(name: str, segment: int = 0) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": segment}}

    def sentence(name: str, segment: int = 0) -> dict[str, Any]:
        return {"Sequence": {"id": name, "type_id": segment}}

    ids = {first: tokenizer.cls_id, last: tokenizer.sep_id}
    return {
        "type": "TemplateProcessing",
        "single": [token(first), sentence("A"), token(last)],
        "pair": [
            *(token(first), sentence("A"), *[token(last)] * separators),
            *(sentence("B", second), token(last, second)),
        ],
        "special_tokens": {
            name: {"id": name, "ids": [number], "tokens": [name]} for name, number in ids.items()
        },
    }


def _numbers(template: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers of the special tokens that a template uses."""
    used = {part["SpecialToken"]["id"] for part in template["single"] if "SpecialToken" in part}
    known = template.get("special_tokens", {})
    return {name: known[name]["ids"] for name in used if name in known}
