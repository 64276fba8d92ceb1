"""Every perturbation target in its output form: worked values, and against the maps written down."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffctrl.softpag import SoftPAGConfig, perturb
from diffctrl.softpag.blur import blur_matrix, blurred, half_width
from diffctrl.softpag.reference import attention_map, perturbed_map, perturbed_output
from tests.softpag.test_perturb import KEY, OUTPUT, QUERY, VALUE, close, float64

torch.set_num_threads(1)

EXACT = {"rtol": 0.0, "atol": 1e-9}

# Every target, scope and path, with the options that it needs.
SETTINGS: dict[str, dict[str, Any]] = {
    "identity": {},
    "identity-image-rows": {"scope": "image_rows"},
    "image-block": {"scope": "image_block"},
    "image-block-logit": {"scope": "image_block_logit"},
    "spherical": {"path": "spherical"},
    "spherical-image-rows": {"path": "spherical", "scope": "image_rows"},
    "uniform": {"kind": "uniform"},
    "uniform-image-rows": {"kind": "uniform", "scope": "image_rows"},
    "mean-query": {"kind": "mean_query"},
    "mean-query-img": {"kind": "mean_query", "query_mean": "img"},
    "mean-query-txt": {"kind": "mean_query", "query_mean": "txt", "scope": "image_rows"},
    "blur": {"kind": "blur_query", "sigma": 0.7},
    "blur-wide": {"kind": "blur_query", "sigma": 3.0},
    "argmax": {"kind": "argmax"},
    "sharper": {"kind": "temperature", "temperature": 0.5},
    "flatter": {"kind": "temperature", "temperature": 2.0, "scope": "image_rows"},
    "zero": {"kind": "zero"},
}


@pytest.fixture(autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


# --- the worked example of the specification, 2.5 -----------------------------------------------------------


def worked(head: int, u: float, image: tuple[int, int] = (0, 3), **options: Any) -> Tensor:
    """(S, D) of one perturbed head of the example; the other head must not move."""
    config = SoftPAGConfig(**options)
    result = perturb(
        config, OUTPUT, QUERY, KEY, VALUE, float64([[u]]), torch.tensor([head]), image=image, scale=1.0
    )
    assert torch.equal(result[0, :, 1 - head], OUTPUT[0, :, 1 - head])
    return result[0, :, head]


@pytest.mark.parametrize(
    ("u", "options", "expected"),
    [
        (0.25, {"kind": "uniform"}, [[13 / 48, 13 / 24, 11 / 6], [11 / 24, 13 / 24, 13 / 12],
                                     [13 / 48, 11 / 12, 13 / 12]]),
        (0.25, {"kind": "mean_query"}, [[13 / 48, 13 / 24, 11 / 6], [11 / 24, 13 / 24, 13 / 12],
                                        [13 / 48, 11 / 12, 13 / 12]]),
        (0.25, {"kind": "argmax"}, [[0.1875, 0.375, 2.5], [0.625, 0.375, 0.75], [0.1875, 1.25, 0.75]]),
        (0.25, {"kind": "zero"}, [[0.1875, 0.375, 1.5], [0.375, 0.375, 0.75], [0.1875, 0.75, 0.75]]),
        (1.0, {"kind": "temperature", "temperature": 0.5}, [[1 / 6, 1 / 3, 8 / 3], [2 / 3, 1 / 3, 2 / 3],
                                                            [1 / 6, 4 / 3, 2 / 3]]),
        (0.5, {"path": "spherical"}, [[0.75, 1 / 6, 2 / 3], [1 / 6, 1.5, 1 / 3], [1 / 12, 1 / 3, 3]]),
        (0.5, {}, [[0.625, 0.25, 1], [0.25, 1.25, 0.5], [0.125, 0.5, 2.5]]),
    ],
)  # fmt: skip
def test_targets_of_head_0(u: float, options: dict[str, Any], expected: Any) -> None:
    close(worked(0, u, **options), expected)


def test_the_mean_query_of_head_1() -> None:
    result = worked(1, 0.25, kind="mean_query")
    close(result[0], [1.6181299995, 1.2893766665, 0.3696883332])
    row = [0.2787533330, 0.4424933340, 0.2787533330]
    close(worked(1, 1.0, kind="mean_query")[0], (float64(row) @ VALUE[0, :, 1]).tolist())


@pytest.mark.parametrize(
    ("scope", "changed"),
    [
        ("image_rows", [[1.7, 0.9, 0.55], [1.5, 1.5, 0.25]]),
        ("image_block", [[1.8, 1.1, 0.5], [11 / 6, 1.75, 0.25]]),
        ("image_block_logit", [[28 / 15, 37 / 30, 7 / 15], [2, 1.875, 0.25]]),
    ],
)
def test_scopes_where_the_image_comes_first(scope: Any, changed: Any) -> None:
    result = worked(1, 0.25, image=(0, 2), scope=scope)
    close(result[:2], changed)
    assert torch.equal(result[2], OUTPUT[0, 2, 1])


@pytest.mark.parametrize(
    ("scope", "changed"),
    [
        ("image_rows", [[1.5, 1.5, 0.25], [29 / 14, 16 / 7, 3 / 28]]),
        ("image_block", [[5 / 3, 17 / 12, 1 / 3], [2, 15 / 7, 1 / 7]]),
    ],
)
def test_scopes_where_the_text_comes_first(scope: Any, changed: Any) -> None:
    result = worked(1, 0.25, image=(1, 3), scope=scope)
    close(result[1:], changed)
    assert torch.equal(result[0], OUTPUT[0, 0, 1])


def test_target_rows_of_the_blocks_and_the_forbidden_one() -> None:
    plain = attention_map(QUERY, KEY, 1.0)[0, 1]
    close(plain, [[0.4, 0.4, 0.2], [1 / 3] * 3, [1 / 7, 4 / 7, 2 / 7]])
    one = float64([[1.0, 1.0]])
    for scope, rows in (
        ("image_block", [[0.8, 0, 0.2], [0, 2 / 3, 1 / 3]]),
        ("image_block_logit", [[2 / 3, 0, 1 / 3], [0, 0.5, 0.5]]),
    ):
        config = SoftPAGConfig(scope=scope)  # type: ignore[arg-type]
        close(perturbed_map(config, QUERY, KEY, one, image=(0, 2), scale=1.0)[0, 1, :2], rows)
    forbidden = plain.clone()
    forbidden[:2, :2] = torch.eye(2)
    close(forbidden.sum(-1)[:2], [1.2, 4 / 3])


# --- against the map written down ---------------------------------------------------------------------------


def random(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).double()


GRID, TEXT = (1, 3, 4), 5
SIDES = {"image first": (0, 12), "text first": (5, 17)}


def operands(kv_heads: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    return (
        2 * random(3, 17, 4, 6),
        2 * random(3, 17, kv_heads, 6, seed=1),
        random(3, 17, kv_heads, 6, seed=2),
    )


def weights() -> Tensor:
    """(3, 4): row 0 and heads 0 and 2 are left alone."""
    weight = torch.zeros(3, 4).double()
    weight[1:, 1], weight[1:, 3] = float64([0.3, 1.0]), float64([0.8, 0.25])
    return weight


def text_bias(image: tuple[int, int], valid: tuple[int, ...] = (5, 3, 2)) -> Tensor:
    """(B, 1, 1, S): padding of the text is not attended."""
    start = 0 if image[0] else image[1]
    bias = torch.zeros(3, 1, 1, 17).double()
    for row, length in enumerate(valid):
        bias[row, 0, 0, start + length : start + TEXT] = -math.inf
    return bias


def by_output(config: SoftPAGConfig, parts: tuple[Tensor, Tensor, Tensor], mask: Tensor | None,
              image: tuple[int, int], bias: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(O, O') of the output form."""
    query, key, value = parts
    groups = query.shape[2] // key.shape[2]
    wide_key, wide_value = (part.repeat_interleave(groups, 2) for part in (key, value))
    plain = torch.einsum(
        "bhqk,bkhd->bqhd", attention_map(query, wide_key, 1 / math.sqrt(6), bias), wide_value
    )
    heads = torch.tensor([1, 3])
    changed = perturb(
        config,
        plain,
        query,
        key,
        value,
        weights()[1:, heads],
        heads,
        image=image,
        mask=mask,
        grid=GRID,
    )
    return plain, changed


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("masked", ["no mask", "bool", "additive", "keys", "per query"])
@pytest.mark.parametrize("name", SETTINGS)
def test_the_output_form_is_the_blended_map(name: str, masked: str, side: str) -> None:
    config, image = SoftPAGConfig(**SETTINGS[name]), SIDES[side]
    bias = None if masked == "no mask" else text_bias(image)
    mask = bias
    if bias is not None and masked == "bool":
        mask = bias == 0
    elif bias is not None and masked == "keys":
        mask = (bias == 0)[:, 0, 0]
    elif bias is not None and masked == "per query":  # what a masked query gives is nobody's concern
        mask = bias = bias.expand(3, 1, 17, 17).contiguous()
    parts = operands()
    plain, changed = by_output(config, parts, mask, image, bias)
    expected = perturbed_output(config, *parts, weights(), image=image, grid=GRID, bias=bias)
    valid = torch.ones(3, 17, dtype=torch.bool) if bias is None else (bias == 0)[:, 0, 0]
    torch.testing.assert_close(changed[valid], expected[valid], **EXACT)
    assert torch.equal(changed[0], plain[0])
    assert torch.equal(changed[:, :, [0, 2]], plain[:, :, [0, 2]])
    assert not torch.equal(changed[1:, :, [1, 3]], plain[1:, :, [1, 3]])
    text = [token for token in range(17) if not image[0] <= token < image[1]]
    untouched = config.scope != "joint" or config.kind == "blur_query"
    assert torch.equal(changed[:, text], plain[:, text]) == untouched


