"""Text becomes typed settings, and settings become text again."""

from dataclasses import dataclass
from typing import Literal

import pytest

from diffctrl import settings
from diffctrl.errors import BadRequestError
from diffctrl.softpag import SoftPAGConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    count: int = 1
    share: float = 0.5
    sparse: bool = True
    mode: Literal["a", "b"] = "a"
    limit: int | None = None
    name: str | tuple[str, ...] | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ({"count": "3"}, Config(count=3)),
        ({"share": "1e-2"}, Config(share=0.01)),
        ({"sparse": "off"}, Config(sparse=False)),
        ({"mode": "b"}, Config(mode="b")),
        ({"limit": "7"}, Config(limit=7)),
        ({"limit": "none"}, Config(limit=None)),
        ({"name": "x,y"}, Config(name="x,y")),
        ({"share": 0.25}, Config(share=0.25)),
    ],
)
def test_converts(text, value):
    assert settings.parse(Config, text, of="test") == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ({"count": "3.5"}, "not a whole number"),
        ({"sparse": "maybe"}, "neither true nor false"),
        ({"mode": "c"}, "not one of a, b"),
        ({"limit": "many"}, "limit=many is not a whole number"),
        ({"shares": "1"}, "did you mean share"),
    ],
)
def test_refuses(text, says):
    with pytest.raises(BadRequestError, match=says):
        settings.parse(Config, text, of="test")


def test_a_method_config_comes_back_from_plain_values():
    config = SoftPAGConfig(heads="L3H1,attn2:L0", u=0.25, scope="image_rows")
    plain = settings.as_plain(config)
    assert plain["heads"] == "L3H1,attn2:L0"
    assert settings.parse(SoftPAGConfig, plain, of="softpag") == config


def test_infinity_survives_json():
    plain = settings.as_plain(Config(share=float("inf")))
    assert plain["share"] == "inf"
    assert settings.parse(Config, plain, of="test") == Config(share=float("inf"))
