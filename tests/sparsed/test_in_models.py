"""SparseD in tiny models of transformers: stock where it should be, sparse where it should be, and off."""

import copy

import pytest
import torch
from transformers import BertConfig, BertModel, DynamicCache, LlamaForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import diffctrl
from diffctrl.processors import NeutralAttnProcessor, SoftPAGAttnProcessor, SparseDAttnProcessor
from diffctrl.sparsed import Phase, SparseDConfig
from diffctrl.sparsed import reference as slow
from tests.sparsed.examples import (
    SETTINGS,
    LargestTensor,
    generate,
    kept_sets,
    sharpened,
    tiny_llama,
    tiny_qwen,
    tokens,
)

PROMPT, GENERATED, STEPS = 70, 26, 5  # 96 tokens: 6 blocks of 16, skip 0.2 of 5 steps: pattern in step 0


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


@pytest.fixture(scope="module")
def qwen():
    return tiny_qwen()


def on(model, **changes):
    return diffctrl.apply(model, SparseDAttnProcessor(SparseDConfig(**SETTINGS | changes)))


def stock(model, ids, mask=None):
    with torch.no_grad():
        return model(input_ids=ids, attention_mask=mask).logits


def last(ids, step):
    ids = ids.clone()
    ids[:, -1] = step
    return ids


# --- neutral is stock, removing restores --------------------------------------------------------------------


@pytest.mark.parametrize("neutral", [{"select": 1.0}, {"skip": 1.0}, {"auto_dense": True}])
@pytest.mark.parametrize("kind", [tiny_llama, tiny_qwen])
def test_neutral_is_stock(kind, neutral):
    model, ids = kind(), tokens(2, 96)
    with on(model, **neutral) as control:
        outs = generate(control, model, ids, [PROMPT, PROMPT])
        assert control.controller.stats()["steps"] == {"dense": STEPS, "build": 0, "sparse": 0}
        assert control.controller.stats()["stays_dense"]
    for step, out in enumerate(outs):
        assert torch.equal(out, stock(model, last(ids, step)))


def test_dense_steps_are_stock_and_sparse_steps_are_not(llama):
    ids = tokens(1, 96)
    with on(llama, skip=0.4) as control:
        outs = generate(control, llama, ids, [PROMPT])
        stats = control.controller.stats()
    for step, out in enumerate(outs):
        assert torch.equal(out, stock(llama, last(ids, step))) == (step < 2)
    assert stats["steps"] == {"dense": 1, "build": 1, "sparse": 3}
    assert stats["calls"] == {"sdpa": 4, "gathered": 6}
    assert stats["builders"] == ["chunked"]
    assert 0 < stats["retained_mass"] < 1
    assert stats["build_ms"] > 0


def test_sparse_output_with_everything_kept_is_dense(llama):
    """The sparse path itself, not the short cut for select = 1: quotas round up to all of five blocks."""
    ids = tokens(1, 80)
    with on(llama, select=0.99, mode="authors") as control:
        outs = generate(control, llama, ids, [54])
        assert control.controller.stats()["pattern_density"] == 1.0
        assert control.controller.stats()["steps"]["sparse"] > 0
    for step, out in enumerate(outs):
        torch.testing.assert_close(out, stock(llama, last(ids, step)), atol=1e-5, rtol=1e-5)


def test_remove_restores(llama):
    ids = tokens(1, 40)
    expected = stock(llama, ids)
    for implementation in ("sdpa", "eager"):
        llama.set_attn_implementation(implementation)
        control = on(llama)
        assert "self_attn" in diffctrl.summary(llama)
        control.remove()
        assert llama.config._attn_implementation == implementation
        assert not any(hasattr(module, "diffctrl_site") for module in llama.modules())
        assert not llama.model._forward_pre_hooks
        assert "stock attention" in diffctrl.summary(llama)
        with pytest.raises(RuntimeError, match="removed before"):
            control.remove()
    llama.set_attn_implementation("sdpa")
    assert torch.equal(stock(llama, ids), expected)


