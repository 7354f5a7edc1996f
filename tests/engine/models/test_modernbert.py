"""ModernBERT trains as K plain backward passes do, computes what transformers' does, and is stored.

No pretrained ModernBERT is at hand: weights are random, folders laid out as the published ones.
"""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import (
    AddedToken,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers import Tokenizer as Backend

from engine import export, train
from engine.data.demo import write_demo
from engine.data.split import tokenize
from engine.data.table import Table, read_table
from engine.data.task_schema import FORMATS
from engine.data.tokenizer import Tokenizer
from engine.fill import likeliest
from engine.models import hf_weights
from engine.models.modernbert import (
    FULL,
    SLIDING,
    ModernBertConfig,
    ModernBertEncoder,
    RopeTheta,
)
from engine.runs.run import open_run
from engine.utils.errors import InputError
from tests.engine.conftest import SHORT

from . import encoder_cases as cases

# transformers and sentence-transformers warn of what they deprecate themselves.
pytestmark = pytest.mark.filterwarnings("ignore")

CASE = cases.EncoderCase(
    config=ModernBertConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=4,  # full, two of windows, full
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        initializer_range=0.2,
        local_attention=8,  # shorter than the sentences
    ),
    stages=("embeddings", "layers.0", "layers.1", "layers.2", "layers.3", "final_norm"),
    tables=("embeddings.word",),
)


@cases.every_training_variant
def test_steps_equal_the_plain_way(variant):
    cases.assert_steps_equal_the_plain_way(CASE, variant)


def test_no_gradient_row_lingers():
    cases.assert_no_gradient_row_lingers(CASE)


def test_dropouts_have_ids_of_their_own():
    cases.assert_dropouts_have_ids_of_their_own(CASE)


def test_exported_as_it_was_read(tmp_path):
    folder = cases.write_folder(CASE, tmp_path / "model")
    cases.assert_exported_as_it_was_read(CASE, folder, tmp_path)


def write_transformers(folder: Path, **changed: Any) -> Path:
    """Write a folder of transformers' own model, of the case's shape but for ``changed``."""
    config = transformers.ModernBertConfig(**CASE.config.to_huggingface() | changed)
    return cases.write_folder(CASE, folder, transformers.ModernBertModel(config))


@pytest.mark.parametrize(
    "changed",
    [
        {},
        {"norm_bias": True, "attention_bias": True, "mlp_bias": True},
        {"layer_types": [SLIDING, FULL, SLIDING, SLIDING], "local_attention": 9},
        {"local_attention": 1},  # each token sees itself
        {
            "rope_parameters": {
                FULL: {"rope_type": "default", "rope_theta": 500.0},
                SLIDING: {"rope_type": "default", "rope_theta": 20.0},
            }
        },
    ],
    ids=["published", "biases", "layers", "narrowest", "angles"],
)
def test_agrees_with_transformers(tmp_path, changed):
    cases.assert_agrees_with_transformers(write_transformers(tmp_path / "model", **changed))


