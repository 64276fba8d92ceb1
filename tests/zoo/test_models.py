"""The architecture of the embedded image model: shapes, positions, start weights."""

import math

import pytest
import torch

from diffctrl.zoo.models import (
    WEIGHT_NAMES,
    ImageSize,
    image_parts,
    image_pipeline,
    image_transformer,
    position_table,
)

SMALL = ImageSize(
    latent_size=8, vae_channels=(8, 16), layers=2, heads=2, head_dim=16, positions=12, text_width=16
)


@pytest.fixture(scope="module")
def parts():
    torch.manual_seed(0)
    return image_parts(SMALL)


def test_full_size_is_what_the_package_has_room_for():
    torch.manual_seed(0)
    counts = {name: sum(p.numel() for p in module.parameters()) for name, module in image_parts().items()}
    assert set(counts) == set(WEIGHT_NAMES)
    assert 4.6e6 < counts["transformer"] < 4.8e6
    assert max(counts.values()) * 2 < 12e6
    assert sum(counts.values()) * 2 < 15.5e6


@pytest.mark.parametrize(("rows", "columns"), [(4, 4), (3, 7), (12, 12)])
def test_cropped_positions_are_exact(parts, rows, columns):
    """Position (row, column) of any crop is the sine-cosine of its distance from the middle."""
    embed = parts.transformer.pos_embed
    cropped = embed.cropped_pos_embed(2 * rows, 2 * columns).reshape(rows, columns, SMALL.width)
    steps = SMALL.width // 4
    ladder = [math.pi / 2 * (1 / 32) ** (index / (steps - 1)) for index in range(steps)]
    for row, column in [(0, 0), (rows - 1, columns - 1), (rows // 2, columns // 2)]:
        place = (
            row - SMALL.positions // 2 + (SMALL.positions - rows) // 2,
            column - SMALL.positions // 2 + (SMALL.positions - columns) // 2,
        )
        expected = [wave(p * f) for p in place for wave in (math.sin, math.cos) for f in ladder]
        torch.testing.assert_close(cropped[row, column], torch.tensor(expected), atol=2e-6, rtol=0)


def test_neighbouring_positions_differ_as_much_as_they_can():
    table = position_table(32, 128).reshape(32, 32, 128)
    step = (table[1:, 16] - table[:-1, 16]).norm(dim=1)
    assert step.min() > 3.0  # the stock table moves by about 1


def test_a_fresh_transformer_predicts_zero_and_passes_tokens_through(parts):
    torch.manual_seed(1)
    latents = torch.randn(2, 8, 8, 8)
    context, pooled = torch.randn(2, 6, 32), torch.randn(2, 32)
    out = parts.transformer(latents, context, pooled, torch.tensor([10.0, 900.0]), return_dict=False)[0]
    assert torch.count_nonzero(out) == 0
    tokens = torch.randn(2, 16, SMALL.width)
    condition = torch.randn(2, SMALL.width)
    _, after = parts.transformer.transformer_blocks[0](tokens, torch.randn(2, 6, SMALL.width), condition)
    assert torch.equal(after, tokens)


def test_the_pipeline_draws_and_survives_a_save(parts, tmp_path):
    from diffusers import StableDiffusion3Pipeline

    torch.manual_seed(2)
    torch.nn.init.normal_(parts.transformer.proj_out.weight, std=0.05)
    pipeline = image_pipeline(parts)
    pipeline.set_progress_bar_config(disable=True)
    call = {
        "prompt": ["a red circle", "A blue ring"],
        "num_inference_steps": 2,
        "guidance_scale": 3.0,
        "max_sequence_length": 32,
        "output_type": "pt",
    }
    images = pipeline(generator=torch.Generator().manual_seed(0), **call).images
    assert images.shape == (2, 3, 16, 16)
    pipeline.save_pretrained(tmp_path, safe_serialization=True)
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path, use_safetensors=True, local_files_only=True)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(again.transformer.pos_embed.pos_embed, parts.transformer.pos_embed.pos_embed)
    torch.testing.assert_close(again(generator=torch.Generator().manual_seed(0), **call).images, images)


def test_gates_are_closed_in_every_block():
    transformer = image_transformer(SMALL)
    for block in transformer.transformer_blocks:
        assert torch.count_nonzero(block.norm1.linear.weight) == 0
        assert torch.count_nonzero(block.norm1_context.linear.weight) == 0
    assert torch.count_nonzero(transformer.proj_out.weight) == 0
