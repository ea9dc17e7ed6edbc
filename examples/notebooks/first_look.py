# %% [markdown]
# # A first look at α-entmax attention
#
# Softmax gives every key some weight. α-entmax gives most of them none at all: their weights are exactly zero, the data
# decide which, and gradients flow through the rest. α says how sparse: 1 is softmax, 2 is sparsemax.
#
# This notebook trains the same tiny language model with each of the two, on the Python standard library's own source
# files, and looks at what their heads attend to. It takes a minute or two on a CPU. It is made from
# [first_look.py](first_look.py); `execute.py` beside it runs it again.

# %%
import math
import sys
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from matplotlib.colors import LogNorm

import adasplash

sys.path += [str(Path("..").resolve()), str(Path("../gpt").resolve())]  # examples, and the model that is trained

from data import load_corpus
from model import GPT, GPTConfig
from shared import style

plt.rcParams.update(style.RC)
warnings.filterwarnings("ignore", message="Sparse")  # torch's, that its sparse tensors are new

# %%
STEPS = 1000
BATCH = 8
CONFIG = GPTConfig(layers=2, heads=4, width=64, context=128, alpha=1.5)
COLORS = {"softmax": style.SOFTMAX, "entmax": style.ENTMAX}
TICKS = [1, 2, 5, 10, 20, 50]  # of numbers of keys

# %% [markdown]
# ## Zeros
#
# Five scores, made weights by different α. The larger α is, the more of them are zero, and not merely small.

# %%
scores = torch.tensor([2.0, 1.5, 0.5, 0.0, -1.0])
for alpha in (1.0, 1.25, 1.5, 2.0):
    weights = adasplash.entmax(scores, alpha)
    print(f"α = {alpha:<4g}", "  ".join(f"{weight:.4f}" if weight else "0     " for weight in weights))

# %% [markdown]
# ## Training
#
# The model is that of [examples/gpt](../gpt/model.py): bytes are tokens, and one switch chooses the attention. With
# `attention="entmax"` it calls `adasplash.entmax_attn(query, key, value, alpha=1.5, is_causal=True)` where the other
# calls torch's `scaled_dot_product_attention`. Both start from the same weights and see the same batches.
#
# On the way we count how many keys a query weighs. `attention_stats` takes what `entmax_attn` takes and tells, for each
# query, how many keys have weight and how large the largest is, without building the matrix of weights.


# %%
def projections(model, tokens):
    """query, key and value of each layer, (batch, heads, length, head_dim) each."""
    found = []

    def look(attention, inputs):
        found.append(attention.project(*inputs))

    hooks = [block.attention.register_forward_pre_hook(look) for block in model.blocks]
    with torch.no_grad():
        model(tokens)
    for hook in hooks:
        hook.remove()
    return found


def mean_support(model, tokens, alpha=CONFIG.alpha):
    """Keys with weight, mean over queries: (layers, heads)."""
    stats = [adasplash.attention_stats(*layer, alpha=alpha, is_causal=True) for layer in projections(model, tokens)]
    return torch.stack([each.support_size.double().mean((0, 2)) for each in stats])


# %%
corpus = load_corpus(None, CONFIG.context, max_bytes=8 << 20)
held_out, followers = corpus.validation_windows(32, CONFIG.context)


def train(attention):
    torch.manual_seed(0)
    model = GPT(GPTConfig(CONFIG.layers, CONFIG.heads, CONFIG.width, CONFIG.context, attention, CONFIG.alpha))
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=STEPS, pct_start=0.05)
    losses, supports = [], {}
    for step, (inputs, targets) in zip(range(STEPS), corpus.batches(BATCH, CONFIG.context, seed=0), strict=False):
        if attention == "entmax" and step % 20 == 0:
            supports[step] = mean_support(model, held_out[:4]).flatten()
        loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
    return model.eval(), losses, supports


models, losses, supports = {}, {}, {}
for attention in ("softmax", "entmax"):
    models[attention], losses[attention], supports[attention] = train(attention)
    with torch.no_grad():
        loss = F.cross_entropy(models[attention](held_out).flatten(0, 1), followers.flatten())
    print(f"{attention:<8}held-out loss {loss:.3f} nats a byte, {loss / math.log(2):.3f} bits")

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
for attention, each in losses.items():
    smooth = torch.tensor(each).unfold(0, min(20, STEPS), 1).mean(1)
    left.plot(smooth, color=COLORS[attention], linewidth=1 if attention == "entmax" else 3, label=attention)
left.set(title="training loss, mean of 20 steps", xlabel="step", ylabel="nats a byte")
left.legend()
right.plot(list(supports["entmax"]), torch.stack(list(supports["entmax"].values())), color=style.ENTMAX, alpha=0.7)
right.axhline((CONFIG.context + 1) / 2, color=style.INK, linestyle=":", label="every visible key (softmax)")
right.set(title="keys with weight, a line a head", xlabel="step", yscale="log")
right.set_yticks(TICKS, TICKS)
right.minorticks_off()
right.legend()
for panel in (left, right):
    panel.grid()
