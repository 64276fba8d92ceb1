"""QK norm and rotary embedding in one pass: compiled, and interpreted (`tests/triton_kernels.py`).

In the process that interprets, the families themselves take the kernel on the CPU. On a GPU:
pytest -m gpu tests/families/test_rotary.py
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.normalization import MochiRMSNorm, RMSNorm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import diffctrl
from diffctrl.families import rotary
from diffctrl.families.rotary import Form, normed_and_rotated, plain, why_not
from diffctrl.processors import NeutralAttnProcessor
from tests.helpers import CASES, build, example, rows_of, run
from tests.triton_kernels import (
    INTERPRETED,
    assembled,
    compiled_only,
    interpreted_only,
    needs_triton,
    run_interpreted,
    spilled,
)

torch.set_num_threads(1)

NORMS = (RMSNorm, MochiRMSNorm, nn.RMSNorm)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(autouse=True)
def _without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(autouse=True)
def _interpreter(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's interpreter cuts a float32 that becomes a bfloat16; a GPU rounds it."""
    monkeypatch.setattr(rotary, "_VERDICTS", {})
    if not INTERPRETED:
        return
    request.getfixturevalue("interpreter")
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    stock = InterpreterBuilder.cast_impl

    def rounded(self: Any, source: Any, target: Any) -> Any:
        if source.dtype.scalar != tl.float32 or target.scalar != tl.bfloat16:
            return stock(self, source, target)
        values = torch.tensor(source.data).bfloat16().view(torch.uint16).numpy()
        return TensorHandle(values, target.scalar)

    monkeypatch.setattr(InterpreterBuilder, "cast_impl", rounded)


@pytest.fixture
def used(monkeypatch: pytest.MonkeyPatch) -> list[Form]:
    """The forms of the calls that the kernel took, self-tests left out."""
    taken: list[Form] = []

    def spied(form: Form, *args: Any) -> Tensor:
        if form in rotary._VERDICTS:
            taken.append(form)
        return fused(form, *args)

    fused = rotary.fused
    monkeypatch.setattr(rotary, "fused", spied)
    return taken


def draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, device: str = "cpu") -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return drawn.to(device, dtype)


