"""What grounding is measured on: the referring set of the shapes world, and datasets that a user has.

RefCOCO, RefCOCO+ and RefCOCOg, as the REFER toolkit lays them out, with the references as JSON:

    FOLDER/refcoco/refs(unc).json  FOLDER/refcoco/instances.json  FOLDER/images/mscoco/images/train2014/*.jpg

The toolkit keeps references in a pickle, which is code and is not read here. Whoever trusts theirs converts
it: `python -c "import json, pickle; json.dump(pickle.load(open('refs(unc).p', 'rb'), encoding='utf-8'),
open('refs(unc).json', 'w'))"`.

Ref-DAVIS17, as DAVIS 2017 with the first annotator's expressions:

    FOLDER/JPEGImages/480p/SEQUENCE/*.jpg  FOLDER/Annotations/480p/SEQUENCE/*.png
    FOLDER/ImageSets/2017/val.txt          FOLDER/davis_text_annotations/Davis17_annot1.txt
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffctrl.zoo import clips, worlds
from diffctrl.zoo.worlds.expressions import Wording
from diffctrl.zoo.worlds.referring_set import POINTED, SPLITS, referring_set

# The streams of scenes that figures are taken on, and that settings are chosen on.
TEST_SEED, VALIDATION_SEED = 61_000, 62_000
REFERENCES = {"refcoco": "refs(unc).json", "refcoco+": "refs(unc).json", "refcocog": "refs(umd).json"}
_ANNOTATION = re.compile(r'^(\S+)\s+(\d+)\s+"(.*)"\s*$')


@dataclass(frozen=True, slots=True)
class Sample:
    """One expression.

    Attributes:
        split: part of the data.
        scene: samples of one scene are not independent.
        expression: what is asked.
        picture: gives a PIL image, a (3, H, W) tensor, or a list of frames.
        truth: gives the (H, W) bool mask, or the (F, H, W) masks of a video; all False where nothing is
            meant.
    """

    split: str
    scene: int
    expression: str
    picture: Callable[[], Any]
    truth: Callable[[], Tensor]


def world_samples(
    count: int,
    *,
    seed: int,
    size: int = 128,
    splits: tuple[str, ...] = POINTED,
    wording: Wording = "world",
) -> list[Sample]:
    """`count` expressions, alike many of each split, rendered at `size` pixels."""
    samples: list[Sample] = []
    for place, split in enumerate(splits):
        number = count // len(splits) + (place < count % len(splits))
        if not number:
            continue
        # A stream for each split, so that no scene is in two of them.
        made = referring_set(split, number, seed=seed + SPLITS.index(split), wording=wording)
        pictures, masks = worlds.render(made.scenes, size)
        first = len({sample.scene for sample in samples})
        for item in made.items:
            picture = pictures[item.scene]
            mask = (
                torch.zeros(size, size, dtype=torch.bool)
                if item.target is None
                else masks[item.scene, item.target] > 0.5
            )
            samples.append(
                Sample(
                    split,
                    first + item.scene,
                    item.expression,
                    lambda picture=picture: picture,
                    lambda mask=mask: mask,
                )
            )
    return samples


CLIP_FRAMES = 17


def clip_samples(count: int, *, seed: int, size: int = 64, frames: int = CLIP_FRAMES) -> list[Sample]:
    """`count` expressions about clips of two moving shapes: by colour, by shape, by motion, in turn.

    Colours and motions of the two differ, and shapes where the shape is what is said.
    """
    kinds = ("colour", "shape", "motion")
    pairs = clips.sample(8 * count, seed=seed, frames=frames, split="test", forms=("pair",))
    samples: list[Sample] = []
    for index, facts in enumerate(clips.truth(pairs)):
        kind = kinds[len(samples) % len(kinds)]
        target = len(samples) // len(kinds) % 2
        mine, other = (getattr(facts.objects[place], kind) for place in (target, 1 - target))
        if mine == other or len(samples) == count:
            continue
        noun = {"colour": f"{mine} one", "shape": mine, "motion": f"one that {mine}"}[kind]
        pictures, masks = clips.render(pairs.select([index]), size)
        samples.append(
            Sample(
                f"clips by {kind}",
                index,
                f"the {noun}",
                lambda frames=pictures[0]: frames,
                lambda mask=masks[0, :, target] > 0.5: mask,
            )
        )
    return samples


def refcoco_samples(folder: Path, dataset: str, split: str, count: int | None) -> list[Sample]:
    """Expressions of one split ("val", "testA", "testB", "test") of RefCOCO, RefCOCO+ or RefCOCOg.

    Raises:
        ValueError: the folder is laid out otherwise; says what was looked for.
    """
    references = _json(folder / dataset / REFERENCES[dataset])
    instances = _json(folder / dataset / "instances.json")
    annotations = {entry["id"]: entry for entry in instances["annotations"]}
    images = {entry["id"]: entry for entry in instances["images"]}
    where = folder / "images" / "mscoco" / "images" / "train2014"
    samples: list[Sample] = []
    for reference in references:
        if reference["split"] != split:
            continue
        image, annotation = images[reference["image_id"]], annotations[reference["ann_id"]]
        path, size = where / image["file_name"], (image["height"], image["width"])
        for sentence in reference["sentences"]:
            samples.append(
                Sample(
                    f"{dataset} {split}",
                    int(reference["image_id"]),
                    sentence["sent"],
                    lambda path=path: _picture(path),
                    lambda annotation=annotation, size=size: coco_mask(annotation["segmentation"], size),
                )
            )
    if not samples:
        found = sorted({reference["split"] for reference in references})
        raise ValueError(f"{dataset} has no split {split!r}; it has {', '.join(found)}")
    return samples[:count]


def davis_samples(folder: Path, count: int | None) -> list[Sample]:
    """The expressions of Ref-DAVIS17's validation videos, each about one object.

    Raises:
        ValueError: the folder is laid out otherwise; says what was looked for.
    """
    listing = folder / "ImageSets" / "2017" / "val.txt"
    texts = folder / "davis_text_annotations" / "Davis17_annot1.txt"
    for path in (listing, texts):
        if not path.is_file():
            raise ValueError(f"{path} is not there; see the head of scripts/grounding_data.py for the layout")
    wanted = listing.read_text(encoding="utf-8").split()
    samples: list[Sample] = []
    for line in texts.read_text(encoding="utf-8", errors="replace").splitlines():
        match = _ANNOTATION.match(line.strip())
        if match is None or match[1] not in wanted:
            continue
        name, thing = match[1], int(match[2])
        samples.append(
            Sample(
                "ref-davis17",
                wanted.index(name),
                match[3],
                lambda name=name: [_picture(path) for path in _files(folder, "JPEGImages", name, ".jpg")],
                lambda name=name, thing=thing: _object_masks(
                    _files(folder, "Annotations", name, ".png"), thing
                ),
            )
        )
    return samples[:count]


def _files(folder: Path, kind: str, name: str, ending: str) -> list[Path]:
    found = sorted((folder / kind / "480p" / name).glob(f"*{ending}"))
    if not found:
        raise ValueError(f"{folder / kind / '480p' / name} holds no {ending} files")
    return found


def _object_masks(paths: list[Path], thing: int) -> Tensor:
    from PIL import Image

    frames = []
    for path in paths:
        with Image.open(path) as opened:  # a palette picture whose values are the objects' numbers
            frames.append(torch.from_numpy(np.array(opened)) == thing)
    return torch.stack(frames)


def _picture(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as opened:
        return opened.convert("RGB")


def _json(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"{path} is not there; see the head of scripts/grounding_data.py for the layout")
    return json.loads(path.read_text(encoding="utf-8"))


def coco_mask(segmentation: Any, size: tuple[int, int]) -> Tensor:
    """(H, W) bool of COCO's polygons, or of its run lengths (plain or compressed)."""
    if isinstance(segmentation, dict):
        counts = segmentation["counts"]
        return _from_runs(list(_runs(counts)) if isinstance(counts, str) else counts, size)
    from PIL import Image, ImageDraw

    sheet = Image.new("1", (size[1], size[0]))
    pen = ImageDraw.Draw(sheet)
    for polygon in segmentation:
        if len(polygon) >= 6:
            pen.polygon(list(zip(polygon[0::2], polygon[1::2], strict=True)), fill=1, outline=1)
    return torch.from_numpy(np.array(sheet))


def _from_runs(counts: list[int], size: tuple[int, int]) -> Tensor:
    """Runs of 0 and 1 in turn, down the columns."""
    values = np.repeat(np.arange(len(counts)) % 2 == 1, counts)
    return torch.from_numpy(values.reshape(size[1], size[0]).T.copy())


def _runs(text: str) -> Iterator[int]:
    """COCO's compressed counts: 5 bits a letter, the sixth goes on, from the third on as differences."""
    counts: list[int] = []
    value = shift = 0
    for letter in text:
        bits = ord(letter) - 48
        value |= (bits & 0x1F) << shift
        shift += 5
        if bits & 0x20:
            continue
        if bits & 0x10:
            value -= 1 << shift
        if len(counts) > 2:
            value += counts[-2]
        counts.append(value)
        yield value
        value = shift = 0
