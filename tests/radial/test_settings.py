"""Settings, presets, dense parts, predictions, the plot."""

from __future__ import annotations

from typing import Any

import pytest

from diffctrl.radial import DenseParts, Layout, Pattern, RadialConfig, block_lists, plot, predict, preset
from diffctrl.radial.presets import resolve


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pattern": "rdial"}, "pattern='rdial' is unknown; accepted: reference, paper"),
        ({"block_rule": "any"}, "accepted: reference, hybrid, cover, exact"),
        ({"adjacent": "none"}, "accepted: full, half, decay"),
        ({"decay_factor": 0.0}, r"decay_factor=0.0 is not in \(0, 1\]"),
        ({"decay_factor": 1.5}, "1 is the full width"),
        ({"block": 0}, "block=0 is not a number of tokens"),
        ({"dense_steps": -1}, "dense_steps=-1 is negative"),
        ({"dense_fraction": 1.2}, "is not in"),
        ({"dense_steps": 3, "dense_fraction": 0.2}, "say the same thing"),
        ({"pattern": "paper", "decay_factor": 0.5}, "belongs to pattern='reference'"),
        ({"pattern": "paper", "adjacent": "half"}, "belongs to pattern='reference'"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RadialConfig(**settings)


@pytest.mark.parametrize(
    ("family", "frames", "experts", "decay", "sink", "dense", "blocks"),
    [
        ("wan", 21, 1, 0.2, True, 12, 1),
        ("wan_vace", 21, 1, 0.2, True, 12, 1),
        ("wan", 21, 2, 0.8, True, 14, 1),  # 11 of 40
        ("wan", 41, 1, 1.0, True, 2, 2),
        ("hunyuan_video", 30, 1, 0.95, False, 12, 0),
        ("hunyuan_video15", 31, 1, 0.95, False, 12, 0),
        ("hunyuan_video", 128, 1, 1.0, True, 2, 2),
        ("mochi", 28, 1, 1.0, True, 12, 1),
    ],
)
def test_presets(
    family: str, frames: int, experts: int, decay: float, sink: bool, dense: int, blocks: int
) -> None:
    made, parts = resolve(RadialConfig(), preset(family, frames=frames, experts=experts))
    assert (made.decay_factor, made.sink, made.block, made.block_rule) == (decay, sink, 128, "hybrid")
    assert (parts.first(50), parts.last(50), parts.blocks) == (dense, 0, blocks)


def test_a_models_own_longest_clip_is_not_extended() -> None:
    """CogVideoX 1.5 makes 161 frames, 42 latent ones, which it takes two by two."""
    assert preset("cogvideox", frames=21) == preset("mochi", frames=28) != preset("cogvideox", frames=41)


def test_a_setting_beats_the_preset() -> None:
    config = RadialConfig(decay_factor=0.5, sink=False, dense_steps=3, dense_blocks=4, block=64)
    made, parts = resolve(config, preset("wan", frames=21))
    assert made == Pattern(decay_factor=0.5, sink=False, block=64)
    assert (parts.first(50), parts.blocks) == (3, 4)
    made, _ = resolve(RadialConfig(pattern="paper"), preset("wan", frames=21))
    assert made == Pattern(pattern="paper", block_rule="cover", sink=True)


def test_dense_steps_of_runs() -> None:
    usual = DenseParts(fraction=0.24)
    assert [(usual.first(n), usual.last(n)) for n in (1, 4, 8, 9, 50)] == [
        (1, 0),
        (1, 1),
        (2, 1),
        (3, 0),
        (12, 0),
    ]
    assert DenseParts(fraction=0.275).first(40) == 11
    assert DenseParts(fraction=0.275, published=True).first(8) == 2
    turns = preset("wan", frames=21, experts=2)  # 11 of 40
    assert resolve(RadialConfig(), turns)[1].first(8) == 2
    assert resolve(RadialConfig(dense_fraction=0.5), turns)[1].first(8) == 4  # asked for, it is no less
    assert DenseParts(steps=5).first(3) == 3
    assert [s for s in range(10) if not DenseParts(steps=2, last_steps=3).is_dense(s, 10)] == [2, 3, 4, 5, 6]
    assert DenseParts(steps=12, last_steps=0, blocks=1).share(50, 40) == pytest.approx(0.259)
    assert DenseParts(steps=9, last_steps=9).share(10, 4) == 1.0
    assert DenseParts(fraction=1.0).always
    assert DenseParts(steps=0, last_steps=0).never
    assert not DenseParts().never


def test_predictions() -> None:
    known = [(0.275, 0.80, 0.24, 1.79), (0.287, 0.70, 0.259, 1.59), (0.116, 0.94, 0.072, 4.36)]
    for density, share, dense, speed_up in known:
        found = predict(density=density, attention_share=share, dense_share=dense)
        assert found.speed_up == pytest.approx(speed_up, abs=0.01)
        assert found.worthwhile
    assert predict(density=1.0, attention_share=0.8, dense_share=0.2).speed_up == pytest.approx(1.0)
    assert not predict(density=0.6, attention_share=0.3, dense_share=0.2).worthwhile
    assert "1.79x" in str(predict(density=0.275, attention_share=0.8, dense_share=0.24))


def test_a_plot_shows_the_blocks_and_the_density(tmp_path: Any) -> None:
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    layout = Layout(frames=5, tokens=10, text=3)
    lists = block_lists(Pattern(block=4, decay_factor=0.5), layout)
    ax = plot(lists, layout=layout)
    (image,) = ax.images
    assert (image.get_array() == ~lists.to_dense_blocks()[0, 0].numpy()).all()
    assert f"density {lists.density():.3f}" in ax.get_title()
    assert ax.get_xlim() == (0, 53)
    ax.figure.savefig(tmp_path / "mask.png")
    assert (tmp_path / "mask.png").stat().st_size > 1000
    assert plot(lists, ax=ax) is ax
