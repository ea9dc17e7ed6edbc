"""A causal call over a padded batch with the lengths of one side only: a shifted mask, and a warning that says so."""

import warnings

import pytest
import torch

import adasplash
from common import make_inputs

LENGTHS = torch.tensor([7, 3])


@pytest.fixture(autouse=True)
def nothing_said_yet(monkeypatch):
    monkeypatch.setattr("adasplash.functional._warned", set())


@pytest.mark.parametrize("given, missing", (("kv_seqlens", "q_seqlens"), ("q_seqlens", "kv_seqlens")))
def test_warns_once(given, missing):
    inputs = make_inputs(2, 2, 7, 7, 8)
    with pytest.warns(UserWarning, match=f"entmax_attn: {given} without {missing} in a causal call") as caught:
        adasplash.entmax_attn(*inputs, is_causal=True, **{given: LENGTHS})
    assert len(caught) == 1 and caught[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adasplash.entmax_attn(*inputs, is_causal=True, **{given: LENGTHS})


def test_both_are_what_was_meant():
    """As in the docstring's first example: every sequence as it is alone."""
    inputs = make_inputs(2, 2, 7, 7, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        out = adasplash.entmax_attn(*inputs, is_causal=True, q_seqlens=LENGTHS, kv_seqlens=LENGTHS)
    alone = adasplash.entmax_attn(*(x[1:, :, :3] for x in inputs), is_causal=True)
    torch.testing.assert_close(out[1:, :, :3], alone)
    shifted = adasplash.entmax_attn(*inputs, is_causal=True, kv_seqlens=LENGTHS)
    assert not torch.allclose(shifted[1:, :, :3], alone)


@pytest.mark.parametrize(
    "m, n, options",
    (
        (7, 7, dict(kv_seqlens=LENGTHS)),
        (1, 1, dict(kv_seqlens=LENGTHS.clamp(max=1), is_causal=True)),
        (1, 7, dict(kv_seqlens=LENGTHS, is_causal=True)),
        (5, 7, dict(kv_seqlens=LENGTHS, is_causal=True)),
        (7, 7, dict(is_causal=True)),
    ),
    ids=("not causal", "one query and one key", "one query", "fewer queries", "no lengths"),
)
def test_nothing_to_warn_of(m, n, options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        adasplash.entmax_attn(*make_inputs(2, 2, m, n, 8), **options)


def test_self_attention_of_the_layer_gives_both():
    layer = adasplash.EntmaxAttention(16, 4, is_causal=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer(torch.randn(2, 7, 16), kv_seqlens=LENGTHS)


def test_lengths_are_not_read():
    """On a GPU that would wait for it."""
    inputs = make_inputs(2, 2, 7, 7, 8)
    with pytest.warns(UserWarning, match="without q_seqlens"):
        out = adasplash.entmax_attn(*(x.to("meta") for x in inputs), is_causal=True, kv_seqlens=LENGTHS.to("meta"))
    assert out.shape == (2, 2, 7, 8)


@pytest.mark.slow
def test_compiled_without_a_word():
    inputs = make_inputs(2, 2, 7, 7, 8)
    torch.compiler.reset()
    compiled = torch.compile(adasplash.entmax_attn, fullgraph=True, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        compiled(*inputs, is_causal=True, kv_seqlens=LENGTHS)
    torch.compiler.reset()