def test_removed_after_an_exception_and_put_on_again(llama):
    ids = tokens(1, 96)
    control = on(llama)
    with pytest.raises(RuntimeError, match="outside of a generation"), control:
        stock(llama, ids)
    assert llama.config._attn_implementation == "sdpa"
    control.resume()
    outs = generate(control, llama, ids, [PROMPT])
    control.remove()
    assert not torch.equal(outs[-1], stock(llama, last(ids, STEPS - 1)))


def test_two_models_are_independent():
    """Though they are made from one config object, which is where transformers keeps the implementation."""
    one = tiny_llama()
    other = LlamaForCausalLM(one.config).eval()
    assert one.config is other.config
    ids = tokens(2, 96)
    mask = torch.arange(96) >= torch.tensor([[0], [9]])
    expected, expected_masked = stock(other, ids), stock(other, ids, mask)
    first = on(one)
    assert torch.equal(stock(other, ids), expected)
    assert torch.equal(stock(other, ids, mask), expected_masked)
    second = on(other, select=0.6)
    alone = generate(first, one, ids, [PROMPT, PROMPT])
    generate(second, other, ids, [60, 60])
    again = generate(first, one, ids, [PROMPT, PROMPT])
    assert all(torch.equal(a, b) for a, b in zip(alone, again, strict=True))
    assert first.controller.stats()["config"]["select"] == 0.3
    assert second.controller.stats()["config"]["select"] == 0.6
    first.remove()
    generate(second, other, ids, [60, 60])  # still on
    second.remove()
    assert one.config._attn_implementation == "sdpa"
    assert torch.equal(stock(other, ids), expected)


# --- the pattern is that of the definition ------------------------------------------------------------------


def queries_and_keys(model, ids):
    """Per layer what attention is given, computed apart from the seam: after rotary embedding, before."""
    found = []

    def look(module, args, kwargs):
        hidden = kwargs["hidden_states"]
        shape = (*hidden.shape[:-1], -1, module.head_dim)
        q, k = (f(hidden).view(shape).transpose(1, 2) for f in (module.q_proj, module.k_proj))
        found.append((*apply_rotary_pos_emb(q, k, *kwargs["position_embeddings"]), q, k))

    hooks = [
        layer.self_attn.register_forward_pre_hook(look, with_kwargs=True) for layer in model.model.layers
    ]
    stock(model, ids)
    for hook in hooks:
        hook.remove()
    return found


@pytest.mark.parametrize("kind", [tiny_llama, tiny_qwen])
def test_pattern_is_the_reference_of_its_step(kind):
    model, ids, config = kind(), tokens(1, 96), SparseDConfig(**SETTINGS, skip=0.6)
    with on(model, skip=0.6) as control:
        generate(control, model, ids, [PROMPT])
        patterns = control.controller.patterns
        assert sorted(patterns) == [0, 1]
        kept = [kept_sets(patterns[layer].lists)[0] for layer in (0, 1)]
    built_at = {step: queries_and_keys(model, last(ids, step)) for step in (0, 2)}

    def of(step, layer, first):
        q, k = (t[0] for t in built_at[step][layer][first : first + 2])
        return slow.kept_blocks(q, k, PROMPT, q.shape[-1] ** -0.5, config)

    for layer in (0, 1):
        assert kept[layer] == of(2, layer, 0)  # step ceil(0.6 * 5) - 1
        assert kept[layer] != of(2, layer, 2), "a pattern from before the rotary embedding must not pass"
        assert any(head != kept[layer][0] for head in kept[layer]), "heads must differ"
    assert kept != [of(0, layer, 0) for layer in (0, 1)], "a pattern of step 0 must not pass"


def test_sparse_step_is_the_reference_attention(llama):
    """One layer's output in a sparse step against S x S attention over the kept blocks."""
    ids = tokens(1, 96)
    seen = {}
    attention = llama.model.layers[0].self_attn
    hook = attention.o_proj.register_forward_pre_hook(lambda _, args: seen.__setitem__("heads", args[0]))
    with on(llama) as control:
        generate(control, llama, ids, [PROMPT])
        kept = kept_sets(control.controller.patterns[0].lists)[0]
    hook.remove()
    q, k, *_ = queries_and_keys(llama, last(ids, STEPS - 1))[0]
    hidden = llama.model.layers[0].input_layernorm(llama.model.embed_tokens(last(ids, STEPS - 1)))
    v = attention.v_proj(hidden).view(1, 96, -1, attention.head_dim).transpose(1, 2)
    expected = slow.sparse_attention(q[0], k[0], v[0], kept, attention.scaling, 16)
    got = seen["heads"].view(96, -1, attention.head_dim).transpose(0, 1)
    torch.testing.assert_close(got.double(), expected.detach(), atol=1e-5, rtol=1e-5)