# config.json of ModernBERT-base, as it was published with transformers 4.48, and its other sizes.
PUBLISHED = {
    "architectures": ["ModernBertForMaskedLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 50281,
    "classifier_activation": "gelu",
    "classifier_bias": False,
    "classifier_dropout": 0.0,
    "classifier_pooling": "mean",
    "cls_token_id": 50281,
    "decoder_bias": True,
    "deterministic_flash_attn": False,
    "embedding_dropout": 0.0,
    "eos_token_id": 50282,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "gradient_checkpointing": False,
    "hidden_activation": "gelu",
    "hidden_size": 768,
    "initializer_cutoff_factor": 2.0,
    "initializer_range": 0.02,
    "intermediate_size": 1152,
    "layer_norm_eps": 1e-05,
    "local_attention": 128,
    "local_rope_theta": 10000.0,
    "max_position_embeddings": 8192,
    "mlp_bias": False,
    "mlp_dropout": 0.0,
    "model_type": "modernbert",
    "norm_bias": False,
    "norm_eps": 1e-05,
    "num_attention_heads": 12,
    "num_hidden_layers": 22,
    "pad_token_id": 50283,
    "position_embedding_type": "absolute",
    "sep_token_id": 50282,
    "tie_word_embeddings": True,
    "torch_dtype": "float32",
    "transformers_version": "4.47.0.dev0",
    "vocab_size": 50368,
}
LARGE = {"hidden_size": 1024, "intermediate_size": 2624, "num_hidden_layers": 28}
LARGE |= {"num_attention_heads": 16}
ONE_BASE = {"local_rope_theta": 160_000.0}  # as mmBERT has


@pytest.mark.parametrize("changed", [{}, LARGE, ONE_BASE], ids=["base", "large", "one-base"])
def test_the_published_config_in_both_forms(changed):
    """Transformers 5 reads the older form as this engine does, and so it does what it writes."""
    older = PUBLISHED | changed
    newer = transformers.ModernBertConfig(**older).to_dict()
    assert "global_rope_theta" not in newer
    config = ModernBertConfig.from_huggingface(older)
    assert config == ModernBertConfig.from_huggingface(newer)
    assert config.layer_types[:5] == (FULL, SLIDING, SLIDING, FULL, SLIDING)
    assert (config.layer_norm_eps, config.local_attention) == (1e-5, 128)
    assert config.rope_theta == RopeTheta(160_000.0, older["local_rope_theta"])
    written = config.to_huggingface()
    assert {**PUBLISHED, **changed}.items() >= {
        name: written[name] for name in written.keys() & PUBLISHED.keys() - CHANGED_BY_EXPORT
    }.items()
    assert ModernBertConfig.from_huggingface(written) == config
    again = transformers.ModernBertConfig(**written).to_dict()
    assert {name: again[name] for name in SHAPE} == {name: newer[name] for name in SHAPE}


# Numbers of special tokens are the tokenizer's; the export writes that of padding.
CHANGED_BY_EXPORT = {
    "architectures",
    *(f"{role}_token_id" for role in ["pad", "bos", "eos", "cls", "sep"]),
}
SHAPE = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "layer_types"),
    *("num_attention_heads", "hidden_activation", "max_position_embeddings", "norm_eps"),
    *("norm_bias", "attention_bias", "mlp_bias", "classifier_bias", "local_attention"),
    *("rope_parameters", "attention_dropout", "mlp_dropout"),
)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_activation": "gelu_new"}, "hidden_activation = 'gelu_new': expected 'gelu'"),
        ({"mlp_dropout": 0.1}, "embedding_dropout = 0.0, mlp_dropout = 0.1: expected the same"),
        ({"layer_types": "full_attention"}, "layer_types = 'full_attention': expected a list"),
        ({"layer_types": [FULL]}, "expected num_hidden_layers = 22 of them, got 1"),
        ({"layer_types": ["chunked"] * 22}, "expected full_attention and sliding_attention, got"),
        ({"global_attn_every_n_layers": 0}, "global_attn_every_n_layers = 0: expected a whole"),
        ({"global_rope_theta": -1.0}, "rope_theta of full_attention = -1.0: expected a positive"),
        ({"local_rope_theta": None}, "rope_theta of sliding_attention = None: expected a positive"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_scaling = {'type': 'yarn'}: expected none"),
        ({"rope_parameters": [1]}, r"rope_parameters = [1]: expected a table for each kind"),
        (
            {"rope_parameters": {FULL: {"rope_type": "yarn", "factor": 4.0}}},
            "rope_parameters.full_attention.rope_type = 'yarn': expected 'default'",
        ),
        ({"norm_bias": "no"}, "norm_bias = 'no': expected true or false"),
        ({"local_attention": -1}, "local_attention = -1: expected a whole number from 1"),
        ({"num_hidden_layers": 0}, "num_hidden_layers = 0: expected a whole number from 1"),
        ({"num_hidden_layers": "22"}, "num_hidden_layers = '22': expected a whole number"),
        ({"num_attention_heads": 256}, "hidden_size / num_attention_heads = 3: expected an even"),
        ({"max_position_embeddings": 1 << 30}, "max_position_embeddings = 1073741824: expected at"),
        ({"initializer_cutoff_factor": 0}, "initializer_cutoff_factor = 0: expected a positive"),
    ],
)
def test_configs_that_are_refused(changed, message):
    with pytest.raises(InputError, match=re.escape(message)):
        ModernBertConfig.from_huggingface(PUBLISHED | changed)