plt.show()

# %% [markdown]
# ## Supports
#
# The keys that have weight are a query's *support*. In the mean over held-out text, for each head; softmax's heads
# weigh every visible key, so of theirs we count those with more than 1/1000.


# %%
def softmax_weights(query, key):
    future = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).triu(1)
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[3])
    return scores.masked_fill(future, -torch.inf).softmax(-1)


above = torch.stack(
    [
        (softmax_weights(query, key) > 1e-3).double().sum(-1).mean((0, 2))
        for query, key, _ in projections(models["softmax"], held_out)
    ]
)
print(f"of {(CONFIG.context + 1) / 2:g} visible keys in the mean")
for layer, (ours, theirs) in enumerate(zip(mean_support(models["entmax"], held_out), above, strict=True), 1):
    print(f"layer {layer}, entmax, with weight:       ", "  ".join(f"{n:5.1f}" for n in ours))
    print(f"layer {layer}, softmax, above 1/1000:     ", "  ".join(f"{n:5.1f}" for n in theirs))

# %% [markdown]
# Supports differ from query to query, too: each has as many keys as it needs. `entmax_attn_summary` gives the output of
# `entmax_attn` and these facts in one call, which is how a training would log them.

# %%
query, key, value = projections(models["entmax"], held_out)[-1]
out, stats = adasplash.entmax_attn_summary(query, key, value, alpha=CONFIG.alpha, is_causal=True)
assert torch.equal(out, adasplash.entmax_attn(query, key, value, alpha=CONFIG.alpha, is_causal=True))

figure, panels = plt.subplots(1, CONFIG.heads, figsize=(10, 2.6), sharey=True, layout="constrained")
for head, panel in enumerate(panels):
    sizes = stats.support_size[:, head].flatten()
    panel.hist(sizes, bins=range(1, int(stats.support_size.max()) + 2), color=style.ENTMAX)
    panel.set(title=f"head {head + 1}: 1 to {sizes.max()}", xlabel="keys with weight")
panels[0].set(ylabel="queries", yscale="log")
plt.show()

# %% [markdown]
# ## Where heads look
#
# `attention_weights` gives the weights themselves, as a sparse matrix that holds what is not zero. Here the last
# layer's heads on 64 bytes of held-out text: softmax above, α-entmax below. Blank is zero; the scale is logarithmic.

# %%
LENGTH = 64
passage = held_out[:1, :LENGTH]
seen = {"softmax": softmax_weights(*projections(models["softmax"], passage)[-1][:2])[0]}
sparse = adasplash.attention_weights(
    *projections(models["entmax"], passage)[-1], alpha=CONFIG.alpha, is_causal=True
)  # a row for each head and query
print(f"{sparse.values().numel():,} of {CONFIG.heads * LENGTH * (LENGTH + 1) // 2:,} weights are not zero")
seen["entmax"] = sparse.to_dense().view(CONFIG.heads, LENGTH, LENGTH)

figure, rows = plt.subplots(2, CONFIG.heads, figsize=(10, 5.2), sharex=True, sharey=True, layout="constrained")
for row, (attention, weights) in zip(rows, seen.items(), strict=True):
    for head, (panel, each) in enumerate(zip(row, weights, strict=True), 1):
        image = panel.imshow(
            each.where(each > 0, torch.nan), cmap=style.shades(COLORS[attention]), norm=LogNorm(1e-3, 1)
        )
        panel.set(title=f"{attention}, head {head}", xticks=[], yticks=[])
    figure.colorbar(image, ax=row, label="weight", extend="min")
plt.show()
print(bytes(passage[0].tolist()).decode())

# %% [markdown]
# ## α is a dial
#
# The same queries and keys, at other α: how many keys have weight. Here α changes after training; `alpha` may also be a
# tensor with an α for each head, and is then learned like any weight.

# %%
alphas = torch.linspace(1.05, 2, 20)
dial = torch.stack([mean_support(models["entmax"], held_out[:8], alpha.item()).flatten() for alpha in alphas])
figure, panel = plt.subplots(figsize=(6, 3.2), layout="constrained")
panel.plot(alphas, dial, color=style.ENTMAX, alpha=0.7)
panel.axvline(CONFIG.alpha, color=style.INK, linestyle=":", label="trained with")
panel.set(title="keys with weight, a line a head", xlabel="α", yscale="log")
panel.set_yticks(TICKS, TICKS)
panel.minorticks_off()
panel.grid()
panel.legend()
plt.show()

# %% [markdown]
# ## From here
#
# - [docs/models.md](../../docs/models.md): what larger models made of it, where it helps and where it costs
# - [docs/gallery](../../docs/gallery/index.md): more pictures, and the commands that make them
# - [examples/gpt](../gpt): this model at a larger size, exported and served from C++
# - [docs/transformers.md](../../docs/transformers.md): in models of Hugging Face transformers, by one word
