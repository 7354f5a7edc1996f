"""sentence-transformers gives accelerated models packed inputs, and embeddings stay the same."""

import copy
import os
import pickle
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from kernels import accelerate, restore
from kernels.integrations import sentence_transformers_inputs
from kernels.integrations.class_exchange import is_exchanged

from .test_packing_collator import SIZES, gradients_of

st = pytest.importorskip("sentence_transformers")

from sentence_transformers.base.modules import Transformer  # noqa: E402
from sentence_transformers.sentence_transformer.losses import (  # noqa: E402
    CachedMultipleNegativesRankingLoss,
    CosineSimilarityLoss,
)
from sentence_transformers.sentence_transformer.modules import (  # noqa: E402
    CNN,
    Normalize,
    Pooling,
)
from sentence_transformers.sparse_encoder.modules import SpladePooling  # noqa: E402

WORDS = [
    "<s>",
    "<pad>",
    "</s>",
    "<unk>",
    *["it", "is", "now", "raining", "again", "but", "not", "on", "the", "green", "hill"],
]
TEXTS = ["it is raining", "", "now it is not raining on the green hill again", "green"]


def save_tiny(folder: Path, kind: str, **options: Any) -> str:
    """Save a small model with a tokenizer of words, whose padding has the id 1."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.RobertaProcessing(("</s>", 2), ("<s>", 0))
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    tokenizer = hf.PreTrainedTokenizerFast(
        tokenizer_object=words, **names, cls_token="<s>", sep_token="</s>", model_max_length=30
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = hf.AutoConfig.for_model(kind, **SIZES, pad_token_id=1, **options)
    head = hf.AutoModelForSequenceClassification if "num_labels" in options else hf.AutoModel
    head.from_config(config).save_pretrained(folder)
    return str(folder)


def embeddings_and_gradients(
    model: st.SentenceTransformer, texts: list[str]
) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    embeddings = model(model.preprocess(texts))["sentence_embedding"]
    (embeddings @ embeddings.T).sin().sum().backward()
    return embeddings.detach(), gradients_of(model)


def assert_close_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        # That of a key's bias is zero but for rounding, of which the query's tells the size.
        scale = expected[name.replace("key.bias", "query.bias")].norm()
        assert (found[name] - gradient).norm() <= 1e-4 * scale, name


def takes_packed(model: nn.Module) -> bool:
    features = model.preprocess(TEXTS)
    assert ("attention_mask" in features) != ("cu_seq_lens_q" in features)
    return "cu_seq_lens_q" in features


@pytest.fixture(scope="module")
def roberta(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_tiny(tmp_path_factory.mktemp("roberta"), "roberta")


@pytest.mark.parametrize("pooling", ["mean", "cls", "max", "lasttoken", ("mean", "weightedmean")])
@pytest.mark.parametrize("encoder", ["MiniLM", "roberta"])
def test_embeddings_and_gradients(
    encoder: str, pooling: Any, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("roberta" if encoder == "roberta" else "real_encoder")
    transformer = Transformer(str(folder))
    stages = [transformer, Pooling(transformer.get_embedding_dimension(), pooling), Normalize()]
    model = st.SentenceTransformer(modules=stages, device="cpu").eval()
    encoded = model.encode(TEXTS, convert_to_tensor=True)
    expected, gradients = embeddings_and_gradients(model, TEXTS)
    accelerate(model)
    features = model.preprocess(TEXTS)
    assert features["input_ids"].shape == (1, features["cu_seq_lens_q"][-1])
    found, found_gradients = embeddings_and_gradients(model, TEXTS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_close_gradients(found_gradients, gradients)
    torch.testing.assert_close(
        model.encode(TEXTS, convert_to_tensor=True), encoded, rtol=1e-5, atol=1e-5
    )
    restore(model)
    assert not takes_packed(model)
    assert torch.equal(model.encode(TEXTS, convert_to_tensor=True), encoded)


def test_restore_leaves_nothing(roberta: str) -> None:
    model = st.SentenceTransformer(roberta, device="cpu")
    before, kind = set(vars(model[0])), type(model[0])
    arguments = copy.copy(model[0].model_forward_params)
    accelerate(model)
    assert isinstance(model[0], kind)
    with pytest.raises(ValueError, match="accelerated already"):
        accelerate(model)
    restore(model)
    assert type(model[0]) is kind
    assert set(vars(model[0])) == before
    assert model[0].model_forward_params == arguments


def test_a_model_inside_alone(roberta: str) -> None:
    """Inputs are packed only while the model takes them."""
    model = st.SentenceTransformer(roberta, device="cpu").eval()
    expected = model.encode(TEXTS, convert_to_tensor=True)

    def check(packed: bool) -> None:
        assert takes_packed(model) == packed
        torch.testing.assert_close(
            model.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-5, atol=1e-5
        )

    accelerate(model[0].model)
    check(packed=False)
    accelerate(model)
    check(packed=True)
    restore(model[0].model)
    check(packed=False)
    accelerate(model[0].model)
    check(packed=True)
    restore(model)
    check(packed=False)


def test_users_can_ask_for_padding(roberta: str) -> None:
    model = st.SentenceTransformer(roberta, device="cpu").eval()
    model[0].unpad_inputs = False
    accelerate(model)
    assert not takes_packed(model)
    model[0].unpad_inputs = True
    assert takes_packed(model)
    model[0].unpad_inputs = False
    assert not takes_packed(model)


def test_copies_pickles_and_saved_models(roberta: str, tmp_path: Path) -> None:
    model = st.SentenceTransformer(roberta, device="cpu").eval()
    accelerate(model)
    expected = model.encode(TEXTS, convert_to_tensor=True)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert takes_packed(other)
        assert torch.equal(other.encode(TEXTS, convert_to_tensor=True), expected)
        restore(other)
        assert not takes_packed(other)
    assert takes_packed(model)
    model.save_pretrained(str(tmp_path))
    plain = st.SentenceTransformer(str(tmp_path), device="cpu").eval()
    assert not any(is_exchanged(module) for module in plain.modules())
    torch.testing.assert_close(
        plain.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-5, atol=1e-5
    )


def test_prompts(roberta: str) -> None:
    """Pooling leaves the tokens of a prompt out."""
    model = st.SentenceTransformer(roberta, device="cpu").eval()
    model.set_pooling_include_prompt(False)
    prompt = {"prompt": "again it is ", "convert_to_tensor": True}
    texts = [text for text in TEXTS if text]
    expected = model.encode(texts, **prompt)
    accelerate(model)
    torch.testing.assert_close(model.encode(texts, **prompt), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [CosineSimilarityLoss, CachedMultipleNegativesRankingLoss])
def test_losses(roberta: str, loss: Any) -> None:
    model = st.SentenceTransformer(roberta, device="cpu").train()
    options = {"mini_batch_size": 2} if loss is CachedMultipleNegativesRankingLoss else {}

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        pairs = [model.preprocess(TEXTS), model.preprocess(TEXTS[::-1])]
        value = loss(model, **options)(pairs, torch.tensor([0.1, 0.5, 0.9, 0.2]))
        value.backward()
        return value.detach(), gradients_of(model)

    expected, gradients = run()
    accelerate(model)
    assert takes_packed(model)
    found, found_gradients = run()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert_close_gradients(found_gradients, gradients)


SPECIAL = {f"{name}_token_id": 0 for name in ("bos", "cls", "eos", "sep")}  # in the vocabulary


@pytest.mark.parametrize(
    ("kind", "options", "packs"),
    [
        ("roberta", {}, True),
        ("bert", {}, True),
        ("modernbert", SPECIAL, True),
        ("modernbert", {**SPECIAL, "classifier_pooling": "mean"}, False),
        ("mpnet", {}, True),
        ("deberta-v2", {}, True),
    ],
)
def test_a_cross_encoder(tmp_path: Path, kind: str, options: dict[str, Any], packs: bool) -> None:
    """A head for sequences takes packed pairs, with their token types, where it can."""
    folder = save_tiny(tmp_path, kind, num_labels=1, **options)
    model = st.CrossEncoder(folder, device="cpu")
    pairs = [("it is raining", "now"), ("green hill", "the green hill again"), ("it", "it")]
    expected = model.predict(pairs)
    accelerate(model)
    assert ("cu_seq_lens_q" in model.preprocess(pairs)) == packs
    assert model.predict(pairs) == pytest.approx(expected, rel=1e-5, abs=1e-5)
    restore(model)
    assert model.predict(pairs) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("output", ["token_embeddings", None])
def test_results_of_tokens(roberta: str, output: str | None) -> None:
    model = st.SentenceTransformer(roberta, device="cpu").eval()

    def tokens() -> list[Tensor]:
        found = model.encode(TEXTS, output_value=output)
        if output is None:
            found = [of["token_embeddings"][of["attention_mask"].bool()] for of in found]
        return found

    expected = tokens()
    accelerate(model)
    for found, own in zip(tokens(), expected, strict=True):
        torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    assert takes_packed(model)  # again
    restore(model)
    assert not is_exchanged(model)


def test_threads_that_ask_for_tokens_and_for_texts(roberta: str) -> None:
    """A batch is padded for the one, packed for the others, and the model's setting stays."""
    model = st.SentenceTransformer(roberta, device="cpu").eval()
    accelerate(model)
    before = model[0].unpad_inputs
    kinds = ("token_embeddings", "sentence_embedding", "token_embeddings", "sentence_embedding")
    expected = {kind: model.encode(TEXTS, output_value=kind) for kind in set(kinds)}
    with ThreadPoolExecutor(len(kinds)) as pool:
        runs = [(kind, pool.submit(model.encode, TEXTS, output_value=kind)) for kind in 10 * kinds]
    for kind, run in runs:
        for found, own in zip(run.result(), expected[kind], strict=True):
            torch.testing.assert_close(found, own, rtol=1e-5, atol=1e-5)
    assert model[0].unpad_inputs is before


