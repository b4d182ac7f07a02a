"""The fast form equals the equations, and behaves as the equations say at their limits."""

from dataclasses import replace

import pytest
import torch
from reference import nested_attention

from nested_attention import attention
from nested_attention.attention import NestedToken, personalize, subject_probabilities, text_attention

B, H, N, T, M, D = 2, 3, 5, 7, 6, 8


@pytest.fixture(autouse=True)
def as_in_sampling():
    with torch.no_grad():
        yield


def problem(dtype=torch.float64, seed=0):
    make = torch.Generator().manual_seed(seed)
    q, k, v = (torch.randn(B, H, n, D, generator=make, dtype=dtype) for n in (N, T, T))
    subjects = [[torch.randn(1, H, M + i, D, generator=make, dtype=dtype) for _ in "kv"] for i in range(3)]
    return q, k, v, subjects


def fast(q, k, v, rows):
    """What a host does: text attention for all rows, then each row's subjects."""
    text, lse = text_attention(q, k, v)
    out = text.clone()
    for i, tokens in enumerate(rows):
        part = slice(i, i + 1)
        if tokens:
            personalize(out[part], q[part], k[part], v[part], tokens, text[part], None if lse is None else lse[part])
    return out


def token(pair, columns=(2,), **settings):
    return NestedToken(columns, *pair, **settings)


REGION = torch.tensor([[0.0, 1.0, 0.5, 1.0, 0.25]])

