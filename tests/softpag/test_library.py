"""Head sets by name: found for the model at hand, refused on another, taken where nothing is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import diffctrl
from diffctrl.pipelines import SoftPAGGuidance
from diffctrl.processors import SoftPAGAttnProcessor
from diffctrl.processors.universe import universe_of
from diffctrl.softpag import Head, SoftPAGConfig, library
from diffctrl.softpag.headset import Chosen, HeadSet
from diffctrl.zoo import registry
from tests.helpers import example, run, shared


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of sets for the tiny SD3 model."""
    signature = universe_of(shared("sd3")).signature
    folder = tmp_path / "sets" / "tiny"
    folder.mkdir(parents=True)
    for name, heads in (("quality", (Head(1, 1), Head(2, 0))), ("style-soft", (Head(0, 0),))):
        HeadSet(chosen=tuple(map(Chosen, heads)), signature=signature).save(folder / f"{name}.json")
    monkeypatch.setattr(library, "FOLDER", tmp_path / "sets")
    return folder


def controlled(model: Any, *args: Any, **settings: Any) -> dict[str, list[float]]:
    """Layer -> strengths that a processor would perturb there."""
    processor = SoftPAGAttnProcessor(*args, **settings)
    with diffctrl.apply(model, processor) as handle:
        sites = list(next(iter(handle.contexts.values())).sites.values())
        return {site: strength.tolist() for site, strength in processor._strengths(sites).items()}


def test_a_name_takes_the_set_of_the_model(shipped: Path) -> None:
    expected = controlled(shared("sd3"), "L1H1,L2H0", u=0.4)
    assert controlled(shared("sd3"), "quality", u=0.4) == expected
    assert controlled(shared("sd3"), u=0.4) == expected  # nothing said
    assert controlled(shared("sd3"), "style:soft", u=1.0) == controlled(shared("sd3"), "L0H0", u=1.0)
    assert controlled(shared("sd3"), "L0", u=0.4) != expected


def test_a_set_brings_its_strength_and_scale(shipped: Path) -> None:
    """u and w of the set hold where the user says none: by name, where nothing is said, and as an object."""
    signature = universe_of(shared("sd3")).signature
    found = HeadSet(
        chosen=(Chosen(Head(1, 1)),), signature=signature, perturbation={"u": 0.25, "w": 3.0}, use={"w": 1.5}
    )
    found.save(shipped / "quality.json")
    library._load.cache_clear()
    assert (found.u, found.w) == (0.25, 1.5)
    for heads in (None, "quality", found):
        assert controlled(shared("sd3"), heads) == controlled(shared("sd3"), "L1H1", u=0.25)
        assert controlled(shared("sd3"), heads, u=0.7) == controlled(shared("sd3"), "L1H1", u=0.7)
        assert guided(heads) == pytest.approx(guided("L1H1", u=0.25, w=1.5))
        assert guided(heads, w=4.0) == pytest.approx(guided("L1H1", u=0.25, w=4.0))
        assert guided(heads, w=4.0) != pytest.approx(guided(heads))
        with diffctrl.apply(shared("sd3"), SoftPAGAttnProcessor(heads)) as handle:
            (stats,) = handle.stats().values()
        assert "u=0.25, w=1.5" in stats["controls"][0]
    with pytest.raises(ValueError, match="heads mean nothing there"):  # an object is checked like a name
        diffctrl.apply(shared("flux"), SoftPAGAttnProcessor(found))
    guider = SoftPAGGuidance(heads=found)
    assert (guider.settings.u, guider.settings.w) == (guider.config["u"], guider.config["w"]) == (0.25, 1.5)


def guided(*args: Any, **settings: Any) -> list[float]:
    """The guided prediction of one forward."""
    with diffctrl.apply(shared("sd3"), SoftPAGAttnProcessor(*args, **settings)):
        return run(shared("sd3"), example("sd3")).flatten()[:50].tolist()


def test_an_empty_set_is_refused_not_neutral(shipped: Path) -> None:
    signature = universe_of(shared("sd3")).signature
    for name in ("quality", "style-soft"):
        HeadSet(chosen=(), signature=signature).save(shipped / f"{name}.json")
    library._load.cache_clear()
    with pytest.raises(ValueError, match=r"'style:soft' is empty: in the search for it no head did better"):
        diffctrl.apply(shared("sd3"), SoftPAGAttnProcessor("style:soft"))
    with pytest.raises(ValueError, match="heads is empty"):
        SoftPAGAttnProcessor(HeadSet(chosen=()))
    assert controlled(shared("sd3")) == controlled(shared("sd3"), "L1")  # as without a set


def test_other_models_and_targets_keep_their_default(shipped: Path) -> None:
    assert list(controlled(shared("flux"))) == ["transformer_blocks.1.attn"]
    assert controlled(shared("sd3"), kind="uniform") == controlled(shared("sd3"), "L1", kind="uniform")
    assert controlled(shared("sd3"), kind="skip_block") == controlled(shared("sd3"), "L1", kind="skip_block")


def test_names_are_checked_where_they_are_given(shipped: Path) -> None:
    with pytest.raises(
        ValueError, match=r"no head set 'qualty' \(did you mean quality\?\); shipped: quality, style:"
    ):
        SoftPAGConfig(heads="qualty")
    with pytest.raises(ValueError, match="acts on whole layers, and 'quality' names heads"):
        SoftPAGConfig(heads="quality", kind="skip_block")
    with pytest.raises(
        ValueError, match=r"'quality' was found on SD3.*and the model is FluxTransformer2DModel"
    ):
        diffctrl.apply(shared("flux"), SoftPAGAttnProcessor("quality"))
    assert SoftPAGConfig(heads="quality", u=0.0).rests
    assert not SoftPAGConfig(heads="quality").rests
    assert "heads=quality" in SoftPAGAttnProcessor("quality").describe()


def test_the_guider_keeps_the_name(shipped: Path, tmp_path: Path) -> None:
    SoftPAGGuidance(heads="style:soft").save_pretrained(tmp_path / "guider")
    assert SoftPAGGuidance.from_pretrained(tmp_path / "guider").settings.heads == "style:soft"


def test_no_name_is_a_head() -> None:
    for head in ("L3", "L3H1", "attn2:L0H5", "L3H1=0.7", "L1,L2"):
        assert not library.is_name(head)


def test_shipped_sets_belong_to_embedded_models() -> None:
    """What lies in the package can be read, says how it was found, and fits the model it is filed under."""
    for path in library.FOLDER.glob("*/*.json"):
        found = HeadSet.load(path)
        name = path.parent.name
        assert name in registry.EMBEDDED
        assert found.model["id"] == name
        import diffusers

        config = registry.path(name) / "transformer"
        model: Any = diffusers.SD3Transformer2DModel
        found.check(universe_of(model.from_config(model.load_config(config))).signature)
        assert found.pairs
        assert found.objective["name"]
        assert set(found.sampling) >= {"steps", "scheduler", "dtype"}
        assert library.is_name(path.stem.replace("-", ":", 1))
