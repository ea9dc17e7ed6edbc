"""peft, sentence-transformers and pipelines over a model with this attention."""

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModel, BertTokenizerFast, Trainer, TrainingArguments, pipeline

from adasplash.integrations.transformers import configure, record
from dense_models import build, draw_ids

IDS = draw_ids()


@pytest.fixture
def tokenizer(tmp_path):
    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", *(f"w{i}" for i in range(45))]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    return BertTokenizerFast(str(tmp_path / "vocab.txt"))


def test_peft_lora(tmp_path):
    """What is trained and saved is small, and the base keeps its attention."""
    peft = pytest.importorskip("peft")
    base = build("llama", "ForCausalLM", torch.float32)
    expected = base(IDS).logits
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type="CAUSAL_LM"))
    torch.testing.assert_close(model(IDS).logits, expected)
    assert all("lora" in name for name, parameter in model.named_parameters() if parameter.requires_grad)
    data = [{"input_ids": ids, "labels": ids} for ids in IDS]
    options = dict(max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True, learning_rate=0.1)
    Trainer(model, TrainingArguments(tmp_path / "out", **options), train_dataset=data).train()
    model.save_pretrained(tmp_path / "adapter")
    fresh = build("llama", "ForCausalLM", torch.float32)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter")
    torch.testing.assert_close(again.eval()(IDS).logits, model.eval()(IDS).logits)
    assert not torch.allclose(again(IDS).logits, expected)


def test_pipelines(tokenizer, tmp_path):
    model = build("bert", "ForMaskedLM", torch.float32)
    fill = pipeline("fill-mask", model=model, tokenizer=tokenizer)
    assert len(fill("w1 [MASK] w3")) == 5
    features = pipeline("feature-extraction", model=build("bert", dtype=torch.float32), tokenizer=tokenizer)
    texts = ["w1 w2 w3", "w4"]
    batched, single = features(texts, batch_size=2), [features(text)[0] for text in texts]
    for rows, row in zip(batched, single, strict=True):
        torch.testing.assert_close(torch.tensor(rows[0][: len(row)]), torch.tensor(row), atol=1e-5, rtol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_sentence_transformers(tokenizer, tmp_path):
    """Loaded by keyword, trained, saved, loaded."""
    library = pytest.importorskip("sentence_transformers")
    pytest.importorskip("datasets")
    from datasets import Dataset
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    build("bert", dtype=torch.float32, attn_implementation="sdpa").save_pretrained(tmp_path / "softmax")
    tokenizer.save_pretrained(tmp_path / "softmax")
    model = library.SentenceTransformer(
        str(tmp_path / "softmax"),
        model_kwargs=dict(attn_implementation="adasplash"),
        config_kwargs=dict(adasplash_alpha=1.25),
        device="cpu",
    )
    assert model[0].auto_model.config.adasplash_alpha == 1.25
    texts = [f"w{i} w{i + 1}" for i in range(20)]
    data = Dataset.from_dict({"anchor": texts, "positive": texts[::-1]})
    arguments = library.SentenceTransformerTrainingArguments(
        tmp_path / "out", max_steps=2, report_to=[], use_cpu=True, save_strategy="no", disable_tqdm=True
    )
    loss = MultipleNegativesRankingLoss(model)
    library.SentenceTransformerTrainer(model, arguments, data, loss=loss).train()
    vectors = model.encode(texts)
    model.save(str(tmp_path / "entmax"))
    again = library.SentenceTransformer(str(tmp_path / "entmax"), device="cpu")
    assert again[0].auto_model.config._attn_implementation == "adasplash"
    torch.testing.assert_close(torch.tensor(again.encode(texts)), torch.tensor(vectors))


def test_sentence_transformers_inference(tokenizer, tmp_path):
    library = pytest.importorskip("sentence_transformers")
    build("bert", dtype=torch.float32, attn_implementation="sdpa").save_pretrained(tmp_path / "softmax")
    tokenizer.save_pretrained(tmp_path / "softmax")
    model = library.SentenceTransformer(str(tmp_path / "softmax"), device="cpu")
    softmax = torch.tensor(model.encode(["w1 w2 w3", "w4 w5"]))
    configure(model[0].auto_model, alpha=1.5)
    with record(model[0].auto_model) as seen:
        entmax = torch.tensor(model.encode(["w1 w2 w3", "w4 w5"]))
    assert not torch.allclose(softmax, entmax) and len(seen.layers) == 2
    model.save(str(tmp_path / "entmax"))
    again = library.SentenceTransformer(str(tmp_path / "entmax"), device="cpu")
    torch.testing.assert_close(torch.tensor(again.encode(["w1 w2 w3", "w4 w5"])), entmax)


def test_an_auto_class_inside_of_another_model(tmp_path):
    """Encoder and decoder of two checkpoints."""
    from transformers import EncoderDecoderModel

    encoder = build("bert", dtype=torch.float32)
    decoder = build("bert", "LMHeadModel", torch.float32, is_decoder=True, add_cross_attention=True)
    encoder.save_pretrained(tmp_path / "encoder")
    decoder.save_pretrained(tmp_path / "decoder")
    model = EncoderDecoderModel.from_encoder_decoder_pretrained(tmp_path / "encoder", tmp_path / "decoder").eval()
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    assert AutoModel.from_pretrained(tmp_path / "encoder").config._attn_implementation == "adasplash"
    out = model(input_ids=IDS, decoder_input_ids=IDS[:, :5]).logits
    model.save_pretrained(tmp_path / "both")
    again = EncoderDecoderModel.from_pretrained(tmp_path / "both").eval()
    assert again.encoder.config._attn_implementation == again.decoder.config._attn_implementation == "adasplash"
    torch.testing.assert_close(again(input_ids=IDS, decoder_input_ids=IDS[:, :5]).logits, out)
