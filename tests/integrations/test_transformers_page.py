"""docs/transformers.md is run as it stands there, in one process, with tiny checkpoints in the place of the hub's."""

import re
import sys

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers

import adasplash
import adasplash.integrations.transformers
from adasplash.integrations.transformers.serving import can_serve
from common import ROOT, build_once, run

pytestmark = [pytest.mark.backends("cpu"), pytest.mark.slow]
PAGE = (ROOT / "docs/transformers.md").read_text()
TEXT = ["It was a short text.", "Another line, of other length, came behind it.", "", "And a third one."] * 4


def program() -> str:
    """The page's Python, without the section on FSDP2: that needs several processes (test_distributed_models.py); and
    without continuous batching where an older transformers has none that serves."""
    left_away = ("FSDP2",) if can_serve() else ("FSDP2", "Serving")
    sections = [each for each in re.split(r"^## ", PAGE, flags=re.MULTILINE) if not each.startswith(left_away)]
    blocks = re.findall(r"^```python\n(.*?)^```", "\n".join(sections), re.MULTILINE | re.DOTALL)
    assert len(blocks) == (8 if can_serve() else 7)
    return "\n".join(blocks)


def save_checkpoints(folder) -> dict[str, str]:
    """A model and its tokeniser for each name of the hub on the page; returns their folders."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    words = Tokenizer(models.BPE(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.ByteLevel()
    words.train_from_iterator(TEXT, trainers.BpeTrainer(vocab_size=200, special_tokens=list(special.values())))
    size = words.get_vocab_size()
    layers = dict(num_hidden_layers=1, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    made = {
        "gpt2": transformers.GPT2LMHeadModel(
            transformers.GPT2Config(vocab_size=size, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2)
        ),
        "roberta-base": transformers.RobertaModel(
            transformers.RobertaConfig(vocab_size=size, max_position_embeddings=514, pad_token_id=0, **layers)
        ),
    }
    for name, model in made.items():
        model.save_pretrained(folder / "hub" / name)
        options = special | ({"pad_token": None} if name == "gpt2" else {})  # the hub's has none either
        transformers.PreTrainedTokenizerFast(tokenizer_object=words, **options).save_pretrained(folder / "hub" / name)
    return {name: str(folder / "hub" / name) for name in made}


@pytest.fixture(scope="session")
def what_it_leaves(tmp_path_factory):
    def build(folder):
        code = program()
        for name, checkpoint in save_checkpoints(folder).items():
            assert f'("{name}"' in code
            code = code.replace(f'("{name}"', f"({checkpoint!r}")
        (folder / "texts.txt").write_text("\n".join(TEXT))
        (folder / "page.py").write_text(code)
        (folder / "said").write_text(run(sys.executable, "page.py", cwd=folder).stdout)

    return build_once(tmp_path_factory, "transformers_page", build)


@pytest.fixture
def encoder(what_it_leaves):
    options = dict(attn_implementation="adasplash", adasplash_alpha=1.25)
    return transformers.AutoModel.from_pretrained(what_it_leaves / "hub/roberta-base", **options).eval()


@pytest.mark.builds
def test_the_fine_tuned_model(what_it_leaves):
    said = (what_it_leaves / "said").read_text()
    assert "'adasplash/support'" in said  # by LogAttention
    assert "transformer.h.1.attn" in said  # by record
    config = (what_it_leaves / "entmax-gpt2/config.json").read_text()
    assert '"adasplash_alpha": 1.5' in config and '"attn_implementation": "adasplash"' in config


@pytest.mark.skipif(not can_serve(), reason="an older transformers, where it is refused")
def test_continuous_batching(what_it_leaves):
    """The first of its prompts is that of generate."""
    said = (what_it_leaves / "said").read_text().splitlines()
    (place,) = (place for place, line in enumerate(said) if line.startswith("ĠIt Ġwas"))
    assert said[place + 1] == said[place].removeprefix("ĠIt Ġwas ")


def test_the_served_encoder(what_it_leaves, encoder):
    served = torch._inductor.aoti_load_package(what_it_leaves / "encoder.pt2")
    for rows, length in ((1, 9), (3, 40)):
        ids, mask = torch.randint(5, 60, (rows, length)), torch.ones(rows, length, dtype=torch.long)
        mask[-1, 7:] = 0
        expected = encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        found = served(ids, mask)["last_hidden_state"]
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-4, rtol=1e-4)


@pytest.mark.builds
def test_the_served_encoder_in_cpp(what_it_leaves, encoder, tmp_path):
    (source,) = re.findall(r"^```cpp\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
    (tmp_path / "app.cpp").write_text(source)
    lines = ("cmake_minimum_required(VERSION 3.18)", "project(app CXX)", "find_package(AdaSplash REQUIRED)")
    lines += ("add_executable(app app.cpp)", "target_link_libraries(app PRIVATE AdaSplash::adasplash)")
    (tmp_path / "CMakeLists.txt").write_text("\n".join(lines))
    run("cmake", "-S", tmp_path, "-B", tmp_path / "build", f"-DCMAKE_PREFIX_PATH={adasplash.cmake_prefix_path}")
    run("cmake", "--build", tmp_path / "build")
    sizes, _, first = run(tmp_path / "build/app", cwd=what_it_leaves).stdout.strip().rpartition(" ")
    expected = encoder(input_ids=torch.arange(5, 14)[None]).last_hidden_state
    assert sizes == str(list(expected.shape))
    assert float(first) == pytest.approx(expected[0, 0, 0].item(), abs=1e-4)
