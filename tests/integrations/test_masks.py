"""Which keys a query sees: packed sequences, masks of users, what compiled code can know, and the mask function alone
against transformers' own."""

import warnings
from inspect import signature

import pytest
import torch

pytest.importorskip("transformers")

from transformers import masking_utils

import adasplash.integrations.transformers  # noqa: F401
from adasplash.integrations.transformers.masks import Lengths, Offsets, decode, to_boolean
from dense_models import build, draw_ids, eager, masks, softmax_is_entmax

LENGTHS = (7, 3, 1, 9)
IDS = draw_ids(1, sum(LENGTHS))
POSITIONS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
FLASH = dict(
    zip(
        ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"),
        [torch.tensor([0, *LENGTHS]).cumsum(0).int()] * 2 + [max(LENGTHS)] * 2,
        strict=True,
    )
)


def alone(model, start: int = 0) -> torch.Tensor:
    """Every sequence in a call of its own, by the same model."""
    outs = []
    for ids in IDS.split(LENGTHS, 1):
        positions = torch.arange(start, start + ids.shape[1])[None]
        outs.append(model(ids, position_ids=positions).last_hidden_state)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("name", ("bert", "llama", "mistral", "gpt2"))
def test_packed_sequences(name):
    """By position_ids alone too: with a cache, and in BERT always, the mask function does not look at them."""
    model = build(name)
    expected = alone(model)
    for use_cache in (False, True):
        for told in ({}, FLASH):
            out = model(IDS, position_ids=POSITIONS, use_cache=use_cache, **told).last_hidden_state
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_packed_in_modernbert():
    """It shows positions neither to the mask function nor to its layers, so only offsets tell."""
    model = build("modernbert")
    out = model(IDS, position_ids=POSITIONS, **FLASH).last_hidden_state
    torch.testing.assert_close(out, alone(model), atol=1e-5, rtol=1e-5)


def test_packed_by_the_collator():
    from transformers import DataCollatorWithFlattening

    features = [{"input_ids": ids[0].tolist()} for ids in IDS.split(LENGTHS, 1)]
    for name, start in (("llama", 0), ("roberta", 1)):
        model, options = build(name), {} if start == 0 else dict(position_ids_start=start)
        if start and "position_ids_start" not in signature(DataCollatorWithFlattening).parameters:
            continue  # an older transformers
        for flash in (False, True):
            collator = DataCollatorWithFlattening(return_flash_attn_kwargs=flash, **options)
            batch = collator(features, return_tensors="pt")
            batch.pop("labels")
            out = model(**batch).last_hidden_state
            torch.testing.assert_close(out, alone(model, start), atol=1e-5, rtol=1e-5)


def test_packed_rows_of_a_batch():
    model = build("mistral")
    positions = torch.stack([POSITIONS[0], torch.arange(20), POSITIONS[0].roll(-10)])
    ids = draw_ids(3, 20)
    out = model(ids, position_ids=positions, use_cache=False).last_hidden_state
    with softmax_is_entmax(1.5):
        expected = eager(model)(ids, position_ids=positions, use_cache=False).last_hidden_state
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_positions_that_do_not_fall_are_not_packed():
    """Positions of image patches jump."""
    model = build("bert")
    positions = torch.arange(20)[None] * 2
    out = model(IDS, position_ids=positions).last_hidden_state
    with softmax_is_entmax(1.5):
        expected = eager(model)(IDS, position_ids=positions).last_hidden_state
    torch.testing.assert_close(out, expected, atol=1e-10, rtol=0)


def test_positions_are_not_remembered_too_long():
    model, positions = build("bert"), POSITIONS.clone()
    packed = model(IDS, position_ids=positions).last_hidden_state
    positions.copy_(torch.arange(20))
    whole = model(IDS, position_ids=positions).last_hidden_state
    assert not torch.allclose(packed, whole)
    torch.testing.assert_close(whole, model(IDS, position_ids=positions.clone()).last_hidden_state)
    torch.testing.assert_close(model(IDS.expand(3, -1), position_ids=positions).last_hidden_state[2:], whole)


@pytest.mark.parametrize("kind", ("Boolean", "float", "least number"))
def test_a_mask_of_four_dimensions(kind):
    """Any mask, dense with one warning that says so."""
    model = build("llama")
    visible = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)) > 0.4
    visible |= torch.eye(20, dtype=torch.bool)
    lowest = -torch.inf if kind == "float" else torch.finfo(torch.float64).min
    added = torch.zeros(1, 1, 20, 20, dtype=torch.float64).masked_fill(~visible, lowest)
    with pytest.warns(UserWarning, match="LlamaAttention: an attention_mask that hides more") as said:
        out = model(IDS, attention_mask=visible if kind == "Boolean" else added, use_cache=False).last_hidden_state
    assert len(said) == 1
    with softmax_is_entmax(1.5):
        mask = added.clamp(min=torch.finfo(torch.float64).min)
        expected = eager(model)(IDS, attention_mask=mask, use_cache=False).last_hidden_state
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_a_dense_mask_that_is_too_large(monkeypatch):
    monkeypatch.setattr("adasplash.masked.MOST_WEIGHTS", 100)
    with pytest.raises(NotImplementedError, match=r"LlamaAttention: an attention_mask .* 1600 are too many"):
        build("llama")(IDS, attention_mask=torch.ones(1, 1, 20, 20).bool())