def test_mixed_lengths_up_to_8192_agree_with_transformers(tmp_path):
    """Lengths around the window of 64 to each side, around tiles, and the longest.

    Hidden states to 1e-5, each gradient to 1e-4 of its largest value.
    """
    folder = write_transformers(
        tmp_path / "model", local_attention=128, max_position_embeddings=8192
    )
    config = hf_weights.read_config(folder)
    theirs = transformers.AutoModel.from_pretrained(folder, attn_implementation="sdpa").eval()
    encoder = ModernBertEncoder(config).eval()
    encoder.load_state_dict(hf_weights.load_encoder_state(folder, config))
    lengths = (1, 2, 64, 65, 66, 129, 130, 8192, 257, 700)
    ids, context = cases.packed(lengths, config, seed=3)
    ids = ids.clamp(min=1)  # transformers gives padding no gradient
    projection = torch.randn(len(ids), config.hidden_size) / len(ids)
    hidden = encoder(ids, context)
    (hidden * projection).sum().backward()
    for own, rows, states in zip(
        ids.split(lengths), projection.split(lengths), hidden.split(lengths), strict=True
    ):
        expected = theirs(input_ids=own[None]).last_hidden_state[0]
        (expected * rows).sum().backward()
        assert (states - expected).abs().max() <= 1e-5, len(own)
    gradients = {name: p.grad for name, p in encoder.named_parameters()}
    found = hf_weights.to_huggingface_state(gradients, config)
    for name, parameter in theirs.named_parameters():
        scale = parameter.grad.abs().max()
        assert (found[name] - parameter.grad).abs().max() <= 1e-4 * scale, name


def byte_pairs(texts: list[str]) -> Backend:
    """A tokenizer as ModernBERT's: special tokens behind the others, runs of spaces among them."""
    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(texts, trainer)
    backend.add_tokens([AddedToken("  ", normalized=True), AddedToken("|||IP_ADDRESS|||")])
    tokens = [AddedToken(name, special=True) for name in ("[UNK]", "[CLS]", "[SEP]", "[PAD]")]
    backend.add_special_tokens([*tokens, AddedToken("[MASK]", lstrip=True, special=True)])
    return with_template(backend, "[CLS]", "[SEP]")


def multilingual(texts: list[str]) -> Backend:
    """A tokenizer as mmBERT's, which is Gemma's: spaces are letters, the rest falls to bytes."""
    backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Replace(" ", "▁")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps)
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    of_bytes = [f"<0x{number:02X}>" for number in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=[*special, *of_bytes], show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return with_template(backend, "<bos>", "<eos>")


def with_template(backend: Backend, first: str, last: str) -> Backend:
    backend.post_processor = processors.TemplateProcessing(
        single=f"{first} $A {last}",
        pair=f"{first} $A {last} $B {last}",
        special_tokens=[(name, backend.token_to_id(name)) for name in (first, last)],
    )
    return backend


TOKENIZERS = {
    "modernbert": (byte_pairs, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")),
    "mmbert": (multilingual, ("<pad>", "<unk>", "<bos>", "<eos>", "<mask>")),
}


@pytest.fixture(params=TOKENIZERS)
def tokenizer_folder(request, tmp_path, texts) -> Path:
    """A folder of ``ModernBertForMaskedLM`` with a tokenizer of one of both kinds."""
    build, names = TOKENIZERS[request.param]
    backend = build(texts)
    roles = dict(zip(("pad", "unk", "cls", "sep", "mask"), names, strict=True))
    if request.param == "mmbert":
        roles["bos"], roles["eos"] = roles.pop("cls"), roles.pop("sep")
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, **{f"{role}_token": name for role, name in roles.items()}
    )
    folder = tmp_path / request.param
    config = transformers.ModernBertConfig(
        **CASE.config.to_huggingface()
        | {"vocab_size": backend.get_vocab_size(), "pad_token_id": backend.token_to_id(names[0])}
    )
    torch.manual_seed(0)
    model = transformers.ModernBertForMaskedLM(config)
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder)
    form = FORMATS["sst"]
    return read_table(form.file(folder, "train"), form).sentences[0]


def test_token_ids_are_those_of_transformers(tokenizer_folder, texts):
    tokenizer = Tokenizer.load(tokenizer_folder)
    assert tokenizer.special_tokens == TOKENIZERS[tokenizer_folder.name][1]
    theirs = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    first = [*texts[:20], "  two  spaces ", "naïve café 東京 \U0001f600", "of |||IP_ADDRESS|||"]
    second = [*texts[20:41], "e\u0301", "\t"]
    limit = 24
    expected = theirs(first, truncation=True, max_length=limit)["input_ids"]
    found = tokenizer.encode(first, limit)
    rows = np.split(found.tokens, found.offsets[1:-1])
    assert [row.tolist() for row in rows] == expected
    pairs = theirs(first, second, truncation="longest_first", max_length=limit)["input_ids"]
    table = Table(["-"] * len(first), (first, second), None)
    joined = tokenize("quora", table, tokenizer, limit, joins_pairs=True)
    rows = np.split(joined.tokens, joined.offsets[1:-1])
    assert [row.tolist() for row in rows] == pairs