CASES = {
    "one subject": lambda s: [[token(s[0])], [token(s[0])]],
    "a row without": lambda s: [[], [token(s[0])]],
    "different subjects": lambda s: [[token(s[0], (1,))], [token(s[1], (4,))]],
    "two in one row": lambda s: [[token(s[0], (1,)), token(s[1], (4,))], []],
    "several columns": lambda s: [[token(s[0], (0, 3, 6))], [token(s[1], (2, 5)), token(s[0], (1,))]],
    "norm off": lambda s: [[token(s[0], norm="off")], [token(s[1], norm="off")]],
    "norm clamp": lambda s: [[token(s[0], norm="clamp", norm_factor=0.4)], [token(s[1], norm="clamp")]],
    "alpha": lambda s: [[token(s[0], norm_factor=0.7)], [token(s[1], norm_factor=3.0)]],
    "strength": lambda s: [[token(s[0], strength=0.6)], [token(s[1], strength=1.3)]],
    "token weight": lambda s: [[token(s[0], weight=1.5)], [token(s[1], (1, 4), weight=0.5)]],
    "two token weights": lambda s: [
        [token(s[0], (1,), weight=2.0), token(s[1], (4,)), token(s[2], (6,), weight=3.0)],
        [],
    ],
    "region": lambda s: [[token(s[0], region=REGION)], [token(s[1], (1, 4), region=REGION, strength=0.5)]],
    "competition": lambda s: [
        [token(s[0], (1,), subject=0, competition=1.5), token(s[1], (4,), subject=1)],
        [token(s[i], (2 * i,), subject=i, competition=float(i)) for i in range(3)],
    ],
    "competition for several columns": lambda s: [
        [token(s[0], (0, 3), subject=5, competition=2.0), token(s[1], (1, 6), subject=3), token(s[0], (4,), subject=5)],
        [token(s[0], (1, 2), competition=4.0)],
    ],
    "competition, region, strength, token weight": lambda s: [
        [
            token(s[0], (1,), subject=1, region=REGION, strength=0.7, weight=1.5),
            token(s[1], (4,), subject=2, region=1 - REGION, strength=1.2, competition=0.5),
        ],
        [
            token(s[0], (1, 5), subject=1, region=REGION, competition=3.0, norm="off"),
            token(s[1], (0, 4), subject=2, norm="clamp", norm_factor=0.4, weight=2.0),
        ],
    ],
    "competition where nobody may be": lambda s: [
        [token(s[i], (i,), subject=i, region=REGION * (REGION > 0.4), competition=1.0) for i in range(2)],
        [],
    ],
    "all at once": lambda s: [
        [token(s[0], (0, 1), norm="clamp", weight=1.7, region=REGION), token(s[2], (5,), norm="off", strength=1.2)],
        [token(s[1], (3,), strength=0.4, weight=2.5)],
    ],
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernel", ["fused", "portable"])
def test_equals_the_equations(case, kernel, monkeypatch):
    if kernel == "portable":
        monkeypatch.setattr(attention, "has_fused_lse", lambda q: False)
    q, k, v, subjects = problem()
    rows = CASES[case](subjects)
    torch.testing.assert_close(fast(q, k, v, rows), nested_attention(q, k, v, rows), rtol=1e-9, atol=1e-9)
    result = fast(q.float(), k.float(), v.float(), moved(rows, torch.float32))
    torch.testing.assert_close(result.double(), nested_attention(q, k, v, rows), rtol=1e-5, atol=1e-5)


def moved(rows, dtype, device="cpu"):
    """The same tokens in another precision, on another device."""

    def move(t):
        region = None if t.region is None else t.region.to(device)
        return replace(t, keys=t.keys.to(device, dtype), values=t.values.to(device, dtype), region=region)

    return [[move(t) for t in row] for row in rows]


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
@pytest.mark.parametrize("case", CASES)
def test_half_precision(case, dtype, tolerance):
    """On a GPU, if there is one."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v, subjects = problem()
    q, k, v = (x.to(device, dtype) for x in (q, k, v))
    rows = moved(CASES[case](subjects), dtype, device)
    exact = [x.double().cpu() for x in (q, k, v)]
    expected = nested_attention(*exact, moved(rows, torch.float64))
    error = (fast(q, k, v, rows).double().cpu() - expected).norm() / expected.norm()
    assert error < tolerance


def test_equal_nested_values_give_one_constant_value():
    """Nested attention over equal values is a constant: the single-token methods are this special case."""
    q, k, v, subjects = problem()
    constant = subjects[0][1][:, :, :1].expand(-1, -1, M, -1)
    result = fast(q, k, v, [[token((subjects[0][0], constant), norm="off")]] * B)
    v[:, :, 2] = constant[:, :, 0]
    torch.testing.assert_close(result, text_attention(q, k, v)[0])


def test_order_of_nested_tokens_changes_nothing():
    q, k, v, subjects = problem()
    shuffle = torch.randperm(M)
    shuffled = [x[:, :, shuffle] for x in subjects[0]]
    torch.testing.assert_close(fast(q, k, v, [[token(subjects[0])]] * B), fast(q, k, v, [[token(shuffled)]] * B))


def test_repeated_context_is_the_context_once():
    """Hosts repeat a short context beside a long one: the token then stands at several columns."""
    q, k, v, subjects = problem()
    once = fast(q, k, v, [[token(subjects[0], weight=1.4)]] * B)
    twice = fast(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), [[token(subjects[0], (2, 2 + T), weight=1.4)]] * B)
    torch.testing.assert_close(once, twice)
    once = fast(q, k, v, [rivals(subjects, 1.5)] * B)
    doubled = [replace(t, columns=(*t.columns, t.columns[0] + T)) for t in rivals(subjects, 1.5)]
    torch.testing.assert_close(once, fast(q, k.repeat(1, 1, 2, 1), v.repeat(1, 1, 2, 1), [doubled] * B))


def rivals(subjects, competition, **settings):
    return [token(subjects[i], (1 + 3 * i,), subject=i, competition=competition, **settings) for i in range(2)]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_values_of_zero_are_a_number(dtype):
    """As of a layer whose nested projection is zero: there is nothing to rescale."""
    q, k, v = (torch.randn(1, 2, n, 8, generator=torch.Generator().manual_seed(n)).to(dtype) for n in (5, 3, 4))
    k, v = k[:, :, :3], v[:, :, :3]
    nothing = NestedToken((1,), torch.zeros(1, 2, 6, 8, dtype=dtype), torch.zeros(1, 2, 6, 8, dtype=dtype))
    out = attention.personalize(attention.text_attention(q, k, v)[0], q, k, v, [nothing])
    assert out.isfinite().all()


def test_without_competition_or_rivals_nothing_changes():
    q, k, v, subjects = problem()
    plain = fast(q, k, v, [[token(subjects[0], (1,)), token(subjects[1], (4,))]] * B)
    assert torch.equal(plain, fast(q, k, v, [rivals(subjects, 0.0)] * B))
    one = [token(subjects[0], (1, 4), competition=3.0)]
    assert torch.equal(fast(q, k, v, [one] * B), fast(q, k, v, [[token(subjects[0], (1, 4))]] * B))


def test_competition_sharpens_the_shares_and_keeps_the_sum():
    """With one head, p_s becomes P p_s^(1+c) / sum_t p_t^(1+c)."""
    p = torch.tensor([[0.30, 0.10], [0.02, 0.04], [0.25, 0.25], [0.0, 0.2]], dtype=torch.float64)[None, None]
    _, _, _, subjects = problem()
    for c in (0.5, 1.0, 4.0):
        powers = p ** (1 + c)
        expected = p.sum(-1, keepdim=True) * powers / powers.sum(-1, keepdim=True)
        torch.testing.assert_close(attention.settle(p, rivals(subjects, c)), expected)


def test_strong_competition_gives_a_place_to_one_subject_in_all_heads():
    q, k, _, subjects = problem()
    p = attention.subject_probabilities(q, k, rivals(subjects, 0.0))
    settled = attention.settle(p, rivals(subjects, 1e4))
    winner = p.mean(1, keepdim=True).argmax(-1, keepdim=True).expand(-1, H, -1, -1)
    torch.testing.assert_close(settled.gather(-1, winner)[..., 0], p.sum(-1))
    torch.testing.assert_close(settled.sum(-1), p.sum(-1))


def test_subjects_compete_only_where_their_regions_meet():
    """Elsewhere a word that is plain text there would lose its part of the prompt."""
    q, k, _, subjects = problem()
    apart = (REGION > 0.4).to(REGION.dtype)
    tokens = [replace(t, region=r) for t, r in zip(rivals(subjects, 3.0), (apart, 1 - apart), strict=True)]
    p = attention.subject_probabilities(q, k, tokens)
    torch.testing.assert_close(attention.settle(p, tokens), p)
    tokens[1] = replace(tokens[1], region=None)
    settled, everywhere = attention.settle(p, tokens), attention.settle(p, rivals(subjects, 3.0))
    inside = apart.bool().expand(p.shape[0], -1)
    for row in range(len(p)):
        torch.testing.assert_close(settled[row][:, inside[row]], everywhere[row][:, inside[row]])
        torch.testing.assert_close(settled[row][:, ~inside[row]], p[row][:, ~inside[row]])
    assert not torch.allclose(everywhere, p, rtol=1e-2)


def test_adds_to_whatever_else_is_in_the_output():
    q, k, v, subjects = problem()
    text, lse = text_attention(q, k, v)
    other = torch.randn_like(text)
    tokens = [token(subjects[0], weight=1.3)]
    alone = personalize(text.clone(), q, k, v, tokens, text, lse)
    torch.testing.assert_close(personalize(text + other, q, k, v, tokens, text, lse), alone + other)


def test_strength_zero_is_the_text_alone():
    q, k, v, subjects = problem()
    assert torch.equal(fast(q, k, v, [[token(subjects[0], strength=0.0)]] * B), text_attention(q, k, v)[0])


def test_huge_logits_stay_finite():
    q, k, v, subjects = problem(torch.float32)
    for tokens in ([token(subjects[0], weight=8.0)], rivals(subjects, 10.0), rivals(subjects, 10.0, region=REGION)):
        assert fast(q * 60, k * 60, v, [tokens] * B).isfinite().all()


def test_chunks_of_the_softmax_are_the_whole():
    q, k = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8)
    tokens = [NestedToken((1, 2), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8))]
    whole = subject_probabilities(q, k, tokens)
    torch.testing.assert_close(subject_probabilities(q, k, tokens, chunk=2), whole)


def test_other_devices_attend_to_the_same(monkeypatch):
    """In chunks where probabilities may be made, in fp32 where half precision overflows before it is scaled."""
    q, k, v = (torch.randn(2, 3, n, 8) for n in (7, 5, 5))
    whole = attention.fused_attention(q, k, v)
    torch.testing.assert_close(attention.attention_in_chunks(q, k, v, chunk=3), whole)
    seen, plain = [], attention.F.scaled_dot_product_attention
    monkeypatch.setattr(
        attention.F, "scaled_dot_product_attention", lambda *x: seen.extend(t.dtype for t in x) or plain(*x)
    )
    half = attention.attention_in_fp32(q.half(), k.half(), v.half())
    assert half.dtype == torch.float16 and seen == [torch.float32] * 3
    torch.testing.assert_close(half.float(), whole, rtol=5e-3, atol=5e-3)
