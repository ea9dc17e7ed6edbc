"""The schemas are a contract with saved models."""

import torch

import adasplash  # noqa: F401  (registers the ops)

OPTIONS = (
    "bool is_causal=False, *, float? scale=None, Tensor? q_seqlens=None, Tensor? kv_seqlens=None, "
    "int[2] window=[-1, -1], Tensor? alibi_slopes=None, Tensor? kv_starts=None, float dropout_p=0., "
    "Tensor? dropout_seed=None, Tensor? key_index=None, Tensor? q_positions=None, Tensor? dropout_origin=None)"
)
TENSORS = "Tensor query, Tensor key, Tensor value"
VARLEN = f"{TENSORS}, Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k"
VARLEN_OPTIONS = (
    "bool is_causal=False, *, float? scale=None, int[2] window=[-1, -1], Tensor? alibi_slopes=None, "
    "float dropout_p=0., Tensor? dropout_seed=None, Tensor? q_positions=None, Tensor? dropout_origin=None)"
)
CACHE = "Tensor query, Tensor key_cache, Tensor value_cache, Tensor block_table, Tensor kv_seqlens"
PAGED_OPTIONS = (
    "bool is_causal=True, *, Tensor? cu_seqlens_q=None, SymInt max_seqlen_q=1, float? scale=None, "
    "int[2] window=[-1, -1], Tensor? alibi_slopes=None, Tensor? key_index=None)"
)
RESOLVED = (
    "Tensor? head_alpha, float alpha, bool is_causal, float? scale, Tensor? q_seqlens, Tensor? kv_seqlens, "
    "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, int[2] window, "
    "Tensor? alibi_slopes"
)
# Behind everything else.
LATER = (
    "Tensor? kv_starts=None, float dropout_p=0., Tensor? dropout_seed=None, Tensor? q_positions=None, "
    "Tensor? dropout_origin=None"
)
SUMMARY = "(Tensor out, Tensor support_size, Tensor largest_weight, Tensor maximum, Tensor gap, Tensor empty_tiles)"

# In the order in which an eager call tries them: a tensor alpha before a number, or a one-element tensor would lose
# its gradient.
SCHEMAS = {
    "entmax_attn": [
        f"entmax_attn.per_head({TENSORS}, Tensor alpha, {OPTIONS} -> Tensor",
        f"entmax_attn({TENSORS}, float alpha=1.5, {OPTIONS} -> Tensor",
    ],
    "entmax_attn_varlen": [
        f"entmax_attn_varlen.per_head({VARLEN}, Tensor alpha, {VARLEN_OPTIONS} -> Tensor",
        f"entmax_attn_varlen({VARLEN}, float alpha=1.5, {VARLEN_OPTIONS} -> Tensor",
    ],
    "entmax_attn_summary": [
        f"entmax_attn_summary.per_head({TENSORS}, Tensor alpha, {OPTIONS} -> {SUMMARY}",
        f"entmax_attn_summary({TENSORS}, float alpha=1.5, {OPTIONS} -> {SUMMARY}",
    ],
    "entmax_attn_varlen_summary": [
        f"entmax_attn_varlen_summary.per_head({VARLEN}, Tensor alpha, {VARLEN_OPTIONS} -> {SUMMARY}",
        f"entmax_attn_varlen_summary({VARLEN}, float alpha=1.5, {VARLEN_OPTIONS} -> {SUMMARY}",
    ],
    "entmax_attn_paged": [
        f"entmax_attn_paged.per_head({CACHE}, Tensor alpha, {PAGED_OPTIONS} -> Tensor",
        f"entmax_attn_paged({CACHE}, float alpha=1.5, {PAGED_OPTIONS} -> Tensor",
    ],
    "entmax_cache_append": [
        "entmax_cache_append(Tensor key, Tensor value, Tensor(a!) key_cache, Tensor(b!) value_cache, Tensor slots, *, "
        "Tensor(c!)? key_index=None) -> ()",
    ],
    "entmax_make_key_index": ["entmax_make_key_index(Tensor key_cache) -> Tensor"],
    "entmax_key_index_update": [
        "entmax_key_index_update(Tensor key_cache, Tensor slots, Tensor(a!) key_index) -> ()",
    ],
    "entmax": [
        "entmax.tensor_alpha(Tensor input, Tensor alpha, int dim=-1) -> Tensor",
        "entmax(Tensor input, float alpha=1.5, int dim=-1) -> Tensor",
    ],
    "_entmax_attn_forward": [
        f"_entmax_attn_forward({TENSORS}, {RESOLVED}, SymInt support_capacity, {LATER}) "
        "-> (Tensor out, Tensor row_state, Tensor support, Tensor tiles)",
    ],
    "_entmax_attn_indexed": [f"_entmax_attn_indexed({TENSORS}, {RESOLVED}, Tensor key_index, {LATER}) -> Tensor"],
    "_entmax_attn_backward": [
        f"_entmax_attn_backward(Tensor grad_out, {TENSORS}, Tensor row_state, Tensor support, Tensor tiles, "
        f"{RESOLVED}, Tensor? out=None, {LATER}) -> (Tensor dq, Tensor dk, Tensor dv, Tensor dalpha)",
    ],
    "_entmax_attn_summary": [
        f"_entmax_attn_summary(Tensor query, Tensor key, Tensor row_state, Tensor support, Tensor tiles, {RESOLVED}, "
        f"{LATER}) -> (Tensor support_size, Tensor largest_weight, Tensor tile_counts)",
    ],
    "_with_gradient": ["_with_gradient(Tensor value, Tensor input, Tensor gradient) -> Tensor"],
    "_entmax_forward": ["_entmax_forward(Tensor input, Tensor? row_alpha, float alpha) -> Tensor"],
    "_entmax_backward": [
        "_entmax_backward(Tensor grad_out, Tensor output, Tensor? row_alpha, float alpha) "
        "-> (Tensor grad_input, Tensor grad_alpha)",
    ],
}