@pytest.mark.parametrize("name", SETTINGS)
def test_grouped_heads_share_their_value_head(name: str) -> None:
    config, parts = SoftPAGConfig(**SETTINGS[name]), operands(kv_heads=2)
    _, changed = by_output(config, parts, None, (0, 12), None)
    expected = perturbed_output(config, *parts, weights(), image=(0, 12), grid=GRID)
    torch.testing.assert_close(changed, expected, **EXACT)


@pytest.mark.parametrize("name", SETTINGS)
def test_no_input_is_edited_and_half_precision_stays_near(name: str) -> None:
    config = SoftPAGConfig(**SETTINGS[name])
    exact = [part.bfloat16().double() for part in operands()]
    plain, wanted = by_output(config, tuple(exact), None, (0, 12), None)  # type: ignore[arg-type]
    heads, half = torch.tensor([1, 3]), [part.bfloat16() for part in exact]
    copies = [part.clone() for part in half]
    output = plain.bfloat16()
    weight = weights()[1:, heads]
    actual = perturb(config, output, *half, weight, heads, image=(0, 12), grid=GRID)
    assert actual.dtype == torch.bfloat16
    assert all(torch.equal(now, then) for now, then in zip(half, copies, strict=True))
    assert torch.equal(output, plain.bfloat16())
    # Scores of up to about 15 are rounded by the kernels at 2^-8: an error of e^(15/256) in a weight.
    torch.testing.assert_close(actual.double(), wanted, rtol=0.05, atol=0.15)