def weighted(kind: Any, row: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Any:
    """A norm with weights that are not one, and an eps that shows."""
    norm = kind(row, eps=1e-2)
    norm.weight = nn.Parameter(draw(row, dtype=dtype, seed=5, device=device))
    return norm


def assert_close(got: Tensor, expected: Tensor) -> None:
    """Equal, but for the neighbours of a few values in 16 bits, and to 1e-6 in float32."""
    assert got.shape == expected.shape
    assert got.dtype == expected.dtype
    assert got.is_contiguous()
    step = 1e-6 if got.dtype == torch.float32 else 2 * torch.finfo(got.dtype).eps
    off = (got.double() - expected.double()).abs().max()
    assert float(off) <= step * float(expected.abs().max())
    if got.dtype != torch.float32:
        assert int((got != expected).sum()) <= max(2, 0.01 * got.numel())


# --- plain torch --------------------------------------------------------------------------------------------


def test_plain_turns_a_range_and_leaves_the_rest() -> None:
    states, cos, sin = draw(2, 7, 3, 8, dtype=torch.bfloat16), draw(1, 4, 1, 8), draw(1, 4, 1, 8, seed=1)
    got = plain(None, states, cos, sin, first=2, stop=6)
    assert torch.equal(got[:, :2], states[:, :2])
    assert torch.equal(got[:, 6:], states[:, 6:])
    for channel in range(0, 8, 2):
        even, odd = states[:, 2:6, :, channel].float(), states[:, 2:6, :, channel + 1].float()
        one = even * cos[..., channel] - odd * sin[..., channel]
        other = odd * cos[..., channel + 1] + even * sin[..., channel + 1]
        assert torch.equal(got[:, 2:6, :, channel], one.bfloat16())
        assert torch.equal(got[:, 2:6, :, channel + 1], other.bfloat16())


@pytest.mark.parametrize("stop", [None, 6])
def test_tables_of_fewer_tokens_than_the_range_never_turn_a_part_of_it(stop: int | None) -> None:
    with pytest.raises(RuntimeError, match="must match"):
        normed_and_rotated(None, draw(1, 7, 2, 8), TABLE, TABLE, stop=stop)


def test_plain_norms_all_heads_as_one_row() -> None:
    states, norm = draw(2, 5, 3, 8), weighted(nn.RMSNorm, 24)
    expected = norm(states.flatten(2)).unflatten(-1, (3, 8))
    assert torch.equal(plain(norm, states, across_heads=True), expected)


def test_pairs_share_the_even_cosine_and_the_odd_sine() -> None:
    states, cos, sin = draw(1, 5, 2, 8), draw(1, 5, 1, 8), draw(1, 5, 1, 8, seed=1)
    shared = cos[..., 0::2].repeat_interleave(2, -1), sin[..., 1::2].repeat_interleave(2, -1)
    torch.testing.assert_close(plain(None, states, cos, sin, pairs=True), plain(None, states, *shared))


@compiled_only
def test_a_cpu_takes_plain_torch(used: list[Form]) -> None:
    states, norm = draw(1, 5, 2, 8), weighted(RMSNorm, 8)
    assert "triton" in str(why_not(norm, states)) or "not on cpu" in str(why_not(norm, states))
    assert torch.equal(normed_and_rotated(norm, states), norm(states))
    assert not used


# --- interpreted --------------------------------------------------------------------------------------------


@needs_triton
@compiled_only
def test_interpreter_process() -> None:
    run_interpreted(__file__)


@st.composite
def calls(choose: st.DrawFn) -> dict[str, Any]:
    batch, tokens, heads, dim = (choose(st.integers(1, most)) for most in (2, 5, 7, 6))
    dim *= 8
    dtype, kind = choose(st.sampled_from(DTYPES)), choose(st.sampled_from((None, *NORMS)))
    across, strided = choose(st.booleans()), choose(st.booleans())
    norm = None
    if kind is not None:
        row = heads * dim if across else dim
        bare = choose(st.booleans())
        norm = kind(row, eps=1e-3, elementwise_affine=False) if bare else weighted(kind, row, dtype)
    states = draw(batch, tokens, 3 if strided else 1, heads, dim, dtype=dtype)[:, :, -1]
    call = {"norm": norm, "states": states, "across_heads": across}
    if kind is None or choose(st.booleans()):
        count = choose(st.integers(1, tokens))
        shape = choose(st.sampled_from((1, batch))), count, choose(st.sampled_from((1, heads))), dim
        call |= {"cos": draw(*shape, seed=1), "sin": draw(*shape, seed=2), "pairs": choose(st.booleans())}
        call["first"] = choose(st.integers(0, tokens - count))
        call["stop"] = call["first"] + count
    return call


@interpreted_only
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls())
def test_arithmetic(used: list[Form], call: dict[str, Any]) -> None:
    before, kept = len(used), call["states"].clone()
    got = normed_and_rotated(**call)
    assert len(used) == before + 1
    assert_close(got, plain(**call))
    assert torch.equal(call["states"], kept)


@interpreted_only
def test_tokens_outside_of_the_range_keep_their_bits(used: list[Form]) -> None:
    states = draw(1, 6, 3, 8)
    states[:, 0], states[:, 5] = -0.0, float("inf")
    got = normed_and_rotated(None, states, draw(1, 3, 1, 8), draw(1, 3, 1, 8, seed=1), first=2, stop=5)
    for token in (0, 1, 5):
        assert torch.equal(got[:, token].view(torch.int32), states[:, token].view(torch.int32))
    assert used


def subclassed() -> nn.Module:
    class Mine(RMSNorm):
        pass

    return weighted(Mine, 8)


def changed(**attributes: Any) -> nn.Module:
    norm = weighted(RMSNorm, 8)
    for name, value in attributes.items():
        setattr(norm, name, value)
    return norm