def test_a_process_forked_while_a_thread_tokenizes() -> None:
    """May tokenize itself."""
    lock = sentence_transformers_inputs._TOKENIZING
    held, done = threading.Event(), threading.Event()

    def tokenize() -> None:
        with lock:
            held.set()
            time.sleep(0.3)
        done.wait(10)

    thread = threading.Thread(target=tokenize)
    thread.start()
    held.wait(10)
    child = os.fork()
    if child == 0:
        os._exit(0 if lock.acquire(timeout=5) else 1)
    done.set()
    thread.join()
    assert os.waitpid(child, 0)[1] == 0


def test_packed_outputs_are_refused(roberta: str) -> None:
    with pytest.raises(ValueError, match="packed: a sentence-transformers model packs its texts"):
        accelerate(st.SentenceTransformer(roberta, device="cpu"), packed=True)


def test_a_sparse_encoder(tmp_path: Path) -> None:
    """Logits of tokens come packed to a pooling that takes them."""
    save_tiny(tmp_path, "bert")
    config = hf.AutoConfig.from_pretrained(tmp_path)
    torch.manual_seed(0)
    hf.BertForMaskedLM(config).save_pretrained(tmp_path)
    stages = [Transformer(str(tmp_path), transformer_task="fill-mask"), SpladePooling()]
    model = st.SparseEncoder(modules=stages, device="cpu").eval()
    expected = model.encode(TEXTS, convert_to_sparse_tensor=False)
    accelerate(model)
    assert takes_packed(model)
    found = model.encode(TEXTS, convert_to_sparse_tensor=False)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_a_module_that_reads_places_of_a_batch(roberta: str) -> None:
    """A convolution over a padded batch must not run over several packed texts."""
    transformer = Transformer(roberta)
    torch.manual_seed(0)
    stages = [transformer, CNN(SIZES["hidden_size"], 8, [1]), Pooling(8)]
    model = st.SentenceTransformer(modules=stages, device="cpu").eval()
    expected = model.encode(TEXTS, convert_to_tensor=True)
    accelerate(model)
    assert not takes_packed(model)
    torch.testing.assert_close(
        model.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-5, atol=1e-5
    )


def test_expansions_that_score_padding_are_refused(roberta: str) -> None:
    model = st.SentenceTransformer(roberta, device="cpu")
    model[0].query_expansion = {"strategy": "fixed", "length": 8, "attend": False}
    with pytest.raises(ValueError, match="scores places of padding"):
        accelerate(model)
    assert not any(is_exchanged(module) for module in model.modules())


def test_versions_that_cannot_leave_padding_out(
    roberta: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = st.SentenceTransformer(roberta, device="cpu").eval()
    expected = model.encode(TEXTS, convert_to_tensor=True)
    monkeypatch.delattr(Transformer, "_should_flatten_inputs")
    monkeypatch.setattr(Transformer, "preprocess", lambda self, texts, **_: self.tokenize(texts))
    monkeypatch.setattr(
        Transformer,
        "tokenize",
        lambda self, texts: dict(self.tokenizer(texts, padding=True, return_tensors="pt")),
    )
    accelerate(model)
    assert not is_exchanged(model[0])
    torch.testing.assert_close(
        model.encode(TEXTS, convert_to_tensor=True), expected, rtol=1e-5, atol=1e-5
    )
    restore(model)