def test_every_generation_starts_dense(llama):
    ids = tokens(1, 96)
    with on(llama) as control:
        first = generate(control, llama, ids, [PROMPT])
        assert control.controller.phase is Phase.SPARSE
        control.reset()
        assert control.controller.phase is None
        assert control.controller.stats()["steps"]["sparse"] == 4  # can still be read
        second = generate(control, llama, ids, [PROMPT])
        control.set_step(0)  # step 0 alone starts anew
        assert control.controller.phase is Phase.BUILD
        again = stock(llama, last(ids, 0))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(again, first[0])


@pytest.mark.parametrize("refresh", [{"refresh": "every_n", "refresh_steps": 2}, {"refresh": "per_block"}])
def test_refresh_takes_new_patterns(llama, refresh):
    ids = tokens(1, 96)
    with on(llama, **refresh) as control:
        outs = generate(control, llama, ids, [PROMPT], steps=6, blocks=3)
        assert control.controller.stats()["patterns_taken"] == 2 * len(llama.model.layers) + 2
    for step in (1, 2, 4) if "refresh_steps" not in refresh else (1, 3, 5):
        assert torch.equal(outs[step], stock(llama, last(ids, step)))


def test_trigger_by_what_is_committed(llama):
    ids = tokens(1, 96)
    with on(llama, trigger="committed", skip=0.5) as control:
        control.begin(torch.tensor([PROMPT]), GENERATED, 50)
        phases = []
        for step, share in enumerate((0.0, 0.4, 0.6, 0.8)):
            control.set_step(step, committed=share)
            stock(llama, ids)
            phases.append(control.controller.phase)
        with pytest.raises(ValueError, match="needs set_step"):
            control.set_step(4)
        for step, share in enumerate((0.0, 0.6)):  # step 0 starts anew, and what it took is forgotten
            control.set_step(step, committed=share)
            stock(llama, ids)
            phases.append(control.controller.phase)
    assert phases == [Phase.DENSE, Phase.DENSE, Phase.BUILD, Phase.SPARSE, Phase.DENSE, Phase.BUILD]


# --- padding ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["strict", "authors"])
@pytest.mark.parametrize("kind", [tiny_llama, tiny_qwen])
def test_a_padded_row_is_the_row_alone(kind, mode):
    model, ids = kind(), tokens(2, 96)
    with on(model, mode=mode, skip=0.0) as control:
        both = generate(control, model, ids, [PROMPT, PROMPT - 21], padding=[0, 21])
        assert control.controller.stats()["steps"]["sparse"] > 0
        patterns = [kept_sets(control.controller.patterns[layer].lists) for layer in (0, 1)]
        for row, start in ((0, 0), (1, 21)):
            alone = generate(control, model, ids[row : row + 1, start:], [PROMPT - start])
            for a, b in zip(both, alone, strict=True):
                torch.testing.assert_close(a[row, start:], b[0], atol=2e-5, rtol=1e-4)
                assert torch.equal(a[row, start:].argmax(-1), b[0].argmax(-1))
            for layer in (0, 1):
                own = kept_sets(control.controller.patterns[layer].lists)[0]
                assert [head[: len(own[0])] for head in patterns[layer][row]] == own


def test_padding_is_dense_stock(llama):
    ids = tokens(2, 96)
    mask = torch.arange(96) >= torch.tensor([[0], [21]])
    with on(llama, skip=1.0) as control:
        outs = generate(control, llama, ids, [PROMPT, PROMPT - 21], padding=[0, 21])
    assert torch.equal(outs[0][mask], stock(llama, last(ids, 0), mask)[mask])


