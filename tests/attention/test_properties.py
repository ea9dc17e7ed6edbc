"""Any combination of options, types and shapes against the fp64 reference, forward and backward."""

import hypothesis.strategies as st
import torch
from hypothesis import given, settings

from adasplash import entmax_attn
from common import check_gradients, make_inputs
from drawn import UNTIMED
from packing import check_packed, packed

lengths = st.one_of(st.integers(0, 5), st.integers(0, 80), st.sampled_from((63, 64, 65, 128, 129, 140)))
window_sides = st.one_of(st.just(-1), st.integers(0, 10), st.integers(0, 150))


@st.composite
def cases(draw):
    """A description in plain numbers, so that what fails can be read."""
    case = dict(
        kv_heads=draw(st.integers(1, 2)),
        group=draw(st.sampled_from((1, 1, 2, 3))),
        size=draw(st.one_of(st.integers(1, 40), st.sampled_from((1, 16, 64)))),
        value_size=draw(st.one_of(st.integers(1, 40), st.sampled_from((1, 16, 64)))),
        sigma=draw(st.sampled_from((0.05, 0.5, 1.5, 4.0))),
        dtype=draw(st.sampled_from((torch.float64, torch.float32, torch.bfloat16, torch.float16))),
        seed=draw(st.integers(0, 2**20)),
        is_causal=draw(st.booleans()),
        window=draw(st.one_of(st.just((-1, -1)), st.tuples(window_sides, window_sides))),
        scale=draw(st.one_of(st.none(), st.sampled_from((0.1, 1.0, -0.3)))),
        form=draw(st.sampled_from(("plain", "q_seqlens", "kv_seqlens", "both", "packed"))),
        slopes=draw(st.sampled_from((None, None, "heads", "batch"))),
        alpha=draw(st.one_of(st.sampled_from((1.05, 1.25, 1.5, 2.0, "heads", "scalar")), st.floats(1.05, 2.0))),
    )
    batch = draw(st.sampled_from((0, 1, 2, 2, 3)))
    m, n = draw(lengths), draw(lengths)

    def one_each(longest):
        return [draw(st.integers(0, longest)) for _ in range(batch)]

    of_query = case["form"] in ("q_seqlens", "both", "packed")
    of_key = case["form"] in ("kv_seqlens", "both", "packed")
    q_lengths, k_lengths = (one_each(longest) if given else None for longest, given in ((m, of_query), (n, of_key)))
    return dict(case, batch=batch, m=m, n=n, q_lengths=q_lengths, k_lengths=k_lengths)


@st.composite
def cases_with_starts(draw):
    """The same in the padded form, with a first key for each entry."""
    case = draw(cases().filter(lambda case: case["form"] != "packed"))
    return dict(case, starts=[draw(st.integers(0, case["n"])) for _ in range(case["batch"])])


@st.composite
def cases_with_softmax_and_dropout(draw):
    """The same with alpha = 1, also in some heads, and with dropout."""
    alpha = draw(st.sampled_from((1.0, 1.0, "some heads", "some heads", 1.3, 1.5, 2.0)))
    return dict(draw(cases()), alpha=alpha, dropout_p=draw(st.sampled_from((0.0, 0.2, 0.7))))


@st.composite
def cases_of_parts(draw):
    """The same of parts of sequences: a place of each one's first query and, for dropout, an origin; padded ones with
    starts or without."""
    case = draw(st.one_of(cases(), cases_with_starts()))
    place = st.one_of(st.integers(-10, 10), st.integers(-150, 150), st.sampled_from((-(2**29) + 1, 2**29 - 1)))
    places = [draw(place) for _ in range(case["batch"])]
    origins = [[draw(st.integers(-(2**31), 2**31 - 1)) for _ in range(4)] for _ in range(case["batch"])]
    # A slope times the farthest distance leaves nothing of scores in float32.
    slopes = None if any(abs(each) > 150 for each in places) else case["slopes"]
    return dict(case, places=places, origins=origins, slopes=slopes, dropout_p=draw(st.sampled_from((0.0, 0.3))))


