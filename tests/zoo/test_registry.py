"""The registry of embedded models: loaded without network or optional packages, called as advised."""

import subprocess
import sys

import pytest

from diffctrl.zoo import registry


def _run_blocked(code: str) -> list[str]:
    """Lines that code prints in a process without network and optional packages."""
    begin = """
import socket, sys

# None in sys.modules: `import` fails, and `importlib.util.find_spec` says that there is no such package.
sys.modules.update(dict.fromkeys(["sentencepiece", "ftfy", "google"]))

def no_network(*_, **__):
    raise OSError("no network in this test")

socket.create_connection = no_network
import torch
torch.set_num_threads(1)
"""
    done = subprocess.run([sys.executable, "-c", begin + code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.splitlines()


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="shapes-sd3"):
        registry.load("shapes-sd4")


def test_missing_weights_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "_WEIGHTS", tmp_path)
    with pytest.raises(FileNotFoundError, match="train_zoo_image"):
        registry.path("shapes-sd3")
    with pytest.raises(FileNotFoundError, match="train_zoo_text"):
        registry.path("scenes-lm")
    with pytest.raises(FileNotFoundError, match="train_zoo_video"):
        registry.path("shapes-wan")


def test_importing_the_zoo_loads_no_heavy_package():
    code = (
        "import sys, diffctrl.zoo; "
        "print([name for name in ('torch', 'diffusers', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_all_models_together_are_what_the_package_has_room_for():
    files = [file for name in registry.EMBEDDED for file in registry.path(name).rglob("*")]
    assert sum(file.stat().st_size for file in files) <= 35_000_000


@pytest.mark.parametrize("name", sorted(registry.EMBEDDED))
def test_files_are_small_and_safe(name):
    files = [file for file in registry.path(name).rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".json", ".safetensors", ".md"}
    assert max(file.stat().st_size for file in files) <= 12_000_000
    assert (registry.path(name) / "README.md").is_file()


def test_it_loads_with_optional_packages_blocked_and_draws_what_is_asked():
    lines = _run_blocked("""
from diffctrl.zoo import judge, registry

pipeline = registry.load("shapes-sd3")
assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
pipeline.set_progress_bar_config(disable=True)
caption = "a red circle on a white background"
images = [
    pipeline(caption, generator=torch.Generator().manual_seed(seed), output_type="pt",
             **registry.recommended("shapes-sd3")).images[0]
    for seed in range(3)
]
print(sum(judge.check(image, judge.parse(caption)).exact for image in images))
""")
    assert int(lines[-1]) >= 2


def test_the_video_model_draws_what_is_asked_with_optional_packages_blocked():
    lines = _run_blocked("""
from diffctrl.zoo import registry
from diffctrl.zoo.judge.clips import read_clip

pipeline = registry.load("shapes-wan")
assert pipeline.transformer.dtype == pipeline.vae.dtype == torch.float32
pipeline.set_progress_bar_config(disable=True)
captions = ["a red circle moves right quickly on a white background",
            "a green square moves up slowly on a navy background"]
call = registry.recommended("shapes-wan") | {"num_inference_steps": 8}
clips = pipeline(captions, generator=torch.Generator().manual_seed(0), output_type="pt", **call).frames
for clip in clips:
    reading = read_clip(clip)
    (seen,) = reading.objects
    print(reading.background, seen.facts.colour, seen.facts.motion, seen.facts.speed, sep=",")
""")
    assert lines == ["white,red,moves right,quickly", "navy,green,moves up,slowly"]


def test_the_same_seed_gives_the_same_picture_in_any_batch():
    import torch

    pipeline, call = registry.load("shapes-sd3"), registry.recommended("shapes-sd3")
    pipeline.set_progress_bar_config(disable=True)
    call["num_inference_steps"] = 4
    captions = ["a red star left of a blue ring", "a green square"]

    def drawn(chosen: list[int]) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(index) for index in chosen]
        return pipeline([captions[i] for i in chosen], generator=generators, output_type="pt", **call).images

    together = drawn([0, 1])
    torch.testing.assert_close(together[:1], drawn([0]), atol=2e-3, rtol=0)
    assert torch.equal(together, drawn([0, 1]))