def test_masks_of_another_making_are_refused():
    for mask in (torch.ones(1, 1, 20, 20).int(), torch.ones(1, 1, 20, 20).long()[:, :, 0]):
        with pytest.raises(ValueError, match="attention_mask must be what the mask function made"):
            decode(mask)


CASES = {
    "prompt": dict(q_length=9, kv_length=9),
    "step": dict(q_length=1, kv_length=12, q_offset=11),
    "static prompt": dict(q_length=9, kv_length=16, q_offset=torch.tensor(0)),
    "static chunk": dict(q_length=4, kv_length=16, q_offset=torch.tensor(5)),
    "static step": dict(q_length=1, kv_length=16, q_offset=torch.tensor(5)),
    "sliding step": dict(q_length=1, kv_length=5, q_offset=11, kv_offset=7),
    "sliding chunk": dict(q_length=3, kv_length=7, q_offset=11, kv_offset=7),
}
FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "window": masking_utils.sliding_window_causal_mask_function(5),
    "both ways": masking_utils.bidirectional_mask_function,
    "window both ways": masking_utils.sliding_window_bidirectional_mask_function(3),
    "chunks": masking_utils.chunked_causal_mask_function(4, torch.zeros(3).int()),
    "chunks as long as it all": masking_utils.chunked_causal_mask_function(64, torch.zeros(3).int()),
}
PADDING = {name: None if mask is None else mask.bool() for name, mask in masks(3, 16).items()}


# Encoders have no cache.
PAIRS = [
    (case, function)
    for case in CASES
    for function in FUNCTIONS
    if "both ways" not in function or ("static" not in case and "step" not in case)
]


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("case, function", PAIRS)
def test_the_mask_function_alone(case, function, padding):
    """Against transformers' own, for every query that is no padding itself."""
    from adasplash.integrations.transformers.masks import mask as ours

    given = dict(kv_offset=0, q_offset=0) | CASES[case]
    given |= dict(batch_size=3, mask_function=FUNCTIONS[function], device="cpu", attention_mask=PADDING[padding])
    if "both ways" in function:
        given["allow_is_bidirectional_skip"] = True
    m, n, held = given["q_length"], given["kv_length"], int(given["q_offset"] - given["kv_offset"])
    at = int(given["q_offset"]) + torch.arange(m)
    if "q_length" not in signature(masking_utils.sdpa_mask).parameters:  # before 5.4
        given["cache_position"] = at
        given = {name: value for name, value in given.items() if name not in ("q_length", "q_offset", "device")}
    made = ours(**given)
    skip = dict(allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    expected = masking_utils.sdpa_mask(**given | skip).expand(3, 1, -1, -1)
    if made is None:
        query, key = torch.arange(m)[:, None], torch.arange(n)
        causal = "both" not in function
        made = (key <= query + n - m if causal else key >= 0) & torch.ones(m, 1).bool()
    elif made.dtype != torch.bool:
        assert "holes" not in padding or case in ("step", "static step") or "sliding" in case
        made = to_boolean(decode(made), 3, m, n)
    else:
        assert padding == "holes" or function == "chunks" or (function, "sliding chunk") == ("window both ways", case)
    mask = PADDING[padding]
    real = torch.ones(3, m).bool() if mask is None else mask[:, at]
    assert torch.equal(made.expand(3, 1, m, n)[real[:, None]], expected[real[:, None]]), held


def test_masks_say_what_they_are():
    lengths = torch.tensor([[2, 9, 5], [0, 4, 4]], dtype=torch.int32)[:, None, None]
    assert decode(lengths.expand(-1, -1, 6, -1)).window == 4
    read = decode(lengths)
    assert isinstance(read, Lengths) and read.causal and read.window is None
    assert decode(lengths[..., :2]).query_ends is None and not decode(lengths[..., [0, 1, 2, 2]]).causal
    assert isinstance(decode(torch.tensor([[[[0, 4, 9]]]])), Offsets)


@pytest.mark.parametrize("name", ("gemma3", "masks of the model"))
def test_masks_that_models_change(name):
    """or_mask_function, as for images beside text: dense."""
    from transformers import LlamaConfig

    config = LlamaConfig(attn_implementation="adasplash")
    given = dict(config=config, inputs_embeds=torch.zeros(2, 8, 4), attention_mask=None, position_ids=None)
    parameters = signature(masking_utils.create_causal_mask).parameters
    given["cache" if "cache" in parameters else "past_key_values"] = None
    if "cache_position" in parameters:
        given["cache_position"] = torch.arange(8)
    if name == "gemma3":
        made = masking_utils.create_causal_mask(**given, or_mask_function=lambda b, h, q, k: (q < 3) & (k < 3))
    elif "allow_is_causal_skip" in parameters:
        made = masking_utils.create_causal_mask(**given, allow_is_causal_skip=False)
    else:
        pytest.skip("an older transformers")
    assert made.dtype == torch.bool and made.shape[-2:] == (8, 8)


def test_a_decoder_as_an_encoder():
    """Its layers still call themselves causal."""
    for mask in (None, (torch.arange(20) < 13).long()[None]):
        model = build("llama", is_causal=False)
        out = model(IDS, attention_mask=mask, use_cache=False).last_hidden_state
        with softmax_is_entmax(1.5):
            expected = eager(model)(IDS, attention_mask=mask, use_cache=False).last_hidden_state
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_nothing_warns_of_a_window():
    model = build("modernbert")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(IDS)
