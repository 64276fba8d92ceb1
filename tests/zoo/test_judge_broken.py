"""The judge of clips reads whatever a model draws: noise, empty clips, objects that come and go."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffctrl.zoo import clips, judge
from diffctrl.zoo.clips.vocabulary import SHAPES, WALL_RGB
from diffctrl.zoo.judge.motions import Motion, read_motion
from diffctrl.zoo.judge.tracks import SIDE, Track
from diffctrl.zoo.worlds.vocabulary import BACKGROUND_RGB, COLOUR_RGB, COLOURS

# A value that is not a number is a fault as well, however quietly it came about.
pytestmark = pytest.mark.filterwarnings("error")

ASKED = clips.parse("a red star grows slowly while a blue cross stands still on a navy background")
LENGTHS = st.sampled_from([1, 2, 3, 16, 17, 33, 33, 129])


@st.composite
def tracks(draw) -> tuple[Track, tuple[float, float] | None]:
    """A track as sightings can make it, and a wall or none."""
    count = draw(LENGTHS)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    first, life = draw(st.just(0) | st.integers(0, count - 1)), draw(st.sampled_from([count, 1, 6, 8, 9]))
    share = draw(st.sampled_from([1.0, 1.0, 0.3]))
    seen = np.zeros(count, dtype=bool)
    seen[first : first + life] = True
    seen &= rng.random(count) < share
    t = np.arange(count)
    speed, jitter = (draw(st.sampled_from([0.0, 0.0, 0.01, 0.1])) for _ in range(2))
    growth = draw(st.sampled_from([0.0, 0.05, 0.01, -0.005]))
    place = 0.5 + speed * t * np.exp(1j * rng.uniform(0, 2 * math.pi)) + jitter * rng.normal(size=count)
    shapes = (count, len(SHAPES))

    def where_seen(values: np.ndarray) -> np.ndarray:
        return np.where(seen.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)

    track = Track(
        whole=seen & (rng.random(count) < draw(st.sampled_from([1.0, 1.0, 0.2, 0.0]))),
        place=where_seen(place),
        colour=np.where(seen, rng.integers(0, len(COLOURS), count), -1),
        rgb=where_seen(rng.random((count, 3))),
        likeness=where_seen(rng.random(shapes)),
        radius=where_seen(np.broadcast_to((0.1 + growth * t).clip(min=0.02)[:, None], shapes)),
        angle=where_seen(rng.uniform(0, math.pi, shapes) * draw(st.sampled_from([0.0, 1.0]))),
    )
    return track, draw(st.sampled_from([None, (0.35, 0.65)]))


@settings(max_examples=1000, deadline=None)
@given(tracks())
def test_any_track_is_read(one):
    with np.errstate(divide="raise", invalid="raise"):
        found = read_motion(*one)
    if found != Motion(phrase=None):
        assert len(one[0].whole) >= 17
        assert clips.parse(f"a red star {found.phrase}")


def drawn(kind: str, count: int, walled: bool, number: int, seed: int) -> torch.Tensor:
    """(T, 3, 64, 64): a clip of a kind that the world of clips does not have."""
    rng = np.random.default_rng(seed)
    tones = np.array([*COLOUR_RGB, *(tone for pair in BACKGROUND_RGB for tone in pair), (0, 0, 0), (1, 1, 1)])
    video = np.broadcast_to(rng.choice(tones), (count, SIDE, SIDE, 3)).copy()
    if walled:
        video[:, :, 22:42] = WALL_RGB
    if kind == "noise":
        video = rng.random(video.shape)
    if kind == "grains":  # more regions than any clip has objects
        where = rng.random((count, SIDE // 4, SIDE // 4)) < 0.3
        video[where.repeat(4, 1).repeat(4, 2)] = rng.choice(tones)
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    for _ in range(number if kind == "blobs" else 0):
        first, life = rng.integers(0, count) * rng.integers(0, 2), rng.choice([3, 8, count])
        place, speed = rng.uniform(0, SIDE, 2), rng.normal(0, 1.5, 2) * rng.integers(0, 2)
        radius, growth = rng.uniform(1, 16), rng.normal(0, 0.7) * rng.integers(0, 2)
        colour, share, square = rng.choice(tones), rng.choice([0.3, 1, 1]), rng.integers(0, 2)
        for t in range(first, min(first + life, count)):
            if rng.random() < share:
                dx, dy = np.abs(x - place[0] - speed[0] * t), np.abs(y - place[1] - speed[1] * t)
                away = np.maximum(dx, dy) if square else np.hypot(dx, dy)
                video[t][away < radius + growth * (t - first)] = colour
    return torch.from_numpy(video).permute(0, 3, 1, 2).float()


@pytest.mark.parametrize("frames", [33, 129])
@pytest.mark.parametrize("shown", [6, 8, 9])
def test_what_grows_and_is_gone_at_once_has_no_motion(frames, shown):
    """No growth of the world ends within eight frames, so that they do not tell its rate."""
    y, x = np.mgrid[:SIDE, :SIDE] + 0.5
    video = np.broadcast_to(np.float32(BACKGROUND_RGB[0][0]), (frames, SIDE, SIDE, 3)).copy()
    for t in range(shown):
        video[t][np.hypot(x - 30, y - 30) < 8 + 0.7 * t] = COLOUR_RGB[0]
    (one,) = judge.read_clip(torch.from_numpy(video).permute(0, 3, 1, 2)).objects
    assert (one.facts.colour, one.facts.shape) == ("red", "circle")
    assert one.facts.motion == ("grows" if shown == 9 else None)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        drawn,
        st.sampled_from(["noise", "constant", "grains", "blobs", "blobs", "blobs"]),
        LENGTHS,
        st.booleans(),
        st.integers(1, 6),
        st.integers(0, 2**32 - 1),
    )
)
def test_any_clip_is_read(video):
    with np.errstate(divide="raise", invalid="raise"):
        verdict = judge.check_clip(video, ASKED)
    assert str(verdict)
    assert len(verdict.reading.objects) <= 4
    for one in verdict.reading.objects:
        assert 0 < one.presence <= 1
        assert one.facts.motion is None or len(video) >= 17
        assert one.facts.motion is None or clips.parse(f"a red star {one.facts.motion}")


@pytest.mark.parametrize("shape", [(0, 3, 64, 64), (17, 3, 64, 32), (17, 1, 64, 64), (3, 64, 64)])
def test_what_is_no_clip_is_refused(shape):
    with pytest.raises(ValueError, match="video must be"):
        judge.read_clip(torch.zeros(shape))
    with pytest.raises(ValueError, match="not finite"):
        judge.read_clip(torch.full((17, 3, 64, 64), math.nan))