class Wrapped(Tensor):
    pass


TABLE = draw(1, 4, 1, 8)
REFUSED: dict[str, tuple[str, dict[str, Any]]] = {
    "no norm, no tables": ("nothing to do", {"norm": None, "cos": None, "sin": None}),
    "a subclass of tensor": ("plain tensors", {"states": draw(1, 5, 2, 8).as_subclass(Wrapped)}),
    "another device": ("not on meta", {"states": torch.empty(1, 5, 2, 8, device="meta")}),
    "float64": ("float64", {"states": draw(1, 5, 2, 8, dtype=torch.float64)}),
    "heads not split": ("(B, S, H, D)", {"states": draw(5, 2, 8)}),
    "no tokens": ("not empty", {"states": draw(1, 0, 2, 8)}),
    "an odd head dim": ("multiples of 8", {"states": draw(1, 5, 2, 12)}),
    "too many channels": ("8192 channels", {"states": draw(1, 5, 65, 128)}),
    "channels apart": ("aligned", {"states": draw(1, 5, 2, 8, 2)[..., 0]}),
    "heads at odd places": ("aligned", {"states": draw(1, 5, 2, 9)[..., :8]}),
    "a start at odd places": ("aligned", {"states": draw(81)[1:].view(1, 5, 2, 8)}),
    "another norm": ("not LayerNorm", {"norm": nn.LayerNorm(8)}),
    "a subclassed norm": ("not Mine", {"norm": subclassed()}),
    "a replaced forward": ("hooks", {"norm": changed(forward=torch.neg)}),
    "a norm that was compiled": ("compiled", {"norm": changed(_compiled_call_impl=torch.neg)}),
    "no eps": ("eps", {"norm": nn.RMSNorm(8)}),
    "a row of another size": ("rows of 8", {"norm": nn.RMSNorm((2, 8), eps=1e-6)}),
    "a bias": ("bias", {"norm": RMSNorm(8, eps=1e-6, bias=True)}),
    "a weight of another dtype": ("weight of 8", {"norm": weighted(RMSNorm, 8, torch.bfloat16)}),
    "a weight of another size": ("weight of 8", {"norm": weighted(RMSNorm, 16)}),
    "a weight of a class of its own": (
        "plain weight",
        {"norm": changed(weight=nn.Parameter(draw(8).as_subclass(Wrapped)))},
    ),
    "a weight at odd places": ("16 bytes", {"norm": changed(weight=nn.Parameter(draw(9)[1:]))}),
    "tables in 16 bits": ("float32", {"cos": TABLE.bfloat16(), "sin": TABLE.bfloat16()}),
    "tables in float64": ("float32", {"cos": TABLE.double(), "sin": TABLE.double()}),
    "one table in float64": ("float32", {"sin": TABLE.double()}),
    "tables of two shapes": ("same shape", {"sin": draw(1, 4, 2, 8)}),
    "tables without heads": ("same shape", {"cos": TABLE[0], "sin": TABLE[0]}),
    "tables at odd places": ("16 bytes", dict.fromkeys(("cos", "sin"), draw(1, 4, 1, 9)[..., :8])),
    "a range that ends too late": ("no place", {"first": 2, "stop": 6}),
    "a range longer than its tables": ("no place", {"stop": None}),
    "a range that starts too early": ("no place", {"first": -1, "stop": 3}),
    "tables of other heads": ("no place", dict.fromkeys(("cos", "sin"), draw(1, 4, 3, 8))),
    "tables of another head dim": ("no place", dict.fromkeys(("cos", "sin"), draw(1, 4, 1, 16))),
}


def asked(**change: Any) -> str | None:
    call = {"norm": weighted(RMSNorm, 8), "states": draw(1, 5, 2, 8), "cos": TABLE, "sin": TABLE, "stop": 4}
    return why_not(**(call | change))  # type: ignore[arg-type]


@interpreted_only
@pytest.mark.parametrize("name", REFUSED)
def test_each_refusal(name: str) -> None:
    reason, change = REFUSED[name]
    assert asked() is None
    assert reason in str(asked(**change))


