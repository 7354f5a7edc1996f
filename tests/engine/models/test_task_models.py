"""Weights of transformers' heads that stand for one linear layer compute it, in every dtype."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ElectraConfig, ModernBertConfig
from transformers.models.electra.modeling_electra import ElectraClassificationHead
from transformers.models.modernbert.modeling_modernbert import ModernBertPredictionHead

from engine.models import bert, modernbert
from engine.models.bert_tasks import bert_task
from engine.models.config import EncoderConfig
from engine.models.heads import LinearHead
from engine.models.modernbert_tasks import modernbert_task
from engine.models.task_model import TaskModel
from engine.utils.errors import InputError

SHAPE = {"vocab_size": 9, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 4}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One label, a few, and as many as fit, at the widths of MiniLM, and of a tiny one with an odd rest.
SIZES = [(384, 1), (384, 5), (384, 191), (9, 3)]


def linear_head(width: int, outputs: int) -> LinearHead:
    torch.manual_seed(0)
    weight, bias = torch.randn(outputs, width) / width**0.5, torch.randn(outputs)
    return LinearHead(weight, bias, "single_label_classification")


def encoder(kind: str, width: int, **fields: bool) -> EncoderConfig:
    config = bert.BertConfig if kind == "electra" else modernbert.ModernBertConfig
    # An odd width has no rotary pairs; only the heads are built here.
    if kind == "modernbert" and width % 2:
        width += 1
    return config(hidden_size=width, **SHAPE, **fields)


def head_of(kind: str, made: TaskModel, width: int, outputs: int, norm_bias: bool) -> nn.Module:
    """transformers' head with the weights that were found for it."""
    sizes = {"hidden_size": width, "num_labels": outputs, "classifier_dropout": 0.0}
    if kind == "electra":
        model = nn.ModuleDict({"classifier": ElectraClassificationHead(ElectraConfig(**sizes))})
    else:
        entries = {"classifier_activation": "linear", "classifier_bias": True}
        config = ModernBertConfig(**sizes, **entries, norm_bias=norm_bias)
        head = ModernBertPredictionHead(config)
        model = nn.ModuleDict({"head": head, "classifier": nn.Linear(width, outputs)})
    model.load_state_dict(dict(made.head))
    return model.eval()


def run(kind: str, model: nn.Module, x: Tensor) -> Tensor:
    if kind == "electra":
        return model["classifier"](x[:, None])
    return model["classifier"](model["head"](x))


# Roundings of a logit on its way: of both halves gelu's (erf, a sum, a product) or the norm's (the
# mean's subtraction, the root, its weight, two products), and that of their sum.
ROUNDINGS = {"electra": 7, "modernbert": 11}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("width", "outputs"), SIZES)
@pytest.mark.parametrize("kind", ["electra", "modernbert"])
def test_they_add_a_rounding_for_each_operation(kind, width, outputs, dtype) -> None:
    config = encoder(kind, width)
    width = config.hidden_size
    outputs = min(outputs, (width - 2) // 2) if kind == "modernbert" else outputs
    head = linear_head(width, outputs)
    head = head._replace(weight=head.weight.to(dtype).float(), bias=head.bias.to(dtype).float())
    make = bert_task if kind == "electra" else modernbert_task
    made = make(config, head, "cls", 0.0)
    model = head_of(kind, made, width, outputs, norm_bias=False).to(dtype)
    for scale in (1e-2, 1.0, 30.0):  # small, ordinary and large states
        x = (scale * torch.randn(64, width)).to(dtype)
        exact = F.linear(x.double(), head.weight.double(), head.bias.double())
        with torch.inference_mode():
            found = run(kind, model, x).double()
            plain = F.linear(x, head.weight.to(dtype), head.bias.to(dtype)).double()
        largest, constants = exact.abs().max(), 2 * ((width - 2 * outputs) // 2)
        allowed = (plain - exact).abs().max()
        allowed += ROUNDINGS[kind] * torch.finfo(dtype).eps / 2 * largest
        if kind == "modernbert":  # what the logits add to the variance
            allowed += largest * exact.square().sum(1).max() / (constants * 2.0**30)
        error = (found - exact).abs().max()
        assert error <= allowed, f"{scale}: {error:.3e} against {allowed:.3e}"


def test_a_norm_with_a_bias() -> None:
    config, head = encoder("modernbert", 32, norm_bias=True), linear_head(32, 3)
    model = head_of("modernbert", modernbert_task(config, head, "mean", 0.0), 32, 3, norm_bias=True)
    x = torch.randn(5, 32)
    torch.testing.assert_close(run("modernbert", model, x), F.linear(x, head.weight, head.bias))


def test_a_bert_of_more_labels_than_fit_has_a_class_of_its_own() -> None:
    config = encoder("electra", 32)
    assert not bert_task(config, linear_head(32, 16), "cls", 0.1).code
    made = bert_task(config, linear_head(32, 17), "cls", 0.1)
    assert [*made.code] == ["modeling_pooled_bert.py"]
    assert made.config["classifier_pooling"] == "cls"


def test_a_modernbert_of_more_labels_than_fit_is_refused() -> None:
    config = encoder("modernbert", 32)
    modernbert_task(config, linear_head(32, 15), "cls", 0.1)
    with pytest.raises(InputError, match="its 16 outputs are more than 15"):
        modernbert_task(config, linear_head(32, 16), "cls", 0.1)
