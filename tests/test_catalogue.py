"""What `diffctrl info` and the command line say of methods and families is what the code is."""

import diffctrl.pipelines
from diffctrl import families, methods, processors, settings
from diffctrl.catalogue import FAMILIES, TEXT_FAMILIES
from diffctrl.control import Control
from diffctrl.families import text


def test_families_are_the_registered_ones():
    registered = {name: families.load_family(name) for name in families.FAMILIES}
    found = {family.name: (family.title, model) for model, family in registered.items()}
    assert found == {name: (entry.title, entry.model) for name, entry in FAMILIES.items()}


def test_text_families_are_what_they_say():
    assert {family.name: family.models[0] for family in text._FAMILIES} == {
        name: entry.model for name, entry in TEXT_FAMILIES.items()
    }
    for family in text._FAMILIES:
        assert all(kind.__module__ == family.module for kind in family.classes(*family.models))


def test_every_method_builds_with_its_defaults():
    for name, method in methods.METHODS.items():
        config = method.config_class()()
        processor = method.build(settings.as_plain(config))
        assert isinstance(processor, Control)
        assert processor.method == name
        assert processor.config == config
        assert processor.families == method.families
        assert method.families is None or set(method.families) <= set(FAMILIES | TEXT_FAMILIES)
        assert method.paper
        assert method.summary


def test_every_processor_of_a_method_is_registered():
    exported = {getattr(processors, name) for name in processors.__all__}
    methods_of = {
        kind.method
        for kind in exported
        if isinstance(kind, type) and issubclass(kind, Control) and hasattr(kind, "method")
    }
    assert methods_of - {"neutral", "capture"} == set(methods.METHODS)


def test_ready_pipelines_are_importable():
    for name in diffctrl.pipelines.__all__:
        assert getattr(diffctrl.pipelines, name).__name__ == name