# Of the dense composition's error. Among hundreds of drawn cases some are ill-conditioned: near alpha = 2 a key at the
# threshold has little weight and all of its part in the gradient. CUDA kernels also round dS about dO.out, which for
# alpha = 2 may be as far from delta as dS is large: where keys are nearly equal and their dS cancel, dq is off by half
# roundings of dS times the keys (`room`), dk likewise; dS is as large as dO.v, which of normal numbers is the root of
# value_size.
TIMES, TIMES_SOFTMAX, TIMES_CUDA = 4, 6, 10
ROOM_CUDA = 40


def test_every_combination(backend):
    @settings(UNTIMED, max_examples=backend.examples)
    @given(cases())
    def holds(case):
        check(backend, case)

    holds()


def test_every_combination_with_starts(backend):
    @settings(UNTIMED, max_examples=backend.examples // 2)
    @given(cases_with_starts())
    def holds(case):
        check(backend, case)

    holds()


def test_every_combination_of_parts(backend):
    @settings(UNTIMED, max_examples=backend.examples // 2)
    @given(cases_of_parts())
    def holds(case):
        check(backend, case)

    holds()


def test_every_combination_with_softmax_and_dropout(backend):
    @settings(UNTIMED, max_examples=backend.examples // 2)
    @given(cases_with_softmax_and_dropout())
    def holds(case):
        check(backend, case)

    holds()


def check(backend, case):
    if backend.name == "cpu":
        times, room = TIMES_SOFTMAX if case["alpha"] in (1.0, "some heads") else TIMES, 1
    else:
        times, room = TIMES_CUDA, ROOM_CUDA * case["value_size"] ** 0.5
    if case["dtype"] not in backend.dtypes:
        case = {**case, "dtype": torch.float32}
    heads, generator = case["kv_heads"] * case["group"], torch.Generator().manual_seed(case["seed"])
    shape = {name: case[name] for name in ("kv_heads", "size", "value_size", "sigma", "dtype", "seed")}
    shape.update(heads=heads, device=backend.device)
    options = {name: case[name] for name in ("is_causal", "window", "scale", "alpha")}
    if case["alpha"] in ("heads", "scalar", "some heads"):
        drawn = 1.05 + 0.95 * torch.rand(() if case["alpha"] == "scalar" else heads, generator=generator)
        if case["alpha"] == "some heads":
            drawn = torch.where(torch.rand(heads, generator=generator) < 0.5, 1.0, drawn)
        options["alpha"] = drawn.to(backend.device)
    if case.get("dropout_p", 0) > 0:
        seed = torch.randint(2**62, (), generator=generator).to(backend.device)
        options.update(dropout_p=case["dropout_p"], dropout_seed=seed)
    if case["slopes"] is not None:
        rows = (case["batch"],) if case["slopes"] == "batch" else ()
        options["alibi_slopes"] = (torch.rand(*rows, heads, generator=generator) * 0.3).to(backend.device)
    for name, numbers in (("q_positions", "places"), ("dropout_origin", "origins")):
        if case.get(numbers):
            options[name] = torch.tensor(case[numbers], device=backend.device)
    if case["form"] == "packed":
        inputs, lengths = packed(case["q_lengths"], case["k_lengths"], **shape)
        check_packed(inputs, lengths, times=times, room=room, **options)
        return
    for name, rows in (("q_seqlens", "q_lengths"), ("kv_seqlens", "k_lengths"), ("kv_starts", "starts")):
        if case.get(rows) is not None:
            options[name] = torch.tensor(case[rows], dtype=torch.int32, device=backend.device)
    inputs = make_inputs(case["batch"], m=case["m"], n=case["n"], **shape)
    check_gradients(entmax_attn, inputs, times=times, room=room, **options)


def test_the_checker_checks(backend):
    """A wrong option is noticed: without this the test above could compare nothing with nothing."""
    inputs = make_inputs(2, 2, 20, 30, device=backend.device)

    def forgetful(*tensors, window, **options):
        return entmax_attn(*tensors, **options)

    for wrong in (forgetful, lambda *x, **options: entmax_attn(*x, **options) * 1.001):
        try:
            check_gradients(wrong, inputs, window=(3, 3), alpha=1.5)
        except AssertionError:
            continue
        raise AssertionError("a wrong result passed")