def test_a_weight_of_zero_is_the_output_bit_for_bit() -> None:
    heads = torch.arange(4)
    for name in SETTINGS:
        query, key, value = operands()
        value[0] = math.nan
        output = random(3, 17, 4, 6, seed=5)
        result = perturb(SoftPAGConfig(**SETTINGS[name]), output, query, key, value,
                         torch.zeros(3, 4).double(), heads, image=(0, 12), grid=GRID)  # fmt: skip
        assert torch.equal(result, output)


# --- properties ---------------------------------------------------------------------------------------------

SIZES = st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4), st.integers(1, 4),
                  st.integers(1, 4), st.integers(0, 2**16), st.booleans())  # fmt: skip


@pytest.mark.parametrize("name", SETTINGS)
@settings(max_examples=12, deadline=None)
@given(SIZES)
def test_rows_stay_distributions(name: str, sizes: tuple[int, int, int, int, int, int, bool]) -> None:
    """Values of one give outputs of one, whatever the queries and the strengths; zero gives 1 - u."""
    batch, heads, rows, columns, text, seed, text_first = sizes
    config = SoftPAGConfig(**SETTINGS[name])
    tokens = rows * columns + text
    image = (text, tokens) if text_first else (0, rows * columns)
    query, key = (
        3 * random(batch, tokens, heads, 4, seed=seed),
        3 * random(batch, tokens, heads, 4, seed=seed + 1),
    )
    weight = torch.rand(batch, heads, generator=torch.Generator().manual_seed(seed)).double()
    ones = torch.ones_like(query)
    result = perturb(config, ones, query, key, ones, weight, torch.arange(heads), image=image,
                     grid=(1, rows, columns))  # fmt: skip
    expected = (1 - weight)[:, None, :, None].expand_as(ones) if config.kind == "zero" else ones
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-12)
    written = perturbed_map(config, query, key, weight, image=image, grid=(1, rows, columns))
    if config.kind != "zero" and tokens > 1:
        torch.testing.assert_close(
            written.nan_to_num(0).sum(-1) > 1 - 1e-6, torch.ones_like(written[..., 0]) > 0
        )
        assert written.min() >= 0


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 9), st.floats(0.1, 20.0))
def test_a_blur_is_an_average(size: int, sigma: float) -> None:
    matrix = blur_matrix(size, sigma, torch.float64, torch.device("cpu"))
    torch.testing.assert_close(matrix.sum(1), torch.ones(size).double(), **EXACT)
    assert matrix.min() >= 0
    assert half_width(size, sigma) < size