def test_padding_after_the_generation(llama):
    """Pipelines that work in whole windows of blocks pad their end."""
    ids = tokens(1, 96)
    mask = torch.arange(96)[None] < 80
    with on(llama) as control, torch.no_grad():
        outs = []
        control.begin(torch.tensor([54]), 26, 4)
        for step in range(4):
            control.set_step(step)
            outs.append(llama(input_ids=ids, attention_mask=mask).logits[:, :80])
        alone = []
        control.begin(torch.tensor([54]), 26, 4)
        for step in range(4):
            control.set_step(step)
            alone.append(llama(input_ids=ids[:, :80]).logits)
    for a, b in zip(outs, alone, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


def test_guidance_in_one_batch(llama):
    """Conditional and unconditional rows: each gets its own pattern."""
    ids = tokens(1, 96)
    blank = ids.clone()
    blank[:, :PROMPT] = 60
    with on(llama) as control:
        both = generate(control, llama, torch.cat([ids, blank]), [PROMPT, PROMPT])
        kept = kept_sets(control.controller.patterns[1].lists)
        alone = generate(control, llama, blank, [PROMPT])
    assert kept[0] != kept[1]
    for a, b in zip(both, alone, strict=True):
        torch.testing.assert_close(a[1], b[0], atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [tiny_llama, tiny_qwen])
@pytest.mark.parametrize("padding", [None, [0, 100]])
def test_no_tensor_of_tokens_by_tokens(kind, padding):
    """In no step, with grouped heads and with padding; stock transformers makes one of a padding mask."""
    model, ids = kind(), tokens(2, 1024)
    prompts = [900, 900 - (padding or [0, 0])[1]]
    with on(model, block_size=64, skip=0.5) as control, LargestTensor() as largest:
        generate(control, model, ids, prompts, steps=4, padding=padding)
        assert control.controller.stats()["steps"] == {"dense": 1, "build": 1, "sparse": 2}
    assert largest.elements < 1024 * 1024


# --- refusals -----------------------------------------------------------------------------------------------


def test_what_apply_refuses():
    model = tiny_llama(layers=1)
    causal = copy.deepcopy(model)
    causal.config.is_causal = True
    with pytest.raises(ValueError, match="is causal"):
        on(causal)
    cached = copy.deepcopy(model)
    cached.config.use_cache = True
    with pytest.raises(ValueError, match="use_cache = False"):
        on(cached)
    windowed = tiny_qwen()
    windowed.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ValueError, match="sliding window"):
        on(windowed)
    bert = BertModel(
        BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(TypeError, match="LlamaForCausalLM.*Qwen2ForCausalLM"):
        on(bert)
    for wrong in (SoftPAGAttnProcessor(), NeutralAttnProcessor()):
        with pytest.raises(TypeError, match="does not work on language models"):
            diffctrl.apply(model, wrong)
    with pytest.raises(ValueError, match="one processor"):
        diffctrl.apply(model, [SparseDAttnProcessor(), SparseDAttnProcessor()])
    with pytest.raises(ValueError, match="takes neither"):
        diffctrl.apply(model, SparseDAttnProcessor(), batch_layout="cond")
    with on(model), pytest.raises(RuntimeError, match="already under a control"):
        on(model)
    assert model.config._attn_implementation == "sdpa"


def test_a_remote_class_of_the_same_name_is_another_class():
    kind = type("LlamaForCausalLM", (LlamaForCausalLM,), {"__module__": "transformers_modules.remote"})
    model = sharpened(kind, tiny_llama(layers=1).config, 0)
    with pytest.raises(TypeError, match="transformers_modules.remote.LlamaForCausalLM"):
        on(model)


def test_denoisers_refuse_it():
    from tests.helpers import CASES

    with pytest.raises(TypeError, match="sparsed does not support Stable Diffusion 3"):
        diffctrl.apply(CASES["sd3"].build(), SparseDAttnProcessor())


def test_what_a_forward_refuses(llama):
    ids = tokens(2, 96)
    with on(llama) as control, torch.no_grad():
        with pytest.raises(RuntimeError, match="outside of a generation"):
            llama(input_ids=ids)
        control.begin(torch.tensor([PROMPT, PROMPT]), GENERATED, STEPS)
        with pytest.raises(RuntimeError, match="before set_step"):
            llama(input_ids=ids)
        with pytest.raises(ValueError, match="outside of the run"):
            control.set_step(STEPS)
        control.set_step(0)
        with pytest.raises(ValueError, match="has 1 rows, begin\\(\\) was told of 2"):
            llama(input_ids=ids[:1])
        with pytest.raises(ValueError, match="A pattern fits one length"):
            llama(input_ids=tokens(2, 112))
        with pytest.raises(ValueError, match="do not agree"):
            llama(input_ids=ids, attention_mask=torch.arange(96).expand(2, -1) >= 3)
        with pytest.raises(ValueError, match="no S x S mask"):
            llama(input_ids=ids, attention_mask=torch.ones(2, 1, 96, 96, dtype=torch.bool))
        for cache in ({"use_cache": True}, {"past_key_values": DynamicCache()}):
            with pytest.raises(ValueError, match="without a cache"):
                llama(input_ids=ids, **cache)
        with pytest.raises(ValueError, match="attention weights"):
            llama.model.layers[0].self_attn(
                torch.zeros(2, 96, 32), llama.model.rotary_emb(torch.zeros(1), torch.arange(96)[None]),
                attention_mask=None, output_attentions=True,
            )  # fmt: skip
        llama.config.is_causal = True
        try:
            with pytest.raises(ValueError, match="attention in both directions"):
                llama(input_ids=ids)
        finally:
            llama.config.is_causal = False
        control.begin(torch.tensor([PROMPT, 50]), GENERATED, STEPS, torch.tensor([0, 20]))
        control.set_step(0)
        with pytest.raises(ValueError, match="no attention_mask"):
            llama(input_ids=ids)
        llama.set_attn_implementation("sdpa")
        with pytest.raises(RuntimeError, match="would do nothing"):
            llama(input_ids=ids)


def test_a_changed_length_is_refused_in_the_middle(llama):
    with on(llama) as control, torch.no_grad():
        generate(control, llama, tokens(1, 96), [PROMPT])
        with pytest.raises(ValueError, match="A pattern fits one length"):
            llama(input_ids=tokens(1, 97))


def test_a_skipped_step_is_told(llama):
    with on(llama, skip=0.4) as control, torch.no_grad():
        control.begin(torch.tensor([PROMPT]), GENERATED, STEPS)
        control.set_step(4)
        with pytest.raises(RuntimeError, match="has no pattern"):
            llama(input_ids=tokens(1, 96))


def test_the_log_says_once_that_it_stays_dense(llama, caplog, monkeypatch):
    monkeypatch.setattr("diffctrl.sparsed.controller._LOGGED", set())
    ids = tokens(1, 96)
    with on(llama, auto_dense=True) as control, caplog.at_level("WARNING", logger="diffctrl.sparsed"):
        for _ in range(2):
            generate(control, llama, ids, [PROMPT])
        assert "96 tokens are below the break-even" in control.controller.stats()["stays_dense"]
    assert [record.message for record in caplog.records if "stays dense" in record.message] == [
        "SparseD stays dense: 96 tokens are below the break-even of 2048 tokens on cpu. auto_dense=False "
        "makes it sparse all the same."
    ]


# --- both directions ----------------------------------------------------------------------------------------


def test_the_first_token_sees_the_last(llama):
    """In a dense and in a sparse step; a causal model would not."""
    ids = tokens(1, 32)  # two blocks, which select = 0.3 keeps
    with on(llama) as control:
        outs = generate(control, llama, ids, [10], steps=3)
    for earlier, later in zip(outs[:-1], outs[1:], strict=True):
        assert not torch.equal(earlier[0, 0], later[0, 0])


# --- patterns on disk ---------------------------------------------------------------------------------------


def test_patterns_are_saved_and_used_again(llama, tmp_path):
    ids, file = tokens(2, 96), tmp_path / "patterns.safetensors"
    prompts, padding = [PROMPT, PROMPT - 21], [0, 21]
    with on(llama) as control:
        controller = control.controller
        with pytest.raises(ValueError, match="no patterns to save"):
            controller.save_patterns(file)
        built = generate(control, llama, ids, prompts, padding=padding)
        control.reset()
        controller.save_patterns(file)
        stats = controller.stats()
        bits = sum(p.lists.to_bits().numel() for p in controller.patterns.values())
        assert stats["pattern_bytes"] == bits == 2 * 2 * 4 * 6 * 1
        controller.load_patterns(file)
        given = generate(control, llama, ids, prompts, padding=padding)
        assert controller.stats()["patterns_taken"] == 0
        assert controller.stats()["retained_mass"] == stats["retained_mass"]
        with pytest.raises(ValueError, match="of other rows"):
            generate(control, llama, ids, [PROMPT, PROMPT])
        controller.load_patterns(None)
        generate(control, llama, ids, [PROMPT, PROMPT])
    assert all(torch.equal(a, b) for a, b in zip(built, given, strict=True))
    with on(llama, block_size=32) as control, pytest.raises(ValueError, match="block_size is 32"):
        control.controller.load_patterns(file)
    with on(tiny_qwen()) as control, pytest.raises(ValueError, match=r"of \[4\] heads; this model has 14"):
        control.controller.load_patterns(file)


def test_other_files_are_refused(llama, tmp_path):
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
    with on(llama) as control, pytest.raises(ValueError, match="no file of patterns"):
        control.controller.load_patterns(tmp_path / "x.safetensors")


# --- compiled -----------------------------------------------------------------------------------------------


def test_compiled_layers_share_two_graphs():
    import torch._dynamo as dynamo
    from torch._dynamo.testing import CompileCounter

    model, ids = tiny_llama(), tokens(2, 96)
    prompts, padding = [PROMPT, PROMPT - 21], [0, 21]
    with on(model, skip=0.4) as control:
        eager = generate(control, model, ids, prompts, padding=padding)
        counter = CompileCounter()
        dynamo.reset()
        for layer in model.model.layers:
            layer.compile(backend=counter, fullgraph=True)
        compiled = [generate(control, model, ids, prompts, padding=padding) for _ in range(2)]
        assert control.controller.stats()["patterns_taken"] == 2
        dynamo.reset()
    assert counter.frame_count == 2
    for outs in compiled:
        for a, b in zip(outs, eager, strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def test_dense_steps_of_compiled_layers_keep_their_gradient():
    model, ids = tiny_llama(), tokens(1, 96)
    weight = model.model.layers[0].self_attn.q_proj.weight
    (expected,) = torch.autograd.grad(model(input_ids=ids).logits.square().sum(), weight)
    with on(model, skip=0.4) as control:
        torch.compiler.reset()
        for layer in model.model.layers:
            layer.compile(backend="aot_eager", fullgraph=True)
        control.begin(torch.tensor([PROMPT]), 96 - PROMPT, 5)
        control.set_step(0)
        (found,) = torch.autograd.grad(model(input_ids=ids).logits.square().sum(), weight)
        torch.compiler.reset()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_compiled_code_gets_the_log_sum_exp_from_the_dense_attention_itself(monkeypatch):
    """Taken by a second attention, it costs a whole dense step more."""
    from diffctrl.sparsed import Builder

    monkeypatch.setattr(Builder, "wants_lse", lambda self, scale: True)
    model, ids = tiny_llama(), tokens(2, 96)
    found = {}
    with on(model, skip=0.4) as control:
        stock = control.controller.pattern

        def pattern(query, key, layout, scale, lse):
            found.setdefault(how, []).append(lse)
            return stock(query, key, layout, scale, None)

        monkeypatch.setattr(control.controller, "pattern", pattern)
        torch.compiler.reset()
        for how in ("eager", "compiled"):
            if how == "compiled":
                for layer in model.model.layers:
                    layer.compile(backend="eager", fullgraph=True)
            generate(control, model, ids, [PROMPT, PROMPT - 21], padding=[0, 21])
        torch.compiler.reset()
    assert len(found["eager"]) == len(model.model.layers)
    torch.testing.assert_close(found["compiled"], found["eager"], atol=1e-5, rtol=1e-5)