def test_masked_lm_comes_in_and_goes_out(tokenizer_folder, texts, tmp_path):
    """The head goes on where the model's ended, and transformers finds it in the export."""
    run_folder, to = tmp_path / "run", tmp_path / "export"
    arguments = ["superbert", "--init", str(tokenizer_folder), "--out", str(run_folder)]
    assert train.main([*arguments, "--max-steps", "2", "--set", *SHORT]) == 0
    assert export.main([str(run_folder), "--to", str(to)]) == 0
    run = open_run(run_folder)
    mask = run.tokenizer.special_tokens[-1]
    ids = torch.tensor([run.tokenizer.encode([f"{texts[0]} {mask} {texts[1]}"], 64).tokens]).long()
    (place,) = (ids[0] == run.tokenizer.mask_id).nonzero()
    trained, _ = run.trained_model(cases.CPU, torch.float32)
    for model, folder in ((run.initial_model().eval(), tokenizer_folder), (trained, to)):
        theirs, report = transformers.AutoModelForMaskedLM.from_pretrained(
            folder, output_loading_info=True
        )
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        with torch.inference_mode():
            shares = theirs.eval()(ids).logits[0, place.item()].softmax(0)
        sentence = f"{texts[0]} [MASK] {texts[1]}"
        for word, share in likeliest(model, "masked_lm", run.tokenizer, sentence, 3):
            assert share == pytest.approx(shares[run.tokenizer.token_to_id(word)].item(), abs=1e-5)
    assert "answers from the head of objective masked" in (to / "README.md").read_text()
    encoder, report = transformers.AutoModel.from_pretrained(to, output_loading_info=True)
    assert isinstance(encoder, transformers.ModernBertModel)
    assert not report["missing_keys"]
    assert sorted(report["unexpected_keys"]) == [
        "decoder.bias",
        "head.dense.weight",
        "head.norm.weight",
    ]
    vectors = SentenceTransformer(str(to), device="cpu").encode(texts[:4])
    given = transformers.AutoTokenizer.from_pretrained(to)(
        texts[:4], return_tensors="pt", padding=True
    )
    seen = given["attention_mask"][..., None]
    with torch.inference_mode():
        states = encoder.eval()(**given).last_hidden_state
    means = (states * seen).sum(1) / seen.sum(1)
    assert np.abs(vectors - means.numpy()).max() < 1e-5


def test_trains_from_scratch(tmp_path):
    run, to = tmp_path / "run", tmp_path / "export"
    settings = [*SHORT, "encoder.model_type=modernbert", "encoder.num_hidden_layers=4"]
    arguments = ["demo", "--out", str(run), "--max-steps", "3", "--set", *settings]
    assert train.main(arguments) == 0
    config = open_run(run).config
    assert isinstance(config, ModernBertConfig)
    assert config.layer_types == (FULL, SLIDING, SLIDING, FULL)
    assert export.main([str(run), "--to", str(to)]) == 0
    theirs, report = transformers.AutoModel.from_pretrained(to, output_loading_info=True)
    assert isinstance(theirs, transformers.ModernBertModel)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]


def test_initial_weights_are_those_of_the_paper():
    """Cut off at two standard deviations; outputs, which add up over layers, are smaller."""
    torch.manual_seed(0)
    config = CASE.config.changed(hidden_size=256, initializer_range=0.02)
    state = ModernBertEncoder(config).state_dict()
    for name, std in {
        "embeddings.word": 0.02,
        "layers.1.qkv": 0.02,
        "layers.1.gated": 0.02,
        "layers.1.attention_output": 0.02 / math.sqrt(2 * 4),
        "layers.1.output": 0.02 / math.sqrt(2 * 4),
    }.items():
        weight = state[f"{name}.weight"]
        assert weight.abs().max() <= 2 * std
        # Of a normal distribution cut off at two standard deviations, 0.880 of the whole one's.
        assert weight.std() == pytest.approx(0.880 * std, rel=0.03)


def test_a_tokens_window_is_what_the_layer_says():
    """In one sliding layer a changed token changes those within the window, and no others."""
    config = CASE.config.changed(num_hidden_layers=1, layer_types=(SLIDING,), local_attention=8)
    torch.manual_seed(0)
    encoder = ModernBertEncoder(config).eval()
    ids, context = cases.packed((30, 20), config, seed=0)
    changed = ids.clone()
    changed[10] = (ids[10] + 1) % config.vocab_size
    moved = (encoder(ids, context) != encoder(changed, context)).any(1).nonzero().flatten()
    assert moved.tolist() == list(range(6, 15))