def test_the_blur_is_one_convolution_per_frame() -> None:
    grid, sigma = (2, 9, 8), 0.8
    query = random(1, 2 * 72, 1, 1)
    offsets = torch.arange(-2, 3).double()  # 6 sigma is 4.8: five tokens
    kernel = torch.exp(-0.5 * (offsets / sigma) ** 2)
    kernel = torch.outer(kernel, kernel) / kernel.sum() ** 2
    images = torch.nn.functional.pad(query.view(2, 1, 9, 8), (2, 2, 2, 2), mode="reflect")
    expected = torch.nn.functional.conv2d(images, kernel[None, None]).view(1, -1, 1, 1)
    torch.testing.assert_close(blurred(query, grid, sigma), expected, **EXACT)


# --- settings -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "blur"}, "kind='blur' is unknown; accepted: identity, uniform"),
        ({"path": "square"}, "path='square' is unknown; accepted: linear, spherical"),
        ({"mode": "fast"}, "mode='fast' is unknown; accepted: batched, sequential, prefix"),
        ({"difference": "cfg"}, "difference='cfg' is unknown"),
        ({"kind": "blur_query"}, "kind='blur_query' needs sigma"),
        ({"kind": "temperature"}, "kind='temperature' needs temperature"),
        ({"kind": "temperature", "temperature": 1.0}, "nothing would be perturbed"),
        ({"kind": "temperature", "temperature": 0.0}, r"temperature=0\.0 is not a finite number > 0"),
        ({"sigma": 2.0}, "sigma=2.0 belongs to kind='blur_query', but kind is 'identity'"),
        ({"query_mean": "img"}, "belongs to kind='mean_query'"),
        ({"kind": "mean_query", "query_mean": "text"}, "query_mean='text' is unknown"),
        ({"kind": "uniform", "scope": "image_block"}, "defined for kind='identity' alone"),
        ({"kind": "zero", "path": "spherical"}, "defined for kind='identity' alone"),
        ({"path": "spherical", "scope": "image_block"}, "cannot be combined"),
        ({"apg_norm": 3.0}, "apg_norm=3.0 belongs to difference='apg'"),
        ({"difference": "tangential", "apg_momentum": 0.5}, "belongs to difference='apg'"),
        ({"difference": "apg", "apg_momentum": -1.0}, r"not in \(-1, 1\)"),
        ({"difference": "apg", "apg_norm": 0.0}, "not a finite number > 0"),
        ({"difference": "apg", "apg_parallel": math.inf}, "not a finite number"),
        ({"rescale": 1.5}, r"rescale=1\.5 is not in \[0, 1\]"),
        ({"heads": "L1H0=1.5"}, "its strength is not in"),
        ({"heads": "L1H0=strong"}, "strong is no strength"),
        ({"heads": "L1H0=0.5,L1H0=0.6"}, "head L1H0 is given two strengths"),
    ],
)  # fmt: skip
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SoftPAGConfig(**options)
