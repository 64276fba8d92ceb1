"""On a GPU: the same tokens as on the CPU, dense and sparse, and one copy of the weights."""

import pytest
import torch

from diffctrl.dlm import Checkpoint
from diffctrl.pipelines import DreamSparseDPipeline, LLaDASparseDPipeline
from diffctrl.processors import SparseDConfig
from tests.dlm import layouts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CONFIG = SparseDConfig(select=0.3, block_size=16, auto_dense=False)
PROMPTS = ["the red cup is on a plate . " * 12, "the plate"]
CALLS = [{}, {"temperature": 0.8, "seed": 3}]


@pytest.mark.parametrize("sparsed", [False, CONFIG])
@pytest.mark.parametrize("call", [*CALLS, {"cfg_scale": 0.7}, {"threshold": 0.2}])
def test_llada_gives_the_tokens_of_the_cpu(llada_folder, call, sparsed):
    found = [
        LLaDASparseDPipeline.from_pretrained(llada_folder)
        .to(device)(PROMPTS, sparsed=sparsed, gen_length=64, steps=32, block_length=32, **call)
        .texts
        for device in ("cpu", "cuda")
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("sparsed", [False, CONFIG])
@pytest.mark.parametrize("call", CALLS)
def test_dream_gives_the_tokens_of_the_cpu(dream_folder, call, sparsed):
    found = [
        DreamSparseDPipeline.from_pretrained(dream_folder)
        .to(device)(PROMPTS, sparsed=sparsed, gen_length=64, steps=32, alg="entropy", **call)
        .texts
        for device in ("cpu", "cuda")
    ]
    assert found[0] == found[1]


def test_noise_of_the_gpu(llada_folder):
    pipe = LLaDASparseDPipeline.from_pretrained(llada_folder, sparsed=None).to("cuda")

    def drawn(seed):
        generator = torch.Generator("cuda").manual_seed(seed)
        call = {"gen_length": 32, "block_length": 32, "temperature": 1.0}
        return pipe(PROMPTS, generator=generator, **call).sequences.tolist()

    assert drawn(1) == drawn(1) != drawn(2)


def test_bfloat16_onto_the_gpu_takes_one_copy(tmp_path):
    config = {**layouts.LLADA, "d_model": 512, "mlp_hidden_size": 8192, "n_layers": 24}
    weights = {name: weight.to(torch.bfloat16) for name, weight in layouts.llada_weights(config).items()}
    total = sum(weight.numel() * 2 for weight in weights.values())
    folder = layouts.write(tmp_path, config, weights, shards=3)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model = Checkpoint.open(folder).load(torch.bfloat16, device_map="cuda")
    assert model.device.type == "cuda"
    assert torch.cuda.max_memory_allocated() - before < 1.3 * total + 50e6
