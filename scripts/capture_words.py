"""Where the image looks at words of its prompt: a picture of the embedded model, and a map for each word.

python -m diffctrl.scripts.capture_words "a red star left of a blue ring" red star blue ring --out words.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image

import diffctrl
from diffctrl import CaptureSpec
from diffctrl.drawing.compare import Panel, side_by_side
from diffctrl.zoo import registry

MODEL = "shapes-sd3"
DEPTH = (0.5, 1.0)  # the later half of the blocks


def word_tokens(pipe: object, prompt: str, word: str) -> tuple[int, ...]:
    """Places of a word's pieces among the text tokens, which begin with those of CLIP.

    Raises:
        ValueError: the prompt does not hold the word.
    """
    start = prompt.find(word)
    if start < 0:
        raise ValueError(f"the prompt {prompt!r} does not hold the word {word!r}")
    spans = pipe.tokenizer(prompt, return_offsets_mapping=True)["offset_mapping"]  # type: ignore[attr-defined]
    stop = start + len(word)
    return tuple(place for place, (first, last) in enumerate(spans) if first < stop and last > start)


def shaded(picture: Image.Image, heat: torch.Tensor) -> Image.Image:
    """The picture, dark where the map (rows, columns) is low."""
    heat = (heat - heat.min()) / (heat.max() - heat.min())
    mask = Image.fromarray((255 * (0.1 + 0.9 * heat)).to(torch.uint8).numpy())
    black = Image.new("RGB", picture.size)
    return Image.composite(picture, black, mask.resize(picture.size, Image.Resampling.BILINEAR))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("prompt")
    parser.add_argument("words", nargs="+")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    pipe = registry.load(MODEL)
    specs = {
        word: CaptureSpec(quantity="row_mass", only_keys=word_tokens(pipe, args.prompt, word), depth=DEPTH)
        for word in args.words
    }
    generator = torch.Generator().manual_seed(args.seed)
    with diffctrl.capture(pipe, specs) as maps:
        picture = pipe(args.prompt, generator=generator, **registry.recommended(MODEL)).images[0]
    panels = [Panel(picture, args.prompt)]
    panels += [Panel(shaded(picture, maps.result(word).on_grid()[0, 0]), word) for word in args.words]
    side_by_side(panels).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