@interpreted_only
def test_refusals_of_the_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in str(asked())
    with FlopCounterMode(display=False):
        assert "dispatch mode" in str(asked())
    with torch.autograd.forward_ad.dual_level():
        assert "forward-mode" in str(asked())
    with torch.enable_grad():
        assert "gradients" in str(asked())  # of the weight
        assert "gradients" in str(asked(norm=None, states=draw(1, 5, 2, 8).requires_grad_()))
        assert asked(norm=None) is None
    reasons = []
    torch.vmap(lambda states: reasons.append(why_not(None, states, TABLE, TABLE)) or states)(
        draw(2, 1, 5, 2, 8)
    )
    assert "functorch" in reasons[0]
    hook = nn.modules.module.register_module_forward_hook(lambda *_: None)
    assert "hooks" in str(asked())
    hook.remove()
    assert asked() is None
    for name, value, reason in (
        ("arch_of", lambda _: 75, "sm75"),
        ("interpreted", lambda: False, "not on cpu"),
        ("with_triton", lambda: False, "not installed"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(rotary, name, value)
            assert reason in str(asked())
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert "ROCm" in str(asked())


@interpreted_only
def test_compiled_code_is_left_to_the_compiler(used: list[Form]) -> None:
    norm, states = weighted(nn.RMSNorm, 8), draw(1, 4, 2, 8)
    compiled = torch.compile(normed_and_rotated, backend="eager", fullgraph=True)
    assert torch.equal(compiled(norm, states, TABLE, TABLE), plain(norm, states, TABLE, TABLE))
    assert not used


@interpreted_only
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_hooks_of_a_norm_are_called(register: str, used: list[Form]) -> None:
    norm, states, called = weighted(RMSNorm, 8), draw(1, 4, 2, 8), []
    handle = getattr(norm, register)(lambda *_: called.append(True))
    normed_and_rotated(norm, states, TABLE, TABLE)
    assert (called, used) == ([True], [])
    handle.remove()
    normed_and_rotated(norm, states, TABLE, TABLE)
    assert (called, len(used)) == ([True], 1)


def test_no_self_test_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    tests = []
    monkeypatch.setattr(rotary, "self_test", tests.append)
    form = Form("cuda:0", torch.bfloat16, 2, 8, RMSNorm)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert "captured" in str(rotary.refused(form))
    assert not tests
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert rotary.refused(form) is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert rotary.refused(form) is None
    assert tests == [form]


# --- planted faults -----------------------------------------------------------------------------------------

# What a wrong kernel would do, as a change of what the right one is given.
FAULTS: dict[str, Callable[[Any, Any, Any, Any, int], tuple[Any, ...]]] = {
    "sign": lambda norm, states, cos, sin, first: (norm, states, cos, -sin, first),
    "cosine and sine swapped": lambda norm, states, cos, sin, first: (norm, states, sin, cos, first),
    "range": lambda norm, states, cos, sin, first: (norm, states, cos, sin, first - 1),
    "length of the range": lambda norm, states, cos, sin, first: (
        norm, states, cos[:, :-1], sin[:, :-1], first,
    ),
    "one position": lambda norm, states, cos, sin, first: (
        norm, states, cos[:, :1].expand_as(cos), sin[:, :1].expand_as(sin), first,
    ),
    "channels of a pair": lambda norm, states, cos, sin, first: (
        norm, states, cos.unflatten(-1, (-1, 2)).flip(-1).flatten(-2),
        sin.unflatten(-1, (-1, 2)).flip(-1).flatten(-2), first,
    ),
    "heads": lambda norm, states, cos, sin, first: (norm, states.flip(2), cos, sin, first),
    "weight": lambda norm, states, cos, sin, first: (
        type(norm)(norm.weight.numel(), eps=norm.eps).to(states.dtype), states, cos, sin, first,
    ),
}  # fmt: skip


@interpreted_only
@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("across_heads", [False, True])
@pytest.mark.parametrize("fault", FAULTS)
def test_the_self_test_sees(
    fault: str, across_heads: bool, pairs: bool, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    fused = rotary.fused
    monkeypatch.setattr(rotary, "fused", lambda form, *args: fused(form, *FAULTS[fault](*args)))
    norm = weighted(nn.RMSNorm, 16 if across_heads else 8, torch.float16)
    states = draw(1, 5, 2, 8, dtype=torch.float16)
    call = {"first": 1, "across_heads": across_heads, "pairs": pairs}
    expected = plain(norm, states, TABLE, 2 * TABLE, **call)
    for _ in range(2):
        assert torch.equal(normed_and_rotated(norm, states, TABLE, 2 * TABLE, **call), expected)
    assert "self-test" in caplog.text or "off by" in caplog.text or "differ" in caplog.text
    assert len(caplog.records) == 1
    monkeypatch.setattr(rotary, "fused", fused)
    assert rotary.self_test(next(iter(rotary._VERDICTS))) is None


@interpreted_only
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", NORMS)
def test_the_self_test_sees_where_a_norm_rounds(
    norm: type, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = Form("cpu", dtype, 3, 32, norm, weighted=True, rotary=True)
    assert rotary.self_test(form) is None
    monkeypatch.setitem(rotary._NORMS, norm, not rotary._NORMS[norm])
    assert "differ" in str(rotary.self_test(form)) or "off by" in str(rotary.self_test(form))


@interpreted_only
def test_a_kernel_that_raises_is_refused(monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def broken(*_: Any) -> Tensor:
        raise RuntimeError("no such instruction")

    monkeypatch.setattr(rotary, "fused", broken)
    norm, states = weighted(RMSNorm, 8), draw(1, 5, 2, 8)
    assert torch.equal(normed_and_rotated(norm, states), norm(states))
    assert "no such instruction" in caplog.text


# --- whole models -------------------------------------------------------------------------------------------

# Case -> calls that the kernel takes in one forward.
MODELS = {
    "hunyuan_video": 12,
    "hunyuan_video15": 8,
    "flux": 12,
    "wan-i2v": 10,
    "wan_vace": 16,
    "mochi": 12,
    "cogvideox-1.5": 4,
    "ltx": 8,
    "sd3.5": 16,
}


def model_of(name: str) -> nn.Module:
    """The case's model, with a head dim that the kernel takes."""
    model = build(name)
    if model.config.get("attention_head_dim") != 12:
        return model
    torch.manual_seed(0)
    changes = {"attention_head_dim": 16}
    if model.config.get("added_kv_proj_dim"):
        changes["added_kv_proj_dim"] = 2 * 16
    model = type(model).from_config({**model.config, **changes}).eval()
    for path, parameter in model.named_parameters():
        if "norm_" in path and parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model


def check_model(name: str, model: nn.Module, inputs: dict[str, Any], used: list[Form]) -> None:
    expected = run(model, inputs)
    with diffctrl.apply(model, NeutralAttnProcessor()):
        got = run(model, inputs)
    assert not any(rotary._VERDICTS.values())
    assert len(used) == MODELS[name]
    off = float((got.double() - expected.double()).norm() / expected.double().norm())
    assert off < (1e-4 if got.dtype == torch.float32 else 3e-2)


@interpreted_only
@pytest.mark.parametrize("name", MODELS)
def test_models_equal_stock(name: str, used: list[Form]) -> None:
    model = model_of(name)
    check_model(name, model, rows_of(example(name, model), 1), used)


# --- compiled -----------------------------------------------------------------------------------------------

BF16 = torch.bfloat16
FORMS = {
    "hunyuan_video": Form("cuda", BF16, 24, 128, RMSNorm, True, rotary=True),
    "hunyuan_video, text": Form("cuda", BF16, 24, 128, RMSNorm, True),
    "flux": Form("cuda", torch.float16, 24, 128, nn.RMSNorm, True, rotary=True),
    "wan, 14B": Form("cuda", BF16, 40, 128, nn.RMSNorm, True, True, True, True),
    "wan, 1.3B": Form("cuda", BF16, 12, 128, nn.RMSNorm, True, True, True, True),
    "mochi": Form("cuda", BF16, 24, 128, MochiRMSNorm, True, rotary=True, per_head=True),
    "cogvideox": Form("cuda", BF16, 48, 64, None, rotary=True),
    "ltx": Form("cuda", BF16, 32, 64, nn.RMSNorm, True, True, True, per_head=True),
    "sd3.5": Form("cuda", BF16, 38, 64, RMSNorm, True),
    "float32": Form("cuda", torch.float32, 24, 128, RMSNorm, True, rotary=True),
}


@needs_triton
@compiled_only
@pytest.mark.parametrize("arch", [80, 89, 90])
@pytest.mark.parametrize("name", FORMS)
def test_assembler(name: str, arch: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from diffctrl.families import rotary_jit

    form = FORMS[name]
    compile_ = triton.compile
    monkeypatch.setattr(
        triton, "compile",
        lambda *args, options, **rest: compile_(*args, options=options | {"enable_fp_fusion": False}, **rest),
    )  # fmt: skip
    kind = {BF16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}[form.dtype]
    types = dict.fromkeys(("x", "out", "weight"), kind) | dict.fromkeys(("cos", "sin"), "*fp32")
    constants = {
        "HEADS": form.heads, "D": form.dim, "DP": form.padded, "FIRST": form.tiles[0], "REST": form.tiles[1],
        "NORM": form.norm is not None, "TWICE": form.norm is RMSNorm, "WHOLE": form.across_heads,
        "WEIGHTED": form.weighted, "ROTATE": form.rotary, "PAIRS": form.pairs, "PER_HEAD": form.per_head,
    }  # fmt: skip
    kernel, report = assembled(
        rotary_jit.norm_rotate, types | {"eps": "fp32"}, constants,
        arch=arch, warps=form.warps, stages=1, folder=tmp_path,
    )  # fmt: skip
    code = kernel.asm["ptx"]
    assert spilled(report) == 0
    # Four programs of 4 warps on an SM at the least, for enough loads in flight.
    assert int(re.findall(r"Used (\d+) registers", report)[0]) <= 128
    assert kernel.metadata.shared <= 16 * 1024
    # A product of two bf16 may be a fused one with zero, which rounds once as well.
    assert not re.search(r"\bfma\.rn\S*\.f32", code)
    # Of the states, each thread reads and writes its channels 16 bytes at a time, and nothing twice.
    channels = sum(form.tiles) * form.padded // (32 * form.warps)
    wide = channels * form.dtype.itemsize // 16
    assert len(re.findall(r"st\.global\.v4\.b32", code)) == wide
    assert len(re.findall(r"st\.global", code)) == wide
    assert len(re.findall(r"ld\.global\S*\.v4\.b32", code)) >= wide


@pytest.mark.parametrize(
    ("heads", "tiles"),
    [(1, (1, 0)), (2, (2, 0)), (3, (2, 1)), (12, (8, 4)), (24, (16, 8)), (30, (32, 0)), (38, (32, 8)),
     (40, (32, 8)), (48, (32, 16))],
)  # fmt: skip
def test_tiles(heads: int, tiles: tuple[int, int]) -> None:
    form = Form("cuda", BF16, heads, 128, None, rotary=True)
    assert form.tiles == tiles
    assert heads <= sum(tiles) <= heads + heads // 3
    assert form.warps in (1, 2, 4, 8)


# --- on a GPU -----------------------------------------------------------------------------------------------

gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


def on_gpu(call: Callable[..., None]) -> Callable[..., None]:
    for mark in gpu:
        call = mark(call)
    return call


@on_gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMS)
def test_real_sizes(name: str, dtype: torch.dtype, used: list[Form]) -> None:
    form, tokens = FORMS[name], 4000
    norm: Any = None
    if form.norm is not None:
        norm = weighted(form.norm, form.dim * (form.heads if form.across_heads else 1), dtype, "cuda")
    states = draw(1, tokens, form.heads, form.dim, dtype=dtype, device="cuda")
    kept, tables = states.clone(), {}
    if form.rotary:
        angles = draw(1, tokens - 77, form.heads if form.per_head else 1, form.dim, device="cuda")
        tables = {"cos": angles.cos(), "sin": angles.sin(), "first": 50, "stop": tokens - 27}
    call = {"across_heads": form.across_heads, "pairs": form.pairs, **tables}
    got = normed_and_rotated(norm, states, **call)
    assert len(used) == 1
    assert_close(got, plain(norm, states, **call))
    assert torch.equal(states, kept)
    assert torch.equal(normed_and_rotated(norm, states, **call), got)


@on_gpu
def test_offsets_beyond_31_bits(used: list[Form]) -> None:
    tokens = (1 << 31) // (40 * 128) + 9
    states = torch.zeros(1, tokens, 40, 128, dtype=torch.float16, device="cuda")
    states[:, -5:] = draw(1, 5, 40, 128, dtype=torch.float16, device="cuda")
    norm = weighted(nn.RMSNorm, 5120, torch.float16, "cuda")
    got = normed_and_rotated(norm, states, across_heads=True)
    assert used
    assert_close(got[:, -5:], plain(norm, states[:, -5:], across_heads=True))


def moved(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.cuda()
    if isinstance(value, dict):
        return {key: moved(inner) for key, inner in value.items()}
    return type(value)(moved(inner) for inner in value) if isinstance(value, (list, tuple)) else value


def model_on_gpu(name: str, dtype: torch.dtype) -> tuple[nn.Module, dict[str, Any]]:
    model = model_of(name).cuda().to(dtype)
    if hasattr(model, "rope"):  # loaded in 16 bits, a model's tables stay in float32
        model.rope = model_of(name).rope.cuda()
    return model, moved(example(name, model))


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MODELS)
def test_models_equal_stock_on_a_gpu(name: str, dtype: torch.dtype, used: list[Form]) -> None:
    check_model(name, *model_on_gpu(name, dtype), used)


@on_gpu
@pytest.mark.parametrize("name", ["hunyuan_video", "flux", "wan"])
def test_compiled_blocks_on_a_gpu(name: str, used: list[Form]) -> None:
    torch._dynamo.reset()
    model, inputs = model_on_gpu(name, torch.float32)
    with diffctrl.apply(model, NeutralAttnProcessor()):
        expected = run(model, inputs)
        eager = len(used)
        assert eager
        for stack in CASES[name].blocks:
            for block in getattr(model, stack):
                block.compile(fullgraph=True)
        got = run(model, inputs)
    assert len(used) == eager
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


@on_gpu
def test_a_captured_graph_replays(used: list[Form]) -> None:
    norm = weighted(RMSNorm, 128, BF16, "cuda")
    states, angles = draw(1, 300, 24, 128, dtype=BF16, device="cuda"), draw(1, 290, 1, 128, device="cuda")
    tables = angles.cos(), angles.sin()
    expected = normed_and_rotated(norm, states, *tables, stop=290)
    assert len(used) == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = normed_and_rotated(norm, states, *tables, stop=290)
    assert len(used) == 2
    got.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, expected)


def test_each_reason_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    rotary._say.cache_clear()
    with caplog.at_level("INFO", logger="diffctrl.families"):
        for reason in ("has no gradients", "has no gradients", "knows no autocast"):
            rotary._say(reason)
    assert [record.message.rsplit("kernel ", 1)[1] for record in caplog.records] == [
        "has no gradients",
        "knows no autocast",
    ]


@on_gpu
def test_plain_torch_on_a_gpu_is_said(caplog: pytest.LogCaptureFixture) -> None:
    rotary._say.cache_clear()
    states, table = draw(1, 4, 2, 8, device="cuda"), TABLE.double().cuda()
    with caplog.at_level("INFO", logger="diffctrl.families"):
        normed_and_rotated(None, states, table, table)
    assert "takes tables in float32" in caplog.text
