"""The encoder against transformers' BertModel, on a pretrained model and real sentences."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from engine.data.collate import PackedBatch, pack
from engine.data.split import TokenizedSplit, tokenize
from engine.data.table import read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from engine.models import hf_weights
from engine.models.bert import BertEncoder
from engine.models.context import Context

transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def split(real_data: Path, real_encoder: Path) -> TokenizedSplit:
    form = FORMATS["cfimdb"]  # reviews: from a few tokens to more than 400
    table = read_table(form.file(real_data, "dev"), form)
    return tokenize("cfimdb", table, Tokenizer.load(real_encoder), 512)


@pytest.fixture(scope="module")
def encoder(real_encoder: Path) -> BertEncoder:
    config = hf_weights.read_config(real_encoder)
    encoder = BertEncoder(config).eval()
    encoder.load_state_dict(hf_weights.load_encoder_state(real_encoder, config))
    return encoder


@pytest.fixture(scope="module")
def bert(real_encoder: Path) -> torch.nn.Module:
    return transformers.BertModel.from_pretrained(real_encoder, add_pooling_layer=False).eval()


def mixed_batch(split: TokenizedSplit) -> PackedBatch:
    """The shortest, the longest, and a dozen sentences between."""
    order = split.lengths.argsort()
    picks = order[[0, 1, *range(10, len(order), len(order) // 12), -1]]
    return pack([split], [picks])


def padded(batch: PackedBatch) -> tuple[Tensor, Tensor]:
    """Input ids and attention mask ``[S, L]`` of a packed batch."""
    lengths = batch.cu_seqlens.diff().tolist()
    ids = torch.nn.utils.rnn.pad_sequence(list(batch.input_ids.split(lengths)), batch_first=True)
    mask = torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]
    return ids, mask


def test_hidden_states_agree_with_transformers(encoder, bert, split):
    batch = mixed_batch(split)
    ids, mask = padded(batch)
    with torch.no_grad():
        theirs = bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask]
        ours = encoder(batch.input_ids, Context.of(batch))
    assert batch.max_seqlen > 300
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_gradients_agree_with_transformers(encoder, bert, split):
    """Both differentiate the same random projection of the hidden states."""
    batch = mixed_batch(split)
    ids, mask = padded(batch)
    projection = torch.randn(batch.num_tokens, encoder.config.hidden_size)
    encoder.zero_grad()
    bert.zero_grad()
    (encoder(batch.input_ids, Context.of(batch)) * projection).sum().backward()
    (
        bert(input_ids=ids, attention_mask=mask.long()).last_hidden_state[mask] * projection
    ).sum().backward()

    ours = hf_weights.to_huggingface_state(
        {name: p.grad for name, p in encoder.named_parameters()}, encoder.config
    )
    theirs = {name: p.grad for name, p in bert.named_parameters() if p.grad is not None}
    assert ours.keys() == theirs.keys()
    for name, gradient in theirs.items():
        if name.endswith("key.bias"):
            # Zero in exact arithmetic: a shift of every score of a row leaves softmax as it is.
            scale = theirs[name.replace("key", "query")].norm()
        else:
            scale = gradient.norm()
        assert (ours[name] - gradient).norm() <= 1e-4 * scale, name


def test_weights_survive_the_way_out_and_in(encoder, real_encoder, tmp_path):
    from safetensors.torch import save_file

    state = encoder.state_dict()
    (tmp_path / "config.json").write_text((real_encoder / "config.json").read_text())
    save_file(
        {
            f"bert.{name}": tensor
            for name, tensor in hf_weights.to_huggingface_state(state, encoder.config).items()
        },
        tmp_path / "model.safetensors",
    )
    again = hf_weights.load_encoder_state(tmp_path, hf_weights.read_config(tmp_path))
    assert again.keys() == state.keys()
    assert all(torch.equal(again[name], state[name]) for name in state)