def test_schemas_and_their_order():
    for name, expected in SCHEMAS.items():
        packet = getattr(torch.ops.adasplash, name)
        schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
        assert schemas == [torch._C.parse_schema(f"adasplash::{schema}") for schema in expected]


def test_every_schema_is_listed_here():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("adasplash::")}
    assert {name.split("::")[1].split(".")[0] for name in names} == SCHEMAS.keys()


def test_kernels_are_registered_where_each_door_looks():
    keys = ("Autograd", "CompositeExplicitAutograd", "AutocastCPU", "AutocastCUDA")
    for name, wanted in {
        "entmax_attn": keys,
        "entmax_attn.per_head": keys,
        "entmax_attn_varlen": keys,
        "entmax_attn_varlen.per_head": keys,
        "entmax_attn_paged": ("CPU", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA"),
        "entmax_attn_paged.per_head": ("CPU", "Meta", "Autograd", "AutocastCPU", "AutocastCUDA"),
        "entmax_cache_append": ("CPU", "Meta", "Autograd", "ADInplaceOrView", "AutocastCPU", "AutocastCUDA"),
        "entmax_make_key_index": ("CompositeExplicitAutograd", "Meta"),
        "entmax_key_index_update": ("CPU", "Meta", "Autograd", "ADInplaceOrView"),
        "entmax_attn_summary": keys,
        "entmax_attn_summary.per_head": keys,
        "entmax_attn_varlen_summary": keys,
        "entmax_attn_varlen_summary.per_head": keys,
        "_entmax_attn_summary": ("CPU", "Meta", "Autograd"),
        "_entmax_attn_forward": ("CPU", "Meta"),
        "_entmax_attn_indexed": ("CPU", "Meta"),
        "_entmax_attn_backward": ("CPU", "Meta"),
        "entmax": ("Autograd", "CompositeExplicitAutograd", "AutocastCUDA"),
        "entmax.tensor_alpha": ("Autograd", "CompositeExplicitAutograd", "AutocastCUDA"),
        "_with_gradient": ("Autograd", "CompositeExplicitAutograd"),
        "_entmax_forward": ("CPU", "Meta"),
        "_entmax_backward": ("CPU", "Meta"),
    }.items():
        for key in wanted:
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"adasplash::{name}", key), (name, key)
