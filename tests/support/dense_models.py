"""Tiny models of transformers, and what they give with dense float64 entmax in the place of their own softmax."""

import contextlib
import copy

import torch
from torch import nn
from transformers import PreTrainedModel, models

import reference

SIZES = dict(
    vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
    max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=None, cls_token_id=1, sep_token_id=2,
    attention_dropout=0.0, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0,
    attn_implementation="adasplash", experts_implementation="eager",
)  # fmt: skip
GPT2 = dict(
    vocab_size=50, n_embd=32, n_layer=2, n_head=4, n_positions=64, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0
)
GROUPED = dict(num_key_value_heads=2)

#: By name: the folder of transformers, what its classes are called, and what its config needs.
MODELS = {
    "bert": ("bert", "Bert", {}),
    "roberta": ("roberta", "Roberta", {}),
    "modernbert": ("modernbert", "ModernBert", dict(local_attention=6, global_attn_every_n_layers=2)),
    "gpt2": ("gpt2", "GPT2", GPT2),
    "llama": ("llama", "Llama", GROUPED),
    "mistral": ("mistral", "Mistral", GROUPED | dict(sliding_window=5)),
    "qwen2": ("qwen2", "Qwen2", GROUPED | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1)),
    "qwen3": ("qwen3", "Qwen3", GROUPED | dict(head_dim=8)),
    "qwen2_moe": (
        "qwen2_moe", "Qwen2Moe",
        GROUPED | dict(
            use_sliding_window=True, sliding_window=5, max_window_layers=1, num_experts=2, num_experts_per_tok=1,
            moe_intermediate_size=16, shared_expert_intermediate_size=16,
        ),
    ),
    "gemma2": ("gemma2", "Gemma2", GROUPED | dict(head_dim=8, sliding_window=5, attn_logit_softcapping=None)),
}  # fmt: skip
ENCODERS = ("bert", "roberta", "modernbert")


def config_of(name: str, **options):
    folder, classes, needed = MODELS[name]
    return getattr(getattr(models, folder), f"{classes}Config")(**SIZES | needed | options)


def build(
    name: str, head: str = "Model", dtype: torch.dtype = torch.float64, config=None, **options
) -> PreTrainedModel:
    """A model with weights so large that rows are sparse."""
    folder, classes, _ = MODELS[name]
    head = "LMHeadModel" if (name, head) == ("gpt2", "ForCausalLM") else head
    torch.manual_seed(0)
    model = getattr(getattr(models, folder), f"{classes}{head}")(config or config_of(name, **options))
    return enlarge(model.to(dtype).eval())


def enlarge(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(3 if "embed" in name or "wte" in name or "lm_head" in name else 8)
    return model


def draw_ids(rows: int = 3, length: int = 17, low: int = 3) -> torch.Tensor:
    return torch.randint(low, 50, (rows, length), generator=torch.Generator().manual_seed(rows + length))


def masks(rows: int = 3, length: int = 17) -> dict[str, torch.Tensor | None]:
    """attention_mask, padded in all ways; no row is empty."""
    ones = torch.ones(rows, length, dtype=torch.long)
    made = {"none": None, "ones": ones}
    for name in ("right", "left", "both", "holes"):
        made[name] = ones.clone()
    made["right"][0, 11:] = made["right"][1, 4:] = 0
    made["left"][0, :5] = made["left"][1, :13] = 0
    made["both"][0, :3] = made["both"][0, 9:] = made["both"][2, 12:] = 0
    made["holes"][0, 4:6] = made["holes"][2, 0] = made["holes"][2, 7] = 0
    return made


@contextlib.contextmanager
def softmax_is_entmax(alpha):
    """For models that run eagerly: α is a number, a tensor by head, or an iterator of one of these for each call."""
    theirs = nn.functional.softmax

    def entmax(scores, dim=-1, dtype=None, **_):
        if scores.dim() != 4:  # not attention: a router
            return theirs(scores, dim=dim, dtype=dtype)
        mine = next(alpha) if hasattr(alpha, "__next__") else alpha
        mine = torch.as_tensor(mine, dtype=torch.float64).reshape(-1, 1, 1)
        hidden = scores < torch.finfo(scores.dtype).min / 4
        weights = reference.entmax(scores.double().masked_fill(hidden, -torch.inf), mine)
        return torch.where(hidden.all(-1, keepdim=True), 0.0, weights).to(scores.dtype)

    nn.functional.softmax = entmax
    try:
        yield
    finally:
        nn.functional.softmax = theirs


def eager(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that runs transformers' own dense attention."""
    other = copy.deepcopy(model)
    other.set_attn_implementation("eager")
    other.config._attn_implementation = "eager"  # older versions leave some models away
    return other
